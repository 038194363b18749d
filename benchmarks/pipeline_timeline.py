"""When each rank of a pipeline does what, from the order that the engine runs, and a picture of it.

``python -m benchmarks.pipeline_timeline`` writes ``docs/images/pipeline.svg``. Costs are in units of a stage's forward:
the gradient of its input and those of its weights cost as much each. ``--measured FILE`` draws instead the step that
``benchmarks.bench_parallel`` has recorded there on GPUs, into ``docs/images/pipeline_measured.svg``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.pipelining.schedules import _ComputationType as Kind

from dskernels.model.parallel.pipeline import SCHEDULES

COSTS = {"F": 1.0, "I": 1.0, "W": 1.0}


class Slot(NamedTuple):
    """What a rank does for some time.

    Attributes:
        rank: of the pipeline.
        kind: "F", "I" (gradient of the input), "W" (of the weights), or "B" (both at once).
        stage: of which.
        microbatch: of which.
        start: in the unit of the costs.
        end: likewise.
    """

    rank: int
    kind: str
    stage: int
    microbatch: int
    start: float
    end: float


def order(schedule: str, ranks: int, microbatches: int) -> dict[int, list[tuple[str, int, int]]]:
    """Of each rank, kind, stage and micro-batch of what it computes, in the order in which the engine does."""
    engine: Any = SCHEDULES[schedule]
    made: Any = object.__new__(engine)  # its order needs no process group, only these numbers
    made.pp_group_size, made._num_stages, made.num_stages = ranks, 2 * ranks, 2 * ranks
    made.n_local_stages, made._n_microbatches = 2, microbatches
    names = {Kind.FORWARD: "F", Kind.BACKWARD_INPUT: "I", Kind.BACKWARD_WEIGHT: "W", Kind.FULL_BACKWARD: "B"}
    found: dict[int, list[tuple[str, int, int]]] = {}
    for rank in range(ranks):
        made.rank = rank
        found[rank] = []
        for action in made._calculate_single_rank_operations(rank):
            for part in () if action is None else action.sub_actions or (action,):
                found[rank].append((names[part.computation_type], part.stage_index, part.microbatch_index))
    return found


def simulate(actions: Mapping[int, Sequence[tuple[str, int, int]]], costs: Mapping[str, float] = COSTS) -> list[Slot]:
    """When each is done, if every rank does its own in order and waits for what it needs."""
    ranks, last = len(actions), 2 * len(actions) - 1
    cost = {**costs, "B": costs["I"] + costs["W"]}
    done: dict[tuple[str, int, int], float] = {}
    clock, at = [0.0] * ranks, [0] * ranks
    slots: list[Slot] = []
    while any(at[r] < len(actions[r]) for r in range(ranks)):
        moved = False
        for rank in range(ranks):
            while at[rank] < len(actions[rank]):
                kind, stage, microbatch = actions[rank][at[rank]]
                before = {
                    "F": [("F", stage - 1, microbatch)] if stage else [],
                    "W": [("I", stage, microbatch)],
                }.get(kind, [("F", stage, microbatch), *([("I", stage + 1, microbatch)] if stage < last else [])])
                if any(key not in done for key in before):
                    break
                start = max([clock[rank], *(done[key] for key in before)])
                end = start + cost[kind]
                slots.append(Slot(rank, kind, stage, microbatch, start, end))
                clock[rank] = end
                done["I" if kind == "B" else kind, stage, microbatch] = end  # the engine sends after both halves of a B
                at[rank] += 1
                moved = True
        if not moved:
            raise RuntimeError("the order waits for itself")
    return slots


def bubble(slots: Sequence[Slot]) -> float:
    """Time that the ranks wait, on average."""
    ranks = 1 + max(slot.rank for slot in slots)
    return max(slot.end for slot in slots) - sum(slot.end - slot.start for slot in slots) / ranks


def formula(ranks: int, costs: Mapping[str, float] = COSTS) -> float:
    """DualPipeV's bubble as published, with F&B one after the other: (P - 1)(F&B + B - 3W), for P ranks."""
    forward, weight, backward = costs["F"], costs["W"], costs["I"] + costs["W"]
    return (ranks - 1) * (forward + backward + backward - 3 * weight)


def draw(schedule: str, ranks: int, microbatches: int, costs: Mapping[str, float] = COSTS) -> str:
    """An SVG, a row a rank; legible on light and on dark pages."""
    slots = simulate(order(schedule, ranks, microbatches), costs)
    end, waits = max(slot.end for slot in slots), bubble(slots)
    title = (
        f"{schedule}: {ranks} ranks, {2 * ranks} stages in a V, {microbatches} micro-batches; "
        f"waiting {waits:.3g} of {end:.4g} ({waits / end:.0%})"
    )
    return picture(slots, costs["I"] / (costs["I"] + costs["W"]), title)


def draw_measured(found: Mapping[str, Any]) -> str:
    """The same of a step that was recorded, ``pipeline`` of what ``bench_parallel`` writes."""
    slots = [Slot(*slot) for slot in found["slots"]]
    title = (
        f"dualpipev as it ran: {found['stages'] // 2} GPUs, {found['stages']} stages, {found['microbatches']} "
        f"micro-batches of {found['tokens']:,} tokens; waiting {found['bubble_ms']:.1f} of {found['total_ms']:.0f} ms "
        f"({found['bubble_ms'] / found['total_ms']:.0%})"
    )
    return picture(slots, found["I_ms"] / (found["I_ms"] + found["W_ms"]), title)


def picture(slots: Sequence[Slot], input_share: float, title: str) -> str:
    """An SVG of slots; of a whole backward, `input_share` is drawn as the gradient of the input."""
    ranks = 1 + max(slot.rank for slot in slots)
    end, height, left = max(slot.end for slot in slots), 26, 64
    unit = 900 / end
    colors = {"F": ("#3a78c2", "#6f9fd8"), "I": ("#23804d", "#4fa878"), "W": ("#d9a441", "#e6c078")}
    parts = []
    for slot in slots:
        y = 34 + slot.rank * (height + 6)
        pieces = [(slot.kind, slot.start, slot.end)]
        if slot.kind == "B":
            middle = slot.start + (slot.end - slot.start) * input_share
            pieces = [("I", slot.start, middle), ("W", middle, slot.end)]
        for kind, start, stop in pieces:
            color = colors[kind][slot.stage >= ranks]
            width = (stop - start) * unit
            box = f'x="{left + start * unit:.1f}" y="{y}" width="{max(width - 0.6, 0.2):.1f}" height="{height}"'
            parts.append(f'<rect {box} fill="{color}"/>')
            if kind != "W" and width > 11:
                parts.append(f'<text x="{left + start * unit + width / 2:.1f}" y="{y + 17}">{slot.microbatch}</text>')
    for rank in range(ranks):
        y = 34 + rank * (height + 6)
        parts.append(f'<text class="name" x="{left - 8}" y="{y + 17}">rank {rank}</text>')
    bottom = 34 + ranks * (height + 6) + 22
    legend = [("F", 0, "forward"), ("F", 1, "forward, second half of the layers"), ("I", 0, "gradient of the input")]
    legend += [("W", 0, "gradients of the weights")]
    x: float = left
    for kind, half, text in legend:
        parts.append(f'<rect x="{x}" y="{bottom - 11}" width="12" height="12" fill="{colors[kind][half]}"/>')
        parts.append(f'<text class="legend" x="{x + 18}" y="{bottom}">{text}</text>')
        x += 36 + 6.6 * len(text)
    style = (
        "text{font:11px sans-serif;text-anchor:middle;fill:#fff}.name{text-anchor:end}.legend,.title{text-anchor:start}"
        ".name,.legend,.title{fill:#555}@media(prefers-color-scheme:dark){.name,.legend,.title{fill:#bbb}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + 910} {bottom + 12}"><style>{style}</style>'
        f'<text class="title" x="{left}" y="20">{title}</text>' + "".join(parts) + "</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", default="dualpipev", choices=sorted(SCHEDULES))
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=10)
    parser.add_argument("--measured", type=Path, help="what bench_parallel has written")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.measured:
        results = json.loads(arguments.measured.read_text(encoding="utf-8"))
        text = draw_measured(results.get("found", results)["pipeline"])  # as saved, or as --out writes it
    else:
        text = draw(arguments.schedule, arguments.ranks, arguments.microbatches)
    out = arguments.out or Path(f"docs/images/pipeline{'_measured' if arguments.measured else ''}.svg")
    out.write_text(text, encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
