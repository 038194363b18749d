"""What the passes of a whole model must at least do: the roofs of its kernels, one after the other.

Every product reads its weights and tokens once and writes its result; between products stand a norm with the residual
(twice a layer), what is cached, and what has to be quantised. Weights are e4m3 but for the absorbed up-projection, the
router and the head, which are bf16; of experts those count that so many tokens are expected to touch.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import roofline
from benchmarks import workloads as w
from benchmarks.roofline import BF16, FP32, Chain, Work
from dskernels.model import Config


def decode_step(config: Config, x: w.ModelDecode) -> Chain:
    """A new token of each sequence, absorbed attention, and the head for all of them."""
    return Chain((*_layers(config, x.b, _absorbed(config, x)), *_end(config, x.b, x.b)))


def prefill(config: Config, x: w.ModelPrefill) -> Chain:
    """All tokens of one sequence, keys and values written out, and the head for the last."""
    return Chain((*_layers(config, x.s, _written_out(config, x)), *_end(config, x.s, 1)))


def _layers(config: Config, tokens: int, attention: tuple[Work, ...]) -> Iterator[Work]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    query = heads * config.qk_head_dim
    norm = roofline.rmsnorm_quantize(w.Rows(tokens, hidden), residual=True)
    for layer in range(config.num_hidden_layers):
        yield norm
        if config.q_lora_rank is None:
            yield roofline.gemm(w.Gemm(tokens, query + config.latent_dim, hidden))
        else:
            yield roofline.gemm(w.Gemm(tokens, config.q_lora_rank + config.latent_dim, hidden))
            yield roofline.rmsnorm_quantize(w.Rows(tokens, config.q_lora_rank), residual=False)
            yield roofline.gemm(w.Gemm(tokens, query, config.q_lora_rank))
        yield _write_cache(config, tokens)
        yield from attention
        yield roofline.quantize(w.Rows(tokens, heads * config.v_head_dim), (1, 128))
        yield roofline.gemm(w.Gemm(tokens, hidden, heads * config.v_head_dim))
        yield norm
        if layer < config.first_k_dense_replace:
            yield roofline.gemm(w.Gemm(tokens, 2 * config.intermediate_size, hidden))
            yield roofline.swiglu_quantize(w.Rows(tokens, config.intermediate_size))
            yield roofline.gemm(w.Gemm(tokens, hidden, config.intermediate_size))
        else:
            experts, k = config.n_routed_experts, config.num_experts_per_tok
            yield roofline.route_hidden(w.RouteHidden(tokens, e=experts, k=k, h=hidden))
            moe = w.Moe(tokens, e=experts, k=k, h=hidden, i=config.moe_intermediate_size)
            yield roofline.fused_experts(moe, shared=config.n_shared_experts)


def _absorbed(config: Config, x: w.ModelDecode) -> tuple[Work, ...]:
    """The key's up-projection moved to the query, attention to cached latents, the value's moved to the output."""
    heads, latent, row = config.num_attention_heads, config.kv_lora_rank, config.latent_dim
    queries = x.b * heads
    up = Work(
        2 * queries * config.qk_nope_head_dim * latent,
        heads * config.qk_nope_head_dim * latent * BF16 + queries * (config.qk_head_dim + row) * BF16,
        "bf16",
    )
    moved = x.b * x.s * row * BF16 + queries * (row + latent) * BF16 + queries * FP32
    attention = Work(2 * queries * (row + latent) * x.s, moved, "bf16")
    down = Work(
        2 * queries * config.v_head_dim * latent,
        heads * config.v_head_dim * latent * BF16 + queries * (latent + config.v_head_dim) * BF16,
        "bf16",
    )
    return up, attention, down


def _written_out(config: Config, x: w.ModelPrefill) -> tuple[Work, ...]:
    """Keys and values of every head, the rotation of queries, causal attention."""
    heads, rope, value = config.num_attention_heads, config.qk_rope_head_dim, config.v_head_dim
    own = heads * (config.qk_nope_head_dim + value)
    rotation = Work(None, 2 * x.s * heads * rope * BF16)
    pairs = x.s * (x.s + 1) // 2
    moved = x.s * (heads * (config.qk_head_dim + value) + own + rope) * BF16 + x.s * heads * FP32
    attention = Work(2 * heads * (config.qk_head_dim + value) * pairs, moved, "bf16")
    norm = roofline.rmsnorm_quantize(w.Rows(x.s, config.kv_lora_rank), residual=False)
    return rotation, norm, roofline.gemm(w.Gemm(x.s, own, config.kv_lora_rank)), attention


def _write_cache(config: Config, tokens: int) -> Work:
    row = config.latent_dim
    return Work(None, tokens * (2 * row * BF16 + config.qk_rope_head_dim * FP32 + 8) + config.kv_lora_rank * BF16)


def _end(config: Config, tokens: int, scored: int) -> tuple[Work, ...]:
    """The final norm of all tokens, and the head, in bf16, for those that are scored; the embedding's rows before."""
    hidden, vocab = config.hidden_size, config.vocab_size
    embedding = Work(None, 2 * tokens * hidden * BF16)
    norm = Work(None, 3 * tokens * hidden * BF16)
    head = Work(2 * scored * hidden * vocab, (hidden * vocab + scored * (hidden + vocab)) * BF16, "bf16")
    return embedding, norm, head
