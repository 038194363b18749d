"""The optimiser: AdamW on fp32 masters of low-precision parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MasterAdamW:
    """AdamW on fp32 copies of the parameters (report section 3.3.1), or on the parameters where they are fp32."""

    def __init__(self, model: nn.Module, *, betas: tuple[float, float], weight_decay: float) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters = list(model.parameters())
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.parameters]
        matrices = [m for m in self.masters if m.dim() > 1]
        vectors = [m for m in self.masters if m.dim() <= 1]
        groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
        self.adamw = torch.optim.AdamW(groups, betas=betas, fused=True)

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the gradients of a backward pass to those of the masters, in fp32."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """By parameter name."""
        pairs = zip(self.names, self.masters, strict=True)
        return {name: master.grad for name, master in pairs if master.grad is not None}

    def clip(self, largest: float) -> Tensor:
        """Scales the gradient to at most this norm; gives the norm it had."""
        return nn.utils.clip_grad_norm_(self.masters, largest)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Updates the masters, copies them to the parameters, and forgets the gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)
