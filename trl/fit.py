"""Whether a model can write, whether tokens fit it (it must know each, and have a position), and
what to do where the memory does not do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trl.anatomy import is_encoder_decoder, language_model, position_limits, vocabulary_size
from trl.config.errors import refuse

_ALLOCATORS_SAY = "can't allocate memory", "not enough memory", "out of memory"
_OUT_OF_MEMORY = "Out of memory while"
_TAKES_LESS = (
    "What takes less: `forward_batch_size` or `token_budget` of the settings of PPO (fewer "
    "responses in a pass, with the same results); `max_rows` of the sampler (fewer written at "
    "once); and "
    "training an adapter (`lora` in a recipe, `peft_config`) or the top alone (`unfrozen_layers`), "
    "or calling the model's gradient_checkpointing_enable()."
)


def uncompiled(model: Any, name: str) -> nn.Module:
    """Return the language model, without what `torch.compile` has put around it.

    Every pass of sampling has another length: each would be compiled anew.

    Args:
        model: A language model of transformers, or a wrapper around one.
        name: What errors call it.

    Raises:
        TypeError: if it is something else.
    """
    model = getattr(model, "_orig_mod", model)
    plain = language_model(model) if isinstance(model, nn.Module) else None
    if not hasattr(plain, "get_input_embeddings") or not hasattr(plain, "config"):
        got = f"one of {type(model).__name__}" if isinstance(model, nn.Module) else repr(model)
        rule = "be a language model of transformers, or have one as its `.language_model`"
        fix = "AutoModelForCausalLM.from_pretrained(...) loads one"
        refuse(name, rule, got, fix, error=TypeError)
    return model


def check_end_ids(model: nn.Module, token_ids: Sequence[int]) -> None:
    """Raise unless the model has an embedding for every token that is to end a response."""
    if (largest := max(token_ids, default=0)) >= vocabulary_size(model):
        fix = "use the model's own tokenizer, or model.resize_token_embeddings(len(tokenizer))"
        rule = f"hold ids from 0 to {vocabulary_size(model) - 1}, the tokens of the model"
        refuse("eos_token_id", rule, largest, fix)


def check_ids(model: nn.Module, rows: Tensor | Sequence[Tensor], name: str) -> None:
    """Raise unless the model has an embedding for every token of the rows [B, L], or [L_i] each."""
    last = vocabulary_size(model) - 1
    # One look at all of them.
    tokens = rows if isinstance(rows, Tensor) else torch.cat([row.cpu() for row in rows])
    if 0 <= int(tokens.min()) <= int(tokens.max()) <= last:
        return
    for index, row in enumerate(rows):
        if int(row.min()) < 0 or int(row.max()) > last:
            got = f"{int(row.min())} to {int(row.max())}"
            fix = "encode with the model's own tokenizer"
            refuse(f"{name}[{index}]", f"hold token ids from 0 to {last}", got, fix)


def check_positions(
    model: nn.Module,
    queries: Tensor | Sequence[int],
    responses: Tensor | int,
    name: str = "queries",
) -> None:
    """Raise unless queries of these lengths [B], and responses to them, fit the model.

    Args:
        model: A model without a known number of positions takes any.
        queries: [B] tokens of each.
        responses: [B], or the most that any may have.
        name: What errors call the queries.
    """
    limit, border = position_limits(model)
    if limit is None:
        return
    queries = queries if isinstance(queries, Tensor) else torch.tensor(queries, device="cpu")
    responses = torch.as_tensor(responses, device=queries.device).expand_as(queries)
    apart = is_encoder_decoder(model)  # each side has its own positions
    needed = torch.maximum(queries, responses) if apart else queries + responses
    if int(needed.max()) > limit:
        row = int(needed.argmax())
        rule, sign = ("each fit", "and") if apart else ("fit", "+")
        raise ValueError(
            f"query {sign} response must {rule} the model's {limit} positions, got "
            f"{int(queries[row])} {sign} {int(responses[row])} tokens in row {row} of `{name}`: "
            "shorten the query or the response (`max_new_tokens`)."
        )
    shortest, longest = int(queries.min()), int(needed.max())
    if border is not None and shortest <= border < longest:
        rule = f"all be longer than {border} tokens, or fit into as many with their responses"
        got = f"a query of {shortest} and a row of {longest} tokens"
        fix = (
            "beyond them the model's LongRoPE has other frequencies for all rows of a pass, and "
            "recorded log-probs would be wrong: shorten the responses, or leave out some queries"
        )
        refuse(name, rule, got, fix)


@contextmanager
def out_of_memory_told(doing: str) -> Iterator[None]:
    """Add to an error of memory what takes less of it; the error stays as it is.

    Args:
        doing: What is done inside, "sampling".
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        told = any(note.startswith(_OUT_OF_MEMORY) for note in getattr(error, "__notes__", ()))
        if _is_of_memory(error) and not told:
            error.add_note(f"{_OUT_OF_MEMORY} {doing}. {_TAKES_LESS}")
        raise


def _is_of_memory(error: BaseException) -> bool:
    """Return whether an error is that of an allocator: CUDA's is a type, others have words."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(words in str(error) for words in _ALLOCATORS_SAY)
