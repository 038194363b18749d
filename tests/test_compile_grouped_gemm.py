"""The kernels of the grouped products compile for every GPU of today without spills, in every tile there is."""

from dataclasses import replace

import torch

from compiling import Compile, assert_clean, compile_all
from dskernels.grouped_gemm.config import E4M3, configs_for
from in_part import IN_PART

POINTER = {E4M3: "*fp8e4nv", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
PLAIN = (torch.bfloat16, torch.float32)
NVIDIA, AMD = (9, 0), (0, 0)  # as configs_for is given them; it makes no difference between NVIDIA's GPUs
PRODUCT, WGRAD = "dskernels.grouped_gemm.triton", "dskernels.grouped_gemm.triton_wgrad"


def kernel(name, dtype, config, pointers, integers, constants, divisible):
    """A kernel on operands of `dtype`, given (operand, its scale) pairs; a plain one gets the operand for a scale."""
    signature = {operand: POINTER[dtype] for operand, _ in pointers}
    signature |= {scale: "*fp32" if dtype == E4M3 else POINTER[dtype] for _, scale in pointers}
    return Compile(
        name,
        signature=signature | integers,
        constants={"FP8": dtype == E4M3, **constants},
        divisible=divisible,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def tile(config):
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}


def product(dtype, config, *, gather=False, transposed=False):
    """`transposed`: b is a transposed view, as for the gradient of a plain product; its rows are contiguous along N."""
    strides = ("stride_am", "stride_sam", "stride_sak", "stride_be", "stride_sbe", "stride_sbn", "stride_sbk")
    along, across = ("stride_bn", "stride_bk") if transposed else ("stride_bk", "stride_bn")
    constants = {"GATHER": gather, "GROUPS": 512, **tile(config), "stride_ak": 1, along: 1}
    integers = {
        **{"p_plan": "*i32", "p_c": "*bf16" if dtype == E4M3 else POINTER[dtype]},
        **dict.fromkeys(("E", "N", "K", "top_k", *strides, across, "stride_cm"), "i32"),
    }
    if gather:
        integers["p_source"] = "*i32"
    else:
        constants["p_source"] = None
    return kernel(
        f"{PRODUCT}:grouped_gemm_kernel",
        dtype,
        config,
        [("p_a", "p_sa"), ("p_b", "p_sb")],
        integers,
        constants,
        ("N", "K", "stride_am", "stride_be", "stride_cm", across),
    )


def masked(dtype, config):
    strides = ("stride_ae", "stride_am", "stride_sae", "stride_sam", "stride_sak", "stride_be", "stride_bn")
    strides = (*strides, "stride_sbe", "stride_sbn", "stride_sbk", "stride_ce", "stride_cm")
    return kernel(
        f"{PRODUCT}:grouped_gemm_masked_kernel",
        dtype,
        config,
        [("p_a", "p_sa"), ("p_b", "p_sb")],
        {"p_counts": "*i32", "p_c": "*bf16", **dict.fromkeys(("M", "N", "K", *strides), "i32")},
        tile(config),
        ("N", "K", "stride_am", "stride_be", "stride_bn", "stride_cm"),
    )


def wgrad(dtype, config, *, gather=False):
    constants = {"GATHER_DY": False, "GATHER_X": gather, "ACCUMULATE": True}
    constants |= {"BLOCK_N": config.block_m, "BLOCK_K": config.block_n, "BLOCK_T": config.block_k}
    integers = {"p_plan": "*i32", "p_dw": "*fp32"}
    integers |= dict.fromkeys(("P", "E", "N", "K", "top_k", "stride_sdyt", "stride_sxt", "stride_dwe"), "i32")
    integers["stride_dwn"] = "i32"
    divisible = ["N", "K", "stride_dwe", "stride_dwn"]
    # Plain operands are [T, N] and [T, K], quantised ones [N, P] and [K, P].
    for row, token in (("stride_dyn", "stride_dyt"), ("stride_xk", "stride_xt")):
        along, across = (token, row) if dtype == E4M3 else (row, token)
        constants[along] = 1
        integers[across] = "i32"
        divisible.append(across)
    if gather:
        integers["p_source"] = "*i32"
    else:
        constants["p_source"] = None
    return kernel(
        f"{WGRAD}:grouped_wgrad_kernel",
        dtype,
        config,
        [("p_dy", "p_sdy"), ("p_x", "p_sx")],
        integers,
        constants,
        divisible,
    )


def on_every_gpu(kernels_on):
    """Kernels in NVIDIA's tiles for its GPUs, in AMD's for gfx942; of these in part those that NVIDIA's GPUs lack."""
    nvidia = kernels_on(NVIDIA)
    amd = [kernel for kernel in kernels_on(AMD) if not IN_PART or kernel not in nvidia]
    return [*nvidia, *(replace(kernel, targets=("gfx942",)) for kernel in amd)]


def products(arch):
    # Gathering takes the most registers; the largest tiles once more without, from transposed weights, and masked.
    largest = {dtype: configs_for(dtype, arch)[-1] for dtype in POINTER}
    kernels = [product(dtype, config, gather=True) for dtype in POINTER for config in configs_for(dtype, arch)]
    kernels += [product(dtype, config) for dtype, config in largest.items()]
    kernels += [product(dtype, largest[dtype], gather=True, transposed=True) for dtype in PLAIN]
    return [*kernels, masked(E4M3, largest[E4M3])]


def weight_gradients(arch):
    kernels = [wgrad(E4M3, config) for config in configs_for(E4M3, arch)[1:]]
    kernels += [wgrad(dtype, config, gather=True) for dtype in PLAIN for config in configs_for(dtype, arch)[1:]]
    return [*kernels, *(wgrad(dtype, configs_for(dtype, arch)[-1]) for dtype in PLAIN)]


def test_products_compile_without_spills():
    reports = compile_all(on_every_gpu(products))
    assert_clean(reports)
    # On Hopper the products of tall tiles are the tensor cores' own, in the operands' dtype.
    for report in reports:
        if report.target == "sm_90" and report.source.constants["BLOCK_M"] >= 64:
            opcode = {True: "QGMMA", False: "HGMMA"}[report.source.constants["FP8"]]
            assert report.count(opcode) or report.source.signature["p_a"] == "*fp32", report


def test_weight_gradients_compile_without_spills():
    kernels = on_every_gpu(weight_gradients)
    kernels += [
        Compile(
            f"{WGRAD}:quantize_grouped_kernel",
            signature={
                **{"p_x": "*bf16", "p_plan": "*i32", "p_source": "*i32", "p_q": "*fp8e4nv", "p_s": "*fp32"},
                **dict.fromkeys(("P", "E", "K", "top_k", "stride_xt", "stride_qr", "stride_sc"), "i32"),
            },
            constants={"UE8M0": False, "GATHER": True, "GROUPS": 512, "PATCH": 64},
            divisible=("K", "stride_xt", "stride_qr"),
            num_warps=8,
        ),
        Compile(
            f"{PRODUCT}:plan_kernel",
            signature={"p_offsets": "*i32", "p_plan": "*i32", "T": "i32", "E": "i32"},
            constants={"BLOCK": 128, "GROUPS": 2048},
        ),
    ]
    assert_clean(compile_all(kernels))
