"""The plugin of SGLang: what it takes and hands on, which needs no SGLang, and SGLang's own registry of hooks."""

import ast
import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

import dskernels as ds
from dskernels.device import capability
from dskernels.integrations import sglang as plugin

X, WEIGHT = torch.randn(2, 3, 256, dtype=torch.bfloat16), ds.quantize(torch.randn(200, 256), (128, 128))
BIAS = torch.randn(200, dtype=torch.bfloat16)


def theirs(*args, **options):
    """SGLang's choice, which says what it was asked."""
    return lambda *given, **named: ("theirs", args, options, len(given), sorted(named))


@pytest.mark.parametrize("ue8m0", [False, True])
def test_what_it_takes(monkeypatch, ue8m0):
    monkeypatch.setattr(plugin, "_on_hopper", lambda: True)
    linear = plugin.linear_of(theirs, weight_block_size=[128, 128], act_scale_ue8m0=ue8m0)
    named = {"input": X, "weight": WEIGHT.data, "block_size": [128, 128], "weight_scale": WEIGHT.scale}
    got = linear(**named, input_scale=None, bias=BIAS)
    tiles = ds.quantize(X.flatten(0, 1), scale_format="ue8m0" if ue8m0 else "fp32")
    expected = ds.fp8_gemm(tiles, WEIGHT, out_dtype=torch.float32) + BIAS.float()
    assert got.shape == (2, 3, 200)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.flatten(0, 1).float(), expected, rtol=2**-7, atol=2**-7)
    for other in ({"input_scale": WEIGHT.scale}, {"block_size": [32, 32]}, {"weight_bf16": X}):
        assert linear(**{**named, **other})[0] == "theirs"
    assert linear(**{**named, "weight_scale": WEIGHT.scale.bfloat16()})[0] == "theirs"


def test_elsewhere_it_is_theirs(monkeypatch):
    monkeypatch.setattr(plugin, "_on_hopper", lambda: False)
    assert plugin.linear_of(theirs, [128, 128])(1, 2)[:2] == ("theirs", ([128, 128], False))


def test_an_amd_gpu_that_reports_9_0_is_no_hopper(monkeypatch):
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_capability", (9, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    capability.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not plugin._on_hopper()
    capability.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    assert plugin._on_hopper()
    capability.cache_clear()


@pytest.mark.parametrize(("plugins", "times"), [(None, 0), ("", 0), ("other", 0), ("dskernels", 1), ("a,dskernels", 1)])
def test_only_by_name(monkeypatch, plugins, times):
    calls = []
    monkeypatch.setattr(plugin, "register", lambda: calls.append(1))
    if plugins is None:
        monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("SGLANG_PLUGINS", plugins)
    plugin.register_if_named()
    assert len(calls) == times


def test_sglang_calls_it(monkeypatch):
    """Its registry of hooks, wherever the function has been imported to; it stands in modules of the test, as SGLang's
    own do not import without torchvision and much else."""
    pytest.importorskip("sglang", reason="SGLang is not installed")
    registry = importlib.import_module(plugin.HOOKS).HookRegistry
    utils, user = types.ModuleType("stand_in_utils"), types.ModuleType("stand_in_user")
    utils.dispatch = user.dispatch = lambda weight_block_size=None, act_scale_ue8m0=False: theirs()
    for module in (utils, user):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(plugin, "DISPATCH", "stand_in_utils.dispatch")
    monkeypatch.setattr(plugin, "_on_hopper", lambda: True)
    registry.reset()
    try:
        plugin.register()
        registry.apply_hooks()
    finally:
        registry.reset()
    linear = user.dispatch(weight_block_size=[128, 128], act_scale_ue8m0=False)
    got = linear(input=X, weight=WEIGHT.data, block_size=[128, 128], weight_scale=WEIGHT.scale)
    assert torch.equal(got, ds.fp8_linear(X, WEIGHT))


def test_sglang_has_the_function():
    """With the arguments that the plugin hands on, by its source."""
    found = importlib.util.find_spec("sglang")
    if found is None:
        pytest.skip("SGLang is not installed")
    path, name = plugin.DISPATCH.rsplit(".", 1)
    file = Path(found.origin).parent.joinpath(*path.split(".")[1:]).with_suffix(".py")
    functions = {node.name: node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert [each.arg for each in functions[name].args.args] == ["weight_block_size", "act_scale_ue8m0"]
    linear = functions["triton_w8a8_block_fp8_linear"].args.args
    assert [each.arg for each in linear][:6] == ["input", "weight", "block_size", "weight_scale", "input_scale", "bias"]
