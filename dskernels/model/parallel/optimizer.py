"""The optimiser of what this rank holds: shards of FSDP2, its own experts, or a pipeline's stages."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dskernels.model.optimizer import MasterAdamW
from dskernels.model.parallel.plan import Team
from dskernels.model.parallel.shards import local

EXPERTS = (".experts.w13", ".experts.w2")  # how the names end of what is spread over the expert ranks


class _Locals(nn.Module):
    """Plain parameters under the names of others, with a slash for each dot, since a parameter's own name has none."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(tensor))


class TeamAdamW(MasterAdamW):
    """`MasterAdamW` over the rows that this rank has of each parameter; the norm is that of the whole gradient.

    Args:
        parameters: by name, as the model has them: DTensors of FSDP2, or plain.
        team: the ranks.
        replicated: whether ranks with other text hold the same parameters, as those of a pipeline do: then their
            gradients are summed here, by `reduce`.
        betas: see `MasterAdamW`.
        weight_decay: likewise.
        moments: likewise.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        team: Team,
        *,
        replicated: bool,
        betas: tuple[float, float],
        weight_decay: float,
        moments: torch.dtype,
    ) -> None:
        self.team, self.replicated, self.whole = team, replicated, dict(parameters)
        shards = {name: local(parameter) for name, parameter in parameters.items()}
        super().__init__(_Locals(shards), betas=betas, weight_decay=weight_decay, moments=moments)
        self.names = list(parameters)
        # MasterAdamW lays parameters that are fp32 into its flat tensor; the model's own follow them in `refresh`.
        self._apart = [
            (shard, mine)
            for shard, mine in zip(shards.values(), self.parameters, strict=True)
            if shard.data_ptr() != mine.data_ptr() and shard.numel()
        ]
        # The norm counts each number once, however many ranks hold it.
        counts = [self._copies(name) for name in self.names]
        self._once = [1.0 / count for count in counts]

    def _copies(self, name: str) -> int:
        if not self.replicated:
            return 1
        return self.team.group("data" if name.endswith(EXPERTS) else "batch").size()

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the gradients of the model's parameters to those of the masters."""
        for parameter, mine in zip(self.whole.values(), self.parameters, strict=True):
            mine.grad = None if parameter.grad is None else local(parameter.grad)
            parameter.grad = None
        super().collect()

    @torch.no_grad()
    def reduce(self) -> None:
        """Sums the gradients over the ranks with other text, where these hold the same parameters."""
        if not self._collected:  # nothing reached this rank, and others wait
            self._gradient.zero_()
            self._collected = True
        if self.replicated:
            for name, gradient in self.gradients().items():
                self.team.total(gradient, "data" if name.endswith(EXPERTS) else "batch")

    def norm(self) -> Tensor:
        """Of the whole gradient over all ranks, fp32 ``[]``."""
        squares = torch.stack(torch._foreach_norm(self._gradients)).square()
        total = (squares * torch.tensor(self._once, device=squares.device)).sum()
        for name in ("batch", "pipeline"):
            self.team.total(total, name)
        return total.sqrt()

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the parameters what the masters are, rounded."""
        super().refresh()
        if self._apart:
            torch._foreach_copy_([shard for shard, _ in self._apart], [mine for _, mine in self._apart])
