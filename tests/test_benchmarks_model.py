"""Whole models in the benchmark suite: their random weights, their roofs by hand, and transformers on their weights."""

import dataclasses
import weakref
from unittest.mock import MagicMock

import pytest
import torch

import dskernels as ds
from benchmarks import model_roofline, models, workloads
from benchmarks.bench_model import DecodeStep, Prefill
from benchmarks.cases import calc_diff, difference
from benchmarks.roofline import Chain, Roofs, Work
from benchmarks.workloads import ModelDecode, ModelPrefill
from dskernels.model import Batch, Config

CPU = torch.device("cpu")
ROOFS = Roofs(copy_gbs=3000.0, bf16_tflops=700.0, fp8_tflops=1400.0)
E4M3 = torch.float8_e4m3fn


def test_the_floor_of_a_chain_is_the_sum_of_floors():
    moves, multiplies = Work(None, 3_000_000), Work(1_400_000_000, 1, "fp8")
    chain = Chain((moves, multiplies))
    assert ROOFS.floor_us(chain) == pytest.approx(1 + 1)
    assert chain.bytes == 3_000_001
    assert chain.gbs(1.0) == pytest.approx(3000, rel=1e-6)
    assert chain.tflops(1.0) == pytest.approx(1400)


def test_weights_of_a_decode_step():
    """With one token and hardly a cache, a step reads the weights that it is multiplied by, each once."""
    config = models.config_of(workloads.MODEL_V3_SLICE)
    work = model_roofline.decode_step(config, ModelDecode(workloads.MODEL_V3_SLICE, 1, 1))
    vectors = config.hidden_size * config.n_routed_experts * 2  # of both routers, in bf16 and counted once as active
    head = config.vocab_size * config.hidden_size
    absorbed = 3 * config.kv_lora_rank * config.num_attention_heads * 256
    active = config.parameter_count().active
    assert work.bytes == pytest.approx(active + head + absorbed + vectors, rel=2e-3)  # and activations, and scales
    assert work.flops == pytest.approx(2 * active, rel=2e-3)


def test_the_floors_of_the_slice():
    """Milliseconds that bytes and operations alone take on an H100."""
    config = models.config_of(workloads.MODEL_V3_SLICE)
    decode = model_roofline.decode_step(config, ModelDecode(workloads.MODEL_V3_SLICE, 32, 2048))
    assert ROOFS.floor_us(decode) / 1e3 == pytest.approx(5.8, abs=0.2)
    prefill = model_roofline.prefill(config, ModelPrefill(workloads.MODEL_V3_SLICE, 4096))
    # 17 are of weights and products; the rest is between them.
    assert ROOFS.floor_us(prefill) / 1e3 == pytest.approx(17.8, abs=0.1)


def test_cached_rows_and_touched_experts_count():
    config = Config.from_name("moonlight")
    few, many, long = (
        model_roofline.decode_step(config, ModelDecode("moonlight", b, s)) for b, s in ((1, 64), (128, 64), (1, 6464))
    )
    expert = 3 * config.moe_intermediate_size * config.hidden_size
    assert many.bytes - few.bytes == pytest.approx(26 * (64 - 6) * expert, rel=0.1)
    assert long.bytes - few.bytes == 6400 * 27 * 576 * 2


def test_random_weights():
    model = models.random_model(workloads.MODEL_TINY, CPU)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.float().isfinite().all(), name
        if name.endswith(("weight", "w13", "w2")) and "norm" not in name and "embed" not in name:
            assert tensor.dtype == (E4M3 if name.split(".")[-2] not in ("gate", "lm_head") else torch.bfloat16), name
            assert tensor.float().std() > 0, name
    assert not model.layers[1].mlp.gate.e_score_correction_bias.any()


@pytest.mark.parametrize("case", [DecodeStep(ModelDecode("tiny", 3, 70)), Prefill(ModelPrefill("tiny", 70))])
def test_transformers_on_our_weights_agrees(case):
    """Its bf16 products against ours in e4m3; and again, its cache being longer by what the first call added."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    x = case.inputs(CPU)
    expected = case.ours(x, "reference")()
    (prepare,) = case.peers(x).values()
    peer = prepare()
    for _ in range(2):
        assert difference(peer.result(peer.run()), expected) < case.peer_tolerance


@pytest.mark.parametrize("case", [DecodeStep(ModelDecode("tiny", 3, 70)), Prefill(ModelPrefill("tiny", 70))])
def test_a_pass_again_is_the_same(case):
    x = case.inputs(CPU)
    call = case.ours(x, None)
    assert torch.equal(call(), call())


def test_sizes_are_named():
    assert ModelDecode("moonlight", 128, 1024).name == "moonlight_b128_s1024"
    assert ModelPrefill("v3-slice", 4096).name == "v3-slice_s4096"
    assert dataclasses.replace(models.config_of("v3-slice"), num_hidden_layers=61).hidden_size == 7168


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("kind", ["decode", "prompt"])
def test_blocks_at_full_dimensions_are_the_references(kind):
    """DeepSeek-V3's dense block and one of 256 experts, each given the same: the stream behind the attention, and what
    the feed-forward adds for tokens whose experts are the same (two nearly alike may change places at a rounding).
    """
    device = torch.device("cuda")
    w = (
        ModelDecode(workloads.MODEL_V3_SLICE, 4, 300)
        if kind == "decode"
        else ModelPrefill(workloads.MODEL_V3_SLICE, 200)
    )
    x = models.Inputs.of(w, device)
    if kind == "decode":
        batch = Batch.decode(x.lengths, 1, x.table, x.cache.page_size)
    else:
        batch = Batch.prompt(torch.nn.functional.pad(x.lengths, (1, 0)), w.tokens, x.table, x.cache.page_size)
    cos, sin = x.model.rope(batch.positions)
    for block, pages in zip(x.model.layers[:2], x.cache.data, strict=False):
        hidden = torch.randn(w.tokens, 7168, dtype=torch.bfloat16, device=device)
        with ds.use_impl("reference"):
            want, want_update, want_router = block(hidden, None, batch, cos, sin, pages)
        got, update, router = block(hidden, None, batch, cos, sin, pages)
        # The attention's part is DAMPING of the stream; e4m3 elements that round the other way are some percent of it.
        assert calc_diff(got, want) < 1e-4
        same = torch.ones(w.tokens, dtype=torch.bool, device=device)
        if router is not None:
            chosen, expected = (r.routing.experts.sort(1).values for r in (router, want_router))
            same = (chosen == expected).all(1)
            assert same.float().mean() >= 0.5
        assert calc_diff(update[same], want_update[same]) < 5e-3
    models.random_model.cache_clear()


def test_a_graph_keeps_what_its_step_reads(monkeypatch):
    """Parameters and targets that nobody else has: let go of, they were read by a replay after the driver had them
    back (a training step in bf16 ended in an illegal access)."""

    class Step:
        def __init__(self):
            self.read = torch.ones(3)

        def run(self):
            return self.read + 1

    step = Step()
    alive = weakref.ref(step.read)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "cuda", MagicMock())
        replay = models.graph_of(step.run)
        del step
        assert alive() is not None
        assert replay().tolist() == [2, 2, 2]
        replay.graph.replay.assert_called_once_with()
    del replay
    assert alive() is None
