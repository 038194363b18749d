"""Compile Triton and Gluon kernels for NVIDIA GPUs on a machine that has none, and read off what came of it.

The kernel tests run in Triton's CPU interpreter, and a process that had TRITON_INTERPRET=1 when `@triton.jit` ran holds
no kernel that could be compiled. So `compile_all` compiles in a child process without that variable: one child for all
calls of a test process, since importing torch and Triton costs seconds, and compiling a kernel mostly tenths of one.

    from compiling import Compile, assert_clean, compile_all

    def test_kernels_compile_without_spills():
        reports = compile_all(
            Compile(
                "dskernels.gemm.triton:fp8_gemm_kernel",
                signature={"a": "*fp8e4nv", "scale": "*fp32", "out": "*bf16", "rows": "i32", "stride": "i32"},
                constants={"BLOCK_M": 64, "BLOCK_N": block_n},
                divisible=("stride",),
                num_warps=4,
                num_stages=3,
            )
            for block_n in (64, 128)
        )
        assert_clean(reports, max_registers=255)
        assert all(r.count("HGMMA", "QGMMA") for r in reports if r.target == "sm_90")
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import itertools
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

import compiling_elsewhere
import in_part

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100")

# What one block may use: the opt-in limit of the architecture, which a launch with more is refused for.
SHARED_LIMIT = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448}
TENSOR_MEMORY_COLUMNS = 512  # sm_100
MOST_REGISTERS_AMD = 512  # of a lane of gfx942, where a SIMD of its compute unit runs one warp

# One of sm_80 and sm_89, which differ in e4m3 and in how much memory is shared, says it for both: of 38 kernels without
# e4m3 each asked for the same shared memory on both, and for registers that were at most 16 apart, none more than 156.
_DEFAULT, _DEFAULT_E4M3 = ("sm_80", "sm_90", "sm_100"), ("sm_89", "sm_90", "sm_100")
# What nvdisasm calls the code that is compiled for them.
_CODE = {"sm_80": "SM80", "sm_89": "SM89", "sm_90": "SM90a", "sm_100": "SM100a", "sm_120": "SM120"}
_CHILD_PATH = (Path(__file__).parent, Path(__file__).parent.parent)


@dataclass(frozen=True)
class Compile:
    """One kernel in one configuration, to be compiled for each of `targets`.

    kernel       "package.module:name" of a `@triton.jit` or `@gluon.jit` function; Triton finds the helpers it calls.
    signature    Triton's type of each run-time argument: "*fp8e4nv", "*bf16", "*fp32", "*i64", "i32", "fp32",
                 "tensordesc<...>".
    constants    values of its constexpr arguments, and of those that a launch would turn into constants: pointers that
                 are None, and integers that are 1 and not `do_not_specialize`.
    divisible    integer arguments that a launch would find to be multiples of 16: strides mostly, never
                 `do_not_specialize` ones. Pointers always count as aligned to 16 bytes, as torch's allocations are.
    targets      default: sm_80, or sm_89 where the signature holds e4m3; sm_90 and sm_100. A test names sm_120 or
                 gfx942 where these are given configurations of their own (see also compiling_elsewhere.py).
    options      further options of the launch, such as {"maxnreg": 128}.
    """

    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    _: KW_ONLY
    divisible: Sequence[str] = ()
    targets: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.targets:
            fp8 = any("fp8e4nv" in type_ for type_ in self.signature.values())
            object.__setattr__(self, "targets", _DEFAULT_E4M3 if fp8 else _DEFAULT)

    def __str__(self) -> str:
        chosen = ", ".join(f"{k}={v}" for k, v in {**self.constants, **self.options}.items())
        return f"{self.kernel} ({chosen}; num_warps={self.num_warps}, num_stages={self.num_stages})"


@dataclass(frozen=True, eq=False)
class Report:
    """What the compiler made of one kernel for one target."""

    source: Any  # the Compile, or what else names the kernel
    target: str
    registers: int  # of a thread
    stack: int  # bytes of a thread in local memory: spilled registers, arrays indexed at run time
    shared: int  # bytes of a block, the dynamic part included
    tensor_memory: int  # columns, on sm_100
    seconds: float
    cubin: bytes = field(repr=False)

    # nvdisasm takes half a second to start, and 15 ms for a kernel: the first to be asked brings all that wait with it.
    _waiting: ClassVar[weakref.WeakSet[Report]] = weakref.WeakSet()

    def __post_init__(self) -> None:
        self._waiting.add(self)

    def __reduce__(self) -> tuple[type[Report], tuple[Any, ...]]:
        return Report, tuple(getattr(self, each.name) for each in fields(self))  # the other process's waits there too

    @cached_property
    def code(self) -> str:
        """The instructions, one a line, without labels."""
        together = [report for report in self._waiting if report.target == self.target and report is not self]
        texts = disassemble([self.cubin, *(report.cubin for report in together)], self.target)
        for report, text in zip(together, texts[1:], strict=True):
            report.__dict__["code"] = text
        self._waiting.difference_update((self, *together))
        return texts[0]

    @cached_property
    def sass(self) -> Counter[str]:
        """How often each full opcode, such as "HGMMA.64x128x16.F32.BF16", stands in the code."""
        # "        /*0a10*/              @!P0 STL [R1+0x4], R3 ;": an address, perhaps a predicate, the opcode.
        return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", self.code, re.MULTILINE))

    @property
    def shared_limit(self) -> int:
        """What a block may use; what is compiled for sm_80 to stand for sm_89 too has to fit there."""
        if self.target in compiling_elsewhere.SHARED:
            return compiling_elsewhere.SHARED[self.target]
        for_both = self.target == "sm_80" and isinstance(self.source, Compile) and self.source.targets == _DEFAULT
        return SHARED_LIMIT["sm_89" if for_both else self.target]

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory; where only the stack is known, as on gfx942, 0."""
        return self.count("LDL", "STL") if self.stack and self.cubin else 0

    def count(self, *opcodes: str) -> int:
        """How many instructions are one of `opcodes`, whatever their further suffixes: `count("HGMMA", "BAR.SYNC")`."""
        return sum(n for name, n in self.sass.items() if any(f"{name}.".startswith(f"{op}.") for op in opcodes))

    def __str__(self) -> str:
        return (
            f"{self.source} {self.target}: {self.registers} registers, {self.spills} spills, {self.stack} B stack, "
            f"{self.shared} B shared, compiled in {self.seconds:.2f} s"
        )


class CompileError(Exception):
    """Some kernels did not compile; the message has each with its target and Triton's own words."""


def compile_all(kernels: Iterable[Compile], *, every_target: bool = False) -> list[Report]:
    """Compile kernels for their targets in the child process; in order, kernel by kernel.

    In `make test` the first configuration of each kernel is compiled for all its targets, of the others each for one of
    them, in turn: with all for all, compilation took 725 of a run's 1,900 CPU seconds, where two cores have 1,800.
    `make test THOROUGH=1` compiles all for all, as do `make portability` and `every_target`.

    One configuration of each kernel is compiled for sm_120 and gfx942 too, see compiling_elsewhere.py, and has to fit.

    Compiled kernels come from Triton's cache (`TRITON_CACHE_DIR`, `~/.triton/cache`) where they stand there already.
    """
    kernels = list(kernels)
    if not kernels:
        raise ValueError("kernels: nothing to compile")
    elsewhere = compiling_elsewhere.also(kernels)
    if in_part.IN_PART and not every_target:
        kernels = list(_in_turn(kernels))
    child = _compiler()
    try:
        child.stdin.write(pickle.dumps([*kernels, *elsewhere]))
        child.stdin.flush()
        results: list[Report | str] = pickle.load(child.stdout)
    except (BrokenPipeError, EOFError) as error:
        _compiler.cache_clear()
        raise CompileError(f"the compiling process ended with {child.wait()}") from error
    if failures := [result for result in results if isinstance(result, str)]:
        raise CompileError("\n\n".join(failures))
    reports = [result for result in results if isinstance(result, Report)]
    n = len(reports) - len(elsewhere)
    if failures := compiling_elsewhere.faults(reports[n:]):
        raise CompileError("\n\n".join(failures))
    return reports[:n]


def _in_turn(kernels: Iterable[Compile]) -> Iterator[Compile]:
    before: Counter[str] = Counter()
    for kernel in kernels:
        i = before[kernel.kernel]
        before[kernel.kernel] += 1
        yield replace(kernel, targets=(kernel.targets[i % len(kernel.targets)],)) if i else kernel


@functools.cache
def _compiler() -> subprocess.Popen[bytes]:
    """A process that answers pickled lists of kernels, and ends with this one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [*map(str, _CHILD_PATH), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    # Lines of the source change no instruction, and of a decode kernel they were 8% of the time and 110 of 173 KB.
    environment["TRITON_DISABLE_LINE_INFO"] = "1"
    # Imported, not run as a script: Compile and Report are then the same classes on both sides of the pickle.
    command = [sys.executable, "-c", "import compiling; compiling._answer()"]
    child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(child.communicate)  # ends its input, and waits
    return child


def _answer() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever prints in between
    gc.freeze()  # what torch and Triton have made is not looked at again and again
    while True:
        try:
            kernels: list[Compile] = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answers.write(pickle.dumps([_compiled(kernel, target) for kernel in kernels for target in kernel.targets]))
        answers.flush()


def _compiled(spec: Compile, target: str) -> Report | str:
    try:
        module, _, name = spec.kernel.partition(":")
        return compile_kernel(getattr(importlib.import_module(module), name), spec, target)
    except Exception as error:  # whatever Triton raises: the parent raises it again, with the others
        cause = f"\n{error.__cause__}" if error.__cause__ else ""
        return f"{spec} {target}: {type(error).__name__}: {error}{cause}"


def assert_clean(reports: Iterable[Report], *, max_registers: int = 255) -> None:
    """Assert no spills, no stack, at most `max_registers` a thread, and that a block's shared and tensor memory fit.

    On gfx942 a thread may have as many registers as there are.
    """
    reports = list(reports)
    most = {r: MOST_REGISTERS_AMD if r.target.startswith("gfx") else max_registers for r in reports}
    faults = [
        f"{report}\n    {what}"
        for report in reports
        for wrong, what in (
            (report.spills, f"{report.spills} spills"),
            (report.stack, f"{report.stack} bytes of stack"),
            (report.registers > most[report], f"{report.registers} registers, wanted at most {most[report]}"),
            (
                report.shared > report.shared_limit,
                f"{report.shared} bytes of shared memory, {report.target} has {report.shared_limit}",
            ),
            (
                report.tensor_memory > TENSOR_MEMORY_COLUMNS,
                f"{report.tensor_memory} columns of tensor memory, {report.target} has {TENSOR_MEMORY_COLUMNS}",
            ),
        )
        if wrong
    ]
    assert not faults, "\n".join(faults)


def compile_kernel(kernel: Any, spec: Compile, target: str) -> Report:
    """Compile a jitted function for one target, in this process, which must not be one of Triton's interpreter."""
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError(f"{spec.kernel}: expected a @triton.jit function, got {type(kernel).__name__}")
    names = list(kernel.arg_names)
    given = [*spec.signature, *spec.constants]
    if sorted(given) != sorted(names):
        missing, extra = set(names) - set(given), set(given) - set(names)
        twice = set(spec.signature) & set(spec.constants)
        raise TypeError(
            f"{spec.kernel}: signature and constants leave out {sorted(missing)}, have {sorted(extra)} too many, "
            f"and both name {sorted(twice)}"
        )
    if stray := set(spec.divisible) - set(spec.signature):
        raise TypeError(f"{spec.kernel}: divisible names {sorted(stray)}, which the signature has not")

    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel,
        {name: spec.signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in spec.constants.items()},
        {
            (names.index(name),): [["tt.divisibility", 16]]
            for name, type_ in spec.signature.items()
            if type_.startswith("*") or name in spec.divisible
        },
    )
    began = time.perf_counter()
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **spec.options}
    compiled = triton.compile(source, target=gpu, options=options)
    if amd:
        usage_there = compiling_elsewhere.usage_of(compiled)
        return Report(spec, target, tensor_memory=0, seconds=time.perf_counter() - began, cubin=b"", **usage_there)
    cubin = compiled.asm["cubin"]
    usage = dict(re.findall(r"(\w+):(\d+)", run_tool(cubin, "cuobjdump", "-res-usage")))
    return Report(
        source=spec,
        target=target,
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        seconds=time.perf_counter() - began,
        cubin=cubin,
    )


def run_tool(binary: bytes, tool: str, *options: str) -> str:
    """What one of the tools in Triton's wheel prints of a compiled kernel."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([folder / tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def disassemble(cubins: Sequence[bytes], target: str) -> list[str]:
    """The instructions of each cubin, which one nvdisasm reads as if they were one program."""
    codes = [_code_of(cubin) for cubin in cubins]
    lines = run_tool(b"".join(codes), "nvdisasm", "-ndf", "-b", _CODE[target]).splitlines(keepends=True)
    # An instruction has 16 bytes, and a line that begins with its address.
    lines = [line for line in lines if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
    if 16 * len(lines) != sum(map(len, codes)):
        raise RuntimeError("nvdisasm printed instructions in another form than expected")
    ends = list(itertools.accumulate(len(code) // 16 for code in codes))
    return ["".join(lines[end - len(code) // 16 : end]) for end, code in zip(ends, codes, strict=True)]


def _code_of(cubin: bytes) -> bytes:
    """The sections .text.* of an ELF file, one after the other."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    # Of each section: where its name stands, type, flags, address, offset, length.
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + size * i) for i in range(count)]
    names = sections[of_names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, *_, offset, length in sections
        if cubin.startswith(b".text.", names + name)
    )
