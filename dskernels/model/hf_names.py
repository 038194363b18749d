"""Which tensor of a Hugging Face checkpoint corresponds to which part of which of our parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from dskernels.model.config import Config
from dskernels.model.layers import FP8_BLOCK


class Entry(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        name: in the checkpoint.
        parameter: of the model, as in its state dict.
        part: the part of the parameter: an expert, rows, both, or () for all of it.
        quantized: whether an fp8 checkpoint stores it in e4m3, with a sibling ``<name>_scale_inv``.
        copy: whether another tensor has the same content; it is written for other readers, and compared when it is
            read.
        across: for a part that covers several experts which are one matrix in the checkpoint: the dimension along which
            they lie side by side in it.
    """

    name: str
    parameter: str
    part: tuple[int | slice, ...] = ()
    quantized: bool = False
    copy: bool = False
    across: int | None = None

    @property
    def scale_part(self) -> tuple[int | slice, ...]:
        """The part of the parameter's scales (one for each block of 128x128) that belongs to this tensor."""
        of_experts = self.part[:1] if self.across is not None else ()
        rest = self.part[len(of_experts) :]
        return (*of_experts, *(part if isinstance(part, int) else _blocks(part) for part in rest))

    def to_part(self, stored: Tensor) -> Tensor:
        """Reshape the checkpoint's tensor, or its scales, to the part."""
        if self.across is None:
            return stored
        (experts, *_) = self.part
        n_experts = experts.stop - experts.start if isinstance(experts, slice) else 1
        return stored.unflatten(self.across, (n_experts, -1)).movedim(self.across, 0)

    def from_part(self, part: Tensor) -> Tensor:
        """Reshape the part, or its scales, to the checkpoint's tensor."""
        return part if self.across is None else part.movedim(0, self.across).flatten(self.across, self.across + 1)


def _blocks(part: slice) -> slice:
    return part if part == slice(None) else slice(part.start // 128, -(-part.stop // 128))


def query_rows(config: Config) -> int:
    """Number of rows of the matrix that makes the query, or the compressed query, from the hidden state."""
    return config.num_attention_heads * config.qk_head_dim if config.q_lora_rank is None else config.q_lora_rank


def stacks_down(config: Config) -> bool:
    """Whether `keep_in_fp8` stacks the matrices that multiply the hidden state: possible if no block covers two of
    them."""
    return query_rows(config) % FP8_BLOCK[0] == 0


def stacks_shared(config: Config) -> bool:
    """Whether `keep_in_fp8` stacks the shared experts behind the routed ones: possible if no block covers two of
    them."""
    n_shared = config.n_shared_experts
    return n_shared == 1 or (n_shared > 1 and config.moe_intermediate_size % FP8_BLOCK[0] == 0)


def entries(config: Config, *, kept_in_fp8: bool = False) -> Iterator[Entry]:
    """Every tensor of the checkpoint, layer by layer.

    Args:
        config: of the model.
        kept_in_fp8: the parts of a model that `keep_in_fp8` has quantised, in which gate and up begin at whole blocks,
            and some matrices are stacked.
    """
    step = FP8_BLOCK[0] if kept_in_fp8 else 1
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
    """The name prefix of an MTP module, which is stored as a further layer."""
    return f"model.layers.{config.num_hidden_layers + k}"


def _block(theirs: str, ours: str, config: Config, step: int, *, moe: bool) -> Iterator[Entry]:
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Entry(f"{theirs}.{name}.weight", f"{ours}.{name}.weight")
    query = ("q_proj",) if config.q_lora_rank is None else ("q_a_proj", "q_a_layernorm", "q_b_proj")
    rows, together = query_rows(config), step > 1 and stacks_down(config)
    joint = {query[0]: slice(0, rows), "kv_a_proj_with_mqa": slice(rows, rows + config.latent_dim)} if together else {}
    for name in (*query, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"):
        parameter, part = ("qkv_a_proj", (joint[name],)) if name in joint else (name, ())
        quantized = not name.endswith("layernorm")
        ours_full = f"{ours}.self_attn.{parameter}.weight"
        yield Entry(f"{theirs}.self_attn.{name}.weight", ours_full, part, quantized=quantized)
    theirs, ours = f"{theirs}.mlp", f"{ours}.mlp"
    if not moe:
        yield from _gated(theirs, f"{ours}.w13.weight", f"{ours}.w2.weight", config.intermediate_size, step)
        return
    yield Entry(f"{theirs}.gate.weight", f"{ours}.gate.weight")
    if config.scoring_func == "sigmoid":
        bias = "gate.e_score_correction_bias"
        yield Entry(f"{theirs}.{bias}", f"{ours}.{bias}")
    inner, n_routed, n_shared = config.moe_intermediate_size, config.n_routed_experts, config.n_shared_experts
    stacks = f"{ours}.experts.w13", f"{ours}.experts.w2"
    for e in range(n_routed):
        yield from _gated(f"{theirs}.experts.{e}", *stacks, inner, step, (e,))
    if step > 1 and stacks_shared(config):
        yield from _gated(f"{theirs}.shared_experts", *stacks, inner, step, (slice(n_routed, n_routed + n_shared),))
    elif n_shared:
        shared = f"{ours}.shared_experts"
        inner *= n_shared
        yield from _gated(f"{theirs}.shared_experts", f"{shared}.w13.weight", f"{shared}.w2.weight", inner, step)


def _gated(
    theirs: str, w13: str, w2: str, inner: int, step: int, expert: tuple[int | slice, ...] = ()
) -> Iterator[Entry]:
    """Gate and up: one matrix here, two in the checkpoint."""
    up = -(-inner // step) * step
    rows, columns = (0, 1) if expert and isinstance(expert[0], slice) else (None, None)
    yield Entry(f"{theirs}.gate_proj.weight", w13, (*expert, slice(0, inner)), quantized=True, across=rows)
    yield Entry(f"{theirs}.up_proj.weight", w13, (*expert, slice(up, up + inner)), quantized=True, across=rows)
    down = (*expert, slice(None), slice(0, inner))
    yield Entry(f"{theirs}.down_proj.weight", w2, down, quantized=True, across=columns)
