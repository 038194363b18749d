"""Decode steps that are recorded: on a GPU as CUDA graphs; on the CPU what was recorded is run again."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from tiny_models import tiny_model

transformers = pytest.importorskip("transformers", minversion="5.17")
from dskernels.integrations.transformers import accelerate, graphs  # noqa: E402

NEW = 12


@pytest.fixture
def replays(monkeypatch, device):
    """How many recordings there were, and replays of each."""
    counts = []
    original = graphs.record

    def recorded(run):
        if device == "cuda":
            replay, out = original(run)
        else:
            out = run()

            def replay():
                out.logits.copy_(run().logits)

        at = len(counts)
        counts.append(0)

        def counted():
            counts[at] += 1
            replay()

        return counted, out

    monkeypatch.setattr(graphs, "record", recorded)
    monkeypatch.setattr(graphs, "DEVICES", (device,))
    return counts


def prompts(device, lengths=(30, 30), seed=1):
    torch.manual_seed(seed)
    longest = max(lengths)
    tokens = torch.randint(1, 257, (len(lengths), longest))
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return tokens.masked_fill(~mask, 0).to(device), mask.long().to(device)


@pytest.fixture(params=["V3", "V2-Lite"])
def model(request, device):
    return tiny_model(request.param).to(device)


@pytest.mark.parametrize("lengths", [(30, 30), (30, 21), (7,)])
def test_generation(model, lengths, replays, device):
    """The texts of a model whose steps are not recorded, with and without padding, across a cache that grows."""
    tokens, mask = prompts(device, lengths)
    options = {"attention_mask": mask, "max_new_tokens": 50, "do_sample": False}
    with accelerate(model, verbose=False):
        expected = model.generate(tokens, **options)
    assert not replays
    with accelerate(model, graphs=True, verbose=False):
        assert torch.equal(model.generate(tokens, **options), expected)
        assert sum(replays) > 40
        assert len(replays) == (2 if max(lengths) == 30 else 1)  # 64 rows do not hold 80 tokens
        first = len(replays)
        assert torch.equal(model.generate(tokens, **options), expected)
        assert len(replays) == 2 * first  # another cache is another recording


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_caches_that_move(options, replays, device):
    """Beams reorder the cache, drafts crop it."""
    model = tiny_model("V3").to(device)
    tokens, mask = prompts(device, (30,))
    tokens[:, -6:] = tokens[:, -12:-6]
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, **options}
    with accelerate(model, verbose=False):
        expected = model.generate(tokens, **options)
    with accelerate(model, graphs=True, verbose=False):
        assert torch.equal(model.generate(tokens, **options), expected)


@torch.no_grad()
def test_steps_by_hand(replays, device):
    """Without a mask or positions, cropped, with logits that are kept by the caller; then with other weights."""
    model = tiny_model("V3").to(device)
    tokens, _ = prompts(device)
    more = torch.randint(1, 257, (2, 6), device=device)

    def run(**options):
        seen, cache = [], transformers.DynamicCache(config=model.config)
        with accelerate(model, verbose=False, **options):
            model(tokens, past_key_values=cache)
            for i in range(6):
                seen.append(model(more[:, i : i + 1], past_key_values=cache).logits)
                if i == 3:
                    cache.crop(-2)
            model.lm_head.weight.mul_(1.5)
            for _ in range(2):
                seen.append(model(more[:, :1], past_key_values=cache, logits_to_keep=1).logits)
            model.lm_head.weight.div_(1.5)
        return seen, cache

    expected, before = run()
    got, after = run(graphs=True)
    assert replays == [5, 1]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(after.layers[1].keys, before.layers[1].keys, rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_is_not_recorded(replays, device):
    """Several tokens, hidden states, hooks, gradients; and a model that cannot be recorded says so once."""
    model = tiny_model("V3").to(device)
    tokens, _ = prompts(device)
    acceleration = accelerate(model, graphs=True, verbose=False)

    def steps(count=3, width=1, **options):
        cache = transformers.DynamicCache(config=model.config)
        model(tokens, past_key_values=cache)
        return [model(tokens[:, :width], past_key_values=cache, **options) for _ in range(count)]

    steps(width=2)
    assert steps(output_hidden_states=True)[-1].hidden_states is not None
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    steps()
    handle.remove()
    assert not replays
    steps()
    assert replays == [2]
    graphs.record = lambda run: (_ for _ in ()).throw(RuntimeError("it cannot"))
    with pytest.warns(UserWarning, match="decode steps are not recorded"):
        expected = steps()[-1].logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(steps()[-1].logits, expected)
    acceleration.undo()


@torch.no_grad()
def test_a_cache_that_nobody_uses_any_more_is_let_go(monkeypatch, device):
    model = tiny_model("V3").to(device)
    tokens, _ = prompts(device)
    if device == "cpu":
        monkeypatch.setattr(graphs, "record", lambda run: (lambda: None, run()))
        monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    with accelerate(model, graphs=True, verbose=False):
        cache = transformers.DynamicCache(config=model.config)
        for new in (tokens, *[tokens[:, :1]] * 3):
            out = model(new, past_key_values=cache)
        assert out.past_key_values is cache
        assert list(out) == ["logits", "past_key_values"]
        alone = model(tokens[:, :1], past_key_values=cache, use_cache=False)
        gone = weakref.ref(cache)
        del cache, out, alone
        gc.collect()
        assert gone() is None


@torch.no_grad()
def test_outputs_as_tuples(replays, device):
    model = tiny_model("V3").to(device)
    tokens, _ = prompts(device)
    with accelerate(model, graphs=True, verbose=False):
        cache = transformers.DynamicCache(config=model.config)
        outs = [model(new, past_key_values=cache, return_dict=False) for new in (tokens, *[tokens[:, :1]] * 3)]
        assert all(type(out) is tuple and out[1] is cache for out in outs)
        assert not replays


@torch.no_grad()
def test_a_copy_records_its_own(replays, device):
    model = tiny_model("V3").to(device)
    tokens, _ = prompts(device)
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(tokens, **options)
    with accelerate(model, graphs=True, verbose=False):
        model.generate(tokens, **options)
        copied = copy.deepcopy(model)
    assert torch.equal(copied.generate(tokens, **options), expected)
    assert len(replays) == 2


CHANGES = {
    "written to": lambda m: m[0].weight.add_(1),
    "data": lambda m: setattr(m[0].weight, "data", torch.zeros(4, 4)),
    "of inference mode": lambda m: setattr(m[0].weight, "data", made_in_inference()),
    "parameter": lambda m: setattr(m[1], "weight", torch.nn.Parameter(torch.zeros(4, 4))),
    "module": lambda m: m.__setitem__(1, torch.nn.Linear(4, 4)),
    "buffer": lambda m: m[0].register_buffer("more", torch.zeros(1)),
    "dtype": lambda m: m.to(torch.bfloat16),
    "less": lambda m: m.pop(1),
}


def made_in_inference():
    with torch.inference_mode():
        return torch.zeros(4, 4)


@pytest.mark.parametrize("change", CHANGES)
def test_weights_notice(change):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, bias=False))
    weights = graphs.Weights(model)
    assert weights.same()
    assert weights.same()
    with torch.no_grad():
        CHANGES[change](model)
    assert not weights.same()
    weights = graphs.Weights(model)
    assert weights.same()
    del model
    assert not weights.same()
