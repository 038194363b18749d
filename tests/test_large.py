"""More than 2^31 elements in one tensor: the last rows of each result are what these rows give alone.

On a GPU with 60 GB to spare, when asked to, in a minute:

    DSKERNELS_TEST_LARGE=1 make test-gpu WORKERS=1 ARGS=tests/test_large.py

Elsewhere small, by the reference, so that what is compared stays right.
"""

import os

import pytest
import torch

import dskernels as ds
from dskernels import parity

LARGE = os.environ.get("DSKERNELS_TEST_LARGE") == "1"
COLUMNS, ROWS = (8192, 2**18 + 384) if LARGE else (256, 1536)
LAST = 384  # rows, whole tiles of 128


@pytest.fixture(params=["reference", "triton", "hopper"])
def impl(request, device):
    large = LARGE and device == "cuda"
    if large == (request.param == "reference"):
        pytest.skip("DSKERNELS_TEST_LARGE=1 runs kernels on a GPU; else the reference runs, small")
    if request.param == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an sm_90 GPU")
    return request.param


@pytest.fixture
def draw(device):
    def draw(*shape, scale=1.0):
        return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(0, scale)

    yield draw
    if device == "cuda":
        torch.cuda.empty_cache()


def same(got, want):
    assert torch.equal(got.float(), want.float())


def close(got, want):
    assert parity.difference(got.detach(), want.detach()) < 1e-3


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (128, 1)])
def test_quantize(draw, impl, block):
    x = draw(ROWS, COLUMNS)
    whole, alone = (ds.quantize(rows, block, impl=impl) for rows in (x, x[-LAST:].clone()))
    same(whole.data[-LAST:], alone.data)
    same(whole.scale[-LAST // block[0] :], alone.scale)
    turned, alone = (ds.quantize(rows, block, transpose=True, impl=impl) for rows in (x, x[-LAST:].clone()))
    same(turned.data[:, -LAST:], alone.data)


@pytest.mark.parametrize("wide", [False, True])
def test_products_in_e4m3(draw, impl, wide):
    k, n = (128, COLUMNS) if wide else (COLUMNS, 256)
    x, weight = draw(ROWS, k), ds.quantize(draw(n, k), (128, 128))
    got = ds.fp8_gemm(ds.quantize(x), weight, impl=impl)
    close(got[-LAST:], ds.fp8_gemm(ds.quantize(x[-LAST:].clone()), weight, impl=impl))


@pytest.mark.parametrize("wide", [False, True])
def test_products_of_groups(draw, device, impl, wide):
    k, n = (128, COLUMNS) if wide else (COLUMNS, 128)
    a, b = draw(ROWS, k), draw(3, n, k, scale=k**-0.5)
    offsets = torch.tensor([0, ROWS // 3, ROWS // 2, ROWS], device=device, dtype=torch.int32)
    close(ds.grouped_gemm(a, b, offsets, impl=impl)[-LAST:], a[-LAST:] @ b[2].T)
    dy = draw(ROWS, n)
    close(ds.grouped_wgrad(dy, a, offsets, impl=impl)[2], dy[ROWS // 2 :].T @ a[ROWS // 2 :])


def test_a_cache_and_attention_over_its_last_pages(draw, device, impl):
    pages, tokens, latent, rope = (60160, 40, 512, 64) if LARGE else (8, 40, 512, 64)
    slots = pages * 64 - 1 - torch.arange(tokens, device=device)
    kv, k_rope, norm, angle = (
        draw(tokens, latent),
        draw(tokens, rope),
        draw(latent),
        torch.rand(tokens, 32, device=device),
    )
    q, lengths = draw(2, 1, 16, latent + rope, scale=0.2), torch.tensor([71, 128], device=device, dtype=torch.int32)
    table = torch.tensor([[1, 0], [0, 1]], device=device, dtype=torch.int32)
    results = []
    for n in (pages, 2):
        cache = torch.zeros(n, 64, latent + rope, device=device, dtype=torch.bfloat16)
        here = slots - (pages - n) * 64
        ds.write_latent_cache(kv, k_rope, norm, angle.cos(), angle.sin(), cache, here, eps=1e-6, impl=impl)
        results.append((cache[-2:].clone(), *ds.mla_decode(q, cache, table + n - 2, lengths, scale=0.05, impl=impl)))
    for got, want in zip(*results, strict=True):
        same(got, want)


def test_prefill_and_its_gradient(draw, device, impl):
    tokens, heads, each = (87680, 128, 64) if LARGE else (320, 2, 64)
    shapes = (tokens, heads, 192), (tokens, heads, 192), (tokens, heads, 128)
    whole, dout = [draw(*shape).requires_grad_() for shape in shapes], draw(*shapes[2])
    alone = [x.detach()[-each:].clone().requires_grad_() for x in whole]
    results = []
    for given, n in ((whole, tokens), (alone, each)):
        cu = torch.arange(0, n + 1, each, device=device, dtype=torch.int32)
        out, lse = ds.mla_prefill(*given, cu, cu, scale=0.07, impl=impl)
        gradients = torch.autograd.grad(out, given, dout[-n:].clone())
        results.append([out[-each:], lse[:, -each:], *(x[-each:] for x in gradients)])
    for got, want in zip(*results, strict=True):
        close(got, want)


def test_cross_entropy_and_its_gradient(draw, device, impl):
    if impl == "hopper":
        pytest.skip("there is no such kernel")
    rows, columns = (16704, 129280) if LARGE else (64, 300)
    logits, targets = draw(rows, columns).requires_grad_(), torch.randint(0, columns, (rows,), device=device)
    alone = logits.detach()[-8:].clone().requires_grad_()
    results = []
    for x in (logits, alone):
        loss = ds.cross_entropy(x, targets[-len(x) :], impl=impl)
        results.append((loss[-8:], torch.autograd.grad(loss.sum(), x)[0][-8:]))
    for got, want in zip(*results, strict=True):
        same(got, want)


def test_tokens_by_expert(draw, device, impl):
    if impl == "hopper":
        pytest.skip("there is no such kernel")
    tokens = 32832 if LARGE else 96
    x, ids = draw(tokens, COLUMNS), torch.rand(tokens, 16, device=device).topk(8).indices.int()
    permuted = ds.permute(x, ids, 16, impl=impl)
    same(permuted.x[permuted.index[-4:].long().flatten()], x[-4:].repeat_interleave(8, 0))
    weights = torch.rand(tokens, 8, device=device)
    close(
        ds.combine(permuted.x, permuted, weights, impl=impl)[-64:], x[-64:].float() * weights[-64:].sum(1, keepdim=True)
    )
