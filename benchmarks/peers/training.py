"""A training step of our model's shape in bf16 as one writes it in PyTorch alone, on our parameters.

Blocks are compiled one by one, each kind once; experts run on torch's grouped product, attention on SDPA (cuDNN's,
where a GPU has it). Moving tokens to experts and back are permutations whose gradients are permutations too: written
as an index, autograd would add up with atomics.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import kept_within_a_family
from benchmarks.peers import Peer, torch_grouped_mm
from dskernels.model import DeepseekV3


class _ToExperts(torch.autograd.Function):
    """Token ``order[r] // k`` as row r."""

    @staticmethod
    def forward(ctx, x, order, back, k):
        ctx.save_for_backward(back)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx, dy):
        (back,) = ctx.saved_tensors
        return dy[back].unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class _FromExperts(torch.autograd.Function):
    """Row ``back[r]`` as row r."""

    @staticmethod
    def forward(ctx, y, order, back):
        ctx.save_for_backward(order)
        return y[back]

    @staticmethod
    def backward(ctx, dout):
        (order,) = ctx.saved_tensors
        return dout[order], None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _attention(a: Any, x: Tensor, cos: Tensor, sin: Tensor, batch: int) -> Tensor:
    config = a.config
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    if config.q_lora_rank is None:
        q = F.linear(x, a.q_proj.weight)
    else:
        q = F.linear(_norm(a.q_a_layernorm, F.linear(x, a.q_a_proj.weight)), a.q_b_proj.weight)
    latent, k_rope = F.linear(x, a.kv_a_proj_with_mqa.weight).split((config.kv_lora_rank, rope), -1)
    kv = F.linear(_norm(a.kv_a_layernorm, latent), a.kv_b_proj.weight).unflatten(-1, (heads, -1))
    k_nope, v = kv.split((nope, config.v_head_dim), -1)
    q_nope, q_rope = q.unflatten(-1, (heads, -1)).split((nope, rope), -1)
    cos, sin = cos[:, None], sin[:, None]
    q = torch.cat((q_nope, _rotate(q_rope, cos, sin)), -1)
    k = torch.cat((k_nope, _rotate(k_rope[:, None], cos, sin).expand(-1, heads, -1)), -1)
    q, k, v = (t.unflatten(0, (batch, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=a.scale)
    return F.linear(out.transpose(1, 2).flatten(0, 1).flatten(1), a.o_proj.weight)


def _feed_forward(w13: Tensor, w2: Tensor, x: Tensor) -> Tensor:
    gate, up = F.linear(x, w13).chunk(2, -1)
    return F.linear(F.silu(gate) * up, w2)


def _experts(moe: Any, x: Tensor, batch: int, alpha: float) -> tuple[Tensor, Tensor]:
    config, product = moe.gate.config, torch_grouped_mm()
    n, k = config.n_routed_experts, config.num_experts_per_tok
    scores = F.linear(x.float(), moe.gate.weight.float()).sigmoid()
    chosen = (scores + moe.gate.e_score_correction_bias).topk(k, -1).indices
    weights = scores.gather(1, chosen)
    weights = weights / weights.sum(-1, keepdim=True) * config.routed_scaling_factor
    order = chosen.flatten().argsort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    ends = (chosen.flatten()[:, None] == torch.arange(n, device=chosen.device)).sum(0).cumsum(0).int()
    gate, up = product(_ToExperts.apply(x, order, back, k), moe.experts.w13.transpose(1, 2), offs=ends).chunk(2, -1)
    y = product(F.silu(gate) * up, moe.experts.w2.transpose(1, 2), offs=ends)
    y = (_FromExperts.apply(y, order, back).unflatten(0, (-1, k)) * weights[..., None]).sum(1).to(x.dtype)

    of_sequence = scores.unflatten(0, (batch, -1))
    best = of_sequence.topk(k, -1).indices
    taken = (best.flatten(1)[..., None] == torch.arange(n, device=best.device)).sum(1)
    share = taken * (n / (k * of_sequence.shape[1]))
    balance = alpha * (share * (of_sequence / of_sequence.sum(-1, keepdim=True)).mean(1)).sum(-1).mean()
    shared = moe.shared_experts
    return y + _feed_forward(shared.w13.weight, shared.w2.weight, x), balance


def _dense_block(block: Any, x: Tensor, cos: Tensor, sin: Tensor, batch: int) -> Tensor:
    x = x + _attention(block.self_attn, _norm(block.input_layernorm, x), cos, sin, batch)
    h = _norm(block.post_attention_layernorm, x)
    return x + _feed_forward(block.mlp.w13.weight, block.mlp.w2.weight, h)


def _expert_block(block: Any, x: Tensor, cos: Tensor, sin: Tensor, batch: int, alpha: float) -> tuple[Tensor, Tensor]:
    x = x + _attention(block.self_attn, _norm(block.input_layernorm, x), cos, sin, batch)
    y, balance = _experts(block.mlp, _norm(block.post_attention_layernorm, x), batch, alpha)
    return x + y, balance


def _scores(model: Any, x: Tensor, targets: Tensor) -> Tensor:
    """Nats of each token."""
    logits = F.linear(_norm(model.norm, x), model.lm_head.weight)
    return F.cross_entropy(logits.float(), targets, reduction="none")


class CompiledStep:
    """Forward, loss and backward; call it for the nats of each token and the sum that was differentiated."""

    def __init__(self, model: DeepseekV3, batch: int, alpha: float, *, compiled: bool = True) -> None:
        self.model, self.batch, self.alpha = model, batch, alpha

        def prepared(function: Any) -> Any:
            return torch.compile(function, dynamic=False) if compiled else function

        self.dense, self.sparse, self.scores = map(prepared, (_dense_block, _expert_block, _scores))

    def __call__(self, tokens: Tensor, targets: Tensor, counted: int) -> tuple[Tensor, Tensor]:
        """Gradients are left in the parameters."""
        model = self.model
        positions = torch.arange(tokens.shape[0], device=tokens.device) % (tokens.shape[0] // self.batch)
        attention = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if tokens.is_cuda else contextlib.nullcontext()
        with attention:
            cos, sin = model.rope(positions)
            x = model.embed_tokens(tokens)
            balance = x.new_zeros((), dtype=torch.float32)
            for i, block in enumerate(model.layers):
                if i < model.config.first_k_dense_replace:
                    x = self.dense(block, x, cos, sin, self.batch)
                else:
                    x, of_layer = self.sparse(block, x, cos, sin, self.batch, self.alpha)
                    balance = balance + of_layer
            nats = self.scores(model, x, targets)
            loss = nats.sum() / counted + balance
            loss.backward()
        return nats.detach(), loss.detach()


@kept_within_a_family
def _prepared(model: DeepseekV3, batch: int, alpha: float) -> CompiledStep:
    """Compiled once for all cases of a model; on the CPU, where it is but checked, not at all."""
    return CompiledStep(model, batch, alpha, compiled=model.embed_tokens.weight.is_cuda)


def torch_step(model: DeepseekV3, x: Any) -> Peer:
    """The compiled step of a model in bf16 on the inputs of `bench_training`."""
    step = _prepared(model, x.batch, x.alpha)

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        return step(x.tokens, x.targets, x.counted)[0]

    return Peer(run)
