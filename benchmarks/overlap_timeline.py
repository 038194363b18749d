"""How two micro-batches of an expert-parallel model take turns, from the order that the code runs, and a picture of it.

``python -m benchmarks.overlap_timeline`` runs a small model on the CPU and records what it does: the operations of each
micro-batch, where each message begins, and where the compute stream waits for it. It then walks this order with the
costs below, on one compute stream and one copy engine, and writes ``docs/images/overlap.svg``. The costs are chosen so
that the picture can be read; between two H200 messages are shorter. The other GPU does the same at the same time.
"""

from __future__ import annotations

import argparse
import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dskernels.model import Config, DeepseekV3
from dskernels.model.parallel.copies import ENDS, FILLED
from dskernels.model.parallel.expert import ExpertParallel
from dskernels.model.parallel.fixed import FixedTrip
from dskernels.model.parallel.mail import Fill, Mail
from dskernels.model.parallel.overlap import overlapped
from dskernels.model.parallel.plan import expert_modules
from dskernels.types import Routing

TOKENS, LAYERS, RANKS = 40, 2, 2
# The operation that stands for each part of a layer. The others around it take no time in the picture.
PARTS = {"mla_prefill": "attention", "feed_forward": "shared", "expert_rows": "experts", "sum_rows": "sum"}
COSTS = {"attention": 3.2, "shared": 2.4, "experts": 4.0, "sum": 0.6, "dispatch": 2.8, "combine": 2.8}


class Event(NamedTuple):
    """One entry of a stream.

    Attributes:
        kind: "run": the compute stream runs a part of a layer; "leave": the copy engine sends a piece of a message;
            "wait": the compute stream waits until that piece has arrived.
        microbatch: the micro-batch that it belongs to, counted from 0.
        name: "attention", "shared", "experts" or "sum" of a layer, or "dispatch" or "combine" of a message.
        share: which share of that part or message this is; 1 is all of it.
        message: the number of the message, and of its piece.
    """

    kind: str
    microbatch: int
    name: str
    share: float = 1.0
    message: tuple[int, int] = (-1, -1)


class Slot(NamedTuple):
    """When an event runs.

    Attributes:
        event: the event.
        start: when it begins, in the unit of the costs.
        end: when it ends.
        read: when the compute stream goes on with what a message has brought.
    """

    event: Event
    start: float
    end: float
    read: float


# ---- what the code does ---------------------------------------------------------------------------------------------


class Notes(Mail):
    """Records messages, which are never sent, and the operations around them."""

    def __init__(self) -> None:
        self.rank, self.ranks = 0, RANKS
        self.events: list[Event] = []
        self.microbatch, self.messages = 0, 0
        self.name = ""

    @contextlib.contextmanager
    def of(self, microbatch: int) -> Iterator[None]:
        """Everything that runs inside belongs to this micro-batch, and so does its backward."""

        def pack(saved: Tensor) -> Tensor:
            return saved

        def unpack(saved: Tensor) -> Tensor:  # a node's backward first unpacks what it saved
            self.microbatch = microbatch
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack), _Operations(self, microbatch):
            yield

    def ran(self, operation: str, rows: int) -> None:
        """Records an operation of the library, if it stands for a part of a layer."""
        part = PARTS.get(operation.removesuffix("_backward"))
        if part is not None:
            share = rows / TOKENS if part == "sum" else 1.0
            self.events.append(Event("run", self.microbatch, part, min(share, 1.0)))

    def send(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        *,
        together: bool = False,
        fill: Fill | None = None,
        **layout: Any,
    ) -> Any:
        """Records the pieces that `CopyEngines` would cut a large message into, however it lies in memory."""
        own, number = list(outgoing[self.rank]), self.messages
        ends = FILLED if fill is not None else ENDS[1 if together else len(ENDS)]
        self.messages += 1
        for i, (begin, end) in enumerate(zip((0.0, *ends), ends, strict=False)):
            if fill is not None:
                fill(1 - self.rank, slice(int(begin * TOKENS), int(end * TOKENS)))
            self.events.append(Event("leave", self.microbatch, self.name, end - begin, (number, i)))
        return number, ends, own, self.microbatch, self.name

    def arriving(self, sent: Any) -> Iterator[slice]:
        """See `Mail`."""
        number, ends, _, microbatch, name = sent
        for i, (begin, end) in enumerate(zip((0.0, *ends), ends, strict=False)):
            self.events.append(Event("wait", microbatch, name, end - begin, (number, i)))
            yield slice(int(begin * TOKENS), int(end * TOKENS))

    def from_rank(self, sent: Any, rank: int) -> list[Tensor]:
        """See `Mail`; the other rank is assumed to send what this one sends to itself."""
        return cast(list[Tensor], sent[2])

    def of_all(self, sent: Any) -> Tensor:
        """See `Mail`."""
        return torch.stack([sent[2][0]] * self.ranks)

    def finished(self, sent: Any) -> None:
        """See `Mail`."""


class _Operations(TorchDispatchMode):
    """Reports each operation of the library; in a forward, for the micro-batch that runs in this thread."""

    def __init__(self, notes: Notes, microbatch: int | None = None) -> None:
        super().__init__()
        self.notes, self.microbatch = notes, microbatch

    def __torch_dispatch__(self, func: Any, classes: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dskernels":
            if self.microbatch is not None:
                self.notes.microbatch = self.microbatch
            name = func.__name__.partition(".")[0]
            tensors = [x for x in args if isinstance(x, Tensor)]
            self.notes.ran(name, tensors[-1].shape[0])  # the last argument of `sum_rows` is its output
        return func(*args, **(kwargs or {}))


class _NotedTrip(FixedTrip):
    """Knows the micro-batch that its messages belong to, in the backward too."""

    def __init__(self, notes: Notes, *how: Any) -> None:
        super().__init__(notes, *how)
        self.notes, self.microbatch = notes, notes.microbatch

    def send(self, *how: Any, **options: Any) -> None:
        """See `FixedTrip`."""
        self._now("dispatch")
        super().send(*how, **options)

    def send_back(self, *how: Any, **options: Any) -> None:
        """See `FixedTrip`."""
        self._now("combine")
        super().send_back(*how, **options)

    def arrived(self, *how: Any, **options: Any) -> list[Tensor]:
        """See `FixedTrip`."""
        self._now("dispatch")
        return super().arrived(*how, **options)

    def returned(self, *how: Any, **options: Any) -> list[Tensor]:
        """See `FixedTrip`."""
        self._now("combine")
        return super().returned(*how, **options)

    def _now(self, name: str) -> None:
        self.notes.microbatch, self.notes.name = self.microbatch, name


class _Noted(ExpertParallel):
    def _trip(self, x: Tensor, routing: Routing) -> FixedTrip:
        return _NotedTrip(cast(Notes, self.mail), x.shape[0], TOKENS, x.device)


def order(microbatches: int = 2, *, at_once: bool) -> tuple[list[Event], list[Event]]:
    """What a rank does in the forward and in the backward, with the micro-batches at once or one after the other."""
    torch.manual_seed(0)
    config = Config.from_name("tiny", num_hidden_layers=LAYERS, first_k_dense_replace=0, num_nextn_predict_layers=0)
    model, notes = DeepseekV3(config), Notes()
    group: Any = types.SimpleNamespace(size=lambda: RANKS, rank=lambda: 0)  # nothing else of it is used
    for experts, _ in expert_modules(model):
        for name in ("w13", "w2"):
            setattr(experts, name, nn.Parameter(getattr(experts, name).detach()[: config.n_routed_experts // RANKS]))
        experts.compute = _Noted(group, config.n_routed_experts, mail=notes, tokens=TOKENS)

    def loss(microbatch: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with notes.of(microbatch):
                return model(torch.arange(TOKENS)).logits.square().mean()

        return run

    functions = [loss(i) for i in range(microbatches)]
    losses = overlapped(model, functions) if at_once else [function() for function in functions]
    forward, notes.events = notes.events, []
    with _Operations(notes):
        torch.stack(losses).sum().backward()
    return forward, notes.events


# ---- when that is ---------------------------------------------------------------------------------------------------


def simulate(events: Sequence[Event]) -> list[Slot]:
    """When each event runs. Both ranks do the same, so a piece has arrived when this rank has sent its own."""
    compute = engine = 0.0
    sent: dict[tuple[int, int], int] = {}
    slots: list[Slot] = []
    for event in events:
        cost = COSTS[event.name] * event.share
        if event.kind == "run":
            slots.append(Slot(event, compute, compute + cost, compute + cost))
            compute += cost
        elif event.kind == "leave":
            start = max(compute, engine)
            engine = start + cost
            sent[event.message] = len(slots)
            slots.append(Slot(event, start, engine, engine))
        else:
            slot = slots[sent[event.message]]
            compute = max(compute, slot.end)
            slots[sent[event.message]] = slot._replace(read=compute)
    return slots


def waiting(slots: Sequence[Slot]) -> float:
    """How long the compute stream is idle."""
    ran = [slot for slot in slots if slot.event.kind == "run"]
    return max(slot.end for slot in ran) - sum(slot.end - slot.start for slot in ran)


# ---- the picture ----------------------------------------------------------------------------------------------------

LEFT, WIDTH, HEIGHT, GAP = 104, 860, 24, 22
COLORS = (("#3a78c2", "#8db4e2"), ("#23804d", "#8cc7a4"))  # each micro-batch's computation and its messages
DASHED = 'fill="none" stroke="#999" stroke-dasharray="3 2"'


def draw() -> str:
    """An SVG: two micro-batches one after the other, at once, and their backward; for light and dark pages."""
    apart, _ = order(at_once=False)
    forward, backward = order(at_once=True)
    panels = [
        ("One micro-batch after the other, forward", simulate(apart)),
        ("Two micro-batches at once, forward", simulate(forward)),
        ("Two micro-batches at once, backward", simulate(backward)),
    ]
    unit = WIDTH / max(slot.end for _, slots in panels for slot in slots)
    parts, y = [], 18
    for title, slots in panels:
        parts.append(f'<text class="title" x="{LEFT}" y="{y}">{title}</text>')
        parts += _panel(slots, unit, y + 10)
        y += 10 + 2 * HEIGHT + GAP + 36
    parts += _legend(y - 8)
    style = (
        "text{font:11px sans-serif;fill:#555}.run,.leave{font-size:10px;text-anchor:middle}.name{text-anchor:end}"
        ".title{font-weight:600}@media(prefers-color-scheme:dark){text{fill:#bbb}}.run{fill:#fff}.leave{fill:#12261c}"
    )
    size = f"0 0 {LEFT + WIDTH + 8} {y + 4}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}"><style>{style}</style>{"".join(parts)}</svg>\n'


def _panel(slots: Sequence[Slot], unit: float, top: int) -> list[str]:
    """A row for the compute stream, a row for the copy engine, and a line from each message to where it is read."""
    below, parts = top + HEIGHT + GAP, []
    for name, y in (("compute stream", top), ("copy engine", below)):
        parts.append(f'<text class="name" x="{LEFT - 10}" y="{y + 16}">{name}</text>')
    ran = _joined([slot for slot in slots if slot.event.kind == "run"])
    for before, after in zip([0.0, *(slot.end for slot in ran)], ran, strict=False):
        if after.start > before + 0.05:
            parts.append(_box(before, after.start, top, unit, DASHED))
    for slot in ran:
        parts.append(_box(slot.start, slot.end, top, unit, f'fill="{COLORS[slot.event.microbatch][0]}"'))
        parts += _label(slot, {"sum": "Σ"}.get(slot.event.name, slot.event.name), top, unit)
    for pieces in _messages(slots):
        first, last = pieces[0], pieces[-1]
        color = COLORS[first.event.microbatch][1]
        for slot in _joined(pieces):
            parts.append(_box(slot.start, slot.end, below, unit, f'fill="{color}"'))
        for slot in pieces[:-1]:  # notches between the pieces
            at = LEFT + slot.end * unit
            parts.append(f'<path d="M{at:.1f} {below + HEIGHT}v-6" stroke="#12261c" stroke-opacity="0.7"/>')
        parts += _label(first._replace(end=last.end), first.event.name, below, unit)
        start, end = (LEFT + time * unit for time in (first.end, first.read))  # the reader begins with the first piece
        line = f"M{start:.1f} {below}L{end:.1f} {top + HEIGHT}"
        parts.append(f'<path d="{line}" stroke="{color}" stroke-width="1.5"/>')
    return parts


def _joined(slots: Sequence[Slot]) -> list[Slot]:
    """The same with neighbours made one: the pieces of a message, or the sums of rows that arrived in pieces."""
    found: list[Slot] = []
    for slot in slots:
        if found and found[-1].event[:3] == slot.event[:3] and slot.start - found[-1].end < 1e-6:
            found[-1] = found[-1]._replace(end=slot.end)
        else:
            found.append(slot)
    return found


def _messages(slots: Sequence[Slot]) -> list[list[Slot]]:
    """The pieces of each message."""
    found: dict[int, list[Slot]] = {}
    for slot in slots:
        if slot.event.kind == "leave":
            found.setdefault(slot.event.message[0], []).append(slot)
    return list(found.values())


def _legend(y: int) -> list[str]:
    parts, x = [], LEFT
    for i, colors in enumerate(COLORS):
        for color in colors:
            parts.append(f'<rect x="{x}" y="{y - 11}" width="12" height="12" rx="2" fill="{color}"/>')
            x += 15
        parts.append(f'<text x="{x + 3}" y="{y}">micro-batch {i + 1}, and its messages</text>')
        x += 190
    parts.append(f'<rect x="{x}" y="{y - 11}" width="20" height="12" rx="2" {DASHED}/>')
    parts.append(f'<text x="{x + 26}" y="{y}">the stream waits</text>')
    parts.append(f'<text x="{x + 140}" y="{y}">Σ: rows of each token are added up</text>')
    return parts


def _box(start: float, end: float, y: int, unit: float, how: str) -> str:
    width = max((end - start) * unit - 1, 0.5)
    return f'<rect x="{LEFT + start * unit:.1f}" y="{y}" width="{width:.1f}" height="{HEIGHT}" rx="2" {how}/>'


def _label(slot: Slot, text: str, y: int, unit: float) -> list[str]:
    """The text in the middle of the box, if it fits."""
    if (slot.end - slot.start) * unit < 4.8 * len(text) + 3:
        return []
    middle = LEFT + (slot.start + slot.end) / 2 * unit
    return [f'<text class="{slot.event.kind}" x="{middle:.1f}" y="{y + 16}">{text}</text>']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images/overlap.svg"))
    out = parser.parse_args().out
    out.write_text(draw(), encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
