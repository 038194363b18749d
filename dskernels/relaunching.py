"""Launches that were noted once, ready to be launched again, see dskernels.recording."""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dskernels.cuda.driver import Plan
from dskernels.cuda.graph import LaunchGraph, reason_against_graphs
from dskernels.device import like_this
from dskernels.validate import ceil_div

# From so many launches on they are a graph; a number that no call has turns graphs off. On an H200 the 7 of the expert
# block take the host 15 us so and 41 one by one (17.5 and 42 where results are kept); a single one takes the device 2.5
# us either way, but a programmatic one, which loses what it overlaps with, 3.0 and 2.0.
FEWEST_IN_GRAPH = 2
# Of the process. One of 7 launches has 0.1 MB of the GPU; one that goes is made anew at its next launch, in half a
# millisecond.
MOST_GRAPHS = 512
ALIGNMENT = 512  # of what lies in the memory of a call, as of torch's allocator

Kept = Callable[[Tensor], Sequence[Tensor]]


class Product(NamedTuple):
    """A product that is torch's, ``function(left, right, out=out)``: made again as it was, between the launches.

    Attributes:
        function: `torch.mm` or `torch.bmm`.
        operands: of `left`, `right` and `out`, shape and strides.
        dtype: of all three.
    """

    function: Callable
    operands: tuple[tuple[Sequence[int], Sequence[int]], ...]
    dtype: torch.dtype


OPERANDS = "left", "right", "out"


class Place(NamedTuple):
    """Where an address came from: the number of a piece of memory, and bytes from its start."""

    piece: int
    offset: int


@dataclass(frozen=True)
class Noted:
    """What a call did.

    Pieces of memory are numbered: its tensors first, then what is kept of these, then what it made.

    Attributes:
        device: ordinal of the GPU.
        stream: the launches' stream.
        launches: plans that nobody else has, and products, and where each name's address came from.
        pieces: address and bytes of each.
        n_tensors: how many of them are tensors of the call.
        kept: of some tensors, by number, what is kept of it, asked for at each launch: so many pieces more.
        results: new tensors, and the piece that each is; None if it has no elements.
        returned: what the call returns, given the new tensors and its own.
        written: tensors that it wrote to, by number.
    """

    device: int
    stream: int
    launches: list[tuple[Plan | Product, dict[str, Place]]]
    pieces: list[tuple[int, int]]
    n_tensors: int
    kept: list[tuple[int, Kept]]
    results: list[tuple[Tensor, int | None]]
    returned: Callable[[Sequence[Tensor], Sequence[Tensor]], Any]
    written: list[int]


class Recording:
    """Launches of our own, whose addresses are those of arguments, of new results, and of the call's own memory."""

    def __init__(self, noted: Noted) -> None:
        self.written, self._kept = noted.written, noted.kept
        self._plans = [plan for plan, _ in noted.launches if isinstance(plan, Plan)]
        self._device = noted.device
        self._raw_stream = ctypes.c_void_p(noted.stream)
        for plan in self._plans:
            plan.stream = noted.stream
        self._graph: LaunchGraph | None = None
        self._recent = False
        products = [product for product, _ in noted.launches if isinstance(product, Product)]
        graph = len(self._plans) >= FEWEST_IN_GRAPH and all(plan.in_graph for plan in self._plans) and not products
        self._alone = not graph or reason_against_graphs() is not None
        self._related = _related(noted.pieces[: noted.n_tensors])
        self._make = [like_this(x) for x, _ in noted.results]
        self._returned = noted.returned

        # What is at each launch: tensors and what is kept of them, the memory of this call if it wants some, results.
        own = {piece for _, piece in noted.results if piece is not None}
        n_given = noted.n_tensors + sum(2 for _ in noted.kept)
        used: dict[int, list[int]] = {}  # of each piece, its first and its last launch
        for n, (_, places) in enumerate(noted.launches):
            for place in places.values():
                used.setdefault(place.piece, [n, n])[1] = n
        inside = [i for i in used if i >= n_given and i not in own]
        offsets, size = packed([(noted.pieces[i][1], used[i][0], used[i][1]) for i in inside])
        starts = dict(zip(inside, offsets, strict=True))
        # Of the dtype of products, so that their operands there are parts of it.
        dtype = products[0].dtype if products else torch.uint8
        memory = torch.empty(ceil_div(size, dtype.itemsize), dtype=dtype, device="meta")
        self._make_own = like_this(memory) if size else None
        number = {i: i for i in range(n_given)}
        if size:
            number |= dict.fromkeys(inside, n_given)
        first = n_given + bool(size)
        number |= {piece: first + i for i, (_, piece) in enumerate(noted.results) if piece is not None}
        self._now = [0] * (first + len(noted.results))
        # Of each, where its address is assigned and how far behind it, and the launches that read it.
        self._moved: list[list[tuple[Any, int, int]]] = [[] for _ in self._now]
        readers: list[set[int]] = [set() for _ in self._now]
        self._in_order: list[Callable[[Sequence[Tensor]], None]] = []  # plans and products, if there are any products
        n = 0
        for launch, places in noted.launches:
            if isinstance(launch, Product):
                begins = [(number[i], starts.get(i, 0) + offset) for i, offset in (places[name] for name in OPERANDS)]
                self._in_order.append(_multiply_again(launch, begins))
                continue
            for name, words, word in launch.addresses:
                if name in places:
                    piece, offset = places[name]
                    self._moved[number[piece]].append((words, word, starts.get(piece, 0) + offset))
                    readers[number[piece]].add(n)
            if products:
                self._in_order.append(_enqueue_again(launch))
            n += 1
        self._readers = [tuple(launches) for launches in readers]
        self._stale: set[int] = set()  # launches that the graph has with other addresses

    def fits(self, addresses: Sequence[int]) -> bool:
        """Whether arguments that were one behind the other, or the same, are so again."""
        for i, j, distance in self._related:  # noqa: SIM110 - a third of what `all` takes where there are none
            if addresses[j] - addresses[i] != distance:
                return False
        return True

    def launch(self, addresses: Sequence[int], tensors: Sequence[Tensor]) -> Any:
        """Allocate, write the addresses that changed, launch on the current stream; what the call returns."""
        results = [make() for make in self._make]
        now = [*addresses]
        kept: list[Tensor] = []
        if self._kept:
            kept = [x for i, again in self._kept for x in again(tensors[i])]  # which lives until all is enqueued
            now += [x.data_ptr() for x in kept]
        if self._make_own is not None:
            own = self._make_own()  # freed at the end, like every intermediate result: the stream keeps the order
            now.append(own.data_ptr())
        now += [x.data_ptr() for x in results]
        before = self._now
        if now != before:
            stale = self._stale
            for i, address in enumerate(now):
                if address != before[i]:
                    for words, word, offset in self._moved[i]:
                        words[word] = address + offset
                    stale.update(self._readers[i])
            self._now = now
        if self._in_order:
            given = [*tensors, *kept, *([] if self._make_own is None else [own]), *results]
            self._launch_in_order(given)
        elif torch._C._cuda_isCurrentStreamCapturing():
            self._launch_captured()
        elif self._alone:
            for plan in self._plans:
                if status := plan.enqueue():
                    plan.again(status)
        else:
            self._launch_graph()
        return self._returned(results, tensors)

    def _launch_graph(self) -> None:
        graph, stale, self._recent = self._graph, self._stale, True
        if graph is None:
            graph = self._graph = LaunchGraph(self._plans, self._device)
            _have_graphs.append(weakref.ref(self))
            _let_one_go()
        else:
            for i in stale:
                graph.update(i)
        stale.clear()
        graph.launch(self._raw_stream)

    def _launch_captured(self) -> None:
        """One by one, with words that are asked for; those of the stream are put back."""
        before = self._ask_all()
        for plan in self._plans:
            if status := plan.enqueue():
                plan.again(status)
        for memory, i, word in before:
            memory[i] = word

    def _launch_in_order(self, given: Sequence[Tensor]) -> None:
        """The same with products in between, which read and write parts of what is given."""
        before = self._ask_all() if torch._C._cuda_isCurrentStreamCapturing() else ()
        for launch in self._in_order:
            launch(given)
        for memory, i, word in before:
            memory[i] = word

    def _ask_all(self) -> list[tuple[Any, int, int]]:
        """Write the words that are asked for; what stood there before."""
        before = [(plan.memory, i, plan.memory[i]) for plan in self._plans for i, _ in plan.asked]
        for plan in self._plans:
            plan.ask()
        return before


def _enqueue_again(plan: Plan) -> Callable[[Sequence[Tensor]], None]:
    """What launches a plan as it is."""

    def launch(given: Sequence[Tensor]) -> None:
        if status := plan.enqueue():
            plan.again(status)

    return launch


def _multiply_again(product: Product, begins: Sequence[tuple[int, int]]) -> Callable[[Sequence[Tensor]], None]:
    """What makes a product again; each operand begins so many bytes behind one of the given tensors, by its number."""
    part = torch._C._dynamo.guards._reinterpret_tensor  # type: ignore[attr-defined]
    places = [
        (number, shape, strides, offset // product.dtype.itemsize)
        for (number, offset), (shape, strides) in zip(begins, product.operands, strict=True)
    ]
    (i, *left), (j, *right), (k, *out) = places
    function = product.function

    def multiply(given: Sequence[Tensor]) -> None:
        function(part(given[i], *left), part(given[j], *right), out=part(given[k], *out))

    return multiply


_have_graphs: deque[weakref.ref[Recording]] = deque()


def _let_one_go() -> None:
    """Of too many graphs, the first that was not launched since it was last looked at."""
    while len(_have_graphs) > MOST_GRAPHS:
        reference = _have_graphs.popleft()
        recording = reference()
        if recording is not None and recording._recent:
            recording._recent = False
            _have_graphs.append(reference)
        elif recording is not None:
            recording._graph = None  # another thread that launches it just now holds it until then


def _related(given: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Arguments that overlap or follow each other in memory, which decisions may have gone by, and how far apart."""
    pairs = [(i, j) for i in range(len(given)) for j in range(i + 1, len(given)) if given[i][1] and given[j][1]]

    def touch(i: int, j: int) -> bool:
        (a, size_a), (b, size_b) = given[i], given[j]
        return a <= b + size_b and b <= a + size_a

    return [(i, j, given[j][0] - given[i][0]) for i, j in pairs if touch(i, j)]


def packed(pieces: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Offsets for (bytes, first launch, last launch) in one piece of memory, and its size.

    Two share bytes only where one is done with before the other begins. The largest go first, each as low as it fits.
    """
    offsets = [0] * len(pieces)
    placed: list[int] = []
    for i in sorted(range(len(pieces)), key=lambda i: -pieces[i][0]):
        size, first, last = pieces[i]
        taken = [
            (offsets[j], offsets[j] + pieces[j][0]) for j in placed if first <= pieces[j][2] and pieces[j][1] <= last
        ]
        start = 0
        for low, high in sorted(taken):
            if start + size <= low:
                break
            start = max(start, -(-high // ALIGNMENT) * ALIGNMENT)
        offsets[i] = start
        placed.append(i)
    return offsets, max((offset + piece[0] for offset, piece in zip(offsets, pieces, strict=True)), default=0)
