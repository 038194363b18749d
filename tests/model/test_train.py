"""Training: losses against loops over tokens, gradients against differences, and the recipe's promises step by step."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from tiny import packed, tiny_model

import dskernels as ds
from dskernels import reference
from dskernels.model import Config, DeepseekV3, LatentCache, Output, RouterOutput, generate, load
from dskernels.model.data import BOUNDARY, Batches, Corpus, Packed
from dskernels.model.loss import losses
from dskernels.model.optimizer import MasterAdamW, clipping
from dskernels.model.train import MEASURED, TrainConfig, evaluate, train
from dskernels.model.train_step import Stepper

SMALL = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, n_routed_experts=8)
SMALL |= dict(n_group=1, topk_group=1, num_experts_per_tok=2, q_lora_rank=None, routed_scaling_factor=1.0)
QUICK = dict(steps=30, batch_tokens=128, sequence_length=32, learning_rate=1e-2, final_learning_rate=1e-3)
QUICK |= dict(warmup_steps=5, precision="fp32", validate_every=10, validation_batches=2)


@pytest.fixture
def corpus():
    """Lines that repeat themselves: a model of any use learns them in a few steps."""
    text = torch.tensor(list(b"for i in range(10):\n    print(i)\n" * 20), dtype=torch.int16)
    boundary = torch.tensor([BOUNDARY], dtype=torch.int16)
    documents = [torch.cat((boundary, text[i:], boundary)) for i in range(4)]
    return Corpus(documents[1:], documents[:1])


def small_model(**changes):
    return tiny_model(Config.from_name("tiny", **{**SMALL, **changes}))


def random_batch(*lengths):
    return Packed(*packed(*(torch.randint(0, 257, (n,)) for n in lengths)))


def optimizer_of(model):
    return MasterAdamW(model, betas=(0.9, 0.95), weight_decay=0.1)


def one_step(model, optimizer, text, config, step):
    """The line of a step, once it is done."""
    stepper = Stepper(model, optimizer, config)
    return numbers([stepper.finish(stepper.start(text, step))])[0]


def numbers(history):
    """A history without what the clock and the machine say."""
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in history]


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_losses_are_sums_over_tokens():
    config = Config.from_name("tiny", num_nextn_predict_layers=2)
    T, V, E = 12, config.vocab_size, config.n_routed_experts
    # A sequence of one token predicts nothing, one of two has nothing for MTP, an empty one is padding.
    sequences = [torch.randint(0, V, (n,)) for n in (6, 1, 2, 0, 3)]
    batch = Packed(*packed(*sequences))
    logits = [torch.randn(T, V) for _ in range(3)]
    routers = tuple(RouterOutput(torch.randn(T, E), None) for _ in range(2))
    got = losses(Output(logits[0], torch.empty(T, 8), tuple(logits[1:]), routers), batch, config, balance_alpha=0.01)

    predictions = sum(max(len(s) - 1, 0) for s in sequences)
    expected = []
    for ahead, scores in enumerate(logits, 1):
        log_p = scores.double().log_softmax(-1)
        total, start = 0.0, 0
        for s in sequences:
            total -= sum(log_p[start + i, s[i + ahead]].item() for i in range(len(s) - ahead))
            start += len(s)
        expected.append(total / predictions)  # by T of eq. 24, not by the number of its terms
    assert got.main.item() == pytest.approx(expected[0], rel=1e-6)
    assert got.mtp.item() == pytest.approx((expected[1] + expected[2]) / 2, rel=1e-6)

    balance = 0.0
    for router in routers:
        start, by_sequence = 0, []
        for s in filter(len, sequences):
            score = router.logits[start : start + len(s)].double().sigmoid()
            start += len(s)
            chosen = [row.topk(config.num_experts_per_tok).indices.tolist() for row in score]
            f = [E / (config.num_experts_per_tok * len(s)) * sum(e in c for c in chosen) for e in range(E)]
            p = (score / score.sum(-1, keepdim=True)).mean(0)
            by_sequence.append(0.01 * sum(f[e] * p[e].item() for e in range(E)))
        balance += sum(by_sequence) / len(by_sequence)
    assert got.balance.item() == pytest.approx(balance, rel=1e-6)


def test_losses_of_a_model_without_experts_and_mtp():
    config = Config.from_name("tiny", **SMALL, first_k_dense_replace=2, num_nextn_predict_layers=0)
    batch = random_batch(5)
    got = losses(tiny_model(config)(*batch, mtp=True), batch, config, balance_alpha=1.0)
    assert got.main > 0
    assert got.mtp == got.balance == 0


def test_gradient_is_the_slope_of_the_loss():
    model = small_model()
    for i, moe in enumerate(model.moe_layers):
        # Biases that no score outweighs: an expert that is exchanged would be a jump in the loss.
        moe.gate.e_score_correction_bias.copy_(torch.arange(8.0).roll(i) * 10)
    batch = random_batch(9, 7)

    def loss():
        parts = losses(model(*batch, mtp=True), batch, model.config, balance_alpha=0.0)
        return parts.main + 0.3 * parts.mtp

    loss().backward()
    # One of each kind: embedding, attention, the router (through the gates), experts, MTP, head.
    names = ["embed_tokens.weight", "layers.0.self_attn.kv_b_proj.weight", "layers.1.mlp.gate.weight"]
    names += ["layers.1.mlp.experts.w13", "mtp.0.mlp.experts.w2", "mtp.0.eh_proj.weight", "lm_head.weight"]
    for name in names:
        parameter = model.get_parameter(name)
        slope = parameter.grad.norm()
        assert slope > 1e-3, name
        step = 0.02 * parameter.grad / slope
        with torch.no_grad():
            parameter += step
            above = loss()
            parameter -= 2 * step
            below = loss()
            parameter += step
        assert (above - below).item() / 0.04 == pytest.approx(slope.item(), rel=0.01), name


def test_gradient_in_fp64_is_the_difference_of_the_loss(monkeypatch):
    """Every parameter of the whole model, all terms of the loss, against central differences along its gradient."""
    monkeypatch.setattr(ds, "route_hidden", reference.route_hidden)  # the operations take fp32 at most
    monkeypatch.setattr(ds, "balance_loss", reference.balance_loss)
    model = small_model().double()
    for i, moe in enumerate(model.moe_layers):
        moe.gate.e_score_correction_bias.copy_(torch.arange(8.0).roll(i) * 10)
        moe.experts.compute = lambda *inputs, n_shared, quantized, **options: reference.fused_experts(
            *inputs, **options
        )
    batch = random_batch(9, 7)

    def loss():
        with ds.use_impl("reference"):
            parts = losses(model(*batch, mtp=True), batch, model.config, balance_alpha=0.5)
        return parts.main + 0.3 * parts.mtp + parts.balance

    loss().backward()
    for name, parameter in model.named_parameters():
        slope = parameter.grad.norm()
        step = 1e-4 * parameter.grad / slope
        with torch.no_grad():
            parameter += step
            above = loss()
            parameter -= 2 * step
            below = loss()
            parameter += step
        # The third derivative times 1e-8, and 1e-16 of the loss by 1e-4: 4e-8 at most was seen.
        assert ((above - below) / 2e-4).item() == pytest.approx(slope.item(), rel=1e-6), name


# ---- a step ---------------------------------------------------------------------------------------------------------


def test_microbatches_are_parts_of_one_step():
    """Parts with different numbers of sequences, thus of predictions, give the loss and the update of the whole."""
    parts = [random_batch(16, 16), random_batch(2, 30)]
    whole = Packed(*packed(*(s for part in parts for s in part.tokens.split(part.cu_seqlens.diff().tolist()))))
    records, weights, biases = [], [], []
    for text in (parts, [whole]):
        torch.manual_seed(1)
        model = small_model()
        config = TrainConfig(**QUICK, microbatches=len(text), clip=1e9, bias_update_rate=0.01)
        records.append(one_step(model, optimizer_of(model), text, config, step=10))
        weights.append(model.layers[1].self_attn.o_proj.weight)
        biases.append(model.layers[1].mlp.gate.e_score_correction_bias)
    for name, value in records[0].items():
        assert value == pytest.approx(records[1][name], rel=1e-4), name
    torch.testing.assert_close(*weights, rtol=0, atol=1e-4)  # Adam: 1e-2 a step, whatever the gradient's size
    assert torch.equal(*biases)


def test_the_whole_load_of_a_step_moves_the_bias_once():
    model = small_model()
    text = [random_batch(16, 16), random_batch(16, 16)]
    with torch.no_grad():
        outputs = [model(*batch, mtp=True) for batch in text]
    before = [moe.gate.e_score_correction_bias.clone() for moe in model.moe_layers]
    config = TrainConfig(**QUICK, microbatches=2, bias_update_rate=0.125)
    record = one_step(model, optimizer_of(model), text, config, step=0)
    assert len(model.moe_layers) == 2  # one block, one MTP module
    busiest = 0.0
    for layer, (moe, old) in enumerate(zip(model.moe_layers, before, strict=True)):
        choices = sum(output.routers[layer].routing.load for output in outputs)
        assert choices.sum() == 64 * model.config.num_experts_per_tok  # each token once
        mean = choices.float().mean()
        expected = old + 0.125 * (mean - choices).sign()
        torch.testing.assert_close(moe.gate.e_score_correction_bias, expected, rtol=0, atol=1e-6)
        busiest = max(busiest, (choices.max() / mean).item())
    assert record["max_load"] == pytest.approx(busiest)


def test_recomputing_changes_no_number_and_counts_no_token_twice():
    records, biases = [], []
    for recompute in (False, True):
        torch.manual_seed(1)
        model = DeepseekV3(Config.from_name("tiny", **SMALL), recompute=recompute)
        config = TrainConfig(**QUICK, bias_update_rate=0.125)
        records.append(one_step(model, optimizer_of(model), [random_batch(16, 16)], config, step=0))
        biases.append([moe.gate.e_score_correction_bias for moe in model.moe_layers])
    assert records[0] == records[1]
    assert all(torch.equal(*pair) for pair in zip(*biases, strict=True))


def test_biases_rest_at_the_end():
    model = small_model()
    before = model.layers[1].mlp.gate.e_score_correction_bias.clone()
    config = TrainConfig(**QUICK)
    one_step(model, optimizer_of(model), [random_batch(16)], config, step=config.steps - 1)
    assert torch.equal(model.layers[1].mlp.gate.e_score_correction_bias, before)


def test_mtp_does_not_run_where_it_has_no_weight():
    model = small_model()
    before = model.mtp[0].mlp.gate.e_score_correction_bias.clone()
    config = TrainConfig(**QUICK, mtp_lambda=0.0)
    optimizer = optimizer_of(model)
    record = one_step(model, optimizer, [random_batch(16)], config, step=0)
    assert record["mtp_loss"] == 0
    assert torch.equal(model.mtp[0].mlp.gate.e_score_correction_bias, before)


def test_the_gradient_is_clipped():
    """Two gradients that differ a thousandfold in length make the same second step once both are clipped to 1e-3."""
    weights = []
    for factor in (1.0, 1000.0):
        parameter = torch.nn.Parameter(torch.ones(4, 4))
        module = torch.nn.Module()
        module.weight = parameter
        optimizer = MasterAdamW(module, betas=(0.9, 0.95), weight_decay=0.0)
        for direction in (1.0, -0.5):
            (parameter * torch.arange(16.0).view(4, 4) * direction * factor).sum().backward()
            optimizer.collect()
            norm = optimizer.norm()
            assert norm > 1e-3
            optimizer.step(0.1, clipping(norm, 1e-3))
        weights.append(parameter.detach())
    torch.testing.assert_close(*weights)


def test_masters_keep_what_bf16_forgets():
    """Steps of 1e-5 from 1: below half a unit in the last place of bf16, yet a thousand of them arrive."""
    module = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    twin = torch.nn.Linear(4, 4)
    with torch.no_grad():
        for parameter, other in zip(module.parameters(), twin.parameters(), strict=True):
            parameter.fill_(1.0)
            other.fill_(1.0)
    optimizer = MasterAdamW(module, betas=(0.9, 0.95), weight_decay=0.5)
    adamw = torch.optim.AdamW(
        [dict(params=[twin.weight], weight_decay=0.5), dict(params=[twin.bias], weight_decay=0.0)],
        lr=1e-5,
        betas=(0.9, 0.95),
    )
    for _ in range(1000):
        for parameter, other in zip(module.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.ones_like(parameter)
            other.grad = torch.ones_like(other)
        optimizer.collect()
        optimizer.step(1e-5)
        adamw.step()
    for parameter, master, other in zip(module.parameters(), optimizer.masters, twin.parameters(), strict=True):
        torch.testing.assert_close(master, other)
        assert torch.equal(parameter, master.bfloat16())
        assert (master < 0.995).all()
    assert (twin.weight < twin.bias).all()  # matrices decay, vectors do not


def test_gradients_add_up_in_fp32():
    """256 + 1 is 256 in bf16."""
    module = torch.nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    optimizer = MasterAdamW(module, betas=(0.9, 0.95), weight_decay=0.0)
    for value in (256.0, 1.0):
        module.weight.grad = torch.full_like(module.weight, value)
        optimizer.collect()
    assert torch.equal(optimizer.gradients()["weight"], torch.full((2, 2), 257.0))


# ---- what is not finite ---------------------------------------------------------------------------------------------


def not_finite(model, name=r".*"):
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=rf"^step 3: loss .*the first tensor not finite is {name} \(\d+ of"):
        one_step(model, optimizer_of(model), [random_batch(16)], TrainConfig(**QUICK), step=2)
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(1.5), weights[key].nan_to_num(1.5)), key  # nothing was updated


def test_a_parameter_that_is_not_finite_is_named():
    model = small_model()
    with torch.no_grad():
        model.layers[1].mlp.experts.w2[3, 4, 5] = math.nan
        model.layers[1].mlp.experts.w2[:3] = 0
        model.lm_head.weight[0, 0] = math.inf
    not_finite(model, r"parameter layers\.1\.mlp\.experts\.w2")


def test_a_module_that_overflows_is_named():
    model = small_model()
    with torch.no_grad():
        model.layers[0].mlp.w2.weight.fill_(3e38)
    not_finite(model, r"the output of layers\.0\.mlp\.w2")


def test_a_gradient_that_is_not_finite_is_named():
    model = small_model()
    model.layers[0].self_attn.o_proj.weight.register_hook(lambda gradient: gradient / 0)
    not_finite(model, r"gradient of layers\.0\.self_attn\.o_proj\.weight")


def test_a_run_that_diverges_stops_and_says_so(corpus, tmp_path):
    config = TrainConfig(**{**QUICK, "learning_rate": 1e30, "warmup_steps": 0})
    with pytest.raises(FloatingPointError, match=r"^step 2: loss .* the first tensor not finite is"):
        train(Config.from_name("tiny", **SMALL), corpus, config, out=tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2  # the look before, and step 1
    assert not (tmp_path / "model.safetensors").exists()


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_thirty_steps_learn_and_leave_a_checkpoint(corpus, tmp_path):
    seen = []
    config = TrainConfig(**QUICK)
    history = train(
        Config.from_name("tiny", **SMALL), corpus, config, out=tmp_path / "new" / "folder", progress=seen.append
    )
    out = tmp_path / "new" / "folder"
    steps = [line for line in history if "loss" in line]
    looks = [line for line in history if "validation_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 31))
    assert [line["step"] for line in looks] == [0, 10, 20, 30]
    assert steps[0]["loss"] == pytest.approx(math.log(257), abs=0.1)
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert steps[-1]["mtp_loss"] < 0.5 * steps[0]["mtp_loss"]
    assert looks[-1]["validation_loss"] < 0.5 * looks[0]["validation_loss"]
    assert [line["learning_rate"] for line in steps] == [config.learning_rate_at(step) for step in range(30)]
    assert all(line["tokens_per_second"] > 0 for line in steps)
    assert all(sum(layer) == 2 * 128 * 2 for look in looks for layer in look["load"])  # batches x tokens x top_k
    assert seen == history == [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    # The MTP module has learnt the lines too: its drafts stand, and change nothing.
    model, texts = load(out), []
    for drafts in (0, 1):
        cache = LatentCache(model.config, pages=8, dtype=torch.float32, device="cpu")
        prompt = corpus.train[0][:40].tolist()
        written = generate(model, [prompt], max_new_tokens=16, drafts=drafts, cache=cache)
        texts.append(written.finish())
    assert texts[0] == texts[1]
    assert written.acceptance_rate > 0.5
    assert written.steps < 14

    # What lies on the disk is the model that was looked at last.
    held_out = itertools.islice(Batches(corpus.validation, batch_tokens=128, sequence_length=32), 2)
    again = evaluate(load(out), list(held_out))
    assert again["validation_loss"] == pytest.approx(looks[-1]["validation_loss"], rel=1e-5)
    assert again["validation_mtp_loss"] == pytest.approx(looks[-1]["validation_mtp_loss"], rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_low_precision_learns_too(corpus, tmp_path, precision):
    config = TrainConfig(**{**QUICK, "precision": precision, "steps": 15, "decay_from": 1.0, "settle_from": 1.0})
    history = train(Config.from_name("tiny", **SMALL), corpus, config, out=tmp_path)
    assert history[-1]["validation_loss"] < 0.7 * history[0]["validation_loss"]
    assert load(tmp_path).lm_head.weight.dtype == torch.bfloat16


def test_the_seed_decides_everything(corpus, tmp_path):
    model = Config.from_name("tiny", **SMALL)
    config = TrainConfig(**{**QUICK, "steps": 3})
    torch.manual_seed(1)
    first = numbers(train(model, corpus, config, out=tmp_path / "a"))
    torch.manual_seed(2)
    assert numbers(train(model, corpus, config, out=tmp_path / "b")) == first
    assert numbers(train(model, corpus, dataclasses.replace(config, seed=1), out=tmp_path / "c")) != first


def test_the_bias_alone_evens_the_load(corpus, tmp_path):
    """Weights that hardly move and no balance loss: what evens the load is the bias."""
    rest = {**QUICK, "learning_rate": 1e-12, "final_learning_rate": 0.0, "balance_alpha": 0.0, "validate_every": 100}
    model = Config.from_name("tiny", **SMALL)

    def busiest(steps, rate):
        history = train(model, corpus, TrainConfig(**{**rest, "steps": steps}, bias_update_rate=rate), out=tmp_path)
        loads = [line["load"] for line in history if "load" in line]
        return [max(max(layer) * len(layer) / sum(layer) for layer in load) for load in loads]

    before, after = busiest(steps=2, rate=0.0)
    assert before == after > 2
    before, after = busiest(steps=30, rate=0.003)
    assert after < 1.6


@pytest.mark.parametrize(
    "changes",
    [
        dict(first_k_dense_replace=2, num_nextn_predict_layers=0),  # no experts at all
        dict(scoring_func="softmax", norm_topk_prob=False),  # no router bias
        dict(num_nextn_predict_layers=2),
    ],
    ids=["dense", "softmax", "two MTP modules"],
)
def test_other_members_of_the_family_train(corpus, tmp_path, changes):
    config = TrainConfig(**{**QUICK, "steps": 2})
    history = train(Config.from_name("tiny", **{**SMALL, **changes}), corpus, config, out=tmp_path)
    assert history[-1]["validation_loss"] < history[0]["validation_loss"]


def test_operations_run_by_the_implementation_asked_for(corpus, tmp_path):
    with ds.use_impl("hopper"), pytest.raises(ValueError, match="impl='hopper' cannot run this"):
        train(Config.from_name("tiny", **SMALL), corpus, TrainConfig(**QUICK), out=tmp_path, device="cpu")


def test_bad_places_and_texts_are_refused_before_training(corpus, tmp_path):
    model, config = Config.from_name("tiny", **SMALL), TrainConfig(**QUICK)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out: .*file is a file, expected a folder"):
        train(model, corpus, config, out=tmp_path / "file")
    with pytest.raises(ValueError, match="data: token 256 is not in the vocabulary of vocab_size = 200"):
        train(model.replace(vocab_size=200), corpus, config, out=tmp_path)
    with pytest.raises(ValueError, match="data: nothing to learn from"):
        train(model, Corpus([], corpus.validation), config, out=tmp_path)
    with pytest.raises(ValueError, match="data: nothing held out"):
        train(model, Corpus(corpus.train, []), config, out=tmp_path)
    with pytest.raises(ValueError, match="sequence_length: 32 is more than the model's context"):
        train(model.replace(max_position_embeddings=16), corpus, config, out=tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
