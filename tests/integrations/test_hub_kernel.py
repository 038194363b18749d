"""The folder for Hugging Face's `kernels`: a package that works under any name, beside dskernels itself."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dskernels as ds

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """The package, loaded under a name of its own, as the library loads it."""
    spec = importlib.util.spec_from_file_location("build_hub_kernel", ROOT / "tools" / "build_hub_kernel.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    out = tmp_path_factory.mktemp("hub")
    package = tool.build(out)
    assert (package.parent / "metadata.json").exists()
    assert package.parts[-3:] == ("build", "torch-universal", "dskernels")
    name = "_kernel_of_a_hub"
    spec = importlib.util.spec_from_file_location(
        name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for loaded in [key for key in sys.modules if key.startswith(name)]:
        del sys.modules[loaded]


def test_the_same_results(kernel):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 256), torch.randn(136, 256)
    quantized = kernel.quantize(x), kernel.quantize(weight, (128, 128))
    assert type(quantized[0]) is not ds.Fp8Tensor
    assert torch.equal(kernel.fp8_gemm(*quantized), ds.fp8_gemm(ds.quantize(x), ds.quantize(weight, (128, 128))))
    routing = kernel.route(torch.randn(5, 8), top_k=2)
    out = kernel.fused_experts(torch.randn(5, 16), torch.randn(8, 32, 16), torch.randn(8, 16, 16), routing)
    assert out.shape == (5, 16)


def test_its_kernels_are_its_own(kernel):
    """Each portable kernel that an operation names is there, and none is taken from the installed package."""
    dispatch = importlib.import_module(f"{kernel.__name__}.dispatch")
    for operation in dispatch.OPERATIONS.values():
        target = operation.targets["triton"]
        if target is not None:
            assert target.startswith(f"{kernel.__name__}.")
            assert dispatch._load(target).__module__.startswith(f"{kernel.__name__}.")


def test_neither_keeps_the_other_from_launching_directly(kernel):
    """Each watches what Triton launches by itself, which is no profiler."""
    both = importlib.import_module(f"{kernel.__name__}.portable"), importlib.import_module("dskernels.portable")
    assert both[0] is not both[1]
    assert not any(portable._is_hooked() for portable in both)


def test_its_operations_are_recorded_as_ours_are(kernel, monkeypatch):
    """They have a namespace of their own; on the CPU what is in the way is torch's operations inside of them alone."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    recording, x = importlib.import_module(f"{kernel.__name__}.recording"), torch.randn(5, 256)
    monkeypatch.setattr(recording, "_memory", lambda device: 1 << 30)
    recorder = recording.Recorder((x,))
    recorder.run(kernel.quantize, (x,), {})
    assert recorder.reason.startswith("aten.")


def test_the_library_loads_it(tmp_path):
    """In a process of its own: operations are registered once in each."""
    pytest.importorskip("kernels", reason="Hugging Face's kernels is not installed")
    subprocess.run([sys.executable, str(ROOT / "tools" / "build_hub_kernel.py"), str(tmp_path)], check=True)
    code = (
        "import pathlib, sys, kernels, torch\n"
        "module = kernels.get_local_kernel(pathlib.Path(sys.argv[1]))\n"
        "print(tuple(module.route(torch.randn(3, 8), top_k=2).experts.shape))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert run.stdout.strip().endswith("(3, 2)")
