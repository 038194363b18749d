"""The losses of a forward pass: next-token prediction, multi-token prediction, and the balance loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import dskernels as ds
from dskernels.model.config import Config
from dskernels.model.data import Packed
from dskernels.model.model import Output
from dskernels.model.mtp import targets


class Losses(NamedTuple):
    """The parts of the loss, each a scalar; training minimises ``main + lambda * mtp + balance``."""

    main: Tensor
    mtp: Tensor
    balance: Tensor


def losses(output: Output, batch: Packed, config: Config, *, balance_alpha: float) -> Losses:
    """The losses of a forward pass, in nats.

    P is the number of positions that have a next token in their sequence. ``main`` is the cross entropy summed over
    them, divided by P. ``mtp`` is ``1/D sum_k L^k``, where L^k is summed over the positions that have a token k + 1
    further on and also divided by P (report eqs. 24 and 25). ``balance`` sums eqs. 17-20 over the layers with experts.
    """
    predictions = batch.predictions.clamp(min=1)

    def cross_entropy(logits: Tensor, ahead: int) -> Tensor:
        return ds.cross_entropy(logits, targets(*batch, ahead)).sum() / predictions

    main = cross_entropy(output.logits, 1)
    ahead = [cross_entropy(logits, k) for k, logits in enumerate(output.mtp_logits, 2)]
    balance = [
        ds.balance_loss(
            router.logits,
            top_k=config.num_experts_per_tok,
            alpha=balance_alpha,
            sequence_lengths=batch.cu_seqlens.diff(),
            score=config.scoring_func,
        )
        for router in output.routers
    ]
    zero = torch.zeros_like(main)
    return Losses(main, sum(ahead, zero) / max(len(ahead), 1), sum(balance, zero))
