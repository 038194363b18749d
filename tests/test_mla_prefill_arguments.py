"""Prefill: bad input, what the kernels do not take, registration, whole graphs, choice of tiles."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dskernels as ds
from dskernels.mla.prefill.config import AMPERE, BLACKWELL, GENERIC, HOPPER, SINGLE, choose_config, key_parts, padded
from refusing import check_refused
from registering import check_registration
from test_mla_prefill import offsets

Q, K, V, K_ROPE = torch.randn(6, 4, 32), torch.randn(7, 2, 24), torch.randn(7, 2, 20), torch.randn(7, 8)
CU_Q, CU_K = offsets([4, 2]), offsets([2, 5])
ARGUMENTS = {"q": Q, "k": K, "v": V, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "scale": 0.1, "k_rope": K_ROPE}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1]}, TypeError, "q: expected a torch.Tensor, got list"),
        ({"q": Q.int()}, TypeError, "q: expected dtype bfloat16 or float16 or float32 or float64, got int32"),
        ({"q": Q[0]}, ValueError, r"q: expected shape \[T, H, D\], got \[4, 32\]"),
        ({"q": Q.mT.contiguous().mT}, ValueError, "q: expected a contiguous last dimension"),
        ({"q": Q[:, :3]}, ValueError, "k: expected a number of heads that divides q's 3, got 2"),
        ({"k": None}, TypeError, "k: expected a torch.Tensor, got NoneType"),
        ({"k": K.half()}, TypeError, "k: expected dtype float32, got float16"),
        ({"k": torch.randn(7, 2, 32)}, ValueError, r"k: expected shape \[Tk, Hk, 24\], got \[7, 2, 32\]"),
        ({"k_rope": None}, ValueError, r"k: expected shape \[Tk, Hk, 32\], got \[7, 2, 24\]"),
        ({"k": K[:, :0]}, ValueError, "k: expected a number of heads that divides q's 4, got 0"),
        ({"k": K.mT.contiguous().mT}, ValueError, "k: expected a contiguous last dimension"),
        ({"k": K.to("meta")}, ValueError, "k: expected a tensor on cpu like the others, got one on meta"),
        ({"v": V.bfloat16()}, TypeError, "v: expected dtype float32, got bfloat16"),
        ({"v": V[:5]}, ValueError, r"v: expected shape \[7, 2, V\], got \[5, 2, 20\]"),
        ({"v": V[:, :1]}, ValueError, r"v: expected shape \[7, 2, V\], got \[7, 1, 20\]"),
        ({"v": V.to("meta")}, ValueError, "v: expected a tensor on cpu"),
        ({"k_rope": 1}, TypeError, "k_rope: expected a torch.Tensor, got int"),
        ({"k_rope": K_ROPE.double()}, TypeError, "k_rope: expected dtype float32, got float64"),
        ({"k_rope": K_ROPE[None]}, ValueError, r"k_rope: expected shape \[Tk, rope\], got \[1, 7, 8\]"),
        ({"k_rope": K_ROPE[:6]}, ValueError, "k_rope: expected 7 rows like k, got 6"),
        ({"k_rope": K_ROPE[:, :0]}, ValueError, "k_rope: expected fewer columns than q's 32, and at least 1, got 0"),
        ({"k_rope": torch.randn(7, 32)}, ValueError, "k_rope: expected fewer columns than q's 32, .* got 32"),
        ({"k_rope": K_ROPE.to("meta")}, ValueError, "k_rope: expected a tensor on cpu"),
        ({"cu_seqlens_q": [0, 6]}, TypeError, "cu_seqlens_q: expected a torch.Tensor, got list"),
        ({"cu_seqlens_q": CU_Q.long()}, TypeError, "cu_seqlens_q: expected dtype int32, got int64"),
        ({"cu_seqlens_q": CU_Q[None]}, ValueError, r"cu_seqlens_q: expected shape \[S \+ 1\], got \[1, 3\]"),
        ({"cu_seqlens_q": CU_Q[:0]}, ValueError, r"cu_seqlens_q: expected shape \[S \+ 1\], at least one value"),
        ({"cu_seqlens_q": CU_Q.to("meta")}, ValueError, "cu_seqlens_q: expected a tensor on cpu"),
        ({"cu_seqlens_k": CU_K.float()}, TypeError, "cu_seqlens_k: expected dtype int32, got float32"),
        ({"cu_seqlens_k": CU_K[:2]}, ValueError, r"cu_seqlens_k: expected shape \[3\], got \[2\]"),
        ({"cu_seqlens_k": CU_K.to("meta")}, ValueError, "cu_seqlens_k: expected a tensor on cpu"),
        ({"scale": "1"}, TypeError, "scale: expected a float, got str"),
        ({"scale": None}, TypeError, "scale: expected a float, got NoneType"),
        ({"causal": 1}, TypeError, "causal: expected a bool, got int"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        ds.mla_prefill(**{**ARGUMENTS, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"q": Q.double(), "k": K.double(), "v": V.double(), "k_rope": K_ROPE.double()},
            "float64 runs on the reference",
        ),
        ({"q": torch.randn(6, 4, 288), "k": torch.randn(7, 2, 280)}, "head dimensions up to 256, not 288 and 20"),
        ({"v": torch.randn(7, 2, 257)}, "head dimensions up to 256, not 32 and 257"),
        (
            {"q": torch.randn(6, 4, 200), "k": torch.randn(7, 2, 192), "v": torch.randn(7, 2, 256)},
            r"512 columns of key and value, not 256 \+ 16 \+ 256, as they are when padded",
        ),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_by_name(device, changes, reason):
    check_refused(ds.mla_prefill, {**ARGUMENTS, **changes}, device, reason)


def test_registration():
    op, backward = torch.ops.dskernels.mla_prefill.default, torch.ops.dskernels.mla_prefill_backward.default
    whole = torch.randn(7, 2, 32)
    for q, k, k_rope, v in ((Q, K, K_ROPE, V), (Q, whole, None, V), tuple(x.bfloat16() for x in (Q, K, K_ROPE, V))):
        check_registration(op, (q, k, k_rope, v, CU_Q, CU_K, 0.1, True, q.dtype))
        leaves = [None if x is None else x.clone().requires_grad_() for x in (q, k, k_rope, v)]
        check_registration(op, (*leaves, CU_Q, CU_K, 0.1, True, q.dtype))
        out, lse = op(q, k, k_rope, v, CU_Q, CU_K, 0.1, False, q.dtype)
        check_registration(
            backward,
            (torch.randn_like(out), torch.randn_like(lse), q, k, k_rope, v, out, lse, CU_Q, CU_K, 0.1, False),
        )
    doubles = (x.double() for x in (Q, K, K_ROPE, V))
    check_registration(op, (*doubles, CU_Q, CU_K, 0.1, True, torch.float64))
    check_registration(op, (*(x.bfloat16() for x in (Q, K, K_ROPE, V)), CU_Q, CU_K, 0.1, True, torch.float32))


def test_compiles_whole():
    def layer(q, k, v, cu_q, cu_k, k_rope):
        out, lse = ds.mla_prefill(q * 2, k, v, cu_q, cu_k, scale=0.1, k_rope=k_rope)
        return out + 1, lse

    leaves = [x.clone().requires_grad_() for x in (Q, K, V, K_ROPE)]
    arguments = (*leaves[:3], CU_Q, CU_K, leaves[3])
    got = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)(*arguments)
    want = layer(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    got, want = (torch.autograd.grad(out[0].square().sum(), leaves) for out in (got, want))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_choose_config():
    v3, small = (128, 64, 128), (32, 16, 32)
    for arch, tiles in {(9, 0): HOPPER, (10, 0): BLACKWELL, (8, 0): AMPERE, (12, 0): AMPERE, (0, 0): GENERIC}.items():
        for kernel, by_width in tiles.items():
            assert choose_config(kernel, v3, 2, arch) == by_width[320]
            assert choose_config(kernel, small, 2, arch) == next(iter(by_width.values()))
            assert choose_config(kernel, v3, 4, arch) in SINGLE[kernel].values()
            assert max(by_width) == 512


@pytest.mark.parametrize(
    ("width", "rope", "parts"),
    [
        (192, 64, (128, 64)),
        (192, 0, (128, 64)),
        (96, 0, (64, 32)),
        (128, 0, (128, 0)),
        (112, 0, (112, 0)),  # 64 + 64 would be as wide as 128
        (24, 0, (24, 0)),
        (40, 8, (32, 8)),
    ],
)
def test_key_parts(width, rope, parts):
    assert key_parts(width, rope) == parts


@given(st.integers(1, 256))
def test_a_cut_key_is_never_wider(width):
    a, b = key_parts(width, 0)
    assert a + b == width
    assert padded(a) + padded(b) <= padded(width)
