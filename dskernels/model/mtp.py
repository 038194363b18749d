"""Multi-token prediction (report section 2.2): the module, and which token is the target of which row."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dskernels.model import few
from dskernels.model.batch import Batch, packed_positions
from dskernels.model.block import Block
from dskernels.model.config import Config
from dskernels.model.layers import Linear, RMSNorm
from dskernels.model.moe import RouterOutput


class MTP(Block):
    """One multi-token prediction module (report eqs. 21-23): combines the hidden state of token i with the embedding of
    a later token.

    The embedding comes first in the concatenation, and the hidden state is the one after the final norm, as in the
    released weights (the report prints them the other way round).
    """

    def __init__(self, config: Config, *, fp8: bool, recompute: bool = False) -> None:
        super().__init__(config, moe=True, fp8=fp8, recompute=recompute)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, fp8=False)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def beside(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """Both inputs normed and concatenated, ``[T, 2 * hidden]``."""
        return torch.cat((self.enorm(embedding), self.hnorm(hidden)), -1)

    def predict(
        self,
        both: Tensor,
        batch: Batch,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor | None = None,
    ) -> tuple[Tensor, RouterOutput]:
        """The next hidden state ``[T, hidden]`` from the result of `beside`, normed, for the head or the next
        prediction."""
        x, update, router = self(few.linear(both, self.eh_proj), None, batch, cos, sin, cache)
        hidden, _, _ = self.norm.beside(x, update, fp8=False)
        return hidden, cast(RouterOutput, router)  # its feed-forward is always a mixture of experts


def shift(tokens: Tensor, cu_seqlens: Tensor, k: int) -> Tensor:
    """The token ``k`` positions later in the same sequence, for each packed token; where there is none, the last one.

    Args:
        tokens: integer ``[T]``, the sequences one after the other.
        cu_seqlens: int32 ``[B + 1]``, where they begin and end.
        k: how far.

    Returns:
        ``[T]``, like `tokens`.
    """
    index, end = _ends(tokens, cu_seqlens)
    return tokens[torch.minimum(index + k, end - 1).clamp(min=0)]


def targets(tokens: Tensor, cu_seqlens: Tensor, k: int = 1) -> Tensor:
    """What row i has to predict: the token ``k`` positions later.

    Args:
        tokens: see `shift`.
        cu_seqlens: likewise.
        k: 1 goes with ``logits``, 2 with ``mtp_logits[0]``, and so on.

    Returns:
        int64 ``[T]``, -100 past the end of a sequence, which cross entropy ignores.
    """
    index, end = _ends(tokens, cu_seqlens)
    return torch.where(index + k < end, shift(tokens, cu_seqlens, k).long(), -100)


def _ends(tokens: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """For each packed token its index in the batch, and the end of its sequence."""
    sequence, _ = packed_positions(cu_seqlens, tokens.shape[0])
    return torch.arange(tokens.shape[0], device=tokens.device), cu_seqlens[sequence + 1]
