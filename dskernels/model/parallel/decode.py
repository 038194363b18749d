"""More than one GPU for generation: no sizes on the host, nothing waits, every step fits in a CUDA graph.

Two forms. `parallelize_decode` gives each rank some of the heads and some of the experts for the same tokens, and sums
what they make: any `generate` then runs on all ranks at once. `DecodeExperts` is for engines whose ranks have sequences
of their own: messages of fixed size, in which each rank finds the tokens of all, and takes the choices that are its.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dskernels as ds
from dskernels.model.attention import Attention
from dskernels.model.layers import FeedForward, Linear
from dskernels.model.model import DeepseekV3
from dskernels.model.moe import MoE
from dskernels.model.parallel.exchange import Wire, choices_here, loaded, pack, unloaded, unpack, widths
from dskernels.model.parallel.plan import Team
from dskernels.types import Fp8Tensor, Routing


def parallelize_decode(model: DeepseekV3, team: Team) -> DeepseekV3:
    """Leaves each rank its heads, its part of the feed-forwards and its experts; all have the whole cache of latents.

    Args:
        model: the same on every rank, its weights not kept in fp8. It is changed in place and moved to the device.
        team: ranks of a plan of ``tensor`` alone.

    Raises:
        ValueError: the plan does not fit the model, or its weights are kept in fp8.
    """
    ranks, place, group = team.plan.tensor, team.place("tensor"), team.group("tensor")
    team.plan.check(model.config, dist.get_world_size())

    def add_up(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        dist.all_reduce(y, group=group)
        return y

    for block in (*model.layers, *model.mtp):
        _heads(block.self_attn, place, ranks)
        block.self_attn.register_forward_hook(add_up)
        if isinstance(block.mlp, MoE):
            experts = block.mlp.experts
            if experts.w13_scale_inv is not None:
                raise ValueError("model: expected weights that are not kept in fp8")
            experts.w13, experts.w2 = (
                nn.Parameter(w.detach().chunk(ranks)[place].clone(), w.requires_grad) for w in (experts.w13, experts.w2)
            )
            experts.compute = TensorExperts(group, model.config.n_routed_experts)
            if block.mlp.shared_experts is not None:
                _columns(block.mlp.shared_experts, place, ranks)
        else:
            _columns(block.mlp, place, ranks)
            block.mlp.register_forward_hook(add_up)
    return model.to(team.device)


class TensorExperts:
    """The expert block for ranks with the same tokens: each runs its experts and its part of the shared one."""

    def __init__(self, group: dist.ProcessGroup, n_experts: int) -> None:
        self.group, self.first = group, group.rank() * (n_experts // group.size())

    def __call__(
        self, x: Tensor, w13: Tensor | Fp8Tensor, w2: Tensor | Fp8Tensor, routing: Routing, **options: Any
    ) -> Tensor:
        """As `dskernels.fused_experts`, with the weights of this rank and ids of all experts."""
        here = choices_here(routing.weights, routing.experts, self.first, w13.shape[0])
        y = ds.fused_experts(x, w13, w2, here, **options)
        dist.all_reduce(y, group=self.group)
        return y


class DecodeExperts:
    """The expert block for ranks with as many tokens each and experts of their own.

    Every rank gets the tokens of all with their choices, in a message of fixed size, and runs the choices that are its
    own: what fits a CUDA graph, at the price of bytes that `ExpertParallel` would not send. What comes back is summed
    in fp32 in the order of the ranks.

    Args:
        group: the ranks; rank r holds the experts from ``r * E / R`` on.
        n_experts: E.
        wire: see `ExpertParallel`.
    """

    def __init__(self, group: dist.ProcessGroup, n_experts: int, *, wire: Wire = "same") -> None:
        if n_experts % group.size():
            raise ValueError(f"n_experts: {group.size()} ranks do not divide {n_experts} experts")
        self.group, self.wire = group, wire
        self.first = group.rank() * (n_experts // group.size())

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        w13: Tensor | Fp8Tensor,
        w2: Tensor | Fp8Tensor,
        routing: Routing,
        *,
        shared: tuple[Tensor | Fp8Tensor, Tensor | Fp8Tensor] | None = None,
        n_shared: int = 0,
        quantized: Fp8Tensor | None = None,
        fp8: bool = False,
        keep: str = "input",
    ) -> Tensor:
        """As `dskernels.fused_experts`, without a gradient: ``quantized`` and ``keep`` change nothing."""
        if n_shared:
            raise ValueError("n_shared: shared experts in the stack of the routed ones are for one process")
        ranks, (tokens, hidden), k = self.group.size(), x.shape, routing.weights.shape[1]
        tail = [(k, torch.float32), (k, torch.int32)]
        rows = pack(*loaded(x, self.wire), routing.weights, routing.experts.int())
        every = rows.new_empty(ranks * tokens, rows.shape[1])
        work = dist.all_gather_into_tensor(every, rows, group=self.group, async_op=True)
        residual = None if shared is None else ds.feed_forward(x, *shared, fp8=fp8)  # under the message
        work.wait()
        *parts, weights, experts = unpack(every, widths(hidden, x.dtype, self.wire) + tail)
        here = choices_here(weights, experts, self.first, w13.shape[0])
        y = ds.fused_experts(unloaded(parts, x.dtype), w13, w2, here, fp8=fp8)
        back = torch.empty_like(y)
        dist.all_to_all_single(back, y, group=self.group)
        out = back.view(ranks, tokens, hidden).float().sum(0).to(x.dtype)
        return out if residual is None else out + residual


def _heads(attention: Attention, place: int, ranks: int) -> None:
    """Leaves the attention its part of the heads."""
    config = attention.config
    heads = config.num_attention_heads
    queries = attention.q_proj if config.q_lora_rank is None else attention.q_b_proj
    if queries is None or queries.weight_scale_inv is not None:
        raise ValueError("model: expected weights that are not kept in fp8")
    for projection in (queries, attention.kv_b_proj):
        by_head = projection.weight.detach().unflatten(0, (heads, -1))
        _replace(projection, by_head.chunk(ranks)[place].flatten(0, 1))
    by_head = attention.o_proj.weight.detach().unflatten(1, (heads, -1))
    _replace(attention.o_proj, by_head.chunk(ranks, 1)[place].flatten(1))
    attention.config = config.replace(num_attention_heads=heads // ranks)


def _columns(network: FeedForward, place: int, ranks: int) -> None:
    """Leaves a feed-forward its part of the inner columns, of gate and up alike."""
    inner = network.w2.weight.shape[1]
    if network.w2.weight_scale_inv is not None:
        raise ValueError("model: expected weights that are not kept in fp8")
    if inner % ranks:
        raise ValueError(f"tensor: {ranks} ranks do not divide a feed-forward of {inner} columns")
    gate_up = network.w13.weight.detach().unflatten(0, (2, inner))
    _replace(network.w13, gate_up.chunk(ranks, 1)[place].flatten(0, 1))
    _replace(network.w2, network.w2.weight.detach().chunk(ranks, 1)[place])


def _replace(linear: Linear, weight: Tensor) -> None:
    linear.weight = nn.Parameter(weight.clone(), linear.weight.requires_grad)
