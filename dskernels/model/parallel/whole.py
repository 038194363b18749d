"""The optimiser for weights that every rank has whole, while each rank updates a part of them: ZeRO-1, as DeepSeek-V3
was trained (report section 3.1).

Masters, moments and summed gradients are divided over the ranks by rows. The weights in low precision, and the
gradients of a rank's own text in fp32, are whole on each rank. Once per step, a rank receives the sum of the gradients
of its rows while the last backward runs, and sends the rows that it has updated while the next ones are updated. On 2
H200 a step of a slice of Moonlight takes 269 ms in this way, 283 ms if NCCL carries the messages, and 300 ms with FSDP2
that keeps gathered weights; it takes 271 ms on one of them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dskernels.model.optimizer import accumulate
from dskernels.model.parallel.engines import reach_each_other
from dskernels.model.parallel.optimizer import TeamAdamW
from dskernels.model.parallel.plan import Team
from dskernels.model.parallel.shares import Collectives, CopiedShares, dimension

# Gradients are sent in buckets of whole matrices; a bucket is complete once it has this many numbers (512 MiB).
BUCKET = 1 << 27


class Bucket(NamedTuple):
    """Consecutive matrices of the model.

    Attributes:
        names: of the matrices.
        begin: where this rank's rows of them begin in its flat masters.
        end: where they end.
    """

    names: Sequence[str]
    begin: int
    end: int


class WholeAdamW(TeamAdamW):
    """`TeamAdamW` of plain parameters, which are the same on all ranks that process different text.

    Vectors, and matrices whose number of rows is no multiple of the number of ranks, are updated by every rank.

    Args:
        parameters: by name, as the model has them.
        team: the ranks.
        betas: see `MasterAdamW`.
        weight_decay: likewise.
        moments: likewise.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        team: Team,
        *,
        betas: tuple[float, float],
        weight_decay: float,
        moments: torch.dtype,
    ) -> None:
        super().__init__(parameters, team, betas=betas, weight_decay=weight_decay, moments=moments)
        mine = dict(zip(self.names, self._gradients, strict=True))
        # Where rows are not divided, the sum over this rank's own text and the sum over all ranks use the same memory.
        self._sums = {
            name: torch.empty_like(parameter, dtype=torch.float32) if self._spread(name) else mine[name]
            for name, parameter in self.whole.items()
        }
        self._mine, self._master = mine, dict(zip(self.names, self.masters, strict=True))
        self._buckets = self._cut()
        self._at = {name: i for i, bucket in enumerate(self._buckets) for name in bucket.names}
        vectors = self.parts[len(self.parts) - (self._matrices < self.flat.numel()) :]
        self.parts = [(bucket.begin, bucket.end) for bucket in self._buckets] + vectors
        self._begun = set[str]()  # the parameters of which this step has gradients already
        # While the last backward of a step runs: of each bucket, the names without a gradient so far.
        self._missing: list[set[str]] | None = None
        self._sent = 0  # how many buckets have been sent, beginning with the last one
        shared = [[name for name in bucket.names if self._spread(name)] for bucket in self._buckets]
        group = team.group("batch")
        kind = CopiedShares if group.size() > 1 and reach_each_other(group) else Collectives
        self._shares: Collectives | CopiedShares = kind(team, self.whole, shared)
        # The weights may have been moved into shared memory.
        self.parameters, self._apart = [nn.Parameter(self._local(name)) for name in self.names], []
        self._given = False  # whether the rows that this step has updated have been sent
        # A weak reference, because the garbage collector does not see what autograd's hooks refer to.
        here = weakref.WeakMethod(self._made)
        for name in self._at:
            self.whole[name].register_post_accumulate_grad_hook(functools.partial(_tell, here, name))

    def _cut(self) -> list[Bucket]:
        buckets: list[Bucket] = []
        names: list[str] = []
        begin = end = size = 0
        for name, parameter in self.whole.items():
            if parameter.dim() < 2:
                continue
            names.append(name)
            end += self._mine[name].numel()
            size += parameter.numel()
            if size >= BUCKET or end == self._matrices:
                buckets.append(Bucket(names, begin, end))
                names, begin, size = [], end, 0
        return buckets

    # ---- which rank updates what ------------------------------------------------------------------------------------

    def rows(self, name: str) -> slice:
        """The rows of a parameter that this rank updates."""
        total, ranks = self.whole[name].shape[0], self._ranks(name)
        if not self._spread(name):
            return slice(0, total)
        each = total // ranks
        place = self.team.place(dimension(name))
        return slice(place * each, (place + 1) * each)

    def place(self, name: str) -> tuple[int, int]:
        """See `TeamAdamW`."""
        first, total = super().place(name)
        return first + self.rows(name).start, total

    def writes(self, name: str) -> bool:
        """See `TeamAdamW`."""
        return self._spread(name) or self.team.place(dimension(name)) == 0

    def _local(self, name: str) -> Tensor:
        return self.whole[name].detach()[self.rows(name)]

    def _copies(self, name: str) -> int:
        return 1 if self._spread(name) else self._ranks(name)

    def _spread(self, name: str) -> bool:
        parameter, ranks = self.whole[name], self._ranks(name)
        return ranks > 1 and parameter.dim() > 1 and parameter.shape[0] % ranks == 0

    def _ranks(self, name: str) -> int:
        return self.team.group(dimension(name)).size()

    # ---- gradients --------------------------------------------------------------------------------------------------

    def last(self) -> None:
        """See `TeamAdamW`: from now on gradients are sent as soon as they are there."""
        self._missing = [set(bucket.names) for bucket in self._buckets]

    def _made(self, name: str) -> None:
        """Called when the gradient of a parameter is there."""
        if self._missing is None:
            return
        self._missing[self._at[name]].discard(name)
        while self._sent < len(self._buckets) and not self._missing[-1 - self._sent]:  # all ranks in the same order
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        """Send the gradients of the next bucket to the ranks that update with them."""
        bucket = self._buckets[-1 - self._sent]
        self._sent += 1
        self._add(bucket.names)
        self._zero_missing(bucket.names)
        self._shares.send_gradients(len(self._buckets) - self._sent, self._sums, self._mine)

    def _zero_missing(self, names: Sequence[str]) -> None:
        """Zero the sums of parameters that got no gradient on this rank, because the other ranks wait for them."""
        for name in names:
            if name not in self._begun:
                self._sums[name].zero_()

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of the model's parameters to the sums over this rank's text, in fp32."""
        self._add(list(self.whole))

    def _add(self, names: Sequence[str]) -> None:
        there = [name for name in names if self.whole[name].grad is not None]
        for first in (True, False):
            some = [name for name in there if (name not in self._begun) == first]
            accumulate([self._sums[n] for n in some], [cast(Tensor, self.whole[n].grad) for n in some], first=first)
        self._begun.update(there)
        for name in there:
            self.whole[name].grad = None

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum over the ranks what has not been sent yet, and wait for all sums."""
        self.collect()
        while self._sent < len(self._buckets):
            self._send()
        self._zero_missing([name for name in self.whole if name not in self._at])
        for name in self._at:  # matrices that every rank updates
            if not self._spread(name):
                self.team.total(self._sums[name], dimension(name))
        vectors = self._gradient[self._matrices :]
        if vectors.numel():
            self.team.total(vectors)
        self._shares.gradients(self._sums, self._mine)
        self._begun.clear()
        self._missing, self._sent, self._collected = None, 0, True

    # ---- weights ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def updated(self, begin: int, end: int) -> None:
        """Send the rows of these masters to the other ranks, while the next ones are updated."""
        place = next((i for i, bucket in enumerate(self._buckets) if bucket.begin == begin), None)
        self._give(place)
        self._given = True

    def _give(self, place: int | None) -> None:
        """Set this rank's rows of a bucket's weights to the rounded masters and send them; None stands for the vectors,
        which are in no bucket and are not sent."""
        names = [name for name in self.whole if name not in self._at] if place is None else self._buckets[place].names
        rows = {name: self._local(name) for name in names}
        torch._foreach_copy_(list(rows.values()), [self._master[name] for name in names])
        if place is not None:
            self._shares.send_weights(place, rows)

    @torch.no_grad()
    def refresh(self) -> None:
        """Set the parameters to the rounded masters; `updated` may have sent the rows already."""
        if not self._given:
            for place in (*range(len(self._buckets)), None):
                self._give(place)
        self._given = False
        self._shares.arrived()
        torch.autograd.graph.increment_version(list(self.whole.values()))


def _tell(method: weakref.WeakMethod, name: str, parameter: Tensor) -> None:
    """Call the method if its object still exists."""
    made = method()
    if made is not None:
        made(name)
