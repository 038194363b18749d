"""The allocator under everything that can happen: no page leaks, none is freed twice, none is lost while it is read."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from dskernels.model import Config, LatentCache
from dskernels.model.cache import page_keys

CONFIG = Config.from_name("tiny")
PAGES, PAGE = 12, 2
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=10)  # few tokens: prompts often begin alike


class Allocator(RuleBasedStateMachine):
    """Sequences come, share, grow, end or are aborted.

    ``holds`` says what was last written to each page: all tokens up to its end.
    """

    def __init__(self):
        super().__init__()
        self.cache = LatentCache(CONFIG, pages=PAGES, page_size=PAGE)
        self.running = []  # tokens, most tokens, pages
        self.holds = {}

    def write(self, tokens, pages, start):
        for i in range(start // PAGE, len(tokens) // PAGE):
            self.holds[pages[i]] = tokens[: (i + 1) * PAGE]

    @rule(prompt=TOKENS, more=st.integers(1, 6), share=st.booleans())
    def admit(self, prompt, more, share):
        keys = page_keys(prompt, PAGE)
        shared = self.cache.match(keys[: (len(prompt) - 1) // PAGE]) if share else []
        for i, page in enumerate(shared):
            assert self.holds[page] == prompt[: (i + 1) * PAGE]
        before = self.cache.free_pages
        pages = self.cache.admit(len(prompt) + more, shared)
        needed = self.cache.pages_for(len(prompt) + more)
        held = {page for _, _, owned in self.running for page in owned}
        if pages is None:
            assert self.cache.free_pages == before
            assert needed - len(held.intersection(shared)) > before
            return
        assert len(pages) == len(set(pages)) == needed
        assert pages[: len(shared)] == shared
        assert held.isdisjoint(pages[len(shared) :])
        for page in pages[len(shared) :]:
            self.holds[page] = None  # somebody else's from now on
        self.write(prompt, pages, len(shared) * PAGE)
        self.cache.remember(pages, keys)
        self.running.append((prompt, len(prompt) + more, pages))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), new=TOKENS)
    def grow(self, data, new):
        i = data.draw(st.integers(0, len(self.running) - 1))
        tokens, most, pages = self.running[i]
        longer = (tokens + new)[:most]
        self.write(longer, pages, len(tokens) // PAGE * PAGE)
        self.running[i] = (longer, most, pages)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), remember=st.booleans())
    def end(self, data, remember):
        tokens, _, pages = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        if remember:
            self.cache.remember(pages, page_keys(tokens, PAGE))
        self.cache.free(pages)
        if not any(pages[-1] in owned for _, _, owned in self.running):
            with pytest.raises(ValueError, match="is not in use"):
                self.cache.free(pages[-1:])

    @rule()
    def forget(self):
        self.cache.forget()
        assert self.cache.match([key for tokens, _, _ in self.running for key in page_keys(tokens, PAGE)]) == []

    @invariant()
    def running_sequences_find_what_they_wrote(self):
        for tokens, _, pages in self.running:
            for i in range(len(tokens) // PAGE):
                assert self.holds[pages[i]] == tokens[: (i + 1) * PAGE]

    @invariant()
    def every_page_is_owned_or_free(self):
        held = {page for _, _, pages in self.running for page in pages}
        assert self.cache.free_pages == PAGES - len(held)
        assert self.cache.remembered_pages <= PAGES

    def teardown(self):
        for _, _, pages in self.running:
            self.cache.free(pages)
        assert self.cache.free_pages == PAGES
        # All of them can be had again.
        assert sorted(self.cache.admit(PAGES * PAGE)) == list(range(PAGES))


TestAllocator = Allocator.TestCase
TestAllocator.settings = settings(max_examples=100, stateful_step_count=40)


def filled(cache, tokens, remember=True):
    """The pages of a sequence that has run."""
    pages = cache.admit(len(tokens))
    if remember:
        cache.remember(pages, page_keys(tokens, cache.page_size))
    return pages


def test_pages_are_kept_until_they_are_needed_least_recently_used_first():
    cache = LatentCache(CONFIG, pages=6, page_size=2)
    a, b = [1, 1, 1, 1], [2, 2, 2, 2]
    pages_a, pages_b = filled(cache, a), filled(cache, b)
    cache.free(pages_b)
    cache.free(pages_a)
    # Two pages that hold nothing go first, then b, its last page before its first.
    cache.admit(4)
    assert cache.match(page_keys(b, 2)) == pages_b
    cache.admit(2)
    assert cache.match(page_keys(b, 2)) == pages_b[:1]
    cache.admit(2)
    assert cache.match(page_keys(b, 2)) == []
    assert cache.match(page_keys(a, 2)) == pages_a
    assert cache.remembered_pages == cache.free_pages == 2


def test_a_shared_page_has_many_owners():
    cache = LatentCache(CONFIG, pages=4, page_size=2)
    keys = page_keys([5, 6, 7, 8], 2)
    first = filled(cache, [5, 6, 7, 8])
    second = cache.admit(6, cache.match(keys))
    assert second[:2] == first
    assert cache.free_pages == 1
    assert cache.admit(8, first) is None  # two more than there are
    assert cache.admit(5, first) is not None
    cache.free(first)
    cache.free(second)
    assert cache.free_pages == 1  # the third still has its pages
    with pytest.raises(ValueError, match="is not in use"):
        cache.free(second[2:])


def test_freeing_is_all_or_nothing():
    cache = LatentCache(CONFIG, pages=4, page_size=2)
    pages = cache.admit(4)
    for wrong in ([*pages, 3], [*pages, pages[0]]):
        with pytest.raises(ValueError, match="is not in use"):
            cache.free(wrong)
        assert cache.free_pages == 2
    with pytest.raises(ValueError, match="page 3 is not in use"):
        cache.remember([3], page_keys([1, 2], 2))


def test_a_page_has_one_name_and_a_name_one_page():
    """Two sequences that ran at the same time wrote the same twice: the first is remembered."""
    cache = LatentCache(CONFIG, pages=4, page_size=2)
    first, second = filled(cache, [1, 2]), filled(cache, [1, 2])
    assert cache.match(page_keys([1, 2], 2)) == first
    cache.remember(first, page_keys([3, 4], 2))
    assert cache.match(page_keys([3, 4], 2)) == []
    cache.free(second)
    cache.free(first)
    assert cache.remembered_pages == 1


def test_keys_name_all_that_came_before():
    keys = page_keys([1, 2, 3, 4, 5], 2)
    assert len(keys) == len(set(keys)) == 2
    assert page_keys([1, 2, 3, 4], 2) == keys
    assert page_keys([1, 2, 3, 9], 2)[0] == keys[0]
    other = page_keys([9, 2, 3, 4], 2)
    assert set(other).isdisjoint(keys)
    assert set(page_keys([1, 2, 3, 4], 2, root=b"other")).isdisjoint(keys)
    assert page_keys([1], 2) == page_keys([], 2) == []


def test_keys_that_look_ahead():
    """The token behind a page belongs to its name, so that a full page at the end of the tokens has none."""
    keys = page_keys([1, 2, 3, 4, 5], 2, ahead=1)
    assert len(keys) == 2
    assert page_keys([1, 2, 3, 4], 2, ahead=1) == keys[:1]
    assert page_keys([1, 2, 3, 4, 6], 2, ahead=1)[0] == keys[0]
    assert page_keys([1, 2, 3, 4, 6], 2, ahead=1)[1] != keys[1]
    assert set(keys).isdisjoint(page_keys([1, 2, 3, 4, 5], 2))
    assert page_keys([], 2, ahead=1) == []


def test_the_root_tells_models_and_their_weights_apart():
    cache = LatentCache(CONFIG, pages=1, page_size=2)
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    root = cache.root(a)
    assert cache.root(a) == root != cache.root(b)
    with torch.no_grad():
        a.weight.add_(1)
    assert cache.root(a) != root
    with torch.inference_mode():
        cache.root(nn.Linear(2, 2))  # has no count of changes
