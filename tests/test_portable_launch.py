"""`portable.launch`: it never takes another binary than Triton would, and steps aside where it must."""

import re
import threading
import types
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import dskernels as ds
from dskernels import portable
from dskernels.gemm import triton as gemm
from dskernels.parity.inputs import quantized


def scaled(p_x, p_y, n, stride, factor, FLAG, BLOCK: tl.constexpr, SIGN: tl.constexpr = 1):
    """Only its parameters count where there is no GPU."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + o * stride, mask=o < n, other=0.0)
    tl.store(p_y + o * stride, x * factor * SIGN + FLAG, mask=o < n)


def single(p_x):
    """Likewise."""


class FakeKernel(JITFunction):
    """Triton's kernel up to the compiler: it tells the specialisations that Triton asks for, and what then runs."""

    def __init__(self, fn):
        super().__init__(fn, do_not_specialize=["n"])
        self.n_arguments = sum(not p.is_constexpr for p in self.params)
        self.specialised, self.ran = [], []
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(self.signature, self.params, backend)

    def run(self, *args, grid, warmup, **kwargs):
        bound, specialisation, options = self.bind(*args, **kwargs)
        self.specialised.append((specialisation, options))
        self.ran.append((grid, args, tuple(bound.values())[len(args) :]))
        return types.SimpleNamespace(run=self.run_again, function=len(self.specialised), packed_metadata="packed")

    def run_again(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *values):
        assert (stream, metadata, launch_metadata, enter, leave) == (77, "packed", None, None, None)
        self.ran.append(((x, y, z), values[: self.n_arguments], values[self.n_arguments :], function))


@pytest.fixture(scope="module")
def on_a_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "_launches_directly", lambda: True)
        patch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
        yield


MEMORY = torch.empty(64, dtype=torch.uint8)
tensors = st.builds(
    lambda dtype, offset: MEMORY[offset * 4 : 32 + offset * 4].view(dtype),
    st.sampled_from([torch.float32, torch.int32, torch.bfloat16]),
    st.integers(0, 7),
)
integers = st.one_of(st.integers(0, 40), st.sampled_from([-1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40, 2**62]))
any_argument = (
    tensors,
    st.none() | tensors,
    integers,
    integers | st.booleans(),
    st.floats() | st.integers(0, 2),
    st.booleans() | st.integers(0, 2),
)
any_constants = st.fixed_dictionaries(
    {"BLOCK": st.sampled_from([16, 32])}, optional={"SIGN": st.sampled_from([1, -1]), "num_warps": st.just(8)}
)


@st.composite
def two_launches(draw):
    """A launch, and one that differs from it in one argument or in the constants."""
    arguments, constants = [draw(one) for one in any_argument], draw(any_constants)
    i = draw(st.integers(0, len(arguments)))
    if i == len(arguments):
        return (arguments, constants), (arguments, draw(any_constants))
    return (arguments, constants), ([*arguments[:i], draw(any_argument[i]), *arguments[i + 1 :]], constants)


@settings(max_examples=400)
@given(launches=two_launches())
def test_a_binary_is_shared_only_where_triton_shares_it(on_a_gpu, launches):
    first, second = launches
    kernel = FakeKernel(scaled)
    for arguments, constants in (first, second):
        portable.launch(kernel, (3, 2), *arguments, **constants)
    if len(kernel.specialised) == 1:
        options = [kernel.bind(*arguments, **constants)[1:] for arguments, constants in (first, second)]
        assert repr(options[0]) == repr(options[1])
        grid, values, after, function = kernel.ran[1]
        assert (grid, function) == ((3, 2, 1), 1)
        wanted = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in second[0]]
        assert repr(values) == repr(tuple(wanted))
        assert after == (second[1]["BLOCK"], second[1].get("SIGN", 1))


def test_what_varies_from_call_to_call_takes_the_same_binary(on_a_gpu):
    """Another address, another number of rows, another factor: none of them compiles, none goes through Triton."""
    kernel = FakeKernel(scaled)
    for n in range(1, 50):
        x = torch.empty(n)
        portable.launch(kernel, (n,), x, None, n, 64, 0.5 * n, False, BLOCK=16, num_warps=4)
    assert len(kernel.specialised) == 1
    assert kernel.ran[-1][:3] == ((49, 1, 1), (x.data_ptr(), None, 49, 64, 24.5, False), (16, 1))


def test_order_of_constants_counts(on_a_gpu):
    kernel = FakeKernel(scaled)
    x = torch.empty(4)
    portable.launch(kernel, (1,), x, x, 1, 2, 1.0, False, BLOCK=16, SIGN=1)
    portable.launch(kernel, (1,), x, x, 1, 2, 1.0, False, SIGN=16, BLOCK=1)
    assert len(kernel.specialised) == 2


def test_kernels_do_not_share(on_a_gpu):
    x = torch.empty(4)
    kernels = [FakeKernel(scaled) for _ in range(3)]
    for kernel in kernels * 2:
        portable.launch(kernel, (1,), x, x, 1, 2, 1.0, False, BLOCK=16)
    assert [len(kernel.specialised) for kernel in kernels] == [1, 1, 1]


def test_tensors_by_name_are_refused(on_a_gpu):
    x = torch.empty(4)
    with pytest.raises(TypeError, match="p_y: expected tensors by position"):
        portable.launch(FakeKernel(scaled), (1,), x, n=1, stride=2, factor=1.0, FLAG=False, BLOCK=16, p_y=x)


def test_other_arguments_and_hooks_go_through_triton(on_a_gpu, monkeypatch):
    kernel = FakeKernel(single)
    for _ in range(2):
        portable.launch(kernel, (1,), (1, 2))
    assert len(kernel.specialised) == 2
    x = torch.empty(4)
    for _ in range(2):
        portable.launch(kernel, (1,), x)
    assert len(kernel.specialised) == 3
    hooks = [portable._watch, types.SimpleNamespace(of_recordings=True), lambda metadata: None]
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", hooks)
    portable.launch(kernel, (1,), x)
    assert len(kernel.specialised) == 4
    hooks.pop()  # what is left is ours, and that of another copy of the library: beside one nothing was recorded
    portable.launch(kernel, (1,), x)
    assert len(kernel.specialised) == 4


def test_the_interpreter_runs_as_ever():
    if not portable.INTERPRETED:
        pytest.skip("kernels are compiled here")
    kernel = triton.jit(scaled)
    x, y = torch.arange(5.0), torch.empty(5)
    portable.launch(kernel, (1,), x, y, 5, 1, 2.0, 1, BLOCK=8, SIGN=-1)
    assert torch.equal(y, 1 - 2 * x)


def test_this_triton_was_checked():
    assert triton.__version__.rpartition(".")[0] in portable.CHECKED_TRITON


class Through:
    """A kernel that is launched by ``kernel[grid](...)``, through `portable.launch`."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, **constants: portable.launch(self.kernel, grid, *arguments, **constants)


@pytest.fixture
def gemm_operands(device):
    shapes = [(16, 256, 512), (200, 300, 384), (333, 512, 1024)]
    return [
        (quantized(i, m, k, (1, 128), device), quantized(9 + i, n, k, (rows, 128), device))
        for i, (m, n, k) in enumerate(shapes)
        for rows in (128, 1)
    ]


def outputs(operands, **kwargs):
    return [ds.fp8_gemm(a, b, impl="triton", **kwargs) for a, b in operands]


@pytest.mark.gpu
def test_same_bits_as_through_triton(gemm_operands, monkeypatch):
    ordinary = outputs(gemm_operands)
    monkeypatch.setattr(gemm, "fp8_gemm_kernel", Through(gemm.fp8_gemm_kernel))
    for _ in range(3):
        for got, want in zip(outputs(gemm_operands), ordinary, strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
def test_captured_in_a_graph(gemm_operands, monkeypatch):
    monkeypatch.setattr(gemm, "fp8_gemm_kernel", Through(gemm.fp8_gemm_kernel))
    want = outputs(gemm_operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(gemm_operands)
    for x in captured:
        x.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "hopper"])
def test_threads(gemm_operands, monkeypatch, request, impl):
    """Four threads, each on a stream of its own, launch the same kernels with the same shapes and other addresses."""
    if impl == "hopper":
        request.getfixturevalue("sm_90")
        gemm_operands = [pair for pair in gemm_operands if pair[0].shape[0] > 32]
    monkeypatch.setattr(gemm, "fp8_gemm_kernel", Through(gemm.fp8_gemm_kernel))
    want = [ds.fp8_gemm(a, b, impl=impl) for a, b in gemm_operands]
    torch.cuda.synchronize()
    wrong = []

    def work(i):
        own = [(a._replace(data=a.data.clone()), b._replace(data=b.data.clone())) for a, b in gemm_operands]
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            for _ in range(50):
                got = [ds.fp8_gemm(a, b, impl=impl) for a, b in own]
                if not all(torch.equal(x, y) for x, y in zip(got, want, strict=True)):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_every_kernel_is_launched_by_it():
    """But the dense product's, whose tensor descriptors want scratch memory. By Triton itself a launch takes the host
    twice as long, and is not recorded."""
    root = Path(ds.__file__).parent
    by_triton = [path for path in root.rglob("*.py") if re.search(r"\w_kernel\[", path.read_text())]
    assert [str(path.relative_to(root)) for path in by_triton] == ["gemm/triton.py"]
