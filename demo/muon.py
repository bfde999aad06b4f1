"""The Muon optimizer, for many small matrices at a time.

``torch.optim.Muon`` takes one matrix after the other, which for the small matrices of this model
costs as much as the rest of a training step; here all matrices of one shape are one batch.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

# The quintic iteration that drives singular values towards one (Keller Jordan, Muon, 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalized(batch: torch.Tensor) -> torch.Tensor:
    """Roughly the nearest orthogonal matrix to each matrix of a batch."""
    x: torch.Tensor
    tall = batch.shape[-2] > batch.shape[-1]
    x = batch.mT if tall else batch
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal; for matrices only."""

    def __init__(self, matrices: list[nn.Parameter], rate: float, decay: float) -> None:
        super().__init__(matrices, {"lr": rate, "weight_decay": decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes[matrix.shape].append(matrix)
            for shape, matrices in shapes.items():
                steps = []
                for matrix in matrices:
                    gradient = matrix.grad
                    assert gradient is not None
                    state = self.state[matrix]
                    if not state:
                        state["average"] = torch.zeros_like(matrix)
                    state["average"].lerp_(gradient, 1 - group["momentum"])
                    steps.append(gradient.lerp(state["average"], group["momentum"]))
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for matrix, step in zip(matrices, orthogonalized(torch.stack(steps)), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(step, alpha=-rate)
