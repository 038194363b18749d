"""Quantise two matrices in the blocks of DeepSeek-V3 and multiply them."""

import torch

import dskernels as ds

device = "cuda" if torch.cuda.is_available() else "cpu"
m, n, k = (4096, 7168, 2048) if device == "cuda" else (83, 576, 512)
x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
weight = torch.randn(n, k, device=device, dtype=torch.bfloat16)

# Activations: a scale for each token and 128 channels. Weights: one for each block of 128x128.
a, b = ds.quantize(x), ds.quantize(weight, (128, 128))
print(f"activations {tuple(a.data.shape)} in {a.data.dtype}, scales {tuple(a.scale.shape)}")
print(f"weight {tuple(b.data.shape)}, scales {tuple(b.scale.shape)}")

y = ds.fp8_gemm(a, b)  # bf16 [m, n], any m, n and k
print(f"y {tuple(y.shape)} in {y.dtype}, by:")
print(ds.explain(ds.fp8_gemm, a, b))  # which implementation runs here, and why

# Two errors: of the product of what was quantised, and of quantising itself.
rows = slice(0, 64)
exact = a.dequantize(torch.float64)[rows] @ b.dequantize(torch.float64).T
unquantised = x[rows].double() @ weight.double().T
of_product = (y[rows] - exact).norm() / exact.norm()
of_quantising = (exact - unquantised).norm() / unquantised.norm()
print(f"relative error: of the product {of_product:.1e} (bf16 rounds to 2e-3), of quantising {of_quantising:.1e}")
assert of_product < 3e-3
assert of_quantising < 6e-2
