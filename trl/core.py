"""Pure tensor maths on masked tensors: the formulas that everything else is built from.

Shape legend, used in every docstring of the package:

    B  rows of a batch                  Q  query tokens, padded on the left
    R  response tokens, padded right    T  Q + R
    V  vocabulary                       G  samples of one query (a group)

Conventions:

* Masks are bool and True means "counts". What lies outside a mask never matters, not even a NaN.
* Half-precision and integer inputs are computed and returned in fp32; float64 stays float64.
* A variance is unbiased (divided by n - 1) unless a function says otherwise.
* Nothing here shifts logits against labels. For `input_ids` [B, T] the token at position t is
  predicted by the logits at t - 1: pass `logits[:, :-1]` with `input_ids[:, 1:]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trl.config import moved

KLKind = Literal["k1", "k2", "k3", "k3+"]

# Whitening divides by √(variance + this), as the code of Ziegler et al. does.
WHITEN_EPSILON = 1e-8

# Largest log ratio that is put into exp: e^20 is 5e8, far beyond any clip range, and far from
# overflow.
LOG_RATIO_LIMIT = 20.0


# --- checks and precision -----------------------------------------------------------------------


def __getattr__(name: str) -> object:
    if name in moved.OF_CORE:  # `from trl.core import` shows no sentence of an AttributeError
        raise ImportError(moved.told(f"trl.core.{name}", moved.OF_CORE[name]), name="trl")
    raise AttributeError(f"module 'trl.core' has no attribute {name!r}")


def check_same_shape(**tensors: Tensor) -> None:
    """Raise a ValueError that names the arguments unless all tensors have one shape."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        names = ", ".join(f"`{name}`" for name in tensors)
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors.values())
        raise ValueError(f"{names} must have the same shape, got {shapes}.")


def check_mask(mask: Tensor, **tensors: Tensor) -> None:
    """Raise a ValueError unless `mask` is bool and has the shape of the given tensors."""
    if getattr(mask, "dtype", None) != torch.bool:
        got = getattr(mask, "dtype", type(mask).__name__)
        raise ValueError(
            f"`mask` must be a bool tensor (True = counts), got {got}: use mask.bool()."
        )
    check_same_shape(mask=mask, **tensors)


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in the precision that sums are made in: float64 stays, everything else becomes fp32.

    Raises:
        ValueError: for complex numbers, of which half would be lost.
    """
    if x.is_complex():
        raise ValueError(f"tensors must hold real numbers, got {x.dtype}: pass x.real, say.")
    return x if x.dtype == torch.float64 else x.float()


# --- masked statistics --------------------------------------------------------------------------


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Mean of the counted values: Σ m·x / Σ m.

    Args:
        values: any shape, e.g. [B, R].
        mask: the same shape; True counts.
        axis: the dimension to average over; None averages over all of them.
    Returns:
        A number [], or `values` without `axis`.
    Raises:
        ValueError: if nothing is counted, in all or in one slice along the other dimensions.
    """
    check_mask(mask, values=values)
    total, count = torch.where(mask, at_least_fp32(values), 0.0).sum(axis), mask.sum(axis)
    if bool((count == 0).any()):
        where = "at least one element" if axis is None else "an element in every slice"
        raise ValueError(f"`mask` must count {where}, got none; drop rows without tokens first.")
    return total / count


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of the counted values: Σ m·(x − μ)² / (n − 1), or / n if not `unbiased`.

    A single counted value has variance 0, not NaN: a response of one token is legal.

    Args:
        values: any shape, e.g. [B, R].
        mask: the same shape; True counts.
        unbiased: divide by n − 1 (`torch.var`) rather than n (`tf.nn.moments`).
    Returns:
        The variance [].
    """
    mean, count = masked_mean(values, mask), mask.sum()
    squares = torch.where(mask, at_least_fp32(values) - mean, 0.0).square()
    return squares.sum() / ((count - 1).clamp(min=1) if unbiased else count)


def masked_whiten(
    values: Tensor, mask: Tensor, shift_mean: bool = True, *, unbiased: bool = True
) -> Tensor:
    """Scale the counted values to variance 1 and, if `shift_mean`, move their mean to 0.

        w(x) = (x − μ) / √(σ² + 1e-8)        … + μ if not shift_mean

    Ziegler et al. (arXiv:1909.08593) whiten rewards without shifting the mean (a bonus must not
    turn into a penalty) and advantages with it. Their TensorFlow code has the biased variance,
    that is `unbiased=False`; the 2020 trl has `torch.var`, the default here.

    Equal values have no spread: they give exactly 0 (as they are, if the mean stays). What rounding
    leaves of x − μ would be blown up by the division.

    Args:
        values: [B, R].
        mask: [B, R] True counts. Give the whole batch: statistics of a micro-batch are noise.
        shift_mean: True leaves mean 0, False keeps the mean μ.
        unbiased: which variance, see `masked_var`.
    Returns:
        [B, R], 0 outside the mask.
    """
    mean = masked_mean(values, mask)
    variance = masked_var(values, mask, unbiased)
    values = at_least_fp32(values)
    whitened = (values - mean) * torch.rsqrt(variance + WHITEN_EPSILON)
    whitened = whitened if shift_mean else whitened + mean
    lowest = torch.where(mask, values, math.inf).amin()
    equal = lowest == torch.where(mask, values, -math.inf).amax()
    whitened = torch.where(equal, 0.0 if shift_mean else values, whitened)
    return torch.where(mask, whitened, 0.0)


def whiten(values: Tensor, shift_mean: bool = True, *, unbiased: bool = True) -> Tensor:
    """`masked_whiten` with everything counted.

    Args:
        values: any shape.
        shift_mean: True leaves mean 0, False keeps the mean of `values`.
        unbiased: which variance, see `masked_var`.
    Returns:
        The shape of `values`.
    """
    everything = torch.ones_like(values, dtype=torch.bool)
    return masked_whiten(values, everything, shift_mean, unbiased=unbiased)


def clip_by_value(x: Tensor, tensor_min: Tensor | float, tensor_max: Tensor | float) -> Tensor:
    """Elementwise max(min(x, tensor_max), tensor_min); the bounds may be tensors like `x`.

    Where the bounds cross, tensor_min wins, as in the 2020 trl (`torch.clamp` lets the other win).
    """
    like: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
    low, high = (torch.as_tensor(bound, **like) for bound in (tensor_min, tensor_max))
    return torch.maximum(torch.minimum(x, high), low)


# --- log-probabilities --------------------------------------------------------------------------


def logprobs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax(logits)[labels], without a second tensor of the logits' size.

    Args:
        logits: [..., V], already aligned with `labels` (no shift happens here).
        labels: [...] token ids in 0 … V−1.
    Returns:
        [...] fp32 log-probabilities of the labels.
    """
    return logprobs_and_entropy(logits, labels)[0]


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats: H = logsumexp(z) − Σ_v p_v·z_v.

    Args:
        logits: [..., V].
    Returns:
        [...] fp32 entropies.
    """
    anything = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return logprobs_and_entropy(logits, anything)[1]


def logprobs_and_entropy(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of each distribution, in one pass over the logits.

        z = logits / temperature      log p = z_label − logsumexp(z)      H = −Σ_v p_v·log p_v

    The logits are the largest tensor of a training step. They are read in blocks of rows that
    fit in the cache: no second tensor of their size is made going forward, in particular no fp32
    copy of bf16 logits. Going backward makes exactly one: their gradient, in their dtype.
    Differentiable (once) in both outputs.

    Args:
        logits: [..., V], already aligned with `labels` (no shift happens here); −inf forbids a
            token.
        labels: [...] token ids in 0 … V−1, at masked positions too.
        temperature: the temperature the tokens were sampled with; elsewhere the ratio of the
            first minibatch is not 1.
    Returns:
        logprobs [...] and entropy [...], both fp32 (float64 for float64 logits).
    """
    if logits.shape[:-1] != labels.shape:
        rule = "have the shape of `logits` without its last dimension"
        got = f"{list(labels.shape)} for logits {list(logits.shape)}"
        raise ValueError(f"`labels` must {rule}, got {got}.")
    if not temperature > 0:
        raise ValueError(f"`temperature` must be > 0, got {temperature}.")
    if labels.numel() > 0:
        lowest, highest = torch.stack(torch.aminmax(labels)).tolist()
        if lowest < 0 or highest >= logits.shape[-1]:
            rule = f"be token ids in 0 … {logits.shape[-1] - 1}, got {lowest} … {highest}"
            fix = "put any valid id at masked positions and mask the result"
            raise ValueError(f"`labels` must {rule}; {fix}.")
    return _LogprobsAndEntropy.apply(logits, labels, temperature)  # type: ignore[no-any-return,no-untyped-call]


class _LogprobsAndEntropy(torch.autograd.Function):
    """`logprobs_and_entropy` and its gradient, for logits that somebody else owns."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, mean_logit = token_statistics(logits, labels, temperature)
        ctx.save_for_backward(logits, labels, mean_logit)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an output without a gradient then costs nothing
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor, None, None]:
        known: tuple[Tensor, Tensor, Tensor] = ctx.saved_tensors  # logits, labels, mean logit
        gradient, temperature = torch.empty_like(known[0]), ctx.temperature
        gradients = grad_logprobs, grad_entropy
        logit_gradient(*known, *gradients, temperature=temperature, out=gradient)
        return gradient, None, None


def token_statistics(
    logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of each label, entropy and mean logit: `logprobs_and_entropy` without a gradient.

        z̄ = Σ_v p_v·z_v        H = logsumexp(z) − z̄

    Returns:
        logprobs, entropy and z̄, each [...], fp32 (float64 for float64 logits).
    """
    precision = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs = torch.empty(labels.shape, dtype=precision, device=logits.device)
    entropy = torch.empty_like(logprobs)
    mean_logit = torch.empty_like(logprobs)
    for block in _row_blocks(logits):
        z = _tempered(logits[block], temperature)
        p = z.softmax(-1)
        peak = z.amax(-1, keepdim=True)
        z = z - peak  # GPT-2's logits share a large offset: take it off before any sum
        log_total = -p.amax(-1).log()  # the peak has p = e⁰ / Σ_v e^(z_v)
        logprobs[block] = z.gather(-1, labels[block].unsqueeze(-1)).squeeze(-1) - log_total
        mean = p.mul_(_finite(z)).sum(-1)
        entropy[block] = log_total - mean
        mean_logit[block] = mean + peak.squeeze(-1)
    return logprobs, entropy, mean_logit


def logit_gradient(
    logits: Tensor,
    labels: Tensor,
    mean_logit: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    *,
    temperature: float,
    out: Tensor,
) -> None:
    """Write the gradient of the logits into `out` [..., V], which may be the logits themselves.

        ∂log p_label/∂z_v = 1[v = label] − p_v        ∂H/∂z_v = −p_v·(z_v − z̄)

    Args:
        logits: [..., V].
        labels: [...].
        mean_logit: [...] of `token_statistics`.
        grad_logprobs: [...] gradient of the log-probs; None: zero.
        grad_entropy: [...] gradient of the entropies; None: zero.
        temperature: The logits were divided by it.
        out: [..., V].
    """
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(mean_logit)
    for block in _row_blocks(logits):
        g = grad_logprobs[block].unsqueeze(-1) / temperature
        z = _tempered(logits[block], temperature)
        p = z.softmax(-1)
        if grad_entropy is None:
            p.mul_(-g)
        else:
            g_entropy = grad_entropy[block].unsqueeze(-1) / temperature
            z = _finite(z - mean_logit[block].unsqueeze(-1))
            p.mul_(z.mul_(-g_entropy).sub_(g))
        p.scatter_add_(-1, labels[block].unsqueeze(-1), g)
        out[block] = p


# Benchmarked: on a CPU a block and its few temporaries stay in the L2 cache of the cores; on a GPU
# a block only has to be large enough to keep all of it busy.
_CPU_BLOCK_BYTES_PER_THREAD = 2**20
_GPU_BLOCK_BYTES = 2**28


def _row_blocks(logits: Tensor) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cut `logits` [..., V] into blocks of rows of limited size in fp32."""
    on_cpu = logits.device.type == "cpu"
    size = _CPU_BLOCK_BYTES_PER_THREAD * torch.get_num_threads() if on_cpu else _GPU_BLOCK_BYTES
    return _cut(tuple(logits.shape[:-1]), max(1, size // (4 * logits.shape[-1])))


def _cut(shape: tuple[int, ...], rows: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices of blocks of at most `rows` rows. Flattening would copy a `logits[:, :-1]`."""
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    if inner > rows:
        for i in range(shape[0]):
            for rest in _cut(shape[1:], rows):
                yield (i, *rest)
    else:
        step = rows // max(1, inner)
        for start in range(0, shape[0], step):
            yield (slice(start, start + step),)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, at least fp32; no copy where there is nothing to do."""
    z = at_least_fp32(logits)
    return z if temperature == 1.0 else z / temperature


def _finite(z: Tensor) -> Tensor:
    """Raise −inf to the lowest number, in place: p·z is then 0 for a forbidden token, not NaN."""
    return z.clamp_(min=torch.finfo(z.dtype).min)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind = "k1") -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) from tokens sampled by π (Schulman, "Approximating KL
    Divergence", 2020).

        k = log π − log π_ref      k1 = k      k2 = ½·k²      k3 = e^(−k) − 1 + k

    k1 is unbiased and belongs in the reward. As a loss (arXiv:2510.01555), on-policy, k1 has a
    gradient of mean 0, k2 has that of k1 in the reward, k3 is a biased first-order substitute.
    "k3+" has the value of k3 and the gradient of k2. With the logprobs of the sampling policy in
    place of the reference, k2 is the `approxkl` of the PPO statistics.

    Deviation: in k3, k is at least −`LOG_RATIO_LIMIT`, so that a token that the policy has all but
    given up gives a large number, not infinity.

    Args:
        logprobs: [B, R] of the policy.
        ref_logprobs: [B, R] of the reference.
        kind: "k1", "k2", "k3" or "k3+".
    Returns:
        [B, R]
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    if kind not in get_args(KLKind):
        raise ValueError(f"`kind` must be 'k1', 'k2', 'k3' or 'k3+', got {kind!r}.")
    k = at_least_fp32(logprobs) - at_least_fp32(ref_logprobs)
    if kind == "k1":
        return k
    k2, bounded = k.square() / 2, k.clamp(min=-LOG_RATIO_LIMIT)
    k3 = torch.expm1(-bounded) + bounded
    return {"k2": k2, "k3": k3, "k3+": k3.detach() + (k2 - k2.detach())}[kind]


# --- token masks --------------------------------------------------------------------------------


def position_ids_from_mask(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that left padding does not move a sequence.

        position_t = max(0, Σ_{s≤t} m_s − 1)

    Args:
        attention_mask: [B, T] True on real tokens.
    Returns:
        [B, T] int64; 0 on left padding, the last real position on right padding.
    Raises:
        ValueError: for a mask of other numbers than 0 and 1.
    """
    counts = attention_mask.bool()
    if attention_mask.dtype != torch.bool and (attention_mask != counts).any():
        other = attention_mask[attention_mask != counts][0].item()
        raise ValueError(f"`attention_mask` must be bool, or 0 and 1, got {other}.")
    return (counts.long().cumsum(-1) - 1).clamp(min=0)


def mask_after(tokens: Tensor, token_id: int, *, start: int = 0) -> Tensor:
    """Mask out what follows the first `token_id`; the token itself still counts.

    With the end-of-text token this is the response mask; with a full stop and `start=16` it is the
    truncation rule of Ziegler et al. (arXiv:1909.08593).

    Args:
        tokens: [B, R].
        token_id: the token that ends a row.
        start: occurrences before this index do not end it.
    Returns:
        [B, R] bool, all True in a row without the token.
    """
    index = torch.arange(tokens.shape[-1], device=tokens.device)
    ends = (tokens == token_id) & (index >= start)
    return (ends.long().cumsum(-1) - ends.long()) == 0


# --- dictionaries of statistics -----------------------------------------------------------------


def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a/b": 1}; a key that contains `sep` is an error."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if sep in key:
            raise ValueError(f"keys of `nested` must not contain {sep!r}, got {key!r}.")
        if isinstance(value, Mapping):
            flat |= {f"{key}{sep}{inner}": v for inner, v in flatten_dict(value, sep).items()}
        else:
            flat[key] = value
    return flat


def stack_dicts(stats_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Flatten each tensor and stack over the dicts: per key of the first dict, [len, numel]."""
    return {
        key: torch.stack([stats[key].flatten() for stats in stats_dicts]) for key in stats_dicts[0]
    }


def add_suffix(input_dict: Mapping[str, Any], suffix: str) -> dict[str, Any]:
    """The same values under key + suffix."""
    return {key + suffix: value for key, value in input_dict.items()}


def average_torch_dicts(list_of_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Elementwise mean over the dicts, per key of the first dict."""
    return {
        key: torch.stack([at_least_fp32(stats[key]) for stats in list_of_dicts]).mean(0)
        for key in list_of_dicts[0]
    }


def stats_to_np(stats_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors become numpy arrays, single numbers become floats, the rest stays as it is."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.detach().cpu()  # numpy has no bfloat16
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        is_number = hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0
        return float(value) if is_number else value

    return {key: convert(value) for key, value in stats_dict.items()}


# --- batches ------------------------------------------------------------------------------------


def pad_to_size(tensor: Tensor, size: int, dim: int = 1, padding: int = 50256) -> Tensor:
    """Pad on the right along `dim` up to `size`; the same tensor if it already has that size."""
    shape = list(tensor.shape)
    missing = size - shape[dim]
    if missing < 0:
        raise ValueError(f"`size` must be >= {shape[dim]}, the size at hand, got {size}.")
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_full(shape, padding)], dim) if missing else tensor


def build_bert_batch_from_txt(
    text_list: Sequence[str], tokenizer: Any, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Encode texts for a BERT-like classifier, padded with 0 on the right.

    Args:
        text_list: B texts.
        tokenizer: Its `encode` turns a text into a list of token ids.
        device: Where the batch shall be.
    Returns:
        input_ids [B, T] and attention_mask [B, T], both int64 on `device`.
    """
    rows = [torch.tensor(tokenizer.encode(text), dtype=torch.long) for text in text_list]
    counted = [torch.ones_like(row) for row in rows]
    input_ids, attention_mask = (pad_sequence(part, batch_first=True) for part in (rows, counted))
    return input_ids.to(device), attention_mask.to(device)


class LengthSampler:
    """A random length, min_value <= length < max_value, each time it is called.

    Draws from torch's global generator, so `torch.manual_seed` repeats it.
    """

    def __init__(self, min_value: int, max_value: int) -> None:
        if not 0 <= min_value < max_value:
            rule = "be >= 0 and < `max_value` (the maximum is exclusive)"
            raise ValueError(f"`min_value` must {rule}, got {min_value} and {max_value}.")
        self.min_value = min_value
        self.max_value = max_value

    def __call__(self) -> int:
        """Draw a length."""
        return int(torch.randint(self.min_value, self.max_value, ()))
