"""Models of transformers, accelerated against unchanged: logits, gradients, generation; and changed back."""

import copy

import pytest
import torch
from tiny_models import FAMILIES, tiny_model

transformers = pytest.importorskip("transformers", minversion="5.17")
import dskernels as ds  # noqa: E402
from dskernels.integrations.transformers import LatentLayer, accelerate, accelerated  # noqa: E402
from dskernels.integrations.transformers.weights import Copy, one_below_the_other  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

ATOL = 2e-5  # of logits up to 5 in fp32: theirs are within 1e-5 of fp64, see test_as_close_to_fp64
NEW = 8


def prompts(lengths=(30, 30), seed=1):
    """Random tokens, padded on the left, and their mask."""
    torch.manual_seed(seed)
    longest = max(lengths)
    tokens = torch.randint(1, 257, (len(lengths), longest))
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return tokens.masked_fill(~mask, 0), mask.long()


def close(got, expected, atol=ATOL):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def v3():
    return tiny_model("V3")


def outputs(model):
    """Logits of a padded batch where it is not padding, greedy texts after it, and all gradients."""
    tokens, mask = prompts((30, 21))
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits[mask.bool()]
    texts = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    model.zero_grad()
    whole, _ = prompts()
    loss = model(whole, labels=whole).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits, texts, loss.detach(), gradients


def snapshot(model):
    """Every attribute of every module, tensors as objects and bytes."""
    modules = {name: {key: id(value) for key, value in vars(module).items()} for name, module in model.named_modules()}
    state = {name: x.detach().clone() for name, x in model.state_dict().items()}
    return modules, {name: id(x) for name, x in model.state_dict(keep_vars=True).items()}, state, repr(model.config)


def test_outputs_gradients_and_undo(model):
    before, expected = snapshot(model), outputs(model)
    acceleration = accelerate(model, verbose=False)
    logits, texts, loss, gradients = outputs(model)
    close(logits, expected[0])
    assert torch.equal(texts, expected[1])
    close(loss, expected[2])
    assert gradients.keys() == expected[3].keys()
    for name, gradient in gradients.items():
        close(gradient, expected[3][name], atol=ATOL * max(1.0, float(expected[3][name].abs().max())))
    acceleration.undo()
    after = snapshot(model)
    assert after[0] == before[0]
    assert after[1] == before[1]
    assert all(torch.equal(x, before[2][name]) for name, x in after[2].items())
    assert after[3] == before[3]
    logits, texts, loss, gradients = outputs(model)
    assert torch.equal(logits, expected[0])
    assert torch.equal(texts, expected[1])
    assert all(torch.equal(gradient, expected[3][name]) for name, gradient in gradients.items())
    acceleration.undo()


@torch.no_grad()
@pytest.mark.parametrize("family", ["V3", "V2"])
def test_as_close_to_fp64(family):
    """At most twice as far from fp64 as the unchanged model is, or a few ulp of logits up to 5."""
    model = tiny_model(family)
    tokens, _ = prompts()
    exact = copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"
    exact = exact(tokens).logits
    theirs = (model(tokens).logits - exact).abs().max()
    with accelerate(model, verbose=False):
        ours = (model(tokens).logits - exact).abs().max()
    assert theirs < 1e-5
    assert ours <= max(2 * theirs, 2e-6)


def test_report(v3, capsys):
    acceleration = accelerate(v3)
    assert capsys.readouterr().out == f"{acceleration.report}\n"
    assert dict(acceleration.report.replaced) == {
        "experts": 1,
        "router": 1,
        "block with shared experts": 1,
        "latent attention": 2,
        "norm": 9,
    }
    assert not acceleration.report.kept
    with pytest.raises(ValueError, match="not accelerated yet"):
        accelerate(v3)
    acceleration.undo()
    accelerate(v3, verbose=False).undo()
    with pytest.raises(TypeError, match=r"model: expected a transformers\.PreTrainedModel, got Linear"):
        accelerate(torch.nn.Linear(2, 2))
    for name in ("fp8", "graphs", "verbose"):
        with pytest.raises(TypeError, match=f"{name}: expected a bool, got str"):
            accelerate(v3, **{name: "yes"})


def test_one_that_cannot_be_accelerated_undoes_those_before(v3):
    with pytest.raises(ValueError, match="not accelerated yet"), accelerated(v3, v3, verbose=False):
        pass
    accelerate(v3, verbose=False).undo()


def test_report_says_why():
    model = tiny_model("GLM-4.5")
    model.model.layers[1].mlp.experts.act_fn = torch.nn.GELU()
    with accelerate(model, verbose=False) as acceleration:
        text = str(acceleration.report)
    assert "1 x experts: the activation is GELU, not SiLU" in text
    assert "2 x attention: its cache is not one of latents" in text
    assert "1 x router" in text


def test_parts_that_are_nearly_ours_are_left_alone(v3):
    """Experts with a gate of their own and no activation beside it (as MiniMax-M3 and HY-V4 have them), and latent
    attention that does something more (as in DeepSeek-V3.2)."""
    experts, attention = v3.model.layers[1].mlp.experts, v3.model.layers[0].self_attn

    class Experts(type(experts)):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate.clamp(max=7.0)) * up

    class Attention(type(attention)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    experts.__class__, attention.__class__ = Experts, Attention
    del experts.act_fn
    tokens, _ = prompts()
    with torch.no_grad():
        expected = v3(tokens).logits
        with accelerate(v3, verbose=False) as acceleration:
            close(v3(tokens).logits, expected)
    assert dict(acceleration.report.kept) == {
        ("experts", "it gates in its own way"): 1,
        ("attention", "of latents, but not as in DeepSeek-V3 or V2"): 1,
    }
    assert acceleration.report.replaced["latent attention"] == 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["V3, yarn, no q_lora", "V2"])
def test_pieces_of_a_prompt(family):
    """What was cached, then many new tokens, a few, and one; with and without padding."""
    model = tiny_model(family)
    tokens, mask = prompts((43, 26))
    for given in (None, mask):
        expected = model(tokens, attention_mask=given).logits
        with accelerate(model, verbose=False):
            cache, got = transformers.DynamicCache(config=model.config), []
            for begin, end in ((0, 20), (20, 36), (36, 42), (42, 43)):
                part = None if given is None else given[:, :end]
                got.append(model(tokens[:, begin:end], attention_mask=part, past_key_values=cache).logits)
            assert all(type(layer) is LatentLayer for layer in cache.layers)
        real = (torch.ones_like(mask) if given is None else given).bool()
        close(torch.cat(got, 1)[real], expected[real])


@torch.no_grad()
@pytest.mark.parametrize("family", ["V3", "V2"])
@pytest.mark.parametrize("lengths", [(20, 20), (20, 13)])
def test_a_cache_survives_the_change(family, lengths):
    """Begun by an unchanged model, gone on by an accelerated one, and by the unchanged one again."""
    model = tiny_model(family)
    tokens, mask = prompts(lengths)
    more = torch.randint(1, 257, (2, 3))
    seen = []
    for changes in ((False, False, False), (False, True, False), (True, False, True), (True, True, False)):
        cache = transformers.DynamicCache()
        logits = []
        full = mask
        for step, change in enumerate(changes):
            new = tokens if step == 0 else more[:, step - 1 : step]
            full = mask if step == 0 else torch.cat((full, full.new_ones(2, 1)), 1)
            with accelerate(model, verbose=False) if change else torch.no_grad():
                logits.append(model(new, attention_mask=full, past_key_values=cache).logits[:, -1])
        seen.append((torch.cat(logits), cache.layers[1].keys, cache.layers[1].values))
    real = mask.bool()
    for logits, keys, values in seen[1:]:
        close(logits, seen[0][0])
        for got, expected in ((keys, seen[0][1]), (values, seen[0][2])):
            close(got[:, 0, :20][real], expected[:, 0, :20][real])
            close(got[:, 0, 20:], expected[:, 0, 20:])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "top_k": 1},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_generation(v3, options):
    """Beams reorder the cache, drafts crop it, a static cache is computed by transformers."""
    lengths = (30,) if "prompt_lookup_num_tokens" in options else (30, 21)
    tokens, mask = prompts(lengths)
    tokens[:, -6:] = tokens[:, -12:-6]  # something to look up
    options = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True, **options}
    expected = v3.generate(tokens, attention_mask=mask, **options)
    with accelerate(v3, verbose=False):
        got = v3.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(got, expected)


def test_a_long_generation_grows_in_place(v3):
    with accelerate(v3, verbose=False), torch.no_grad():
        cache = transformers.DynamicCache(config=v3.config)
        tokens, _ = prompts((50,))
        v3(tokens, past_key_values=cache)
        layer = cache.layers[0]
        moved = 0
        for _ in range(20):
            before = layer.rows.data_ptr()
            v3(tokens[:, :1], past_key_values=cache)
            moved += layer.rows.data_ptr() != before
        assert cache.get_seq_length() == 70
        assert moved == 1
        assert layer.capacity % 64 == 0


def test_packed_training(v3):
    """Positions that begin again, and sequences told by their lengths."""
    tokens, _ = prompts((30,))
    positions = torch.cat((torch.arange(18), torch.arange(12)))[None]
    expected = torch.cat([v3(part, use_cache=False).logits for part in (tokens[:, :18], tokens[:, 18:])], 1)
    with accelerate(v3, verbose=False):
        by_position = v3(tokens, position_ids=positions, use_cache=False).logits
        cu = torch.tensor([0, 18, 30], dtype=torch.int32)
        told = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 18, "max_length_k": 18}
        by_length = v3(tokens, position_ids=positions, use_cache=False, **told).logits
    close(by_position, expected)
    close(by_length, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """No further from fp64 than the unchanged model, by half of its error at most."""
    model = tiny_model("V3")
    exact = copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"
    model = model.to(dtype)
    tokens, _ = prompts()
    with torch.no_grad():
        exact = exact(tokens).logits
        theirs = (model(tokens).logits - exact).pow(2).mean().sqrt()
        with accelerate(model, verbose=False):
            ours = (model(tokens).logits - exact).pow(2).mean().sqrt()
    assert ours < 1.5 * theirs


def test_autocast(v3):
    tokens, _ = prompts()
    with torch.no_grad():
        exact = v3(tokens).logits
        with torch.autocast("cpu", torch.bfloat16):
            theirs = (v3(tokens).logits - exact).pow(2).mean().sqrt()
            with accelerate(v3, verbose=False):
                ours = (v3(tokens).logits - exact).pow(2).mean().sqrt()
    assert ours < 1.5 * theirs


def test_a_copy_is_accelerated_by_itself(v3):
    tokens, _ = prompts()
    with torch.no_grad():
        expected = v3(tokens).logits
        acceleration = accelerate(v3, verbose=False)
        copied = copy.deepcopy(v3)
        acceleration.undo()
        for p in copied.parameters():
            p.mul_(0.9)
        changed = tiny_model("V3")
        for p in changed.parameters():
            p.mul_(0.9)
        close(copied(tokens).logits, changed(tokens).logits)
        assert torch.equal(v3(tokens).logits, expected)


def test_weights_may_change(v3):
    """What is kept of weights follows them."""
    tokens, _ = prompts()
    with torch.no_grad(), accelerate(v3, verbose=False) as acceleration:
        v3(tokens)
        for p in v3.parameters():
            p.mul_(1.1)
        got = v3(tokens).logits
        acceleration.undo()
        close(got, v3(tokens).logits)


def test_loaded_inside(v3, tmp_path):
    v3.save_pretrained(tmp_path)
    tokens, _ = prompts()
    method = vars(transformers.PreTrainedModel)["from_pretrained"]
    with torch.no_grad():
        with accelerated(verbose=False) as done:
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
            assert [acceleration.model for acceleration in done] == [model]
            got = model(tokens).logits
        close(got, v3(tokens).logits)
        assert torch.equal(model(tokens).logits, v3(tokens).logits)
        with accelerated(v3, verbose=False) as done:
            assert done[0].report.replaced["latent attention"] == 2
    assert vars(transformers.PreTrainedModel)["from_pretrained"] == method
    assert "_dskernels_acceleration" not in vars(v3)


def test_what_explain_has_not_computed_is_not_kept():
    kept, weight = Copy(), torch.randn(128, 128)
    ds.explain(lambda: kept.of((weight,), lambda: ds.quantize(weight, (128, 128))))
    made = kept.of((weight,), lambda: ds.quantize(weight, (128, 128)))
    assert torch.equal(made.data.view(torch.uint8), ds.quantize(weight, (128, 128)).data.view(torch.uint8))


def test_plain_weights_are_not_taken_for_their_quantised_copy():
    """Asked for where only the network's last matrix learns: in e4m3 it would get no gradient."""
    kept, (gate, up) = Copy(), (torch.nn.Linear(128, 128, bias=False) for _ in range(2))
    with torch.no_grad():
        for fp8 in (True, False, True):
            assert isinstance(one_below_the_other(gate, up, kept, fp8), ds.Fp8Tensor) is fp8


def test_another_weight_at_the_same_address_is_not_taken_for_the_one_before():
    # As of a checkpoint that is loaded with `assign=True` where the model was: same place, and no change counted.
    kept, weight = Copy(), torch.ones(4)
    numbers, address = weight.numpy(), weight.data_ptr()
    assert kept.of((weight,), lambda: weight + 1).tolist() == [2.0] * 4
    del weight
    numbers[:] = 5
    weight = torch.from_numpy(numbers)
    assert weight.data_ptr() == address
    assert kept.of((weight,), lambda: weight + 1).tolist() == [6.0] * 4
