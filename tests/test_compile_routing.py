"""The routing kernels compile for every GPU of today without spills, and their tiles are what they should be."""

import itertools

import pytest

from compiling import Compile, assert_clean, compile_all
from dskernels.routing.config import RowConfig, choose_config, choose_gate_config
from dskernels.routing.triton_balance import BEGIN_BLOCK
from dskernels.routing.triton_gate import OPTIONS
from in_part import IN_PART

ROW = {"T": "i32", "stride_lt": "i32", "p_logits": "*fp32"}
SEQUENCES = dict.fromkeys(("p_sequence", "p_tokens", "p_counts"), "*i32")
BALANCE = "dskernels.routing.triton_balance"


def test_choose_config():
    assert choose_config(256, 8) == RowConfig(rows=2, groups=8, members=32, num_warps=1)
    assert choose_config(256) == RowConfig(rows=2, groups=1, members=256, num_warps=1)
    assert choose_config(160, 8) == RowConfig(rows=2, groups=8, members=32, num_warps=1)
    assert choose_config(6) == RowConfig(rows=64, groups=1, members=8, num_warps=1)
    assert choose_config(1024) == RowConfig(rows=1, groups=1, members=1024, num_warps=1)
    assert choose_config(1000, 40) == RowConfig(rows=1, groups=64, members=32, num_warps=2)


@pytest.mark.parametrize("n_experts", range(1, 1025, 31))
def test_a_program_has_a_column_for_every_expert(n_experts):
    for n_groups in (n for n in range(1, n_experts + 1) if n_experts % n == 0):
        config = choose_config(n_experts, n_groups)
        assert config.groups >= n_groups
        assert config.members >= n_experts // n_groups
        assert config.rows * config.groups * config.members <= 1024 * config.num_warps


def test_route_compiles_without_spills():
    kernels = []
    for n_experts, top_k, n_groups, top_groups, score in [
        (2, 1, 1, 1, "sigmoid"),  # 256 tokens a program
        (16, 4, 4, 2, "softmax"),
        (160, 6, 8, 3, "softmax"),
        (256, 8, 8, 4, "sigmoid"),
        (384, 8, 1, 1, "sigmoid"),
        (1000, 32, 40, 7, "sigmoid"),  # two warps a token
        (1024, 32, 1, 1, "softmax"),
    ]:
        config = choose_config(n_experts, n_groups)
        kernels.append(
            Compile(
                "dskernels.routing.triton:route_kernel",
                signature={
                    **{**ROW, "p_bias": "*fp32", "p_weights": "*fp32", "p_experts": "*i32"},
                    **{"p_load": "*i32", "p_nonfinite": "*i32", "scale": "fp32"},
                },
                constants={
                    **{"E": n_experts, "TOP_K": top_k, "N_GROUPS": n_groups, "TOP_GROUPS": top_groups},
                    **{"SOFTMAX": score == "softmax", "NORMALIZE": True, "HAS_BIAS": True},
                    **{"ROWS": config.rows, "GROUPS": config.groups, "MEMBERS": config.members},
                    "CHOICES": 1 << (top_k - 1).bit_length(),
                },
                divisible=("stride_lt",) if n_experts % 16 == 0 else (),
                num_warps=config.num_warps,
            )
        )
    assert_clean(compile_all(kernels))


def test_other_kernels_compile_without_spills():
    kernels = [
        Compile(
            f"{BALANCE}:sum_loss_kernel",
            signature={"p_parts": "*fp32", "p_filled": "*i32", "p_out": "*fp32", "n_parts": "i32", "alpha": "fp32"},
            constants={"BLOCK": 1024},
        ),
        Compile(
            f"{BALANCE}:begin_kernel",
            signature={
                **dict.fromkeys(("p_lengths", "p_tokens", "p_counts", "p_filled"), "*i32"),
                **{"p_ends": "*i64", "S": "i32", "n_counts": "i32"},
            },
            constants={"BLOCK": BEGIN_BLOCK},
        ),
    ]
    for n_experts, top_k, score in [(6, 2, "sigmoid"), (256, 8, "sigmoid"), (1000, 32, "softmax")]:
        config = choose_config(n_experts)
        common = {
            "constants": {
                **{"E": n_experts, "TOP_K": top_k, "SOFTMAX": score == "softmax"},
                **{"ROWS": config.rows, "COLUMNS": config.members},
            },
            "divisible": ("stride_lt",) if n_experts % 16 == 0 else (),
            "num_warps": config.num_warps,
        }
        choices = {"NORMALIZE": True, "CHOICES": 1 << (top_k - 1).bit_length()}
        kernels += [
            Compile(
                "dskernels.routing.triton:route_backward_kernel",
                signature={
                    **{**ROW, "p_grad": "*fp32", "p_weights": "*fp32", "p_experts": "*i32"},
                    **{"p_dlogits": "*fp32", "scale": "fp32"},
                },
                **{**common, "constants": {**common["constants"], **choices}},
            ),
            Compile(
                f"{BALANCE}:count_choices_kernel",
                signature={**ROW, **SEQUENCES, "p_ends": "*i64", "p_filled": "*i32", "S": "i32", "steps": "i32"},
                **common,
            ),
            Compile(f"{BALANCE}:token_loss_kernel", signature={**ROW, **SEQUENCES, "p_loss": "*fp32"}, **common),
            Compile(
                f"{BALANCE}:balance_loss_backward_kernel",
                signature={
                    **{**ROW, **SEQUENCES, "p_grad": "*fp32", "p_filled": "*i32"},
                    **{"p_dlogits": "*fp32", "alpha": "fp32"},
                },
                **common,
            ),
            Compile(
                f"{BALANCE}:update_bias_kernel",
                signature={"p_bias": "*fp32", "p_load": "*i32", "rate": "fp32"},
                constants={"E": n_experts, "COLUMNS": config.members},
                num_warps=1,
            ),
        ]
    assert_clean(compile_all(kernels))


POINTERS = {1: "*bf16", 2: "*fp16", 3: "*fp32"}  # by how many bf16 numbers hold one
H200, AMD = (9, 0), (0, 0)  # capabilities, as choose_gate_config is given them


def test_choose_gate_config():
    one = choose_gate_config(1, 256, 7168, False, 132, H200)
    assert (one.block_m, one.block_n, one.parts) == (16, 32, 16)
    assert choose_gate_config(128, 256, 7168, False, 132, H200).parts == 16
    many = choose_gate_config(8192, 256, 7168, False, 132, H200)
    assert (many.block_m, many.block_n, many.parts) == (128, 64, 1)
    assert choose_gate_config(8192, 256, 7168, True, 132, H200).block_k == many.block_k // 2
    assert choose_gate_config(1, 8, 64, False, 132, H200).parts == 1  # a part has two steps at least
    assert choose_gate_config(7, 8, 1, True, 1, H200).parts == 1
    gradient = choose_gate_config(64, 2048, 16384, True, 132, H200, of_weight=True)
    assert (gradient.block_m, gradient.parts) == (64, 16)
    assert choose_gate_config(1, 256, 7168, True, 304, AMD).num_warps == 4
    assert choose_gate_config(8192, 256, 7168, False, 304, AMD).num_stages == 3


EVERY_PAIR = [(1, 1), (1, 3), (3, 1), (3, 3), (2, 2)]


@pytest.mark.parametrize(("m", "pairs"), [(1, [(1, 1), (3, 3)]), (128, EVERY_PAIR), (8192, [(1, 1), (3, 3)])])
def test_the_gate_compiles_without_spills(m, pairs):
    """Every tile with the fewest and the most pieces, one with every pair; one part has another end than several."""
    kernels = []
    for (a, b), arch in itertools.product(pairs, (H200, AMD)):
        config = choose_gate_config(m, 256, 7168, (a, b) != (1, 1), 132, arch)
        if IN_PART and arch == AMD and config == choose_gate_config(m, 256, 7168, (a, b) != (1, 1), 132, H200):
            continue
        whole = config.parts == 1 or (a, b) == (2, 2)
        programmatic = m == 1 and (a, b) == (1, 1) and arch == H200  # where launches overlap, as from sm_90 on
        kernels.append(
            Compile(
                "dskernels.routing.triton_gate:gate_kernel",
                signature={
                    **{"p_a": POINTERS[a], "p_b": POINTERS[b], "p_out": "*fp32", "M": "i32", "N": "i32", "K": "i32"},
                    **{"K_of_part": "i32", "one": "fp32", "stride_am": "i32", "stride_bn": "i32"},
                },
                constants={
                    **{"stride_ak": 1, "stride_bk": 1, "PIECES_A": a, "PIECES_B": b},
                    **{"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "WHOLE": whole},
                    "PROGRAMMATIC": programmatic,
                },
                targets=("gfx942",) if arch == AMD else ("sm_90", "sm_100") if programmatic else (),
                divisible=("K_of_part", "stride_am", "stride_bn"),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                options=OPTIONS if arch == H200 else {},
            )
        )
    reports = compile_all(kernels)
    assert_clean(reports)
    for report in reports:
        if report.source.constants["WHOLE"] and report.target != "gfx942":
            assert report.count("LDGSTS.E.BYPASS.128", "LDGSTS.E.BYPASS.LTC128B.128") > 0, report


@pytest.mark.parametrize("x", [1, 3])
def test_the_gradient_of_the_gate_compiles_without_spills(x):
    """Of the weight: both operands as they lie turned, fp32 in three pieces; of bf16 and of fp32 tokens."""
    config = choose_gate_config(64, 2048, 16384, True, 132, H200, of_weight=True)
    assert config == choose_gate_config(64, 2048, 16384, True, 132, AMD, of_weight=True)
    gradient = Compile(
        "dskernels.routing.triton_gate:gate_kernel",
        signature={
            **{"p_a": "*fp32", "p_b": POINTERS[x], "p_out": "*fp32", "M": "i32", "N": "i32", "K": "i32"},
            **{"K_of_part": "i32", "one": "fp32", "stride_ak": "i32", "stride_bk": "i32"},
        },
        constants={
            **{"stride_am": 1, "stride_bn": 1, "PIECES_A": 3, "PIECES_B": x, "WHOLE": True, "PROGRAMMATIC": False},
            **{"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k},
        },
        divisible=("K_of_part", "stride_ak", "stride_bk"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        options=OPTIONS,
    )
    assert_clean(compile_all([gradient]))


def test_small_kernels_compile_without_spills():
    integers = dict.fromkeys(("p_experts", "p_physical", "p_placed"), "*i32")
    assert_clean(
        compile_all(
            [
                Compile(
                    "dskernels.routing.triton:place_kernel",
                    signature={**integers, "n": "i32", "replicas": "i32"},
                    constants={"TOP_K": 8, "BLOCK": 512},
                ),
                Compile(
                    "dskernels.routing.triton_gate:sum_parts_kernel",
                    signature={"p_parts": "*fp32", "p_out": "*bf16", "n": "i32", "parts": "i32"},
                    constants={"BLOCK": 1024},
                ),
                Compile(
                    "dskernels.routing.hopper_gate:pieces_kernel",
                    signature={"p_x": "*fp32", "p_out": "*bf16", "n": "i32", "E": "i32"},
                    constants={"PIECES": 3, "BLOCK": 1024},
                    targets=("sm_90",),
                ),
            ]
        )
    )
