"""Which tensor of a Hugging Face checkpoint is which part of which of our parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dskernels.model.config import Config


class Entry(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        name: in the checkpoint.
        parameter: of the model, as in its state dict.
        part: which part of the parameter: an expert, rows, both, or () for all of it.
        quantized: in an fp8 checkpoint it is e4m3 with a sibling ``<name>_scale_inv``.
        copy: another tensor holds the same; written for other readers, and compared when it is read.
    """

    name: str
    parameter: str
    part: tuple[int | slice, ...] = ()
    quantized: bool = False
    copy: bool = False

    @property
    def scale_part(self) -> tuple[int | slice, ...]:
        """Which part of the parameter's scales, one a block of 128x128, belongs to it."""
        return tuple(part if isinstance(part, int) else _blocks(part) for part in self.part)


def _blocks(part: slice) -> slice:
    return part if part == slice(None) else slice(part.start // 128, -(-part.stop // 128))


def entries(config: Config, *, kept_in_fp8: bool = False) -> Iterator[Entry]:
    """Every tensor of the checkpoint, layer by layer.

    Args:
        config: of the model.
        kept_in_fp8: parts of a model that `keep_in_fp8` has quantised, where gate and up begin at whole blocks.
    """
    step = 128 if kept_in_fp8 else 1
    yield Entry("model.embed_tokens.weight", "embed_tokens.weight")
    for n in range(config.num_hidden_layers):
        yield from _block(f"model.layers.{n}", f"layers.{n}", config, step, moe=n >= config.first_k_dense_replace)
    yield Entry("model.norm.weight", "norm.weight")
    yield Entry("lm_head.weight", "lm_head.weight")
    for k in range(config.num_nextn_predict_layers):
        theirs, ours = f"{mtp_prefix(config, k)}", f"mtp.{k}"
        yield Entry(f"{theirs}.embed_tokens.weight", "embed_tokens.weight", copy=True)
        for name in ("enorm", "hnorm", "eh_proj"):
            yield Entry(f"{theirs}.{name}.weight", f"{ours}.{name}.weight")
        yield from _block(theirs, ours, config, step, moe=True)
        yield Entry(f"{theirs}.shared_head.norm.weight", f"{ours}.norm.weight")
        yield Entry(f"{theirs}.shared_head.head.weight", "lm_head.weight", copy=True)


def mtp_prefix(config: Config, k: int) -> str:
    """MTP modules are stored as further layers."""
    return f"model.layers.{config.num_hidden_layers + k}"


def _block(theirs: str, ours: str, config: Config, step: int, *, moe: bool) -> Iterator[Entry]:
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Entry(f"{theirs}.{name}.weight", f"{ours}.{name}.weight")
    query = ("q_proj",) if config.q_lora_rank is None else ("q_a_proj", "q_a_layernorm", "q_b_proj")
    for name in (*query, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"):
        full = f"self_attn.{name}.weight"
        yield Entry(f"{theirs}.{full}", f"{ours}.{full}", quantized=not name.endswith("layernorm"))
    theirs, ours = f"{theirs}.mlp", f"{ours}.mlp"
    if not moe:
        yield from _gated(theirs, f"{ours}.w13.weight", f"{ours}.w2.weight", config.intermediate_size, step)
        return
    yield Entry(f"{theirs}.gate.weight", f"{ours}.gate.weight")
    if config.scoring_func == "sigmoid":
        bias = "gate.e_score_correction_bias"
        yield Entry(f"{theirs}.{bias}", f"{ours}.{bias}")
    inner = config.moe_intermediate_size
    for e in range(config.n_routed_experts):
        yield from _gated(f"{theirs}.experts.{e}", f"{ours}.experts.w13", f"{ours}.experts.w2", inner, step, (e,))
    if config.n_shared_experts:
        shared = f"{ours}.shared_experts"
        inner *= config.n_shared_experts
        yield from _gated(f"{theirs}.shared_experts", f"{shared}.w13.weight", f"{shared}.w2.weight", inner, step)


def _gated(theirs: str, w13: str, w2: str, inner: int, step: int, expert: tuple[int, ...] = ()) -> Iterator[Entry]:
    """Gate and up are one matrix here and two there."""
    up = -(-inner // step) * step
    yield Entry(f"{theirs}.gate_proj.weight", w13, (*expert, slice(0, inner)), quantized=True)
    yield Entry(f"{theirs}.up_proj.weight", w13, (*expert, slice(up, up + inner)), quantized=True)
    yield Entry(f"{theirs}.down_proj.weight", w2, (*expert, slice(None), slice(0, inner)), quantized=True)
