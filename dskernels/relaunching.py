"""Recordings: the launches of a call, noted once by dskernels.recording, which can be launched again and again."""

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

# At least this many launches are made as one CUDA graph; a number that no call reaches turns graphs off. On an H200 the
# seven launches of the expert block take 15 us of host time as a graph and 41 one by one (17.5 and 42 if the caller
# keeps the results). For a single launch a graph is no gain: the device takes 2.5 us either way. A single programmatic
# launch takes 3.0 us in a graph, where it cannot overlap with the kernel before it, and 2.0 without.
FEWEST_IN_GRAPH = 2
# The most graphs that a process keeps. One of seven launches takes 0.1 MB of the GPU's memory. A graph that is dropped
# is made anew when it is next launched, which takes half a millisecond.
MOST_GRAPHS = 512
ALIGNMENT = 512  # bytes, of each piece in a call's own memory; the same as that of torch's allocator

Kept = Callable[[Tensor], Sequence[Tensor]]


class Product(NamedTuple):
    """A product by torch, ``function(left, right, out=out)``, which is repeated between the launches of a recording.

    Attributes:
        function: `torch.mm` or `torch.bmm`.
        operands: shape and strides of `left`, of `right` and of `out`.
        dtype: the dtype of all three.
    """

    function: Callable
    operands: tuple[tuple[Sequence[int], Sequence[int]], ...]
    dtype: torch.dtype


OPERANDS = "left", "right", "out"


class Place(NamedTuple):
    """Where an address came from: the number of a piece of memory, and the distance from its start, in bytes."""

    piece: int
    offset: int


@dataclass(frozen=True)
class Noted:
    """What a call did.

    It used pieces of memory, which are numbered: first the tensors that it was given, then what is kept for some of
    these (such as a weight's e4m3 copy), then what it allocated.

    Attributes:
        device: ordinal of the GPU.
        stream: the stream of the launches.
        launches: plans that nothing else uses, and products, in order; each with the place that the address of each of
            its parameters came from, by the parameter's name (for a product one of `OPERANDS`).
        pieces: address and size in bytes of each piece of memory.
        n_tensors: the number of tensors that the call was given.
        kept: pairs (number of a tensor, function that returns what is kept for it), in the order of the pieces. The
            function is called again at each launch, and returns two tensors.
        results: the tensors that the call returned anew, each with the number of its piece, or None if it is empty.
        returned: makes what the call returns from the new tensors and from those that it was given.
        written: numbers of the tensors that it wrote to.
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
    """The launches of a call, ready to be repeated for other tensors.

    Each address in them is that of an argument, of something kept for one, of a new result, or lies in the call's own
    memory: one allocation for everything temporary.

    Args:
        noted: what the recorded call did.
    """

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

        # At each launch there is a list of tensors: the arguments, what is kept for them, the call's own memory if it
        # needs any, and the results. Below, `number` maps a piece to its place in that list.
        own = {piece for _, piece in noted.results if piece is not None}
        n_given = noted.n_tensors + sum(2 for _ in noted.kept)
        used: dict[int, list[int]] = {}  # for each piece, the first and the last launch that uses it
        for n, (_, places) in enumerate(noted.launches):
            for place in places.values():
                used.setdefault(place.piece, [n, n])[1] = n
        inside = [i for i in used if i >= n_given and i not in own]
        offsets, size = packed([(noted.pieces[i][1], used[i][0], used[i][1]) for i in inside])
        starts = dict(zip(inside, offsets, strict=True))
        # The call's own memory has the dtype of the products, so that their operands can be views of it.
        dtype = products[0].dtype if products else torch.uint8
        memory = torch.empty(ceil_div(size, dtype.itemsize), dtype=dtype, device="meta")
        self._make_own = like_this(memory) if size else None
        number = {i: i for i in range(n_given)}
        if size:
            number |= dict.fromkeys(inside, n_given)
        first = n_given + bool(size)
        number |= {piece: first + i for i, (_, piece) in enumerate(noted.results) if piece is not None}
        self._now = [0] * (first + len(noted.results))
        # For each tensor of that list: the words that hold an address in it, with the distance of that address from its
        # start, and the launches that these words belong to.
        self._moved: list[list[tuple[Any, int, int]]] = [[] for _ in self._now]
        readers: list[set[int]] = [set() for _ in self._now]
        self._in_order: list[Callable[[Sequence[Tensor]], None]] = []  # all launches, if products are among them
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
        self._stale: set[int] = set()  # launches whose addresses in the graph are out of date

    def fits(self, addresses: Sequence[int]) -> bool:
        """Whether arguments that overlapped or were adjacent in memory are again as far apart as they were."""
        for i, j, distance in self._related:  # noqa: SIM110 - `all` takes three times as long if there are none
            if addresses[j] - addresses[i] != distance:
                return False
        return True

    def launch(self, addresses: Sequence[int], tensors: Sequence[Tensor]) -> Any:
        """Allocate, write the addresses that have changed, and launch on the current stream.

        Args:
            addresses: of the tensors.
            tensors: those of this call, in the order of the recorded one.

        Returns:
            What the recorded call returned, of the new tensors.
        """
        results = [make() for make in self._make]
        now = [*addresses]
        kept: list[Tensor] = []
        if self._kept:
            kept = [x for i, again in self._kept for x in again(tensors[i])]  # has to live until all is enqueued
            now += [x.data_ptr() for x in kept]
        if self._make_own is not None:
            own = self._make_own()  # freed at the end of this call: its next user comes later on the stream
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
        """Launch the graph, made at the first time, after an update of the launches whose addresses changed."""
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
        """Launch one by one, into a CUDA graph that is being captured.

        During capture each `Word` is asked for anew. Afterwards those from before, which belong to the stream, are put
        back.
        """
        before = self._ask_all()
        for plan in self._plans:
            if status := plan.enqueue():
                plan.again(status)
        for memory, i, word in before:
            memory[i] = word

    def _launch_in_order(self, given: Sequence[Tensor]) -> None:
        """Launch one by one, with products of torch in between, whose operands are views of the `given` tensors."""
        before = self._ask_all() if torch._C._cuda_isCurrentStreamCapturing() else ()
        for launch in self._in_order:
            launch(given)
        for memory, i, word in before:
            memory[i] = word

    def _ask_all(self) -> list[tuple[Any, int, int]]:
        """Ask for each `Word` of the plans anew; return those from before as (memory, index, word)."""
        before = [(plan.memory, i, plan.memory[i]) for plan in self._plans for i, _ in plan.asked]
        for plan in self._plans:
            plan.ask()
        return before


def _enqueue_again(plan: Plan) -> Callable[[Sequence[Tensor]], None]:
    """A function that launches the plan, for `Recording._in_order`; it needs none of the tensors that it is given."""

    def launch(given: Sequence[Tensor]) -> None:
        if status := plan.enqueue():
            plan.again(status)

    return launch


def _multiply_again(product: Product, begins: Sequence[tuple[int, int]]) -> Callable[[Sequence[Tensor]], None]:
    """A function that repeats the product, for `Recording._in_order`.

    Args:
        product: the product.
        begins: for `left`, `right` and `out`: the number of the given tensor that it is part of, and where it begins in
            there, in bytes.
    """
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
    """While there are too many graphs, drop the oldest that has not been launched since it was last looked at."""
    while len(_have_graphs) > MOST_GRAPHS:
        reference = _have_graphs.popleft()
        recording = reference()
        if recording is not None and recording._recent:
            recording._recent = False
            _have_graphs.append(reference)
        elif recording is not None:
            recording._graph = None  # a thread that is launching it holds a reference until it is done


def _related(given: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Pairs of arguments that overlap or are adjacent in memory, and the distance between their addresses.

    The recorded call may have decided by that, so a recording fits other arguments only if the distance is the same.
    """
    pairs = [(i, j) for i in range(len(given)) for j in range(i + 1, len(given)) if given[i][1] and given[j][1]]

    def touch(i: int, j: int) -> bool:
        (a, size_a), (b, size_b) = given[i], given[j]
        return a <= b + size_b and b <= a + size_a

    return [(i, j, given[j][0] - given[i][0]) for i, j in pairs if touch(i, j)]


def packed(pieces: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Place temporary tensors in one piece of memory.

    Two may share bytes only if the last launch that uses the one comes before the first that uses the other. The
    largest are placed first, each at the lowest offset that is free.

    Args:
        pieces: for each tensor, its size in bytes, and the first and the last launch that use it.

    Returns:
        The offset of each in bytes, a multiple of `ALIGNMENT`, and the size of the whole.
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
