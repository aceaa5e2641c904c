"""The optimiser: what it trains, and Adam as torch or TensorFlow computes it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trl.config import PPOConfig
from trl.config.errors import refuse


def trainable_weights(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> list[nn.Parameter]:
    """Return the weights that are trained: those that require a gradient and are optimised.

    Raises:
        TypeError: if the optimiser is none.
        ValueError: if there are none, or the optimiser cannot make its steps here.
    """
    if not isinstance(optimizer, torch.optim.Optimizer | None):
        got = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        fix = "make it, as torch.optim.AdamW(model.parameters(), lr=1e-5)"
        refuse("optimizer", "be an optimiser of torch", got, fix, error=TypeError)
    inner = getattr(optimizer, "optimizer", optimizer)  # of accelerate's
    if isinstance(inner, torch.optim.SparseAdam) or _needs_closure(inner):
        rule = "take dense gradients, in steps without a closure that computes them again"
        refuse("optimizer", rule, type(inner).__name__, "use Adam, AdamW, Adafactor or SGD")
    groups: list[dict[str, Any]] = [{"params": model.parameters()}]
    groups = groups if optimizer is None else optimizer.param_groups
    for group in groups:
        if not math.isfinite(rate := group.get("lr") or 0.0) or group.get("maximize"):
            got = "maximize=True" if math.isfinite(rate) else f"lr={float(rate)}"
            refuse("optimizer", "minimise the loss, at a finite rate", got)
    owned = {weight for group in groups for weight in group["params"]}
    weights = [weight for weight in model.parameters() if weight.requires_grad and weight in owned]
    if not weights:
        also = "" if optimizer is None else " and is in `optimizer`"
        refuse("model", f"have weights to train, but none has requires_grad=True{also}")
    return weights


def _needs_closure(optimizer: torch.optim.Optimizer | None) -> bool:
    """Return whether a step asks for the loss again and again, as that of L-BFGS does."""
    closure = optimizer and dict(inspect.signature(optimizer.step).parameters).get("closure")
    return isinstance(closure, inspect.Parameter) and closure.default is closure.empty


def gradient_norm(gradients: Sequence[Tensor]) -> float:
    """Return the norm of all gradients as one vector.

        √(Σ_rows |row|²)

    Row by row: a float32 sum over tens of millions of squares at a stretch, as
    `torch.nn.utils.clip_grad_norm_` takes it for an embedding, is 0.3 % short.
    """
    if not gradients:
        return 0.0
    norm, device = torch.linalg.vector_norm, gradients[0].device
    rows = [norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)) for x in gradients]
    return float(norm(torch.stack([norm(of_rows).to(device) for of_rows in rows])))


def make_adam(
    weights: list[nn.Parameter], config: PPOConfig, head: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Return Adam over `weights`, with one kernel for all of them where there is one.

    Args:
        weights: What is trained.
        config: Of the rates, ε, and the kind of Adam.
        head: The value head's, a group of their own if they have a rate of their own.
    """
    auto, own = config.learning_rate == "auto", config.value_learning_rate
    rate = config.auto_initial_rate if auto else config.learning_rate
    apart = set() if own is None else set(head)
    policy = [weight for weight in weights if weight not in apart]
    values = [weight for weight in weights if weight in apart]
    groups: list[dict[str, Any]] = [{"params": policy, "lr": rate}] if policy else []
    if values:
        groups.append({"params": values, "lr": own, "of_values": True})
    if config.tf_adam:
        return TensorFlowAdam(groups, eps=config.adam_eps)
    fused = all(weight.device.type in ("cpu", "cuda", "mps") for weight in weights)
    return torch.optim.Adam(groups, eps=config.adam_eps, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of all weights but those of values with a rate of their own."""
    for group in optimizer.param_groups:
        if not group.get("of_values"):
            group["lr"] = rate


MOMENTS = ("exp_avg", "exp_avg_sq")


class TensorFlowAdam(torch.optim.Optimizer):
    """Adam with ε outside the bias correction (Kingma & Ba, arXiv:1412.6980, end of section 2).

        m ← β1·m + (1 − β1)·g            v ← β2·v + (1 − β2)·g²
        α = lr·√(1 − β2^t) / (1 − β1^t)        θ ← θ − α·m / (√v + ε)

    PyTorch corrects v before it adds ε, which makes ε up to √1000 times smaller in the first steps.
    With ε = 1e-5 PPO's first updates differ visibly: Huang et al. ("The N Implementation Details
    of RLHF with PPO") measure an approxkl of 0.0004 here and 0.0024 with `torch.optim.Adam`.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: β1 and β2.
        eps: ε; 1e-5 as in Ziegler et al. (arXiv:1909.08593).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-5,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what `closure` returns."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if (grad := parameter.grad) is None:
                    continue
                state = self.state[parameter]  # of t, m and v, under the names of torch's Adam
                if not state:
                    moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
                    state.update(moments, step=0)
                state["step"] = t = state["step"] + 1
                m = state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
                v = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                alpha = group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
                parameter.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-alpha)
        return loss
