"""Redundant experts in a running model: choices of experts are counted, and weights change places between two steps.

`place_experts` decides which expert is at which place, `move_experts` moves weights; here both are applied to a model.
All tensors, the table of places too, keep their shapes and addresses, so captured CUDA graphs go on with the new
placement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dskernels.model.fp8_weights import set_shared_apart
from dskernels.model.model import DeepseekV3
from dskernels.model.moe import MoE
from dskernels.model.parallel.balance import Placement, move_experts, place_experts
from dskernels.model.parallel.decode import DecodeExperts


class RedundantExperts:
    """Distributes a model's experts over more places than there are experts, on ranks with sequences of their own.

    ::

        redundant = RedundantExperts(model, group, places=288)
        ...  # steps
        moved = redundant.rebalance()  # between two steps, on every rank

    Args:
        model: the same on every rank, with all experts. It is changed in place: each rank keeps the experts of its
            places, and the router chooses places (`dskernels.route` with ``physical``) and counts its choices.
        group: the ranks.
        places: number of places on all ranks, a multiple of the ranks, at least the number of experts.
        nodes: see `place_experts`; the groups there are those of the model's routing.
        slack: see `place_experts`.
        compute: makes the function that computes the experts, given the group and the number of places; by default
            `DecodeExperts`.

    Attributes:
        placements: the placement of each layer with experts, those of MTP modules last.

    Raises:
        ValueError: `places` or `nodes` do not fit, see `place_experts`.
    """

    def __init__(
        self,
        model: DeepseekV3,
        group: dist.ProcessGroup,
        *,
        places: int,
        nodes: int = 1,
        slack: float = 0.05,
        compute: Callable[[dist.ProcessGroup, int], Callable[..., Tensor]] = DecodeExperts,
    ) -> None:
        self.group, self.slack, self.layers = group, slack, model.moe_layers
        config, ranks = model.config, group.size()
        n = config.n_routed_experts
        self.options: dict[str, Any] = dict(ranks=ranks, places=places, nodes=nodes, groups=config.n_group)
        start = place_experts([1.0] * n, **self.options)
        self.placements = [start] * len(self.layers)
        columns = min(places - n + 1, max(ranks, places // n + 1))  # the most copies that an expert gets
        for layer in self.layers:
            self._place(layer, start, columns, compute(group, places))

    def load(self) -> Tensor:
        """How often each expert of each layer was chosen since the last `rebalance`, on all ranks: int64 ``[L, E]``."""
        total = torch.stack([_counted(layer) for layer in self.layers])
        dist.all_reduce(total, group=self.group)
        return total

    def imbalance(self, load: Tensor) -> list[float]:
        """For each layer, the load of the busiest rank divided by the mean, with the current placement and this load.

        Args:
            load: ``[L, E]``, see `load`.
        """
        return [placement.imbalance(row) for placement, row in zip(self.placements, load.tolist(), strict=True)]

    @torch.no_grad()
    def rebalance(self) -> int:
        """Places experts by the load since the last call, and moves their weights; the host waits for the load.

        Every rank calls this between the same two steps.

        Returns:
            The number of experts that came to a rank where they were not before, over all layers.
        """
        loads, moved = self.load().tolist(), 0
        for i, (layer, load) in enumerate(zip(self.layers, loads, strict=True)):
            _counted(layer).zero_()
            before = self.placements[i]
            after = place_experts(load, **self.options, before=before, slack=self.slack)
            if after is before or not sum(load):
                continue
            for tensor in _stacks(layer):
                tensor.copy_(move_experts(tensor.view(torch.uint8), before, after, self.group).view(tensor.dtype))
            physical = layer.gate.physical
            if physical is not None:
                physical.copy_(_table(after, physical.shape[1]))
            self.placements[i] = after
            moved += after.moves(before)
        return moved

    def _place(self, layer: MoE, placement: Placement, columns: int, compute: Callable[..., Tensor]) -> None:
        experts, device = layer.experts, layer.experts.w13.device
        set_shared_apart(layer)
        here = torch.tensor(placement.of_rank(self.group.rank()), device=device)
        experts.w13, experts.w2 = (_rows(w, here) for w in (experts.w13, experts.w2))
        if experts.w13_scale_inv is not None and experts.w2_scale_inv is not None:
            experts.w13_scale_inv = experts.w13_scale_inv[here].contiguous()
            experts.w2_scale_inv = experts.w2_scale_inv[here].contiguous()
        experts.compute = compute
        layer.gate.physical = _table(placement, columns).to(device)
        layer.gate.asked = torch.zeros(placement.n_experts, dtype=torch.int64, device=device)


def _stacks(layer: MoE) -> list[Tensor]:
    """All tensors of the layer with a first dimension of experts: weights, and scales if there are any."""
    experts = layer.experts
    stacks = (experts.w13, experts.w2, experts.w13_scale_inv, experts.w2_scale_inv)
    return [stack for stack in stacks if stack is not None]


def _counted(layer: MoE) -> Tensor:
    """The router's counts of how often each expert was chosen, int64 ``[E]``."""
    if layer.gate.asked is None:
        raise RuntimeError("model: its router does not count")
    return layer.gate.asked


def _rows(weight: nn.Parameter, rows: Tensor) -> nn.Parameter:
    """Some experts of a stack, indexed as bytes, since not every version of torch indexes e4m3."""
    data = weight.detach()
    return nn.Parameter(data.view(torch.uint8)[rows].view(data.dtype), requires_grad=False)


def _table(placement: Placement, columns: int) -> Tensor:
    """`Placement.physical`, padded with -1 to a number of columns."""
    found = placement.physical()
    return torch.nn.functional.pad(found, (0, columns - found.shape[1]), value=-1)
