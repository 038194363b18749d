"""Pages are never owned twice; every token finds its slot."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dskernels.model import Batch, Config, LatentCache

CONFIG = Config.from_name("tiny")


def test_layout():
    """Pages for each block and for the MTP module; rows of latent and rotated key."""
    cache = LatentCache(CONFIG, pages=3, page_size=4)
    assert cache.data.shape == (5, 3, 4, 48)
    assert cache.data.dtype == torch.bfloat16
    packed = LatentCache(CONFIG, pages=3, page_size=4, dtype=torch.float8_e4m3fn)
    assert packed.data.shape[-1] == 32 + 4 + 2 * 16  # e4m3 latent, one scale, bf16 key
    assert packed.data.dtype == torch.uint8


@given(st.lists(st.integers(0, 40), max_size=20), st.integers(1, 9), st.randoms())
def test_pages_have_one_owner(sizes, page_size, random):
    cache = LatentCache(CONFIG, pages=16, page_size=page_size)
    owned = []
    for tokens in sizes:
        pages = cache.admit(tokens)
        if pages is None:
            assert cache.pages_for(tokens) > cache.free_pages
            if owned:
                cache.free(owned.pop(random.randrange(len(owned))))
            continue
        assert len(pages) * page_size >= tokens > (len(pages) - 1) * page_size
        owned.append(pages)
        held = [page for pages in owned for page in pages]
        assert len(held) == len(set(held)) == 16 - cache.free_pages
        assert all(0 <= page < 16 for page in held)
    for pages in owned:
        cache.free(pages)
    assert cache.free_pages == 16


def test_free_refuses_what_is_not_in_use():
    cache = LatentCache(CONFIG, pages=2, page_size=4)
    pages = cache.admit(8)
    assert cache.admit(1) is None
    cache.free(pages)
    with pytest.raises(ValueError, match=f"page {pages[0]} is not in use"):
        cache.free(pages)
    with pytest.raises(ValueError, match="page 2 is not in use"):
        cache.free([2])


@pytest.mark.parametrize(("pages", "page_size"), [(0, 4), (4, 0)])
def test_sizes_must_be_positive(pages, page_size):
    with pytest.raises(ValueError, match="pages and page_size: expected at least 1"):
        LatentCache(CONFIG, pages=pages, page_size=page_size)


def test_block_table():
    cache = LatentCache(CONFIG, pages=8, page_size=4)
    table = cache.block_table([[5, 1], [7], []])
    assert table.dtype == torch.int32
    assert table.tolist() == [[5, 1], [7, 0], [0, 0]]


TABLE = torch.tensor([[5, 1, 6], [7, 2, 0], [3, 4, 8]], dtype=torch.int32)
PAGE = 4


def slot(sequence, position):
    return int(TABLE[sequence, position // PAGE]) * PAGE + position % PAGE


def test_prompt_batch():
    """Sequences of 5, 0 and 9 tokens."""
    batch = Batch.prompt(torch.tensor([0, 5, 5, 14], dtype=torch.int32), 14, TABLE, PAGE)
    assert batch.positions.tolist() == [*range(5), *range(9)]
    assert batch.slots.tolist() == [slot(0, p) for p in range(5)] + [slot(2, p) for p in range(9)]
    assert batch.lengths.tolist() == [5, 0, 9]
    without = Batch.prompt(torch.tensor([0, 5, 5, 14], dtype=torch.int32), 14)
    assert without.slots is without.block_table is without.lengths is None


def test_extend_batch():
    """Two tokens after 3, none after 4, five after 6."""
    cu_seqlens = torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    batch = Batch.extend(cu_seqlens, 7, torch.tensor([5, 4, 11], dtype=torch.int32), TABLE, PAGE)
    assert batch.positions.tolist() == [3, 4, 6, 7, 8, 9, 10]
    assert batch.slots.tolist() == [slot(0, 3), slot(0, 4), *(slot(2, p) for p in range(6, 11))]


def test_decode_batch():
    """Three rows a sequence of which 3, 1 and 0 count: the others are not written."""
    lengths = torch.tensor([5, 7, 4], dtype=torch.int32)
    batch = Batch.decode(lengths, 3, TABLE, PAGE)
    assert batch.positions.tolist() == [2, 3, 4, 4, 5, 6, 1, 2, 3]
    assert batch.slots.tolist() == [slot(b, p) for b, n in enumerate((5, 7, 4)) for p in range(n - 3, n)]
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 9]
    batch = Batch.decode(lengths, 3, TABLE, PAGE, torch.tensor([3, 1, 0], dtype=torch.int32))
    assert batch.slots.tolist() == [slot(0, 2), slot(0, 3), slot(0, 4), slot(1, 6), -1, -1, -1, -1, -1]


def test_positions_beyond_the_table_have_no_slot():
    batch = Batch.decode(torch.tensor([13], dtype=torch.int32), 2, TABLE[:1], PAGE)
    assert batch.slots.tolist() == [slot(0, 11), -1]
