"""Multi-head latent attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dskernels as ds
from dskernels.mla.rope.gradient import rotated_from


class LatentAttention(nn.Module):
    """Attention whose keys and values are projections of one narrow latent: expanded, or absorbed in decode.

    Args:
        hidden_size: width of the tokens.
        heads: number of heads.
        kv_rank: width of the latent (512 in DeepSeek-V3).
        q_rank: width of the compressed query, None if it is not compressed.
        nope: columns of query and key without rotation.
        rope: rotated columns.
        value: columns of a value.
        scale: of the scores, by default ``(nope + rope) ** -0.5``.
        eps: of the norms.
        device: of the parameters.
        dtype: of the parameters.

    The parameters have the names of DeepSeek's checkpoints: ``q_proj`` (or ``q_a_proj``, ``q_a_layernorm``,
    ``q_b_proj``), ``kv_a_proj_with_mqa``, ``kv_a_layernorm``, ``kv_b_proj``, ``o_proj``. Rotation acts on adjacent
    pairs, as in the original.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        *,
        kv_rank: int = 512,
        q_rank: int | None = None,
        nope: int = 128,
        rope: int = 64,
        value: int = 128,
        scale: float | None = None,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_rank, self.nope, self.rope, self.value = heads, kv_rank, nope, rope, value
        self.scale = (nope + rope) ** -0.5 if scale is None else scale
        self.eps = eps

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)

        if q_rank is None:
            self.q_proj = linear(hidden_size, heads * (nope + rope))
        else:
            self.q_a_proj = linear(hidden_size, q_rank)
            self.q_a_layernorm = nn.RMSNorm(q_rank, eps, device=device, dtype=dtype)
            self.q_b_proj = linear(q_rank, heads * (nope + rope))
        self.q_rank = q_rank
        self.kv_a_proj_with_mqa = linear(hidden_size, kv_rank + rope)
        self.kv_a_layernorm = nn.RMSNorm(kv_rank, eps, device=device, dtype=dtype)
        self.kv_b_proj = linear(kv_rank, heads * (nope + value))
        self.o_proj = linear(heads * value, hidden_size)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor,
        *,
        cache: Tensor | None = None,
        slots: Tensor | None = None,
        block_table: Tensor | None = None,
        lengths: Tensor | None = None,
        absorb: bool = False,
    ) -> Tensor:
        """Attend within packed sequences or, with a block table, to everything that is cached of them.

        Args:
            x: ``[T, hidden_size]``, sequences one after the other.
            cos: float32 ``[T, rope / 2]`` for the tokens' positions.
            sin: float32 ``[T, rope / 2]`` likewise.
            cu_seqlens: int32 ``[S + 1]``, where the new tokens of each sequence begin, see `dskernels.mla_prefill`.
            cache: ``[pages, page size, kv_rank + rope]`` that the new latents are written to, see
                `dskernels.write_latent_cache`.
            slots: int64 ``[T]``, where in the cache they are written.
            block_table: int32 ``[S, pages]``. Without it, sequences consist of the new tokens only; with it, they also
                attend to what is cached before them, and there is no gradient.
            lengths: int32 ``[S]``, cached positions of each sequence, including the new tokens.
            absorb: only with a block table, and T / S new tokens for every sequence: do not expand keys and values,
                which is faster for few new tokens.

        Returns:
            ``[T, hidden_size]``. Differentiable without a block table.
        """
        q = self.q_proj(x) if self.q_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (self.heads, -1))
        kv, k_rope = self.kv_a_proj_with_mqa(x).split((self.kv_rank, self.rope), -1)
        if cache is not None:
            if slots is None:
                raise ValueError("slots: expected them with a cache, got None")
            norm, keys = self.kv_a_layernorm.weight, k_rope.detach()
            with torch.no_grad():
                ds.write_latent_cache(kv.detach(), keys, norm, cos, sin, cache, slots, eps=self.eps)
        if block_table is None:
            k, v = (
                self.kv_b_proj(self.kv_a_layernorm(kv))
                .unflatten(-1, (self.heads, -1))
                .split((self.nope, self.value), -1)
            )
            q = rotated_from(q, cos, sin, self.nope)
            k_rope = rotated_from(k_rope[:, None], cos, sin, 0)[:, 0]
            out, _ = ds.mla_prefill(q, k, v, cu_seqlens, cu_seqlens, scale=self.scale, k_rope=k_rope)
        elif cache is None or lengths is None:
            raise ValueError("block_table: expected a cache and lengths with it")
        else:
            given = q, cos, sin, cache, block_table, lengths
            out = self._absorbed(*given) if absorb else self._extended(*given, cu_seqlens)
        return self.o_proj(out.flatten(1))

    @torch.no_grad()
    def _extended(
        self, q: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        q = torch.cat((q[..., : self.nope], ds.apply_rope(q[..., self.nope :], cos, sin)), -1)
        kv_b = self.kv_b_proj.weight
        return ds.mla_prefill_cached(q, kv_b, cache, table, lengths, cu_seqlens, scale=self.scale)[0]

    @torch.no_grad()
    def _absorbed(self, q: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        requests = lengths.shape[0]
        if q.shape[0] % max(requests, 1):
            raise ValueError(f"x: expected as many tokens of each of {requests} sequences, got {q.shape[0]}")
        w_uk, w_uv = self.kv_b_proj.weight.unflatten(0, (self.heads, -1)).split((self.nope, self.value), 1)
        q = ds.mla_decode_queries(q, w_uk, cos, sin).unflatten(0, (requests, -1))
        out, _ = ds.mla_decode(q, cache, table, lengths, scale=self.scale, value_dim=self.kv_rank)
        return torch.einsum("thl,hvl->thv", out.flatten(0, 1), w_uv)
