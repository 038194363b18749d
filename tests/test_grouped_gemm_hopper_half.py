"""The grouped products of bf16 and fp16 in CUDA C++: compiled here, run on the GPU against fp64."""

import functools
import itertools

import pytest
import torch

from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels.cuda.driver import Planned
from dskernels.grouped_gemm import hopper_half
from dskernels.grouped_gemm.hopper_half import CONFIGS, CONTIGUOUS, MASKED, WGRAD, choose_config
from dskernels.reference.grouped_gemm import group_slices

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
NAN = float("nan")

# (form, kind, b_mn, out, accumulate): every value of each, where the kernel takes it.
KINDS = [
    *((CONTIGUOUS, 0, 0, 0, 0), (CONTIGUOUS, 1, 0, 1, 0), (CONTIGUOUS, 0, 0, 2, 0), (CONTIGUOUS, 0, 1, 0, 0)),
    *((MASKED, 0, 0, 0, 0), (MASKED, 1, 1, 2, 0)),
    *((WGRAD, 0, 1, 2, 0), (WGRAD, 0, 1, 2, 1), (WGRAD, 1, 1, 1, 0)),
]
ONE_OF_EACH_FORM = [next(kind for kind in KINDS if kind[0] == form) for form in (CONTIGUOUS, MASKED, WGRAD)]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"128x{config.block_n}")


@every_config
def test_compiles_without_spills(config):
    stages = config.stages(8)
    # A narrower tile has fewer registers to write out, by the same code.
    kinds = KINDS if config == CONFIGS[0] else ONE_OF_EACH_FORM
    reports = [
        compile_cuda(
            hopper_half.SOURCE,
            hopper_half.options_of(config, stages, *kind),
            config.shared_bytes(stages, 8),
        )
        for kind in kinds
    ]
    # 384 threads enter with 168 registers; setmaxnreg then moves them from the loading warpgroup to the other two.
    assert_clean(reports, max_registers=168)
    for report in reports:
        # Four products to a block of K: a tile's first, two of the unrolled loop, and once more for an odd rest.
        assert report.count("HGMMA") == 4 * 4
        # One wait to a block and one at the end: more would mean that ptxas serialised the products.
        assert report.count("WARPGROUP.DEPBAR") == 4
        assert report.count("UTMALDG") >= 8
        assert report.count("BRA.U.ANY") == 0  # one thread is known to be one, so copies need no loop over lanes


def test_choice():
    def columns(groups, rows, n):
        return choose_config(groups, rows, n, 132).block_n

    many = {64: 128, 576: 192, 2112: 192, 4096: 256, 7168: 256}
    assert {n: columns(8, 4096, n) for n in many} == many
    assert columns(32, 20, 4096) == 256
    assert columns(1, 8, 7168) == 128  # 28 tiles of 256 would leave most multiprocessors idle
    for config in CONFIGS:
        assert config.stages(256) >= 4
        assert config.stages(hopper_half.MOST_GROUPS) >= 3


def test_what_it_does_not_take():
    a, b, offsets = torch.empty(64, 128, dtype=BRAIN), torch.empty(2, 64, 128, dtype=BRAIN), torch.zeros(3)
    out = torch.empty(64, 64, dtype=BRAIN)
    reason = hopper_half.grouped_gemm_supports
    assert "multiplies bf16 and fp16, a is torch.float32" in reason(a.float(), b.float(), offsets, out)
    odd = torch.empty(64, 100, dtype=BRAIN), torch.empty(2, 64, 100, dtype=BRAIN)
    assert "the rows of a must be aligned to 16 bytes and apart, its strides are (100, 1)" in reason(*odd, offsets, out)
    assert "the rows of b must be aligned" in reason(a, b.repeat(1, 1, 2)[..., ::2], offsets, out)
    assert "the rows of b must be aligned to 16 bytes and apart" in reason(a, b[:1].expand(2, 64, 128), offsets, out)
    assert "the rows of out must be aligned" in reason(a, b, offsets, torch.empty(64, 60, dtype=BRAIN))
    assert "nothing to multiply" in reason(a[:0], b, offsets, out[:0])
    stack = a.expand(2, 64, 128).contiguous()
    assert "nothing to multiply" in hopper_half.grouped_gemm_masked_supports(stack[:, :0], b, offsets, out[None, :0])
    dw = torch.empty(2, 64, 128)
    assert "adds to fp32 only" in hopper_half.grouped_wgrad_supports(out, a, offsets, dw.bfloat16(), True)


# ---- on the GPU -----------------------------------------------------------------------------------------------------

SIZES = {
    "one": [300],
    "ragged": [0, 1, 63, 64, 65, 128, 129, 500],
    "all to one": [0, 0, 0, 700, 0, 0, 0, 0],
    "decode": [(7 * e) % 5 for e in range(256)],
    "none": [0, 0, 0],
    "many": [900, 1100, 0, 1000],
}
ROUNDOFF = {BRAIN: 2**-8, HALF: 2**-11, SINGLE: 2**-24}


def offsets_of(sizes, device):
    return torch.tensor([0, *sizes], device=device).cumsum(0, dtype=torch.int32)


def assert_close(out, a, b):
    """`out` against a @ b.T in fp64: rounded once, after fp32 sums of 16 products at a time, which may be cut off."""
    want = a.double() @ b.double().T
    sums = a.double().abs() @ b.double().abs().T
    bound = ROUNDOFF[out.dtype] * want.abs() + (a.shape[1] // 16 + 2) * 2**-22 * sums
    worst = ((out.double() - want).abs() - bound).max().item() if out.numel() else 0.0
    assert worst <= 0, (worst, tuple(out.shape))


def guarded(*shape, dtype, device):
    """A tensor full of NaN inside one whose other elements are NaN too; and a check that these still are."""
    *stack, rows, columns = shape
    whole = torch.full((*stack, rows + 6, columns + 16), NAN, dtype=dtype, device=device)
    inside = whole[..., 2 : rows + 2, 8 : columns + 8]

    def untouched():
        inside.fill_(NAN)
        return whole.isnan().all().item()

    return inside, untouched


def operands(rows, groups, n, k, device, dtype=BRAIN, transposed=False):
    a = torch.randn(rows, k, device=device).to(dtype)
    b = torch.randn(groups, *((k, n) if transposed else (n, k)), device=device).to(dtype)
    return a, b.mT if transposed else b


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    ("n", "k", "dtype", "out_dtype", "transposed"),
    [
        (576, 200, BRAIN, BRAIN, False),  # an odd number of tiles, the last one partly filled; K not a multiple of 64
        (136, 512, HALF, SINGLE, False),  # N not a multiple of a box of C
        (712, 1024, BRAIN, BRAIN, True),
        (120, 200, BRAIN, HALF, True),  # less than a tile
        (2304, 72, BRAIN, SINGLE, False),  # more tiles than multiprocessors where there are many rows
    ],
)
@every_config
def test_contiguous(device, config, sizes, n, k, dtype, out_dtype, transposed):
    rows = sum(sizes) + 70  # the last of which belong to no group
    a, b = operands(rows, len(sizes), n, k, device, dtype, transposed)
    a[rows - 70 :] = NAN
    offsets = offsets_of(sizes, device)
    out, untouched = guarded(rows, n, dtype=out_dtype, device=device)
    assert hopper_half.grouped_gemm_supports(a, b, offsets, out) is None
    Planned(functools.partial(hopper_half.plan, config))(a, b, offsets, out)
    for e, group in enumerate(group_slices(offsets, rows)):
        assert_close(out[group], a[group], b[e])
    assert not out[rows - 70 :].any()
    assert untouched()


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@every_config
def test_masked(device, config, transposed):
    groups, rows, n, k = 5, 200, 576, 200
    a = torch.randn(groups, rows, k, device=device).to(BRAIN)
    _, b = operands(1, groups, n, k, device, transposed=transposed)
    counts = torch.tensor([0, 1, 130, 10**6, -5], dtype=torch.int32, device=device)
    for e, count in enumerate((0, 1, 130, 200, 0)):
        a[e, count:] = NAN
    out, untouched = guarded(groups, rows, n, dtype=BRAIN, device=device)
    assert hopper_half.grouped_gemm_masked_supports(a, b, counts, out) is None
    Planned(functools.partial(hopper_half.plan_masked, config))(a, b, counts, out)
    for e, count in enumerate((0, 1, 130, 200, 0)):
        assert_close(out[e, :count], a[e, :count], b[e])
    assert untouched()


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    ("n", "k", "dtype", "out_dtype", "accumulate"),
    [
        (576, 200, BRAIN, SINGLE, False),  # an odd number of tiles down, the last partly filled
        (136, 712, HALF, SINGLE, True),
        (128, 120, BRAIN, BRAIN, False),
        (1024, 1000, BRAIN, SINGLE, True),  # more tiles than multiprocessors
    ],
)
@every_config
def test_wgrad(device, config, sizes, n, k, dtype, out_dtype, accumulate):
    rows = sum(sizes) + 70
    dy, x = (torch.randn(rows, width, device=device).to(dtype) for width in (n, k))
    dy[rows - 70 :] = x[rows - 70 :] = NAN  # rows of no group
    offsets = offsets_of(sizes, device)
    out, untouched = guarded(len(sizes), n, k, dtype=out_dtype, device=device)
    if accumulate:
        out.fill_(3.0)
    assert hopper_half.grouped_wgrad_supports(dy, x, offsets, out, accumulate) is None
    Planned(functools.partial(hopper_half.plan_wgrad, config))(dy, x, offsets, out, accumulate)
    for e, group in enumerate(group_slices(offsets, rows)):
        if group.start == group.stop:
            assert (out[e] == (3.0 if accumulate else 0.0)).all()
        elif accumulate:  # as if 3 = 3 * 1 were one more token
            ones = [torch.cat([t[group], t.new_full((1, t.shape[1]), value)]) for t, value in ((dy, 3), (x, 1))]
            assert_close(out[e], *(t.T for t in ones))
        else:
            assert_close(out[e], dy[group].T, x[group].T)
    assert untouched()


@pytest.mark.gpu
def test_nan_stays_in_its_group(device):
    sizes, n, k = [100, 30, 170], 576, 200
    a, b = operands(300, 3, n, k, device)
    dy = torch.randn(300, n, device=device).to(BRAIN)
    a[100:130] = dy[100:130] = NAN
    offsets, out, dw = offsets_of(sizes, device), a.new_empty(300, n), torch.empty(3, n, k, device=device)
    hopper_half.grouped_gemm(a, b, offsets, out)
    hopper_half.grouped_wgrad(dy, a, offsets, dw, False)
    assert out[100:130].isnan().all()
    assert dw[1].isnan().all()
    for e, group in ((0, slice(100)), (2, slice(130, 300))):
        assert_close(out[group], a[group], b[e])
        assert_close(dw[e], dy[group].T, a[group].T)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "values",
    [
        [0, 50, 20, 400, 90, 10**9],  # back and beyond the end
        [7, -3, -(2**31), 100, 2**31 - 1, 5],  # not even the first is 0
        [300, 300, 300, 300, 300, 300],
    ],
)
def test_any_offsets_are_safe(device, values):
    rows, groups, n, k = 300, 5, 136, 200
    a, b = operands(rows, groups, n, k, device)
    dy = torch.randn(rows, n, device=device).to(BRAIN)
    offsets = torch.tensor(values, dtype=torch.int32, device=device)
    out, untouched = guarded(rows, n, dtype=BRAIN, device=device)
    dw, dw_untouched = guarded(groups, n, k, dtype=SINGLE, device=device)
    hopper_half.grouped_gemm(a, b, offsets, out)
    hopper_half.grouped_wgrad(dy, a, offsets, dw, False)
    slices = group_slices(offsets, rows)
    for e, group in enumerate(slices):
        assert_close(out[group], a[group], b[e])
        assert_close(dw[e], dy[group].T, a[group].T)
    assert not out[slices[-1].stop :].any()
    assert untouched()
    assert dw_untouched()


@pytest.mark.gpu
def test_many_groups(device):
    sizes = [(5 * e) % 3 for e in range(1024)]
    rows, n, k = sum(sizes), 712, 328  # more blocks of K than stages, as the table of groups takes the place of one
    a, b = operands(rows, len(sizes), n, k, device)
    offsets, out = offsets_of(sizes, device), a.new_full((rows, n), NAN)
    Planned(functools.partial(hopper_half.plan, CONFIGS[0]))(a, b, offsets, out)
    group = torch.arange(1024, device=device).repeat_interleave(torch.tensor(sizes, device=device))
    want = torch.einsum("rk,rnk->rn", a.double(), b[group].double())
    sums = torch.einsum("rk,rnk->rn", a.double().abs(), b[group].double().abs())
    assert ((out.double() - want).abs() <= 2**-8 * want.abs() + (k // 16 + 2) * 2**-22 * sums).all()


@pytest.mark.gpu
def test_captured_in_a_graph_and_bits_repeat(device):
    n, k, rows = 712, 1024, 1000
    a, b = operands(rows, 4, n, k, device)
    dy = torch.randn(rows, n, device=device).to(BRAIN)
    offsets = offsets_of([250, 250, 250, 250], device)
    out, dw = a.new_empty(rows, n), torch.empty(4, n, k, device=device)

    def step():
        hopper_half.grouped_gemm(a, b, offsets, out)
        hopper_half.grouped_wgrad(dy, a, offsets, dw, False)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for sizes in ([250, 250, 250, 250], [0, 999, 0, 1], [1, 2, 3, 4]):
        offsets.copy_(offsets_of(sizes, device))
        results = []
        for run in (graph.replay, step, graph.replay, step):
            out.fill_(NAN)
            dw.fill_(NAN)
            run()
            results.append((out.clone(), dw.clone()))
        for first, second in itertools.pairwise(results):
            assert torch.equal(first[0], second[0])
            assert torch.equal(first[1], second[1])
        for e, group in enumerate(group_slices(offsets, rows)):
            assert_close(out[group], a[group], b[e])
