"""The functions that are registered with transformers' own interfaces under one name: attention, masks, experts."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dskernels.integrations.transformers.experts import experts_forward
from dskernels.integrations.transformers.paged import NAME


@functools.cache
def register() -> None:
    """Register the name with transformers, once for each process. This changes no model."""
    modeling = importlib.import_module("transformers.modeling_utils")
    masking = importlib.import_module("transformers.masking_utils")
    moe = importlib.import_module("transformers.integrations.moe")
    fp8 = importlib.import_module("transformers.integrations.finegrained_fp8")
    modeling.AttentionInterface.register(NAME, attention)
    modeling.AttentionInterface.register(f"paged|{NAME}", attention)
    masking.AttentionMaskInterface.register(NAME, mask)
    moe.ExpertsInterface.register(NAME, experts_forward)
    fp8.FP8ExpertsInterface.register(NAME, experts_forward)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA over expanded keys and values, for calls that `attention_forward` leaves to transformers."""
    sdpa = importlib.import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
    queries, keys = query.shape[2], key.shape[2]
    if (attention_mask is None and 1 < queries != keys) or (attention_mask is not None and attention_mask.dim() == 2):
        causal = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        real = True if attention_mask is None else attention_mask[:, None, None, -keys:].bool()
        attention_mask = (causal & real).expand(query.shape[0], 1, -1, -1)
    kwargs.pop("is_causal", None)
    return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """False for tokens that are padding, bool ``[B, kv_length]``; None if it is known that there is none.

    Masks that are more than causal and padding are written out in full, as for SDPA.
    """
    masking = importlib.import_module("transformers.masking_utils")
    causal = mask_function is None or mask_function is masking.causal_mask_function
    if not causal or isinstance(q_offset, Tensor) or kv_offset or kv_length != q_offset + q_length:
        if mask_function is not None:
            kwargs["mask_function"] = mask_function
        return masking.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            **kwargs,
        )
    if attention_mask is None:
        return None
    attention_mask = attention_mask[:, -kv_length:]
    # The mask of a prompt is checked once; that of a decode step is not, since this would wait for the step before.
    asks = q_length > 1 and not torch.compiler.is_compiling() and not _capturing(attention_mask)
    return None if asks and bool(attention_mask.all()) else attention_mask


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
