"""The kernels of the expert block compile for every GPU of today without spills."""

import itertools

from compiling import Compile, assert_clean, compile_all
from dskernels.moe.config import SCAN_BLOCKS, SCAN_EXPERTS, SORT_BLOCK, choose_width

ROWS, EXPERTS = "dskernels.moe.triton", "dskernels.moe.triton_experts"


def integers(*names):
    return dict.fromkeys(names, "i32")


def test_choose_width():
    assert [choose_width(columns) for columns in (1, 128, 129, 600, 7168)] == [128, 128, 256, 1024, 1024]


def test_sort_compiles_without_spills():
    kernels = []
    for bins in (16, 512, 2048):  # as for 8, 256 and 1024 experts
        counts = {"BLOCK": SORT_BLOCK, "BINS": bins}
        scan = {"BINS": bins, "BLOCKS": SCAN_BLOCKS, "EXPERTS": SCAN_EXPERTS}
        ids = {"p_experts": "*i64", **integers("size", "E")}
        places = dict.fromkeys(("p_offsets", "p_before", "p_index", "p_source"), "*i32")
        kernels += [
            Compile(f"{ROWS}:count_kernel", {**ids, "p_counts": "*i32"}, counts),
            Compile(f"{ROWS}:scan_kernel", {"p_counts": "*i32", "p_totals": "*i32", "blocks": "i32"}, scan),
            Compile(f"{ROWS}:offsets_kernel", {"p_totals": "*i32", "p_offsets": "*i32", "E": "i32"}, {"BINS": bins}),
            Compile(f"{ROWS}:place_kernel", {**ids, **places}, counts),
        ]
    assert_clean(compile_all(kernels))


def test_row_kernels_compile_without_spills():
    kernels = []
    for dtype, width in itertools.product(("*bf16", "*fp32"), (128, 1024)):
        permute = {"p_x": dtype, "p_offsets": "*i32", "p_index": "*i32", "p_out": dtype}
        combine = {"p_y": dtype, "p_index": "*i32", "p_weights": "*fp32", "p_residual": dtype, "p_out": dtype}
        combine_backward = {"p_dout": dtype, "p_y": dtype, "p_offsets": "*i32", "p_index": "*i32"}
        combine_backward |= {"p_weights": "*fp32", "p_dy": dtype, "p_dweights": "*fp32"}
        swiglu_backward = {"p_x": dtype, "p_dhidden": dtype, "p_source": "*i32", "p_weights": "*fp32"}
        swiglu_backward |= {"p_dx": dtype, "p_hidden": dtype, "p_dweights": "*fp32"}
        for name, pointers, sizes, strides, constants in (
            (f"{ROWS}:permute_kernel", permute, ("E", "H", "top_k"), ("x", "out"), {}),
            (
                f"{ROWS}:combine_kernel",
                combine,
                ("size", "H", "top_k", "stride_w"),
                ("y", "residual", "out"),
                {"HAS_WEIGHTS": True, "HAS_RESIDUAL": True},
            ),
            (
                f"{ROWS}:combine_backward_kernel",
                combine_backward,
                ("size", "E", "H", "top_k", "stride_w"),
                ("dout", "y", "dy"),
                {},
            ),
            (f"{EXPERTS}:swiglu_kernel", {"p_x": dtype, "p_out": dtype}, ("width",), ("x", "out"), {}),
            (
                f"{EXPERTS}:swiglu_backward_kernel",
                swiglu_backward,
                ("width",),
                ("x", "dhidden", "dx", "hidden"),
                {"HAS_WEIGHTS": True},
            ),
        ):
            aligned = [f"stride_{name}" for name in strides] + [s for s in sizes if s in ("H", "width")]
            signature = {**pointers, **integers(*sizes, *(f"stride_{name}" for name in strides))}
            kernels.append(Compile(name, signature, {**constants, "WIDTH": width}, divisible=aligned))
    reports = compile_all(kernels)
    assert_clean(reports)
    # Memory-bound kernels must move 16 bytes at a time where a row is wide enough for it.
    for report in reports:
        if report.source.constants["WIDTH"] == 1024:
            assert report.count("LDG.E.128"), report
