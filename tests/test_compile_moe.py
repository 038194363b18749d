"""The kernels of the expert block compile for every GPU of today without spills."""

import itertools

from compiling import Compile, assert_clean, compile_all
from dskernels.moe.config import (
    COMPARE_BLOCK,
    COMPARE_CHUNK,
    COMPARE_COUNTED,
    SCALE_ROWS,
    SCALE_TILES,
    SCAN_BLOCKS,
    SCAN_EXPERTS,
    SORT_BLOCK,
    SWIGLU_ROWS,
    choose_copy,
    choose_row,
    choose_scan,
    choose_sums,
)

ROWS, SORT, SWIGLU = (f"dskernels.moe.triton{part}" for part in ("", "_sort", "_swiglu"))


def integers(*names):
    return dict.fromkeys(names, "i32")


def test_choose_row():
    assert [choose_row(columns).width for columns in (1, 128, 129, 600, 7168)] == [128, 128, 256, 1024, 1024]
    configs = [choose_copy(7168, itemsize) for itemsize in (1, 2, 4)]
    assert [(c.width, c.num_warps) for c in configs] == [(1024, 2), (1024, 4), (1024, 4)]
    assert choose_copy(8, 1).num_warps == 1
    assert [choose_sums(7168, partial).num_warps for partial in (False, True)] == [4, 2]


def test_sort_compiles_without_spills():
    kernels = []
    for bins in (512, 2048):  # as for 256 and 1024 experts
        counts = {"BLOCK": SORT_BLOCK, "BINS": bins}
        compare = {"BLOCK": COMPARE_BLOCK, "CHUNK": COMPARE_CHUNK, "BINS": bins, "COUNTED": COMPARE_COUNTED}
        scan = {"BINS": bins, "EXPERTS": SCAN_EXPERTS}
        of_scan = {"p_counts": "*i32", "p_totals": "*i32", "blocks": "i32"}
        ids = {"p_experts": "*i64", **integers("size", "first", "E")}
        results = dict.fromkeys(("p_offsets", "p_index", "p_source"), "*i32")
        sums = dict.fromkeys(("p_totals", "p_before"), "*i32")
        kernels += [
            Compile(f"{SORT}:compare_kernel", {**ids, **results}, compare),
            Compile(f"{SORT}:count_kernel", {**ids, "p_counts": "*i32"}, counts),
            *(
                Compile(f"{SORT}:scan_kernel", of_scan, scan | {"BLOCKS": at_a_time}, num_warps=warps)
                for at_a_time, warps in (choose_scan(blocks) for blocks in SCAN_BLOCKS)
            ),
            Compile(f"{SORT}:place_kernel", {**ids, **sums, **results}, counts, num_warps=8),
        ]
    assert_clean(compile_all(kernels))


def test_copies_compile_without_spills():
    """Of rows in bf16 and fp32, with a tail of zeros, and of quantised ones, with scales."""
    kernels = []
    sizes = ("rows", "scales", "E", "H", "tiles", "top_k", "stride_x")
    sizes += ("stride_s_token", "stride_s", "stride_out", "stride_os")
    for dtype, itemsize in (("*u8", 1), ("*bf16", 2), ("*fp32", 4)):
        config = choose_copy(7168, itemsize)
        tensors = {"p_x": dtype, "p_index": "*i32", "p_source": "*i32", "p_out": dtype}
        constants = {
            "WIDTH": config.width,
            "ROWS": SCALE_ROWS,
            "TILES": SCALE_TILES,
            "ZERO_TAIL": itemsize > 1,
            "HAS_SCALE": itemsize == 1,
        }
        if itemsize == 1:
            tensors |= {"p_s": "*fp32", "p_os": "*fp32"}
            constants |= {"p_offsets": None}
        else:
            tensors |= {"p_offsets": "*i32"}
            constants |= {"p_s": None, "p_os": None}
        aligned = ("H", "stride_x", "stride_out")
        signature = {**tensors, **integers(*sizes)}
        kernels.append(
            Compile(f"{ROWS}:permute_kernel", signature, constants, divisible=aligned, num_warps=config.num_warps)
        )
    reports = compile_all(kernels)
    assert_clean(reports)
    for report in reports:
        assert report.count("LDG.E.128"), report
        assert report.count("STG.E.128"), report


def test_row_kernels_compile_without_spills():
    kernels = []
    for dtype, width in itertools.product(("*bf16", "*fp32"), (128, 1024)):
        combine = {"p_y": dtype, "p_index": "*i32", "p_weights": "*fp32", "p_residual": dtype, "p_out": dtype}
        combine |= {"p_came": dtype, "p_places": "*i32"}
        combine_backward = {"p_dout": dtype, "p_y": dtype, "p_offsets": "*i32", "p_index": "*i32"}
        combine_backward |= {"p_weights": "*fp32", "p_dy": dtype, "p_dweights": "*fp32"}
        swiglu_backward = {"p_x": dtype, "p_dhidden": dtype, "p_source": "*i32", "p_index": "*i32"}
        swiglu_backward |= {"p_weights": "*fp32", "p_dx": dtype, "p_hidden": dtype, "p_dweights": "*fp32"}
        for name, pointers, sizes, strides, constants in (
            (
                f"{ROWS}:combine_kernel",
                combine,
                ("size", "came", "H", "top_k", "places", "stride_w"),
                ("y", "came", "residual", "out"),
                {"HAS_WEIGHTS": True, "HAS_CAME": True, "HAS_RESIDUAL": True},
            ),
            (
                f"{ROWS}:combine_backward_kernel",
                combine_backward,
                ("size", "E", "H", "top_k", "stride_w"),
                ("dout", "y", "dy"),
                {},
            ),
            (
                f"{SWIGLU}:swiglu_kernel",
                {"p_x": dtype, "p_offsets": "*i32", "p_out": dtype},
                ("rows", "groups", "width"),
                ("x", "out"),
                {"ROWS": SWIGLU_ROWS},
            ),
            (
                f"{SWIGLU}:swiglu_backward_kernel",
                swiglu_backward,
                ("width", "first_scale"),
                ("x", "scales", "dhidden", "dx", "hidden"),
                {"HAS_WEIGHTS": True, "HAS_SCALES": False, "p_scales": None},
            ),
        ):
            aligned = [f"stride_{name}" for name in strides] + [s for s in sizes if s in ("H", "width")]
            signature = {**pointers, **integers(*sizes, *(f"stride_{name}" for name in strides))}
            for warps in (4, 2) if name.endswith(":combine_kernel") else (4,):
                constants["WIDTH"] = width
                kernels.append(Compile(name, signature, constants, divisible=aligned, num_warps=warps))
    reports = compile_all(kernels)
    assert_clean(reports)
    # Memory-bound kernels must move 16 bytes at a time where a row is wide enough for it.
    for report in reports:
        if report.source.constants["WIDTH"] == 1024:
            assert report.count("LDG.E.128"), report


def test_kernels_of_what_is_packed_compile_without_spills():
    """Of e4m3 and fp32 in one row, which begins at a multiple of 16 bytes."""
    bf16 = dict.fromkeys(("p_dhidden", "p_dx", "p_hidden"), "*bf16")
    parts = {"p_parts": "*fp32", "p_source": "*i32", "p_index": "*i32", "p_out": "*fp32", **integers("rows", "parts")}
    assert_clean(
        compile_all(
            [
                Compile(
                    f"{SWIGLU}:swiglu_backward_kernel",
                    signature={
                        **{"p_x": "*fp8e4nv", "p_scales": "*fp32", "p_source": "*i32", "p_index": "*i32", **bf16},
                        **{"p_weights": "*fp32", "p_dweights": "*fp32", **integers("width", "first_scale")},
                        **integers(*(f"stride_{name}" for name in ("x", "scales", "dhidden", "dx", "hidden"))),
                    },
                    constants={"HAS_WEIGHTS": True, "HAS_SCALES": True, "WIDTH": 1024},
                    divisible=("width", "stride_x", "stride_dhidden", "stride_dx", "stride_hidden"),
                ),
                Compile(
                    "dskernels.moe.triton_packed:pack_kernel",
                    signature={
                        **{"p_x": "*bf16", "p_q": "*fp8e4nv", "p_s": "*fp32", **integers("rows", "cols")},
                        **integers("stride_x", "stride_q", "stride_s", "first_scale"),
                    },
                    constants={},
                    divisible=("cols", "stride_x", "stride_q"),
                ),
                Compile(f"{SWIGLU}:sum_of_choices_kernel", signature=parts, constants={"BLOCK": 256}),
            ]
        )
    )
