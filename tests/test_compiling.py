"""The tool that compiles kernels without a GPU sees what it is there to see: spills, stack, shared memory, errors."""

import dataclasses
import re

import pytest
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import compiling
import compiling_elsewhere
from compiling import SHARED_LIMIT, Compile, CompileError, assert_clean, compile_all


@triton.jit
def scaled(x, factor):
    return x * factor


@triton.jit
def scale_kernel(x, out, factor, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offsets, mask=offsets < size).to(tl.float32)
    tl.store(out + offsets, scaled(value, factor), mask=offsets < size)


@triton.jit
def product_kernel(a, b, out, steps, stride, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tile = rows[:, None] * stride + rows[None, :]
    sum_MN = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(steps):
        sum_MN += tl.dot(tl.load(a + tile + step * BLOCK), tl.load(b + tile + step * BLOCK))
    tl.store(out + tile, sum_MN.to(DTYPE))


@triton.jit
def e4m3_kernel(x, out, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tile = rows[:, None] * BLOCK + rows[None, :]
    value = tl.load(x + tile).to(tl.float32).to(DTYPE)
    tl.store(out + tile, tl.dot(value, value))


@gluon.jit
def gluon_copy_kernel(x, out, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    offsets = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, layout)
    gl.store(out + offsets, gl.load(x + offsets))


def scale(**changes):
    arguments = {
        "signature": {"x": "*bf16", "out": "*fp32", "factor": "fp32", "size": "i32"},
        "constants": {"BLOCK": 1024},
        "divisible": ["size"],
    }
    return Compile("test_compiling:scale_kernel", **{**arguments, **changes})


def product(block, **options):
    return Compile(
        "test_compiling:product_kernel",
        {"a": "*bf16", "b": "*bf16", "out": "*bf16", "steps": "i32", "stride": "i32"},
        {"BLOCK": block, "DTYPE": tl.bfloat16},
        divisible=("stride",),
        **options,
    )


@pytest.fixture(scope="module")
def reports():
    # One child for all: a kernel with a helper, and the same product with registers to spare and with far too few.
    kernels = {
        "scale": scale(),
        "fits": product(64, num_warps=4, num_stages=3),
        "spills": product(128, num_warps=4, num_stages=2, options={"maxnreg": 96}, targets=["sm_80", "sm_90"]),
        "gluon": Compile("test_compiling:gluon_copy_kernel", {"x": "*fp32", "out": "*fp32"}, {"BLOCK": 1024}),
        "large": product(128, num_warps=8, num_stages=4, targets=["sm_89"]),
    }
    answers = iter(compile_all(kernels.values(), every_target=True))
    return {name: {target: next(answers) for target in kernel.targets} for name, kernel in kernels.items()}


def test_every_target_is_compiled_in_order(reports):
    targets = ["sm_80", "sm_90", "sm_100"]
    assert list(reports["scale"]) == [report.target for report in reports["scale"].values()] == targets


def test_a_plain_kernel_is_clean(reports):
    assert_clean([*reports["scale"].values(), *reports["fits"].values()])
    assert all(0 < report.registers < 64 for report in reports["scale"].values())
    two_stages = (
        2 * 2 * 64 * 64 * 2
    )  # of both operands in bf16; Triton keeps two or three of the three in shared memory
    assert all(report.shared >= two_stages for report in reports["fits"].values())


def test_aligned_pointers_give_wide_accesses(reports):
    assert all(report.sass["LDG.E.128"] or report.sass["LDG.E.64"] for report in reports["scale"].values())


def test_gluon_kernels_compile_too(reports):
    assert_clean(reports["gluon"].values())
    assert all(report.sass["LDG.E.128"] == 2 for report in reports["gluon"].values())


def test_opcodes_are_counted_by_prefix(reports):
    hopper, ampere = reports["fits"]["sm_90"], reports["fits"]["sm_80"]
    assert hopper.count("HGMMA") > 0
    assert ampere.count("HGMMA") == 0
    assert ampere.count("HMMA") == ampere.count("HMMA.16816") > 0
    assert ampere.count("HMM") == 0  # an opcode's beginning is not an opcode


def test_a_kernel_that_spills_is_seen(reports):
    for report in reports["spills"].values():
        assert report.registers <= 96
        assert report.spills == report.count("LDL", "STL") > 0
        assert report.stack > 0
        with pytest.raises(AssertionError, match=r"spills\n(.|\n)*bytes of stack"):
            assert_clean([report])


def test_without_a_stack_there_is_no_spill(reports):
    """What `spills` relies on: disassembling takes longer than compiling a small kernel."""
    for report in (report for by_target in reports.values() for report in by_target.values()):
        assert (report.stack == 0) == (report.count("LDL", "STL") == 0)


def test_too_many_registers_are_seen(reports):
    report = reports["fits"]["sm_90"]
    assert_clean([report], max_registers=report.registers)
    with pytest.raises(AssertionError, match=f"{report.registers} registers, wanted at most"):
        assert_clean([report], max_registers=report.registers - 1)


def test_too_much_shared_memory_is_seen(reports):
    report = reports["large"]["sm_89"]
    assert report.shared > SHARED_LIMIT["sm_89"]
    with pytest.raises(AssertionError, match="shared memory, sm_89 has 101376"):
        assert_clean([report])


def test_what_stands_for_sm_89_must_fit_there(reports):
    large = dataclasses.replace(reports["scale"]["sm_80"], shared=SHARED_LIMIT["sm_89"] + 1)
    assert_clean([dataclasses.replace(large, source=scale(targets=["sm_80"]))])
    with pytest.raises(AssertionError, match="shared memory, sm_80 has 101376"):
        assert_clean([large])


def test_e4m3_leaves_out_the_gpu_that_lacks_it():
    fp8 = {"x": "*fp8e4nv", "out": "*fp32", "factor": "fp32", "size": "i32"}
    assert scale().targets == ("sm_80", "sm_90", "sm_100")
    assert scale(signature=fp8).targets == ("sm_89", "sm_90", "sm_100")


def test_every_failure_is_reported():
    fp8 = {"x": "*fp8e4nv", "out": "*fp32", "factor": "fp32", "size": "i32"}
    cases = [
        (scale(targets=["sm_90"], constants={}), r"leave out \['BLOCK'\]"),
        (scale(targets=["sm_90"], constants={"BLOCK": 1024, "TILE": 1}), r"have \['TILE'\] too many"),
        (scale(targets=["sm_90"], constants={"BLOCK": 1024, "factor": 1}), r"both name \['factor'\]"),
        (scale(targets=["sm_90"], divisible=["stride"]), r"divisible names \['stride'\]"),
        (scale(targets=["sm_90"], constants={"BLOCK": 1000}), "power of 2"),
        (scale(targets=["sm_80"], signature=fp8), "fp8e4nv not supported"),
        (Compile("test_compiling:SHARED_LIMIT", {}, targets=["sm_90"]), "expected a @triton.jit function, got dict"),
        (Compile("test_compiling:missing", {}, targets=["sm_90"]), "no attribute 'missing'"),
    ]
    with pytest.raises(CompileError) as failure:
        compile_all([scale(), *(kernel for kernel, _ in cases)])
    messages = str(failure.value).split("\n\ntest_compiling:")
    for message, (_, expected) in zip(messages, cases, strict=True):
        assert re.search(expected, message), message


def test_configurations_take_the_targets_in_turn():
    kernels = [scale(), product(64), scale(), scale(), scale(), product(64, targets=["sm_90"]), scale()]
    every = ("sm_80", "sm_90", "sm_100")
    assert [tuple(kernel.targets) for kernel in compiling._in_turn(kernels)] == [
        *[every, every],
        *[("sm_90",), ("sm_100",), ("sm_80",), ("sm_90",), ("sm_90",)],
    ]


def test_e4m3fnuz_on_gfx942_is_seen():
    """Triton takes e4m3 there for what it is, without an instruction of the other format."""
    signature, targets = {"x": "*bf16", "out": "*fp32"}, ["gfx942"]
    right, wrong = (
        Compile("test_compiling:e4m3_kernel", signature, {"BLOCK": 64, "DTYPE": dtype}, targets=targets)
        for dtype in (tl.float8e4nv, tl.float8e4b8)
    )
    (report,) = compile_all([right])
    assert report.stack == 0
    assert report.registers > 0
    with pytest.raises(CompileError, match=r"instructions of e4m3fnuz, .*v_mfma_f32_\w+_fp8_fp8"):
        compile_all([wrong])


def test_each_kernel_is_compiled_elsewhere_once(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling_elsewhere, "_TAKEN", tmp_path / "taken")
    monkeypatch.setattr(compiling_elsewhere.in_part, "IN_PART", True)
    kernel = "dskernels.gemm.triton:fp8_gemm_kernel"
    large, small = (dataclasses.replace(product(block), kernel=kernel) for block in (128, 64))
    newer = dataclasses.replace(product(16), kernel=kernel, targets=["sm_90", "sm_100"])
    chosen = compiling_elsewhere.also([large, newer, small, product(16)])
    assert [(one.targets, one.constants["BLOCK"]) for one in chosen] == [(("sm_120",), 16), (("gfx942",), 64)]
    assert compiling_elsewhere.also([large]) == []
    there = dataclasses.replace(large, kernel="dskernels.mla.decode.triton:decode_kernel", targets=["gfx942"])
    nvidia = dataclasses.replace(small, kernel=there.kernel)
    assert [one.targets for one in compiling_elsewhere.also([nvidia, there])] == [("sm_120",)]  # its test names gfx942
    report = compiling.Report(
        small, "gfx942", registers=9, stack=4, shared=65_537, tensor_memory=0, seconds=0, cubin=b""
    )
    assert len(compiling_elsewhere.faults([report])) == 2


def test_nothing_to_compile_is_refused():
    with pytest.raises(ValueError, match="kernels: nothing to compile"):
        compile_all([])
