"""The least that a job has to do, and the most that this machine can do.

`Work` counts floating-point operations (a multiply-add is two; only those of matrix products, None if there are none)
and the fewest bytes: each input is read once, each output written once. The roofs are measured here, not taken from a
datasheet. The percentage of the roof is the time that the slower of the two would take, divided by the measured time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from benchmarks import workloads as w
from benchmarks.timing import Call, Times
from benchmarks.workloads import LATENT_DIM, NOPE_DIM, QK_DIM, ROPE_DIM, ROW_DIM, VALUE_DIM

BF16, FP32, FP8, INT = 2, 4, 1, 4
PRODUCT = 8192  # rows and columns of the matrix product that is a roof


@dataclass(frozen=True)
class Work:
    """Operations and bytes of a job, and the unit ("fp8" or "bf16") that does its matrix products."""

    flops: int | None
    bytes: int
    unit: str | None = None

    def tflops(self, us: float) -> float | None:
        """Rate in TFLOP/s at `us` microseconds, None for a job without matrix products."""
        return None if self.flops is None else self.flops / us / 1e6

    def gbs(self, us: float) -> float:
        """Rate in GB/s at `us` microseconds."""
        return self.bytes / us / 1e3


@dataclass(frozen=True)
class Chain:
    """Jobs one after the other, each with a roof of its own: what binds one does not wait for what binds another."""

    parts: tuple[Work, ...]

    @property
    def flops(self) -> int:
        """Of all of them."""
        return sum(part.flops or 0 for part in self.parts)

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(part.bytes for part in self.parts)

    def tflops(self, us: float) -> float:
        """Rate in TFLOP/s at `us` microseconds."""
        return self.flops / us / 1e6

    def gbs(self, us: float) -> float:
        """Rate in GB/s at `us` microseconds."""
        return self.bytes / us / 1e3


@dataclass(frozen=True)
class Roofs:
    """The measured ceilings of a machine."""

    copy_gbs: float
    bf16_tflops: float
    fp8_tflops: float | None

    def floor_us(self, work: Work | Chain) -> float:
        """The time that no implementation stays below: of moving the bytes, or of the matrix products."""
        if isinstance(work, Chain):
            return sum(self.floor_us(part) for part in work.parts)
        floor = work.bytes / self.copy_gbs / 1e3
        if work.flops is not None:
            rate = self.fp8_tflops if work.unit == "fp8" and self.fp8_tflops else self.bf16_tflops
            floor = max(floor, work.flops / rate / 1e6)
        return floor


def fp8_bytes(rows: int, cols: int, block: tuple[int, int]) -> int:
    """Bytes of an fp8 matrix and its scales."""
    return rows * cols * FP8 + FP32 * ceil(rows / block[0]) * ceil(cols / block[1])


def quantize(x: w.Rows, block: tuple[int, int]) -> Work:
    """bf16 in, fp8 and scales out."""
    return Work(None, x.m * x.n * BF16 + fp8_bytes(x.m, x.n, block))


def quantize_both(x: w.Rows) -> Work:
    """bf16 in once, the row-wise and the transposed fp8 out."""
    return Work(None, x.m * x.n * BF16 + fp8_bytes(x.m, x.n, (1, 128)) + fp8_bytes(x.n, x.m, (1, 128)))


def swiglu_quantize(x: w.Rows, *, transpose: bool = False) -> Work:
    """Gate and up in bf16 in, fp8 out."""
    out = fp8_bytes(x.n, x.m, (1, 128)) if transpose else fp8_bytes(x.m, x.n, (1, 128))
    return Work(None, 2 * x.m * x.n * BF16 + out)


def swiglu_quantize_backward(x: w.Rows) -> Work:
    """The product's gradient, gate and up in bf16 in once; their gradient in fp8 out, row-wise and transposed."""
    out = fp8_bytes(x.m, 2 * x.n, (1, 128)) + fp8_bytes(2 * x.n, x.m, (1, 128))
    return Work(None, 3 * x.m * x.n * BF16 + out)


def rmsnorm_quantize(x: w.Rows, *, residual: bool) -> Work:
    """bf16 in, fp8 out; with a residual that is read too, and the sum written."""
    return Work(None, (3 if residual else 1) * x.m * x.n * BF16 + x.n * BF16 + fp8_bytes(x.m, x.n, (1, 128)))


def rmsnorm_backward(x: w.Rows, *, residual: bool) -> Work:
    """dy and x in bf16 in, dx out; with a residual its gradient in too; the weight in, its gradient out."""
    return Work(None, (4 if residual else 3) * x.m * x.n * BF16 + 2 * x.n * BF16)


def gemm(x: w.Gemm) -> Work:
    """fp8 operands, bf16 out."""
    operands = fp8_bytes(x.m, x.k, (1, 128)) + fp8_bytes(x.n, x.k, (128, 128))
    return Work(2 * x.m * x.n * x.k, operands + x.m * x.n * BF16, "fp8")


def gemm_wgrad(x: w.Gemm) -> Work:
    """fp8 operands along the tokens, fp32 out."""
    operands = fp8_bytes(x.n, x.m, (1, 128)) + fp8_bytes(x.k, x.m, (1, 128))
    return Work(2 * x.m * x.n * x.k, operands + x.n * x.k * FP32, "fp8")


def linear_training(x: w.Gemm) -> Work:
    """y, dx and dw of a bf16 layer: three products; x, w and dy in once, y, dx and dw out."""
    tensors = 2 * x.m * x.k + 2 * x.n * x.k + 2 * x.m * x.n
    return Work(3 * 2 * x.m * x.n * x.k, tensors * BF16, "fp8")


def grouped_gemm(x: w.GroupedGemm, *, fp8: bool = True) -> Work:
    """Every group's weight is read once, however few its rows."""
    rows = sum(x.rows)
    if fp8:
        operands = fp8_bytes(rows, x.k, (1, 128)) + x.g * fp8_bytes(x.n, x.k, (128, 128))
    else:
        operands = (rows * x.k + x.g * x.n * x.k) * BF16
    return Work(2 * rows * x.n * x.k, operands + rows * x.n * BF16, "fp8" if fp8 else "bf16")


def grouped_wgrad(x: w.GroupedGemm) -> Work:
    """dy and x in fp8 with scales along tokens, an fp32 gradient for each group out."""
    rows = sum(x.rows)
    operands = fp8_bytes(x.n, rows, (1, 128)) + fp8_bytes(x.k, rows, (1, 128))
    return Work(2 * rows * x.n * x.k, operands + x.g * x.n * x.k * FP32, "fp8")


def quantize_grouped(x: w.GroupedRows) -> Work:
    """bf16 tokens in; fp8 along each group's tokens out, a group in whole tiles of 128."""
    padded = sum(128 * ceil(rows / 128) for rows in x.rows)
    return Work(None, sum(x.rows) * x.n * BF16 + fp8_bytes(x.n, padded, (1, 128)))


def route(x: w.Route) -> Work:
    """fp32 logits and bias in; weights, ids, loads out."""
    return Work(None, x.t * x.e * FP32 + x.e * FP32 + x.t * x.k * (FP32 + INT) + x.e * INT)


def route_backward(x: w.Route) -> Work:
    """Logits, ids and the weights' gradient in, the logits' gradient out."""
    return Work(None, 2 * x.t * x.e * FP32 + x.t * x.k * (FP32 + INT))


def route_hidden(x: w.RouteHidden) -> Work:
    """bf16 tokens and vectors and a bias in; fp32 logits, weights, ids, loads out."""
    operands = (x.t + x.e) * x.h * BF16 + x.e * FP32
    return Work(2 * x.t * x.e * x.h, operands + x.t * x.e * FP32 + x.t * x.k * (FP32 + INT) + x.e * INT, "bf16")


def balance_loss(x: w.Route) -> Work:
    """Logits in; a scalar out."""
    return Work(None, x.t * x.e * FP32)


def update_bias(x: w.Route) -> Work:
    """Bias and load in, bias out."""
    return Work(None, x.e * (2 * FP32 + INT))


def permute(x: w.Moe) -> Work:
    """bf16 rows in once, out k times; ids in, offsets and index out."""
    return Work(None, (1 + x.k) * x.t * x.h * BF16 + 2 * x.t * x.k * INT + (x.e + 1) * INT)


def combine(x: w.Moe) -> Work:
    """k bf16 rows of each token in, their weighted sum out."""
    return Work(None, (x.k + 1) * x.t * x.h * BF16 + x.t * x.k * (FP32 + INT))


def expected_experts(x: w.Moe) -> float:
    """How many experts at least one of `t` tokens chose, if all are equally liked."""
    return x.e * (1 - (1 - x.k / x.e) ** x.t)


def fused_experts(x: w.Moe, *, shared: int = 0) -> Work:
    """fp8 weights of the chosen experts, and of so many shared ones of their width; bf16 tokens in and out."""
    tokens = 2 * x.t * x.h * BF16 + x.t * x.k * (FP32 + INT)
    weights = _chosen_weights(x) + shared * _expert_bytes(x)
    return Work(6 * x.t * (x.k + shared) * x.h * x.i, weights + tokens, "fp8")


def expert_products(x: w.Moe) -> Work:
    """The two products of the block alone: the same weights, each choice's rows in fp8 in, in bf16 out."""
    rows = x.t * x.k
    moved = sum(fp8_bytes(rows, n, (1, 128)) for n in (x.h, x.i)) + rows * (2 * x.i + x.h) * BF16
    return Work(6 * rows * x.h * x.i, _chosen_weights(x) + moved, "fp8")


def _chosen_weights(x: w.Moe) -> int:
    """Bytes of the fp8 weights of the chosen experts."""
    return round(expected_experts(x) * _expert_bytes(x))


def _expert_bytes(x: w.Moe) -> int:
    return fp8_bytes(2 * x.i, x.h, (128, 128)) + fp8_bytes(x.h, x.i, (128, 128))


def fused_experts_training(x: w.Moe, *, fp8: bool) -> Work:
    """Forward and both gradients of bf16 experts: weights in twice, their gradients out; x and dy in, y and dx out."""
    weights = x.e * 3 * x.h * x.i * BF16
    return Work(3 * 6 * x.t * x.k * x.h * x.i, 3 * weights + 4 * x.t * x.h * BF16, "fp8" if fp8 else "bf16")


def decode(x: w.Decode, *, row_bytes: int = ROW_DIM * BF16) -> Work:
    """q.k over 576 and p.v over 512 for each head and visible position; each request's cached rows in once."""
    pairs = sum(length - (x.q - 1 - j) for length in x.lengths for j in range(x.q))
    queries = x.b * x.q * x.h
    moved = sum(x.lengths) * row_bytes + queries * (ROW_DIM + LATENT_DIM) * BF16 + queries * FP32
    return Work(2 * x.h * (ROW_DIM + LATENT_DIM) * pairs, moved, "bf16")


def decode_with_prefix(x: w.SharedPrefix) -> Work:
    """As `decode`, but the rows of the prefix in once."""
    moved = (x.prefix + x.b * x.own) * ROW_DIM * BF16 + x.b * x.h * ((ROW_DIM + LATENT_DIM) * BF16 + FP32)
    return Work(2 * x.h * (ROW_DIM + LATENT_DIM) * x.b * (x.prefix + x.own), moved, "bf16")


def decode_with_written_prefix(x: w.SharedPrefix) -> Work:
    """The prefix's keys and values, the rows of each request's own and W^UV in; values out."""
    kept = x.prefix * (x.h * (NOPE_DIM + VALUE_DIM) + ROPE_DIM) + x.h * VALUE_DIM * LATENT_DIM
    queries = x.b * x.h * ((QK_DIM + ROW_DIM + VALUE_DIM) * BF16 + FP32)
    of_prefix, of_own = (QK_DIM + VALUE_DIM) * x.prefix, (ROW_DIM + LATENT_DIM) * x.own + LATENT_DIM * VALUE_DIM
    return Work(2 * x.h * x.b * (of_prefix + of_own), (kept + x.b * x.own * ROW_DIM) * BF16 + queries, "bf16")


def decode_queries(x: w.Tokens) -> Work:
    """Queries, W^UK, fp32 cos and sin in; absorbed queries out."""
    weights = x.h * NOPE_DIM * LATENT_DIM * BF16
    return Work(None, weights + x.t * (x.h * (QK_DIM + ROW_DIM) * BF16 + ROPE_DIM * FP32))


def _causal_pairs(lengths: Sequence[int]) -> int:
    return sum(n * (n + 1) // 2 for n in lengths)


def prefill(x: w.Prefill | w.PackedPrefill) -> Work:
    """q.k over 192 and p.v over 128 for each head and causal pair."""
    lengths = x.lengths if isinstance(x, w.PackedPrefill) else (x.s,) * x.b
    tokens = sum(lengths) * x.h
    flops = 2 * x.h * (QK_DIM + VALUE_DIM) * _causal_pairs(lengths)
    return Work(flops, tokens * ((2 * QK_DIM + 2 * VALUE_DIM) * BF16 + FP32), "bf16")


def prefill_backward(x: w.Prefill) -> Work:
    """Five products: q.k again, dq and dk over 192; dp and dv over 128. q, k, v, out, dout, lse in; dq, dk, dv out."""
    tokens = x.b * x.s * x.h
    flops = 2 * x.h * (3 * QK_DIM + 2 * VALUE_DIM) * _causal_pairs([x.s] * x.b)
    return Work(flops, tokens * ((4 * QK_DIM + 4 * VALUE_DIM) * BF16 + FP32), "bf16")


def prefill_cached(x: w.ChunkedPrefill) -> Work:
    """The up-projection of every cached token, then attention of the new ones; or, where that is less, of the new ones
    alone, whose attention is to the latents. The cache and kv_b in once."""
    pairs = x.b * sum(x.s - (x.q - 1 - j) for j in range(x.q))
    written = x.s * LATENT_DIM * x.b * (NOPE_DIM + VALUE_DIM) + (QK_DIM + VALUE_DIM) * pairs
    absorbed = x.q * LATENT_DIM * x.b * (NOPE_DIM + VALUE_DIM) + (ROW_DIM + LATENT_DIM) * pairs
    cached = x.b * x.s * ROW_DIM * BF16 + x.h * (NOPE_DIM + VALUE_DIM) * LATENT_DIM * BF16
    queries = x.b * x.q * x.h * ((QK_DIM + VALUE_DIM) * BF16 + FP32)
    return Work(2 * x.h * min(written, absorbed), cached + queries, "bf16")


def write_cache(x: w.Tokens, *, row_bytes: int = ROW_DIM * BF16) -> Work:
    """bf16 latent and rope part, fp32 cos and sin, int64 slot in; a cache row out."""
    return Work(None, x.t * (ROW_DIM * BF16 + ROPE_DIM * FP32 + 8 + row_bytes) + LATENT_DIM * BF16)


def merge_states(x: w.Tokens) -> Work:
    """Two outputs and log-sum-exps in, one out."""
    return Work(None, 3 * x.t * x.h * (VALUE_DIM * BF16 + FP32))


def values_quantize(x: w.Tokens) -> Work:
    """Latents and W^UV in; values in e4m3 and their scales out."""
    weights = x.h * VALUE_DIM * LATENT_DIM * BF16
    return Work(None, weights + x.t * x.h * (LATENT_DIM * BF16 + VALUE_DIM + FP32))


def cross_entropy(x: w.Rows) -> Work:
    """bf16 logits and int64 targets in; nats out."""
    return Work(None, x.m * (x.n * BF16 + 8 + FP32))


def cross_entropy_backward(x: w.Rows) -> Work:
    """Logits, targets, a number a row and the gradient of the nats in; the gradient of the logits out."""
    return Work(None, x.m * (2 * x.n * BF16 + 8 + 2 * FP32))


def measure(time: Callable[[Mapping[str, Call]], dict[str, Times]]) -> Roofs:
    """Measure the roofs of the current CUDA device, with `timing.Stopwatch.time`."""
    import torch

    size = 1 << 30
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy_us = time({"copy": lambda: target.copy_(source)})["copy"].us

    times = time(products())
    tflops = {name: 2 * PRODUCT**3 / t.us / 1e6 for name, t in times.items()}
    return Roofs(2 * size / copy_us / 1e3, tflops["bf16"], tflops.get("fp8"))


def products() -> dict[str, Call]:
    """The matrix products that are the roofs of products."""
    import torch

    a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    calls: dict[str, Call] = {"bf16": lambda: a @ b.t()}
    if torch.cuda.get_device_capability() >= (8, 9):
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device="cuda")
        calls["fp8"] = lambda: torch._scaled_mm(
            a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return calls
