"""Compile every portable kernel for every GPU that is named here, by the Triton that is installed, without a GPU.

The kernels and their configurations are those of the compile tests, which are run with a recorder in place of the
compiler; of each kernel and each set of argument types the smallest configuration is compiled, or all of them with
`--each config`.

    python tests/portability.py compile --out support-3.7.json      with this Triton
    python tests/portability.py releases 3.6.0 3.7.1                each in an environment of its own: docs/support.json
    python tests/portability.py table                               docs/support.md out of docs/support.json
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import pickle
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import compiling_elsewhere
from compiling_elsewhere import ROOMY

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS, TABLE = ROOT / "docs" / "support.json", ROOT / "docs" / "support.md"

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
GPUS = {
    "sm_80": "A100",
    "sm_89": "L40S, RTX 4090",
    "sm_90": "H100, H200",
    "sm_100": "B200",
    "sm_120": "RTX 5090, RTX PRO 6000",
    "gfx942": "MI300X",
}
# What one block may use of shared memory (of LDS on an AMD GPU).
SHARED = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, **compiling_elsewhere.SHARED}
WITHOUT_E4M3 = "sm_80 has no e4m3"
NEWER_ONLY = "a configuration that is chosen from sm_90 on"
ROOMY_ONLY = "a configuration that is chosen on sm_90 and sm_100, whose blocks have twice the shared memory"
LEFT_OUT = (WITHOUT_E4M3, NEWER_ONLY, ROOMY_ONLY)

NOTE = """
Left out are kernels that read or write e4m3 for sm_80, which has no such type (quantising, products in e4m3 and the
e4m3 cache run there on the reference), and configurations that are never chosen on a GPU because they are for newer
ones or need more shared memory than it has. The kernels in CUDA C++ are for sm_90 only. A GPU older than sm_80 runs the
reference.

The tensor cores of gfx942 use e4m3fnuz, in which the same bits stand for half of the number that they are in e4m3. The
kernels accept and return only torch's `float8_e4m3fn`; a `float8_e4m3fnuz` is a TypeError. On gfx942, Triton converts
e4m3 with integer arithmetic and multiplies it as fp16, which can represent all of its numbers. Every kernel that is
compiled for gfx942 is checked not to use an instruction for e4m3fnuz.

`make test` compiles the first configuration of every kernel for sm_80 or sm_89, sm_90 and sm_100, and a small one for
sm_120 and gfx942, with one release of Triton (`tests/compiling_elsewhere.py`).
"""


class Recorder:
    """A pytest plugin: tests that compile are run up to there, and what they would compile is kept."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def install(self) -> None:
        """Put this in place of the compiler; before a test module is imported."""
        import compiling

        compiling.compile_all = self._record
        compiling.assert_clean = lambda *args, **kwargs: None

    def _record(self, kernels: Iterable[Any]) -> list[Any]:
        kernels = list(kernels)
        # What is for gfx942 alone is the same kernel with other launch options.
        self.found += [kernel for kernel in kernels if not set(kernel.targets) <= set(compiling_elsewhere.TARGETS)]
        return [_NotCompiled() for kernel in kernels for _ in kernel.targets]


class _NotCompiled:
    """In place of a report: a test that looks at it has recorded all that it compiles."""

    def __getattr__(self, name: str) -> Any:
        import pytest

        pytest.skip("recorded")


def recorded() -> list[Any]:
    """Every kernel and configuration that the compile tests compile."""
    import pytest

    recorder = Recorder()
    recorder.install()
    files = [
        path
        for path in HERE.rglob("test_*.py")
        if "compile_all" in path.read_text() and path.name != "test_compiling.py"
    ]
    chosen = ["-k", "compile or registers or spills"]
    pytest.main(
        ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, sorted(files)), *chosen],
        plugins=[recorder],
    )
    return recorder.found


def representatives(kernels: Iterable[Any], each: str) -> list[Any]:
    """One of each kernel (and argument types): that of the smallest tiles, by the product of its integer constants."""
    chosen: dict[tuple[str, str], Any] = {}
    for spec in kernels:
        sizes = [v for v in spec.constants.values() if isinstance(v, int) and not isinstance(v, bool) and v > 0]
        pointers = sorted(t for t in spec.signature.values() if t.startswith(("*", "tensordesc")))
        of_sm_80 = bool({"sm_80", "sm_89"} & set(spec.targets))
        key = (spec.kernel, {"kernel": f"{of_sm_80}", "types": f"{of_sm_80} {pointers}", "config": str(spec)}[each])
        size = 1
        for value in sizes:
            size *= value
        if key not in chosen or size < chosen[key][0]:
            chosen[key] = size, spec
    return [spec for _, spec in chosen.values()]


def outcome(spec: Any, target: str) -> str:
    """An empty text where the kernel compiles for the target and fits, else why not."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    module, _, name = spec.kernel.partition(":")
    e4m3 = any("fp8e4nv" in t for t in spec.signature.values())
    if target == "sm_80" and e4m3:
        return WITHOUT_E4M3
    if target in ("sm_80", "sm_89", "gfx942") and not {"sm_80", "sm_89"} & set(spec.targets):
        return NEWER_ONLY
    try:
        kernel = getattr(importlib.import_module(module), name)
        names = list(kernel.arg_names)
        aligned = [n for n, t in spec.signature.items() if t.startswith("*") or n in spec.divisible]
        source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
            kernel,
            {n: spec.signature.get(n, "constexpr") for n in names},
            {(names.index(n),): value for n, value in spec.constants.items()},
            {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        )
        gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
        options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **spec.options}
        if target.startswith("gfx"):
            options = {k: v for k, v in options.items() if k in ("num_warps", "num_stages")}
        with contextlib.redirect_stdout(None):  # where Triton prints a program that does not assemble
            compiled = triton.compile(source, target=gpu, options=options)
        if target.startswith("gfx"):
            compiling_elsewhere.usage_of(compiled)
    except Exception as error:  # whatever Triton raises is the answer
        cause: BaseException = error
        while cause.__cause__ is not None:  # Triton's errors stand in one another, call by call
            cause = cause.__cause__
        if target == "sm_80" and "fp8e4nv" in str(cause):
            return WITHOUT_E4M3  # a kernel that has it inside only
        lines = [line.strip() for line in f"{cause}".splitlines() if line.strip()]
        said = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")
        return f"{type(error).__name__}: {said}"[:200]
    if compiled.metadata.shared > SHARED[target]:
        if target == "sm_120" and spec.kernel in ROOMY and not {"sm_80", "sm_89"} & set(spec.targets):
            return ROOMY_ONLY
        return f"{compiled.metadata.shared} bytes of shared memory, a block has {SHARED[target]}"
    return ""


def record() -> list[Any]:
    """`recorded` in a process of its own, one whose kernels are interpreted: the tests' own way."""
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "kernels.pickle"
        subprocess.run([sys.executable, __file__, "record", str(listed)], check=True, stdout=subprocess.DEVNULL)
        return pickle.loads(listed.read_bytes())


def compile_here(kernels: list[Any], targets: Iterable[str] = TARGETS) -> dict[str, Any]:
    """Compile for all targets with the Triton of this process."""
    import triton

    rows: dict[str, dict[str, list[str]]] = {}
    for target in targets:
        rows[target] = {}
        for spec in kernels:
            rows[target].setdefault(spec.kernel, []).append(outcome(spec, target))
        texts = [text for all_ in rows[target].values() for text in all_ if text not in LEFT_OUT]
        print(f"{target}: {texts.count('')} of {len(texts)} compile", flush=True)
    return {"triton": triton.__version__, "python": platform.python_version(), "kernels": len(kernels), "targets": rows}


def compile_releases(releases: Iterable[str], kernels: list[Any], targets: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Each release of Triton in an environment of its own, on top of this one's torch and test tools."""
    site = next(path for path in sys.path if path.endswith("site-packages"))
    for release in releases:
        with tempfile.TemporaryDirectory() as folder:
            packages, out, listed = (Path(folder) / name for name in ("packages", "result.json", "kernels.pickle"))
            listed.write_bytes(pickle.dumps(kernels))
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages)]
            subprocess.run([*pip, f"triton=={release}"], check=True)
            path = os.pathsep.join(map(str, (packages, ROOT, HERE, site)))
            environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(Path(folder) / "cache")}
            environment.pop("TRITON_INTERPRET", None)
            command = [sys.executable, __file__, "compile", "--out", str(out), "--kernels", str(listed)]
            print(f"Triton {release}", flush=True)
            subprocess.run([*command, "--targets", *targets], check=True, env=environment)
            yield json.loads(out.read_text())


def keep(result: dict[str, Any], others: Iterable[str] = ()) -> None:
    """One release's result, in place of what there was of the same release; of these other kernels that stays."""
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for same in (one for one in before if one["triton"] == result["triton"]):
        for target, rows in result["targets"].items():
            rows.update(
                {kernel: same["targets"][target][kernel] for kernel in others if kernel in same["targets"][target]}
            )
        result["kernels"] = max(sum(map(len, rows.values())) for rows in result["targets"].values())
    results = [other for other in before if other["triton"] != result["triton"]] + [result]
    results.sort(key=lambda one: [int(part) for part in re.findall(r"\d+", one["triton"])[:3]])
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    TABLE.write_text(table(results))


def table(results: list[dict[str, Any]]) -> str:
    """The support matrix as a page of the documentation."""
    lines = [
        "# What runs where",
        "",
        "This page is generated by `make portability`; please do not edit it.",
        "",
        "Each cell counts the portable kernels that compile, without a GPU, with that release of Triton for that GPU",
        "(and whose shared memory fits), out of those that apply to it. Every kernel is compiled in its smallest",
        "configuration, with `--each types` once for every set of argument types. This says nothing about results or",
        "speed: kernels are tested and measured on sm_90, and tested in Triton's interpreter.",
        "",
        "| Triton | " + " | ".join(f"{target} ({GPUS[target]})" for target in TARGETS) + " |",
        "|---|" + "---|" * len(TARGETS),
    ]
    notes: dict[str, list[str]] = {}
    for result in results:
        cells = []
        for target in TARGETS:
            rows = result["targets"].get(target, {})
            texts = [(kernel, text) for kernel, all_ in rows.items() for text in all_]
            left_out = sum(text in LEFT_OUT for _, text in texts)
            failed = [(kernel, text) for kernel, text in texts if text and text not in LEFT_OUT]
            cells.append(f"{len(texts) - left_out - len(failed)} of {len(texts) - left_out}" if texts else "not tried")
            for kernel, text in failed:
                notes.setdefault(f"Triton {result['triton']}, {target}", []).append(
                    f"`{kernel.removeprefix('dskernels.')}`: {text}"
                )
        lines.append(f"| {result['triton']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        *NOTE.strip().splitlines(),
    ]
    for where, failed in notes.items():
        lines += ["", f"## {where}", "", *(f"- {text}" for text in dict.fromkeys(failed))]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one, many = commands.add_parser("compile"), commands.add_parser("releases")
    one.add_argument("--out", type=Path, required=True)
    many.add_argument("release", nargs="+")
    for command in (one, many):
        what = "what one configuration is compiled of"
        command.add_argument("--each", default="types", choices=("kernel", "types", "config"), help=what)
        command.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
        command.add_argument("--kernels", type=Path, help="what `record` wrote")
    many.add_argument("--only", nargs="+", default=[""], help="kernels whose name contains one of these; others stay")
    commands.add_parser("table")
    commands.add_parser("record").add_argument("out", type=Path)
    asked = parser.parse_args()
    if asked.command == "record":
        asked.out.write_bytes(pickle.dumps(recorded()))
        return
    if asked.command in ("compile", "releases"):
        kernels = record() if asked.kernels is None else pickle.loads(asked.kernels.read_bytes())
        kernels = representatives(kernels, asked.each)
        if asked.command == "compile":
            asked.out.write_text(json.dumps(compile_here(kernels, asked.targets), indent=1) + "\n")
            return
        chosen = [spec for spec in kernels if any(text in spec.kernel for text in asked.only)]
        others = {spec.kernel for spec in kernels} - {spec.kernel for spec in chosen}
        for result in compile_releases(asked.release, chosen, asked.targets):
            keep(result, others)
        return
    TABLE.write_text(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(HERE)]
    main()
