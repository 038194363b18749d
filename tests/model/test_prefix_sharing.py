"""Prompts that begin alike share pages: what is in them is what the prompt itself would have written there."""

import pytest
import torch
from tiny import SMALL, echo_model, random_prompts

from dskernels.model import LatentCache, generate

PAGE = 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return echo_model(0.05, **SMALL)


@pytest.fixture(scope="module")
def prompts():
    """Beginnings of 22 tokens and of 8 (which end with a page), and ends of their own; one is all of another."""
    torch.manual_seed(4)
    long, short = random_prompts(22, 8, vocab_size=64)
    ends = random_prompts(3, 1, 9, 6, vocab_size=64)
    return [
        long + ends[0],
        short + ends[1],
        long + ends[2],
        short + ends[3],
        long,
        long[:8],
        long + ends[0],
        [7],
        short,
    ]


def cache_of(model, pages=100):
    return LatentCache(model.config, pages=pages, page_size=PAGE, dtype=torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"drafts": 1},
        {"drafts": 3},
        {"max_batch": 2},
        {"max_batch": 2, "drafts": 2},
        {"prefill_tokens": 8},
        {"prefill_tokens": 8, "drafts": 1},
        {"prefill_tokens": 5, "batch_invariant": True},
    ],
    ids=str,
)
def test_texts_are_the_same(model, prompts, options):
    plain = generate(model, prompts, max_new_tokens=10, page_size=PAGE, prefix_sharing=False, **options)
    texts = plain.finish()
    assert plain.shared_tokens == plain.cache.remembered_pages == 0
    generation = generate(model, prompts, max_new_tokens=10, page_size=PAGE, **options)
    assert generation.finish() == texts
    assert generation.shared_tokens > 40
    assert generation.cache.free_pages == generation.cache.pages
    if options.get("drafts"):
        assert 0.1 < generation.acceptance_rate < 0.9


@pytest.mark.parametrize("drafts", [0, 1])
def test_shared_pages_hold_what_the_prompt_would_write(model, prompts, drafts):
    """In every layer, the MTP module's too, which knows of the token behind a page."""
    caches = cache_of(model), cache_of(model)
    rows = []
    for cache, sharing in zip(caches, (True, False), strict=True):
        generation = generate(
            model, prompts, max_new_tokens=20, drafts=drafts, cache=cache, prefix_sharing=sharing, eos=()
        )
        while not all(generation.tokens):
            next(generation)
        layers = len(model.layers) + (1 if drafts else 0)
        rows.append(
            [
                cache.data[:layers, generation._pages[i]].flatten(1, 2)[:, : len(prompt)]
                for i, prompt in enumerate(prompts)
            ]
        )
    # The two prompts of 8 tokens end with a page; the token behind it is their own.
    for shared, own in zip(*rows, strict=True):
        torch.testing.assert_close(shared, own, rtol=1e-4, atol=1e-5)


def test_how_much_is_shared(model):
    """Full pages alone, and never all of a prompt; with drafting the token behind a page must be the same."""
    prompt, other = [5] * 12, [5] * 8 + [9] * 4
    for drafts, again, branch in ((0, 8, 8), (1, 8, 4)):
        cache = cache_of(model)
        options = {"max_new_tokens": 2, "cache": cache, "drafts": drafts}
        assert generate(model, [prompt], **options).finish()
        for tokens, shared in ((prompt, again), (other, branch), ([9] * 12, 0), ([5] * 3, 0)):
            generation = generate(model, [tokens], **options)
            generation.finish()
            assert generation.shared_tokens == shared, (drafts, tokens)


def test_the_next_turn_shares_the_text_of_the_last(model, prompts):
    for drafts in (0, 2):
        cache = cache_of(model)
        options = {"max_new_tokens": 13, "drafts": drafts}
        text = generate(model, prompts[:1], cache=cache, **options).finish()[0]
        turn = [*prompts[0], *text, 3, 4, 5]
        generation = generate(model, [turn], cache=cache, **options)
        assert generation.finish() == generate(model, [turn], prefix_sharing=False, **options).finish()
        assert generation.shared_tokens == (25 + 13 - 1) // PAGE * PAGE


def test_equal_prompts_wait_for_the_first(model):
    """Side by side they would compute the same; a step later they have it."""
    prompt = random_prompts(21, vocab_size=64)[0]
    generation = generate(model, [prompt] * 5, max_new_tokens=4, page_size=PAGE)
    assert [len(tokens) for tokens in next(generation)] == [1, 0, 0, 0, 0]
    assert [len(tokens) for tokens in next(generation)] == [0, 1, 1, 1, 1]
    assert generation.shared_tokens == 4 * 20
    texts = generation.finish()
    assert texts == [texts[0]] * 5
    # 20 shared tokens, and of each a page for the last of the prompt and the new ones, and one more for the drafts.
    assert generation.cache.remembered_pages >= 5


def test_pages_that_are_kept_give_way(model, prompts):
    """A pool that the longest prompt fills: what others left there goes, and nobody's text is the worse for it."""
    texts = generate(model, prompts, max_new_tokens=10, prefix_sharing=False).finish()
    cache = cache_of(model, pages=11)
    for drafts in (0, 1):
        generation = generate(model, prompts, max_new_tokens=10, drafts=drafts, cache=cache)
        assert generation.finish() == texts
        assert generation.shared_tokens > 0
        assert cache.free_pages == 11


def test_another_model_or_other_weights_share_nothing(model, prompts):
    cache = cache_of(model)
    torch.manual_seed(8)
    other = echo_model(0.05, **SMALL)

    def run(model, **options):
        generation = generate(model, prompts[:1], max_new_tokens=4, cache=cache, **options)
        text = generation.finish()
        assert text == generate(model, prompts[:1], max_new_tokens=4, prefix_sharing=False).finish()
        return generation.shared_tokens

    assert run(other) == 0
    assert run(model) == 0
    assert run(other) == 24
    assert run(other, drafts=1) == 0  # without drafts the MTP module has written nothing
    assert run(other, drafts=1) == 24
    with torch.no_grad():
        other.layers[0].self_attn.o_proj.weight.mul_(3.0)
    assert run(other) == 0
    assert run(other) == 24
    cache.forget()
    assert run(other) == 0


def test_nothing_is_shared_before_it_is_written(model, prompts):
    """A pass that fails leaves no page behind that others would trust."""
    cache = cache_of(model)

    def fail(*_):
        raise MemoryError

    handle = model.layers[1].register_forward_pre_hook(fail)
    generation = generate(model, prompts, max_new_tokens=4, cache=cache)
    with pytest.raises(MemoryError):
        next(generation)
    handle.remove()
    assert cache.free_pages == cache.pages
    assert cache.remembered_pages == 0


def test_fp8_cache_shares(model):
    """The rest of a prompt attends to e4m3 latents: near, not the same; here the texts agree."""
    model = echo_model(0.0, **{**SMALL, "kv_lora_rank": 128})
    cache = LatentCache(model.config, pages=40, page_size=PAGE, dtype=torch.float8_e4m3fn)
    prompt = random_prompts(17, vocab_size=64)[0]
    first = generate(model, [prompt], max_new_tokens=8, cache=cache).finish()
    generation = generate(model, [prompt], max_new_tokens=8, cache=cache)
    assert generation.finish() == first
    assert generation.shared_tokens == 16
