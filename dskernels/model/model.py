"""The model: embedding, blocks, head, and the MTP modules behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from dskernels.model import few
from dskernels.model.batch import Batch
from dskernels.model.block import Block
from dskernels.model.config import Config
from dskernels.model.layers import Linear, RMSNorm
from dskernels.model.moe import MoE, Router, RouterOutput
from dskernels.model.mtp import MTP, shift
from dskernels.model.rope import Rope

if TYPE_CHECKING:
    from dskernels.model.checkpoint import Source


class Output(NamedTuple):
    """The results of a pass over packed sequences.

    Attributes:
        logits: ``[T, vocab]``; row i scores the token after token i.
        hidden: ``[T, hidden]``, after the final norm.
        mtp_logits: for each MTP module k = 1, 2, ... that ran, ``[T, vocab]``; row i scores the token k + 1 after i.
            Rows without a token i + k in the same sequence mean nothing.
        routers: for each entry of `DeepseekV3.moe_layers` that ran, in that order, its logits and its choice.
    """

    logits: Tensor
    hidden: Tensor
    mtp_logits: tuple[Tensor, ...]
    routers: tuple[RouterOutput, ...]


class DeepseekV3(nn.Module):
    """A language model of the DeepSeek-V3 family.

    Args:
        config: its shape.
        fp8: compute the linear layers and the experts in e4m3 (embedding, head, router, norms and attention do not
            change).
        recompute: save less for the backward: the outputs of norms, of attention's up-projections and of the SwiGLU are
            computed again (report section 3.2.3). The gradients have the same bits.
        device: of the parameters; "meta" allocates nothing and leaves them uninitialised.
        dtype: of the parameters; the router bias is always fp32.

    Attributes:
        layers: the blocks.
        mtp: the MTP modules.
        scale_format: how the scales of weights kept in fp8 are rounded, see `keep_in_fp8`.
        source: what else a checkpoint contained, to be written back by `save`.
    """

    scale_format: str = "fp32"
    source: Source | None = None

    def __init__(
        self,
        config: Config,
        *,
        fp8: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.fp8, self.recompute = fp8, recompute
        with torch.device("meta"):
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            dense, how = config.first_k_dense_replace, dict(fp8=fp8, recompute=recompute)
            self.layers = nn.ModuleList(Block(config, moe=i >= dense, **how) for i in range(config.num_hidden_layers))
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head = Linear(config.hidden_size, config.vocab_size, fp8=False)
            self.mtp = nn.ModuleList(MTP(config, **how) for _ in range(config.num_nextn_predict_layers))
            self.rope = Rope(config)
        device = torch.get_default_device() if device is None else torch.device(device)
        self.to(dtype=torch.get_default_dtype() if dtype is None else dtype)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every matrix from N(0, initializer_range^2); norms become 1, router biases 0."""
        for _, parameter, is_drawn in self.initial_parameters():
            if is_drawn:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
            else:
                parameter.fill_(1.0)
        for module in self.modules():
            if isinstance(module, Router) and module.e_score_correction_bias is not None:
                module.e_score_correction_bias.zero_()

    def initial_parameters(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Every parameter with its name, in the order of `init_weights`, and whether it is drawn there."""
        for prefix, module in self.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False):
                yield name, parameter, not isinstance(module, RMSNorm)

    @property
    def moe_layers(self) -> list[MoE]:
        """The expert blocks in the order in which they run, those of the MTP modules last."""
        return [block.mlp for block in (*self.layers, *self.mtp) if isinstance(block.mlp, MoE)]

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None, *, mtp: bool = False) -> Output:
        """Score every next token of packed sequences.

        Args:
            tokens: integer ``[T]``, the sequences one after the other.
            cu_seqlens: int32 ``[B + 1]`` on the same device, sequence ``b`` is
                ``tokens[cu_seqlens[b]:cu_seqlens[b + 1]]``; None for a single sequence.
            mtp: also run the MTP modules.

        Raises:
            TypeError: tokens are not integers, or ``cu_seqlens`` is not int32.
            ValueError: a wrong number of dimensions.
        """
        _check_packed(tokens, cu_seqlens)
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, tokens.shape[0]], dtype=torch.int32, device=tokens.device)
        batch = Batch.prompt(cu_seqlens, tokens.shape[0])
        hidden, routers = self.trunk(tokens, batch)
        logits = self.lm_head(hidden)
        mtp_logits = []
        last = hidden
        for k in range(1, len(self.mtp) + 1) if mtp else ():
            last, router = self.predict(shift(tokens, cu_seqlens, k), last, batch, depth=k)
            mtp_logits.append(self.lm_head(last))
            routers.append(router)
        return Output(logits, hidden, tuple(mtp_logits), tuple(routers))

    def trunk(self, tokens: Tensor, batch: Batch, cache: Tensor | None = None) -> tuple[Tensor, list[RouterOutput]]:
        """All blocks and the final norm, without the head.

        Args:
            tokens: integer ``[T]``.
            batch: the layout of the tokens.
            cache: ``[layers, pages, page_size, latent]``, see `LatentCache`; None only for prompts.

        Returns:
            Hidden states ``[T, hidden]`` after the final norm, and the routers' output.
        """
        x, update, routers = self._blocks(tokens, batch, cache)
        if update is None:
            return self.norm(x), routers
        # If blocks train in e4m3, the last addition to the stream and the norm are one launch, as inside the blocks.
        return self.norm.beside(x, update, self.fp8 and torch.is_grad_enabled())[0], routers

    def score(self, tokens: Tensor, batch: Batch, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states after the final norm, and the logits, of all tokens; takes the arguments of `trunk`."""
        if not few.fit(tokens.shape[0], self.lm_head):
            hidden, _ = self.trunk(tokens, batch, cache)
            return hidden, self.lm_head(hidden)
        x, update, _ = self._blocks(tokens, batch, cache)
        logits, _, hidden = few.products(x, (self.lm_head,), update=update, norm=self.norm, with_normed=True)
        return hidden, logits

    def _blocks(
        self, tokens: Tensor, batch: Batch, cache: Tensor | None
    ) -> tuple[Tensor, Tensor | None, list[RouterOutput]]:
        """The residual stream after all blocks, what is still to be added to it, and the routers' output."""
        update: Tensor | None = None
        if not torch.is_grad_enabled():
            x, cos, sin = few.embed(tokens, batch.positions, self.embed_tokens.weight, self.rope)
        else:
            cos, sin = self.rope(batch.positions)
            x = self.embed_tokens(tokens)
        routers = []
        for i, block in enumerate(self.layers):
            x, update, router = block(x, update, batch, cos, sin, None if cache is None else cache[i])
            if router is not None:
                routers.append(router)
        return x, update, routers

    def predict(
        self, tokens: Tensor, hidden: Tensor, batch: Batch, cache: Tensor | None = None, *, depth: int = 1
    ) -> tuple[Tensor, RouterOutput]:
        """MTP module ``depth``: hidden states that predict one token further ahead than ``hidden`` does.

        Args:
            tokens: integer ``[T]``, the token ``depth`` after each position.
            hidden: ``[T, hidden]``, from the trunk or from the preceding module.
            batch: the layout of the positions of ``hidden``.
            cache: as for `trunk`; the module's own pages follow those of the blocks.
            depth: which module, counted from 1.
        """
        pages = None if cache is None else cache[len(self.layers) + depth - 1]
        module = cast(MTP, self.mtp[depth - 1])
        if few.fit(tokens.shape[0], module.eh_proj):
            given = tokens, batch.positions, self.embed_tokens.weight, self.rope
            both, cos, sin = few.embed_beside(*given, hidden, module.enorm, module.hnorm)
        else:
            cos, sin = self.rope(batch.positions)
            both = module.beside(self.embed_tokens(tokens), hidden)
        return module.predict(both, batch, cos, sin, pages)

    def predict_and_score(
        self, both: Tensor, batch: Batch, cos: Tensor, sin: Tensor, cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The first MTP module for a few tokens, embedded by `few.embed_beside`: its hidden states, and their
        logits."""
        module = cast(MTP, self.mtp[0])
        x, _, _ = few.products(both, (module.eh_proj,))
        x, update, _ = module(x, None, batch, cos, sin, cache[len(self.layers)])
        logits, _, hidden = few.products(x, (self.lm_head,), update=update, norm=module.norm, with_normed=True)
        return hidden, logits


def _check_packed(tokens: Tensor, cu_seqlens: Tensor | None) -> None:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens: expected integers, got {tokens.dtype}")
    if tokens.dim() != 1:
        raise ValueError(f"tokens: expected [T], sequences packed one after the other, got {list(tokens.shape)}")
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected [B + 1] with at least one sequence, got {list(cu_seqlens.shape)}")
    if cu_seqlens.device != tokens.device:
        raise ValueError(f"cu_seqlens: expected on {tokens.device} like tokens, got {cu_seqlens.device}")
