"""The expert block: bad input, registration, whole graphs."""

import pytest
import torch

import dskernels as ds
from dskernels.moe.packed import KEPT
from registering import check_registration
from test_moe_experts import network

(X, W13, W2, WEIGHTS, S13, S2), EXPERTS = network(6, 24, 8, torch.randint(0, 3, (6, 2)), 3, "cpu")
ROUTING = ds.Routing(WEIGHTS, EXPERTS, EXPERTS, EXPERTS)
Q13, Q2 = (ds.quantize(w, (128, 128)) for w in (W13, W2))


def block(x=X, w13=W13, w2=W2, routing=ROUTING, **options):
    return ds.fused_experts(x, w13, w2, routing, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: block(x=None), TypeError, "x: expected a torch.Tensor, got NoneType"),
        (lambda: block(x=X.double()), TypeError, "x: expected dtype"),
        (lambda: block(x=X[None]), ValueError, r"x: expected shape \[T, H\]"),
        (lambda: block(w13=W13.bfloat16()), TypeError, "w13: expected dtype float32, got bfloat16"),
        (lambda: block(w13=W13.double(), fp8=True), TypeError, "w13: expected dtype bfloat16 or float16 or float32"),
        (lambda: block(w13=W13[0]), ValueError, r"w13: expected shape \[E, 2 \* I, H\]"),
        (lambda: block(w13=W13[:, :15]), ValueError, r"w13: expected 2 \* I rows and H = 24 columns"),
        (lambda: block(w13=W13[:, :, :23]), ValueError, r"w13: expected 2 \* I rows and H = 24 columns"),
        (lambda: block(w13=Q13._replace(block=(1, 128))), ValueError, r"w13: expected block \(128, 128\)"),
        (lambda: block(w13=Q13._replace(scale=Q13.scale[:1])), ValueError, r"w13.scale: expected shape \[3, 1, 1\]"),
        (lambda: block(w13=W13[:0], w2=W2[:0]), ValueError, "w13: number of experts: expected an int from 1 to 1024"),
        (lambda: block(w2=W2[:2]), ValueError, r"w2: expected shape \[3, 24, 8\] for w13 .* got \[2, 24, 8\]"),
        (lambda: block(w2=W2[:, :, :7].contiguous()), ValueError, r"w2: expected shape \[3, 24, 8\]"),
        (lambda: block(w2=W2.half()), TypeError, "w2: expected dtype float32"),
        (lambda: block(w2=Q2._replace(data=W2)), TypeError, "w2.data: expected dtype float8_e4m3fn"),
        (lambda: block(w2=W2.to("meta")), ValueError, "w2: expected a tensor on cpu"),
        (lambda: block(routing=(WEIGHTS, EXPERTS)), TypeError, "routing: expected a Routing .* got tuple"),
        (lambda: block(routing=ROUTING._replace(weights=WEIGHTS.half())), TypeError, "routing.weights: expected dtype"),
        (lambda: block(routing=ROUTING._replace(weights=WEIGHTS[:5])), ValueError, r"routing.weights: expected shape"),
        (
            lambda: block(routing=ROUTING._replace(experts=EXPERTS.short())),
            TypeError,
            "routing.experts: expected dtype",
        ),
        (
            lambda: block(routing=ROUTING._replace(experts=EXPERTS[:, :1])),
            ValueError,
            "routing.experts: expected shape",
        ),
        (lambda: block(shared=S13), TypeError, r"shared: expected None or a tuple \(w13, w2\), got Tensor"),
        (lambda: block(shared=(S13, S2, S2)), TypeError, "shared: expected None or a tuple"),
        (lambda: block(shared=(W13, W2)), ValueError, r"shared\[0\]: expected shape \[2 \* I, H\]"),
        (lambda: block(shared=(S13, S2[:, :9])), ValueError, r"shared\[1\]: expected shape \[24, 16\] for shared\[0\]"),
        (lambda: block(shared=(S13.half(), S2)), TypeError, r"shared\[0\]: expected dtype float32"),
        (lambda: block(n_shared=-1), ValueError, "n_shared: expected"),
        (lambda: block(n_shared=3), ValueError, "n_shared: expected fewer than the 3 experts of w13, got 3"),
        (lambda: block(n_shared=1, shared=(S13, S2)), ValueError, "n_shared: expected 0 where `shared` is given"),
        (lambda: block(quantized=X), TypeError, "quantized: expected an Fp8Tensor"),
        (lambda: block(quantized=ds.quantize(X[:3])), ValueError, r"quantized: expected the shape \[6, 24\] of x"),
        (lambda: block(impl="gpu"), ValueError, "impl: expected one of"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_registration():
    ops = torch.ops.dskernels
    tensors = [t.clone().requires_grad_() for t in (X, W13, W2, WEIGHTS, S13, S2)]
    x, w13, w2, weights, s13, s2 = tensors
    plain = (x, w13, None, w2, None, weights, EXPERTS, s13, None, s2, None)
    check_registration(ops.fused_experts.default, (*plain, False, True, None, None, 0))
    check_registration(ops.fused_experts.default, (*plain[:7], None, None, None, None, False, False, None, None, 1))
    quantized = (x, Q13.data, Q13.scale, Q2.data, Q2.scale, weights, EXPERTS, None, None, None, None)
    check_registration(ops.fused_experts.default, (*quantized, True, True, None, None, 0))
    flat = (X, W13, None, W2, None, WEIGHTS, EXPERTS, S13, None, S2, None)
    kept = (torch.randn(12, 16), torch.randn(6, 32))
    needs = [True, False, True, True, False, True]
    check_registration(ops.fused_experts_backward.default, (torch.randn(6, 24), *flat, *kept, False, needs))
    check_registration(ops.feed_forward.default, (x, s13, None, s2, None, False, KEPT, None, None))
    quantized = ds.quantize(S13.detach(), (128, 128)), ds.quantize(S2.detach(), (128, 128))
    check_registration(ops.feed_forward.default, (X, *quantized[0][:2], *quantized[1][:2], True, 0, None, None))
    network = (X, S13, None, S2, None, torch.randn(6, 32), False, [True, True, True])
    check_registration(ops.feed_forward_backward.default, (torch.randn(6, 24), *network))


def test_compiles_whole():
    def layer(x, w13, w2, weights, s13, s2):
        routing = ds.Routing(weights, EXPERTS, EXPERTS, EXPERTS)
        out = ds.fused_experts(x, w13, w2, routing, shared=(s13, s2), recompute=False)
        return out + ds.fused_experts(x, Q13, Q2, routing)

    tensors = [t.clone().requires_grad_() for t in (X, W13, W2, WEIGHTS, S13, S2)]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    got, want = compiled(*tensors), layer(*tensors)
    assert torch.equal(got, want)
    got, want = (torch.autograd.grad(out.square().sum(), tensors) for out in (got, want))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
