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
    for name in plugin.CHOICES:
        choice = importlib.import_module(name)
        monkeypatch.setattr(choice, "backend_to_kernel_cls", choice.backend_to_kernel_cls)
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


def moe_config(**changes):
    """vLLM's description of 8 experts, 3 a token."""
    config = importlib.import_module(f"{plugin.MOE}.config")
    numbers = {"num_experts": 8, "num_local_experts": 8, "num_logical_experts": 8, "experts_per_token": 3}
    return config.FusedMoEConfig(
        **numbers,
        hidden_dim=256,
        intermediate_size=128,
        activation=importlib.import_module(f"{plugin.MOE}.activation").MoEActivation.SILU,
        device="cpu",
        routing_method=config.RoutingMethodType.DeepSeekV3,
        moe_parallel_config=config.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        **changes,
    )


def scheme(fp8):
    keys = importlib.import_module("vllm.model_executor.layers.quantization.utils.quant_utils")
    return (keys.kFp8Static128BlockSym, keys.kFp8Dynamic128Sym) if fp8 else (None, None)


@pytest.mark.parametrize(("capability", "fp8", "ours"), [(90, True, True), (90, False, True), (80, True, False)])
def test_experts_are_chosen(monkeypatch, capability, fp8, ours):
    """By vLLM itself, before its Triton experts."""
    plugin.register()
    plugin.register()
    monkeypatch.setattr(plugin, "_capability", lambda: capability)
    choice = importlib.import_module(list(plugin.CHOICES)[0 if fp8 else 1])
    backend = getattr(choice, list(plugin.CHOICES.values())[0 if fp8 else 1]).TRITON
    monkeypatch.setattr(choice, "_get_priority_backends", lambda *_: [backend])  # which asks for the GPU's kind
    kernels = choice.backend_to_kernel_cls(backend)
    assert [kernel.__name__ for kernel in kernels] == ["DskernelsExperts", "TritonExperts"]
    given = moe_config(moe_backend="triton")
    standard = importlib.import_module(f"{plugin.MOE}.modular_kernel").FusedMoEActivationFormat.Standard
    can, reason = kernels[0].is_supported_config(kernels[0], given, *scheme(fp8), standard)
    assert can is ours, reason
    if ours:
        select = choice.select_fp8_moe_backend if fp8 else choice.select_unquantized_moe_backend
        assert select(given, *(scheme(True) if fp8 else ())) == (backend, plugin.experts_kernel())


@pytest.mark.parametrize(
    ("changes", "reason"), [({"swiglu_limit": 7.0}, "swiglu_limit is 7.0"), ({"has_bias": True}, "bias")]
)
def test_what_the_experts_do_not_take(monkeypatch, changes, reason):
    monkeypatch.setattr(plugin, "_capability", lambda: 90)
    kernel = plugin.experts_kernel()
    can, said = kernel.is_supported_config(kernel, moe_config(**changes), None, None, kernel.activation_format())
    assert not can
    assert reason in said


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("spread", [False, True])
def test_experts(monkeypatch, fp8, spread):
    """Through vLLM's own kernel object; spread: this rank has experts 4 to 7 alone."""
    config, modular = (importlib.import_module(f"{plugin.MOE}.{name}") for name in ("config", "modular_kernel"))
    local = importlib.import_module(f"{plugin.MOE}.prepare_finalize.no_dp_ep")
    torch.manual_seed(0)
    x = torch.randn(5, 256, dtype=torch.bfloat16)
    w13, w2 = (torch.randn(shape, dtype=torch.bfloat16) / 16 for shape in ((8, 256, 256), (8, 256, 128)))
    routing = ds.route(torch.randn(5, 8), torch.zeros(8), top_k=3, n_groups=4, top_groups=2)
    expected = ds.fused_experts(x, w13, w2, routing, fp8=fp8)
    places = None
    if spread:
        first = ds.fused_experts(x, w13[:4].contiguous(), w2[:4].contiguous(), routing, fp8=fp8)
        expected = expected.float() - first.float()
        w13, w2 = w13[4:].contiguous(), w2[4:].contiguous()
        places = torch.tensor([-1, -1, -1, -1, 0, 1, 2, 3], dtype=torch.int32)
    quantization = config.FUSED_MOE_UNQUANTIZED_CONFIG
    if fp8:
        (w13, scale13, _), (w2, scale2, _) = (ds.quantize(w, (128, 128)) for w in (w13, w2))
        quantization = config.fp8_w8a8_moe_quant_config(scale13, scale2, block_shape=[128, 128])
    importlib.import_module("vllm.v1.worker.workspace").init_workspace_manager(torch.device("cpu"))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # which asks for a GPU
    kernel = modular.FusedMoEKernel(
        local.make_moe_prepare_and_finalize_no_dp_ep(False), plugin.experts_kernel()(moe_config(), quantization)
    )
    got = kernel.apply(
        x,
        w13,
        w2,
        routing.weights,
        routing.experts,
        activation=moe_config().activation,
        global_num_experts=8,
        expert_map=places,
        apply_router_weight_on_input=False,
    )
    if spread:
        torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.02)
    else:
        assert torch.equal(got, expected)
