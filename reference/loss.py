"""The loss of a language model, as plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each target in nats, ``log(sum exp(logits[t])) - logits[t, targets[t]]``; 0 if it is not a column of
    the logits.

    In fp32, or in fp64 for fp64 logits. A row that is left out has no influence, whatever it contains.
    """
    there = (targets >= 0) & (targets < logits.shape[1])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide = torch.where(there[:, None], wide, 0)
    return F.cross_entropy(wide, torch.where(there, targets.long(), -100), reduction="none")
