"""The optimiser: what it trains, and Adam as torch or TensorFlow computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from trl.config import PPOConfig


def trainable_weights(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> list[nn.Parameter]:
    """Return the weights that are trained: those that require a gradient and are optimised.

    Raises:
        ValueError: if there are none.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if optimizer is not None:
        owned = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        weights = [weight for weight in weights if id(weight) in owned]
    if not weights:
        raise ValueError(
            "`model` must have weights to train, but none has requires_grad=True"
            + (" and is in `optimizer`." if optimizer is not None else ".")
        )
    return weights


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


def make_adam(weights: list[nn.Parameter], config: PPOConfig) -> torch.optim.Optimizer:
    """Return Adam over `weights`, with one kernel for all of them where there is one."""
    if config.tf_adam:
        return TensorFlowAdam(weights, lr=config.learning_rate, eps=config.adam_eps)
    fused = all(weight.device.type in ("cpu", "cuda", "mps") for weight in weights)
    return torch.optim.Adam(weights, lr=config.learning_rate, eps=config.adam_eps, fused=fused)


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
        if not lr >= 0:
            raise ValueError(f"`lr` must be >= 0, got {lr}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"`betas` must be >= 0 and < 1, got {betas}.")
        if not eps > 0:
            raise ValueError(f"`eps` must be > 0, got {eps}.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in a group of parameters, which must be float32 or float64."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"`params` must be float32 or float64, got {parameter.dtype}: small updates "
                    "vanish in half precision. Keep float32 weights and use autocast."
                )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, self.state[parameter], group)
        return loss


def _update(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One step for one parameter; `state` holds t, m and v under the names of torch's Adam."""
    if not state:
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    assert parameter.grad is not None
    state["step"] += 1
    (beta1, beta2), t = group["betas"], state["step"]
    m = state["exp_avg"].mul_(beta1).add_(parameter.grad, alpha=1 - beta1)
    v = state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
    alpha = group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
    parameter.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-alpha)
