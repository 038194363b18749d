"""Peers of quantising and of the fp8 matrix products, dense and grouped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import NotApplicable, Peer, attribute, in_bf16, torch_grouped_mm
from dskernels import Fp8Tensor


def cublaslt(a: Fp8Tensor, b: Fp8Tensor) -> Peer:
    """cuBLASLt's block-scaled GEMM. It wants whole 128x128 blocks, and rows in fours: fewer are padded beforehand."""
    m, (n, k) = a.data.shape[0], b.data.shape
    if n % 128 or k % 128:
        raise NotApplicable("needs N % 128 == 0 and K % 128 == 0")
    pad = -m % 4
    data = F.pad(a.data.view(torch.uint8), (0, 0, 0, pad)).view(torch.float8_e4m3fn)
    scale = F.pad(a.scale.t(), (0, pad), value=1.0).contiguous().t()
    kinds = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128

    def run() -> Tensor:
        return F.scaled_mm(data, b.data.t(), scale, kinds[0], b.scale.t(), kinds[1], output_dtype=torch.bfloat16)

    return Peer(run, lambda out: out[:m])


def deepgemm(a: Fp8Tensor, b: Fp8Tensor) -> Peer:
    """DeepGEMM's dense kernel on our scales as they lie."""
    gemm = attribute("deep_gemm", "fp8_gemm_nt")
    out = a.data.new_empty(a.data.shape[0], b.data.shape[0], dtype=torch.bfloat16)
    return Peer(lambda: gemm((a.data, a.scale), (b.data, b.scale), out, disable_ue8m0_cast=True), lambda _: out)


def matmul(a: Fp8Tensor, b: Fp8Tensor) -> Peer:
    """The same product in bf16."""
    a16, b16 = a.dequantize(torch.bfloat16), b.dequantize(torch.bfloat16)
    return Peer(lambda: a16 @ b16.t())


def grouped_mm(a: Tensor | Fp8Tensor, b: Tensor | Fp8Tensor, offsets: Tensor) -> Peer:
    """torch's grouped product, in bf16."""
    a16, b16, ends = in_bf16(a), in_bf16(b), offsets[1:].contiguous()
    product = torch_grouped_mm()
    return Peer(lambda: product(a16, b16.transpose(-2, -1), offs=ends))


def grouped_mm_wgrad(dy: Tensor, x: Tensor, offsets: Tensor) -> Peer:
    """torch's grouped product along the tokens, in bf16."""
    ends, product = offsets[1:].contiguous(), torch_grouped_mm()
    return Peer(lambda: product(dy.t(), x, offs=ends))


def batched_matmul(a: Fp8Tensor, b: Fp8Tensor) -> Peer:
    """A padded batch of products in bf16, whatever the counts."""
    a16, b16 = in_bf16(a), in_bf16(b)
    return Peer(lambda: torch.bmm(a16, b16.transpose(1, 2)))


def deepgemm_grouped(a: Fp8Tensor, b: Fp8Tensor, rows: tuple[int, ...]) -> Peer:
    """DeepGEMM's contiguous layout: every group padded to 128 rows beforehand."""
    gemm = attribute("deep_gemm", "m_grouped_fp8_gemm_nt_contiguous")
    source, group = padded_rows(rows, 128)
    source, group = source.to(a.data.device), group.to(a.data.device)
    kept = source >= 0
    index = source.clamp(min=0)
    data = a.data.view(torch.uint8)[index].masked_fill(~kept[:, None], 0).view(torch.float8_e4m3fn)
    scale = a.scale[index].masked_fill(~kept[:, None], 1.0).t().contiguous().t()
    out = data.new_empty(len(index), b.data.shape[1], dtype=torch.bfloat16)
    return Peer(
        lambda: gemm((data, scale), (b.data, b.scale), out, group, disable_ue8m0_cast=True), lambda _: out[kept]
    )


def padded_rows(rows: tuple[int, ...], multiple: int) -> tuple[Tensor, Tensor]:
    """For each row of the padded layout, the row it comes from and its group; -1 and -1 for padding."""
    source, group, start = [], [], 0
    for e, n in enumerate(rows):
        padding = torch.full((-n % multiple,), -1)
        source += [torch.arange(start, start + n), padding]
        group += [torch.full((n,), e), padding]
        start += n
    return torch.cat(source), torch.cat(group).int()


def deepgemm_masked(a: Fp8Tensor, b: Fp8Tensor, counts: Tensor, expected: int) -> Peer:
    """DeepGEMM's masked layout."""
    gemm = attribute("deep_gemm", "m_grouped_fp8_gemm_nt_masked")
    scale = a.scale.transpose(1, 2).contiguous().transpose(1, 2)
    out = a.data.new_empty(*a.data.shape[:2], b.data.shape[1], dtype=torch.bfloat16)
    return Peer(
        lambda: gemm((a.data, scale), (b.data, b.scale), out, counts, expected, disable_ue8m0_cast=True), lambda _: out
    )


def deepgemm_wgrad(dy: Fp8Tensor, x: Fp8Tensor, rows: tuple[int, ...]) -> Peer:
    """DeepGEMM's product along tokens: flat transposed groups, sizes on the host, an fp32 output that it adds to."""
    gemm = attribute("deep_gemm", "k_grouped_fp8_gemm_tn_contiguous")
    sizes = [-(-n // 128) * 128 for n in rows]

    def flat(t: Fp8Tensor) -> tuple[Tensor, Tensor]:
        groups = t.data[:, : sum(sizes)].view(torch.uint8).split(sizes, dim=1)
        data = torch.cat([group.flatten() for group in groups]).view(torch.float8_e4m3fn)
        return data, t.scale[:, : sum(sizes) // 128].t().contiguous().t()

    left, right = flat(dy), flat(x)
    on_device = torch.tensor(sizes, dtype=torch.int32, device=dy.data.device)
    out = torch.zeros(len(rows), dy.data.shape[0], x.data.shape[0], device=dy.data.device)
    return Peer(lambda: gemm(left, right, out, sizes, on_device, c=out), lambda _: out)


def vllm_quantize(x: Tensor) -> Peer:
    """vLLM's quantiser of activations."""
    quantize = attribute("vllm.model_executor.layers.quantization.utils.fp8_utils", "per_token_group_quant_fp8")
    return Peer(lambda: quantize(x, 128, column_major_scales=True), lambda out: Fp8Tensor(out[0], out[1]))
