"""Generation: batches, drafting, sampling, pages, ends, and what is refused. transformers is the oracle next door."""

import itertools

import pytest
import torch
from tiny import echo_model, packed, random_prompts, randomize, tiny_model

import dskernels as ds
from dskernels.model import Batch, Config, DeepseekV3, LatentCache, Sampling, generate


@pytest.fixture(scope="module")
def model():
    """About every second draft stands, so that the sequences of a batch get out of step."""
    torch.manual_seed(3)
    return echo_model(0.05, vocab_size=64, num_hidden_layers=2, n_routed_experts=8)


@pytest.fixture(scope="module")
def expected(model):
    """Prompts, and the 24 tokens after each: the whole texts through the model again for each, without a cache."""
    prompts = random_prompts(3, 1, 40, 17, 8, vocab_size=64)
    texts = [list(prompt) for prompt in prompts]
    with torch.no_grad():
        for _ in range(24):
            tokens, cu_seqlens = packed(*texts)
            best = model(tokens, cu_seqlens).logits[cu_seqlens[1:].long() - 1].argmax(-1)
            for text, token in zip(texts, best.tolist(), strict=True):
                text.append(token)
    return prompts, [text[len(prompt) :] for prompt, text in zip(prompts, texts, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"page_size": 1},
        {"page_size": 7},
        {"max_batch": 2},  # others wait and join later
        {"prefill_tokens": 8},  # prompts in pieces of 8: 40 = 5 x 8, 17 = 2 x 8 + 1
        {"prefill_tokens": 20},  # 3 + 1 together, then 40 alone in two pieces
        {"drafts": 1},
        {"drafts": 2},
        {"drafts": 5, "page_size": 3},
        {"drafts": 3, "prefill_tokens": 8, "max_batch": 2},
    ],
    ids=str,
)
def test_greedy_is_the_same_however_it_is_run(model, expected, options):
    prompts, texts = expected
    generation = generate(model, prompts, max_new_tokens=24, **options)
    assert generation.finish() == texts
    assert generation.cache.free_pages == generation.cache.pages
    if options.get("drafts"):
        assert 0.1 < generation.acceptance_rate < 0.9  # both branches ran


def test_one_by_one(model, expected):
    prompts, texts = expected
    assert [generate(model, [prompt], max_new_tokens=24).finish()[0] for prompt in prompts] == texts


def test_the_iterator_streams(model, expected):
    """Parts add up to the text; the first comes from the prompt alone; with drafts several tokens may come at once."""
    prompts, texts = expected
    generation = generate(model, prompts, max_new_tokens=24, drafts=2)
    parts = [[] for _ in prompts]
    sizes = set()
    for i, new in enumerate(generation):
        assert len(new) == len(prompts)
        if i == 0:
            assert [len(tokens) for tokens in new] == [1] * len(prompts)
        sizes |= {len(tokens) for tokens in new}
        parts = [a + b for a, b in zip(parts, new, strict=True)]
        assert parts == generation.tokens
    assert parts == texts
    assert sizes == {0, 1, 2, 3}


@pytest.mark.parametrize("drafts", [1, 2, 3, 7])
def test_drafts_that_always_stand(drafts):
    """One pass gives drafts + 1 tokens: 1 token of the prompt, then 24 in 24 / (drafts + 1) steps."""
    model = echo_model(0.0, num_hidden_layers=2, n_routed_experts=8)
    prompts = random_prompts(4, 9)
    plain = generate(model, prompts, max_new_tokens=25).finish()
    generation = generate(model, prompts, max_new_tokens=25, drafts=drafts)
    assert generation.finish() == plain
    assert generation.acceptance_rate == 1.0
    assert generation.steps == 24 // (drafts + 1)
    assert generation.drafted == generation.accepted == 2 * drafts * generation.steps


def test_drafts_that_never_stand():
    """Every draft is wrong, the text is not."""
    model = echo_model(0.0, num_hidden_layers=2, n_routed_experts=8)
    with torch.no_grad():
        model.mtp[0].norm.weight.fill_(-1.0)  # the least likely token is drafted
    prompts = random_prompts(4, 9)
    generation = generate(model, prompts, max_new_tokens=20, drafts=2)
    assert generation.finish() == generate(model, prompts, max_new_tokens=20).finish()
    assert generation.accepted == 0
    assert generation.steps == 19


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_end_of_text(model, expected, drafts):
    """A text ends with the first end token, which is its last; what was accepted behind it is dropped."""
    prompts, texts = expected
    for eos in ([texts[0][5]], [texts[2][9], texts[3][2]]):
        wanted = []
        for text in texts:
            stops = [i for i, token in enumerate(text) if token in eos]
            wanted.append(text[: stops[0] + 1] if stops else text)
        assert generate(model, prompts, max_new_tokens=24, drafts=drafts, eos=eos).finish() == wanted
    assert any(len(w) < 24 for w in wanted)


def test_end_tokens_of_the_config(model, expected):
    prompts, texts = expected
    config = model.config.replace(eos_token_id=(texts[0][3],))
    again = DeepseekV3(config)
    again.load_state_dict(model.state_dict())
    text = generate(again, prompts[:1], max_new_tokens=24).finish()[0]
    assert text == texts[0][: texts[0].index(texts[0][3]) + 1]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("drafts", [0, 2])
def test_length_limit(model, expected, n, drafts):
    prompts, texts = expected
    assert generate(model, prompts, max_new_tokens=n, drafts=drafts).finish() == [text[:n] for text in texts]


def test_a_small_pool_of_pages_makes_prompts_wait(model, expected):
    """Room for the longest prompt and no more: all get their turn, and the user's pages are free again."""
    prompts, texts = expected
    cache = LatentCache(model.config, pages=9, page_size=8, dtype=torch.float32)
    generation = generate(model, prompts, max_new_tokens=24, drafts=1, cache=cache)
    assert generation.finish() == texts
    assert cache.free_pages == 9
    # Stale contents do no harm: the same cache again.
    assert generate(model, prompts, max_new_tokens=24, cache=cache).finish() == texts


def test_pages_are_free_after_a_generation_is_dropped(model, expected):
    cache = LatentCache(model.config, pages=100, page_size=8, dtype=torch.float32)
    generation = generate(model, expected[0], max_new_tokens=24, cache=cache)
    next(generation)
    assert cache.free_pages < 100
    generation.close()
    assert cache.free_pages == 100
    assert list(generation) == []


def test_unused_pages_may_hold_anything(model, expected):
    prompts, texts = expected
    cache = LatentCache(model.config, pages=100, page_size=8, dtype=torch.float32)
    cache.data.fill_(torch.nan)
    assert generate(model, prompts, max_new_tokens=24, drafts=2, cache=cache).finish() == texts


def test_waiting_for_pages_that_never_come(model):
    cache = LatentCache(model.config, pages=4, page_size=8, dtype=torch.float32)
    cache.admit(16)
    with pytest.raises(RuntimeError, match="waits for pages that somebody else holds"):
        generate(model, [[1] * 20], max_new_tokens=4, cache=cache).finish()


@torch.no_grad()
def test_fp8_cache():
    """The logits after 40 tokens cached in e4m3 stay near, by 25 percent."""
    model = tiny_model(kv_lora_rank=128)
    prompt = random_prompts(40)[0]
    exact = model(torch.tensor([*prompt, 7])).logits[-1]
    cache = LatentCache(model.config, pages=3, page_size=16, dtype=torch.float8_e4m3fn)
    table = cache.block_table([cache.admit(41)])
    cu_seqlens = torch.tensor([0, 40], dtype=torch.int32)
    model.trunk(torch.tensor(prompt), Batch.prompt(cu_seqlens, 40, table, 16), cache.data)
    batch = Batch.decode(torch.tensor([41], dtype=torch.int32), 1, table, 16)
    hidden, _ = model.trunk(torch.tensor([7]), batch, cache.data)
    error = (model.lm_head(hidden)[0] - exact).norm() / exact.norm()
    assert 1e-3 < error < 0.25


def test_bf16_model_generates_with_a_bf16_cache():
    model = tiny_model().to(torch.bfloat16)
    generation = generate(model, random_prompts(5, 12), max_new_tokens=8, drafts=1)
    assert [len(text) for text in generation.finish()] == [8, 8]
    assert generation.cache.data.dtype == torch.bfloat16


def assert_distribution(counts, p, sigmas=5.0):
    """Each count within some standard deviations of n p."""
    counts, p = torch.as_tensor(counts, dtype=torch.float64), torch.as_tensor(p, dtype=torch.float64)
    n = counts.sum()
    deviation = (n * p * (1 - p)).sqrt()
    assert ((counts - n * p).abs() <= sigmas * deviation + 1e-6 * n).all(), (counts / n, p)


def test_temperature_top_k_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 3.0, -5.0]])
    p = Sampling(temperature=0.5).probabilities(logits)
    torch.testing.assert_close(p, (logits * 2).softmax(-1))
    p = Sampling(temperature=1.0, top_k=2).probabilities(logits)
    assert (p > 0).tolist() == [[True, True, False, False], [False, True, True, False]]
    torch.testing.assert_close(p.sum(-1), torch.ones(2))
    torch.testing.assert_close(p[0, :2], logits[0, :2].softmax(-1))
    # softmax of the first row is .64 .24 .09 .03: .64 alone reaches .6, two reach .8 and .87, three .9
    for top_p, kept in ((0.6, 1), (0.8, 2), (0.87, 2), (0.9, 3), (1.0, 4)):
        assert (Sampling(temperature=1.0, top_p=top_p).probabilities(logits)[0] > 0).sum() == kept
    assert (Sampling(temperature=1.0, top_p=1e-9).probabilities(logits)[0] > 0).tolist() == [True, False, False, False]
    assert Sampling(temperature=1.0, top_k=99).probabilities(logits).gt(0).all()


def test_greedy_takes_the_first_of_the_largest():
    token, p = Sampling().choose(torch.tensor([[1.0, 3.0, 3.0]]))
    assert token.tolist() == [1]
    assert p is None


@pytest.mark.parametrize("near", [0.0, 0.7, 1.0], ids=["q unlike p", "q like p", "q is p"])
def test_verified_drafts_have_the_models_distribution(near):
    """200,000 rows with the same p and q: token j, where there is one, is distributed as p_j."""
    n, vocab, k = 200_000, 6, 2
    logits = torch.randn(k + 1, vocab)
    sampling = Sampling(temperature=0.8, top_k=5)
    p = sampling.probabilities(logits)
    q = near * p[:k] + (1 - near) * torch.rand(k, vocab).softmax(-1)
    drafts = torch.stack([torch.multinomial(q[j], n, replacement=True) for j in range(k)], 1)
    accepted, following = sampling.verify(logits.expand(n, -1, -1), drafts, q.expand(n, -1, -1))
    text = torch.cat((drafts, following[:, None]), 1).scatter(1, accepted[:, None], following[:, None])
    for j in range(k + 1):
        there = accepted >= j
        assert_distribution(text[there, j].bincount(minlength=vocab), p[j])
    # The chance that a draft stands is sum min(p, q) (arXiv 2211.17192, theorem 3.5).
    stands = torch.minimum(p[0], q[0]).sum().item()
    assert_distribution([(accepted >= 1).sum(), (accepted < 1).sum()], [stands, 1 - stands])
    if near == 1.0:
        assert (accepted == k).float().mean() > 0.999


@pytest.mark.parametrize("drafts", [0, 1, 2])
@torch.no_grad()
def test_sampled_text_has_the_models_distribution(drafts):
    """All texts of three tokens over a vocabulary of four, 2500 times, against their probabilities."""
    torch.manual_seed(5)
    vocab, n = 4, 2500
    config = Config.from_name(
        "tiny", vocab_size=vocab, num_hidden_layers=2, n_routed_experts=4, n_group=1, topk_group=1
    )
    model = randomize(DeepseekV3(config))
    prompt = [1, 3, 0, 2]
    p = {}
    for text in itertools.product(range(vocab), repeat=3):
        rows = model(torch.tensor([*prompt, *text])).logits[len(prompt) - 1 : -1].softmax(-1)
        p[text] = rows.gather(1, torch.tensor(text)[:, None]).prod().item()
    generation = generate(
        model,
        [prompt] * n,
        max_new_tokens=3,
        temperature=1.0,
        drafts=drafts,
        generator=torch.Generator().manual_seed(0),
        page_size=8,
        max_batch=n,
        prefill_tokens=4 * n,
    )
    texts = [tuple(text) for text in generation.finish()]
    assert_distribution([texts.count(text) for text in p], list(p.values()))
    if drafts:
        assert 0.2 < generation.acceptance_rate < 1.0


def test_the_generator_decides(model, expected):
    def text(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, expected[0], temperature=1.0, max_new_tokens=16, generator=generator, **options).finish()

    for options in ({}, {"drafts": 2}):
        assert text(1, **options) == text(1, **options)
        assert text(1, **options) != text(2, **options)


def test_little_temperature_or_choice_is_greedy(model, expected):
    prompts, texts = expected
    # The two largest logits of one step are but 1e-4 apart.
    one_left = ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0})
    for options in ({"temperature": 1e-6}, *({"temperature": 1.0, **only} for only in one_left)):
        for drafts in (0, 2):
            assert generate(model, prompts, max_new_tokens=24, drafts=drafts, **options).finish() == texts


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts: expected at least one"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[64]], {}, r"prompt 0 has a token outside \[0, vocab_size = 64\)"),
        ([[-1]], {}, "prompt 0 has a token outside"),
        ([[1] * 4000], {}, "4000 tokens and may get 128 more, the context is 4096"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: expected at least 1"),
        ([[1]], {"max_batch": 0}, "max_batch: expected at least 1"),
        ([[1]], {"prefill_tokens": 0}, "prefill_tokens: expected at least 1"),
        ([[1]], {"page_size": 0}, "page_size: expected at least 1"),
        ([[1]], {"drafts": -1}, "drafts: expected 0 or more"),
        ([[1]], {"temperature": -0.1}, "temperature: expected 0 or more"),
        ([[1]], {"top_k": -1}, "top_k: expected 0"),
        ([[1]], {"top_p": 0.0}, "top_p: expected more than 0"),
        ([[1]], {"top_p": 1.1}, "top_p: expected more than 0"),
    ],
)
def test_generate_refuses(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **options)


@pytest.mark.parametrize("prompts", [["12"], "12", [1, 2], [[1], None]], ids=str)
def test_prompts_are_tokens(model, prompts):
    with pytest.raises(TypeError, match=r"prompts: expected a list of tokens for each, prompt \d is"):
        generate(model, prompts)


def test_generate_refuses_what_the_cache_cannot_hold(model):
    cache = LatentCache(model.config, pages=2, page_size=8)
    with pytest.raises(ValueError, match="cache: prompt 1 needs 3 pages, there are 2"):
        generate(model, [[1], [1] * 10], max_new_tokens=8, cache=cache)
    other = LatentCache(model.config.replace(num_hidden_layers=5), pages=2, page_size=8)
    with pytest.raises(ValueError, match="cache: has 6 layers, the model needs 3"):
        generate(model, [[1]], max_new_tokens=8, cache=other)


def test_drafting_needs_an_mtp_module():
    with pytest.raises(ValueError, match="no MTP module"):
        generate(tiny_model(num_nextn_predict_layers=0), [[1]], drafts=1)


def test_reference_by_choice(model, expected):
    """The implementation is chosen around the model, not in it."""
    prompts, texts = expected
    with ds.use_impl("reference"):
        assert generate(model, prompts, max_new_tokens=24).finish() == texts
