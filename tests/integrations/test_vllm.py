"""The plugin against vLLM's own interfaces, as far as they import without a GPU."""

import importlib
from types import SimpleNamespace

import pytest
import torch

import dskernels as ds

pytest.importorskip("vllm", reason="vLLM is not installed")
plugin = importlib.import_module("dskernels.integrations.vllm")


@pytest.fixture(autouse=True)
def undone(monkeypatch):
    """vLLM as it was."""
    kernels, router = importlib.import_module(plugin.KERNELS), importlib.import_module(plugin.ROUTER)
    monkeypatch.setattr(router, "grouped_topk", router.grouped_topk)
    monkeypatch.setattr(
        kernels, "_POSSIBLE_FP8_BLOCK_KERNELS", {k: list(v) for k, v in kernels._POSSIBLE_FP8_BLOCK_KERNELS.items()}
    )


def config(tiles=(1, 128), blocks=(128, 128), static=False):
    scale = SimpleNamespace(static=static, group_shape=tiles)
    return SimpleNamespace(
        activation_quant_key=SimpleNamespace(scale=scale),
        weight_quant_key=SimpleNamespace(scale=SimpleNamespace(group_shape=blocks)),
        out_dtype=torch.bfloat16,
    )


def test_registered_first_and_once():
    plugin.register()
    plugin.register()
    kernels = importlib.import_module(plugin.KERNELS)
    platform = importlib.import_module("vllm.platforms").PlatformEnum.CUDA
    candidates = kernels._POSSIBLE_FP8_BLOCK_KERNELS[platform]
    assert candidates[0] is plugin.linear_kernel()
    assert candidates.count(plugin.linear_kernel()) == 1


def test_what_the_linear_kernel_takes():
    kernel = plugin.linear_kernel()
    assert kernel.can_implement(config()) == (True, None)
    assert kernel.can_implement(config(static=True))[0] is False
    assert "got (1, 64)" in kernel.can_implement(config(tiles=(1, 64)))[1]
    assert kernel.is_supported(90) == (True, None)
    assert kernel.is_supported(80)[0] is False


def test_linear_kernel():
    kernel = object.__new__(plugin.linear_kernel())
    kernel.config = config()
    weight, x = ds.quantize(torch.randn(200, 256), (128, 128)), torch.randn(5, 256, dtype=torch.bfloat16)
    layer = SimpleNamespace(weight=weight.data, weight_scale_inv=weight.scale)
    got = kernel.apply_weights(layer, x[None], bias=torch.ones(200, dtype=torch.bfloat16))
    assert torch.equal(got[0], ds.fp8_gemm(ds.quantize(x), weight) + 1)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_router(score):
    router = importlib.import_module(plugin.ROUTER)
    original = getattr(router.grouped_topk, "_torchdynamo_orig_callable", router.grouped_topk)
    torch.manual_seed(0)
    logits, bias = torch.randn(9, 16), 0.1 * torch.randn(16) if score == "sigmoid" else None
    given = (torch.randn(9, 4), logits, 3, True, 4, 2, score, 2.5, bias)
    weights, ids = original(*given)
    plugin.register()
    got, got_ids = router.grouped_topk(*given)
    order, got_order = ids.argsort(1), got_ids.argsort(1)
    assert torch.equal(ids.gather(1, order).int(), got_ids.gather(1, got_order))
    torch.testing.assert_close(got.gather(1, got_order), weights.gather(1, order), rtol=1e-5, atol=1e-6)
