"""Quantising fused with SwiGLU and RMSNorm, and the gradients: kernels against the reference, that against autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dskernels as ds
from compiling import Compile, assert_clean, compile_all
from dskernels.fp8.config import choose_columns, choose_norm, choose_norm_backward, choose_patch
from dskernels.reference import fp8 as reference

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def close(got, want, *, scale_ulp=2, most_off=1e-3):
    """Scale within 2 ulp and data within a step of e4m3, of which there may be `most_off` of the elements."""
    assert got.block == want.block
    assert got.data.shape == want.data.shape
    assert got.scale.stride() == want.scale.stride() or 1 in got.scale.shape
    ulp = (got.scale.view(torch.int32) - want.scale.view(torch.int32)).abs()
    assert ulp.max() <= scale_ulp, ulp.max()
    steps = (ordinal(got.data) - ordinal(want.data)).abs()
    assert steps.max() <= 1, steps.max()
    assert (steps > 0).sum() <= max(1, most_off * steps.numel()), (steps > 0).float().mean()


def ordinal(q):
    """e4m3 values numbered from the smallest to the largest, both zeros 0."""
    byte = q.view(torch.uint8).int()
    return torch.where(byte >= 128, 128 - byte, byte)


def dtype_strategy():
    return st.sampled_from(DTYPES[:2])


# ---- SwiGLU ---------------------------------------------------------------------------------------------------------


def product(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@settings(max_examples=12)
@given(rows=st.integers(1, 150), width=st.integers(1, 150), transpose=st.booleans(), dtype=dtype_strategy())
def test_swiglu_quantize(device, rows, width, transpose, dtype):
    gate_up = (torch.randn(rows, 2 * width) * 3).to(dtype).to(device)
    got = ds.swiglu_quantize(gate_up, transpose=transpose, impl="triton")
    close(got, reference.swiglu_quantize(gate_up, transpose=transpose))


# Widths that are multiples of 128, where a tile has the gate's gradient or up's, and others, where one has both. Tiles
# of many elements: the largest is then not one whose terms all but cancel.
@settings(max_examples=10)
@given(rows=st.integers(20, 150), width=st.sampled_from([64, 100, 128, 200]), dtype=dtype_strategy())
def test_swiglu_quantize_backward(device, rows, width, dtype):
    dy, gate_up = torch.randn(rows, width).to(dtype).to(device), (torch.randn(rows, 2 * width) * 3).to(dtype).to(device)
    got = ds.swiglu_quantize_backward(dy, gate_up, impl="triton")
    for g, w in zip(got, reference.swiglu_quantize_backward(dy, gate_up), strict=True):
        close(g, w)


@pytest.mark.parametrize(("rows", "width"), [(1, 128), (3, 130), (2, 1)])
def test_swiglu_backward_of_few_tokens(device, rows, width):
    """Here one element may be all of a tile: within half a step of e4m3, and 2^-20 of its terms where these cancel."""
    dy, gate_up = torch.randn(rows, width, device=device), torch.randn(rows, 2 * width, device=device) * 3
    want = reference.swiglu_gradient(dy.double(), gate_up.double())
    terms = reference.swiglu_gradient(dy.double().abs(), gate_up.double().abs()).abs() * 4
    by_row, by_column = ds.swiglu_quantize_backward(dy, gate_up, impl="triton")
    for q, got in ((by_row, by_row.dequantize()), (by_column, by_column.dequantize().T)):
        step = torch.maximum(want.abs() * 2.0**-4, q.scale.max() * 2.0**-10)
        assert ((got - want).abs() <= step * 1.001 + 2.0**-20 * terms).all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_swiglu_backward_in_powers_of_two(device, impl):
    dy, gate_up = torch.randn(130, 128, device=device), torch.randn(130, 256, device=device)
    for q in ds.swiglu_quantize_backward(dy, gate_up, scale_format="ue8m0", impl=impl):
        assert torch.equal(q.scale, q.scale.log2().round().exp2())


def test_gradient_of_swiglu_is_autograds():
    dy = torch.randn(7, 96, dtype=torch.float64)
    gate_up = (torch.randn(7, 192, dtype=torch.float64) * 3).requires_grad_()
    (want,) = torch.autograd.grad(product(gate_up), gate_up, dy)
    torch.testing.assert_close(reference.swiglu_gradient(dy, gate_up.detach()), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reference.swiglu(gate_up), product(gate_up), rtol=1e-14, atol=0)


def test_gate_far_from_zero(device):
    """Beyond +-88, exp(-gate) is infinite or 0: the product is the gate's or nothing, and never NaN."""
    gate_up = torch.tensor([[-1e4, -100.0, -88.8, 88.8, 100.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]], device=device)
    want = torch.tensor([[0.0, 0.0, 0.0, 88.8, 100.0, 1e4]], device=device)
    torch.testing.assert_close(ds.swiglu_quantize(gate_up, impl="triton").dequantize(), want, rtol=2**-4, atol=1e-30)
    rows, columns = ds.swiglu_quantize_backward(torch.ones(1, 6, device=device), gate_up, impl="triton")
    want = torch.tensor([[0.0, 0, 0, 1, 1, 1, 0, 0, 0, 88.8, 100, 1e4]], device=device)
    torch.testing.assert_close(columns.dequantize().T, want, rtol=2**-4, atol=1e-30)
    assert not rows.dequantize().isnan().any()


# ---- RMSNorm --------------------------------------------------------------------------------------------------------


# Rows of up to 16,384 columns stay in registers forwards, and of up to 8,192 backwards.
@settings(max_examples=15)
@given(
    rows=st.integers(1, 9),
    cols=st.sampled_from([1, 7, 128, 200, 576, 16385]),
    residual=st.booleans(),
    with_normed=st.booleans(),
    dtype=dtype_strategy(),
)
def test_rmsnorm_quantize(device, rows, cols, residual, with_normed, dtype):
    x, weight = torch.randn(rows, cols).to(dtype).to(device), torch.randn(cols).to(dtype).to(device)
    stream = torch.randn(rows, cols).to(dtype).to(device) if residual else None
    got = ds.rmsnorm_quantize(x, weight, EPS, stream, with_normed=with_normed, impl="triton")
    want = reference.rmsnorm_quantize(x, weight, EPS, stream, with_normed=with_normed)
    if with_normed:
        assert got[2].dtype == dtype
        torch.testing.assert_close(got[2], want[2])
        assert residual or got[1] is x
    if residual or with_normed:
        assert torch.equal(got[1], want[1])
        got, want = got[0], want[0]
    close(got, want)


@settings(max_examples=15)
@given(
    rows=st.integers(1, 9),
    cols=st.sampled_from([1, 7, 128, 200, 576, 8193]),
    residual=st.booleans(),
    dtype=dtype_strategy(),
    weight_dtype=dtype_strategy(),
)
def test_rmsnorm_backward(device, rows, cols, residual, dtype, weight_dtype):
    x, dy = (torch.randn(rows, cols).to(dtype).to(device) for _ in range(2))
    weight = torch.randn(cols).to(weight_dtype).to(device)
    dresidual = torch.randn(rows, cols).to(dtype).to(device) if residual else None
    got = ds.rmsnorm_backward(dy, x, weight, EPS, dresidual, impl="triton")
    check_rmsnorm_backward(got, dy, x, weight, dresidual)


def check_rmsnorm_backward(got, dy, x, weight, dresidual):
    """Within the rounding of the result, and of fp32 sums whose terms are as large as in the fp64 reference."""
    wide = [t if t is None else t.double() for t in (dy, x, weight, dresidual)]
    dx, dweight = reference.rmsnorm_backward(wide[0], wide[1], wide[2], EPS, wide[3])
    assert [g.dtype for g in got] == [x.dtype, weight.dtype]
    r = torch.rsqrt(wide[1].square().mean(-1, keepdim=True) + EPS)
    n, g = wide[1] * r, wide[0] * wide[2]
    # Each term of dx carries a few roundings of 2^-24, the mean sqrt(columns) more at the utmost.
    terms = r * (g.abs() + n.abs() * (g * n).abs().mean(-1, keepdim=True)) + (0 if dresidual is None else wide[3].abs())
    bound = 2.0**-20 * terms + torch.finfo(x.dtype).eps * dx.abs() + torch.finfo(x.dtype).tiny
    assert ((got[0] - dx).abs() <= bound).all()
    bound = 2.0**-20 * (wide[0] * n).abs().sum(0) + torch.finfo(weight.dtype).eps * dweight.abs()
    assert ((got[1] - dweight).abs() <= bound + torch.finfo(weight.dtype).tiny).all()


@pytest.mark.parametrize("stream", [False, True])
def test_gradient_of_rmsnorm_is_autograds(stream):
    dy, dresidual = (torch.randn(7, 96, dtype=torch.float64) for _ in range(2))
    x = torch.randn(7, 96, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(96, dtype=torch.float64, requires_grad=True)
    outputs, gradients = [reference.rmsnorm(x, weight, EPS)], [dy]
    if stream:  # the stream itself goes on, past the norm
        outputs.append(x)
        gradients.append(dresidual)
    want = torch.autograd.grad(outputs, [x, weight], gradients)
    got = reference.rmsnorm_backward(dy, x.detach(), weight.detach(), EPS, dresidual if stream else None)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_norm_configs():
    assert choose_norm(7168).whole
    assert choose_norm(7168).tiles == 64
    assert choose_norm(16384).whole
    assert not choose_norm(16385).whole
    assert choose_norm(1).tiles == 1
    assert choose_norm_backward(7168).block == 8192
    assert not choose_norm_backward(8193).whole
    assert choose_norm_backward(1).block == 128


# ---- what all of them promise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(("rows", "width"), [(0, 128), (5, 0)])
def test_empty(device, impl, rows, width):
    gate_up, dy = torch.empty(rows, 2 * width, device=device), torch.empty(rows, width, device=device)
    assert ds.swiglu_quantize(gate_up, impl=impl).shape == (rows, width)
    assert ds.swiglu_quantize(gate_up, transpose=True, impl=impl).shape == (width, rows)
    by_row, by_column = ds.swiglu_quantize_backward(dy, gate_up, impl=impl)
    assert (by_row.shape, by_column.shape) == ((rows, 2 * width), (2 * width, rows))
    weight = torch.ones(width, device=device)
    assert ds.rmsnorm_quantize(dy, weight, EPS, impl=impl).shape == (rows, width)
    dx, dweight = ds.rmsnorm_backward(dy, dy, weight, EPS, impl=impl)
    assert dx.shape == dy.shape
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_rows_may_be_strided(device):
    x = torch.randn(40, 640, device=device)[::2]
    dy, gate_up = x[:, 8:136], x[:, 200:456]
    for g, w in zip(
        ds.swiglu_quantize_backward(dy, gate_up, impl="triton"),
        reference.swiglu_quantize_backward(dy, gate_up),
        strict=True,
    ):
        close(g, w)
    close(
        ds.swiglu_quantize(gate_up, transpose=True, impl="triton"), reference.swiglu_quantize(gate_up, transpose=True)
    )
    weight = torch.randn(128, device=device)
    got = ds.rmsnorm_backward(dy, gate_up[:, :128], weight, EPS, gate_up[:, 128:], impl="triton")
    check_rmsnorm_backward(got, dy, gate_up[:, :128], weight, gate_up[:, 128:])


X = torch.randn(4, 256)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ds.swiglu_quantize(X[:, :7]), ValueError, "gate_up: expected an even number of columns"),
        (lambda: ds.swiglu_quantize(X, scale_format=""), ValueError, "scale_format: expected"),
        (lambda: ds.swiglu_quantize_backward(X, X), ValueError, r"dy: expected shape \[4, 128\], got \[4, 256\]"),
        (lambda: ds.swiglu_quantize_backward(X[:, :3], X[:, :7]), ValueError, "gate_up: expected an even number"),
        (lambda: ds.swiglu_quantize_backward(X[:, :128].int(), X), TypeError, "dy: expected dtype"),
        (lambda: ds.swiglu_quantize_backward(X[:, :128].to("meta"), X), ValueError, "dy: expected a tensor on cpu"),
        (lambda: ds.swiglu_quantize_backward(X[:, :128], X, scale_format=0), ValueError, "scale_format: expected"),
        (
            lambda: ds.rmsnorm_backward(X[:2], X, X[0], EPS),
            ValueError,
            r"dy: expected shape \[4, 256\], got \[2, 256\]",
        ),
        (lambda: ds.rmsnorm_backward(X, X.t(), X[0], EPS), ValueError, "x: expected a contiguous last dimension"),
        (lambda: ds.rmsnorm_backward(X, X.double(), X[0], EPS), TypeError, "x: expected dtype"),
        (lambda: ds.rmsnorm_backward(X, X, X[0, :9], EPS), ValueError, r"weight: expected shape \[256\], got \[9\]"),
        (lambda: ds.rmsnorm_backward(X, X, X[0], None), TypeError, "eps: expected a float, got NoneType"),
        (lambda: ds.rmsnorm_backward(X, X, X[0], EPS, X[:2]), ValueError, r"dresidual: expected shape \[4, 256\]"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_kernels_compile_without_spills():
    columns, patch = choose_columns(operands=2), choose_patch((1, 128))
    both = {"p_q": "*fp8e4nv", "p_s": "*fp32", "p_st": "*fp32"}
    sizes = {"rows": "i32", "cols": "i32"}
    turned = [("*i32", True), ("*fp8e4nv", False)]
    kernels = [
        Compile(
            "dskernels.fp8.triton_swiglu:swiglu_quantize_kernel",
            signature={**{"p_x": "*bf16", "p_q": "*fp8e4nv", "p_s": "*fp32"}, **sizes, **strides("xr", "qr", "sc")},
            constants={"UE8M0": False, "PATCH_R": patch.rows},
            divisible=("cols", "stride_xr", "stride_qr"),
            num_warps=patch.num_warps,
        )
    ]
    for type_, words in turned:
        kernels += [
            Compile(
                "dskernels.fp8.triton_swiglu:swiglu_quantize_columns_kernel",
                signature={"p_x": "*bf16", "p_qt": type_, "p_st": "*fp32", **sizes, **strides("xr", "qtr", "stc")},
                constants={"UE8M0": False, "COLS": columns.cols, "WORDS": words},
                divisible=("cols", "stride_xr", "stride_stc"),
                targets=("sm_89", "sm_90", "sm_100"),  # e4m3 all the same, in words
                num_warps=columns.num_warps,
            ),
            *(
                Compile(
                    "dskernels.fp8.triton_swiglu:swiglu_quantize_backward_kernel",
                    signature={
                        **{"p_dy": "*bf16", "p_x": "*bf16", "p_qt": type_, **both, **sizes},
                        **strides("dyr", "xr", "qr", "sc", "qtr", "stc"),
                    },
                    constants={"UE8M0": False, "ALIGNED": aligned, "COLS": columns.cols, "WORDS": words},
                    divisible=("cols", "stride_xr", "stride_dyr", "stride_qr", "stride_stc"),
                    num_warps=choose_columns(operands=3).num_warps,
                )
                for aligned in (False, True)
            ),
        ]
    for cols in (128, 2048, 7168, 16384, 20000):
        norm, backward = choose_norm(cols), choose_norm_backward(cols)
        pointers = {"p_x": "*bf16", "p_weight": "*bf16", "cols": "i32", "eps": "fp32"}
        name = "rmsnorm_backward_kernel" if backward.whole else "rmsnorm_backward_wide_kernel"
        kernels += [
            Compile(
                "dskernels.fp8.triton_norm:rmsnorm_quantize_kernel",
                signature={
                    **{"p_residual": "*bf16", "p_total": "*bf16", "p_normed": "*bf16"},
                    **{"p_q": "*fp8e4nv", "p_s": "*fp32"},
                    **{**pointers, **strides("xr", "rr", "tr", "nr", "qr", "sc")},
                },
                constants={
                    **{"UE8M0": False, "HAS_RESIDUAL": True, "NORMED": True},
                    **{"TILES": norm.tiles, "WHOLE": norm.whole},
                },
                divisible=("cols", "stride_xr", "stride_rr", "stride_tr", "stride_nr", "stride_qr"),
                num_warps=norm.num_warps,
            ),
            Compile(
                f"dskernels.fp8.triton_norm:{name}",
                signature={
                    **{"p_dy": "*bf16", "p_dresidual": "*bf16", "p_dx": "*bf16", "p_partial": "*fp32"},
                    **{**pointers, "rows": "i32", "programs": "i32", **strides("dyr", "xr", "rr", "dxr")},
                },
                constants={"HAS_RESIDUAL": True, "BLOCK": backward.block},
                divisible=("cols", "stride_dyr", "stride_xr", "stride_rr", "stride_dxr"),
                num_warps=backward.num_warps,
            ),
        ]
    kernels.append(
        Compile(
            "dskernels.fp8.triton_norm:sum_parts_kernel",
            signature={"p_partial": "*fp32", "p_out": "*bf16", "parts": "i32", "cols": "i32"},
            constants={"PARTS": 64, "COLS": 32},
            divisible=("cols",),
        )
    )
    assert_clean(compile_all(kernels))


def strides(*names):
    return {f"stride_{name}": "i32" for name in names}


# ---- on a GPU, at the model's own sizes -----------------------------------------------------------------------------


def poisoned(device):
    """Free memory full of NaN, for the outputs that are made next."""
    del [torch.full((1 << 26,), 0xFF, dtype=torch.uint8, device=device) for _ in range(4)][:]


def bytes_of(result):
    tensors = [t for part in result for t in (part[:2] if isinstance(part, ds.Fp8Tensor) else [part])]
    return [t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in tensors]


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width"), [(4096, 2048), (1000, 2048), (4096, 7168), (83, 18432)])
def test_swiglu_at_model_sizes(device, rows, width):
    dy = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    gate_up = torch.randn(rows, 2 * width, device=device, dtype=torch.bfloat16) * 3
    for transpose in (False, True):
        poisoned(device)
        got = ds.swiglu_quantize(gate_up, transpose=transpose)
        close(got, reference.swiglu_quantize(gate_up, transpose=transpose))
        for _ in range(10):
            again = ds.swiglu_quantize(gate_up, transpose=transpose)
            assert all(map(torch.equal, bytes_of([again]), bytes_of([got])))
    poisoned(device)
    got = ds.swiglu_quantize_backward(dy, gate_up)
    for g, w in zip(got, reference.swiglu_quantize_backward(dy, gate_up), strict=True):
        close(g, w)
    for _ in range(10):
        assert all(map(torch.equal, bytes_of(ds.swiglu_quantize_backward(dy, gate_up)), bytes_of(got)))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "cols"), [(4096, 7168), (1000, 1536), (83, 512), (4096, 16384)])
@pytest.mark.parametrize("residual", [False, True])
def test_rmsnorm_at_model_sizes(device, rows, cols, residual):
    x, dy, stream = (torch.randn(rows, cols, device=device, dtype=torch.bfloat16) for _ in range(3))
    weight = torch.randn(cols, device=device, dtype=torch.bfloat16)
    stream = stream if residual else None
    poisoned(device)
    got = ds.rmsnorm_quantize(x, weight, EPS, stream)
    want = reference.rmsnorm_quantize(x, weight, EPS, stream)
    if residual:
        assert torch.equal(got[1], want[1])
        got, want = got[0], want[0]
    close(got, want)
    poisoned(device)
    gradients = ds.rmsnorm_backward(dy, x, weight, EPS, stream)
    check_rmsnorm_backward(gradients, dy, x, weight, stream)
    for _ in range(10):
        assert all(map(torch.equal, ds.rmsnorm_backward(dy, x, weight, EPS, stream), gradients))


@pytest.mark.gpu
def test_captured_in_a_graph(device):
    x, dy = (torch.randn(256, 512, device=device, dtype=torch.bfloat16) for _ in range(2))
    gate_up, weight = torch.cat([x, dy], 1), torch.ones(512, device=device, dtype=torch.bfloat16)

    def step():
        return [
            ds.swiglu_quantize(gate_up, transpose=True),
            *ds.swiglu_quantize_backward(dy, gate_up),
            *ds.rmsnorm_quantize(x, weight, EPS, dy),
            *ds.rmsnorm_backward(dy, x, weight, EPS),
            *ds.quantize_both(x),
        ]

    want = bytes_of(step())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = bytes_of(step())
    for tensor in captured:
        tensor.fill_(0)
    graph.replay()
    assert all(map(torch.equal, captured, want))
