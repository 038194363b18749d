"""What a pass over a few tokens does between its larger kernels, in few launches.

One sequence of a small model is bound by launches, not by arithmetic. So if there are few rows, and weights are plain
and small, a product normalises its rows itself: each of its programs repeats this for all rows, which costs less than a
launch (`triton_few`, `triton_few_embed`). The PyTorch code here defines the result, and runs on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dskernels.dispatch import Operation
from dskernels.model.layers import FeedForward, Linear, RMSNorm
from dskernels.model.rope import Rope
from dskernels.model.steps import PLACED, Placed, place, place_fake

MOST_ROWS = 8
MOST_VOCABULARY = 1 << 14  # a vocabulary in which one program can find the most likely token
MOST_WEIGHTS = 1 << 22  # elements of a matrix, an estimate: reading a larger one hides the launch of a norm


class Unnormed:
    """The residual stream that enters a block, and the norm that the block's first product is to apply.

    Attributes:
        stream: ``[T, hidden]``; once the product has run, the sum with what was still to be added.
    """

    def __init__(self, x: Tensor, update: Tensor | None, norm: RMSNorm) -> None:
        self.stream, self._update, self._norm = x, update, norm

    def products(self, *layers: Linear) -> Tensor:
        """The products of these layers with the norm of the stream, side by side."""
        out, self.stream, _ = products(self.stream, layers, update=self._update, norm=self._norm)
        self._update = None
        return out


def fit(rows: int, *layers: Linear | FeedForward | None) -> bool:
    """Whether these layers take few rows: weights are plain and small, no gradient is needed, and no layer has a
    hook."""
    few_rows = rows <= MOST_ROWS and not torch.is_grad_enabled()
    return few_rows and all(layer is None or _plain(layer) for layer in layers)


def _plain(layer: Linear | FeedForward) -> bool:
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if isinstance(layer, FeedForward):
        return _plain(layer.w13) and _plain(layer.w2)
    return not layer.fp8 and layer.weight_scale_inv is None and layer.weight.numel() <= MOST_WEIGHTS


def products(
    x: Tensor,
    layers: Sequence[Linear],
    *,
    update: Tensor | None = None,
    norm: RMSNorm | None = None,
    gated: bool = False,
    with_normed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One or two linear layers of ``norm(x + update)``, of ``silu(gate) * up`` or of ``x`` itself.

    Args:
        x: ``[T, K]``; with `gated` ``[T, 2 * K]``, gate first.
        layers: with K inputs.
        update: ``[T, K]``, added first; the sum is rounded.
        norm: the norm before the products.
        gated: instead of a norm, a SwiGLU.
        with_normed: also return what is multiplied.

    Returns:
        The products side by side ``[T, N]``; ``x + update``; and its norm, empty if not asked for.
    """
    first, second = layers if len(layers) == 2 else (layers[0], None)
    weights = first.weight, None if second is None else second.weight
    scale, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    out, stream, normed = _products(x, update, scale, *weights, eps, gated, with_normed)
    return out, x if update is None else stream, normed


def linear(x: Tensor, layer: Linear) -> Tensor:
    """``layer(x)`` for ``[T, K]``, by `products` if `fit` says so."""
    return products(x, (layer,))[0] if fit(x.shape[0], layer) else layer(x)


def embed(tokens: Tensor, positions: Tensor, embedding: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the embedding ``[T, hidden]``, and cos and sin as in `Rope`."""
    return _embed(tokens, positions, embedding, rope.frequencies, rope.scale, None, None, None, 0.0)


def embed_beside(
    tokens: Tensor, positions: Tensor, embedding: Tensor, rope: Rope, hidden: Tensor, enorm: RMSNorm, hnorm: RMSNorm
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, normed, and next to it the norm of ``hidden``: ``[T, 2 * hidden]``, the input of an MTP module."""
    norms = hidden, enorm.weight, hnorm.weight, enorm.eps
    return _embed(tokens, positions, embedding, rope.frequencies, rope.scale, *norms)


def look_ahead(
    logits: Tensor,
    drafts: Tensor,
    j: int,
    lengths: Tensor,
    active: Tensor,
    block_table: Tensor,
    embedding: Tensor,
    rope: Rope,
    hidden: Tensor,
    enorm: RMSNorm,
    hnorm: RMSNorm,
    *,
    page_size: int,
) -> tuple[Placed, Tensor, Tensor, Tensor]:
    """Take the most likely tokens as the drafts j, in place, and lay out the pass that takes them in: places, and
    `embed_beside`.

    Args:
        logits: ``[B, vocab]``.
        drafts: int64 ``[B, k]``.
        j: the index of the draft.
        lengths: int32 ``[B]``, cached tokens; draft j goes j places behind them.
        active: int32 ``[B]``, see `place`.
        block_table: int32 ``[B, pages]``.
        embedding: ``[vocab, hidden]``.
        rope: of the model.
        hidden: ``[B, hidden]``.
        enorm: the norm of embeddings.
        hnorm: the norm of hidden states.
        page_size: tokens in a page.
    """
    given = embedding, rope.frequencies, rope.scale, hidden, enorm.weight, hnorm.weight, enorm.eps
    *placed, both, cos, sin = _look_ahead(logits, drafts, j, lengths, active, block_table, page_size, *given)
    return Placed(*placed), both, cos, sin


# ---- what they mean, in PyTorch -------------------------------------------------------------------------------------


def _products_reference(
    x: Tensor,
    update: Tensor | None,
    norm: Tensor | None,
    weight: Tensor,
    second: Tensor | None,
    eps: float,
    gated: bool,
    with_normed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    stream = x if update is None else x + update
    if gated:
        gate, up = stream.chunk(2, -1)
        h = F.silu(gate) * up
    else:
        h = stream if norm is None else F.rms_norm(stream, norm.shape, norm, eps)
    out = F.linear(h, weight)
    if second is not None:
        out = torch.cat((out, F.linear(h, second)), 1)
    empty = x.new_empty(0)
    return out, empty if update is None else stream, (h if norm is not None else h.clone()) if with_normed else empty


def _embed_reference(
    tokens: Tensor,
    positions: Tensor,
    embedding: Tensor,
    frequencies: Tensor,
    scale: float,
    hidden: Tensor | None,
    enorm: Tensor | None,
    hnorm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    x = F.embedding(tokens, embedding)
    if hidden is not None and enorm is not None and hnorm is not None:
        x = torch.cat((F.rms_norm(x, enorm.shape, enorm, eps), F.rms_norm(hidden, hnorm.shape, hnorm, eps)), 1)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (x, cos, sin) if scale == 1.0 else (x, cos * scale, sin * scale)


def _look_ahead_reference(
    logits: Tensor,
    drafts: Tensor,
    j: int,
    lengths: Tensor,
    active: Tensor,
    block_table: Tensor,
    page_size: int,
    *given: Any,
) -> tuple[Tensor, ...]:
    token = logits.argmax(-1)
    drafts[:, j] = token
    placed = place(token, drafts[:, :0], lengths, active, block_table, page_size=page_size, ahead=j)
    return (*placed, *_embed_reference(token, placed.positions, *given))


# ---- registration --------------------------------------------------------------------------------------------------


def _products_fake(x, update, norm, weight, second, eps, gated, with_normed):
    columns = weight.shape[0] + (0 if second is None else second.shape[0])
    stream = x.new_empty(0) if update is None else x.new_empty(x.shape)
    normed = x.new_empty(x.shape[0], weight.shape[1]) if with_normed else x.new_empty(0)
    return x.new_empty(x.shape[0], columns), stream, normed


def _embed_fake(tokens, positions, embedding, frequencies, scale, hidden, enorm, hnorm, eps):
    rows, width = tokens.shape[0], embedding.shape[1] * (1 if hidden is None else 2)
    cos, sin = (frequencies.new_empty(rows, frequencies.shape[0]) for _ in range(2))
    return embedding.new_empty(rows, width), cos, sin


def _look_ahead_fake(logits, drafts, j, lengths, active, block_table, page_size, embedding, frequencies, *given):
    tokens, positions, *places = place_fake(drafts, drafts[:, :0], lengths)
    embedded = _embed_fake(tokens, positions, embedding, frequencies, *given)
    return tokens, positions, *places, *embedded


_products = Operation(
    "few_products(Tensor x, Tensor? update, Tensor? norm, Tensor weight, Tensor? second, float eps, bool gated, "
    "bool with_normed) -> (Tensor, Tensor, Tensor)",
    reference=_products_reference,
    triton="dskernels.model.triton_few:products",
    fake=_products_fake,
)
_embed = Operation(
    "embed_tokens(Tensor tokens, Tensor positions, Tensor embedding, Tensor frequencies, float scale, Tensor? hidden, "
    "Tensor? enorm, Tensor? hnorm, float eps) -> (Tensor, Tensor, Tensor)",
    reference=_embed_reference,
    triton="dskernels.model.triton_few_embed:embed",
    fake=_embed_fake,
)
_look_ahead = Operation(
    "look_ahead(Tensor logits, Tensor(a!) drafts, int j, Tensor lengths, Tensor active, Tensor block_table, "
    "int page_size, Tensor embedding, Tensor frequencies, float scale, Tensor hidden, Tensor enorm, Tensor hnorm, "
    f"float eps) -> ({PLACED}, Tensor, Tensor, Tensor)",
    reference=_look_ahead_reference,
    triton="dskernels.model.triton_few_embed:look_ahead",
    fake=_look_ahead_fake,
)
