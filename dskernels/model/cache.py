"""The paged latent cache: one tensor for all layers, and who owns which of its pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dskernels.model.config import Config

FP8_TILE = 128  # latent elements to one scale in an fp8 row


class LatentCache:
    """Room for the latents of many sequences, handed out in pages.

    A sequence owns the same pages in every layer. Pages are reserved when it is admitted, for all the tokens it may
    come to
    have: its row of the block table never changes, and a sequence that has begun can always finish. To drop tokens
        at its
    end (rejected drafts) is to count fewer: what lies behind a sequence's length is never read.

    Args:
        config: of the model; MTP modules have pages like the blocks, behind them.
        pages: how many there are.
        page_size: tokens of a page.
        dtype: of the latents. torch.float8_e4m3fn stores rows of bytes: the latent in e4m3, one fp32 scale for each
            128 of it, the rotated key in bf16 (656 bytes a token instead of 1152 for DeepSeek-V3).
        device: by default torch's default device.

    Attributes:
        data: ``[layers, pages, page_size, latent]``, uint8 rows with fp8.
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
        self._free = list(range(pages))[::-1]
        self._used: set[int] = set()

    @property
    def pages(self) -> int:
        """All pages."""
        return self.data.shape[1]

    @property
    def free_pages(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens fill."""
        return -(-tokens // self.page_size)

    def admit(self, tokens: int) -> list[int] | None:
        """Reserves the pages of a sequence that may grow to ``tokens`` tokens; None if too few are free."""
        needed = self.pages_for(tokens)
        if needed > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(needed)]
        self._used.update(pages)
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Gives back what `admit` returned.

        Raises:
            ValueError: a page is not of this cache or is free already.
        """
        for page in pages:
            if page not in self._used:
                raise ValueError(f"pages: page {page} is not in use")
            self._used.remove(page)
            self._free.append(page)

    def block_table(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The pages of each sequence as int32 ``[B, most pages]`` on the device; rows are filled up with page 0."""
        width = max((len(pages) for pages in sequences), default=0)
        rows = [[*pages, *[0] * (width - len(pages))] for pages in sequences]
        return torch.tensor(rows, dtype=torch.int32, device=self.data.device).view(len(sequences), width)
