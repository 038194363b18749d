"""The expert block for a few tokens in weights that are not quantised: two portable launches, against the reference."""

import pytest
import torch

import dskernels as ds
from compiling import Compile, assert_clean, compile_all
from dskernels.moe import triton_few
from dskernels.moe.config_matvec import MOST_TOKENS, choose_matvec, power_of_two
from dskernels.types import Routing

BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def ran(monkeypatch):
    """Whether these kernels took each call."""
    calls, original = [], triton_few.fused_experts

    def counted(*args):
        out = original(*args)
        calls.append(out is not None)
        return out

    for steps in _steps():
        monkeypatch.setitem(vars(steps), "few", counted)
    return calls


def _steps():
    from dskernels.moe import triton_experts

    return [triton_experts.KINDS.plain]


def block(tokens, hidden, inner, experts, k, n_shared=0, inner_shared=0, dtype=torch.float32, device="cpu"):
    torch.manual_seed(tokens * hidden + inner)

    def draw(*shape):
        return (torch.randn(*shape) * shape[-1] ** -0.5).to(device, dtype)

    x = torch.randn(tokens, hidden).to(device, dtype)
    ids = torch.randint(0, experts - n_shared, (tokens, k), dtype=torch.int32, device=device)
    routing = Routing(torch.rand(tokens, k, device=device), ids, ids, ids)
    shared = (draw(2 * inner_shared, hidden), draw(hidden, inner_shared)) if inner_shared else None
    weights = draw(experts, 2 * inner, hidden), draw(experts, hidden, inner)
    return (x, *weights, routing), {"shared": shared, "n_shared": n_shared}


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "experts", "k", "n_shared", "inner_shared"),
    [
        (1, 128, 128, 16, 2, 0, 128),  # the demo's
        (3, 72, 40, 6, 3, 0, 56),  # ragged, a shared network of its own width
        (4, 64, 24, 9, 3, 2, 0),  # shared experts in the stack
        (2, 300, 520, 5, 2, 0, 0),  # more than a block along K in both products
        (8, 16, 16, 300, 1, 0, 0),
    ],
)
def test_block(tokens, hidden, inner, experts, k, n_shared, inner_shared, dtype, device, ran):
    args, options = block(tokens, hidden, inner, experts, k, n_shared, inner_shared, dtype, device)
    with torch.no_grad():
        got = ds.fused_experts(*args, **options, impl="triton")
        expected = ds.fused_experts(*args, **options, impl="reference")
    assert ran == [True]
    torch.testing.assert_close(got.float(), expected.float(), rtol=BOUND[dtype], atol=BOUND[dtype])


@torch.no_grad()
def test_dropped_choices(device, ran):
    """Ids that are no expert's, below and beyond, give nothing; a token without any is what the shared network says."""
    (x, w13, w2, routing), options = block(3, 32, 16, 4, 2, inner_shared=16, device=device)
    ids = torch.tensor([[-1, 1], [4, 1 << 30], [0, -(1 << 31)]], dtype=torch.int32, device=device)
    routing = routing._replace(experts=ids)
    got = ds.fused_experts(x, w13, w2, routing, **options, impl="triton")
    expected = ds.fused_experts(x, w13, w2, routing, **options, impl="reference")
    assert ran == [True]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_token_is_the_same_in_any_company(device, ran):
    args, options = block(4, 64, 40, 6, 2, inner_shared=24, device=device)
    x, w13, w2, routing = args
    together = ds.fused_experts(*args, **options, impl="triton")
    for i in range(4):
        alone = Routing(
            *(part[i : i + 1] for part in (routing.weights, routing.experts, routing.experts, routing.experts))
        )
        assert torch.equal(
            ds.fused_experts(x[i : i + 1], w13, w2, alone, **options, impl="triton"), together[i : i + 1]
        )
    assert all(ran)


@torch.no_grad()
def test_more_tokens_are_not_for_them(device, ran):
    args, options = block(MOST_TOKENS + 1, 16, 16, 4, 2, device=device)
    ds.fused_experts(*args, **options, impl="triton")
    assert ran == [False]


def test_choice():
    assert [power_of_two(n) for n in (0, 1, 2, 3, 8, 9)] == [1, 1, 2, 4, 8, 16]
    for columns in (1, 16, 100, 256, 300, 7168):
        config = choose_matvec(columns)
        assert config.columns & (config.columns - 1) == 0
        assert 16 <= config.columns <= 512
        assert config.rows * config.columns <= 4096


def test_kernels_compile_without_spills():
    module = "dskernels.moe.triton_few"
    counts = ("top_k", "n_experts", "n_shared", "H", "inner", "inner_shared")
    strides = ("stride_we", "stride_wn", "stride_sn", "stride_ids", "stride_hidden")
    kernels = []
    for columns in (128, 7168):
        config = choose_matvec(columns)
        up = {"p_x": "*bf16", "p_w13": "*bf16", "p_shared": "*bf16", "p_experts": "*i32", "p_hidden": "*bf16"}
        numbers = dict.fromkeys((*counts, *strides), "i32")
        tile = {"BLOCK": config.rows, "PROGRAMMATIC": False}
        divisible = ("H", "inner", "stride_we", "stride_wn", "stride_sn", "stride_hidden")
        kernels.append(
            Compile(
                f"{module}:few_up_kernel",
                {**up, **numbers, "stride_x": "i32"},
                {**tile, "BLOCK_K": config.columns},
                divisible=divisible,
            )
        )
        down = {"p_hidden": "*bf16", "p_w2": "*bf16", "p_shared": "*bf16", "p_experts": "*i32", "p_out": "*bf16"}
        rest = {"p_weights": "*fp32", "stride_weights": "i32", "stride_out": "i32"}
        kernels.append(
            Compile(
                f"{module}:few_down_kernel",
                {**down, **rest, **numbers},
                {**tile, "CHOICES": 8, "BLOCK_K": config.columns // 8},
                divisible=divisible,
            )
        )
    # A network of one column: a launch turns an integer that is 1 into a constant.
    one = {
        key: kind for key, kind in {**up, **numbers, "stride_x": "i32"}.items() if key not in ("inner", "inner_shared")
    }
    ones = {**tile, "BLOCK_K": 16, "inner": 1, "inner_shared": 1}
    kernels.append(
        Compile(f"{module}:few_up_kernel", one, ones, divisible=("H", "stride_we", "stride_wn"), targets=("sm_90",))
    )
    assert_clean(compile_all(kernels), max_registers=255)
