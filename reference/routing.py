"""Choosing the experts of each token and keeping their load even (DeepSeek-V3 report, arXiv 2412.19437, section 2.1.2).

Suffixes: T tokens, E experts, G groups of experts, M experts of a group, K experts chosen by a token, S sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dskernels.types import LoadStatistics, Routing

LARGEST = 2.0**126
LEAST_SUM = 1e-30  # weights with a smaller sum are not normalised: the gradient of the division would overflow


def route(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    n_groups: int = 1,
    top_groups: int = 1,
    score: str = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
    physical: Tensor | None = None,
) -> Routing:
    """Choose the `top_k` experts with the largest s + b in the best groups, and weigh them by s alone.

    s = sigmoid(logits), weight_i = scale * s_i / (sum of the chosen s): report eqs. 12-16 and "node-limited routing".
    With a map of `physical` places, ids are those of places, which are used in turn from token to token (section 3.4).
    """
    E = logits.shape[1]
    s_TE, void_T = affinities(logits, score)
    if bias is not None:
        void_T = void_T | bias.isnan().any()
    experts_TK = choose_experts(s_TE.detach(), bias, void_T, top_k, n_groups, top_groups, score)
    weights_TK = gates(s_TE, void_T, experts_TK, normalize, scale)
    load_E = count(experts_TK.masked_fill(void_T[:, None], E).flatten(), E)
    ids_TK = experts_TK.int() if physical is None else place(experts_TK, physical)
    return Routing(weights_TK, ids_TK, load_E, void_T.sum(dtype=torch.int32))


def route_hidden(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> tuple[Routing, Tensor]:
    """Score each token against each expert's vector (u . e in eq. 15), and `route` by the scores, which are returned
    too."""
    logits = gate(x, weight)
    return route(logits, bias, **options), logits


def gate(x: Tensor, weight: Tensor) -> Tensor:
    """Logits x @ weight.T in fp32: rounded to bf16, different experts would tie, even more so after the sigmoid."""
    if x.dtype != torch.float64:
        x, weight = x.float(), weight.float()
    return x @ weight.T


def place(experts_TK: Tensor, physical: Tensor) -> Tensor:
    """The place where each chosen expert is computed: for token t the place t % n of the expert's n places; -1 if it
    has none.

    Row e of `physical` [E, R] contains the places of expert e, and -1 after the last.
    """
    there_ER = (physical >= 0).long().cumprod(1)
    n_TK = there_ER.sum(1)[experts_TK]
    token_T = torch.arange(len(experts_TK), device=experts_TK.device)
    turn_TK = token_T[:, None] % n_TK.clamp(min=1)
    return physical[experts_TK, turn_TK].masked_fill(n_TK == 0, -1)


def affinities(logits: Tensor, score: str) -> tuple[Tensor, Tensor]:
    """The affinity s of each token to each expert, and which tokens are void: those with a NaN, or without a finite
    logit.

    s = sigmoid(logits), report eq. 15, or softmax(logits), in fp32. An infinite logit counts as +-2^126.
    """
    x_TE = logits if logits.dtype == torch.float64 else logits.float()
    void_T = x_TE.isnan().any(-1) | ~x_TE.isfinite().any(-1)
    x_TE = finite(x_TE.masked_fill(void_T[:, None], 0))
    return (x_TE.sigmoid() if score == "sigmoid" else x_TE.softmax(-1)), void_T


def choose_experts(
    s_TE: Tensor, bias: Tensor | None, void_T: Tensor, top_k: int, n_groups: int, top_groups: int, score: str
) -> Tensor:
    """The ids of the `top_k` largest s + b in the `top_groups` best groups, best first, ties to the smaller id (eq.
    16).

    The score of a group is the sum of its two largest s + b; with softmax, as in DeepSeek-V2, the largest. Void tokens
    get the first ids.
    """
    T, E = s_TE.shape
    choice_TE = s_TE if bias is None else s_TE + bias
    # Finite, so that even an expert with a bias of -inf precedes the experts of groups that were not chosen.
    choice_TGM = finite(choice_TE.masked_fill(void_T[:, None], 0)).view(T, n_groups, E // n_groups)

    best_TGM, _ = descending(choice_TGM)
    score_TG = best_TGM[..., : 2 if score == "sigmoid" else 1].sum(-1)
    _, groups_TG = descending(score_TG)
    kept_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter(1, groups_TG[:, :top_groups], True)

    _, experts_TE = descending(choice_TGM.masked_fill(~kept_TG[..., None], float("-inf")).flatten(1))
    return experts_TE[:, :top_k]


def gates(s_TE: Tensor, void_T: Tensor, experts_TK: Tensor, normalize: bool, scale: float) -> Tensor:
    """Weights of the chosen experts, scale * s_i / (sum of the chosen s): eqs. 13 and 14. The bias has no part in
    them."""
    s_TK = s_TE.gather(1, experts_TK.long())
    return (scale * (normalized(s_TK) if normalize else s_TK)).masked_fill(void_T[:, None], 0)


def update_bias(bias: Tensor, load: Tensor, rate: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """Raise the bias of underloaded experts and lower that of overloaded ones, in place.

    b += rate * sign(mean load - load), the load summed over `group`: report, "auxiliary-loss-free load balancing".
    """
    load = load.to(torch.int64, copy=True)
    if group is not None:
        dist.all_reduce(load, group=group)
    # sum - E * load has the sign of mean - load, and is exact.
    return bias.add_((load.sum() - load.numel() * load).sign(), alpha=rate)


def balance_loss(
    logits: Tensor, *, top_k: int, alpha: float, sequence_lengths: Tensor, score: str = "sigmoid"
) -> Tensor:
    """Loss alpha * sum_i f_i P_i for uneven load inside each packed sequence, averaged over sequences (eqs. 17-20).

    f_i is expert i's count of choices by s, relative to an even load; P_i is its mean share of the affinity.
    """
    T, E = logits.shape
    S = sequence_lengths.shape[0]
    s_TE, void_T = affinities(logits, score)
    sequence_T = sequence_of_token(sequence_lengths, T).masked_fill(void_T, S)
    tokens_S = count(sequence_T, S)[:, None].clamp(min=1)

    _, experts_TE = descending(s_TE.detach())
    chosen_TE = torch.zeros_like(s_TE).scatter(1, experts_TE[:, :top_k], 1)
    f_SE = E / top_k * sum_by_sequence(chosen_TE, sequence_T, S) / tokens_S  # eq. 18
    p_TE = normalized(s_TE)  # eq. 19
    P_SE = sum_by_sequence(p_TE, sequence_T, S) / tokens_S  # eq. 20
    loss_S = alpha * (f_SE * P_SE).sum(-1)  # eq. 17
    return loss_S.sum() / (count(sequence_T, S) > 0).sum().clamp(min=1)


def load_statistics(load: Tensor) -> LoadStatistics:
    """How far each expert's load, and all loads together, are from the mean (MaxVio: arXiv 2408.15664, section 4.1)."""
    load = load.float()
    mean = load.mean(-1, keepdim=True)
    share = torch.where(mean > 0, load / mean, 1.0)
    return LoadStatistics(share, share.amax(-1) - 1, share.std(-1, correction=0), (share == 0).float().mean(-1))


def sequence_of_token(sequence_lengths: Tensor, n_tokens: int) -> Tensor:
    """Which packed sequence each token belongs to; S for the tokens after the last one."""
    ends_S = sequence_lengths.clamp(min=0).cumsum(0)
    return torch.searchsorted(ends_S, torch.arange(n_tokens, device=ends_S.device), right=True)


def sum_by_sequence(x_TE: Tensor, sequence_T: Tensor, n_sequences: int) -> Tensor:
    """Sum of the rows that belong to each sequence, [S, E]."""
    return x_TE.new_zeros(n_sequences + 1, x_TE.shape[1]).index_add(0, sequence_T, x_TE)[:n_sequences]


def normalized(s: Tensor) -> Tensor:
    """Rows divided by their sum, or zeros if that is below 1e-30."""
    total = s.sum(-1, keepdim=True)
    return s / total.masked_fill(total < LEAST_SUM, float("inf"))


def finite(x: Tensor) -> Tensor:
    """Infinities replaced by +-2^126, through which no gradient flows, so that sums of two and differences stay
    finite."""
    return x.clamp(-LARGEST, LARGEST)


def descending(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted in descending order, and where each value was; equal values keep their order (with torch.topk they
    may not)."""
    return torch.sort(x, dim=-1, descending=True, stable=True)


def count(ids: Tensor, n: int) -> Tensor:
    """How often each of 0 to n - 1 occurs in `ids`, int32 [n]; an id of n is not counted."""
    one = torch.ones_like(ids, dtype=torch.int32)
    return torch.zeros(n + 1, dtype=torch.int32, device=ids.device).index_add(0, ids, one)[:n]
