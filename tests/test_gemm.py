"""The e4m3 products: against fp64, against the reference, gradients, bad input, registration, compilation."""

import pytest
import torch

import dskernels as ds
from dskernels import parity
from dskernels.gemm import weights
from dskernels.gemm.weights import quantized_weight
from dskernels.parity import gemm as cases
from dskernels.parity.inputs import quantized, spread
from registering import check_registration

# calc_diff is half the squared relative error: 5e-6 for a result rounded to bf16, 1e-3 for operands rounded to e4m3.
AGAINST_DEQUANTIZED = 5e-6
AGAINST_UNQUANTIZED = 1e-3


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: f"{case.op} {case.label}")
def test_parity(case, device):
    outcome = parity.check(case, torch.device(device), "triton")
    assert outcome.passed, outcome


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 576, 512),  # one row; N is not a multiple of the block
        (7, 512, 812),  # K is not a multiple of 128, nor of 16
        (64, 130, 128),  # one block of K
        (83, 704, 256),  # ragged rows
        (130, 256, 640),  # more than one tile of the medium config
        (5, 16, 1),  # one column
    ],
)
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("magnitude", [1.0, 1e-15, 1e3])
def test_against_fp64(device, impl, m, n, k, magnitude):
    x, w = spread(0, m, k).to(device) * magnitude, spread(1, n, k).to(device)
    a, b = ds.quantize(x), ds.quantize(w, (128, 128))
    out = torch.full((m, n), float("nan"), device=device)
    ds.fp8_gemm(a, b, out=out, impl=impl)
    assert parity.difference(out, x.double() @ w.double().T) < AGAINST_UNQUANTIZED
    exact = dequantize64(a) @ dequantize64(b).T
    assert parity.difference(out, exact) < parity.E4M3_SUMS
    rounded = ds.fp8_gemm(a, b, impl=impl)
    assert rounded.dtype == torch.bfloat16
    assert parity.difference(rounded, exact) < AGAINST_DEQUANTIZED


def dequantize64(q):
    rows, cols = q.data.shape
    scale = q.scale.double().repeat_interleave(q.block[0], 0)[:rows].repeat_interleave(q.block[1], 1)[:, :cols]
    return q.data.double() * scale


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 7, 8, 64, 83, 128, 4096])
@pytest.mark.parametrize(
    ("n", "k"),
    [
        *[(2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168)],
        *[(7168, 2048), (512, 3884), (13824, 4096)],
    ],
)
def test_model_shapes(device, m, n, k):
    x, w = spread(0, m, k).to(device), spread(1, n, k).to(device)
    a, b = ds.quantize(x), ds.quantize(w, (128, 128))
    out = torch.full((m, n), float("nan"), device=device, dtype=torch.bfloat16)
    ds.fp8_gemm(a, b, out=out)
    assert parity.difference(out, a.dequantize(torch.float64) @ b.dequantize(torch.float64).T) < AGAINST_DEQUANTIZED
    for _ in range(10):
        assert torch.equal(ds.fp8_gemm(a, b), out)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_bias_and_accumulation_are_rounded_once(device, impl):
    a, b = quantized(0, 33, 256, (1, 128), device), quantized(1, 130, 256, (128, 128), device)
    bias, before = torch.randn(130, device=device), torch.randn(33, 130, device=device)
    product = ds.fp8_gemm(a, b, out_dtype=torch.float32, impl=impl)
    got = ds.fp8_gemm(a, b, bias=bias, out=before.clone(), accumulate=True, impl=impl)
    torch.testing.assert_close(got, product + bias + before)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_out_may_be_part_of_a_larger_matrix(device, impl):
    a, b = quantized(0, 5, 128, (1, 128), device), quantized(1, 64, 128, (128, 128), device)
    whole = torch.full((7, 100), 3.0, device=device)
    ds.fp8_gemm(a, b, out=whole[1:6, 10:74], impl=impl)
    assert torch.equal(whole[1:6, 10:74], ds.fp8_gemm(a, b, out_dtype=torch.float32, impl=impl))
    whole[1:6, 10:74] = 3.0
    assert (whole == 3).all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 128, 128), (3, 0, 128), (3, 128, 0)])
def test_empty(device, impl, m, n, k):
    a = ds.quantize(torch.empty(m, k, device=device))
    b = ds.quantize(torch.empty(n, k, device=device), (128, 128))
    out = ds.fp8_gemm(a, b, impl=impl)
    assert out.shape == (m, n)
    assert (out == 0).all()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_linear_gradients_are_those_of_the_dequantised_layer(weight_dtype):
    """Against fp64 products of what was quantised; each quantisation is off by about 2^-5 a value."""
    x = torch.randn(2, 70, 256, requires_grad=True)
    weight = torch.randn(130, 256, dtype=weight_dtype, requires_grad=True)
    bias = torch.randn(130, requires_grad=True)
    dy = torch.randn(2, 70, 130)
    y = ds.fp8_linear(x, weight, bias)
    y.backward(dy)
    x64, w64, dy64 = (t.detach().double().flatten(0, -2) for t in (x, weight, dy))
    want = {"y": x64 @ w64.T + bias.detach().double(), "dx": dy64 @ w64, "dw": dy64.T @ x64, "db": dy64.sum(0)}
    got = {"y": y, "dx": x.grad, "dw": weight.grad, "db": bias.grad}
    for name in want:
        assert parity.difference(got[name], want[name]) < AGAINST_UNQUANTIZED, name
    assert weight.grad.dtype == weight_dtype


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["x", "weight", "x weight bias"])
def test_linear_gradients_are_those_of_the_reference(device, impl, weight_dtype, wanted):
    """Whichever of them are wanted: the operands are quantised in other ways, to the same bytes."""
    values = {
        "x": torch.randn(37, 256, device=device),
        "weight": torch.randn(130, 256, device=device).to(weight_dtype),
        "bias": torch.randn(130, device=device),
    }
    dy = torch.randn(37, 130, device=device)

    def gradients(linear):
        inputs = {name: x.clone().requires_grad_(name in wanted.split()) for name, x in values.items()}
        y = linear(*inputs.values())
        return y, *torch.autograd.grad(y, [inputs[name] for name in wanted.split()], dy)

    got = gradients(lambda *inputs: ds.fp8_linear(*inputs, impl=impl))
    want = gradients(ds.reference.fp8_linear)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert parity.difference(a, b) < (AGAINST_DEQUANTIZED if a.dtype == torch.bfloat16 else parity.E4M3_SUMS)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_linear_with_a_quantised_weight_has_dx_only(device, impl):
    x = torch.randn(9, 256, device=device, requires_grad=True)
    weight = ds.quantize(torch.randn(130, 256, device=device), (128, 128))
    dy = torch.randn(9, 130, device=device)
    (dx,) = torch.autograd.grad(ds.fp8_linear(x, weight, impl=impl), x, dy)
    assert parity.difference(dx, dy @ weight.dequantize()) < AGAINST_UNQUANTIZED


def test_quantised_weight_is_kept_until_the_weight_changes():
    weight = torch.randn(128, 256, requires_grad=True)
    first = quantized_weight(weight, transpose=False, impl=None)
    assert quantized_weight(weight, transpose=False, impl=None).data is first.data
    transposed = quantized_weight(weight, transpose=True, impl=None)
    assert torch.equal(transposed.data.float(), first.data.float().T)
    assert quantized_weight(weight, transpose=True, impl=None).data is transposed.data
    with torch.no_grad():
        weight *= 2
    second = quantized_weight(weight, transpose=False, impl=None)
    assert torch.equal(second.scale, first.scale * 2)
    assert torch.equal(quantized_weight(weight, transpose=True, impl=None).scale, second.scale.T)
    weight.data = torch.randn(128, 256)
    assert not torch.equal(quantized_weight(weight, transpose=False, impl=None).scale, second.scale)


def test_another_tensor_of_a_weights_memory_has_its_own_copies():
    """`weight.data` has a version counter of its own, which alone moves as it is written to."""
    x, weight = torch.randn(3, 256), torch.nn.Parameter(torch.randn(128, 256))
    with torch.no_grad():
        weight *= 1  # so that the counters come to the same number below
    ds.fp8_linear(x, weight)
    data = weight.data
    ds.fp8_linear(x, data)
    data.mul_(2)
    assert data._version == weight._version
    assert torch.equal(ds.fp8_linear(x, data), ds.fp8_linear(x, data.clone()))


@pytest.mark.parametrize("first", [True, False])
def test_a_weight_that_changes_between_steps_without_its_version_moving(device, first):
    """FSDP2 gathers into the same tensor and puts the counter back; ZeRO and many a loop write to ``weight.data``."""
    x = torch.randn(3, 256, device=device, requires_grad=not first)
    weight = torch.nn.Parameter(torch.randn(128, 256, device=device))
    for _ in range(4):
        y = ds.fp8_linear(x, weight)
        assert torch.equal(y, ds.fp8_linear(x, weight.detach().clone()))
        y.sum().backward()
        weight.data.mul_(1.5)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
            weight.mul_(1.5)


def test_a_frozen_weight_that_changes_has_its_copies_where_they_were():
    """A CUDA graph that was captured reads there."""
    weight = torch.randn(128, 256)
    before = [quantized_weight(weight, transpose=transpose, impl=None) for transpose in (False, True)]
    weight.normal_()
    for old, transpose in zip(before, (False, True), strict=True):
        new, want = (
            quantized_weight(weight, transpose=transpose, impl=None),
            ds.quantize(weight, (128, 128), transpose=transpose),
        )
        assert new.data.data_ptr() == old.data.data_ptr()
        assert torch.equal(new.data.float(), want.data.float())
        assert torch.equal(new.scale, want.scale)


@pytest.mark.gpu
@torch.no_grad()
def test_a_graph_of_a_frozen_weight_that_changes():
    """It multiplies by what was quantised last, not by memory that somebody else has."""
    x, weight = torch.randn(9, 256, device="cuda").bfloat16(), torch.randn(128, 256, device="cuda").bfloat16()
    for _ in range(3):
        ds.fp8_linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ds.fp8_linear(x, weight)
    weight.normal_()
    want = ds.fp8_linear(x, weight)
    rubbish = [torch.full((n,), 0x7F, dtype=torch.uint8, device="cuda") for n in 64 * [128 * 256, 512]]
    graph.replay()
    assert torch.equal(out, want)
    del rubbish


def test_weights_whose_changes_are_counted_are_quantised_once_for_all_micro_batches():
    x, weight = torch.randn(3, 256, requires_grad=True), torch.nn.Parameter(torch.randn(128, 256))
    weights.counts_changes([weight])
    kept = quantized_weight(weight, transpose=False, impl=None)
    ds.fp8_linear(x, weight).sum().backward()
    assert quantized_weight(weight, transpose=False, impl=None).data is kept.data


def test_a_capture_has_its_own_copies_of_a_trained_weight(monkeypatch):
    """One pass for both products of a step: not what was there before, nor what another capture has made."""
    weight = torch.randn(128, 256, requires_grad=True)
    for transpose in (False, True):
        before = quantized_weight(weight, transpose=transpose, impl=None)
    copies = []
    for capture in (1, 1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(weights, "_is_capturing", lambda weight: True)
            patch.setattr(weights, "capture_id", lambda device, capture=capture: capture)
            copies.append([quantized_weight(weight, transpose=t, impl=None) for t in (False, True)])
            assert copies[-1][0].data is quantized_weight(weight, transpose=False, impl=None).data
    first, same, other = copies
    assert all(a.data is b.data for a, b in zip(first, same, strict=True))
    assert all(a.data is not b.data for a, b in zip(first, other, strict=True))
    assert torch.equal(first[1].data.float(), first[0].data.float().T)
    assert quantized_weight(weight, transpose=True, impl=None).data is before.data
    with torch.no_grad():
        weight *= 2
    quantized_weight(weight, transpose=False, impl=None)
    assert weights._captured._capture is None  # a graph's memory is let go of


def test_linear_in_inference_mode():
    with torch.inference_mode():
        weight = torch.randn(128, 256)
        assert ds.fp8_linear(torch.randn(3, 256), weight).shape == (3, 128)


A, B = quantized(0, 4, 256, (1, 128), "cpu"), quantized(1, 130, 256, (128, 128), "cpu")
X, W = torch.randn(4, 256), torch.randn(130, 256)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ds.fp8_gemm(X, B), TypeError, "a: expected an Fp8Tensor .* got Tensor"),
        (lambda: ds.fp8_gemm(B, B), ValueError, r"a: expected block \(1, 128\), got \(128, 128\)"),
        (lambda: ds.fp8_gemm(A, B._replace(block=(128, 1))), ValueError, "b: expected block"),
        (lambda: ds.fp8_gemm(A._replace(data=X), B), TypeError, "a.data: expected dtype float8_e4m3fn, got float32"),
        (
            lambda: ds.fp8_gemm(A._replace(data=A.data.view(torch.float8_e4m3fnuz)), B),
            TypeError,
            "a.data: expected dtype float8_e4m3fn, got float8_e4m3fnuz",
        ),
        (lambda: ds.fp8_gemm(A._replace(data=A.data[0]), B), ValueError, r"a.data: expected shape \[R, C\]"),
        (lambda: ds.fp8_gemm(A._replace(scale=None), B), TypeError, "a.scale: expected a torch.Tensor"),
        (lambda: ds.fp8_gemm(A._replace(scale=A.scale.double()), B), TypeError, "a.scale: expected dtype float32"),
        (lambda: ds.fp8_gemm(A._replace(scale=A.scale[:3]), B), ValueError, r"a.scale: expected shape \[4, 2\]"),
        (lambda: ds.fp8_gemm(A._replace(scale=A.scale.contiguous()), B), ValueError, "a.scale: expected the row index"),
        (lambda: ds.fp8_gemm(A._replace(scale=A.scale.to("meta")), B), ValueError, "a.scale: expected a tensor on cpu"),
        (lambda: ds.fp8_gemm(A, B._replace(scale=B.scale.T.contiguous().T)), ValueError, "b.scale: expected a contig"),
        (lambda: ds.fp8_gemm(A, B._replace(data=B.data.to("meta"))), ValueError, "b.data: expected a tensor on cpu"),
        (lambda: ds.fp8_gemm(A, quantized(1, 130, 128, (128, 128), "cpu")), ValueError, "b: expected K = 256 columns"),
        (lambda: ds.fp8_gemm(A, B, out_dtype=torch.int8), ValueError, "out_dtype: expected bfloat16 or .* got int8"),
        (lambda: ds.fp8_gemm(A, B, bias=X), ValueError, r"bias: expected shape \[130\], got \[4, 256\]"),
        (lambda: ds.fp8_gemm(A, B, bias=torch.zeros(130, dtype=torch.int)), TypeError, "bias: expected dtype"),
        (lambda: ds.fp8_gemm(A, B, accumulate=True), ValueError, "accumulate: expected `out`"),
        (lambda: ds.fp8_gemm(A, B, out=X), ValueError, r"out: expected shape \[4, 130\], got \[4, 256\]"),
        (lambda: ds.fp8_gemm(A, B, out=torch.empty(130, 4).T), ValueError, "out: expected a contiguous last dimension"),
        (lambda: ds.fp8_linear(X.double(), W), TypeError, "x: expected dtype"),
        (lambda: ds.fp8_linear(torch.tensor(1.0), W), ValueError, "x: expected at least one dimension"),
        (lambda: ds.fp8_linear(X, W[0]), ValueError, r"weight: expected shape \[N, K\]"),
        (lambda: ds.fp8_linear(X, W[:, :9]), ValueError, "weight: expected 256 columns like x, got 9"),
        (lambda: ds.fp8_linear(X, A), ValueError, r"weight: expected block \(128, 128\)"),
        (lambda: ds.fp8_linear(X, W, bias=X[0]), ValueError, r"bias: expected shape \[130\]"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_registration():
    ops = torch.ops.dskernels
    flat = (A.data, A.scale, B.data, B.scale, 128)
    check_registration(ops.fp8_gemm.default, (*flat, torch.randn(130), torch.zeros(4, 130), True))
    check_registration(ops.fp8_linear.default, (X, B.data, B.scale, None, None, None, False, False))
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    bias = torch.randn(130, requires_grad=True)
    check_registration(ops.fp8_linear.default, (x, w, None, bias, None, None, False, True))
    check_registration(ops.fp8_linear.default, (x, w, None, bias, A.data, A.scale, True, False))
    dy, x_t = torch.randn(4, 130), ds.quantize(X, (128, 1), transpose=True)
    kept = x_t.data.view(torch.uint8), x_t.scale
    check_registration(ops.fp8_linear_backward.default, (dy, X, None, None, W, None, True, True, True))
    check_registration(ops.fp8_linear_backward.default, (dy, None, *kept, W, None, False, False, True))


def test_compiles_whole():
    def layer(x, weight, bias):
        return ds.fp8_gemm(ds.quantize(x), ds.quantize(weight, (128, 128)), bias=bias), ds.fp8_linear(
            x, weight, bias
        ).sum()

    x, weight, bias = X.clone().requires_grad_(), W.clone().requires_grad_(), torch.randn(130)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    (got_product, got_loss), (want_product, want_loss) = compiled(x, weight, bias), layer(x, weight, bias)
    assert torch.equal(got_product, want_product)
    got, want = (torch.autograd.grad(loss, (x, weight)) for loss in (got_loss, want_loss))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.gpu
def test_what_is_known_to_be_valid_is_not_mistaken_for_what_is_not(device):
    a, b = quantized(0, 64, 256, (1, 128), device), quantized(1, 128, 256, (128, 128), device)
    want = ds.fp8_gemm(a, b)
    other = quantized(2, 64, 256, (1, 128), device)  # the same metadata, other addresses
    assert not torch.equal(ds.fp8_gemm(other, b), want)
    assert torch.equal(ds.fp8_gemm(a, b), want)
    with pytest.raises(ValueError, match="a: expected block"):
        ds.fp8_gemm(a._replace(block=(128, 1)), b)
    with pytest.raises(ValueError, match="b: expected block"):
        ds.fp8_gemm(a, b._replace(block=(128, 1)))
    with pytest.raises(ValueError, match=r"b\.scale: expected a tensor on cuda"):
        ds.fp8_gemm(a, b._replace(scale=b.scale.cpu()))
    with pytest.raises(ValueError, match="out_dtype: expected"):
        ds.fp8_gemm(a, b, out_dtype=torch.int8)
    with pytest.raises(ValueError, match="impl: expected one of"):
        ds.fp8_gemm(a, b, impl="best")
    assert ds.fp8_gemm(a, b, out_dtype=torch.float32).dtype == torch.float32
    assert [choice.impl for choice in ds.explain(ds.fp8_gemm, a, b)] == ["hopper"]
