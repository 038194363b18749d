"""One config of every CUDA C++ kernel on small shapes, for compute-sanitizer (see `make sanitize`).

`python tests/sanitize.py "few rows"` runs only kernels whose name contains the text, to find the one a report is of.
"""

import functools
import sys
from collections.abc import Callable, Iterator

import torch

import dskernels as ds
from dskernels import parity
from dskernels.cuda.driver import Planned
from dskernels.gemm import hopper
from dskernels.gemm.config import HOPPER_CONFIGS, HopperConfig
from dskernels.parity.inputs import quantized


def kernels() -> Iterator[tuple[str, Callable[[], bool]]]:
    """Name each kernel, with what runs it and says whether the result was right."""
    for b_rows, configs in HOPPER_CONFIGS.items():
        for config in configs:
            yield f"fp8_gemm {config.tile}, B in {b_rows}x128", functools.partial(many_rows, config, b_rows)
    yield "fp8_gemm, few rows", few_rows
    yield "quantize_both", quantize_both


def many_rows(config: HopperConfig, b_rows: int) -> bool:
    a, b = quantized(0, 300, 400, (1, 128), "cuda"), quantized(1, 392, 400, (b_rows, 128), "cuda")
    out = torch.full((300, 392), torch.nan, device="cuda")
    Planned(functools.partial(hopper.plan, config))(a.data, a.scale, b.data, b.scale, b_rows, None, out, False)
    return parity.difference(out, ds.reference.fp8_gemm(a, b, out_dtype=torch.float32)) < parity.E4M3_SUMS


def few_rows() -> bool:
    a, b = quantized(0, 5, 2048, (1, 128), "cuda"), quantized(1, 200, 2048, (128, 128), "cuda")
    out = ds.fp8_gemm(a, b, out_dtype=torch.float32, impl="hopper")
    return parity.difference(out, ds.reference.fp8_gemm(a, b, out_dtype=torch.float32)) < parity.E4M3_SUMS


def quantize_both() -> bool:
    x = torch.randn(144, 264, device="cuda").bfloat16()
    pairs = zip(ds.quantize_both(x, impl="hopper"), ds.reference.quantize_both(x), strict=True)
    return all(torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8)) for got, want in pairs)


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("these kernels run on a GPU, and torch sees none")
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [(name, run) for name, run in kernels() if wanted in name]
    if not chosen:
        raise SystemExit(f"no kernel's name contains {wanted!r}; there are: {'; '.join(name for name, _ in kernels())}")
    for name, run in chosen:
        if not run():
            raise SystemExit(f"{name}: wrong")
        print(f"{name}: right", flush=True)


if __name__ == "__main__":
    main()
