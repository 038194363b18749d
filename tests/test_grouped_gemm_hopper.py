"""The grouped e4m3 products of hopper.cu: compiled here, run on the GPU against the reference."""

import functools

import pytest
import torch

import dskernels as ds
from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels import parity
from dskernels.cuda.driver import Planned
from dskernels.grouped_gemm import hopper
from dskernels.grouped_gemm.config import (
    GROUPED_NARROW,
    GROUPED_UNITS,
    HOPPER_CONFIGS,
    HOPPER_TALL,
    HOPPER_WGRAD_CONFIGS,
    choose_hopper_config,
    choose_hopper_masked_config,
    choose_hopper_wgrad_config,
    hopper_clusters,
)
from dskernels.parity.inputs import quantized, spread

BRAIN, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
NAN = float("nan")
# Half the squared relative error of a result rounded to that dtype, and of sums in another order.
TOLERANCE = {BRAIN: 5e-6, HALF: 1e-6, SINGLE: parity.E4M3_SUMS}
tiles = functools.partial(
    pytest.mark.parametrize,
    "config",
    ids=lambda config: f"{config.tile}, cluster of {config.cluster}{', in units' * config.in_units}",
)


# ---- without a GPU --------------------------------------------------------------------------------------------------


def check_code(config, b_rows, kinds, variants):
    """`variants`: how often the loop over K is there, for how many products of a warpgroup."""
    shared = hopper.rows_shared_bytes(config) if b_rows == 128 else hopper.wgrad_shared_bytes(config)
    reports = [compile_cuda(hopper.SOURCE, hopper.options_for(config, b_rows, **kind), shared) for kind in kinds]
    # 384 threads enter with 168 registers; setmaxnreg then moves them from the loading warpgroup to the other two.
    assert_clean(reports, max_registers=168)
    # A tile's first product, in units also behind one of which a warpgroup has none, and those of the loops over K,
    # unrolled and then once more for the rest.
    products = 1 + config.in_units + sum(variants) * (config.unroll + (config.unroll > 1))
    for report in reports:
        # Four to a product, all of a block of K in a row: more waiting than products means that ptxas serialised them.
        assert report.count("QGMMA") == 4 * products
        assert report.count("WARPGROUP.DEPBAR") <= products + 1
        assert report.count("BRA.U.ANY") == 0  # one thread is known to be one, so copies need no loop over lanes


@tiles(HOPPER_CONFIGS)
def test_rows_compile_without_spills(config):
    kinds = [*({"out": out} for out in range(3)), {"out": 0, "masked": True}]
    kinds = [{"out": 0}, {"out": 2, "masked": True}] if config.in_units else kinds
    check_code(config, 128, kinds, range(max(config.waves - 1, 1), config.waves + 1))


@tiles(HOPPER_WGRAD_CONFIGS)
def test_wgrad_compiles_without_spills(config):
    kinds = [*({"out": out} for out in range(3)), {"out": 2, "accumulate": True}]
    check_code(config, 1, kinds, [config.waves])


def test_choice():
    assert choose_hopper_config(32768, 8, 4096, 7168, 132).tile == "256x128"
    assert choose_hopper_config(32 * 190, 32, 4096, 7168, 132) == HOPPER_TALL
    assert choose_hopper_config(32 * 512, 32, 4096, 7168, 132) == GROUPED_NARROW
    assert choose_hopper_config(64 * 256, 64, 4096, 7168, 132) == GROUPED_UNITS
    assert choose_hopper_config(64 * 256, 64, 7168, 2048, 132) == GROUPED_UNITS
    assert choose_hopper_config(64 * 256, 64, 2048, 1408, 132) == GROUPED_NARROW
    assert choose_hopper_config(300, 1, 4096, 7168, 132).tile == "128x128"  # 96 tiles, and only 64 of the other
    assert choose_hopper_masked_config(512, 4, 4096, 7168, 132).tile == "256x128"
    assert choose_hopper_wgrad_config(32768, 8, 4096, 7168, 132).tile == "256x128"


def test_as_many_clusters_as_any_division_needs():
    config = HOPPER_CONFIGS[0]
    for sizes in ([1] * 7, [257, 255, 0, 1], [1024], [0, 0]):
        needed = sum(config.clusters(size, 576) for size in sizes)
        assert needed <= hopper_clusters(config, sum(sizes), len(sizes), 576)


def test_what_it_does_not_take():
    def reason(n=576, k=400, **change):
        a, b = quantized(0, 4, k, (1, 128), "cpu"), ds.quantize(torch.ones(3, n, k), (128, 128), impl="reference")
        arguments = {"a": a.data, "a_scale": a.scale, "b": b.data, "b_scale": b.scale}
        arguments |= {"offsets": torch.zeros(4, dtype=torch.int32), "out": torch.empty(4, n)}
        return hopper.grouped_gemm_out_supports(**(arguments | change))

    assert "nothing to multiply" in reason(n=0)
    assert "the rows of a must be aligned to 16 bytes, its strides are [300, 1]" in reason(k=300)
    assert "the rows of out must be aligned to 16 bytes, its strides are [131, 1]" in reason(n=131)
    apart = torch.empty(3 * 400 * 576 + 99).to(torch.float8_e4m3fn).as_strided((3, 576, 400), (400 * 576 + 16, 400, 1))
    assert "the matrices of b must be whole rows apart" in reason(b=apart)
    stack = torch.zeros(2, 8, 400).to(torch.float8_e4m3fn)
    masked = {"a": stack, "a_scale": torch.ones(4, 16).T.unflatten(0, (2, 8)), "b": torch.empty(2, 576, 400)}
    masked |= {"b_scale": torch.ones(2, 5, 4), "counts": torch.zeros(2), "out": torch.empty(2, 8, 576)}
    # One row of each group, and their scales apart: each is a column of one element, of any stride.
    single = {name: masked[name][:, ::8] for name in ("a", "a_scale", "out")}
    message = "the groups of a.scale must follow each other without gaps, its strides are [8, 8, 16]"
    assert message in hopper.grouped_gemm_masked_supports(**(masked | single))
    x = ds.quantize_grouped(torch.ones(4, 64), torch.tensor([0, 4], dtype=torch.int32), impl="reference")
    wgrad = (x.data, x.scale, x.data, x.scale, torch.tensor([0, 4], dtype=torch.int32))
    assert "adds to fp32 only" in hopper.grouped_wgrad_supports(*wgrad, torch.empty(1, 64, 64, dtype=BRAIN), True)


# ---- rows in groups -------------------------------------------------------------------------------------------------


def few_of(groups, **sizes):
    """Sizes of `groups` groups, all empty but those named e<number>."""
    return [sizes.get(f"e{e}", 0) for e in range(groups)]


SIZES = {
    "one group": [300],
    "4, the last tile of each kind": [64, 517, 0, 321],  # nothing left out; 5 rows; 65, so one warpgroup has none
    "32": [(37 * e * e) % 401 for e in range(32)],
    "256, most empty": few_of(256, e0=1, e100=700, e101=129, e255=255),
    "1024, most empty": few_of(1024, e3=130, e500=1, e1023=260),
    "1024, one has all": few_of(1024, e700=1500),
    "8, all empty": [0] * 8,
}
ragged = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def offsets_of(sizes, device):
    return torch.tensor([0, *sizes], device=device).cumsum(0, dtype=torch.int32)


def poison(x, *where):
    """Make a part of an Fp8Tensor NaN, scales too."""
    x.data.view(torch.uint8)[where] = 0x7F
    x.scale[where] = NAN


def operands(sizes, spare, n, k, device):
    """Rows of all groups and `spare` rows of none; and weights. NaN is what must not be read."""
    a = ds.quantize(spread(0, sum(sizes) + spare, k).to(device))
    poison(a, slice(sum(sizes), None))
    b = ds.quantize(torch.randn(len(sizes), n, k, device=device), (128, 128))
    for e, size in enumerate(sizes):
        if size == 0:
            poison(b, e)
    return a, b, offsets_of(sizes, device)


def guarded(*shape, device, dtype):
    """A NaN tensor inside a larger one of threes, and that one."""
    whole = torch.full((*shape[:-2], shape[-2] + 6, shape[-1] + 32), 3.0, device=device, dtype=dtype)
    out = whole[..., 2:-4, 16:-16]
    out.fill_(NAN)
    return out, whole


def assert_untouched_outside(out, whole):
    out.fill_(3.0)
    assert (whole == 3).all()


@pytest.mark.gpu
@ragged
@tiles(HOPPER_CONFIGS)
def test_rows(device, config, sizes):
    a, b, offsets = operands(sizes, 70, 576, 400, device)
    want = ds.reference.grouped_gemm(a, b, offsets, out_dtype=SINGLE)
    assert not want.isnan().any()
    for dtype in (BRAIN, HALF, SINGLE):
        out, whole = guarded(len(want), 576, device=device, dtype=dtype)
        Planned(functools.partial(hopper.plan, config))(a.data, a.scale, b.data, b.scale, offsets, out)
        kept = want.abs() < 6e4 if dtype == HALF else slice(None)  # `spread` data may be beyond fp16's range
        if sum(sizes):
            assert parity.difference(out[kept], want[kept]) < TOLERANCE[dtype]
        assert (out[sum(sizes) :] == 0).all()
        assert_untouched_outside(out, whole)


@pytest.mark.gpu
@pytest.mark.parametrize("e4m3", [True, False], ids=["e4m3", "bf16"])
def test_rows_of_no_group_are_left(device, e4m3):
    sizes, n, k = [640, 0, 517, 1321], 576, 400
    a, b, offsets = operands(sizes, 2000, n, k, device)
    if e4m3:
        given = a.data, a.scale, b.data, b.scale
    else:
        given = torch.randn(a.shape, device=device).to(BRAIN), None, torch.randn(b.shape, device=device).to(BRAIN), None
    want, out = (torch.full((sum(sizes) + 2000, n), NAN, device=device, dtype=BRAIN) for _ in range(2))
    hopper.grouped_gemm_out(*given, offsets, want)
    hopper.grouped_gemm_leaving(*given, offsets, out)
    assert torch.equal(out[: sum(sizes)], want[: sum(sizes)])
    assert not want.isnan().any()
    assert out[sum(sizes) :].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "offsets",
    [
        [0, 5, 3, 400, 399],  # ends that go back
        [99, -7, -(2**31), 2**31 - 1, 0],  # and that are no rows at all
        [-1, 700, 700, 650, 650],
        [5, 0, 0, 0, 0],
        [0, 700, 2**31 - 1, 2**31 - 1, -1],
    ],
    ids=str,
)
@tiles(HOPPER_CONFIGS)
def test_any_offsets_are_safe(device, config, offsets):
    a, b, _ = operands([200, 200, 200, 100], 0, 72, 272, device)
    offsets = torch.tensor(offsets, dtype=torch.int32, device=device)
    out, whole = guarded(700, 72, device=device, dtype=SINGLE)
    Planned(functools.partial(hopper.plan, config))(a.data, a.scale, b.data, b.scale, offsets, out)
    want = ds.reference.grouped_gemm(a, b, offsets, out_dtype=SINGLE)
    assert parity.difference(out, want) < TOLERANCE[SINGLE] or (not out.any() and not want.any())
    assert_untouched_outside(out, whole)


@pytest.mark.gpu
def test_weights_may_lie_apart(device):
    a, b, offsets = operands([150, 200], 0, 136, 272, device)
    room = torch.full((2, 200, 272), 0x7F, dtype=torch.uint8, device=device)
    room[:, :136] = b.data.view(torch.uint8)
    apart = b._replace(data=room.view(torch.float8_e4m3fn)[:, :136])
    assert ds.explain(ds.grouped_gemm, a, apart, offsets)[0].impl == "hopper"
    assert torch.equal(ds.grouped_gemm(a, apart, offsets), ds.grouped_gemm(a, b, offsets))


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[300, 0, 1, 129], [-5, 2**31 - 1, 300, -(2**31)], [0, 0, 0, 0]], ids=str)
@tiles(HOPPER_CONFIGS)
def test_masked(device, config, counts):
    n, k, rows = 576, 400, 300
    valid = [min(max(count, 0), rows) for count in counts]
    flat = ds.quantize(spread(0, 4 * rows, k).to(device))
    for e, count in enumerate(valid):
        poison(flat, slice(e * rows + count, (e + 1) * rows))
    a = ds.Fp8Tensor(flat.data.view(4, rows, k), flat.scale.view(4, rows, -1))
    b = ds.quantize(torch.randn(4, n, k, device=device), (128, 128))
    whole = torch.full((4, rows, n + 32), 3.0, device=device)
    out = whole[..., :n]
    sizes = torch.tensor(counts, dtype=torch.int32, device=device)
    Planned(functools.partial(hopper.plan_masked, config))(a.data, a.scale, b.data, b.scale, sizes, out)
    for e, count in enumerate(valid):
        if count:
            want = a.dequantize()[e, :count] @ b.dequantize()[e].T
            assert parity.difference(out[e, :count], want) < TOLERANCE[SINGLE]
        out[e, :count] = 3.0
    assert (whole == 3).all()  # rows beyond the counts are not written either


# ---- sums over tokens -----------------------------------------------------------------------------------------------


def token_operands(sizes, n, k, device):
    """dy and x, quantised along tokens; NaN in rows that belong to no group, and in columns behind the last one."""
    offsets = offsets_of(sizes, device)
    x = []
    for seed, width in enumerate((n, k)):
        rows = spread(seed, sum(sizes) + 9, width).to(device)
        rows[sum(sizes) :] = NAN
        q = ds.quantize_grouped(rows, offsets)
        used = sum(-(-size // 128) for size in sizes)
        q.data.view(torch.uint8)[:, used * 128 :] = 0x7F
        q.scale[:, used:] = NAN
        x.append(q)
    return *x, offsets


def wgrad_of(dy, x, sizes):
    """The sums, group by group, of what the operands hold, in fp64."""
    blocks = [-(-size // 128) * 128 for size in sizes]
    parts = zip(*(t.dequantize(torch.float64)[:, : sum(blocks)].split(blocks, 1) for t in (dy, x)), strict=True)
    return torch.stack([d @ v.T for d, v in parts])


@pytest.mark.gpu
@ragged
@tiles(HOPPER_WGRAD_CONFIGS)
def test_wgrad(device, config, sizes):
    n, k = (72, 80) if len(sizes) > 100 else (576, 400)
    dy, x, offsets = token_operands(sizes, n, k, device)
    want = wgrad_of(dy, x, sizes)
    launch = Planned(functools.partial(hopper.plan_wgrad, config))
    for dtype in (SINGLE, BRAIN, HALF):
        out, whole = guarded(len(sizes), n, k, device=device, dtype=dtype)
        launch(dy.data, dy.scale, x.data, x.scale, offsets, out, False)
        kept = want.abs() < 6e4 if dtype == HALF else slice(None)
        if sum(sizes):
            assert parity.difference(out[kept], want[kept]) < TOLERANCE[dtype]
        assert (out[torch.tensor(sizes) == 0] == 0).all()
        assert_untouched_outside(out, whole)


@pytest.mark.gpu
@ragged
@tiles(HOPPER_WGRAD_CONFIGS)
def test_wgrad_accumulates(device, config, sizes):
    n, k = (72, 80) if len(sizes) > 100 else (576, 400)
    dy, x, offsets = token_operands(sizes, n, k, device)
    out, whole = guarded(len(sizes), n, k, device=device, dtype=SINGLE)
    filled = torch.tensor(sizes) > 0
    out[filled] = 100.0  # the others stay NaN: they are not written, and if they were read they would not be NaN alone
    hopper_wgrad = Planned(functools.partial(hopper.plan_wgrad, config))
    hopper_wgrad(dy.data, dy.scale, x.data, x.scale, offsets, out, True)
    if sum(sizes):
        assert parity.difference(out[filled], wgrad_of(dy, x, sizes)[filled] + 100.0) < TOLERANCE[SINGLE]
    assert out[~filled].isnan().all()
    assert_untouched_outside(out, whole)


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("offsets", [[0, 5, 3, 10**6], [7, -1, 2**31 - 1, -5], [0, 0, 0, 0]], ids=str)
def test_wgrad_of_any_offsets_is_safe(device, offsets, accumulate):
    """Also of offsets that are not those the operands were quantised with."""
    dy, x, _ = token_operands([200, 100, 50], 72, 80, device)
    for t in (dy, x):  # behind the groups it was quantised with, too, as other offsets lead there
        t.data.view(torch.uint8)[:, 512:], t.scale[:, 4:] = 0x38, 1.0
    offsets = torch.tensor(offsets, dtype=torch.int32, device=device)
    out, whole = guarded(3, 72, 80, device=device, dtype=SINGLE)
    out.fill_(1.0)
    want = ds.reference.grouped_wgrad(dy, x, offsets, out=out.clone(), accumulate=accumulate)
    assert ds.grouped_wgrad(dy, x, offsets, out=out, accumulate=accumulate, impl="hopper") is out
    assert parity.difference(out, want) < TOLERANCE[SINGLE] or torch.equal(out, want)
    assert_untouched_outside(out, whole)


# ---- as users call it -----------------------------------------------------------------------------------------------


def steps(a, b, offsets, dy, x, counts):
    stack = ds.Fp8Tensor(a.data.unflatten(0, (4, -1)), a.scale.unflatten(0, (4, -1)))
    return (
        ds.grouped_gemm(a, b, offsets, impl="hopper"),
        ds.grouped_gemm(a, b, offsets, out_dtype=SINGLE, impl="hopper"),
        ds.grouped_gemm_masked(stack, b, counts, out=torch.zeros(4, len(a.data) // 4, 264, device=dy.data.device)),
        ds.grouped_wgrad(dy, x, offsets, impl="hopper"),
    )


def inputs_of_steps(device):
    sizes = [300, 0, 517, 183]
    a, b, offsets = operands(sizes, 0, 264, 400, device)
    b = ds.quantize(torch.randn(4, 264, 400, device=device), (128, 128))
    dy, x, _ = token_operands(sizes, 264, 400, device)
    return a, b, offsets, dy, x, torch.tensor([250, 0, 77, 9], dtype=torch.int32, device=device)


@pytest.mark.gpu
def test_bits_repeat(device):
    inputs = inputs_of_steps(device)
    first = steps(*inputs)
    for _ in range(10):
        assert all(torch.equal(got, want) for got, want in zip(steps(*inputs), first, strict=True))


@pytest.mark.gpu
def test_captured_in_a_graph_and_replayed_with_other_groups(device):
    a, b, offsets, dy, x, counts = inputs_of_steps(device)
    for t in (dy, x):  # whatever the offsets are
        t.data.view(torch.uint8).copy_(torch.randint(0, 0x70, t.data.shape, device=device))
        t.scale.fill_(1.0)
    steps(a, b, offsets, dy, x, counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = steps(a, b, offsets, dy, x, counts)
    for sizes in ([0, 1000, 0, 0], [250, 250, 250, 100], [0, 0, 0, 0], [1, 2, 3, 994]):
        offsets.copy_(offsets_of(sizes, device))
        counts.copy_(torch.tensor(sizes))
        for tensor in got:
            tensor.fill_(NAN)
        graph.replay()
        want = steps(a, b, offsets, dy, x, counts)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        assert torch.equal(got[3], want[3])
        for e, size in enumerate(sizes):
            assert torch.equal(got[2][e, :size], want[2][e, :size])
