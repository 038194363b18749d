"""More than one GPU for generation: no sizes on the host, the host never waits, and steps work in CUDA graphs.

There are two forms. `parallelize_decode` gives each rank some of the heads and some of the experts for the same tokens,
and sums the results over the ranks: any `generate` then runs on all ranks at once. `DecodeExperts` is for engines whose
ranks have sequences of their own: in messages of a fixed size every rank gets the tokens of all ranks, and computes the
choices that fall on its own experts.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dskernels as ds
from dskernels.model.attention import Attention
from dskernels.model.block import Block
from dskernels.model.fp8_weights import SCALE_SUFFIX, set_shared_apart, write_out_for_decode
from dskernels.model.layers import FP8_BLOCK, FeedForward, Linear
from dskernels.model.model import DeepseekV3
from dskernels.model.moe import Experts
from dskernels.model.parallel.exchange import Wire, choices_here, loaded, pack, unloaded, unpack, widths
from dskernels.model.parallel.plan import Team
from dskernels.types import Fp8Tensor, Routing

BLOCK = FP8_BLOCK[0]  # rows, and columns, that share a scale


def parallelize_decode(model: DeepseekV3, team: Team) -> DeepseekV3:
    """Leaves each rank its heads, its part of the feed-forwards and its experts; all have the whole cache of latents.

    Weights that are kept in fp8 stay as they are: each rank keeps whole blocks of 128x128, with their scales. Of
    a checkpoint, `dskernels.model.parallel.reading.load_divided` makes the same without the whole model on any rank.

    Args:
        model: the same on every rank. It is changed in place and moved to the device.
        team: ranks of a plan of ``tensor`` alone.

    Raises:
        ValueError: the plan does not fit the model, or a layer that is kept in fp8 cannot be divided between blocks;
            nothing has been changed.
    """
    check_division(model, team)
    for _, block in blocks_of(model):
        divide(block, team)
    model.to(team.device)
    write_out_for_decode(model)  # of this rank's heads
    return model


def blocks_of(model: DeepseekV3) -> list[tuple[str, Block]]:
    """All blocks by name, those of the MTP modules last."""
    parts = ("layers", model.layers), ("mtp", model.mtp)
    return [(f"{name}.{i}", cast(Block, block)) for name, blocks in parts for i, block in enumerate(blocks)]


def check_division(model: DeepseekV3, team: Team) -> None:
    """Raise a ValueError if the model cannot be divided over the ranks; it may be on the meta device."""
    ranks = team.plan.tensor
    team.plan.check(model.config, dist.get_world_size())
    for name, block in blocks_of(model):
        attention, mlp = block.self_attn, block.mlp
        heads = model.config.num_attention_heads
        queries = _queries(attention)
        _check_size(f"{name}.self_attn.{queries[0]}", queries[1], heads * model.config.qk_head_dim, ranks, "rows")
        _check_size(f"{name}.self_attn.kv_b_proj", attention.kv_b_proj, len(attention.kv_b_proj.weight), ranks, "rows")
        columns = attention.o_proj.weight.shape[1]
        _check_size(f"{name}.self_attn.o_proj", attention.o_proj, columns, ranks, "columns")
        if isinstance(mlp, FeedForward):
            _check_size(f"{name}.mlp", mlp.w2, mlp.w2.weight.shape[1], ranks, "inner columns")
        elif mlp.shared_experts is not None:
            w2 = mlp.shared_experts.w2
            _check_size(f"{name}.mlp.shared_experts", w2, w2.weight.shape[1], ranks, "inner columns")
        elif mlp.experts.n_shared:
            inner = mlp.experts.n_shared * mlp.experts.w2.shape[2]
            _check_size(f"{name}.mlp.shared_experts", mlp.experts, inner, ranks, "inner columns")


def divide(block: Block, team: Team) -> None:
    """Leaves a block this rank's part, and adds the parts up after attention and after the feed-forward; see
    `check_division`."""
    ranks, place, group = team.plan.tensor, team.place("tensor"), team.group("tensor")

    def add_up(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        dist.all_reduce(y, group=group)
        return y

    _heads(block.self_attn, place, ranks)
    block.self_attn.register_forward_hook(add_up)
    mlp = block.mlp
    if isinstance(mlp, FeedForward):
        _columns(mlp, place, ranks)
        mlp.register_forward_hook(add_up)
        return
    # A rank has some of the routed experts whole, and of each shared one some columns: no stack has both.
    set_shared_apart(mlp)
    experts = mlp.experts
    n_experts = experts.w13.shape[0]
    own = [experts_of(n_experts, place, ranks)]
    for name in ("w13", "w2"):
        weight, scale = getattr(experts, name), getattr(experts, name + SCALE_SUFFIX)
        setattr(experts, name, nn.Parameter(_cut(weight.detach(), 0, own), weight.requires_grad))
        setattr(experts, name + SCALE_SUFFIX, None if scale is None else _cut(scale, 0, own))
    experts.compute = TensorExperts(group, n_experts)
    if mlp.shared_experts is not None:
        _columns(mlp.shared_experts, place, ranks)


def experts_of(n_experts: int, place: int, ranks: int) -> slice:
    """The experts of a rank."""
    return _part(0, n_experts, place, ranks)


class TensorExperts:
    """The expert block for ranks with the same tokens: each computes its experts and its part of the shared one.

    Args:
        group: the ranks; rank r holds the experts from ``r * E / R`` on.
        n_experts: E, a multiple of the ranks R.
    """

    def __init__(self, group: dist.ProcessGroup, n_experts: int) -> None:
        self.group, self.first = group, group.rank() * (n_experts // group.size())

    def __call__(
        self, x: Tensor, w13: Tensor | Fp8Tensor, w2: Tensor | Fp8Tensor, routing: Routing, **options: Any
    ) -> Tensor:
        """As `dskernels.fused_experts`, with the weights of this rank's experts and ids among all experts."""
        here = choices_here(routing.weights, routing.experts, self.first, w13.shape[0])
        y = ds.fused_experts(x, w13, w2, here, **options)
        dist.all_reduce(y, group=self.group)
        return y


class DecodeExperts:
    """The expert block for ranks that have different tokens, as many each, and experts of their own.

    Every rank gets the tokens of all ranks with their choices, in a message of a fixed size, and computes the choices
    that fall on its own experts. This works in a CUDA graph, but sends bytes that `ExpertParallel` would not. What
    comes back is summed in fp32, in the order of the ranks.

    Args:
        group: the ranks; rank r holds the experts from ``r * E / R`` on.
        n_experts: E, a multiple of the ranks R.
        wire: see `ExpertParallel`.

    Raises:
        ValueError: the ranks do not divide the experts.
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
        residual = None if shared is None else ds.feed_forward(x, *shared, fp8=fp8)  # while the message travels
        work.wait()
        *parts, weights, experts = unpack(every, widths(hidden, x.dtype, self.wire) + tail)
        here = choices_here(weights, experts, self.first, w13.shape[0])
        y = ds.fused_experts(unloaded(parts, x.dtype), w13, w2, here, fp8=fp8)
        back = torch.empty_like(y)
        dist.all_to_all_single(back, y, group=self.group)
        out = back.view(ranks, tokens, hidden).float().sum(0).to(x.dtype)
        return out if residual is None else out + residual


def _queries(attention: Attention) -> tuple[str, Linear]:
    """The matrix whose first rows are the queries of all heads, and its name."""
    compressed = attention.config.q_lora_rank is not None
    name = "q_b_proj" if compressed else "q_proj" if attention.qkv_a_proj is None else "qkv_a_proj"
    return name, getattr(attention, name)


def _heads(attention: Attention, place: int, ranks: int) -> None:
    """Leaves an attention only this rank's heads."""
    config = attention.config
    queries = _queries(attention)[1]
    rows = config.num_attention_heads * config.qk_head_dim
    rest = [slice(rows, len(queries.weight))] if len(queries.weight) > rows else []  # latent and key, for all heads
    _keep_parts(queries, 0, [_part(0, rows, place, ranks), *rest])
    _keep_parts(attention.kv_b_proj, 0, [_part(0, len(attention.kv_b_proj.weight), place, ranks)])
    _keep_parts(attention.o_proj, 1, [_part(0, attention.o_proj.weight.shape[1], place, ranks)])
    attention.config = config.replace(num_attention_heads=config.num_attention_heads // ranks)


def _columns(network: FeedForward, place: int, ranks: int) -> None:
    """Leaves a feed-forward only this rank's part of the inner columns, the same of gate and up."""
    inner = network.w2.weight.shape[1]
    _keep_parts(network.w13, 0, [_part(0, inner, place, ranks), _part(inner, inner, place, ranks)])
    _keep_parts(network.w2, 1, [_part(0, inner, place, ranks)])


def _part(first: int, size: int, place: int, ranks: int) -> slice:
    """This rank's part of ``size`` rows or columns from ``first`` on."""
    return slice(first + place * (size // ranks), first + (place + 1) * (size // ranks))


def _check_size(name: str, module: Linear | Experts, size: int, ranks: int, what: str) -> None:
    """Raise if so many rows or columns cannot be divided over the ranks, in fp8 at multiples of 128."""
    kept = (module.weight_scale_inv if isinstance(module, Linear) else module.w2_scale_inv) is not None
    if size % ranks:
        raise ValueError(f"tensor: {ranks} ranks do not divide the {size} {what} of {name}")
    if kept and size // ranks % BLOCK:
        raise ValueError(
            f"tensor: {name} is kept in fp8 in blocks of {BLOCK}, expected a multiple of {BLOCK} {what} for each rank, "
            f"got {size} / {ranks} = {size // ranks}"
        )


def _keep_parts(linear: Linear, dim: int, parts: list[slice]) -> None:
    """Leaves a layer some rows (``dim`` 0) or columns of its weight, with their scales."""
    linear.weight = nn.Parameter(_cut(linear.weight.detach(), dim, parts), linear.weight.requires_grad)
    if linear.weight_scale_inv is not None:
        # All parts begin at whole blocks; the last rows of a matrix may be fewer.
        blocks = [slice(part.start // BLOCK, -(-part.stop // BLOCK)) for part in parts]
        linear.weight_scale_inv = _cut(linear.weight_scale_inv, dim, blocks)


def _cut(tensor: Tensor, dim: int, parts: list[slice]) -> Tensor:
    """These parts of a tensor, one after the other, in memory of their own."""
    data = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    return torch.cat([data.narrow(dim, part.start, part.stop - part.start) for part in parts], dim).view(tensor.dtype)
