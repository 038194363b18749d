"""Builds the folder that Hugging Face's `kernels` library loads: the portable kernels, for any torch and any GPU.

    python tools/build_hub_kernel.py OUT  # then upload OUT, or load it: kernels.get_local_kernel(Path(OUT))

The layout is ``build/torch-universal/<name>/``, a package of Python alone. CUDA C++ is not in it: what it would add on
sm_90 needs CuPy, and a package of that name beside it. Imports become relative, as the library loads a kernel under a
name of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("fp8", "gemm", "grouped_gemm", "moe", "mla", "routing", "loss")
NAME = "dskernels"
IMPORT = re.compile(r"^(\s*)from dskernels(\.[\w.]+)? import ", re.MULTILINE)
TARGET = re.compile(r'"dskernels\.([\w.]+):(\w+)"')
# What the library reads of a build; any backend loads a universal one.
METADATA = {
    "id": f"{NAME}_universal",
    "name": NAME,
    "version": 1,
    "license": "MIT",
    "python-depends": [],
    "backend": {"type": "cuda"},
}
CARD = """---
tags: [kernel]
---

# dskernels

Operations for models built like DeepSeek-V3: block-scaled FP8, grouped products, routing, experts, latent attention.

```python
from kernels import get_kernel
ds = get_kernel("OWNER/dskernels")
```
"""


def build(out: Path) -> Path:
    """Writes the folder and returns the package in it."""
    package = out / "build" / "torch-universal" / NAME
    if package.exists():
        shutil.rmtree(package)
    package.mkdir(parents=True)
    sources = sorted((ROOT / NAME).glob("*.py"))
    sources += [path for family in FAMILIES for path in sorted((ROOT / NAME / family).rglob("*.py"))]
    sources += sorted((ROOT / NAME / "cuda").glob("*.py"))
    for path in sources:
        _write(path.read_text(), package, path.relative_to(ROOT / NAME))
    for path in sorted((ROOT / "reference").glob("*.py")):
        _write(path.read_text(), package, Path("reference") / path.name)
    (package.parent / "metadata.json").write_text(json.dumps(METADATA, indent=2) + "\n")
    (out / "README.md").write_text(CARD)
    shutil.copy(ROOT / "LICENSE", out / "LICENSE")
    return package


def _write(text: str, package: Path, place: Path) -> None:
    """A module with imports relative to where it stands, its operations under the package's own name."""
    up = "." * len(place.parts)
    text = IMPORT.sub(lambda match: f"{match[1]}from {up}{(match[2] or '')[1:]} import ", text)
    # What an operation names by "module:function" is imported by that name: whatever the package is called when loaded.
    text = TARGET.sub(lambda match: f'__name__.rpartition("{_dotted(place)}")[0] + "{match[1]}:{match[2]}"', text)
    text = text.replace('Library("dskernels", "FRAGMENT")', f'Library("{NAME}_hub", "FRAGMENT")')
    text = text.replace("torch.ops.dskernels", f"torch.ops.{NAME}_hub").replace('f"dskernels::', f'f"{NAME}_hub::')
    target = package / place
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def _dotted(place: Path) -> str:
    """The name of a module below the package."""
    parts = place.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def main() -> None:
    """Builds into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    print(build(parser.parse_args().out))


if __name__ == "__main__":
    main()
