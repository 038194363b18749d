"""The mixture of experts: router, stacked expert weights, and the block that runs them and the shared experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import dskernels as ds
from dskernels.model.config import Config
from dskernels.model.layers import FP8_BLOCK, FeedForward, keeping_dtype
from dskernels.types import Fp8Tensor, Routing


class RouterOutput(NamedTuple):
    """What training needs from a router.

    Attributes:
        logits: float32 ``[T, n_routed_experts]``, for `balance_loss`.
        routing: the choice; its ``load`` is what `update_bias` takes.
    """

    logits: Tensor
    routing: Routing


class Router(nn.Module):
    """Scores every expert for every token, in fp32, and chooses (report eqs. 12-16).

    Attributes:
        weight: ``[experts, hidden]``.
        e_score_correction_bias: float32 ``[experts]``, added to the scores for the choice only and moved by
            `update_bias`, not by a gradient; None with softmax.
        physical: if experts have copies, the places of each, see `dskernels.route`.
        asked: if choices are counted, int64 ``[experts]``, to which each pass adds its load.
    """

    e_score_correction_bias: Tensor | None
    physical: Tensor | None
    asked: Tensor | None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if config.scoring_func == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", bias)
        self.physical = self.asked = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Called by `to` and the like; fp32 tensors stay fp32, since rounding the bias to bf16 would change the
        choices."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(moved.device)
        return self

    def forward(self, x: Tensor) -> RouterOutput:
        """Route ``[T, hidden]``; the product runs in the same launch as the choice."""
        config = self.config
        routing, logits = ds.route_hidden(
            x,
            self.weight,
            self.e_score_correction_bias,
            top_k=config.num_experts_per_tok,
            n_groups=config.n_group,
            top_groups=config.topk_group,
            score=config.scoring_func,
            normalize=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
            physical=self.physical,
        )
        if self.asked is not None:
            self.asked += routing.load
        return RouterOutput(logits, routing)


class Experts(nn.Module):
    """The weights of a block's routed experts, stacked: ``w13`` ``[E, 2I, H]``, gate first, and ``w2`` ``[E, H, I]``.

    Attributes:
        n_shared: how many shared experts are stacked behind the routed ones, see `keep_in_fp8`.
        w13_scale_inv: float32, the scales of 128x128 blocks if the weights are kept quantised, see `keep_in_fp8`.
        w2_scale_inv: likewise.
        compute: the function that multiplies; with several GPUs it is replaced by another one that means the same (see
            `parallelize`).
    """

    w13_scale_inv: Tensor | None
    w2_scale_inv: Tensor | None
    compute: Callable[..., Tensor]

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.compute = ds.fused_experts
        experts, inner, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.n_shared = 0
        self.w13 = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, inner))
        self.register_buffer("w13_scale_inv", None)
        self.register_buffer("w2_scale_inv", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        """Called by `to` and the like; quantised weights and their scales keep their types."""
        super()._apply(fn if self.w13_scale_inv is None else keeping_dtype(fn), recurse)
        return self

    @property
    def operands(self) -> tuple[Tensor | Fp8Tensor, Tensor | Fp8Tensor]:
        """``w13`` and ``w2`` in the form that the operations take."""
        if self.w13_scale_inv is None or self.w2_scale_inv is None:
            return self.w13, self.w2
        return Fp8Tensor(self.w13, self.w13_scale_inv, FP8_BLOCK), Fp8Tensor(self.w2, self.w2_scale_inv, FP8_BLOCK)

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        shared: FeedForward | None = None,
        quantized: Fp8Tensor | None = None,
        fp8: bool = False,
    ) -> Tensor:
        """The routed experts and the shared ones, applied to ``[T, hidden]``; see `dskernels.fused_experts`."""
        return self.compute(
            x,
            *self.operands,
            routing,
            shared=None if shared is None else (shared.w13.operand, shared.w2.operand),
            n_shared=self.n_shared,
            quantized=quantized,
            fp8=fp8,
            keep="fp8",
        )


class MoE(nn.Module):
    """Every token goes through its chosen experts and through the shared ones.

    Attributes:
        gate: the router.
        experts: the routed experts.
        shared_experts: a separate network; None if there is none, or if it is stacked with the routed experts.
    """

    def __init__(self, config: Config, fp8: bool) -> None:
        super().__init__()
        self.fp8 = fp8
        self.gate = Router(config)
        self.experts = Experts(config)
        shared_width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = FeedForward(config.hidden_size, shared_width, fp8) if shared_width else None

    @property
    def takes_fp8(self) -> bool:
        """Whether the input may be passed quantised: the weights are kept in e4m3, and no gradient is needed."""
        return self.experts.w13_scale_inv is not None and not torch.is_grad_enabled()

    def forward(self, x: Tensor, quantized: Fp8Tensor | None = None) -> tuple[Tensor, RouterOutput]:
        """``[T, hidden]`` to ``[T, hidden]``, and the router's output; ``quantized`` is ``x`` in 1x128 tiles."""
        router = self.gate(x)
        return self.experts(x, router.routing, self.shared_experts, quantized, self.fp8), router
