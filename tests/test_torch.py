"""Every public operation in torch's own machinery: compiled without a break for any number of tokens, and exported."""

import types

import pytest
import torch

import dskernels as ds
from dskernels.types import Fp8Tensor

INT = torch.int32


def offsets(rows, groups=3):
    """Groups of about as many rows each."""
    return (torch.arange(groups + 1) * rows // groups).to(INT)


def routing(tokens):
    return ds.route(torch.randn(tokens, 8), top_k=2)


def angles(tokens):
    turn = torch.randn(tokens, 4)
    return turn.cos(), turn.sin()


def paged(tokens):
    """A block table for two requests, and how long they are."""
    return torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]], dtype=INT), torch.tensor([tokens, tokens - 1], dtype=INT)


def permuted(tokens):
    return ds.permute(torch.randn(tokens, 16), routing(tokens).experts, 8)


W13, W2, W = torch.randn(8, 32, 16), torch.randn(8, 16, 16), torch.randn(24, 16)
GATE, B, CACHE = torch.randn(8, 16), torch.randn(3, 24, 16), torch.randn(8, 8, 24)
QUANTIZED = ds.quantize(torch.randn(136, 256), (128, 128))
Q_UK, KV_B, W_UV = torch.randn(2, 12, 16), torch.randn(2 * 24, 16), torch.randn(2, 128, 16)

# For each operation what is called with tokens of a size, and the inputs of a number of tokens.
TABLE = {
    "quantize": (ds.quantize, lambda t: (torch.randn(t, 200),)),
    "quantize_both": (ds.quantize_both, lambda t: (torch.randn(t, 136),)),
    "quantize_grouped": (ds.quantize_grouped, lambda t: (torch.randn(t, 136), offsets(t))),
    "rmsnorm_quantize": (
        lambda x, r: ds.rmsnorm_quantize(x, torch.ones(136), 1e-6, r),
        lambda t: (torch.randn(t, 136), torch.randn(t, 136)),
    ),
    "rmsnorm_backward": (
        lambda dy, x: ds.rmsnorm_backward(dy, x, torch.ones(136), 1e-6),
        lambda t: (torch.randn(t, 136), torch.randn(t, 136)),
    ),
    "swiglu_quantize": (ds.swiglu_quantize, lambda t: (torch.randn(t, 256),)),
    "swiglu_quantize_backward": (
        ds.swiglu_quantize_backward,
        lambda t: (torch.randn(t, 128), torch.randn(t, 256)),
    ),
    "fp8_gemm": (lambda x: ds.fp8_gemm(ds.quantize(x), QUANTIZED), lambda t: (torch.randn(t, 256),)),
    "fp8_linear": (lambda x: ds.fp8_linear(x, QUANTIZED), lambda t: (torch.randn(t, 256),)),
    "grouped_gemm": (lambda a, o: ds.grouped_gemm(a, B, o), lambda t: (torch.randn(t, 16), offsets(t))),
    "grouped_gemm_masked": (
        lambda a, counts: ds.grouped_gemm_masked(a, B, counts),
        lambda t: (torch.randn(3, t, 16), torch.tensor([t, 0, 1], dtype=INT)),
    ),
    "grouped_wgrad": (ds.grouped_wgrad, lambda t: (torch.randn(t, 24), torch.randn(t, 16), offsets(t))),
    "route": (lambda x: ds.route(x, top_k=2), lambda t: (torch.randn(t, 8),)),
    "route_hidden": (lambda x: ds.route_hidden(x, GATE, top_k=2), lambda t: (torch.randn(t, 16),)),
    "update_bias": (
        lambda x: ds.update_bias(torch.zeros(8), ds.route(x, top_k=2).load, 1e-3),
        lambda t: (torch.randn(t, 8),),
    ),
    "balance_loss": (
        lambda x, n: ds.balance_loss(x, top_k=2, alpha=1e-3, sequence_lengths=n),
        lambda t: (torch.randn(t, 8), torch.tensor([t - 2, 2], dtype=INT)),
    ),
    "load_statistics": (lambda x: ds.load_statistics(ds.route(x, top_k=2).load), lambda t: (torch.randn(t, 8),)),
    "permute": (lambda x, e: ds.permute(x, e, 8), lambda t: (torch.randn(t, 16), routing(t).experts)),
    "combine": (
        lambda y, o, i, w: ds.combine(y, ds.types.Permuted(y, o, i), w),
        lambda t: (*permuted(t), routing(t).weights),
    ),
    "fused_experts": (
        lambda x: ds.fused_experts(x, W13, W2, ds.route_hidden(x, GATE, top_k=2)[0]),
        lambda t: (torch.randn(t, 16),),
    ),
    "apply_rope": (ds.apply_rope, lambda t: (torch.randn(t, 2, 8), *angles(t))),
    "mla_decode_queries": (
        lambda q, c, s: ds.mla_decode_queries(q, Q_UK, c, s),
        lambda t: (torch.randn(t, 2, 20), *angles(t)),
    ),
    "mla_values_quantize": (lambda x: ds.mla_values_quantize(x, W_UV), lambda t: (torch.randn(t, 2, 16),)),
    "write_latent_cache": (
        lambda kv, k, c, s, slots: ds.write_latent_cache(
            kv, k, torch.ones(16), c, s, torch.zeros(8, 8, 24), slots, eps=1e-6
        ),
        lambda t: (torch.randn(t, 16), torch.randn(t, 8), *angles(t), torch.arange(t)),
    ),
    "mla_decode": (
        lambda q, table, n: ds.mla_decode(q, CACHE, table, n, scale=0.2, value_dim=16),
        lambda t: (torch.randn(2, t, 2, 24), *paged(t)),
    ),
    "mla_prefill": (
        lambda q, k, v, cu: ds.mla_prefill(q, k, v, cu, cu, scale=0.2),
        lambda t: (torch.randn(t, 2, 20), torch.randn(t, 2, 20), torch.randn(t, 2, 12), offsets(t, 2)),
    ),
    "mla_prefill_cached": (
        lambda q, table, n, cu: ds.mla_prefill_cached(q, KV_B, CACHE, table, n, cu, scale=0.2),
        lambda t: (torch.randn(t, 2, 20), *paged(t), offsets(t, 2)),
    ),
    "merge_states": (
        ds.merge_states,
        lambda t: (torch.randn(t, 2, 8), torch.randn(2, t), torch.randn(t, 2, 8), torch.randn(2, t)),
    ),
    "cross_entropy": (ds.cross_entropy, lambda t: (torch.randn(t, 32), torch.randint(0, 32, (t,)))),
    "feed_forward": (lambda x: ds.feed_forward(x, W13[0], W2[0]), lambda t: (torch.randn(t, 16),)),
}
TOOLS = {"explain", "use_impl"}
# Compiled with their gradients, for any number of tokens, in the tests of their families.
IN_FAMILIES = {
    *("quantize", "quantize_grouped", "fp8_gemm", "fp8_linear", "grouped_gemm", "grouped_gemm_masked"),
    *("grouped_wgrad", "permute", "combine", "fused_experts", "write_latent_cache", "mla_decode", "mla_prefill"),
    *("mla_prefill_cached", "merge_states", "balance_loss", "update_bias"),
}


def leaves(out):
    if isinstance(out, torch.Tensor):
        return [out]
    return [leaf for item in out if not isinstance(item, int) for leaf in leaves(item)]


def same(got, expected):
    for a, b in zip(leaves(got), leaves(expected), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_the_table_is_complete():
    functions = {name for name in ds.__all__ if isinstance(getattr(ds, name), types.FunctionType)}
    assert functions - TOOLS == TABLE.keys()


@pytest.mark.parametrize("name", [name for name in TABLE if name not in IN_FAMILIES])
def test_compiled_once_for_any_number_of_tokens(name):
    function, inputs = TABLE[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=True)
    torch.manual_seed(0)
    small, large = inputs(5), inputs(7)
    with torch.no_grad():
        same(compiled(*small), function(*small))
        with torch.compiler.set_stance("fail_on_recompile"):
            same(compiled(*large), function(*large))


@pytest.mark.parametrize("name", ["fp8_linear", "route", "fused_experts", "mla_decode", "mla_prefill", "permute"])
def test_exported(name):
    function, inputs = TABLE[name]

    class Module(torch.nn.Module):
        def forward(self, *args):
            return tuple(leaves(function(*args)))

    torch.manual_seed(0)
    x = inputs(5)
    with torch.no_grad():
        program = torch.export.export(Module(), x)
        same(program.module()(*x), function(*x))
    assert any("dskernels" in str(node.target) for node in program.graph.nodes)


def test_fp8_tensors_go_through_compiled_functions():
    """As argument, as result, and made inside: a plain named tuple."""

    @torch.compile(backend="eager", fullgraph=True, dynamic=True)
    def function(x, weight):
        quantized = ds.quantize(x)
        return quantized, Fp8Tensor(quantized.data, quantized.scale * 2), ds.fp8_gemm(quantized, weight)

    x = torch.randn(5, 256)
    quantized, doubled, product = function(x, QUANTIZED)
    assert type(quantized) is type(doubled) is Fp8Tensor
    assert torch.equal(quantized.dequantize(), ds.quantize(x).dequantize())
    assert torch.equal(doubled.scale, 2 * quantized.scale)
    assert torch.equal(product, ds.fp8_gemm(ds.quantize(x), QUANTIZED))


def test_autocast():
    """What torch computes in bf16 there is taken as it comes; gradients have the dtypes of the parameters."""
    linear = torch.nn.Linear(256, 256)
    x = torch.randn(5, 256)
    with torch.autocast("cpu", torch.bfloat16):
        y = ds.fp8_linear(linear(x), linear.weight, linear.bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert linear.weight.grad.dtype == torch.float32


def test_derivatives_that_there_are_not_raise():
    """Torch would go on as if they were zero: tangents are lost without a word, second derivatives with a warning."""
    x, weight = torch.randn(5, 256, requires_grad=True), torch.randn(128, 256)
    plain, tangent = x.detach(), torch.ones(5, 256)
    function = lambda x: ds.fp8_linear(x, weight)  # noqa: E731
    for again in range(2):
        with pytest.raises(NotImplementedError, match="x: fp8_linear has no forward-mode derivative"):
            torch.func.jvp(function, (plain,), (tangent,))
        assert torch.equal(function(plain), function(x)), again
        with torch.autograd.forward_ad.dual_level():
            assert torch.equal(function(plain), function(x))
    (once,) = torch.autograd.grad(function(x).square().sum(), x)
    (twice,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    assert torch.equal(once, twice)
    with pytest.raises(RuntimeError, match="fp8_linear: the gradient of its gradient was asked for"):
        torch.autograd.grad(twice.sum() + x.sum(), x)
    nats = ds.cross_entropy(x, torch.zeros(5, dtype=torch.int64)).sum()
    (gradient,) = torch.autograd.grad(nats, x, create_graph=True)
    with pytest.raises(RuntimeError, match="cross_entropy: the gradient of its gradient"):
        gradient.square().sum().backward()
