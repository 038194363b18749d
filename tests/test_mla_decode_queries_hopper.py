"""Absorbed queries in CUDA C++: compiled here, what it does not take, and on a GPU against fp64."""

import math

import pytest
import torch

import dskernels as ds
from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels.mla.absorb import hopper
from dskernels.mla.absorb.config import HOPPER_CONFIGS, choose_hopper
from test_mla_decode_queries import assert_exact, new_queries

DIMS = (128, 64, 512)


@pytest.mark.parametrize("config", HOPPER_CONFIGS, ids=str)
def test_compiles_without_spills(config):
    report = compile_cuda(hopper.SOURCE, hopper.options_of(config, 0), config.shared)
    assert_clean([report], max_registers=65536 // config.threads)
    assert report.count(f"HGMMA.64x{config.tokens}x16.F32.BF16") == 8
    assert report.count("STSM") == config.tokens // 16


def test_compiles_for_fp16():
    config = choose_hopper(17, 128, 132)
    report = compile_cuda(hopper.SOURCE, hopper.options_of(config, 1), config.shared)
    assert_clean([report])
    assert report.count("HGMMA.64x32x16.F32") == 8


def test_choice_covers_every_config():
    chosen = {choose_hopper(t, h, 132) for t in range(1, 300) for h in (1, 8, 16, 32, 64, 128)}
    assert chosen == set(HOPPER_CONFIGS)
    assert all(config.shared <= 232_448 for config in HOPPER_CONFIGS)


def test_what_it_does_not_take():
    q, w_uk, cos, sin = new_queries(3, 2, DIMS, torch.bfloat16)

    def reason(q=q, w_uk=w_uk):
        return hopper.mla_decode_queries_supports(q, w_uk, cos, sin)

    assert "it takes bf16 and fp16, q is float32" in reason(q.float(), w_uk.float())
    assert "it takes 128 columns without rope" in reason(q[..., 8:], w_uk[:, 8:])
    assert "it takes 128 columns without rope" in reason(w_uk=w_uk[..., :256])
    assert "there are no queries" in reason(q[:0])
    assert "there are no queries" in reason(q[:, :0], w_uk[:0])
    assert "the rows of q must be aligned to 16 bytes" in reason(torch.zeros(3, 2, 196).bfloat16()[..., :192])
    assert "the rows of q must be aligned to 16 bytes" in reason(torch.zeros(3, 2, 200).bfloat16()[..., 4:196])
    assert "the rows of w_uk must be aligned to 16 bytes" in reason(w_uk=w_uk[:1].expand(2, -1, -1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "heads"),
    [(1, 1), (3, 16), (17, 128), (64, 128), (100, 16), (128, 128), (130, 48), (513, 8)],
)
def test_against_fp64(device, dtype, tokens, heads):
    inputs = new_queries(tokens, heads, DIMS, dtype, device)
    got = ds.mla_decode_queries(*inputs, impl="hopper")
    assert_exact(got, inputs)


@pytest.mark.gpu
def test_strided_operands_and_tokens_of_none(device):
    """Within wider tensors, whose other columns and rows are NaN; every token of the result is written, and no more."""
    q, w_uk, cos, sin = new_queries(21, 3, DIMS, torch.bfloat16, device)
    wide = torch.full((25, 5, 208), math.nan, device=device).bfloat16()
    wide[2:23, 1:4, 8:200] = q
    kv_b = torch.full((3, 256, 512), math.nan, device=device).bfloat16()
    kv_b[:, :128] = w_uk
    table = torch.cat([cos, sin], dim=-1)
    part = wide[2:23, 1:4, 8:200], kv_b[:, :128], table[:, :32], table[:, 32:]
    out = torch.full((23, 3, 576), math.nan, device=device).bfloat16()
    hopper._mla_decode_queries(*part, out[1:22])
    assert torch.equal(out[1:22], ds.mla_decode_queries(q, w_uk, cos, sin, impl="hopper"))
    assert out[[0, 22]].isnan().all()
    assert_exact(out[1:22], (q, w_uk, cos, sin))


@pytest.mark.gpu
def test_a_token_has_the_same_bits_in_any_company(device):
    q, w_uk, cos, sin = new_queries(300, 16, DIMS, torch.bfloat16, device)
    whole = ds.mla_decode_queries(q, w_uk, cos, sin, impl="hopper")
    for tokens in (1, 20, 40, 128):
        few = ds.mla_decode_queries(q[:tokens], w_uk, cos[:tokens], sin[:tokens], impl="hopper")
        assert torch.equal(few, whole[:tokens])
