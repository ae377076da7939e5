"""Muon: steps whose matrices are orthogonal, for trainings that must be short.

Keller Jordan 2024 (kellerjordan.github.io/posts/muon), scaled as in Liu et al. 2025
(arXiv:2502.16982) so that rates and weight decay of AdamW serve for it. Norms, biases and
embeddings take AdamW's steps.
"""

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd polynomial that flattens singular values


class Muon(torch.optim.Optimizer):
    """Muon for kernels and matrices, AdamW for the rest; the state is tensors only."""

    def __init__(
        self,
        net: nn.Module,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "momentum": momentum}
        super().__init__([p for p in net.parameters() if p.requires_grad], defaults)
        tables = {m.weight for m in net.modules() if isinstance(m, nn.Embedding)}
        self._matrices = {p for p in net.parameters() if p.ndim > 1 and p not in tables}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Moves all weights that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                move = self._muon if weight in self._matrices else self._adam
                weight.add_(move(weight, self.state[weight], group), alpha=-group["lr"])

    def _muon(self, weight: Tensor, state: dict, group: dict) -> Tensor:
        """The orthogonal direction of the momentum, of the size that AdamW's steps have."""
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        mean = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
        direction = weight.grad.lerp(mean, group["momentum"]).flatten(1)
        size = 0.2 * max(direction.shape) ** 0.5
        return orthogonal(direction).mul_(size).view_as(weight)

    def _adam(self, weight: Tensor, state: dict, group: dict) -> Tensor:
        """AdamW's direction."""
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = (
                torch.zeros_like(weight),
                torch.zeros_like(weight),
            )
        state["step"] += 1
        (b1, b2), count = group["betas"], float(state["step"])
        mean = state["exp_avg"].lerp_(weight.grad, 1 - b1) / (1 - b1**count)
        square = state["exp_avg_sq"].lerp_(weight.grad**2, 1 - b2) / (1 - b2**count)
        return mean / (square.sqrt() + group["eps"])


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """The nearest orthogonal matrix, roughly: singular values of 0.7 to 1.2, by Newton-Schulz."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if matrix.numel() > 4096 else matrix.float()
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.mT
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrix.dtype).contiguous()
