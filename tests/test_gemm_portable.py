"""The portable e4m3 product in all its configs: pointers and tensor descriptors, few rows, parts of K; compilation."""

import pytest
import torch

import dskernels as ds
import dskernels.gemm.triton as kernels
from compiling import Compile, assert_clean, compile_all
from dskernels import parity
from dskernels.gemm.config import (
    FEW,
    FEW_DEEP,
    LARGE,
    LARGE_OTHER,
    MANY_DEEP,
    MAX_PARTS,
    MEDIUM,
    PAIRED,
    PERSISTENT,
    SOME,
    SOME_DEEP,
    SOME_WIDE,
    TALL,
    GemmConfig,
    choose_config,
    choose_parts,
)
from dskernels.parity.inputs import quantized

HOPPER, BLACKWELL, DESKTOP, ADA, OTHER = (9, 0), (10, 0), (12, 0), (8, 9), (0, 0)
ROUNDED_TO_BF16 = 5e-6  # calc_diff is half the squared relative error: half an ulp is 2^-9, half its square 2e-6


def product(a, b, dtype=torch.float32, **options):
    """The Triton product, into an output that was NaN."""
    out = torch.full((a.data.shape[0], b.data.shape[0]), float("nan"), dtype=dtype, device=a.data.device)
    return ds.fp8_gemm(a, b, out=out, impl="triton", **options)


def with_rows_apart(q):
    """The same operand with rows of an odd number of bytes, which no tensor descriptor takes."""
    rows, cols = q.data.shape
    apart = torch.zeros(rows, cols + 1, dtype=torch.uint8, device=q.data.device)
    apart[:, :cols] = q.data.view(torch.uint8)
    return q._replace(data=apart.view(torch.float8_e4m3fn)[:, :cols])


@pytest.mark.parametrize("b_rows", [128, 1])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (300, 272, 256),  # ragged rows and columns, an even number of blocks of K
        (257, 144, 400),  # an odd number of them, the last one ragged
        (129, 640, 16),  # one block
    ],
)
def test_descriptors_and_pointers_agree(device, monkeypatch, m, n, k, b_rows):
    a, b = quantized(0, m, k, (1, 128), device), quantized(1, n, k, (b_rows, 128), device)
    want = ds.fp8_gemm(a, b, out_dtype=torch.float32, impl="reference")
    for config in (PAIRED, PERSISTENT, MEDIUM, TALL if b_rows == 1 else LARGE):
        monkeypatch.setattr(kernels, "choose_config", lambda *args, config=config: config)
        assert parity.difference(product(a, b), want) < parity.E4M3_SUMS, config
    monkeypatch.undo()
    apart = product(with_rows_apart(a), b)
    assert parity.difference(apart, want) < parity.E4M3_SUMS


@pytest.mark.parametrize("b_rows", [128, 1])
@pytest.mark.parametrize("config", [FEW, FEW_DEEP, SOME, SOME_DEEP, SOME_WIDE, MANY_DEEP], ids=str)
def test_few_rows(device, monkeypatch, config, b_rows):
    """More rows and columns than a tile, the last block of K ragged."""
    a = quantized(0, config.block_m + 3, 400, (1, 128), device)
    b = quantized(1, config.block_n + 16, 400, (b_rows, 128), device)
    monkeypatch.setattr(kernels, "choose_config", lambda *args: config)
    want = ds.fp8_gemm(a, b, out_dtype=torch.float32, impl="reference")
    assert parity.difference(product(a, b), want) < parity.E4M3_SUMS


@pytest.mark.parametrize("parts", [2, 3, MAX_PARTS])
@pytest.mark.parametrize("k", [1024, 900])
def test_parts_add_up(device, monkeypatch, parts, k):
    """Eight blocks: as many parts, and parts that get different numbers of blocks."""
    a, b = quantized(0, 5, k, (1, 128), device), quantized(1, 130, k, (128, 128), device)
    bias, before = torch.randn(130, device=device), torch.randn(5, 130, device=device)
    monkeypatch.setattr(kernels, "choose_parts", lambda *args: parts)
    want = ds.fp8_gemm(a, b, out_dtype=torch.float32, impl="reference")
    got = product(a, b)
    assert parity.difference(got, want) < parity.E4M3_SUMS
    assert torch.equal(product(a, b), got)
    total = ds.fp8_gemm(a, b, bias=bias, out=before.clone(), accumulate=True, impl="triton")
    # Of the same product: on tensor cores it is 2^-13 off the reference's, which the line above allows for.
    torch.testing.assert_close(total, got + bias + before, rtol=1e-5, atol=1e-5)
    assert torch.equal(product(a, b, torch.bfloat16), got.bfloat16())


def test_users_allocator_stays(device):
    """Tensor descriptors need Triton's allocator, which is the user's to set."""
    triton_allocation = pytest.importorskip("triton.runtime._allocation")
    before = triton_allocation._allocator.get()
    a, b = quantized(0, 300, 256, (1, 128), device), quantized(1, 256, 256, (128, 128), device)
    product(a, b)
    assert triton_allocation._allocator.get() is before


@pytest.mark.gpu
@pytest.mark.parametrize("b_rows", [128, 1])
@pytest.mark.parametrize("m", [1, 17, 83, 128, 512, 4095])
@pytest.mark.parametrize(("n", "k"), [(2112, 7168), (576, 7168), (24576, 1536), (4096, 3888)])
def test_model_shapes(device, m, n, k, b_rows):
    a = ds.quantize(torch.randn(m, k, device=device) * torch.rand(m, 1, device=device))
    b = ds.quantize(torch.randn(n, k, device=device) * torch.rand(n, 1, device=device), (b_rows, 128))
    want = a.dequantize(torch.float64) @ b.dequantize(torch.float64).T
    bias = torch.randn(n, device=device)
    rounded = product(a, b, torch.bfloat16)
    assert parity.difference(rounded, want) < ROUNDED_TO_BF16
    assert parity.difference(product(a, b, torch.bfloat16, bias=bias), want + bias) < ROUNDED_TO_BF16
    assert parity.difference(product(a, b), want) < parity.E4M3_SUMS
    total = ds.fp8_gemm(a, b, out=rounded.clone(), accumulate=True, impl="triton")
    assert parity.difference(total, rounded + want) < ROUNDED_TO_BF16
    for _ in range(10):
        assert torch.equal(product(a, b, torch.bfloat16), rounded)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 300])
def test_captured(device, m):
    """In a CUDA graph, scratch and parts included."""
    a, b = quantized(0, m, 7168, (1, 128), device), quantized(1, 576, 7168, (128, 128), device)
    want = product(a, b)
    out = torch.full_like(want, float("nan"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ds.fp8_gemm(a, b, out=out, impl="triton")
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, want)


def test_choose_config():
    def choose(m, n, arch=HOPPER, b_rows=128, aligned=True):
        return choose_config(m, n, b_rows, 132, arch, aligned)

    assert choose(1, 4096) == FEW_DEEP
    assert choose(16, 24576) == FEW
    assert choose(1, 4096, ADA) == choose(1, 4096, OTHER) == FEW
    assert choose(64, 7168) == SOME_DEEP
    assert choose(64, 24576) == SOME
    assert choose(64, 4096, ADA) == choose(64, 4096, aligned=False) == MEDIUM
    assert choose(128, 7168) == MANY_DEEP
    assert choose(128, 24576) == choose(128, 7168, BLACKWELL) == SOME_WIDE
    assert choose(512, 2112) == choose(512, 7168) == choose(512, 2112, b_rows=1) == MANY_DEEP
    assert choose(512, 24576) == choose(4096, 2112) == choose(4096, 7168) == PAIRED
    assert choose(4096, 7168, BLACKWELL) == choose(4096, 7168, BLACKWELL, b_rows=1) == PERSISTENT
    assert choose(4096, 7168, b_rows=1) == choose(4096, 7168, ADA, b_rows=1) == TALL
    assert choose(4096, 7168, BLACKWELL, b_rows=1, aligned=False) == MEDIUM
    assert choose(4096, 7168, ADA) == LARGE
    assert choose(4096, 7168, OTHER) == LARGE_OTHER
    assert choose(4096, 7168, OTHER, b_rows=1) == TALL
    assert choose(1, 4096, DESKTOP) == FEW_DEEP
    assert choose(64, 7168, DESKTOP) == SOME
    assert choose(128, 7168, DESKTOP) == SOME_WIDE
    assert choose(4096, 7168, DESKTOP) == LARGE
    assert choose(4096, 7168, DESKTOP, b_rows=1) == MEDIUM
    assert choose(4096, 7168, aligned=False) == LARGE


@pytest.mark.parametrize("blocks", [0, 1, 8, 56, 128])
@pytest.mark.parametrize("tiles", [1, 9, 33, 34, 64, 5000])
def test_choose_parts(tiles, blocks):
    parts = choose_parts(tiles, blocks, 132)
    assert 1 <= parts <= MAX_PARTS
    assert parts == 1 or (tiles * parts <= 132 and blocks // parts >= 8)
    if (tiles, blocks) == (33, 56):
        assert parts == 4


STRIDES = ("stride_am", "stride_sak", "stride_bn", "stride_sbn", "stride_sbk", "stride_cm")


def to_compile(config: GemmConfig, b_rows: int, *targets: str, epilogue: bool = False, split: bool = False) -> Compile:
    """The kernel of `config`, for a bf16 output; `epilogue`: with bias, to add to an fp32 one."""
    pointers = {"p_a": "*fp8e4nv", "p_sa": "*fp32", "p_b": "*fp8e4nv", "p_sb": "*fp32"}
    pointers["p_c"] = "*fp32" if epilogue else "*bf16"
    if epilogue:
        pointers["p_bias"] = "*bf16"
    if split:
        pointers["p_parts"] = "*fp32"
    constants = {
        **{"HAS_BIAS": epilogue, "ACCUMULATE": epilogue, "B_ROWS": b_rows},
        **{"BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
        **({} if epilogue else {"p_bias": None}),
    }
    if config.narrow:
        constants |= {"SPLIT": split, "EVEN_K": True, "STAGES": config.num_stages}
        constants |= {} if split else {"p_parts": None}
    else:
        constants |= {"GROUP_M": config.group_m, "TMA": config.tma, "TMA_STORE": config.tma and not epilogue}
    return Compile(
        "dskernels.gemm.triton_narrow:narrow_kernel" if config.narrow else "dskernels.gemm.triton:fp8_gemm_kernel",
        signature={**pointers, **dict.fromkeys(("M", "N", "K", *STRIDES, *(("blocks",) * config.narrow)), "i32")},
        constants=constants,
        divisible=("N", "K", "stride_am", "stride_bn", "stride_cm"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        targets=targets,
    )


def test_kernels_compile_without_spills():
    from_hopper = ("sm_90", "sm_100", "sm_120")
    everywhere = ("sm_89", *from_hopper, "gfx942")
    kernels = [
        *[to_compile(PAIRED, b_rows, "sm_90", epilogue=e) for b_rows in (128, 1) for e in (False, True)],
        *[to_compile(PERSISTENT, b_rows, "sm_100", epilogue=e) for b_rows in (128, 1) for e in (False, True)],
        to_compile(LARGE, 128, "sm_89", *from_hopper),
        to_compile(LARGE_OTHER, 128, "gfx942"),
        to_compile(TALL, 1, "sm_89", "sm_90", "gfx942"),
        to_compile(FEW_DEEP, 128, *from_hopper, split=True),
        *[to_compile(config, b_rows, *everywhere) for config in (MEDIUM, FEW) for b_rows in (128, 1)],
        *[to_compile(c, b_rows, *from_hopper) for c in (FEW_DEEP, SOME, SOME_WIDE) for b_rows in (128, 1)],
        *[to_compile(SOME_DEEP, b_rows, "sm_90", "sm_100") for b_rows in (128, 1)],
        *[to_compile(MANY_DEEP, b_rows, "sm_90") for b_rows in (128, 1)],
        Compile(
            "dskernels.gemm.triton_narrow:sum_parts_kernel",
            signature={
                **{"p_parts": "*fp32", "p_bias": "*bf16", "p_c": "*bf16"},
                **dict.fromkeys(("M", "N", "parts", "stride_cm"), "i32"),
            },
            constants={"HAS_BIAS": True, "ACCUMULATE": True, "PARTS": MAX_PARTS, "BLOCK": 256},
            divisible=("N", "stride_cm"),
            num_warps=4,
        ),
    ]
    reports = compile_all(kernels)
    assert_clean(reports)
    # An mbarrier whose memory may be put to another use must be invalidated (SYNCS.CCTL.IV): see PAIRED.
    assert all(r.count("SYNCS.EXCH") == r.count("SYNCS.CCTL.IV") for r in reports if r.target != "gfx942")
    # On Hopper the product must be an e4m3 one of the tensor cores, not of upcast operands.
    products = [r for r in reports if r.target == "sm_90" and "BLOCK_M" in r.source.constants]
    assert all(r.count("QGMMA") for r in products)
