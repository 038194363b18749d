"""A text does not depend on what runs beside it, nor on what was cached before."""

import pytest
import torch
from tiny import SMALL, random_prompts, randomize, tiny_model

from dskernels.model import Config, DeepseekV3, LatentCache, generate

SLOTS = 16


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(6)
    return tiny_model(**SMALL)


def a_thousand_prompts(alike, **changes):
    """A narrow model and prompts, of which those begin like others that ``alike`` says."""
    torch.manual_seed(6)
    narrow = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_nextn_predict_layers": 0}
    narrow["max_position_embeddings"] = 32
    model = randomize(DeepseekV3(Config.from_name("tiny", **{**SMALL, **narrow, **changes})))
    beginnings = random_prompts(4, 8, 9, 8, vocab_size=64)
    lengths = torch.randint(1, 7, (1000,)).tolist()
    ends = random_prompts(*lengths, vocab_size=64)
    return model, [beginnings[i % 4] + end if alike(i) else end for i, end in enumerate(ends)]


def test_a_thousand_prompts_through_sixteen_slots():
    """The same texts as one by one, though places, pages and prefixes change hands; fewer without, or in any company.

    Texts end at different steps, most prompts begin like others, and there are pages for a part of the slots only.
    """
    model, prompts = a_thousand_prompts(lambda i: i % 5)
    options = {"max_new_tokens": 3, "eos": range(24)}

    alone = LatentCache(model.config, pages=8, page_size=4, dtype=torch.float32)
    one_by_one = [
        generate(model, [prompt], max_batch=1, cache=alone, prefix_sharing=False, **options).finish()[0]
        for prompt in prompts
    ]
    assert len({len(text) for text in one_by_one}) == 3
    assert len(set(map(tuple, one_by_one))) > 150
    for count, sharing, invariant in ((1000, True, False), (250, False, False), (250, True, True)):
        cache = LatentCache(model.config, pages=64, page_size=4, dtype=torch.float32)
        options |= {"cache": cache, "prefix_sharing": sharing, "batch_invariant": invariant, "prefill_tokens": 8}
        generation = generate(model, prompts[:count], max_batch=SLOTS, **options)
        assert generation.finish() == one_by_one[:count]
        assert (generation.shared_tokens > 2 * count) == sharing
        assert cache.free_pages == 64


@pytest.mark.gpu
def test_a_thousand_prompts_through_sixteen_slots_on_a_gpu():
    """In bf16 and graphs, where only batch-invariant texts are the same as one by one. A single block: it is the host's
    share of two thousand prompts that takes time."""
    changes = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "kv_lora_rank": 64}
    model, prompts = a_thousand_prompts(lambda i: i % 5 == 0, **sizes, **changes)
    model = model.to("cuda", torch.bfloat16)
    options = {"max_new_tokens": 3, "eos": range(24), "max_batch": SLOTS, "batch_invariant": True, "prefill_tokens": 8}
    alone = LatentCache(model.config, pages=16, page_size=4, device="cuda")
    one_by_one = [
        generate(model, [prompt], cache=alone, prefix_sharing=False, **options).finish()[0] for prompt in prompts
    ]
    assert len({len(text) for text in one_by_one}) == 3
    assert len(set(map(tuple, one_by_one))) > 150
    cache = LatentCache(model.config, pages=64, page_size=4, device="cuda")
    generation = generate(model, prompts, cache=cache, **options)
    assert generation.finish() == one_by_one
    assert generation.shared_tokens > 500
    assert cache.free_pages == 64


def logits_of(model, run):
    """What the head gave for each sequence, in order: the bits that decide."""
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    generation = run()
    logits = [[] for _ in generation.prompts]
    while True:
        running = list(generation._running)
        seen.clear()
        new = next(generation, None)
        if new is None:
            break
        # A prompt's pass gives one row; a step gives the rows of the running sequences first.
        begun = [i for i, tokens in enumerate(new) if tokens] if seen[0].shape[0] == 1 else running
        for row, index in enumerate(begun):
            logits[index].append(seen[0][row])
    handle.remove()
    return logits


def test_the_same_bits_in_any_company():
    """Alone, among others, behind others, and with a prefix that somebody else computed.

    Without experts: those of the reference take a product over just the tokens that chose them.
    """
    torch.manual_seed(6)
    model = tiny_model(**{**SMALL, "first_k_dense_replace": 2, "max_position_embeddings": 64})
    shared = random_prompts(13, vocab_size=64)[0]
    prompts = [shared + end for end in random_prompts(3, 7, 1, 12, 5, vocab_size=64)] + random_prompts(6, 2)
    prompts = [[token % 64 for token in prompt] for prompt in prompts]
    options = {"max_new_tokens": 6, "page_size": 4, "prefill_tokens": 8, "max_batch": 4, "batch_invariant": True}
    alone = [logits_of(model, lambda p=prompt: generate(model, [p], **options))[0] for prompt in prompts]
    among = logits_of(model, lambda: generate(model, prompts, **options))
    behind = logits_of(model, lambda: generate(model, prompts[::-1], prefix_sharing=False, **options))[::-1]
    for rows in zip(alone, among, behind, strict=True):
        assert len(rows[0]) == 6
        for a, b, c in zip(*rows, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


@pytest.mark.parametrize("drafts", [0, 2])
def test_samples_are_a_prompts_own(model, drafts):
    """With a seed for each prompt, whatever the order and the company."""
    prompts = random_prompts(5, 9, 2, 7, 4, vocab_size=64)
    options = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.95, "drafts": drafts, "max_batch": 3}
    options["batch_invariant"] = True
    texts = generate(model, prompts, seed=range(5), **options).finish()
    assert [generate(model, [p], seed=[i], **options).finish()[0] for i, p in enumerate(prompts)] == texts
    assert generate(model, prompts[::-1], seed=range(5)[::-1], **options).finish() == texts[::-1]
    assert generate(model, prompts, seed=range(1, 6), **options).finish() != texts


def test_sampling_needs_a_seed_for_each_prompt(model):
    for seed in (None, 1):
        with pytest.raises(ValueError, match="seed: expected one for each prompt"):
            generate(model, [[1], [2]], temperature=1.0, batch_invariant=True, seed=seed)
    with pytest.raises(ValueError, match="seed: expected one or 2, one for each prompt, got 3"):
        generate(model, [[1], [2]], temperature=1.0, batch_invariant=True, seed=[1, 2, 3])
