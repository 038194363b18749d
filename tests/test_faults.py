"""Threads, forks, caches that cannot be written, and processes that compile at once."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import dskernels as ds
from dskernels.cuda import compiler

ROOT = Path(__file__).parent.parent


def block(seed):
    """Several operations after one another, as a layer calls them."""
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(shape, generator=generator) for shape in ((9, 256), (32, 256)))
    routing = ds.route(torch.randn(9, 8, generator=generator), top_k=2)
    permuted = ds.permute(ds.fp8_linear(x, w), routing.experts, 8)
    return ds.combine(permuted.x, permuted, routing.weights)


def test_threads_do_not_meet():
    wants = [block(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            assert all(torch.equal(got, want) for got, want in zip(pool.map(block, range(8)), wants, strict=True))


def test_a_forced_implementation_is_of_its_thread_alone():
    seen, ready, done = {}, threading.Barrier(2, timeout=30), threading.Barrier(2, timeout=30)

    def forced():
        with ds.use_impl("reference"):
            ready.wait()
            seen["inside"] = ds.dispatch.forced_impl()
            done.wait()

    thread = threading.Thread(target=forced)
    thread.start()
    ready.wait()
    seen["outside"] = ds.dispatch.forced_impl()
    done.wait()
    thread.join()
    assert seen == {"inside": "reference", "outside": None}


def test_threads_meet_new_metadata_at_once():
    """The first call of a shape, by all threads together: what is kept by metadata is made by each or by one."""
    barrier = threading.Barrier(8, timeout=30)

    def run(i):
        barrier.wait()
        return ds.quantize(torch.full((5, 131 + i % 2), float(i + 1)))

    with ThreadPoolExecutor(8) as pool:
        for i, q in enumerate(pool.map(run, range(8))):
            assert q.dequantize().unique().tolist() == [float(i + 1)]


def _child(queue, want):
    torch.set_num_threads(
        1
    )  # OpenMP's threads are not there after a fork, and its first parallel loop would wait for them
    queue.put(torch.allclose(block(3), want, rtol=1e-5, atol=1e-5))  # fewer threads add up in another order


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_computes_the_same():
    want = block(3)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(queue, want))
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode == 0
    assert queue.get()


def fake_cupy(monkeypatch, compile_):
    fake = types.ModuleType("cupy")
    fake.cuda = types.SimpleNamespace(Device=contextlib.nullcontext)
    fake.RawModule = lambda **options: types.SimpleNamespace(compile=compile_)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    compiler._module.cache_clear()


@pytest.mark.parametrize(
    "error", [OSError(30, "Read-only file system", "cupy-cache"), OSError(28, "No space left on device")]
)
def test_a_cache_of_kernels_that_cannot_be_written(monkeypatch, error):
    def compile_():
        raise error

    fake_cupy(monkeypatch, compile_)
    path = next((ROOT / "dskernels").rglob("*.cu"))
    with pytest.raises(OSError, match=r"cache of compiled kernels cannot be used .*CUPY_CACHE_IN_MEMORY=1") as caught:
        compiler._module(path, (), 0)
    assert caught.value.errno == error.errno
    compiler._module.cache_clear()


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dskernels.routing.triton_balance import update_bias_kernel as kernel
types = {"p_bias": "*fp32", "p_load": "*i32", "rate": "fp32", "E": "constexpr", "COLUMNS": "constexpr"}
source = ASTSource(kernel, types, {(3,): 200, (4,): 256})
print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["cubin"]))
"""


def start(folder):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILE]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_compile_the_same_kernel_at_once(tmp_path):
    both = [start(tmp_path / "cache") for _ in range(2)]
    results = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert results[0][0] == results[1][0] != ""
