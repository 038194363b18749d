"""The optimiser of what this rank holds of each parameter, such as shards of FSDP2."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dskernels.gemm.weights import counts_changes
from dskernels.model.optimizer import MasterAdamW
from dskernels.model.parallel.plan import Team
from dskernels.model.parallel.shards import bounds, local

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
        parameters: by name, as the model has them, DTensors of FSDP2.
        team: the ranks.
        betas: see `MasterAdamW`.
        weight_decay: likewise.
        moments: likewise.

    Attributes:
        whole: these parameters.
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
        # MasterAdamW lays parameters that are fp32 into its flat tensor; the model's own follow them in `refresh`.
        self._apart = [
            (shard, mine)
            for shard, mine in zip(shards.values(), self.parameters, strict=True)
            if shard.data_ptr() != mine.data_ptr() and shard.numel()
        ]
        # The norm counts each number once, however many ranks hold it. (Made anew at each step it made the host wait.)
        self._once = torch.tensor([1.0 / self._copies(name) for name in self.names], device=self.flat.device)

    def place(self, name: str) -> tuple[int, int]:
        """The first row that this rank updates of a parameter, of all experts where these are spread, and all rows."""
        team, spread = self.team, name.endswith(EXPERTS)
        return bounds(self.whole[name], *((team.place("expert"), team.plan.expert) if spread else (0, 1)))

    def writes(self, name: str) -> bool:
        """Whether this rank writes its rows into a checkpoint: of ranks that hold the same, the first does."""
        return True

    def _local(self, name: str) -> Tensor:
        """The rows of a parameter that this rank updates, in its memory."""
        return local(self.whole[name])

    def _copies(self, name: str) -> int:
        """How many ranks update each of them."""
        return 1

    def last(self) -> None:
        """The next backward is the last of a step."""

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the gradients of the model's parameters to those of the masters."""
        for parameter, mine in zip(self.whole.values(), self.parameters, strict=True):
            mine.grad = None if parameter.grad is None else local(parameter.grad)
            parameter.grad = None
        super().collect()

    @torch.no_grad()
    def reduce(self) -> None:
        """Ends the gradients of a step: FSDP2 has summed them over the ranks."""
        if not self._collected:  # nothing reached this rank
            self._gradient.zero_()
            self._collected = True

    def norm(self) -> Tensor:
        """Of the whole gradient over all ranks, fp32 ``[]``."""
        squares = torch.stack(torch._foreach_norm(self._gradients)).square()
        total = (squares * self._once).sum()
        for name in ("batch", "pipeline"):
            self.team.total(total, name)
        return total.sqrt()

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the parameters what the masters are, rounded."""
        super().refresh()
        if self._apart:
            torch._foreach_copy_([shard for shard, _ in self._apart], [mine for _, mine in self._apart])
