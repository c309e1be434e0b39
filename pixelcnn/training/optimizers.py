"""How weights follow gradients: Adam for all, or Muon for the convolutions' kernels and Adam for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the gradient's momentum, seen as a matrix
from inputs to outputs, by the nearest orthogonal matrix, so that all directions are learned at the same pace. The scale
of its step is that of Liu et al. 2025, arXiv:2502.16982: as large per weight as Adam's usually are. torch.optim.Muon is
not used because it takes plain matrices alone, and computes in bfloat16, slow on a CPU that has no instructions for it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS = ("adam", "muon")
# The quintic iteration's coefficients: singular values end between about 0.7 and 1.2, after five rounds.
QUINTIC, ROUNDS = (3.4445, -4.7750, 2.0315), 5
RMS = 0.2  # of a step at learning rate 1, per weight
MOMENTUM = 0.95  # share of Muon's that stays from step to step; Nesterov's
LEAST_NORM = 1e-9  # added to the norm: the vanishing momentum of a dead network is not scaled up to a full step


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return about U V^T of each of (n, rows, columns) matrices with singular value decomposition U S V^T."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalise(matrices.mT).mT
    a, b, c = QUINTIC
    x: Tensor = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + LEAST_NORM)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum, for (out, ...) weights in groups that have a learning rate `lr`, as Adam's."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            same: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}  # weights and updates by the matrix's shape
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
                update = weight.grad.lerp(state["momentum"], MOMENTUM).flatten(1)
                same.setdefault(update.shape, []).append((weight, update))
            for shape, pairs in same.items():  # at once: small products alone leave a second thread idle
                steps = orthogonalise(torch.stack([update for _, update in pairs]))
                for (weight, _), step in zip(pairs, steps, strict=True):
                    weight.sub_(step.view_as(weight), alpha=group["lr"] * RMS * max(shape) ** 0.5)


class Optimizer:
    """One of `OPTIMIZERS` for a model: Adam, or Muon for the 4-dimensional weights and Adam for the others.

    `shares` are those of the learning rate, for parameters that learn at less than all of it.
    """

    def __init__(self, model: nn.Module, name: str, shares: Mapping[Tensor, float]) -> None:
        groups: dict[bool, dict[float, list[nn.Parameter]]] = {False: {}, True: {}}  # by whether they are kernels
        for weight in model.parameters():
            share = shares.get(weight, 1.0)
            groups[name == "muon" and weight.dim() == 4].setdefault(share, []).append(weight)
        adam, muon = ([{"params": w, "share": s} for s, w in groups[kernels].items()] for kernels in (False, True))
        self.parts: list[torch.optim.Optimizer] = [torch.optim.Adam(adam, betas=(0.9, 0.99), fused=True)]
        if muon:
            self.parts.append(Muon(muon, {}))
        self._part_of = {weight: part for part in self.parts for g in part.param_groups for weight in g["params"]}

    def step(self, lr: float) -> None:
        """Update the weights from their gradients, at this learning rate or their shares of it."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr * group["share"]
            part.step()
            for group in part.param_groups:  # as Adam's fused step does not: samplers tell by it
                torch.autograd.graph.increment_version(group["params"])

    def state(self, weight: Tensor) -> dict[str, Any]:
        """Return a weight's momenta and step count by name; empty before the first step."""
        return dict(self._part_of[weight].state[weight])

    def restore(self, weight: Tensor, state: dict[str, Tensor]) -> None:
        """Set what `state` once returned; nothing where that is of another optimizer."""
        part = self._part_of[weight]
        if ("momentum" in state) == isinstance(part, Muon):
            part.state[weight] = {
                k: v.to(weight.device) if k == "step" else torch.empty_like(weight).copy_(v) for k, v in state.items()
            }
