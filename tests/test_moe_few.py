"""The expert block for a few tokens in two launches: compiled here, run on a GPU against the reference."""

import pytest
import torch

import dskernels as ds
from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels import parity
from dskernels.gemm.config import SHARED_OF_MULTIPROCESSOR, SHARED_RESERVED, SmallConfig
from dskernels.moe import config_few, hopper, hopper_few
from dskernels.types import Fp8Tensor
from dskernels.validate import ceil_div

MULTIPROCESSORS = 132
# Of the reference in fp32 on the same bytes. Gate and up are rounded before they are gated, to 2^-9 and 2^-12 of
# themselves, and turn roundings to e4m3, of steps of 2^-3: 2^-9 / 2^-4 of them by (2^-3)^2 / 3, and half of that.
TOLERANCE = {torch.bfloat16: 1e-3, torch.float16: 1e-4}
SAME_HIDDEN = 1e-5  # of the kernels for more tokens, which round each expert's output to bf16
NAN = float("nan")


def test_compiles_without_spills():
    reports = [compile_cuda(hopper_few.UP, hopper_few.options_of(config_few.UP, out), 0) for out in (0, 1)]
    for split, out in ((1, 0), (2, 1), (4, 1), (8, 0)):
        options = hopper_few.options_of(SmallConfig(config_few.TILE, config_few.OPERAND, split, 2), out)
        reports.append(compile_cuda(hopper_few.DOWN, options, 0))
    assert_clean(reports, max_registers=16384 // 32 // ceil_div(4 * 160, 128))
    assert all(report.count("QGMMA") >= 4 for report in reports)


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize(("routed", "shared", "top_k"), [(64, 2, 6), (256, 1, 8), (1023, 1, 32), (8, 0, 1)])
@pytest.mark.parametrize("hidden", [16, 2048, 7168, 16384])
def test_memory(tokens, routed, shared, top_k, hidden):
    choices = tokens * top_k
    most = config_few.most_chosen(choices, routed, shared)
    stages = config_few.up_stages(most)
    down = config_few.choose_down(hidden, MULTIPROCESSORS)
    depth = config_few.down_stages(down, most, choices)
    taken = config_few.down_shared(down, depth, most, choices) + SHARED_RESERVED
    assert down.resident * taken <= SHARED_OF_MULTIPROCESSOR
    # One of the second product beside one of the first.
    assert config_few.up_shared(stages, most) + SHARED_RESERVED + taken <= SHARED_OF_MULTIPROCESSOR
    assert depth >= 4
    assert stages >= 15
    assert down.c <= depth * config_few.TILE * 128  # C leaves through the memory of the stages


def test_choice():
    assert [config_few.choose_down(n, MULTIPROCESSORS).split for n in (2048, 4096, 7168, 16384)] == [8, 4, 2, 1]
    assert config_few.most_tokens(2048, 1408) == 4
    assert config_few.most_tokens(7168, 2048) == 2
    assert config_few.most_chosen(6, 64, 2) == 8
    assert config_few.most_chosen(64, 8, 1) == 9


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(sm_90, monkeypatch):
    """The block on Hopper, with outputs that hold NaN before; and whether these kernels ran."""
    if not sm_90:
        pytest.skip("needs sm_90")
    ran = []
    few = hopper_few.fused_experts

    def poisoned(like, shape, dtype):
        return torch.full(shape, NAN, dtype=dtype, device=like.device)

    def counted(*args):
        out = few(*args)
        ran.append(out is not None)
        return out

    monkeypatch.setattr(hopper_few, "empty", poisoned)
    monkeypatch.setattr(config_few, "most_tokens", lambda *_: config_few.OPERAND)
    blocks = {
        few: hopper.experts.operations(hopper.KINDS._replace(quantized=hopper.replace(hopper.FP8, few=few)))[0]
        for few in (counted, None)
    }

    def run(x, w13, w2, weights, experts, n_shared, quantized=None, few=counted):
        given = (None, None) if quantized is None else (quantized.data, quantized.scale)
        flat = (w13.data, w13.scale, w2.data, w2.scale, weights, experts, None, None, None, None)
        out, gate_up, _ = blocks[few](x, *flat, True, False, *given, n_shared)
        assert gate_up.shape[0] == 0
        return out, few is not None and ran.pop()

    return run


def network(tokens, hidden, inner, routed, shared, experts, device, dtype=torch.bfloat16):
    w13 = torch.randn(routed + shared, 2 * inner, hidden, device=device) * hidden**-0.5
    w2 = torch.randn(routed + shared, hidden, inner, device=device) * inner**-0.5
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    experts = torch.as_tensor(experts, device=device, dtype=torch.int32)
    weights = torch.rand(experts.shape, device=device) + 0.1
    return x, ds.quantize(w13, (128, 128)), ds.quantize(w2, (128, 128)), weights, experts


def expected(x, w13, w2, weights, experts, n_shared):
    """The reference, in fp32 on the same bytes."""
    routing = ds.Routing(weights, experts, experts, experts)
    return ds.fused_experts(x.float(), w13, w2, routing, n_shared=n_shared, impl="reference")


CASES = {
    "moonlight": (1, 2048, 1408, 64, 2, [[3, 63, 17, 0, 31, 32]]),
    "deepseek": (1, 7168, 2048, 64, 1, [[60, 2, 33, 9, 17, 48, 1, 30]]),
    "eight tokens": (
        8,
        2048,
        1408,
        64,
        2,
        torch.rand(8, 64, generator=torch.Generator().manual_seed(1)).topk(6).indices,
    ),
    "all experts": (8, 512, 256, 5, 1, torch.rand(8, 5, generator=torch.Generator().manual_seed(2)).topk(4).indices),
    "ragged": (3, 272, 144, 7, 1, [[0, 6], [6, 2], [2, 0]]),  # K of no whole blocks, columns of no whole tile
    "dropped": (4, 272, 144, 3, 1, [[0, -1], [-1, -1], [1, 99], [3, 0]]),  # 3 is the shared one's number
    "nobody": (2, 272, 144, 3, 0, [[-1, 3], [5, -7]]),
    "twice": (2, 256, 128, 4, 0, [[1, 1, 2], [3, 3, 3]]),
    "five": (5, 1024, 384, 300, 0, torch.rand(5, 300, generator=torch.Generator().manual_seed(3)).topk(8).indices),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_the_reference(run, device, case, dtype):
    tokens, hidden, inner, routed, shared, experts = CASES[case]
    args = network(tokens, hidden, inner, routed, shared, experts, device, dtype)
    got, few = run(*args, shared)
    assert few
    assert got.dtype == dtype
    want = expected(*args, shared)
    if case == "nobody":
        assert (got == 0).all()
    else:
        assert parity.difference(got.float(), want) < TOLERANCE[dtype]
        others, _ = run(*args, shared, few=None)
        assert parity.difference(got.float(), others.float()) < SAME_HIDDEN
    again, _ = run(*args, shared)
    assert torch.equal(got, again)


@pytest.mark.gpu
def test_nothing_of_other_tokens_and_experts_is_read(run, device):
    """Tokens that come quantised are taken as they are; NaN in one, or in weights that another chose, stays there."""
    x, w13, w2, weights, experts = network(4, 512, 256, 6, 0, [[0, 1], [2, 3], [0, 4], [-1, 5]], device)
    w13.data.view(torch.uint8)[3], w2.scale[3], w13.scale[5] = 0x7F, NAN, NAN
    x[2] = NAN
    quantized = ds.quantize(x)
    got, few = run(torch.full_like(x, NAN), w13, w2, weights, experts, 0, quantized)
    assert few
    assert got[1:].isnan().all()
    want = expected(x[:1], w13, w2, weights[:1], experts[:1], 0)
    assert parity.difference(got[:1].float(), want) < TOLERANCE[x.dtype]


@pytest.mark.gpu
def test_a_token_does_not_depend_on_the_others_weights(run, device):
    """Many random blocks one after the other on one stream, as a graph replays them: each launch overlaps the next."""
    for tokens in (1, 2, 3, 8):
        for seed in range(5):
            torch.manual_seed(seed)
            experts = torch.rand(tokens, 16).topk(4).indices
            args = network(tokens, 1024, 640, 16, 1, experts, device)
            outs = [run(*args, 1)[0] for _ in range(10)]
            want = expected(*args, 1)
            for out in outs:
                assert parity.difference(out.float(), want) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_what_it_leaves_to_the_others(run, device):
    args = network(9, 256, 128, 4, 0, torch.zeros(9, 1), device)
    assert not run(*args, 0)[1]  # nine tokens
    x, w13, w2, weights, experts = network(2, 256, 128, 4, 0, [[0], [1]], device)
    assert not run(x, w13, w2, weights, experts.long(), 0)[1]
    assert not run(x.float(), w13, w2, weights, experts, 0)[1]
    assert isinstance(w13, Fp8Tensor)


@pytest.mark.gpu
def test_launches_that_overlap_in_a_graph(run, device):
    """Each kernel waits for the one in front, be it another of ours, a copy or torch's: a chain of blocks, replayed."""
    x, w13, w2, weights, experts = network(2, 1024, 640, 16, 1, [[3, 9, 1, 12], [0, 9, 4, 15]], device)
    weight = torch.rand(1024, device=device, dtype=x.dtype)
    dense = ds.quantize(torch.randn(1024, 1024, device=device) * 1024**-0.5, (128, 128))
    given = torch.empty_like(x)

    def chain():
        h = given.clone()  # a copy that is no kernel
        for _ in range(4):
            quantized, h, normed = ds.rmsnorm_quantize(
                h, weight, 1e-6, ds.fp8_gemm(ds.quantize(h), dense), with_normed=True
            )
            h = h + run(normed, w13, w2, weights, experts, 1, quantized)[0]
            quantized = ds.rmsnorm_quantize(h, weight, 1e-6)
            h = h + ds.fp8_gemm(quantized, dense)
        return h

    inputs = [torch.randn_like(x) for _ in range(8)]
    want = []
    for x in inputs:
        given.copy_(x)
        want.append(chain())
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(20):
        for x, expected_out in zip(inputs, want, strict=True):
            given.copy_(x)
            graph.replay()
            assert torch.equal(out, expected_out)
