"""One config of every CUDA C++ kernel on small shapes, for compute-sanitizer (see `make sanitize`)."""

import functools

import torch

import dskernels as ds
from dskernels import parity
from dskernels.cuda.driver import Planned
from dskernels.gemm import hopper
from dskernels.gemm.config import HOPPER_CONFIGS
from dskernels.parity.inputs import quantized

DEVICE = torch.device("cuda")


def main() -> None:
    for b_rows, configs in HOPPER_CONFIGS.items():
        a, b = quantized(0, 300, 400, (1, 128), DEVICE), quantized(1, 392, 400, (b_rows, 128), DEVICE)
        want = ds.reference.fp8_gemm(a, b, out_dtype=torch.float32)
        for config in configs:
            out = torch.full((300, 392), torch.nan, device=DEVICE)
            Planned(functools.partial(hopper.plan, config))(a.data, a.scale, b.data, b.scale, b_rows, None, out, False)
            say(f"fp8_gemm {config.tile}, B in {b_rows}x128", parity.difference(out, want) < parity.E4M3_SUMS)
    a, b = quantized(0, 5, 2048, (1, 128), DEVICE), quantized(1, 200, 2048, (128, 128), DEVICE)
    out = ds.fp8_gemm(a, b, out_dtype=torch.float32, impl="hopper")
    say("fp8_gemm, few rows", parity.difference(out, ds.reference.fp8_gemm(a, b, out_dtype=torch.float32)) < 1e-6)
    x = torch.randn(144, 264, device=DEVICE).bfloat16()
    for got, expected in zip(ds.quantize_both(x, impl="hopper"), ds.reference.quantize_both(x), strict=True):
        say("quantize_both", torch.equal(got.data.view(torch.uint8), expected.data.view(torch.uint8)))


def say(what: str, right: bool) -> None:
    if not right:
        raise SystemExit(f"{what}: wrong")
    print(f"{what}: right", flush=True)


if __name__ == "__main__":
    main()
