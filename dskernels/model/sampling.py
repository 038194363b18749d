"""From logits to tokens: temperature, top-k, top-p, min-p, and the verification of drafts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: only this many most likely tokens may be chosen (more if they tie); 0 sets no limit.
        top_p: only the most likely tokens that together reach this probability may be chosen.
        min_p: only tokens with at least this fraction of the most likely one's probability may be chosen.
        generator: source of random numbers for `choose`, `draw` and `verify` if none are passed, on the device of the
            logits; None is torch's own.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 (no limit) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: expected 0 to 1, got {self.min_p}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """The probabilities that tokens are drawn from: float32 ``[..., vocab]``, for logits of the same shape."""
        scores = logits.float() / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            smallest = scores.topk(self.top_k, -1).values[..., -1:]
            scores = scores.masked_fill(scores < smallest, -torch.inf)
        p = scores.softmax(-1)
        if self.top_p < 1:
            ordered, index = p.sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p  # the probability is reached without this token
            p = p.masked_fill(beyond.scatter(-1, index, beyond), 0.0)
        if self.min_p > 0:
            p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0.0)
        return p / p.sum(-1, keepdim=True) if self.top_p < 1 or self.min_p > 0 else p

    def choose(self, logits: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The next token ``[B]`` for logits ``[B, vocab]``, and what it was drawn from (None if greedy)."""
        if self.greedy:
            return logits.argmax(-1), None
        p = self.probabilities(logits)
        return self.draw(p, u), p

    def draw(self, p: Tensor, u: Tensor | None = None) -> Tensor:
        """A token ``[B]`` from each row of weights ``[B, vocab]`` (of any sum).

        It is the first token whose weight, added to those before it, exceeds ``u`` ``[B]``, uniform in [0, 1), times
        the sum of all: one random number for each token, and, unlike torch.multinomial, nothing waits for the device.
        """
        u = torch.rand(p.shape[0], device=p.device, generator=self.generator) if u is None else u
        summed = p.cumsum(-1)
        token = (summed <= u[:, None] * summed[:, -1:]).sum(-1).clamp(max=p.shape[-1] - 1)
        # Sums are rounded: once in some million draws this would lead to a neighbour with probability zero.
        return torch.where(p.gather(-1, token[:, None]).squeeze(-1) > 0, token, p.argmax(-1))

    def verify(
        self, logits: Tensor, drafts: Tensor, draft_p: Tensor | None, u: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """How many drafted tokens are accepted, and the token that follows them.

        Greedy: a draft is accepted if it is the most likely token. Sampled: a draft x is accepted with probability
        min(1, p(x) / q(x)), and the first rejected one is replaced by a token from max(p - q, 0), normalised: whatever
        q is, tokens are then distributed as p (speculative sampling, arXiv 2211.17192, algorithm 1).

        Args:
            logits: ``[B, k + 1, vocab]`` of the model, after the last certain token and after each draft.
            drafts: int64 ``[B, k]``.
            draft_p: ``[B, k, vocab]``, what the drafts were drawn from; None if greedy.
            u: uniform numbers ``[B, k + 1, 2]``; for each position one decides whether the draft is accepted, and one
                draws a token.

        Returns:
            int64 ``[B]``, accepted drafts, 0 to k, and int64 ``[B]``, the token after them.
        """
        if self.greedy or draft_p is None:
            best = logits.argmax(-1)
            accepted = (drafts == best[:, :-1]).long().cumprod(1).sum(1)
            return accepted, best.gather(1, accepted[:, None]).squeeze(1)
        B, k = drafts.shape
        u = torch.rand(B, k + 1, 2, device=drafts.device, generator=self.generator) if u is None else u
        p = self.probabilities(logits)
        p_draft = p[:, :-1].gather(2, drafts[..., None]).squeeze(2)
        q_draft = draft_p.gather(2, drafts[..., None]).squeeze(2)
        accepted = (u[:, :-1, 0] * q_draft < p_draft).long().cumprod(1).sum(1)
        # After the last draft nothing was drafted: q = 0, and the residual is p itself.
        row = accepted[:, None, None].expand(-1, 1, p.shape[2])
        p_next = p.gather(1, row).squeeze(1)
        q_next = torch.nn.functional.pad(draft_p, (0, 0, 0, 1)).gather(1, row).squeeze(1)
        residual = (p_next - q_next).clamp(min=0)
        # If p = q up to rounding, nothing is left of the residual, and p itself is the right distribution.
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_next)
        return accepted, self.draw(residual, u[:, :, 1].gather(1, accepted[:, None]).squeeze(1))
