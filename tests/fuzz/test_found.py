"""What fuzzing has found, each once: these raised from inside, or told nothing about the argument."""

import numpy as np
import pytest
import torch

import dskernels as ds
from dskernels.gemm.weights import quantized_weight
from dskernels.types import Fp8Tensor


def operands(m=4, n=8, k=128):
    return ds.quantize(torch.randn(m, k)), ds.quantize(torch.randn(n, k), (128, 128))


@pytest.mark.parametrize("transpose", [(128,), "text", 1, None])
def test_a_flag_that_is_no_bool_is_named(transpose):
    with pytest.raises(TypeError, match="transpose: expected a bool"):
        ds.quantize(torch.randn(4, 128), transpose=transpose)
    with pytest.raises(TypeError, match="transpose: expected a bool"):
        ds.swiglu_quantize(torch.randn(4, 256), transpose=transpose)


def test_accumulate_that_is_no_bool_is_named():
    with pytest.raises(TypeError, match="accumulate: expected a bool"):
        ds.fp8_gemm(*operands(), out=torch.empty(4, 8), accumulate="yes")
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(TypeError, match="accumulate: expected a bool"):
        ds.grouped_wgrad(torch.randn(4, 8), torch.randn(4, 8), offsets, out=torch.empty(1, 8, 8), accumulate=1)


@pytest.mark.parametrize("value", [np.zeros(3), torch.zeros(3), ["fp32"], {}])
def test_a_choice_that_compares_to_nothing_is_named(value):
    with pytest.raises(ValueError, match="scale_format: expected 'fp32' or 'ue8m0'"):
        ds.quantize(torch.randn(4, 128), scale_format=value)


@pytest.mark.parametrize("block", [(1.0, 128.0), (True, 128), [1, 128], torch.tensor([1, 128])])
def test_a_block_is_a_tuple_of_ints(block):
    with pytest.raises(ValueError, match="block: expected"):
        ds.quantize(torch.randn(4, 128), block)
    a, b = operands()
    with pytest.raises(ValueError, match="a: expected block"):
        ds.fp8_gemm(Fp8Tensor(a.data, a.scale, block), b)


def test_logits_that_are_none_and_a_score_that_compares_to_nothing():
    with pytest.raises(TypeError, match=r"logits: expected a torch.Tensor, got NoneType"):
        ds.route(None, top_k=1)
    with pytest.raises(ValueError, match="score: expected 'sigmoid' or 'softmax'"):
        ds.route(torch.randn(2, 4), top_k=1, score=np.zeros(3))


def test_an_empty_stack_is_quantised_to_an_empty_one(device):
    for impl in ("reference", "triton"):
        q = ds.quantize(torch.empty(0, 130, 300, device=device), (128, 128), impl=impl)
        assert q.data.shape == (0, 130, 300)
        assert q.scale.shape == (0, 2, 3)


def test_a_stack_of_no_rows_as_it_is_documented():
    flat, b = ds.quantize(torch.empty(0, 300)), ds.quantize(torch.randn(4, 16, 300), (128, 128))
    a = Fp8Tensor(flat.data.unflatten(0, (4, 0)), flat.scale.unflatten(0, (4, 0)))
    assert ds.grouped_gemm_masked(a, b, torch.zeros(4, dtype=torch.int32)).shape == (4, 0, 16)


@pytest.mark.parametrize("shape", [(0,), (1, 3, 0), (2, 0, 0)])
def test_linear_without_columns(shape):
    assert ds.fp8_linear(torch.empty(shape), torch.empty(5, 0)).shape == (*shape[:-1], 5)


@pytest.mark.parametrize("scale", [10**400, -(10**400)])
def test_an_int_beyond_floats_is_named(scale):
    q, kv = torch.randn(2, 1, 16), torch.randn(2, 1, 16)
    cu = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="scale: expected a float"):
        ds.mla_prefill(q, kv, kv, cu, cu, scale=scale)


def test_results_are_not_written_behind_autograd():
    with pytest.raises(ValueError, match="out: expected a tensor that requires no gradient"):
        ds.fp8_gemm(*operands(), out=torch.empty(4, 8, requires_grad=True))
    x, angle = torch.randn(3, 1, 4), torch.randn(3, 2)
    with pytest.raises(ValueError, match="out: expected a tensor that requires no gradient"):
        ds.apply_rope(x, angle, angle, out=torch.empty(3, 1, 4, requires_grad=True))
    with torch.no_grad():
        ds.apply_rope(x, angle, angle, out=torch.empty(3, 1, 4, requires_grad=True))


def test_gradient_of_no_choices():
    y, weights = torch.randn(0, 8, requires_grad=True), torch.randn(3, 0, requires_grad=True)
    permuted = ds.permute(torch.randn(3, 8), torch.zeros(3, 0, dtype=torch.int32), 2)
    for impl in ("reference", "triton"):
        got = torch.autograd.grad(ds.combine(y, permuted, weights, impl=impl).sum(), (y, weights))
        assert [x.shape for x in got] == [(0, 8), (3, 0)]


@pytest.mark.parametrize("flag", ["fp8", "recompute"])
def test_flags_of_experts_are_named(flag):
    x, w13, w2 = torch.randn(2, 16), torch.randn(2, 16, 16), torch.randn(2, 16, 8)
    ids = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(TypeError, match=f"{flag}: expected a bool"):
        ds.fused_experts(x, w13, w2, ds.Routing(torch.ones(2, 1), ids, ids, ids), **{flag: torch.zeros(3)})
    with pytest.raises(TypeError, match=f"{flag}: expected a bool"):
        ds.feed_forward(x, w13[0], w2[0], **{flag: torch.zeros(3)})


def test_a_cache_does_not_come_to_depend_on_a_weight():
    kv, k_rope, angle, cache = torch.randn(2, 16), torch.randn(2, 4), torch.randn(2, 2), torch.zeros(1, 4, 20)
    weight, slots = torch.nn.Parameter(torch.ones(16)), torch.tensor([0, 1])
    for impl in ("reference", "triton", "reference"):
        ds.write_latent_cache(kv, k_rope, weight, angle, angle, cache, slots, eps=1e-6, impl=impl)
        assert not cache.requires_grad


def test_elements_of_a_result_do_not_share_memory():
    with pytest.raises(ValueError, match="out: expected elements that do not share memory"):
        ds.fp8_gemm(*operands(), out=torch.empty(1, 8).expand(4, 8))
    windows = torch.empty(11).as_strided((4, 8), (1, 1))
    with pytest.raises(ValueError, match="out: expected elements that do not share memory"):
        ds.fp8_gemm(*operands(), out=windows)
    ds.fp8_gemm(*operands(), out=torch.empty(4, 20)[:, 3:11])  # gaps are no sharing


def test_what_was_made_in_inference_mode_is_written_to_inside_it_only():
    with torch.inference_mode():
        bias, load = torch.zeros(4), torch.tensor([1, 2, 3, 4], dtype=torch.int32)
        ds.update_bias(bias, load, 0.1)
    with pytest.raises(ValueError, match="bias: expected a tensor that was not made in inference mode"):
        ds.update_bias(bias, load.clone(), 0.1)


def test_bias_of_no_experts(device):
    for impl in ("reference", "triton"):
        bias, load = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int32, device=device)
        assert ds.update_bias(bias, load, 0.1, impl=impl) is bias


def test_sparse_tensors_are_named():
    with pytest.raises(TypeError, match="x: expected a strided tensor"):
        ds.quantize(torch.eye(4).to_sparse())
    a, b = operands()
    with pytest.raises(TypeError, match=r"a.scale: expected a strided tensor"):
        ds.fp8_gemm(Fp8Tensor(a.data, a.scale.to_sparse()), b)


@pytest.mark.parametrize("cols", [300, 20000])  # whose row stays in registers, and whose does not
def test_norm_of_what_has_squares_beyond_fp32(device, cols):
    """Found on a GPU: an infinity made the portable kernel's whole row NaN, and 2e19 its row zero."""
    x, weight = torch.randn(3, cols).bfloat16().to(device), torch.randn(cols).bfloat16().to(device)
    x[0, 3], x[1, 7], x[2, 5] = 3e19, float("inf"), float("nan")
    for residual in (None, torch.randn(3, cols).bfloat16().to(device)):
        got, want = (
            ds.rmsnorm_quantize(x, weight, 1e-6, residual, with_normed=True, impl=impl)[2]
            for impl in ("triton", "reference")
        )
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
        assert want.isnan().sum(1).tolist() == [0, 1, cols]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_number_that_is_not_finite_is_named(value):
    """Of an expert of exactly the mean load the reference made NaN of such a rate, and the kernel kept its bias; by an
    infinite scale the log-sum-exp of `mla_decode` was infinite by one and NaN by the other."""
    with pytest.raises(ValueError, match="rate: expected a finite number"):
        ds.update_bias(torch.zeros(4), torch.ones(4, dtype=torch.int32), value)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="scale: expected a finite number"):
        ds.mla_decode(torch.zeros(1, 1, 2, 24), torch.zeros(1, 4, 24), table, lengths, scale=value, value_dim=16)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_an_infinite_score_is_nan_in_both_results_and_in_what_they_are_merged_into(device, impl):
    """The reference's log-sum-exp was +inf, in `merge_states` a state that saw nothing: the NaN of its out was lost."""
    q, cache = torch.ones(2, 1, 32, device=device), torch.ones(1, 4, 32, device=device)
    q[0, 0, 20], kv_b = torch.inf, torch.ones(48, 16, device=device)
    table, length, cu = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([[0]], [4], [0, 2]))
    given = {"scale": 0.2, "impl": impl}
    decoded = ds.mla_decode(q[None], cache, table, length, value_dim=16, **given)
    prefilled = ds.mla_prefill(q, cache[0, :, None], cache[0, :, None, :16], cu, 2 * cu, causal=False, **given)
    cached = ds.mla_prefill_cached(q, kv_b, cache, table, length, cu, **given)
    for out, lse in ((decoded[0][0], decoded[1][0]), prefilled, cached):
        for x, y in ((out, lse), ds.merge_states(out, lse, torch.ones_like(out), torch.zeros_like(lse), impl=impl)):
            assert [bool(z.isnan().all()) for z in (x[0], x[1], y[0, 0], y[0, 1])] == [True, False, True, False]


def test_a_copy_of_a_weight_is_of_the_implementation_that_is_asked_for(device):
    """Hopper's kernels, which do not quantise fp16, took the copy that another had made."""
    weight, x = torch.randn(144, 128, device=device, dtype=torch.half), torch.randn(32, 128, device=device).bfloat16()
    first = quantized_weight(weight, transpose=False, impl="reference")
    other = quantized_weight(weight, transpose=False, impl="triton")
    assert first.data is not other.data
    assert torch.equal(first.data.view(torch.uint8), other.data.view(torch.uint8))
    assert quantized_weight(weight, transpose=False, impl="triton").data is other.data
    with pytest.raises(ValueError, match="impl='hopper' cannot run this"):
        ds.fp8_linear(x, weight, impl="hopper")


def test_a_negative_view_is_not_written_to():
    """Torch's own error was that it expected a tensor and got None."""
    with pytest.raises(ValueError, match="out: expected a tensor that is no negative view"):
        ds.fp8_gemm(*operands(), out=torch._neg_view(torch.empty(4, 8)))
    with pytest.raises(ValueError, match="bias: expected a tensor that is no negative view"):
        ds.update_bias(torch._neg_view(torch.zeros(4)), torch.ones(4, dtype=torch.int32), 0.1)
    kv, angle, cache = torch.randn(2, 20), torch.randn(2, 2), torch._neg_view(torch.zeros(1, 4, 20))
    with pytest.raises(ValueError, match="cache: expected a tensor that is no negative view"):
        ds.write_latent_cache(
            kv[:, :16], kv[:, 16:], torch.ones(16), angle, angle, cache, torch.tensor([0, 1]), eps=1e-6
        )


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_negative_view_is_read_as_what_it_stands_for(device, impl):
    """A weight kept in e4m3 was taken for its negative's, which is the same memory."""
    x, weight = torch.randn(4, 128, device=device), torch.randn(24, 128, device=device)
    for _ in range(2):
        got = ds.fp8_linear(torch._neg_view(x), torch._neg_view(weight), impl=impl)
        assert torch.equal(got, ds.fp8_linear(-x, -weight, impl=impl))
        assert torch.equal(got, ds.fp8_linear(x, weight, impl=impl))
        assert torch.equal(got, -ds.fp8_linear(x, torch._neg_view(weight), impl=impl))


def test_what_a_gradient_needs_was_not_made_in_inference_mode():
    logits, a, b = (torch.randn(*shape, requires_grad=True) for shape in ((4, 8), (4, 16), (1, 8, 16)))
    with torch.inference_mode():
        targets, offsets = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="targets: expected a tensor that was not made in inference mode"):
        ds.cross_entropy(logits, targets)
    with pytest.raises(ValueError, match="offsets: expected a tensor that was not made in inference mode"):
        ds.grouped_gemm(a, b, offsets)
    assert torch.equal(ds.cross_entropy(logits.detach(), targets), ds.cross_entropy(logits, targets.clone()))


def test_a_dtype_that_compares_to_nothing_is_named():
    """Once `fp8_gemm` knows its operands, which on a CPU it does not ask."""
    with pytest.raises(ValueError, match="out_dtype: expected"):
        ds.fp8_gemm(*operands(), out_dtype=np.zeros(3))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_rotating_is_not_recorded(device, impl):
    """It is not differentiable; autograd saw the reference's arithmetic, and refused angles of inference mode."""
    x = torch.randn(3, 2, 4, device=device, requires_grad=True)
    with torch.inference_mode():
        cos, sin = torch.rand(3, 2, device=device), torch.rand(3, 2, device=device)
    assert not ds.apply_rope(x, cos, sin, impl=impl).requires_grad
    assert not ds.apply_rope(x, cos.clone(), sin.clone(), impl=impl).requires_grad
