"""Steps as CUDA graphs: every number is that of steps without, whatever changes from one to the next."""

from types import SimpleNamespace

import pytest
import torch
from tiny import packed, tiny_model

import dskernels as ds
from dskernels.model import Config, train_graph
from dskernels.model.data import Corpus, Packed
from dskernels.model.loss import losses
from dskernels.model.train import MEASURED, TrainConfig, train
from dskernels.model.train_graph import StepGraphs, padded

SMALL = {"num_hidden_layers": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
# What Hopper's kernels take.
WIDE = {**SMALL, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 2}
WIDE |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512, "q_lora_rank": None}
# The rate rises, rests and falls, the weight of the MTP loss changes, biases come to rest.
RECIPE = {"steps": 24, "batch_tokens": 512, "sequence_length": 64, "learning_rate": 3e-3, "warmup_steps": 4}
RECIPE |= {"decay_from": 0.4, "settle_from": 0.8, "bias_update_rate": 0.01, "validate_every": 7}


def corpus():
    """Documents of 2 to 90 tokens: batches of very different numbers of sequences, and some of the same."""
    generator = torch.Generator().manual_seed(3)
    short = [torch.randint(0, 257, (int(n),), generator=generator) for n in torch.arange(2, 60, 2)]
    long = [torch.arange(90).add(i).remainder(257) for i in range(40)]
    return Corpus([*short, *long], [torch.arange(200).remainder(257)])


def histories(tmp_path, recipe, config, device, **changes):
    """Of a run with graphs and of one without."""
    return [
        [
            {name: value for name, value in line.items() if name not in MEASURED}
            for line in train(
                config, corpus(), recipe, out=tmp_path / str(graph), device=device, cuda_graph=graph, **changes
            )
        ]
        for graph in (True, False)
    ]


def test_sequences_without_tokens_change_no_bit():
    model = tiny_model(**SMALL)
    batch = Packed(*packed(*(torch.randint(0, 257, (n,)) for n in (9, 1, 7))))
    found = []
    for text in (batch, padded(batch)):
        parts = losses(model(*text, mtp=True), text, model.config, balance_alpha=0.1)
        gradients = torch.autograd.grad(sum(parts), list(model.parameters()))
        found.append((*parts, *gradients))
    assert padded(batch).cu_seqlens.shape == (17,)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_inputs_lie_where_a_graph_reads_them(tmp_path, monkeypatch, microbatches):
    """On the CPU, with graphs that run the step: again from what lies there."""
    replays = []

    def capture(self, inputs, mtp):
        values = torch.zeros(5 + len(model_layers))

        def replay():
            values.copy_(self.step(inputs, mtp))
            replays.append(inputs)

        return values, SimpleNamespace(replay=replay)

    monkeypatch.setattr(StepGraphs, "_capture", capture)
    monkeypatch.setattr(train_graph, "FEWEST", 1)
    monkeypatch.setattr("dskernels.model.train.GRAPHED", ("cpu", "cuda"))
    config = Config.from_name("tiny", **SMALL)
    model_layers = tiny_model(config).moe_layers
    recipe = TrainConfig(**{**RECIPE, "steps": 10, "batch_tokens": 96}, precision="bf16", microbatches=microbatches)
    with_graphs, without = histories(tmp_path, recipe, config, "cpu")
    assert with_graphs == without
    kinds = {tuple(batch.cu_seqlens.shape for batch in inputs.text) for inputs in replays}
    assert len(replays) > 3
    assert len(kinds) > 1


def test_a_graph_wants_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="cuda_graph: expected a GPU, the device is cpu"):
        train(Config.from_name("tiny"), corpus(), TrainConfig(**RECIPE), out=tmp_path, device="cpu", cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("changes", [{}, {"microbatches": 2, "recompute": False}, {"mtp_lambda": 0.0}])
def test_graphs_have_the_bits_of_steps(sm_90, tmp_path, precision, changes):
    recipe = TrainConfig(**RECIPE, precision=precision, **changes)
    with_graphs, without = histories(tmp_path, recipe, Config.from_name("tiny", **WIDE), "cuda")
    assert with_graphs == without


@pytest.mark.gpu
def test_graphs_of_the_portable_kernels(tmp_path):
    with ds.use_impl("triton"):
        recipe = TrainConfig(**RECIPE, precision="bf16")
        with_graphs, without = histories(tmp_path, recipe, Config.from_name("tiny", **WIDE), "cuda")
    assert with_graphs == without


@pytest.mark.gpu
def test_what_is_not_finite_stops_a_run_with_graphs(sm_90, tmp_path):
    recipe = TrainConfig(**{**RECIPE, "learning_rate": 1e30}, precision="bf16", clip=1e30)
    with pytest.raises(FloatingPointError, match="the first tensor not finite is"):
        train(Config.from_name("tiny", **WIDE), corpus(), recipe, out=tmp_path, device="cuda")


@pytest.mark.gpu
def test_a_run_with_graphs_goes_on_from_a_checkpoint(sm_90, tmp_path):
    """With an average of the weights, which is copied beside the steps; without graphs after the checkpoint."""
    config, recipe = Config.from_name("tiny", **WIDE), TrainConfig(**RECIPE, precision="fp8", ema=0.9)

    def stop(line):
        if line.get("step") == 17 and "loss" in line:
            raise KeyboardInterrupt

    whole = train(config, corpus(), recipe, out=tmp_path / "whole", device="cuda")
    with pytest.raises(KeyboardInterrupt):
        train(config, corpus(), recipe, out=tmp_path / "run", device="cuda", checkpoint_every=8, progress=stop)
    rest = train(config, corpus(), recipe, out=tmp_path / "run", device="cuda", checkpoint_every=8, cuda_graph=False)
    for line, other in zip(rest, whole, strict=True):
        assert {k: v for k, v in line.items() if k not in MEASURED} == {
            k: v for k, v in other.items() if k not in MEASURED
        }
    assert "ema_validation_loss" in whole[-1]
