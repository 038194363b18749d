"""Quantising: bytes against the reference, the reference against its definition, bad input, registration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dskernels as ds
from compiling import Compile, assert_clean, compile_all
from dskernels import parity
from dskernels.fp8.config import choose_columns, choose_patch
from dskernels.parity import fp8 as cases
from dskernels.reference import fp8 as reference
from registering import check_registration

BLOCKS = [(1, 128), (128, 128), (128, 1)]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: f"{case.op} {case.label}")
def test_parity(case, device):
    outcome = parity.check(case, torch.device(device), "triton")
    assert outcome.passed, outcome


def same_bytes(got, want):
    assert got.block == want.block
    assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))
    assert torch.equal(got.scale, want.scale)
    # One row or column makes its stride meaningless.
    assert got.scale.stride() == want.scale.stride() or 1 in got.scale.shape


@given(
    rows=st.integers(1, 140),
    cols=st.integers(1, 270),
    block=st.sampled_from(BLOCKS),
    scale_format=st.sampled_from(["fp32", "ue8m0"]),
    transpose=st.booleans(),
    exponent=st.integers(-40, 35),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_bytes_equal_the_reference(device, rows, cols, block, scale_format, transpose, exponent, dtype):
    x = (torch.randn(rows, cols) * 10.0**exponent).to(dtype).to(device)
    if dtype == torch.bfloat16:
        x = torch.where(x.abs() < 2.0**-126, 0, x)  # the interpreter reads denormal bf16 wrongly
    options = {"scale_format": scale_format, "transpose": transpose}
    same_bytes(ds.quantize(x, block, **options, impl="triton"), reference.quantize(x, block, **options))


def test_every_rounding_tie(device):
    """All midpoints between neighbouring e4m3 values, at scale 1: they go to the even one."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([448.0])])
    x = torch.nn.functional.pad(x, (0, 256 - len(x)), value=448.0).reshape(2, 128)
    x = torch.cat([x, -x]).to(device)
    x[:, -1] = 448.0
    got = ds.quantize(x, impl="triton")
    assert (got.scale == 1).all()
    assert torch.equal(got.data.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


@given(seed=st.integers(0, 2**31))
def test_quotients_next_to_a_tie(device, seed):
    """Numbers next to every place where e4m3 rounds, at random scales, go where IEEE division sends them."""
    torch.manual_seed(seed)
    scale = (torch.rand(64) + 1) * 2.0 ** torch.randint(-120, 110, (64,))
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (values[1:] + values[:-1]) / 2
    x = ties * scale[:, None]
    x = (x.view(torch.int32) + torch.randint(-2, 3, x.shape)).view(torch.float32)
    x = torch.cat([scale[:, None] * 448, torch.zeros(64, 1), x * torch.randint(0, 2, x.shape).mul(2).sub(1)], 1).to(
        device
    )
    same_bytes(ds.quantize(x, impl="triton"), reference.quantize(x))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_edges_of_the_range(device, impl):
    x = torch.zeros(6, 128, device=device)
    x[1, 3] = 1e-45  # the smallest denormal: the scale stops at 2^-126
    x[2, 3] = 3.4e38
    x[3, 3] = 448 * 2.0**-126
    x[4, 3] = float("nan")
    x[5, 3] = float("inf")
    q = ds.quantize(x, impl=impl)
    assert q.scale[:4, 0].tolist() == [1.0, 2.0**-126, float(torch.tensor(3.4e38) / 448), 2.0**-126]
    assert (q.dequantize()[0] == 0).all()
    assert q.data[2, 3].float() == 448
    assert q.dequantize()[4:].isnan().all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_ue8m0_rounds_up_to_powers_of_two(device, impl):
    amax = torch.tensor([448.0, 449.0, 447.0, 896.0, 1.0], device=device)
    scale = ds.quantize(amax[:, None], scale_format="ue8m0", impl=impl).scale[:, 0]
    assert scale.tolist() == [1.0, 2.0, 1.0, 2.0, 2.0**-8]


def test_dequantised_is_within_half_a_step():
    """e4m3 has 3 bits of mantissa: the error is at most 2^-4 of the value, or half of 2^-9 of the scale below 2^-6."""
    x = torch.randn(64, 512)
    q = ds.quantize(x)
    scale = q.scale.repeat_interleave(128, 1)
    bound = torch.maximum(x.abs() * 2.0**-4, scale * 2.0**-10) * (1 + 1e-6)
    assert ((q.dequantize() - x).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(0, 256), (5, 0), (0, 0)])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_empty(device, impl, shape):
    x = torch.empty(shape, device=device)
    for block in BLOCKS:
        assert ds.quantize(x, block, impl=impl).data.shape == shape
    rows, columns = ds.quantize_both(x, impl=impl)
    assert (rows.shape, columns.shape) == (shape, shape[::-1])


def test_a_stack_is_quantised_matrix_by_matrix(device):
    x = torch.randn(3, 130, 200, device=device)
    for impl in ("reference", "triton"):
        stacked = ds.quantize(x, (128, 128), impl=impl)
        for i in range(3):
            one = reference.quantize(x[i], (128, 128))
            assert torch.equal(stacked.data[i].view(torch.uint8), one.data.view(torch.uint8))
            assert torch.equal(stacked.scale[i], one.scale)


def test_rows_may_be_strided(device):
    x = torch.randn(40, 512, device=device)[::2, 128:400]
    same_bytes(ds.quantize(x, impl="triton"), reference.quantize(x))


X = torch.randn(4, 256)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ds.quantize([1.0]), TypeError, "x: expected a torch.Tensor, got list"),
        (lambda: ds.quantize(X.double()), TypeError, "x: expected dtype bfloat16 or float16 or float32, got float64"),
        (lambda: ds.quantize(X[0]), ValueError, r"x: expected shape \[rows, cols\], got \[256\]"),
        (lambda: ds.quantize(X.expand(2, 4, 256)), ValueError, r"x: expected shape \[rows, cols\], got \[2, 4, 256\]"),
        (lambda: ds.quantize(X.t()), ValueError, r"x: expected a contiguous last dimension, got strides \[1, 256\]"),
        (lambda: ds.quantize(X, (64, 64)), ValueError, r"block: expected \(1, 128\) or .* got \(64, 64\)"),
        (lambda: ds.quantize(X, scale_format="e8"), ValueError, "scale_format: expected 'fp32' or 'ue8m0', got 'e8'"),
        (lambda: ds.quantize_both(X.int()), TypeError, "x: expected dtype"),
        (lambda: ds.quantize_both(X, scale_format=1), ValueError, "scale_format: expected"),
        (lambda: ds.quantize_both(X, block=(128, 1)), ValueError, "block: expected"),
        (lambda: ds.swiglu_quantize(X[:, :7]), ValueError, "gate_up: expected an even number of columns"),
        (lambda: ds.swiglu_quantize(X, scale_format=""), ValueError, "scale_format: expected"),
        (lambda: ds.rmsnorm_quantize(X, X[0, :9], 1e-6), ValueError, r"weight: expected shape \[256\], got \[9\]"),
        (lambda: ds.rmsnorm_quantize(X, X[0], "1"), TypeError, "eps: expected a float, got str"),
        (lambda: ds.rmsnorm_quantize(X, X[0], 1e-6, X[:2]), ValueError, r"residual: expected shape \[4, 256\]"),
        (
            lambda: ds.rmsnorm_quantize(X, X[0], 1e-6, X.half()),
            TypeError,
            "residual: expected dtype float32, got float16",
        ),
        (lambda: ds.rmsnorm_quantize(X, X[0].to("meta"), 1e-6), ValueError, "weight: expected a tensor on cpu"),
        (lambda: ds.rmsnorm_quantize(X, X[0], 1e-6, scale_format=0), ValueError, "scale_format: expected"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("quantize", (torch.randn(5, 200), 1, 128, False, False)),
        ("quantize", (torch.randn(5, 200), 128, 1, True, True)),
        ("quantize", (torch.randn(2, 5, 200), 128, 128, False, False)),
        ("quantize_both", (torch.randn(5, 200), False)),
        ("quantize_weight", (torch.randn(2, 5, 200), True)),
        ("swiglu_quantize", (torch.randn(5, 256), False, False)),
        ("swiglu_quantize", (torch.randn(5, 256), True, True)),
        ("swiglu_quantize_backward", (torch.randn(5, 100), torch.randn(5, 200), False)),
        ("rmsnorm_quantize", (torch.randn(5, 200), torch.randn(200), 1e-6, None, False, False)),
        ("rmsnorm_quantize", (torch.randn(5, 200), torch.randn(200), 1e-6, torch.randn(5, 200), False, True)),
        ("rmsnorm_backward", (torch.randn(5, 200), torch.randn(5, 200), torch.randn(200), 1e-6, None)),
        ("rmsnorm_backward", (torch.randn(5, 200), torch.randn(5, 200), torch.randn(200), 1e-6, torch.randn(5, 200))),
    ],
)
def test_registration(op, args):
    check_registration(getattr(torch.ops.dskernels, op).default, args)


def test_compiles_whole():
    def step(x, weight):
        q, total = ds.rmsnorm_quantize(x, weight, 1e-6, x)
        rows, columns = ds.quantize_both(total)
        return q.dequantize(), rows, columns, ds.swiglu_quantize(x)

    x, weight = torch.randn(5, 256), torch.randn(256)
    want = step(x, weight)
    got = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)(x, weight)
    assert torch.equal(got[0], want[0])
    for g, w in zip(got[1:], want[1:], strict=True):
        same_bytes(g, w)


def test_kernels_compile_without_spills():
    strides = {f"stride_{name}": "i32" for name in ("xe", "xr", "qe", "qr", "se", "sr", "sc")}
    kernels = []
    for block in BLOCKS:
        patch = choose_patch(block)
        kernels += [
            Compile(
                "dskernels.fp8.triton:quantize_kernel",
                signature={"p_x": "*bf16", "p_q": "*fp8e4nv", "p_s": "*fp32", "rows": "i32", "cols": "i32", **strides},
                constants={
                    "TILE_R": block[0],
                    "TILE_C": block[1],
                    "PATCH_R": patch.rows,
                    "PATCH_C": patch.cols,
                    "UE8M0": True,
                    "TRANSPOSE": transpose,
                },
                divisible=("cols", "stride_xr", "stride_qr"),
                num_warps=patch.num_warps,
            )
            for transpose in (False, True)
        ]
    columns = choose_columns()
    kernels += [
        Compile(
            "dskernels.fp8.triton:quantize_columns_kernel",
            signature={
                **{"p_x": "*bf16", "p_q": "*fp8e4nv", "p_s": "*fp32", "p_st": "*fp32"},
                **{"p_qt": "*i32" if words else "*fp8e4nv", "rows": "i32", "cols": "i32"},
                **{f"stride_{name}": "i32" for name in ("xr", "qr", "sc", "qtr", "stc")},
            },
            constants={"UE8M0": False, "BOTH": both, "COLS": columns.cols, "WORDS": words},
            divisible=("cols", "stride_xr", "stride_qr", "stride_stc"),
            num_warps=columns.num_warps,
        )
        for both in (False, True)
        for words in (False, True)
    ]
    assert_clean(compile_all(kernels))
