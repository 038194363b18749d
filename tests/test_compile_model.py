"""Kernels of the model's steps and of small things beside them compile, without spills."""

import pytest

from compiling import Compile, assert_clean, compile_all
from dskernels.model.triton_adamw import BLOCK
from dskernels.moe.config import APPEND_TOKENS

FEW, EMBED = "dskernels.model.triton_few", "dskernels.model.triton_few_embed"


def typed(**types):
    """A signature: names by the type of each."""
    return {name: kind for kind, names in types.items() for name in names.split()}


def of_tokens(dtype, more="", integers=""):
    """Kernels that embed tokens."""
    floats = {**dict.fromkeys(f"p_embedding p_hidden p_enorm p_hnorm p_out {more}".split(), dtype)}
    numbers = f"vocabulary width pairs stride_embedding stride_hidden {integers}"
    return {**floats, **dict.fromkeys(("p_frequencies", "p_cos", "p_sin"), "*fp32"), "scale": "fp32", "eps": "fp32",
            **dict.fromkeys(numbers.split(), "i32")}  # fmt: skip


def kernels(dtype):
    row = {"WIDTH": 2048, "PROGRAMMATIC": False}
    pointers = dict.fromkeys(("p_x", "p_update", "p_norm", "p_stream", "p_normed"), dtype)
    yield Compile(f"{FEW}:add_norm_kernel", {**pointers, **typed(i32="width stride_x stride_update", fp32="eps")}, row)
    longs = dict.fromkeys(("p_tokens", "p_positions"), "*i64")
    given = {**of_tokens(dtype), **longs}
    yield Compile(f"{EMBED}:embed_kernel", given, {**row, "BESIDE": True, "PAIRS": 32})
    integers = dict.fromkeys(["p_lengths", "p_active", "p_block_table", "p_seen", "p_cu_seqlens"], "*i32")
    longs |= dict.fromkeys(("p_drafts", "p_slots"), "*i64")
    given = {**of_tokens(dtype, "p_logits", "j drafts pages page_size stride_logits"), **longs, **integers}
    yield Compile(f"{EMBED}:look_ahead_kernel", given, {**row, "BLOCK": 4096, "PAIRS": 32})
    moments = dict.fromkeys(("p_first", "p_second"), dtype)
    singles = dict.fromkeys(["p_master", "p_gradient", "p_steps", "p_rate", "p_scale", "p_skip"], "*fp32")
    numbers = typed(i32="n", fp32="beta1 beta2 weight_decay eps")
    yield Compile(
        "dskernels.model.triton_adamw:adamw_kernel", {**singles, **moments, **numbers}, {"BLOCK": BLOCK},
        divisible=("n",),
    )  # fmt: skip
    gradient = {"p_total": "*fp32", "p_gradient": dtype, "n": "i32"}
    constants = {"FIRST": False, "BLOCK": 2048}
    yield Compile("dskernels.model.triton_adamw:add_gradient_kernel", gradient, constants, divisible=("n",))


@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
def test_kernels_of_steps_compile_without_spills(dtype):
    """But for what slow paths keep: the sine's of angles beyond 2^17, the square root's of subnormals on sm_100."""
    reports = compile_all(kernels(dtype))
    slow = [report for report in reports if report.source.kernel.startswith(FEW)]
    assert_clean(report for report in reports if report not in slow)
    for report in slow:
        assert report.stack <= (40 if EMBED in report.source.kernel else 8), report
        assert report.registers < 128, report


def test_kernels_of_integers_compile_without_spills():
    groups = dict.fromkeys(["p_table", "p_lengths", "p_cu", "p_place", "p_rows", "p_seen", "p_count"], "*i32")
    groups |= typed(i32="stride_qt stride_qh stride_table tokens heads requests columns capacity")
    groups |= dict.fromkeys(("p_q", "p_grouped", "p_queries"), "*bf16")
    of_groups = {"WIDTH": 192, "LATENT": 512, "ROPE": 64, "BLOCK_R": 16, "BLOCK_D": 256}
    choices = {"p_experts": "*i32", "p_weights": "*fp32", "p_all": "*i32", "p_all_weights": "*fp32",
               **typed(i32="tokens top_k more E stride_w")}  # fmt: skip
    assert_clean(
        compile_all(
            [
                Compile(
                    "dskernels.mla.prefill.triton_groups:group_kernel",
                    groups,
                    {"GROUP": 4, "BLOCK_G": 4, "BLOCK_C": 512, **of_groups},
                ),
                Compile(
                    "dskernels.moe.triton_sort:append_choices_kernel",
                    choices,
                    {"TOKENS": APPEND_TOKENS, "CHOICES": 16},
                ),
            ]
        )
    )
