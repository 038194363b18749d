"""A run that begins with the weights of another: which, in which precision, and what does not fit."""

import dataclasses
import json

import pytest
import torch
from test_train import QUICK, SMALL, numbers
from test_train_state import stop_at
from tiny import small_corpus

from dskernels.model import Config, DeepseekV3, load, save
from dskernels.model.checkpoint import load_weights
from dskernels.model.train import TrainConfig, train
from dskernels.model.train_begin import first_model

MODEL = Config.from_name("tiny", **{**SMALL, "n_routed_experts": 4})
SHORT = {**QUICK, "steps": 4, "batch_tokens": 32, "validate_every": 2, "validation_batches": 1}


@pytest.fixture(scope="module")
def corpus():
    return small_corpus()


def run(corpus, out, precision):
    config = TrainConfig(**{**SHORT, "precision": precision}, bias_update_rate=0.01)
    return out, train(MODEL, corpus, config, out=out)


@pytest.fixture(scope="module")
def first(corpus, tmp_path_factory):
    """The folder of a run of some steps in bf16, whose router biases have moved, and its history."""
    return run(corpus, tmp_path_factory.mktemp("bf16"), "bf16")


@pytest.mark.parametrize(("before", "precision"), [("bf16", "fp8"), ("fp8", "bf16"), ("bf16", "bf16"), ("fp8", "fp32")])
def test_the_first_weights_are_those_of_the_other_run(corpus, first, tmp_path, before, precision):
    """At step 0 every weight and bias is the one that was written, and the held-out loss is the other run's last."""
    folder, there_before = first if before == "bf16" else run(corpus, tmp_path / "first", before)
    config = TrainConfig(**{**SHORT, "precision": precision, "steps": 2})
    model, there = first_model(MODEL, config, torch.device("cpu"), config.dtype, folder), load(folder)
    state = there.state_dict()
    assert model.embed_tokens.weight.dtype == config.dtype
    assert any(state[name].any() for name in state if name.endswith("e_score_correction_bias"))
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name

    history = train(MODEL, corpus, config, out=tmp_path / "run", init=folder)
    assert [line["step"] for line in history] == [0, 1, 2, 2]
    now, last = (lines["validation_loss"] for lines in (history[0], there_before[-1]))
    assert now == (last if precision == before else pytest.approx(last, rel=0.02))
    assert history[-1]["validation_loss"] < now
    assert not torch.equal(load(tmp_path / "run").lm_head.weight, there.lm_head.weight)


def test_the_optimiser_and_the_text_begin_anew(corpus, first, tmp_path):
    """The seed decides the order of the text and nothing of the weights; the rate rises again."""
    folder, _ = first
    config = TrainConfig(**{**SHORT, "steps": 2})
    runs = [
        train(MODEL, corpus, dataclasses.replace(config, seed=seed), out=tmp_path / name, init=folder)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert numbers(runs[0]) == numbers(runs[1])
    assert runs[0][1]["loss"] != runs[2][1]["loss"]
    assert runs[0][1]["learning_rate"] == config.learning_rate_at(0)


def test_gone_on_with_the_other_run_is_not_read_again(corpus, first, tmp_path):
    folder, _ = first
    copy = tmp_path / "copy"
    save(load(folder), copy)
    config = TrainConfig(**SHORT)
    options = dict(init=copy, checkpoint_every=1)
    whole = train(MODEL, corpus, config, out=tmp_path / "whole", **options)
    killed, progress = stop_at(3)
    with pytest.raises(killed):
        train(MODEL, corpus, config, out=tmp_path / "parts", progress=progress, **options)
    with pytest.raises(ValueError, match=r"another run, its recipe has init = '.*copy', asked for is None"):
        train(MODEL, corpus, config, out=tmp_path / "parts", checkpoint_every=1)
    (copy / "model.safetensors").unlink()
    history = train(MODEL, corpus, config, out=tmp_path / "parts", **options)
    assert numbers(history) == numbers(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, r"model\.safetensors: tensor model\.embed_tokens\.weight has shape .*, expected "),
        ({"moe_intermediate_size": 32}, r"tensor model\.layers\.1\.mlp\.experts\.0\.\w+\.weight has shape"),
        ({"num_hidden_layers": 3}, r"tensor model\.layers\.\d\.\S+ "),
        ({"num_nextn_predict_layers": 0}, r"unknown tensor model\.layers\.2\."),
        ({"num_nextn_predict_layers": 2}, r"tensor model\.layers\.3\.\S+ is missing"),
        ({"num_experts_per_tok": 4}, r"config\.json: num_experts_per_tok is 2, that of the model is 4"),
        ({"rope_theta": 500.0}, r"config\.json: rope_theta is 10000\.0, that of the model is 500\.0"),
    ],
)
def test_what_does_not_fit_is_named(corpus, first, tmp_path, changes, message):
    """By one line, before a step and before anything in the folder of the run."""
    folder, _ = first
    with pytest.raises(ValueError, match=message) as error:
        train(MODEL.replace(**changes), corpus, TrainConfig(**SHORT), out=tmp_path / "run", init=folder)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_longer_context_and_another_text_fit(first):
    folder, _ = first
    changes = {"max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": (2,), "initializer_range": 1.0}
    model = DeepseekV3(MODEL.replace(**changes))
    load_weights(model, folder)
    assert torch.equal(model.embed_tokens.weight, load(folder).embed_tokens.weight.float())


def test_a_checkpoint_in_fp8_blocks(tmp_path):
    """Weights in e4m3 with scales are read as what they stand for."""
    config = Config.from_name("tiny", **{**SMALL, "hidden_size": 128, "intermediate_size": 128})
    source = DeepseekV3(config)
    save(source, tmp_path, fp8=True)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    model = DeepseekV3(config, dtype=torch.bfloat16)
    load_weights(model, tmp_path)
    expected = load(tmp_path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_folder_that_is_none(corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        train(MODEL, corpus, TrainConfig(**SHORT), out=tmp_path / "run", init=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        train(MODEL, corpus, TrainConfig(**SHORT), out=tmp_path / "run", init=tmp_path / "empty")
