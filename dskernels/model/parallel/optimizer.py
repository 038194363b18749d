"""The optimiser of what this rank holds of each parameter, such as shards of FSDP2."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dskernels.gemm.weights import counts_changes
from dskernels.model.optimizer import MasterAdamW
from dskernels.model.parallel.plan import Team
from dskernels.model.parallel.shards import bounds, local

EXPERTS = (".experts.w13", ".experts.w2")  # names of the parameters that are spread over the expert ranks end so


def first_row(team: Team, name: str, parameter: Tensor) -> tuple[int, int]:
    """The first row that this rank holds of a parameter, and how many rows it has in all.

    Args:
        team: the ranks.
        name: of the parameter in the model.
        parameter: as this rank's model has it: a DTensor of FSDP2, or a plain tensor. Of experts that are spread over
            the expert ranks it has this rank's part.
    """
    return bounds(parameter, *((team.place("expert"), team.plan.expert) if name.endswith(EXPERTS) else (0, 1)))


class _Locals(nn.Module):
    """Plain parameters under the names of others, with a slash instead of each dot: the name of a parameter may not
    contain dots."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(tensor))


class TeamAdamW(MasterAdamW):
    """`MasterAdamW` over the rows that this rank holds of each parameter; the norm is that of the whole gradient.

    Args:
        parameters: by name, as the model has them, DTensors of FSDP2.
        team: the ranks.
        betas: see `MasterAdamW`.
        weight_decay: likewise.
        moments: likewise.

    Attributes:
        whole: the parameters.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        team: Team,
        *,
        betas: tuple[float, float],
        weight_decay: float,
        moments: torch.dtype,
    ) -> None:
        self.team, self.whole = team, dict(parameters)
        shards = {name: self._local(name) for name in parameters}
        super().__init__(_Locals(shards), betas=betas, weight_decay=weight_decay, moments=moments)
        counts_changes(self.whole.values())
        self.names = list(parameters)
        # MasterAdamW moves parameters in fp32 into its flat tensor; `refresh` copies them to the model's own.
        self._apart = [
            (shard, mine)
            for shard, mine in zip(shards.values(), self.parameters, strict=True)
            if shard.data_ptr() != mine.data_ptr() and shard.numel()
        ]
        # The norm counts each number once, however many ranks hold it. (Creating this tensor in each step made the host
        # wait for the device.)
        self._once = torch.tensor([1.0 / self._copies(name) for name in self.names], device=self.flat.device)

    def place(self, name: str) -> tuple[int, int]:
        """The first row that this rank updates of a parameter, and how many rows the parameter has on all ranks."""
        return first_row(self.team, name, self.whole[name])

    def writes(self, name: str) -> bool:
        """Whether this rank writes its rows into a checkpoint: of the ranks that hold the same rows, the first does."""
        return True

    def _local(self, name: str) -> Tensor:
        """The rows of a parameter that this rank updates, in its memory."""
        return local(self.whole[name])

    def _copies(self, name: str) -> int:
        """How many ranks update the same rows of a parameter."""
        return 1

    def last(self) -> None:
        """Called before the last backward of a step."""

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of the model's parameters to those of the masters."""
        for parameter, mine in zip(self.whole.values(), self.parameters, strict=True):
            mine.grad = None if parameter.grad is None else local(parameter.grad)
            parameter.grad = None
        super().collect()

    @torch.no_grad()
    def reduce(self) -> None:
        """Complete the gradients of a step; FSDP2 has already summed them over the ranks."""
        if not self._collected:  # no parameter of this rank has a gradient
            self._gradient.zero_()
            self._collected = True

    def norm(self) -> Tensor:
        """The norm of the whole gradient over all ranks, fp32 ``[]``."""
        squares = torch.stack(torch._foreach_norm(self._gradients)).square()
        total = (squares * self._once).sum()
        for name in ("batch", "pipeline"):
            self.team.total(total, name)
        return total.sqrt()

    @torch.no_grad()
    def refresh(self) -> None:
        """Set the parameters to the rounded masters."""
        super().refresh()
        if self._apart:
            torch._foreach_copy_([shard for shard, _ in self._apart], [mine for _, mine in self._apart])
