"""Routing and the balance loss, token by token, in Python's own arithmetic: an oracle without dskernels code."""

import math
from itertools import pairwise


def affinity(row, score):
    """The scores of one token, or None for a row with a NaN or with nothing finite."""
    if any(math.isnan(x) for x in row) or not any(math.isfinite(x) for x in row):
        return None
    if score == "sigmoid":
        return [1 / (1 + math.exp(-x)) if x > -700 else 0.0 for x in row]
    top = max(row)
    mass = [float(x == top) if math.isinf(top) else math.exp(x - top) for x in row]
    return [m / sum(mass) for m in mass]


def best(values, allowed, n):
    """Indices of the `n` largest values among `allowed`, best first, ties to the smaller index."""
    return sorted(allowed, key=lambda i: (-values[i], i))[:n]


def route(logits, bias, top_k, n_groups=1, top_groups=1, score="sigmoid", normalize=True, scale=1.0):
    """(weights, experts, load, nonfinite, gaps) as lists.

    gaps[t] is how far the token is from another answer: the least difference between one that was taken, group or
    expert, and the next in the order.
    """
    weights, experts, gaps, load, nonfinite = [], [], [], [0] * len(logits[0]) if logits else [], 0
    for row in logits:
        n = len(row)
        s = affinity(row, score)
        if s is None:
            weights.append([0.0] * top_k)
            experts.append(list(range(top_k)))
            gaps.append(math.inf)
            nonfinite += 1
            continue
        choice = [a + b for a, b in zip(s, bias or [0.0] * n, strict=True)]
        width = n // n_groups
        members = [range(g * width, (g + 1) * width) for g in range(n_groups)]
        n_best = 2 if score == "sigmoid" else 1
        group_score = [sum(sorted((choice[i] for i in m), reverse=True)[:n_best]) for m in members]
        order = best(group_score, range(n_groups), n_groups)
        gap = group_score[order[top_groups - 1]] - group_score[order[top_groups]] if top_groups < n_groups else math.inf
        ranked = best(choice, [i for g in order[:top_groups] for i in members[g]], n)
        chosen = ranked[:top_k]
        gap = min([gap, *(choice[i] - choice[j] for i, j in pairwise(ranked[: top_k + 1]))])
        total = sum(s[i] for i in chosen) if normalize else 1.0
        weights.append([scale * s[i] / total if total >= 1e-30 else 0.0 for i in chosen])
        experts.append(chosen)
        gaps.append(gap)
        for i in chosen:
            load[i] += 1
    return weights, experts, load, nonfinite, gaps


def balance_loss(logits, top_k, alpha, sequence_lengths, score="sigmoid"):
    """Equations 17 to 20 of the report, as they are printed, averaged over the sequences that hold a token."""
    losses, start = [], 0
    for length in sequence_lengths:
        stop = start + max(length, 0)
        tokens = [s for row in logits[start:stop] if (s := affinity(row, score)) is not None]
        start = stop
        if not tokens:
            continue
        n, T = len(tokens[0]), len(tokens)
        loss = 0.0
        for i in range(n):
            f = n / (top_k * T) * sum(i in best(s, range(n), top_k) for s in tokens)
            P = sum(s[i] / sum(s) for s in tokens) / T
            loss += f * P
        losses.append(alpha * loss)
    return sum(losses) / len(losses) if losses else 0.0
