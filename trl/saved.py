"""What is wrong with the folder of a saved model: one sentence with the folder, the file, the fix.

The libraries that load a folder were written for whole ones. Of a damaged one they raise whatever
comes up, mostly without the name of the file; so the files are looked at again, each by itself.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import safe_open

from trl.config.places import not_a_model

MODEL_FILE, ADAPTER_FILE = "model.safetensors", "adapter_model.safetensors"
OLDER_HEAD_FILE, PICKLE_FILE = "value_head.safetensors", "pytorch_model.bin"
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
TOKENIZER_CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
VOCABULARIES = (TOKENIZER, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Files that hold the tokens of a tokenizer, any one of them."""
SCORE_OFFSET = "score_offset"
"""What config.json calls a number that is added to the output of a head without a bias."""
GENERATION_CONFIG = "generation_config.json"
READ = (CONFIG, ADAPTER_CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG)
READ += ("vocab.json", "special_tokens_map.json", "added_tokens.json")
"""What is read of a folder as JSON, besides the indices of weights."""
PICKLE_ADVICE = (
    "Pickles can run code when they are loaded: if you trust where this one comes from, pass "
    "allow_pickle=True, then save_pretrained once to have safetensors."
)
FIX = "copy it anew from where it came, or save the model again with save_pretrained"
OWN = (ValueError, TypeError, FileNotFoundError, ImportError)
"""What trl itself raises of a folder, with a sentence."""


# -- before it is loaded ---------------------------------------------------------------------------


def check_there(name: str) -> None:
    """Raise a FileNotFoundError for what can only be a folder, if there is none."""
    if problem := not_a_model(name):
        raise FileNotFoundError(
            f"the model folder `{name}` {problem}: pass a folder with {CONFIG} and {MODEL_FILE}, "
            "or the name of a model on the Hugging Face Hub."
        )


def check_weights(folder: Path, *, allow_pickle: bool) -> None:
    """Raise for a folder without weights, or with pickles alone unless they may be loaded."""
    settings = folder / GENERATION_CONFIG
    if settings.exists() and (problem := _problem(settings)):  # which transformers leaves out
        raise ValueError(_damaged(settings, problem))
    files = sorted(entry.name for entry in folder.glob("*"))
    if any(file.endswith(".safetensors") and file != OLDER_HEAD_FILE for file in files):
        return
    if not any(file.startswith("pytorch_model") for file in files):
        raise FileNotFoundError(
            f"the model folder `{folder}` must hold weights ({MODEL_FILE}), found "
            f"{files or 'nothing'}: save the model there with save_pretrained."
        )
    if not allow_pickle:
        refuse_pickle(folder, "weights", PICKLE_FILE)


def refuse_pickle(name: object, what: str, file: str) -> NoReturn:
    """Raise since a file is a pickle, and say how to load it nevertheless."""
    raise ValueError(f"`{name}` holds its {what} in {file}, a pickle. {PICKLE_ADVICE}")


# -- what went wrong -------------------------------------------------------------------------------


@contextmanager
def damage_told(folder: Path | None, *needed: str) -> Iterator[None]:
    """Raise what is raised inside as one sentence on the folder, unless it is trl's own.

    Args:
        folder: Where the files are; None: on the hub, whose files are whole.
        *needed: Files without which nothing is loaded. The first one is at fault if no other is.

    Raises:
        OSError, ValueError: naming the folder, the file and what to do.
    """
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1].filename
        own = type(error) in OWN and Path(place).is_relative_to(Path(__file__).parent)
        if folder is None or own or "unexpected keyword" in str(error):  # of the caller
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(damage(folder, error, *needed)) from error


def damage(folder: Path, error: Exception, *needed: str) -> str:
    """Return the sentence: folder, file, what is wrong with it, what to do."""
    start = f"the model folder `{folder}` "
    if not (folder / needed[0]).exists() and (folder / ADAPTER_FILE).exists():
        needed = (ADAPTER_CONFIG,)
    for name in needed:
        others = VOCABULARIES if name == TOKENIZER else (name,)
        if not any((folder / each).exists() for each in others):
            return f"{start}holds no {name}: {FIX}."
    read = [folder / name for name in READ if (folder / name).exists()]
    weights = sorted(folder.glob("*.index.json")) + sorted(folder.glob("*.safetensors"))
    for path in read + weights:
        if problem := _problem(path):
            return _damaged(path, problem)
    told = " ".join(str(error).split()) or type(error).__name__
    if "custom code" in told or "trust_remote_code" in told:
        return (
            f"{start}runs code of its own, named in {needed[0]}: look at that code, and pass "
            "trust_remote_code=True (of a recipe, the flag --model.trust-remote-code) to run it."
        )
    if "mismatched" in told or "size mismatch" in told:
        told = "it says other sizes than the weights have"
    told = told.partition(". ")[0].rstrip(".")[:200]
    told = f"no {told}" if isinstance(error, KeyError) else told
    return f"{start}cannot be loaded with its {needed[0]} ({told}): {FIX}."


def _damaged(path: Path, problem: str) -> str:
    return f"the model folder `{path.parent}` has a damaged {path.name}, which {problem}: {FIX}."


def _problem(path: Path) -> str | None:
    """Return what is wrong with a file by itself, as a clause; None: nothing is."""
    if not path.is_file():
        return "is no file"
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if not start:
            return "is empty"
        if start.startswith(b"version https://git-lfs"):
            return "is but a pointer of Git LFS (git lfs pull gets the file)"
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as weights:
                weights.keys()
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or (not values and path.name in (CONFIG, ADAPTER_CONFIG)):
            return f"must hold settings, got {json.dumps(values)[:40]}"
        shards = set(values.get("weight_map", {}).values())
        missing = sorted(each for each in shards if not (path.parent / each).is_file())
        return f"names {missing[0]}, which is not there" if missing else None
    except Exception as error:  # SafetensorError, JSONDecodeError, UnicodeDecodeError, OSError, …
        return f"cannot be read ({error})"
