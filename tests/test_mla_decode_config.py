"""Configs of the decode kernels: which is chosen, and that each compiles without spills wherever it is."""

from hypothesis import example, given
from hypothesis import strategies as st

from compiling import Compile, assert_clean, compile_all
from dskernels.mla.decode.config import (
    LOW_OTHER,
    MAX_SPLITS,
    MEDIUM,
    MEDIUM_FP8,
    NARROW,
    NARROW_FP8,
    SINGLE,
    SMALL,
    WIDE,
    choose_config,
    choose_splits,
)
from in_part import IN_PART


def test_choose_config():
    assert choose_config(16, 512, 2, False, (9, 0)) == NARROW
    assert choose_config(32, 512, 2, False, (9, 0)) == MEDIUM
    assert choose_config(128, 512, 2, False, (9, 0)) == WIDE
    assert choose_config(128, 512, 2, False, (10, 0)) == WIDE
    assert choose_config(128, 512, 2, False, (8, 0)) == MEDIUM
    assert choose_config(128, 512, 2, False, (7, 5)) == NARROW
    assert choose_config(128, 32, 2, False, (9, 0)) == SMALL
    assert choose_config(16, 512, 2, True, (9, 0)) == NARROW_FP8
    assert choose_config(128, 512, 2, True, (9, 0)) == MEDIUM_FP8
    assert choose_config(16, 32, 2, True, (9, 0)) == SMALL
    assert choose_config(128, 512, 4, False, (9, 0)) == SINGLE
    assert choose_config(128, 512, 2, False, (0, 0)) == NARROW
    assert choose_config(128, 32, 2, True, (0, 0)) == NARROW
    assert choose_config(16, 512, 2, True, (0, 0)) == LOW_OTHER
    assert choose_config(16, 32, 4, False, (0, 0)) == LOW_OTHER


@given(st.integers(0, 5000), st.integers(0, 200_000), st.integers(1, 160))
@example(1, 32768, 132)
def test_choose_splits(programs, capacity, multiprocessors):
    splits = choose_splits(programs, capacity, multiprocessors)
    assert 1 <= splits <= MAX_SPLITS
    if programs >= 4 * multiprocessors or capacity <= 128:
        assert splits == 1
    if 0 < programs <= multiprocessors // 4 and capacity >= 8192:
        assert programs * splits > multiprocessors // 4  # a small batch is spread over the chip


INTEGERS = (
    *("stride_qb", "stride_qj", "stride_qh", "stride_page", "stride_token", "stride_table"),
    *("stride_ob", "stride_op", "stride_om", "stride_lb", "stride_lp", "stride_lh", "stride_lj"),
    *("heads", "q_tokens", "pages", "page_size", "capacity"),
)
ALIGNED = [name for name in INTEGERS[:9] if name != "stride_table"]


def compile_decode(config, dtype, targets, *, fp8=False, page=64, dims=(512, 64), padded=False, split=True):
    latent, rope = dims
    cache = ("fp8e4nv", "fp32", "bf16") if fp8 else (dtype, None, dtype)
    pointers = {
        "p_q": dtype,
        **dict(zip(("p_latent", "p_scale", "p_rope"), cache, strict=True)),
        **{"p_table": "i32", "p_lengths": "i32", "p_q_lengths": "i32" if padded else None},
        **{"p_out": "fp32" if split else dtype, "p_lse": "fp32"},
    }
    return Compile(
        "dskernels.mla.decode.triton:decode_kernel",
        signature={
            **{name: f"*{type_}" for name, type_ in pointers.items() if type_},
            **dict.fromkeys(INTEGERS, "i32"),
            "scale_log2": "fp32",
        },
        constants={
            **{name: None for name, type_ in pointers.items() if type_ is None},
            **{"VALUE": latent, "ROPE": rope, "FP8": fp8, "HAS_Q_LENGTHS": padded},
            "ONE_PAGE": page % config.block_n == 0,
            "BLOCK_V": 1 << (latent - 1).bit_length(),
            "BLOCK_R": 1 << (rope - 1).bit_length(),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        },
        divisible=ALIGNED,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        targets=targets,
    )


def compile_combination(value):
    return Compile(
        "dskernels.mla.decode.triton:combine_kernel",
        signature={
            **{"p_part": "*fp32", "p_part_lse": "*fp32", "p_out": "*bf16", "p_lse": "*fp32"},
            **{"parts": "i32", "heads": "i32", "q_tokens": "i32"},
        },
        constants={"VALUE": value, "BLOCK_V": min(value, 128), "BLOCK_P": 16, "MAX_PARTS": MAX_SPLITS},
    )


def test_kernels_compile_without_spills():
    """Every config on every GPU that is given it, with the dimensions of DeepSeek-V3 and of a small model."""
    kernels = {}
    gpus = {"sm_80": (8, 0), "sm_89": (8, 9), "sm_90": (9, 0), "sm_100": (10, 0), "gfx942": (0, 0)}
    for target, arch in gpus.items():
        kinds = (
            (16, "bf16", False, 64, (512, 64)),
            (32, "bf16", False, 64, (512, 64)),
            (128, "bf16", False, 64, (512, 64)),
            (128, "fp16", False, 8, (512, 64)),
            (16, "bf16", True, 64, (512, 64)),
            (128, "fp16", True, 8, (512, 64)),
            (128, "fp32", False, 64, (512, 64)),
            (64, "bf16", False, 64, (32, 16)),
        )
        for i, (rows, dtype, fp8, page, dims) in enumerate(kinds):
            if IN_PART and arch != (9, 0) and i % 2 == (arch == (10, 0)):  # see compile_all
                continue
            # Of sm_80 and sm_89, which are given the same, the one that has e4m3 for it and the other for the rest;
            # what differs in a dtype or a page alone, once.
            if arch == ((8, 0) if fp8 else (8, 9)) or (dtype == "fp16" and not fp8 and arch != (9, 0)):
                continue
            config = choose_config(rows, dims[0], 4 if dtype == "fp32" else 2, fp8, arch)
            # The wide one has no registers to spare: with all that may be asked of it, and with another output.
            for padded, split in ((True, True), (False, False)) if config == WIDE else ((True, False),):
                options = {"fp8": fp8, "page": page, "dims": dims, "padded": padded, "split": split}
                key = (config, target, dtype, *options.values())
                kernels[key] = compile_decode(config, dtype, [target], **options)
    reports = compile_all([*kernels.values(), compile_combination(512), compile_combination(32)])
    assert_clean(reports)
    wide = [r for r in reports if r.target == "sm_90" and r.source.constants.get("BLOCK_M") == 64]
    assert wide
    assert all(r.count("HGMMA") for r in wide)
