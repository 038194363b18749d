"""The prefill kernels compile for every GPU of today without spills, in the tiles that are chosen there."""

import pytest

from compiling import TARGETS, Compile, assert_clean, compile_all
from dskernels.mla.prefill.config import choose_config, padded
from dskernels.mla.prefill.triton_gather import PACK_BLOCK
from in_part import IN_PART

FORWARD, BACKWARD = "dskernels.mla.prefill.triton", "dskernels.mla.prefill.triton_backward"
GATHER, GROUPS = "dskernels.mla.prefill.triton_gather", "dskernels.mla.prefill.triton_groups"
KERNELS = {
    "forward": (f"{FORWARD}:forward_kernel", "q k kb v out", "q k kb v o"),
    "dq": (f"{BACKWARD}:dq_kernel", "dout q k kb v dq", "d q k kb v dq"),
    "dk_dv": (f"{BACKWARD}:dk_dv_kernel", "dout q k kb v dk dkb dv", "d q k kb v dk dkb dv"),
}
MODEL, SMALL = (128, 64, 128), (32, 16, 32)
AMD = "gfx942"


def compile_prefill(kernel, target, dims, dtype="bf16", causal=True):
    """A kernel in the tile of `target`; the gradient of part B of the key is fp32, as that of a shared one is."""
    name, tensors, strided = KERNELS[kernel]
    widths = tuple(padded(width) for width in dims)
    arch = (0, 0) if target == AMD else divmod(int(target.removeprefix("sm_")), 10)
    config = choose_config(kernel, widths, 4 if dtype == "fp32" else 2, arch)
    strides = [f"stride_{x}{axis}" for x in strided.split() for axis in "th"]
    return Compile(
        name,
        signature={
            **{f"p_{x}": f"*{dtype}" for x in tensors.split()},
            **({"p_dkb": "*fp32"} if kernel == "dk_dv" else {}),
            **dict.fromkeys(("p_cu_q", "p_cu_k"), "*i32"),
            **dict.fromkeys(("p_lse",) if kernel == "forward" else ("p_lse", "p_delta"), "*fp32"),
            **dict.fromkeys((*strides, "tokens_q", "tokens_k", "sequences"), "i32"),
            "scale_log2" if kernel == "forward" else "scale": "fp32",
        },
        constants={
            **{"CAUSAL": causal, "group": 1},
            **dict(zip(("WIDTH_A", "WIDTH_B", "WIDTH_V"), dims, strict=True)),
            **dict(zip(("BLOCK_A", "BLOCK_B", "BLOCK_V"), widths, strict=True)),
            **{"BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
        },
        divisible=strides,
        targets=(target,),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_without_spills(kernel):
    kernels = [compile_prefill(kernel, target, MODEL) for target in TARGETS]
    kernels += [compile_prefill(kernel, target, SMALL) for target in ("sm_80", "sm_90")]
    kernels += [compile_prefill(kernel, "sm_90", (256, 0, 256)), compile_prefill(kernel, "sm_90", MODEL, causal=False)]
    kernels += [compile_prefill(kernel, "sm_80", MODEL, "fp32"), compile_prefill(kernel, AMD, MODEL)]
    if not IN_PART:
        kernels += [compile_prefill(kernel, AMD, dims) for dims in (SMALL, (256, 0, 256))]
        kernels += [compile_prefill(kernel, AMD, MODEL, "fp32")]
    reports = compile_all(kernels)
    assert_clean(reports)
    # On Hopper every product must be a wgmma.
    hopper = next(r for r in reports if r.target == "sm_90")
    assert hopper.count("HGMMA")
    assert not hopper.count("HMMA")


def test_delta_compiles_without_spills():
    kernel = Compile(
        f"{BACKWARD}:delta_kernel",
        signature={
            **dict.fromkeys(("p_dout", "p_out"), "*bf16"),
            **dict.fromkeys(("p_dlse", "p_delta"), "*fp32"),
            **dict.fromkeys(("tokens", "stride_dt", "stride_dh", "stride_ot", "stride_oh"), "i32"),
        },
        constants={"WIDTH_V": 128, "BLOCK_V": 128, "BLOCK_M": 16},
        divisible=("stride_dt", "stride_dh", "stride_ot", "stride_oh"),
        options={"enable_fp_fusion": False},
    )
    reports = compile_all([kernel])
    assert_clean(reports)
    assert not any(report.count("FFMA") for report in reports)  # all lanes of a row get the same sum


@pytest.mark.parametrize("fp8", [False, True])
def test_gathering_compiles_without_spills(fp8):
    pointers = {"p_latent": "*fp8e4nv", "p_scale": "*fp32"} if fp8 else {"p_latent": "*bf16"}
    integers = ("requests", "steps", "start", "rows", "columns", "pages", "page_size")
    kernel = Compile(
        f"{GATHER}:gather_kernel",
        signature={
            **pointers,
            **dict.fromkeys(("p_rope", "p_out"), "*bf16"),
            **dict.fromkeys(("p_table", "p_cu", "p_first"), "*i32"),
            **dict.fromkeys(("stride_page", "stride_token", "stride_table", *integers), "i32"),
        },
        constants={
            **({} if fp8 else {"p_scale": None}),
            **{"LATENT": 512, "ROPE": 64, "FP8": fp8, "BLOCK_L": 512, "BLOCK_P": 64, "BLOCK_R": 16},
        },
        divisible=("stride_page", "stride_token"),
    )
    assert_clean(compile_all([kernel]))


@pytest.mark.parametrize("pointer", ["*bf16", "*fp32"])
def test_lengths_and_results_of_groups_compile_without_spills(pointer):
    kernels = [
        Compile(
            f"{GATHER}:pack_kernel",
            signature={
                **dict.fromkeys(("p_lengths", "p_cu", "p_first", "p_ends"), "*i32"),
                **dict.fromkeys(("requests", "capacity"), "i32"),
            },
            constants={"BLOCK": PACK_BLOCK},
        ),
        Compile(
            f"{GROUPS}:take_results_kernel",
            signature={
                **dict.fromkeys(("p_out", "p_to"), pointer),
                **{"p_place": "*i32", "p_lse": "*fp32", "p_lse_to": "*fp32"},
                **dict.fromkeys(("tokens", "places", "heads"), "i32"),
            },
            constants={"WIDTH": 128, "GROUP": 8, "BLOCK_H": 32, "BLOCK_D": 128},
        ),
    ]
    assert_clean(compile_all(kernels))
