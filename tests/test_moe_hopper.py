"""The expert block on Hopper. On the CPU the same flow runs with references in place of the products of CUDA C++."""

import pytest
import torch

import dskernels as ds
from dskernels import parity
from dskernels.moe import hopper, triton, triton_sort
from dskernels.moe.packed import DIFFERENTIATED, KEPT
from dskernels.parity import moe as cases
from dskernels.reference import fused_experts as reference
from dskernels.reference import grouped_gemm, grouped_wgrad, quantize_grouped
from dskernels.types import Fp8Tensor

# See test_moe_experts.py.
BF16 = 3e-5
UNQUANTIZED = 5e-3
NAN = float("nan")
NAMES = ("out", "d x", "d w13", "d w2", "d weights", "d shared w13", "d shared w2")

LAYOUTS = {
    "ragged": (torch.tensor([[0, 2], [2, 4], [0, 4], [4, 2], [0, 2], [2, 0], [4, 0]]), 5),  # experts 1 and 3 idle
    "all to one": (torch.full((20, 1), 1), 3),
    "dropped": (torch.tensor([[0, -1], [-1, -1], [1, 99], [1, 0]]), 2),  # ids out of range; a token without any
    "one token": (torch.arange(16).view(1, 16) * 3 % 17, 17),
    "five tokens": (torch.rand(5, 16).topk(8).indices, 16),
}


@pytest.fixture
def run(sm_90, monkeypatch):
    """The implementation, with all memory that it takes poisoned."""
    if not sm_90:
        monkeypatch.setattr(hopper, "grouped", _References)
        monkeypatch.setattr(hopper, "quantize_grouped", _quantize_grouped)
        monkeypatch.setattr(hopper, "half_gemm", lambda a, b, out: out.copy_(a @ b.t()))
    for module in (hopper, triton, triton_sort):
        monkeypatch.setattr(module, "empty", poisoned)

    def run(tensors, experts, dout=None, *, fp8=False, recompute=False):
        x, w13, w2, weights, *shared = tensors
        flat = (
            [part for w in (w13, w2) for part in _flat(w)],
            [part for w in shared or (None, None) for part in _flat(w)],
        )
        block = (x, *flat[0], weights, experts, *flat[1])
        keep = (0 if recompute else KEPT) | (0 if dout is None else DIFFERENTIATED)
        out, *kept = hopper.fused_experts(*block, fp8, keep, None, None, 0)
        if dout is None:
            return [out]
        needs = [True, *(not isinstance(w, Fp8Tensor) for w in (w13, w2)), True, bool(shared), bool(shared)]
        gradients = hopper.fused_experts_backward(dout, *block, *kept, fp8, needs)
        return [out, *(g for g, needed in zip(gradients, needs, strict=True) if needed)]

    return run


def _flat(w):
    return (w.data, w.scale) if isinstance(w, Fp8Tensor) else (w, None)


def poisoned(like, shape, dtype, strides=None):
    """NaN in floats, ids far out of range in integers: what is not written must not be read."""
    strides = strides or torch.empty(shape, device="meta").stride()
    memory = like.new_empty_strided(shape, strides, dtype=dtype)
    return memory.copy_(torch.full((), NAN if dtype.is_floating_point else 1 << 28, device=like.device).to(dtype))


class _References:
    """What hopper.py calls of dskernels.grouped_gemm.hopper."""

    @staticmethod
    def grouped_gemm_out(a, a_scale, b, b_scale, offsets, out):
        if a_scale is not None:
            a, b = Fp8Tensor(a, a_scale), Fp8Tensor(b, b_scale, (128, 128))
        grouped_gemm(a, b, offsets, out=out)

    @staticmethod
    def grouped_gemm_leaving(a, a_scale, b, b_scale, offsets, out):
        rows = out.clone()
        _References.grouped_gemm_out(a, a_scale, b, b_scale, offsets, rows)
        out[: offsets[-1]] = rows[: offsets[-1]]

    @staticmethod
    def grouped_wgrad(dy, dy_scale, x, x_scale, offsets, out, accumulate):
        if dy_scale is not None:
            dy, x = Fp8Tensor(dy, dy_scale), Fp8Tensor(x, x_scale)
        out.copy_(grouped_wgrad(dy, x, offsets, accumulate=accumulate))


def _quantize_grouped(x, offsets, ue8m0, source, top_k, leave):
    x = x if source is None else x[source.long().clamp(0) // top_k]
    return quantize_grouped(x, offsets)[:2]


def network(tokens, width, hidden, experts, n_experts, device, dtype=torch.bfloat16, shared=True):
    """x, w13, w2, routing weights, the shared weights; and the experts' ids."""
    experts = torch.as_tensor(experts, device=device)
    tensors = [
        torch.randn(tokens, width, device=device, dtype=dtype),
        torch.randn(n_experts, 2 * hidden, width, device=device, dtype=dtype) * width**-0.5,
        torch.randn(n_experts, width, hidden, device=device, dtype=dtype) * hidden**-0.5,
        torch.rand(tokens, experts.shape[1], device=device),
    ]
    if shared:
        tensors.append(torch.randn(2 * hidden + 32, width, device=device, dtype=dtype) * width**-0.5)
        tensors.append(torch.randn(width, hidden + 16, device=device, dtype=dtype) * hidden**-0.5)
    return tensors, experts


def expected(tensors, experts, dout=None, **options):
    """The reference in fp32 on the same values, and its gradients."""
    tensors = [t.detach().float().requires_grad_(dout is not None) for t in tensors]
    x, w13, w2, weights, *shared = tensors
    routing = ds.Routing(weights, experts, experts, experts)
    out = reference(x, w13, w2, routing, shared=tuple(shared) or None, **options)
    return [out.detach(), *(torch.autograd.grad(out, tensors, dout.float()) if dout is not None else ())]


def compare(got, want, tolerance):
    assert len(got) == len(want)
    for name, g, w in zip(NAMES, got, want, strict=False):
        assert parity.difference(g, w) < tolerance, name


@pytest.mark.parametrize("fp8", [False, True])
def test_a_shared_expert_behind_the_routed_ones(run, device, fp8):
    experts, n_experts = LAYOUTS["dropped"]
    (x, all_w13, all_w2, weights), experts = network(
        len(experts), 272, 144, experts, n_experts + 1, device, shared=False
    )
    stacks = [ds.quantize(w, (128, 128)) if fp8 else w for w in (all_w13, all_w2)]

    def parts(which, copy):
        for w in stacks:
            data, scale = (w.data, w.scale) if fp8 else (w, None)
            data, scale = (t if t is None else t[which].clone() if copy else t[which] for t in (data, scale))
            yield Fp8Tensor(data, scale, (128, 128)) if fp8 else data

    (got,), (want,) = (
        run([x, *parts(slice(n_experts), False), weights, *parts(n_experts, copy)], experts, fp8=fp8, recompute=True)
        for copy in (False, True)
    )
    assert parity.difference(got, want) < BF16
    reference_out = expected([x, all_w13[:-1], all_w2[:-1], weights, all_w13[-1], all_w2[-1]], experts)
    compare([got], reference_out, UNQUANTIZED if fp8 else BF16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fp8", [False, True])
def test_against_fp32(run, device, layout, fp8):
    experts, n_experts = LAYOUTS[layout]
    tensors, experts = network(len(experts), 272, 144, experts, n_experts, device, shared=layout != "all to one")
    dout = torch.randn(len(experts), 272, device=device, dtype=torch.bfloat16)
    got = run(tensors, experts, dout, fp8=fp8)
    compare(got, expected(tensors, experts, dout), UNQUANTIZED if fp8 else BF16)
    assert [t.dtype for t in got] == [torch.bfloat16] * 4 + [torch.float32] + [torch.bfloat16] * (len(got) - 5)
    dropped = (experts < 0) | (experts >= n_experts)
    assert (got[4][dropped] == 0).all()
    idle = [e for e in range(n_experts) if e not in experts]
    assert (got[2][idle] == 0).all()
    assert (got[3][idle] == 0).all()
    for recompute in (False, True) if device == "cuda" else (True,):
        again = run(tensors, experts, dout, fp8=fp8, recompute=recompute)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_is_the_reference_in_e4m3(run, device):
    """In fp32 nothing but e4m3 is rounded between the products."""
    experts, n_experts = LAYOUTS["ragged"]
    tensors, experts = network(len(experts), 272, 144, experts, n_experts, device, torch.float32)
    compare(run(tensors, experts, fp8=True), expected(tensors, experts, fp8=True), cases.REQUANTIZED)


def test_quantised_weights(run, device):
    experts, n_experts = LAYOUTS["ragged"]
    (x, w13, w2, weights), experts = network(len(experts), 272, 144, experts, n_experts, device, shared=False)
    quantised = [ds.quantize(w, (128, 128)) for w in (w13, w2)]
    dout = torch.randn(len(experts), 272, device=device, dtype=torch.bfloat16)
    out, dx, dweights = run([x, *quantised, weights], experts, dout, fp8=True)
    want = expected([x, *(w.dequantize() for w in quantised), weights], experts, dout)
    compare([out, dx], want[:2], UNQUANTIZED)
    assert parity.difference(dweights, want[4]) < UNQUANTIZED


@pytest.mark.parametrize("fp8", [False, True])
def test_a_token_that_nobody_takes_is_not_read(run, device, fp8):
    experts = torch.tensor([[0, 1], [-1, -1], [1, 0]])
    tensors, experts = network(3, 272, 144, experts, 2, device, shared=False)
    dout = torch.randn(3, 272, device=device, dtype=torch.bfloat16)
    tensors[0][1], tensors[3][1], dout[1] = NAN, NAN, NAN
    out, dx, dw13, dw2, dweights = run(tensors, experts, dout, fp8=fp8)
    assert (out[1] == 0).all()
    assert (dx[1] == 0).all()
    assert (dweights[1] == 0).all()
    assert all(t.isfinite().all() for t in (out, dx, dw13, dw2, dweights))


def reason(tensors, experts, fp8):
    x, w13, w2, weights, *_ = tensors
    return hopper.fused_experts_supports(
        x, w13, None, w2, None, weights, experts, None, None, None, None, fp8, True, None, None, 0
    )


def test_what_it_does_not_take():
    experts, n_experts = LAYOUTS["ragged"]
    half, ids = network(7, 272, 144, experts, n_experts, "cpu")
    assert "nothing to multiply" in reason([half[0][:0], *half[1:]], ids[:0], True)
    assert "x is float32" in reason([t.float() for t in half], ids, False)
    assert "H = 264 and I = 144" in reason(network(7, 264, 144, experts, n_experts, "cpu")[0], ids, True)
    assert "w13 must be contiguous" in reason([half[0], half[1].mT.contiguous().mT, *half[2:]], ids, False)
    odd = torch.empty(7, 273, dtype=torch.bfloat16)[:, :272]
    assert "rows of x must be aligned" in reason([odd, *half[1:]], ids, True)
    misaligned = torch.empty(half[2].numel() + 1, dtype=torch.bfloat16)[1:].view(half[2].shape)
    assert "w2 must be contiguous and aligned" in reason([*half[:2], misaligned, *half[3:]], ids, False)


@pytest.mark.gpu
@pytest.mark.usefixtures("sm_90")
def test_is_chosen(device):
    tensors, experts = network(64, 256, 128, torch.rand(64, 16).topk(4).indices, 16, device)
    x, w13, w2, weights, *shared = tensors
    for fp8 in (False, True):
        routing = ds.Routing(weights, experts, experts, experts)
        (choice,) = ds.explain(ds.fused_experts, x, w13, w2, routing, shared=tuple(shared), fp8=fp8)
        assert choice.impl == "hopper", choice


@pytest.mark.gpu
@pytest.mark.usefixtures("sm_90")
@pytest.mark.parametrize("fp8", [False, True])
def test_peak_memory(device, fp8):
    """Of forward and backward, at most 60% of what autograd takes where every step keeps what it needs."""
    moe_peers = pytest.importorskip("benchmarks.peers.moe")
    # Weights, which both have gradients of, are small beside the rows.
    tensors, experts = network(4096, 2048, 512, torch.rand(4096, 8).topk(4).indices, 8, device, shared=False)
    x, w13, w2, weights = (t.requires_grad_() for t in tensors)
    routing = ds.Routing(weights, experts, experts, experts)
    dout = torch.randn_like(x)

    def peak(forward):
        def step():
            torch.autograd.grad(forward(), (x, w13, w2, weights), dout)

        step()  # compiles, and quantises the weights, which stay so until they change
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    straightforward = peak(moe_peers.grouped_mm_experts(x, w13, w2, routing).run)
    assert peak(lambda: ds.fused_experts(x, w13, w2, routing, fp8=fp8)) <= 0.6 * straightforward
