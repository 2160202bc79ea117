"""Muon: momentum whose update is made orthogonal, for matrices (Jordan et al. 2024).

torch.optim.Muon takes one matrix at a time; the few stacked parameters here are done in batches,
which on a GPU costs a tenth.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Jordan's quintic Newton-Schulz coefficients.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5


def orthogonal(updates: Tensor) -> Tensor:
    """About the nearest semi-orthogonal matrix to each of (count, rows, columns), not upright."""
    x = updates.to(torch.bfloat16 if updates.is_cuda else updates.dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.to(updates.dtype)


class Muon(torch.optim.Optimizer):
    """For stacked matrices, (..., rows, columns).

    Args:
        parameters: stacked parameters; those of one shape, transposed or not, go together.
        lr: an update's spectral norm, times sqrt(rows / columns) where that is above 1.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; gradients must be there."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"]).flatten(0, -3)
                if update.shape[-2] > update.shape[-1]:
                    update = update.mT
                by_shape.setdefault(tuple(update.shape[-2:]), []).append((parameter, update))
            for parts in by_shape.values():
                updates = orthogonal(torch.cat([update for _, update in parts]))
                sizes = [len(update) for _, update in parts]
                for (parameter, _), update in zip(parts, updates.split(sizes), strict=True):
                    rows, columns = parameter.shape[-2:]
                    aligned = update.mT if rows > columns else update
                    scale = max(1.0, rows / columns) ** 0.5
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(aligned.reshape(parameter.shape), alpha=-group["lr"] * scale)
