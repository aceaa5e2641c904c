"""Which gradients of a model are kept from update to update, see `trl.kernels.gradients`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from trl.anatomy import decoder, language_model
from trl.kernels.gradients import Gradients, has_hooks
from trl.models.critic import critic_of

_SPARSE_DEVICES = ("cpu", "cuda")


@contextmanager
def kept_gradients(
    model: nn.Module,
    weights: Sequence[nn.Parameter],
    received: Sequence[nn.Parameter],
    *,
    keep_low: bool = False,
    exchanged: bool = False,
) -> Iterator[Gradients]:
    """Collect the gradients of the passes inside; afterwards there are none.

    Those of embeddings, and of a language head tied to one, are added to in place.

    Args:
        model: The model whose weights are trained.
        weights: Those of them that an optimiser owns.
        received: Those that get their gradients from `Gradients.receive`.
        keep_low: See `Gradients`.
        exchanged: Whether processes wait until autograd has handed each gradient over, which it
            never does for a head alone whose gradient was added in place.
    """
    trained = {id(weight) for weight in weights}
    plain = language_model(model)
    plains = [plain, *(language_model(critic) for critic in filter(None, [critic_of(model)]))]
    texts = [p if p.config.is_encoder_decoder else decoder(p) for p in plains]  # no images' parts
    adapted = {id(getattr(module, "base_layer", None)) for module in model.modules()}
    embeddings = [
        module
        for text in texts
        for module in text.modules()
        if isinstance(module, nn.Embedding)
        and id(module.weight) in trained
        and id(module) not in adapted  # its adapter looks up dense rows in the same way
        and not has_hooks(module.weight)
        and module.max_norm is None
        and not module.scale_grad_by_freq
    ]
    adding = [*embeddings, None if exchanged else plain.get_output_embeddings()]
    added_to = [
        module.weight
        for module in adding
        if module is not None and id(module.weight) in trained and not has_hooks(module.weight)
    ]
    received = [weight for weight in received if id(weight) in trained]
    kept = {id(weight) for weight in (*received, *added_to)}
    others = [weight for weight in model.parameters() if id(weight) not in kept]
    gradients = Gradients(received, added_to, others, keep_low=keep_low)
    sparse = [(m, m.sparse) for m in embeddings if m.weight.device.type in _SPARSE_DEVICES]
    try:
        for module, _ in sparse:
            module.sparse = True  # only the rows that were used are added
        with gradients.collect():
            yield gradients
    finally:
        for module, before in sparse:
            module.sparse = before
