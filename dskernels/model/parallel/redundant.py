"""Redundant experts in a running model: what was asked for is counted, and weights change places between two steps.

`place_experts` decides, `move_experts` carries; here both meet the model. Shapes and addresses stay as they are, the
table of places too, so that captured CUDA graphs go on with the new placement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dskernels.model.layers import FeedForward
from dskernels.model.model import DeepseekV3
from dskernels.model.moe import MoE
from dskernels.model.parallel.balance import Placement, move_experts, place_experts
from dskernels.model.parallel.decode import DecodeExperts


class RedundantExperts:
    """A model's experts at more places than there are experts, over ranks with sequences of their own.

    ::

        redundant = RedundantExperts(model, group, places=288)
        ...  # steps
        moved = redundant.rebalance()  # between two steps, on every rank

    Args:
        model: the same on every rank, with all experts. It is changed in place: each rank keeps those of its places,
            and the router chooses places (`dskernels.route` with ``physical``) and counts its choices.
        group: the ranks.
        places: in all, a multiple of the ranks, at least as many as experts.
        nodes: see `place_experts`; the groups are those of the model's routing.
        slack: likewise.
        compute: makes what multiplies, given the group and the number of places; `DecodeExperts` by default.

    Attributes:
        placements: of each layer with experts, those of MTP modules last.

    Raises:
        ValueError: places that do not fit.
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
        """Choices that fell on each expert of each layer since the last change, over all ranks, int64."""
        total = torch.stack([_counted(layer) for layer in self.layers])
        dist.all_reduce(total, group=self.group)
        return total

    def imbalance(self, load: Tensor) -> list[float]:
        """The busiest rank over the mean under this load, layer by layer."""
        return [placement.imbalance(row) for placement, row in zip(self.placements, load.tolist(), strict=True)]

    @torch.no_grad()
    def rebalance(self) -> int:
        """Places experts by the load since the last time; waits for it. Every rank calls this between the same steps.

        Returns:
            How many weights have come to another rank, over all layers.
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
        if experts.n_shared:
            _set_shared_apart(layer)
        here = torch.tensor(placement.of_rank(self.group.rank()), device=device)
        experts.w13, experts.w2 = (_rows(w, here) for w in (experts.w13, experts.w2))
        if experts.w13_scale_inv is not None and experts.w2_scale_inv is not None:
            experts.w13_scale_inv = experts.w13_scale_inv[here].contiguous()
            experts.w2_scale_inv = experts.w2_scale_inv[here].contiguous()
        experts.compute = compute
        layer.gate.physical = _table(placement, columns).to(device)
        layer.gate.asked = torch.zeros(placement.n_experts, dtype=torch.int64, device=device)


def _set_shared_apart(layer: MoE) -> None:
    """Makes a network of shared experts that stand behind the routed ones, where `keep_in_fp8` has put them."""
    experts, n = layer.experts, layer.experts.n_shared
    _, hidden, inner = experts.w2.shape
    with torch.device("meta"):
        network = FeedForward(hidden, n * inner, layer.fp8)
    for linear, stack, scale in (
        (network.w13, experts.w13, experts.w13_scale_inv),
        (network.w2, experts.w2, experts.w2_scale_inv),
    ):
        join = _side_by_side if linear is network.w2 else _gates_first
        linear.weight = nn.Parameter(join(stack.detach()[-n:].view(torch.uint8)).view(stack.dtype), requires_grad=False)
        linear.weight_scale_inv = None if scale is None else join(scale[-n:])
    experts.w13, experts.w2 = (nn.Parameter(w.detach()[:-n], requires_grad=False) for w in (experts.w13, experts.w2))
    layer.shared_experts, experts.n_shared = network, 0


def _gates_first(w13: Tensor) -> Tensor:
    """``[n, 2I, .]`` as ``[2nI, .]``: the gates of all, then what they gate."""
    return torch.cat([half.flatten(0, 1) for half in w13.chunk(2, 1)]).contiguous()


def _side_by_side(w2: Tensor) -> Tensor:
    """``[n, H, .]`` as ``[H, n .]``."""
    return w2.movedim(0, 1).flatten(1).contiguous()


def _stacks(layer: MoE) -> list[Tensor]:
    """All that belongs to an expert."""
    experts = layer.experts
    stacks = (experts.w13, experts.w2, experts.w13_scale_inv, experts.w2_scale_inv)
    return [stack for stack in stacks if stack is not None]


def _counted(layer: MoE) -> Tensor:
    if layer.gate.asked is None:
        raise RuntimeError("model: its router does not count")
    return layer.gate.asked


def _rows(weight: nn.Parameter, rows: Tensor) -> nn.Parameter:
    """Some experts of a stack; e4m3 is not indexed by every version of torch, bytes are."""
    data = weight.detach()
    return nn.Parameter(data.view(torch.uint8)[rows].view(data.dtype), requires_grad=False)


def _table(placement: Placement, columns: int) -> Tensor:
    """`Placement.physical` in so many columns."""
    found = placement.physical()
    return torch.nn.functional.pad(found, (0, columns - found.shape[1]), value=-1)
