"""The paged latent cache: one tensor for all layers, which sequences own its pages, and what the pages contain."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from itertools import count
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dskernels.model.config import Config

FP8_TILE = 128  # latent elements that share a scale in an fp8 row


class LatentCache:
    """Memory for the latents of many sequences, allocated in pages.

    A sequence owns the same pages in every layer. They are reserved when it is admitted, enough for all the tokens that
    it may ever have: its row of the block table never changes, and a sequence that has begun can always finish.
    Dropping tokens at its end (rejected drafts) means counting fewer: what lies beyond a sequence's length is never
    read.

    Full pages never change, so sequences that begin with the same tokens can share them. `remember` records the
    contents of a page, `match` finds the pages of a prompt, and `admit` shares them. A page without an owner keeps its
    contents until it is needed; the least recently used one is overwritten first.

    Args:
        config: of the model; MTP modules have pages like the blocks, behind theirs.
        pages: number of pages.
        page_size: tokens in a page.
        dtype: of the latents. torch.float8_e4m3fn stores rows of bytes: the latent in e4m3, one fp32 scale for each 128
            elements, the rotated key in bf16 (656 bytes a token instead of 1152 for DeepSeek-V3).
        device: by default torch's default device.

    Attributes:
        data: ``[layers, pages, page_size, latent]``, uint8 rows with fp8.
        kept: what one generation leaves for the next one: CUDA graphs, which contain this tensor's address.
    """

    def __init__(
        self,
        config: Config,
        *,
        pages: int,
        page_size: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        if pages < 1 or page_size < 1:
            raise ValueError(f"pages and page_size: expected at least 1, got {pages} and {page_size}")
        width = config.latent_dim
        if dtype == torch.float8_e4m3fn:
            scales = -(-config.kv_lora_rank // FP8_TILE)
            dtype, width = torch.uint8, config.kv_lora_rank + 4 * scales + 2 * config.qk_rope_head_dim
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self.page_size = page_size
        self.data = torch.zeros(layers, pages, page_size, width, dtype=dtype, device=device)
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(pages))  # in the order in which they are taken
        self._owners: dict[int, int] = {}  # how many owners each page has, if any
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._models: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._serial = count()
        self.kept: dict[Hashable, object] = {}

    @property
    def pages(self) -> int:
        """Number of pages."""
        return self.data.shape[1]

    @property
    def free_pages(self) -> int:
        """Number of pages without an owner."""
        return len(self._idle)

    @property
    def remembered_pages(self) -> int:
        """Number of pages, with an owner or not, that a prompt may share."""
        return len(self._key_of)

    def pages_for(self, tokens: int) -> int:
        """Number of pages that this many tokens fill."""
        return -(-tokens // self.page_size)

    def admit(self, tokens: int, shared: Sequence[int] = ()) -> list[int] | None:
        """Reserve the pages of a sequence of up to ``tokens`` tokens, ``shared`` first; None if too few are free."""
        needed = self.pages_for(tokens) - len(shared)
        if needed > len(self._idle) - sum(page in self._idle for page in shared):
            return None
        for page in shared:
            self._idle.pop(page, None)
            self._owners[page] = self._owners.get(page, 0) + 1
        return [*shared, *(self._take() for _ in range(needed))]

    def free(self, pages: Sequence[int]) -> None:
        """Give back what `admit` returned.

        Raises:
            ValueError: a page is not one of this cache's, or has no owner.
        """
        for page, times in Counter(pages).items():
            if self._owners.get(page, 0) < times:
                raise ValueError(f"pages: page {page} is not in use")
        for page in reversed(pages):  # a prefix is useless without its first pages: they go last
            self._owners[page] -= 1
            if not self._owners[page]:
                del self._owners[page]
                self._idle[page] = None
                if page not in self._key_of:
                    self._idle.move_to_end(page, last=False)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages with the longest known prefix of a prompt whose pages have these `page_keys`."""
        pages = []
        for key in keys:
            if key not in self._page_of:
                break
            pages.append(self._page_of[key])
        return pages

    def remember(self, pages: Sequence[int], keys: Sequence[bytes]) -> None:
        """Record the contents of pages in use, which must be full and not be written again. Pages beyond the keys
        are ignored."""
        for page, key in zip(pages, keys, strict=False):
            if page not in self._owners:
                raise ValueError(f"pages: page {page} is not in use")
            if key not in self._page_of and page not in self._key_of:
                self._page_of[key], self._key_of[page] = page, key

    def forget(self) -> None:
        """Stop sharing any page that has been written so far."""
        self._page_of.clear()
        self._key_of.clear()

    def root(self, model: nn.Module) -> bytes:
        """The root of all page keys, which tells apart the pages of different models and of different weights of a
        model.

        Weights are identified by their addresses and by torch's version counters. Writing through ``.data`` evades
        these: call `forget` after that.
        """
        if model not in self._models:
            self._models[model] = next(self._serial)
        tensors = (*model.parameters(), *model.buffers())
        state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if not t.is_meta]
        return repr((self._models[model], state)).encode()

    def block_table(self, sequences: Sequence[Sequence[int]], width: int | None = None) -> Tensor:
        """The pages of each sequence as int32 ``[B, width]`` on the device; by default wide enough for the longest
        sequence.

        Rows are padded with page 0.
        """
        width = max((len(pages) for pages in sequences), default=0) if width is None else width
        rows = [[*pages, *[0] * (width - len(pages))] for pages in sequences]
        return torch.tensor(rows, dtype=torch.int32, device=self.data.device).view(len(sequences), width)

    def _take(self) -> int:
        page, _ = self._idle.popitem(last=False)
        if page in self._key_of:
            del self._page_of[self._key_of.pop(page)]
        self._owners[page] = 1
        return page


def page_keys(tokens: Sequence[int], page_size: int, *, root: bytes = b"", ahead: int = 0) -> list[bytes]:
    """A key for the contents of each page that ``tokens`` fill, which depends on all tokens up to the end of the page.

    With ``ahead`` it depends on this many more tokens, and a page without that many more has no key: what an MTP module
    caches for a position depends on the token after it.

    Returns:
        Digests of 128 bits, each of the preceding one and the tokens of a page.
    """
    data = array("q", tokens)
    digest = hashlib.blake2b(root + bytes([ahead]) + data[:ahead].tobytes(), digest_size=16).digest()
    keys = []
    for end in range(page_size + ahead, len(tokens) + 1, page_size):
        digest = hashlib.blake2b(digest + data[end - page_size : end].tobytes(), digest_size=16).digest()
        keys.append(digest)
    return keys
