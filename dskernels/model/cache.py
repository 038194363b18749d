"""The paged latent cache: one tensor for all layers, who owns which of its pages, and what they hold."""

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

FP8_TILE = 128  # latent elements to one scale in an fp8 row


class LatentCache:
    """Room for the latents of many sequences, handed out in pages.

    A sequence owns the same pages in every layer. Pages are reserved when it is admitted, for all the tokens it may
    come to have: its row of the block table never changes, and a sequence that has begun can always finish. To drop
    tokens at its end (rejected drafts) is to count fewer: what lies behind a sequence's length is never read.

    Full pages never change, so that sequences which begin with the same tokens share them. `remember` says what a page
    holds, `match` finds the pages of a prompt, `admit` takes a share in them. A page that nobody owns any more keeps
    what it holds until it is needed; the one whose use is longest ago goes first.

    Args:
        config: of the model; MTP modules have pages like the blocks, behind them.
        pages: how many there are.
        page_size: tokens of a page.
        dtype: of the latents. torch.float8_e4m3fn stores rows of bytes: the latent in e4m3, one fp32 scale for each
            128 of it, the rotated key in bf16 (656 bytes a token instead of 1152 for DeepSeek-V3).
        device: by default torch's default device.

    Attributes:
        data: ``[layers, pages, page_size, latent]``, uint8 rows with fp8.
        kept: what one generation leaves for the next that is like it: CUDA graphs, which know this tensor's address.
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
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(pages))  # the first is taken next
        self._owners: dict[int, int] = {}  # of each page that has any
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._models: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._serial = count()
        self.kept: dict[Hashable, object] = {}

    @property
    def pages(self) -> int:
        """All pages."""
        return self.data.shape[1]

    @property
    def free_pages(self) -> int:
        """Pages that nobody owns."""
        return len(self._idle)

    @property
    def remembered_pages(self) -> int:
        """Pages, owned or not, that a prompt may share."""
        return len(self._key_of)

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens fill."""
        return -(-tokens // self.page_size)

    def admit(self, tokens: int, shared: Sequence[int] = ()) -> list[int] | None:
        """The pages of a sequence that may grow to ``tokens`` tokens, ``shared`` first; None if too few are free."""
        needed = self.pages_for(tokens) - len(shared)
        if needed > len(self._idle) - sum(page in self._idle for page in shared):
            return None
        for page in shared:
            self._idle.pop(page, None)
            self._owners[page] = self._owners.get(page, 0) + 1
        return [*shared, *(self._take() for _ in range(needed))]

    def free(self, pages: Sequence[int]) -> None:
        """Gives back what `admit` returned.

        Raises:
            ValueError: a page is not of this cache or is free already.
        """
        for page, times in Counter(pages).items():
            if self._owners.get(page, 0) < times:
                raise ValueError(f"pages: page {page} is not in use")
        for page in reversed(pages):  # the last page of a prefix is of no use without those before it: it goes first
            self._owners[page] -= 1
            if not self._owners[page]:
                del self._owners[page]
                self._idle[page] = None
                if page not in self._key_of:
                    self._idle.move_to_end(page, last=False)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages that hold the longest known beginning of a prompt with these `page_keys`."""
        pages = []
        for key in keys:
            if key not in self._page_of:
                break
            pages.append(self._page_of[key])
        return pages

    def remember(self, pages: Sequence[int], keys: Sequence[bytes]) -> None:
        """Says what pages in use hold: full, and not to be written again. Further pages than keys are ignored."""
        for page, key in zip(pages, keys, strict=False):
            if page not in self._owners:
                raise ValueError(f"pages: page {page} is not in use")
            if key not in self._page_of and page not in self._key_of:
                self._page_of[key], self._key_of[page] = page, key

    def forget(self) -> None:
        """Shares no page that was written until now."""
        self._page_of.clear()
        self._key_of.clear()

    def root(self, model: nn.Module) -> bytes:
        """What sets the pages of a model, with the weights that it has now, apart from those of others.

        Weights are known by their place and by torch's count of changes, which writing through ``.data`` evades: call
        `forget` after that.
        """
        if model not in self._models:
            self._models[model] = next(self._serial)
        tensors = (*model.parameters(), *model.buffers())
        state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if not t.is_meta]
        return repr((self._models[model], state)).encode()

    def block_table(self, sequences: Sequence[Sequence[int]], width: int | None = None) -> Tensor:
        """The pages of each sequence as int32 ``[B, width]`` on the device, by default wide enough for the longest.

        Rows are filled up with page 0.
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
    """A name for what each page holds that ``tokens`` fill: it depends on all tokens before the end of the page.

    With ``ahead`` it depends on so many tokens more, and pages whose are not among ``tokens`` have no name: an MTP
    module caches of a position what comes of the token after it.

    Returns:
        Digests of 128 bits, each of the one before it and the tokens of a page.
    """
    data = array("q", tokens)
    digest = hashlib.blake2b(root + bytes([ahead]) + data[:ahead].tobytes(), digest_size=16).digest()
    keys = []
    for end in range(page_size + ahead, len(tokens) + 1, page_size):
        digest = hashlib.blake2b(digest + data[end - page_size : end].tobytes(), digest_size=16).digest()
        keys.append(digest)
    return keys
