"""The speed table in README: some operations at common sizes, on the GPU that was measured last."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks import charts, saved
from benchmarks.saved import Saved, SavedRow

HEADS = ("operation", "size", "here", "% of roof", "fastest peer", "× as fast")


@dataclass(frozen=True)
class Headline:
    """A line of the table.

    Attributes:
        name: what it is in few words, for a picture.
        op: the operation.
        size: the sizes in words.
        workloads: a pattern of the workloads that it is about.
        value: what is said of each.
        rivals: whether only workloads count that a tuned peer does too.
    """

    name: str
    op: str
    size: str
    workloads: str
    value: Callable[[SavedRow], tuple[float, str]]
    rivals: bool = True

    def of(self, rows: Sequence[SavedRow]) -> list[SavedRow]:
        """Those of `rows` that it is about."""
        found = [row for row in rows if row.op == self.op and re.fullmatch(self.workloads, row.workload)]
        return [row for row in found if row.rival or not self.rivals]


def tflops(row: SavedRow) -> tuple[float, str]:
    """A rate of products."""
    return row.tflops or 0.0, "TFLOP/s"


def terabytes(row: SavedRow) -> tuple[float, str]:
    """A rate of bytes."""
    return row.gbs / 1e3, "TB/s"


def microseconds(row: SavedRow) -> tuple[float, str]:
    """A time."""
    return row.us, "µs"


def milliseconds(row: SavedRow) -> tuple[float, str]:
    """A longer time."""
    return row.us / 1e3, "ms"


FIVE = r"_n(4096_k7168|7168_k2048|24576_k1536|32768_k512|7168_k16384)"
HEADLINES = (
    Headline("FP8 GEMM, 4,096 rows", "fp8_gemm", "M 4,096, five linears of DeepSeek-V3", "m4096" + FIVE, tflops),
    Headline("FP8 GEMM, 128 rows", "fp8_gemm", "M 128, the same five", "m128" + FIVE, microseconds),
    Headline("FP8 GEMM, 64 rows", "fp8_gemm", "M 64, the same five", "m64" + FIVE, microseconds),
    Headline("FP8 GEMM, one row", "fp8_gemm", "M 1, the same five", "m1" + FIVE, microseconds),
    Headline(
        "FP8 linear layer, training",
        "fp8_linear_training",
        "M 4,096, two linears, forward and backward",
        "m4096_.*",
        microseconds,
    ),
    Headline("quantising to FP8", "quantize", "7,168 x 16,384", "m7168_n16384", terabytes),
    Headline(
        "products of experts, 4,096 rows each",
        "grouped_gemm",
        "8 experts of about 4,096 rows, e4m3",
        "g8_m4096_.*",
        tflops,
    ),
    Headline(
        "products of experts, 64 rows each",
        "grouped_gemm_masked",
        "32 experts of about 64 rows, e4m3",
        "g32_m64_.*",
        microseconds,
    ),
    Headline(
        "weight gradients of experts", "grouped_wgrad", "8 experts of about 4,096 tokens, e4m3", "g8_m4096_.*", tflops
    ),
    Headline(
        "expert block, 128 tokens", "fused_experts", "256 experts, e4m3, 128 tokens", "t128_e256_.*", milliseconds
    ),
    Headline(
        "expert block, 8,192 tokens", "fused_experts", "256 experts, e4m3, 8,192 tokens", "t8192_e256_.*", milliseconds
    ),
    Headline(
        "expert block, training", "fused_experts_training_fp8", "32 experts, 4,096 tokens", "t4096_e32_.*", milliseconds
    ),
    Headline("routing", "route", "8,192 tokens, 256 experts", "t8192_e256_k8_g8", microseconds, rivals=False),
    Headline("latent attention, a prompt", "mla_prefill", "128 heads, one prompt of 4,096", "b1_s4096_h128", tflops),
    Headline(
        "latent attention, its gradient",
        "mla_prefill_backward",
        "128 heads, one prompt of 4,096",
        "b1_s4096_h128",
        tflops,
    ),
    Headline(
        "latent attention, decode",
        "mla_decode",
        "128 requests of 4,096, 128 heads",
        "b128_s4096_q1_h128",
        microseconds,
        rivals=False,
    ),
    Headline(
        "training step, four layers",
        "training_step_fp8",
        "four layers of Moonlight's, 16,384 tokens",
        ".*",
        milliseconds,
    ),
    Headline(
        "decode step, layers of DeepSeek-V3",
        "decode_step",
        "three layers of DeepSeek-V3's, e4m3, 32 sequences of 2,048",
        "v3-slice_b32_s2048",
        milliseconds,
    ),
    Headline(
        "patched transformers model, a prompt",
        "transformers_prefill_fp8",
        "four layers, half of DeepSeek-V3's sizes, a prompt of 4,096",
        ".*_s4096",
        milliseconds,
    ),
    Headline(
        "patched transformers model, decode",
        "transformers_decode_fp8",
        "the same, a step of 32 sequences of 2,048",
        ".*_b32_s2048",
        milliseconds,
    ),
)


def table(gpus: Mapping[str, Mapping[str, Saved]]) -> tuple[Sequence[str], list[list[str]]]:
    """Headings and lines: of the first GPU alone; a line of which nothing was measured is left out."""
    families = next(iter(gpus.values()), {})
    rows = saved.jobs(families)
    lines = []
    for headline in HEADLINES:
        if found := headline.of(rows):
            lines.append([f"`{headline.op}`", headline.size, *_cells(found, headline.value)])
    return HEADS, lines


def _cells(rows: Sequence[SavedRow], value: Callable[[SavedRow], tuple[float, str]]) -> list[str]:
    unit = value(rows[0])[1]
    peers = [(row, row.rival or row.best_peer) for row in rows]
    names = dict.fromkeys(row.label(peer) for row, peer in peers if peer)
    ratios = [row.times_as_fast(peer) for row, peer in peers if peer]
    return [
        f"{_range([value(row)[0] for row in rows], charts.number)} {unit}".replace(" ", "\u00a0"),
        _range([row.roof_pct for row in rows], "{:.0f}".format),
        ", ".join(names) or "–",
        _range(ratios, "{:.2f}".format) if ratios else "–",
    ]


def _range(values: Sequence[float], text: Callable[[float], str]) -> str:
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"
