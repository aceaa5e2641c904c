"""What a run is made of, in a few characters each, to tell at a resume what has changed since."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trl.config.code import RECIPE_MODULE, neighbours
from trl.kernels.sharded import whole

PROBE = "The Film's 3rd act,\n\twas  GREAT … naïve?"
"""Of what a tokenizer makes of it: its vocabulary does not say how it cuts texts up."""

FREE = {"url", "headers", "_secrets", "timeout", "retries", "backoff"}
FREE |= {"batch_size", "concurrency", "device", "annotators", "page", "host", "port"}
FREE |= {"tells", "stopping", "_live"}
"""Settings of scorers that change no score but by rounding, and what holds their secrets: of a URL
it is what was given for it that counts."""


def fingerprint(*things: Any) -> str:
    """Return a hash of values that JSON has, and of sets, token ids and messages."""
    text = json.dumps(things, sort_keys=True, default=_as_json)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def checksum(prompts: Any) -> int:
    """Return what tells other prompts, or rows of them, from these."""
    return zlib.crc32(json.dumps(prompts, default=_as_json).encode())


def _as_json(value: Any) -> Any:
    """Return token ids, a set, or a message that is no dict, as JSON has them; else the type."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return dict(value) if isinstance(value, Mapping) else type(value).__name__


def of_weights(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of a few numbers of each weight, of matrices as bfloat16 has them.

    What `trl.compute.precision.dither` fills in is none of them.
    """
    digest = hashlib.sha256()
    for name, weight in named:
        few = whole(weight.detach()).flatten()[:: max(1, weight.numel() // 16)][:16]
        few = few.bfloat16() if weight.ndim > 1 and weight.is_floating_point() else few
        digest.update(f"{name}{few.tolist()}".encode())
    return digest.hexdigest()[:32]


def of_model(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of some weights of a model, and of what its configuration says beside."""
    settings = [getattr(model, name, None) for name in ("config", "generation_config")]
    said = [each.to_diff_dict() for each in settings if hasattr(each, "to_diff_dict")]
    free = ("_name_or_path", "transformers_version")
    return fingerprint(
        of_weights(named), *({k: v for k, v in each.items() if k not in free} for each in said)
    )


def of_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Return a hash of vocabulary, templates and special tokens, and of the tokens of a text."""
    if tokenizer is None:
        return None
    settings = [getattr(tokenizer, name, None) for name in ("chat_template", "special_tokens_map")]
    return fingerprint(tokenizer.get_vocab(), tokenizer(PROBE)["input_ids"], *map(str, settings))


def of_scorer(scorer: Any) -> str:
    """Return a hash of a scorer's weights, of its settings and of the code that is not trl's."""
    return fingerprint(*_parts_of(scorer))


def _parts_of(thing: Any) -> Iterator[Any]:
    """Yield what tells a scorer, or what it is made of, from another."""
    if thing is None or isinstance(thing, bool | int | float | str | Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for each in thing:
            yield from _parts_of(each)
    elif isinstance(thing, Mapping):
        for name, value in thing.items():
            yield from [str(name), *_parts_of(value)]
    elif isinstance(thing, PreTrainedTokenizerBase):
        yield of_tokenizer(thing)
    elif isinstance(thing, nn.Module):
        yield of_model(thing, thing.named_parameters())
    elif isinstance(thing, functools.partial):
        yield from _parts_of([thing.func, thing.args, thing.keywords])
    elif type(thing).__module__.startswith("trl."):
        settings = {k: v for k, v in sorted(vars(thing).items()) if k not in FREE}
        yield from [type(thing).__name__, *_parts_of(settings)]
    elif callable(thing):
        yield _code_of(thing)
        # Models that an object has, or that a function finds around itself.
        around = dict(getattr(thing, "__dict__", {}))
        if inspect.isroutine(thing) and hasattr(thing, "__code__"):
            found = inspect.getclosurevars(thing)
            around |= {**found.globals, **found.nonlocals}
        models = {k: v for k, v in sorted(around.items()) if isinstance(v, nn.Module)}
        yield from _parts_of(models)


def _code_of(thing: Any) -> list[Any]:
    """Return the name of a function or an object's class, and the text of its file, if known.

    What is written into a script or a notebook stands among other things, which may change: only
    its own text counts, and of a lambda, which has no lines of its own, what it is compiled to.
    """
    named: Any = thing if hasattr(thing, "__qualname__") else type(thing)
    here, code = named.__module__ == "__main__", getattr(named, "__code__", None)
    if (named.__module__ or "").startswith("trl."):
        return [named.__qualname__]  # the version of trl is told
    if here and code and code.co_name == "<lambda>":
        return [code.co_code.hex(), code.co_names, _constants(code)]
    try:
        module = inspect.getmodule(named)
        beside = module is not None and module.__name__.startswith(RECIPE_MODULE)
        files = neighbours(Path(str(module.__file__)).resolve()) if beside else []
        texts = [inspect.getsource(named if here else module), *(f.read_text() for f in files)]
        return [named.__qualname__, *texts]
    except (OSError, TypeError):  # written in C, or typed in
        return [named.__qualname__]


def _constants(code: CodeType) -> list[Any]:
    """Return the constants of compiled code, and of the code in it."""
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    plain = [each for each in code.co_consts if not isinstance(each, CodeType)]
    return [plain, *([each.co_code.hex(), each.co_names, _constants(each)] for each in inner)]
