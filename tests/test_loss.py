"""Cross entropy and its gradient, against fp64; rows that are left out; bad input; registration; compilation."""

import pytest
import torch
import torch.nn.functional as F

import dskernels as ds
from compiling import Compile, assert_clean, compile_all
from dskernels import parity
from registering import check_registration


def both(logits, targets, dnats, **options):
    logits = logits.detach().clone().requires_grad_()
    nats = ds.cross_entropy(logits, targets, **options)
    return nats.detach(), torch.autograd.grad(nats, logits, dnats)[0]


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_fp64(device, impl, dtype):
    """More columns than a program takes at a time, and a row of -inf but for one; targets that are no column."""
    logits = (torch.randn(5, 4100, device=device) * 3).to(dtype)
    logits[2], logits[2, 77] = -torch.inf, 1.0
    targets = torch.tensor([4099, -100, 77, 4100, 0], device=device)
    dnats = torch.randn(5, device=device)
    nats, dlogits = both(logits, targets, dnats, impl=impl)
    counted = torch.tensor([0, 2, 4], device=device)
    wide = logits.double().requires_grad_()
    want = F.cross_entropy(wide[counted], targets[counted], reduction="none")
    torch.testing.assert_close(nats[counted].double(), want, rtol=0, atol=1e-5)
    (dwant,) = torch.autograd.grad(want, wide, dnats[counted].double())
    assert dlogits.dtype == dtype
    assert parity.difference(dlogits, dwant) < (1e-11 if dtype == torch.float32 else 5e-6)
    for row in (1, 3):
        assert nats[row] == 0
        assert (dlogits[row] == 0).all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_nan_stays_in_its_row(device, impl):
    logits = torch.randn(4, 40, device=device)
    logits[1, 3], logits[2, 5] = float("nan"), float("nan")
    nats, dlogits = both(logits, torch.tensor([0, 1, -100, 3], device=device), torch.ones(4, device=device), impl=impl)
    assert nats.isnan().tolist() == [False, True, False, False]
    assert dlogits.isnan().any(1).tolist() == [False, True, False, False]


def test_empty(device):
    logits = torch.empty(0, 7, device=device, requires_grad=True)
    nats = ds.cross_entropy(logits, torch.empty(0, dtype=torch.int64, device=device))
    assert nats.shape == (0,)
    nats.sum().backward()
    assert logits.grad.shape == (0, 7)


X, IDS = torch.randn(3, 8), torch.tensor([1, 7, -100])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ds.cross_entropy(X.int(), IDS), TypeError, "logits: expected dtype"),
        (lambda: ds.cross_entropy(X[0], IDS), ValueError, r"logits: expected shape \[T, V\]"),
        (lambda: ds.cross_entropy(X[:, :0], IDS), ValueError, "logits: expected at least one column"),
        (lambda: ds.cross_entropy(X, IDS.float()), TypeError, "targets: expected dtype"),
        (lambda: ds.cross_entropy(X, IDS[:2]), ValueError, r"targets: expected shape \[3\], got \[2\]"),
        (lambda: ds.cross_entropy(X.T.contiguous().T, IDS), ValueError, "logits: expected a contiguous last dimension"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_registration():
    ops = torch.ops.dskernels
    check_registration(ops.cross_entropy.default, (X.clone().requires_grad_(), IDS))
    check_registration(ops.cross_entropy_backward.default, (torch.randn(3), X, IDS, X.logsumexp(1)))


def test_compiles_whole():
    compiled = torch.compile(lambda x: ds.cross_entropy(x, IDS).sum(), backend="aot_eager", fullgraph=True)
    a, b = X.clone().requires_grad_(), X.clone().requires_grad_()
    compiled(a).backward(), ds.cross_entropy(b, IDS).sum().backward()
    assert torch.equal(a.grad, b.grad)


def test_kernels_compile_without_spills():
    rows = {"p_logits": "*bf16", "p_targets": "*i64", "p_lse": "*fp32", "V": "i32", "stride_lt": "i32"}
    common = dict(constants={"BLOCK": 4096}, divisible=("V", "stride_lt"), num_warps=8)
    forward = Compile("dskernels.loss.triton:cross_entropy_kernel", signature={**rows, "p_nats": "*fp32"}, **common)
    backward = Compile(
        "dskernels.loss.triton:cross_entropy_backward_kernel",
        signature={**rows, "p_dnats": "*fp32", "p_dlogits": "*bf16", "stride_dt": "i32"},
        **common,
    )
    assert_clean(compile_all([forward, backward]))
