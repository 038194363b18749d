"""Experts spread over ranks: the same outputs and gradients as one process, wherever the tokens go."""

import itertools

import pytest
import torch
import torch.distributed as dist
from world import case, run

import dskernels as ds
from compiling import Compile, assert_clean, compile_all
from dskernels.model.parallel.exchange import destinations, exponents, from_exponents, pack, unpack
from dskernels.model.parallel.expert import ExpertParallel
from dskernels.model.parallel.mail import Collective
from dskernels.model.parallel.triton_wire import CHOICES, COLUMNS, choices, unload
from dskernels.types import Routing

E, H, I, K = 8, 64, 32, 3


def problem(tokens, ids=None, groups=1):
    """Tokens of every rank, one list entry a rank, and weights of all experts."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    weights = dict(w13=normal(E, 2 * I, H) / 8, w2=normal(E, H, I) / 4, s13=normal(2 * I, H) / 8, s2=normal(H, I) / 4)
    ranks = []
    for n in tokens:
        logits = normal(n, E)
        chosen = ds.route(logits, top_k=K, n_groups=groups, top_groups=max(1, groups // 2)).experts
        if ids is not None:
            chosen = torch.full_like(chosen, -1)
            chosen[:, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        ranks.append((normal(n, H), torch.rand(n, K, generator=generator), chosen, normal(n, H)))
    return weights, ranks


def one_process(weights, ranks, wire):
    """Outputs, gradients of tokens and routing weights of each rank, gradients of the weights."""
    w = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    x, gates, experts, dout = (torch.cat(parts) for parts in zip(*ranks, strict=True))
    x.requires_grad_()
    gates.requires_grad_()
    travelled = x
    if wire == "fp8":  # what is rounded has the gradient of what was not
        travelled = x + (ds.quantize(x.detach(), scale_format="ue8m0").dequantize() - x.detach())
    none = experts.new_empty(0)
    out = ds.fused_experts(travelled, w["w13"], w["w2"], Routing(gates, experts, none, none))
    out = out + ds.feed_forward(x, w["s13"], w["s2"], fp8=False)
    out.backward(dout)
    sizes = [len(rank[0]) for rank in ranks]
    return [t.split(sizes) for t in (out.detach(), x.grad, gates.grad)], {name: t.grad for name, t in w.items()}


def one_rank(rank, tokens, ids, options, groups):
    weights, ranks = problem(tokens, ids, groups)
    per_rank = E // len(tokens)
    part = slice(rank * per_rank, (rank + 1) * per_rank)
    counted = ExpertParallel(dist.group.WORLD, E, **options)
    options = {"wire": options.get("wire", "same")}
    fixed = ExpertParallel(dist.group.WORLD, E, mail=Collective(dist.group.WORLD), tokens=max(*tokens, 2), **options)
    passes = []
    for compute in (counted, counted, fixed):
        w = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        x, gates, experts, dout = ranks[rank]
        x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
        none = experts.new_empty(0)
        routing = Routing(gates, experts, none, none)
        out = compute(x, w["w13"][part], w["w2"][part], routing, shared=(w["s13"], w["s2"]))
        out.backward(dout)
        for name in ("s13", "s2"):
            dist.all_reduce(w[name].grad)
        here = (w[name].grad[part] for name in ("w13", "w2"))
        passes.append([out.detach(), x.grad, gates.grad, *here, w["s13"].grad, w["s2"].grad])
    for again in passes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(passes[0], again, strict=True)), "two passes differ in their bits"
    # Without a gradient tokens are quantised before they travel, or are when they come: the same values.
    here = weights["w13"][part], weights["w2"][part]
    shared = weights["s13"], weights["s2"]
    with torch.no_grad():
        e4m3 = [compute(x, *here, routing, shared=shared, fp8=True) for compute in (counted, fixed)]
    before = counted(x.detach().requires_grad_(), *here, routing, shared=shared, fp8=True)
    assert torch.equal(*e4m3), "counted and fixed messages in e4m3 differ"
    torch.testing.assert_close(e4m3[0], before.detach(), rtol=1e-3, atol=1e-3)

    (outs, dxs, dgates), dweights = one_process(weights, ranks, options.get("wire"))
    wanted = [outs[rank], dxs[rank], dgates[rank], *(dweights[name][part] for name in ("w13", "w2"))]
    wanted += [dweights[name] for name in ("s13", "s2")]
    for have, want in zip(passes[0], wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def every_case(rank, cases):
    for name, *arguments in cases:
        with case(name):
            one_rank(rank, *arguments)


TWO = [
    ("some tokens", (5, 9), None, {}, 1),
    ("all tokens to one expert of one rank", (3, 6), [7], {}, 1),
    ("all choices dropped", (3, 4), [], {}, 1),
    ("no tokens at all", (0, 0), None, {}, 1),
    ("dispatch in fp8", (6, 5), None, {"wire": "fp8"}, 1),
]
FOUR = [
    ("a rank without tokens", (4, 0, 7, 1), None, {}, 1),
    ("ranks that no token goes to", (3, 2, 1, 4), [2, 5], {}, 1),
    ("four nodes, a token on two of them", (6, 5, 4, 3), None, {"most_ranks": 2}, 4),
]


@pytest.mark.parametrize("cases", [TWO, FOUR], ids=["2 ranks", "4 ranks"])
def test_equals_one_process(cases):
    run(len(cases[0][1]), every_case, cases)


@pytest.mark.parametrize(("n_ranks", "k"), list(itertools.product((1, 2, 4, 8), (1, 3, 6))))
def test_a_token_goes_once_to_each_rank_of_its_experts(n_ranks, k):
    experts = torch.randint(-1, 17, (50, k))
    found = destinations(experts, n_ranks, 16 // n_ranks)
    for row, ids in zip(found.ranks.tolist(), experts.tolist(), strict=True):
        wanted = {i // (16 // n_ranks) for i in ids if 0 <= i < 16}
        assert {r for r in row if r >= 0} == wanted
        assert sum(r >= 0 for r in row) == len(wanted)
    assert found.rows.tolist() == [int((found.ranks == r).sum()) for r in range(n_ranks)]


def test_node_limited_routing_bounds_the_rows():
    routing = ds.route(torch.randn(64, 16), top_k=6, n_groups=4, top_groups=2)
    found = destinations(routing.experts, 4, 4, most=2)
    assert found.ranks.shape == (64, 2)
    assert int(found.rows.sum()) == int((destinations(routing.experts, 4, 4).ranks >= 0).sum()) <= 128


def test_packed_rows_come_apart_as_they_were():
    parts = [torch.randn(3, 5).bfloat16(), torch.randint(-1, 9, (3, 7), dtype=torch.int32), torch.rand(3, 2)]
    rows = pack(*parts)
    assert rows.shape[1] % 4 == 0
    views = unpack(rows, [(part.shape[1], part.dtype) for part in parts])
    assert all(torch.equal(a, b) for a, b in zip(parts, views, strict=True))


def test_scales_travel_as_exponents_without_loss():
    x = torch.randn(7, 320) * torch.logspace(-30, 30, 7)[:, None]
    quantized = ds.quantize(x, scale_format="ue8m0")
    again = from_exponents(quantized.data, exponents(quantized), torch.float32)
    assert torch.equal(again, quantized.dequantize(torch.float32))
    assert torch.equal(again.bfloat16().float(), again)


@pytest.mark.parametrize(("rows", "columns"), [(3, 4500), (5, 300), (1, 128), (0, 256)])
def test_what_came_in_e4m3_is_what_was_sent(device, rows, columns):
    x = (torch.randn(rows, columns) * torch.logspace(-30, 30, rows)[:, None]).to(device)
    quantized = ds.quantize(x, scale_format="ue8m0", impl="reference")
    rows_apart = pack(exponents(quantized), torch.rand(rows, 3, device=device))
    scales, _ = unpack(rows_apart, [(-(-columns // 128), torch.uint8), (3, torch.float32)])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(unload(quantized.data, scales, dtype), quantized.dequantize(dtype))


@pytest.mark.parametrize(("rows", "k"), [(700, 3), (1, 8), (0, 2)])
def test_choices_of_a_rank_are_numbered_from_its_first(device, rows, k):
    weights, experts = torch.rand(rows, k, device=device), torch.randint(-1, 20, (rows, k), device=device).int()
    apart = unpack(pack(weights, experts), [(k, torch.float32), (k, torch.int32)])
    found = choices(*apart, 5, 6)
    assert torch.equal(found[0], weights)
    assert torch.equal(found[1], torch.where((experts >= 5) & (experts < 11), experts - 5, -1))
    assert all(part.is_contiguous() for part in found)


def test_kernels_of_what_came_compile_without_spills():
    kernel = "dskernels.model.parallel.triton_wire:{}_kernel"
    tokens = {"p_data": "*fp8e4nv", "p_exponents": "*u8", "p_out": "*bf16", "columns": "i32", "stride_data": "i32"}
    tokens |= {"stride_exponents": "i32"}
    pointers = {"p_weights": "*fp32", "p_experts": "*i32", "p_weights_out": "*fp32", "p_experts_out": "*i32"}
    numbers = ("size", "k", "stride_weights", "stride_experts", "first", "n")
    constants = {"CHOICES": CHOICES}
    divisible = ("columns", "stride_data")
    options = dict(targets=["sm_89", "sm_90"])
    reports = compile_all(
        [
            Compile(
                kernel.format("unload"), tokens, {"COLUMNS": COLUMNS}, num_warps=8, divisible=divisible, **options
            ),
            Compile(
                kernel.format("choices"), pointers | dict.fromkeys(numbers, "i32"), constants, num_warps=4,
                **options,
            ),
        ]
    )  # fmt: skip
    assert_clean(reports)


def test_bad_arguments_name_themselves():
    class Group:
        def size(self):
            return 3

    with pytest.raises(ValueError, match="n_experts: 3 ranks do not divide 8"):
        ExpertParallel(Group(), 8)
    with pytest.raises(ValueError, match="wire"):
        ExpertParallel(Group(), 9, wire="int4")
    with pytest.raises(ValueError, match="tokens: expected with mail"):
        ExpertParallel(Group(), 9, tokens=8)
