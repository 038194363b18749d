"""Threads, forks, caches that cannot be written, and processes that compile at once."""

import contextlib
import multiprocessing
import os
import shutil
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
            seen["inside"] = ds.choice.forced_impl()
            done.wait()

    thread = threading.Thread(target=forced)
    thread.start()
    ready.wait()
    seen["outside"] = ds.choice.forced_impl()
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
    # OpenMP's threads are not there after a fork, and its first parallel loop would wait for them.
    torch.set_num_threads(1)
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


def test_a_folder_of_the_cache_that_cannot_be_made(monkeypatch, tmp_path):
    """CuPy 14 makes it when it is imported."""
    (tmp_path / "cupy.py").write_text("raise FileNotFoundError(2, 'No such file or directory', '/proc/dskernels')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    path = next((ROOT / "dskernels").rglob("*.cu"))
    with pytest.raises(OSError, match=r"cannot be used \(No such file or directory\): set CUPY_CACHE_DIR") as caught:
        compiler.kernel(path, "some", {}, 0, 0)
    assert caught.value.filename == "/proc/dskernels"


@pytest.mark.parametrize("what", ["cupy", "nvrtc"])
def test_what_cannot_be_loaded_is_named(monkeypatch, tmp_path, what):
    """A CuPy for another CUDA, and no toolkit."""
    path = next((ROOT / "dskernels").rglob("*.cu"))
    if what == "cupy":
        monkeypatch.setattr(compiler, "reason_against_cuda", lambda: None)
        said = "\\n====\\nFailed to import CuPy.\\nlibcudart.so.12: cannot open shared object file"
        (tmp_path / "cupy.py").write_text(f"raise ImportError('{said}')\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "cupy", raising=False)
        with pytest.raises(
            ImportError, match=r"CuPy, .* cannot be imported \(Failed to import CuPy.\): it has to be the"
        ):
            compiler.kernel(path, "some", {}, 0, 0)
        assert compiler.reason_against_compiling().startswith(
            "CUDA C++ kernels are compiled by CuPy, which is installed"
        )
        return

    def compile_():
        raise RuntimeError("CuPy failed to load libnvrtc.so.13: OSError: libnvrtc.so.13: cannot open")

    fake_cupy(monkeypatch, compile_)
    with pytest.raises(RuntimeError, match=r"NVRTC, which CuPy does not find .*libnvrtc.* install the CUDA toolkit"):
        compiler._module(path, (), 0)
    compiler._module.cache_clear()
    sys.modules["cupy"].cuda.nvrtc = types.SimpleNamespace(getVersion=compile_)
    monkeypatch.setattr(compiler, "reason_against_cuda", lambda: None)
    assert compiler.reason_against_compiling().startswith("CUDA C++ kernels are compiled by NVRTC")


COMPILE = """
import os, sys, json, resource, signal, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dskernels.routing.triton_balance import update_bias_kernel as kernel
types = {"p_bias": "*fp32", "p_load": "*i32", "rate": "fp32", "E": "constexpr", "COLUMNS": "constexpr"}

def compile(experts=200):
    source = ASTSource(kernel, types, {(3,): experts, (4,): 256})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["cubin"]
"""


def start(code, folder, **variables):
    """A process that compiles, with a cache of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "CUPY_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment | variables, text=True, **pipes)


def ended(process, timeout=300):
    """What it said; it ended by itself, not by a signal."""
    out, error = process.communicate(timeout=timeout)
    assert process.returncode in (0, 1), (process.returncode, error)
    return process.returncode, out, error


# Forked once all is imported, which takes longer than the kernel: they do begin at once.
TWICE = """
children = []
for _ in range(2):
    if not (child := os.fork()):
        try:
            os.write(1, f"{len(compile())}\\n".encode())
            os._exit(0)
        finally:
            os._exit(1)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_two_processes_compile_the_same_kernel_at_once(tmp_path):
    code, out, error = ended(start(COMPILE + TWICE, tmp_path / "cache"))
    assert code == 0, error
    once, again = out.split()
    assert once == again


FULL_AND_DAMAGED = """
before = compile()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # as a disk that is full after so many bytes
try:
    compile(201)
    print("no error")
except OSError as error:
    print("full:", error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("afterwards:", len(compile(201)) > 1000)  # nothing that was cut off is taken for the whole
files = [path for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.json")]
for path in files:
    path.write_text(path.read_text()[:40])
try:
    print("damaged:", compile() == before)
except Exception as error:
    print("damaged:", type(error).__name__)
path = next(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))
load = lambda: triton.knobs.runtime.kernel_load_start_hook(None, None, "update_bias", {path.name: str(path)}, "hash")
load()
whole = path.read_bytes()
path.write_bytes(whole[:-1])
for _ in range(2):
    try:
        load()
        print("not seen")
    except OSError as error:
        print("cut off:", error.filename == str(path.parent))
    path.write_bytes(whole)  # what was read before is in memory
"""


def test_a_cache_of_tritons_on_a_full_disk_and_damaged(tmp_path):
    """Triton's own: an error that Python can catch, and nothing cut off that is taken for the whole."""
    code, out, error = ended(start(COMPILE + FULL_AND_DAMAGED, tmp_path / "cache"))
    assert code == 0, error
    *lines, damaged, once, again = out.splitlines()
    assert lines == ["full: 27", "afterwards: True"]
    assert damaged != "damaged: False"  # 3.7.1 compiles anew
    assert once == again == "cut off: True"


HOPPER = """
import torch, dskernels as ds
x = torch.randn(144, 264, generator=torch.Generator().manual_seed(0)).bfloat16()
got, want = ds.quantize(x.cuda(), impl="hopper"), ds.quantize(x, impl="reference")
assert torch.equal(got.data.cpu().view(torch.uint8), want.data.view(torch.uint8))
print("right")
"""


@pytest.fixture
def hopper(sm_90):
    if not sm_90:
        pytest.skip("needs an sm_90 GPU")


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "text"])
def test_a_damaged_cache_of_hoppers_kernels_is_made_anew(tmp_path, how):
    assert ended(start(HOPPER, tmp_path))[1] == "right\n"
    files = [path for path in tmp_path.rglob("*") if path.is_file() and "cubin" in path.name]
    assert files, list(tmp_path.rglob("*"))
    for path in files:
        kept = path.read_bytes()
        middle = len(kept) // 2
        flipped = kept[:middle] + bytes([kept[middle] ^ 0xFF]) + kept[middle + 1 :]
        path.write_bytes({"cut": kept[:middle], "empty": b"", "flipped": flipped, "text": b"no cubin"}[how])
    assert ended(start(HOPPER, tmp_path))[1] == "right\n"


FULL = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
FULL += "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"


@pytest.mark.gpu
def test_a_kernel_that_is_cut_off_in_tritons_cache_is_named(tmp_path):
    """Triton (3.6) loads what it finds, by which the driver ends the process with SIGSEGV."""
    code = HOPPER.replace("hopper", "triton")
    assert ended(start(code, tmp_path))[1] == "right\n"
    files = list(tmp_path.rglob("*.cubin"))
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[:1000])
    status, _, error = ended(start(code, tmp_path))
    assert status == 1
    assert "Triton's cache holds a part of the kernel" in error
    assert any(str(path.parent) in error for path in files)
    shutil.rmtree(tmp_path)
    assert ended(start(code, tmp_path))[1] == "right\n"


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("how", ["full", "nowhere"])
def test_a_cache_of_hoppers_kernels_that_cannot_be_written_is_named(tmp_path, how):
    folder = tmp_path if how == "full" else Path("/proc/dskernels")  # where nobody may make a folder
    before = FULL if how == "full" else ""
    code, out, error = ended(start(before + HOPPER, folder))
    assert (code, out) == (1, "")
    assert "cache of compiled kernels cannot be used" in error
    assert "set CUPY_CACHE_DIR to a folder that can be written to" in error
    if how == "full":
        assert ended(start(before + HOPPER, folder, CUPY_CACHE_IN_MEMORY="1"))[1] == "right\n"
    assert ended(start(HOPPER, tmp_path))[1] == "right\n"  # once there is room, or in another folder


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_processes_compile_hoppers_kernel_at_once(tmp_path):
    assert [ended(process)[1] for process in [start(HOPPER, tmp_path) for _ in range(4)]] == ["right\n"] * 4


FORKED = """
import os, sys, torch, dskernels as ds
from dskernels.cli import app
torch.set_num_threads(1)
q = ds.quantize(torch.randn(3, 128, device="DEVICE"))
sys.stdout.flush()
if pid := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
try:
    CHILD
except RuntimeError as error:
    print(error, file=sys.stderr, flush=True)
    os._exit(1)  # nothing of the parent's is taken apart here
"""


def test_the_command_runs_in_a_fork(tmp_path):
    code = FORKED.replace("DEVICE", "cpu").replace("CHILD", "app(['doctor', '--json'])")
    status, out, error = ended(start(code, tmp_path), timeout=60)
    assert status == 0, error
    assert out.startswith("{"), out


@pytest.mark.gpu
def test_a_fork_of_what_has_used_a_gpu_says_that_it_cannot(tmp_path):
    child = "ds.quantize(torch.randn(3, 128, device='cuda'))"
    status, _, error = ended(start(FORKED.replace("DEVICE", "cuda").replace("CHILD", child), tmp_path), timeout=120)
    assert status == 1
    assert "Cannot re-initialize CUDA in forked subprocess" in error
    child = "ds.fp8_linear(q.dequantize(), q.dequantize())"  # of memory that is the parent's
    status, _, error = ended(start(FORKED.replace("DEVICE", "cuda").replace("CHILD", child), tmp_path), timeout=120)
    assert status == 1
    assert "CUDA" in error
