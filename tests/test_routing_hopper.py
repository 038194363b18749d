"""The choice of experts in CUDA C++: compiled here, run on the GPU against the reference."""

import itertools

import pytest
import torch

import dskernels as ds
from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels import dispatch
from dskernels.parity import difference
from dskernels.reference import routing as reference
from dskernels.routing import hopper
from dskernels.routing.config import HopperConfig, choose_hopper_config, experts_a_lane

INF, NAN = float("inf"), float("nan")
SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16

# (E, k, groups, top groups, score): each path of hopper.cu.
STRUCTURES = [
    (256, 8, 8, 4, "sigmoid"),  # DeepSeek-V3: a group over four lanes
    (256, 8, 1, 1, "sigmoid"),
    (384, 8, 1, 1, "sigmoid"),  # Kimi-K2
    (160, 6, 8, 3, "softmax"),  # DeepSeek-V2: lanes of five experts, loaded one by one
    (64, 6, 1, 1, "softmax"),  # V2-Lite
    (64, 6, 1, 1, "sigmoid"),
    (2, 1, 1, 1, "sigmoid"),  # most lanes without an expert
    (2, 2, 2, 1 + 1, "softmax"),
    (7, 3, 7, 4, "sigmoid"),  # one expert a group, groups that are no power of two
    (16, 16, 4, 4, "sigmoid"),  # every expert
    (24, 6, 4, 1, "sigmoid"),  # every expert of the one group
    (33, 9, 3, 2, "softmax"),  # groups of 11 over eight lanes, the last of which have less
    (96, 32, 32, 20, "sigmoid"),  # a group a lane, the most choices
    (512, 32, 1, 1, "softmax"),  # 16 experts a lane
    (1000, 32, 40, 7, "sigmoid"),  # several groups a lane
    (1020, 9, 17, 5, "sigmoid"),  # 60 experts a lane
    (1024, 8, 1024, 700, "sigmoid"),  # 32 groups a lane
    (1024, 32, 1, 1, "sigmoid"),
    (160, 6, 8, 3, "sigmoid"),  # quick scores in lanes of five, loaded one by one
]


def options_of(n_experts, top_k, n_groups, top_groups, score, dtype=SINGLE, vector=1, **change):
    if top_groups == n_groups:
        n_groups = top_groups = 1
    config = choose_hopper_config(4096, experts_a_lane(n_experts, n_groups), 132)
    softmax = score == "softmax"
    flags = {"softmax": softmax, "normalize": True, "bias": True, **change}
    return hopper.options(config, n_experts, top_k, n_groups, top_groups, dtype=dtype, vector=vector, **flags)


def widest(n_experts, n_groups, top_groups, dtype):
    rows = torch.empty(4, n_experts, dtype=dtype)
    return hopper._vector(n_experts, 1 if top_groups == n_groups else n_groups, rows)


def test_compiles_without_spills():
    reports = []
    for structure in STRUCTURES:
        n_experts, _, n_groups, top_groups, _ = structure
        for dtype in (SINGLE, BRAIN) if n_experts in (256, 384) else (SINGLE,):
            vector = widest(n_experts, n_groups, top_groups, dtype)
            options = options_of(*structure, dtype, vector)
            reports.append(compile_cuda(hopper.SOURCE, options, 0))
    reports.append(compile_cuda(hopper.SOURCE, options_of(*STRUCTURES[0], HALF, 8, replicas=True), 0))
    reports.append(compile_cuda(hopper.SOURCE, options_of(*STRUCTURES[0], SINGLE, 4, parts=True, replicas=True), 0))
    assert_clean(reports)
    first = reports[0]
    assert first.registers <= 64  # 32 warps an SM
    # The 4th largest group and the 8th largest lane, by quick scores and by exact ones; the largest bias, the way for
    # many candidates, a sum that tells ties.
    assert first.count("REDUX") == 2 * (4 + 8) + 3
    # Two of bias; two of logits, for the first token, the next one, and that behind a token without a choice.
    assert first.count("LDG.E.128", "LDG.E.128.CONSTANT") == 2 + 3 * 2


def test_backward_compiles_without_spills():
    reports = []
    for n_experts, vector, dtype in ((256, 4, SINGLE), (256, 8, BRAIN), (1024, 4, SINGLE), (33, 1, HALF)):
        for softmax, normalize in itertools.product((False, True), repeat=2):
            options = hopper.backward_options(
                n_experts, 8, softmax=softmax, normalize=normalize, dtype=dtype, vector=vector
            )
            reports.append(compile_cuda(hopper.BACKWARD_SOURCE, options, 0))
    assert_clean(reports, max_registers=128)


def test_choice():
    assert choose_hopper_config(1, 8, 132) == HopperConfig(32, 1, warps=8, rows=8, blocks=1)
    assert choose_hopper_config(8, 8, 132).blocks == 1
    assert choose_hopper_config(128, 8, 132) == HopperConfig(32, 1, warps=5, rows=4, blocks=32)
    assert choose_hopper_config(8192, 8, 132) == HopperConfig(32, 1, warps=32, rows=63, blocks=131)
    for n_tokens in (9, 1000, 4001, 100_000):
        for width in (1, 8, 12, 64):
            config = choose_hopper_config(n_tokens, width, 132)
            assert config.warps <= min(config.most_warps, config.rows + 1)
            assert config.rows * (config.blocks - 1) < n_tokens <= config.rows * config.blocks
            assert 1 < config.blocks <= config.resident * 132
    assert [experts_a_lane(*sizes) for sizes in ((256, 8), (256, 1), (160, 8), (1000, 40), (1024, 1024), (7, 7))] == [
        *(8, 8, 5, 50, 32, 1)
    ]


def test_loads_are_as_wide_as_alignment_allows():
    x = torch.empty(8, 256)
    assert hopper._vector(256, 8, x) == 4
    assert hopper._vector(256, 8, x.bfloat16()) == 8
    assert hopper._vector(256, 8, torch.empty(8, 258)[:, :256]) == 2
    assert hopper._vector(256, 8, x, torch.empty(257)[1:]) == 1
    assert hopper._vector(160, 8, torch.empty(8, 160)) == 1
    assert hopper._row_vector(160, torch.empty(8, 160)) == 4


def test_what_it_does_not_take():
    def reason(tokens, n_experts, top_k):
        return hopper.route_supports(torch.empty(tokens, n_experts), None, top_k, 1, 1, False, True, 1.0)

    assert "there is nothing to choose" in reason(0, 8, 2)
    assert "at most 1024, got 1025" in reason(4, 1025, 2)
    assert "at most 32 of them, got 33" in reason(4, 64, 33)


def test_what_is_said_without_cupy(monkeypatch):
    """The portable kernel runs on a GPU of Hopper's then, and `explain` gives the reason; with CuPy CUDA C++ does."""
    monkeypatch.setattr(dispatch, "reason_of_device", lambda *args, **asked: None)
    logits = torch.empty(4, 64)
    calls = {
        "route": (logits, None, 8, 1, 1, False, True, 1.0),
        "route_backward": (torch.empty(4, 8), logits, torch.empty(4, 8), torch.empty(4, 8).int(), False, True, 1.0),
    }
    for installed in (False, True):
        reason = None if installed else "CUDA C++ kernels are compiled by CuPy, which is not installed"
        monkeypatch.setattr(hopper, "reason_against_cuda", lambda reason=reason: reason)
        for name, args in calls.items():
            choice = dispatch.OPERATIONS[name].choose(args, None)
            assert choice.impl == ("hopper" if installed else "triton")
            assert installed or f"not hopper: {reason}" in str(choice)


# ---- what is drawn ---------------------------------------------------------------------------------------------------

KINDS = ("plain", "large bias", "ties", "infinite", "nan")


def draw(kind, tokens, n_experts, scale, device):
    """Logits and a bias of a kind that troubles routers."""
    x = torch.randn(tokens, n_experts, device=device) * scale
    bias = torch.randn(n_experts, device=device) * 0.3
    if kind == "large bias":
        bias = torch.where(bias > 0, 12.0, -12.0)
    if kind == "ties":  # duplicated maxima inside and across groups, and rows of one value
        x = (x * 2).round() / 2
        x[::5] = 0.5
        bias = (bias * 4).round() / 4
    if kind == "infinite":
        x[torch.rand(x.shape, device=device) < 0.1] = INF
        x[torch.rand(x.shape, device=device) < 0.1] = -INF
        x[::7] = -INF
        bias[torch.rand(n_experts, device=device) < 0.05] = -INF
    if kind == "nan":
        x[torch.rand(x.shape, device=device) < 0.3 / n_experts] = NAN
    return x, bias


def gaps(x, bias, top_k, n_groups, top_groups, score):
    """How far each row is from another answer, in fp64: groups, and experts in their order."""
    s, void = reference.affinities(x.double(), score)
    choice = reference.finite((s if bias is None else s + bias.double()).masked_fill(void[:, None], 0))
    grouped = choice.unflatten(1, (n_groups, -1))
    best, _ = reference.descending(grouped)
    group_score, order = reference.descending(best[..., : 2 if score == "sigmoid" else 1].sum(-1))
    gap = torch.full(x.shape[:1], INF, dtype=torch.float64, device=x.device)
    if top_groups < n_groups:
        gap = group_score[:, top_groups - 1] - group_score[:, top_groups]
    kept = torch.zeros_like(group_score, dtype=torch.bool).scatter(1, order[:, :top_groups], True)
    ranked, _ = reference.descending(grouped.masked_fill(~kept[..., None], -INF).flatten(1))
    steps = -ranked[:, : top_k + 1].diff(dim=1)
    return torch.minimum(gap, steps.amin(1)) if steps.shape[1] else gap


def far(x, bias, top_k, n_groups, top_groups, score):
    """Rows where nothing else is within 1e-6 of being chosen, nor within what a large bias rounds off."""
    size = 0.0 if bias is None else bias.nan_to_num(nan=0, posinf=0, neginf=0).abs().max()
    gap = gaps(x, bias, top_k, n_groups, top_groups, score)
    return gap > 1e-6 + 2**-22 * size


# ---- on the GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.gpu
@pytest.mark.usefixtures("sm_90")
def test_many_random_configurations(structure):
    """600 draws of logits and bias for each structure, 11,400 in all, of 16 tokens or (every tenth) of 200.

    sigmoid is computed to the bit of torch's, so ids and loads are those of the reference whatever the gap; softmax
    differs from torch's by the order of its sum, and ids may differ where the gap is below 1e-6.
    """
    n_experts, top_k, n_groups, top_groups, score = structure
    options = dict(top_k=top_k, n_groups=n_groups, top_groups=top_groups, score=score, scale=2.5)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(600):
        tokens = 200 if i % 10 == 0 else 16
        x, bias = draw(KINDS[i % 5], tokens, n_experts, 2.0 if i % 3 else 0.1, "cuda")
        bias = bias if i % 4 else None
        got, want = ds.route(x, bias, **options, impl="hopper"), reference.route(x, bias, **options)
        differ = (got.experts != want.experts).any(1)
        if score == "softmax":
            differ &= far(x, bias, top_k, n_groups, top_groups, score)
            differ |= (got.experts < 0).any(1) | (got.experts >= n_experts).any(1)
            differ |= (got.experts.sort(1).values.diff(dim=1) == 0).any(1)
        else:
            wrong += (got.load != want.load).sum()
        wrong += differ.sum() + (got.nonfinite != want.nonfinite) + (got.load.sum() != want.load.sum())
        s, void = reference.affinities(x, score)
        if bias is not None:
            void = void | bias.isnan().any()
        gates = reference.gates(s, void, got.experts, True, 2.5)
        wrong += ((got.weights - gates).abs() > 1e-5 * gates.abs() + 1e-30).sum()
    assert wrong == 0


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF])
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 130, 4001, 40_000])
@pytest.mark.gpu
@pytest.mark.usefixtures("sm_90")
def test_any_number_of_tokens(tokens, dtype):
    x = torch.randn(tokens, 256, device="cuda").to(dtype)
    bias = torch.randn(256, device="cuda")
    options = dict(top_k=8, n_groups=8, top_groups=4)
    got, want = ds.route(x, bias, **options, impl="hopper"), reference.route(x, bias, **options)
    assert torch.equal(got.experts, want.experts)
    assert torch.equal(got.load, want.load)
    torch.testing.assert_close(got.weights, want.weights, rtol=1e-5, atol=0)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(ds.route(x, bias, **options, impl="hopper"), got, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("sm_90")
def test_a_nan_in_the_bias_leaves_no_choice():
    bias = torch.zeros(256, device="cuda")
    bias[77] = NAN
    routed = ds.route(torch.randn(500, 256, device="cuda"), bias, top_k=8, impl="hopper")
    assert routed.nonfinite == 500
    assert not routed.load.any()
    assert not routed.weights.any()
    assert (routed.experts == torch.arange(8, device="cuda")).all()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("n_experts", "dtype"), [(256, SINGLE), (160, BRAIN), (33, SINGLE), (1024, HALF), (7, SINGLE)])
@pytest.mark.gpu
@pytest.mark.usefixtures("sm_90")
def test_gradient(n_experts, dtype, normalize, score):
    x = (torch.randn(300, n_experts, device="cuda") * 2).to(dtype)
    x[3, 1], x[5] = NAN, -INF
    x[7, 2], x[9, 0] = INF, -INF
    x.requires_grad_()
    routed = ds.route(x, top_k=6, score=score, normalize=normalize, scale=2.5, impl="hopper")
    grad = torch.randn_like(routed.weights)
    grad[3] = NAN
    (got,) = torch.autograd.grad(routed.weights, x, grad)
    wide = x.detach().double().requires_grad_()
    s, void = reference.affinities(wide, score)
    weights = reference.gates(s, void, routed.experts, normalize, 2.5)
    (want,) = torch.autograd.grad(weights, wide, grad.double().nan_to_num())
    assert got.dtype == dtype
    assert got.isfinite().all()
    assert difference(got, want) < (1e-10 if dtype == SINGLE else 1e-5)
    assert not got[[3, 5]].any()
    assert not got[x.isinf()].any()


@pytest.mark.gpu
@pytest.mark.usefixtures("sm_90")
def test_graphs_side_by_side_count_right():
    """Two graphs replayed at once on two streams, beside eager calls on a third: each counts its own blocks."""
    bias = torch.zeros(256, device="cuda")
    inputs = [torch.randn(6000, 256, device="cuda") for _ in range(3)]
    want = [reference.route(x, bias, top_k=8).load for x in inputs]
    graphs, loads = [], []
    for x in inputs[:2]:
        ds.route(x, bias, top_k=8, impl="hopper")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loads.append([ds.route(x, bias, top_k=8, impl="hopper").load for _ in range(8)])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    eager = []
    for _ in range(30):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager.append(ds.route(inputs[2], bias, top_k=8, impl="hopper").load)
    torch.cuda.synchronize()
    assert all(torch.equal(load, want[i]) for i in range(2) for load in loads[i])
    assert all(torch.equal(load, want[2]) for load in eager)


@pytest.mark.gpu
@pytest.mark.usefixtures("sm_90")
def test_places():
    physical = torch.full((256, 3), -1, dtype=torch.int32, device="cuda")
    physical[:, 0] = torch.randperm(256, device="cuda")
    physical[:40, 1] = torch.arange(256, 296, device="cuda")
    physical[:9, 2] = torch.arange(296, 305, device="cuda")
    physical[17] = -1
    x = torch.randn(5000, 256, device="cuda")
    options = dict(top_k=8, n_groups=8, top_groups=4, physical=physical)
    got, want = ds.route(x, **options, impl="hopper"), reference.route(x, **options)
    assert torch.equal(got.experts, want.experts)
    assert torch.equal(got.load, want.load)


@pytest.mark.parametrize("tokens", [1, 100, 3000])
@pytest.mark.parametrize(("x_dtype", "weight_dtype"), [(BRAIN, BRAIN), (BRAIN, SINGLE), (SINGLE, SINGLE)])
@pytest.mark.gpu
@pytest.mark.usefixtures("sm_90")
def test_hidden_states(tokens, x_dtype, weight_dtype):
    x = torch.randn(tokens, 1000, device="cuda").to(x_dtype).requires_grad_()
    weight = (torch.randn(256, 1000, device="cuda") / 30).to(weight_dtype).requires_grad_()
    options = dict(top_k=8, n_groups=8, top_groups=4)
    routed, logits = ds.route_hidden(x, weight, **options, impl="hopper")
    want = x.detach().double() @ weight.detach().double().T
    assert difference(logits, want) < 1e-12
    again = ds.route(logits.detach(), **options, impl="hopper")
    assert torch.equal(routed.experts, again.experts)
    assert torch.equal(routed.load, again.load)
    assert torch.equal(routed.weights, again.weights)
    grads = torch.randn_like(routed.weights), torch.randn_like(logits)
    got = torch.autograd.grad((routed.weights, logits), (x, weight), grads)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    wide_logits = reference.gate(*wide)
    s, void = reference.affinities(wide_logits, "sigmoid")
    outputs = reference.gates(s, void, routed.experts, True, 1.0), wide_logits
    for g, w in zip(got, torch.autograd.grad(outputs, wide, [g.double() for g in grads]), strict=True):
        assert difference(g, w) < (1e-10 if g.dtype == SINGLE else 1e-5)
