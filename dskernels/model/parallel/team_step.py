"""A step of training on many ranks: each runs its share of the micro-batches, and of held-out text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from dskernels.model.data import Packed
from dskernels.model.loss import Losses, losses
from dskernels.model.model import Output
from dskernels.model.parallel.optimizer import TeamAdamW
from dskernels.model.parallel.overlap import overlapped
from dskernels.model.parallel.pipeline import Pipeline
from dskernels.model.parallel.plan import Team
from dskernels.model.train_config import TrainConfig
from dskernels.model.train_step import Pending, Stepper, count, no_load


class TeamStepper(Stepper):
    """`Stepper` whose micro-batches are distributed over the ranks."""

    optimizer: TeamAdamW

    def __init__(
        self, model: Any, optimizer: TeamAdamW, config: TrainConfig, team: Team, pipeline: Pipeline | None
    ) -> None:
        super().__init__(model, optimizer, config)
        self.team, self.pipeline = team, pipeline

    def backward(self, text: Sequence[Packed], step: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """See `Stepper.backward`: ``text`` has all micro-batches of the step, of which this rank runs its share."""
        config, team = self.config, self.team
        mtp_lambda, each = config.mtp_lambda_at(step), len(text) // team.plan.batches
        predictions = max(sum(int(batch.predictions) for batch in text), 1)
        mine = text[team.place("batch") * each :][:each]
        shares = [(int(batch.predictions) / predictions, 1 / len(text)) for batch in mine]
        mine = [batch.to(self.device) for batch in mine]
        if self.pipeline is not None:
            sums = self.pipeline.step(mine, shares, mtp_lambda=mtp_lambda, balance_alpha=config.balance_alpha)
            load = self.pipeline.load()
        else:
            sums, load = self._alone(mine, shares, mtp_lambda)
        self.optimizer.reduce()
        return team.total(sums), team.total(load)

    def _alone(
        self, text: Sequence[Packed], shares: Sequence[tuple[float, float]], mtp_lambda: float
    ) -> tuple[Tensor, Tensor]:
        model, config, plan = self.model, self.config, self.team.plan
        sums, load = torch.zeros(3, device=self.device), no_load(model)

        def forward(batch: Packed, share: float, balance_share: float) -> tuple[Tensor, Losses, Output]:
            output = model(*batch, mtp=mtp_lambda > 0)
            parts = losses(output, batch, model.config, balance_alpha=config.balance_alpha)
            parts = Losses(parts.main * share, parts.mtp * share, parts.balance * balance_share)
            return parts.main + mtp_lambda * parts.mtp + parts.balance, parts, output

        at_once = 2 if plan.overlap else 1
        passes = [functools.partial(forward, batch, *share) for batch, share in zip(text, shares, strict=True)]
        for first in range(0, len(passes), at_once):
            if first + at_once >= len(passes):
                self.optimizer.last()
            found = overlapped(model, passes[first : first + at_once])
            torch.autograd.backward([loss for loss, _, _ in found])
            self.optimizer.collect()
            for _, parts, output in found:
                sums += torch.stack(parts).detach()
                count(load, output)
        return sums, load

    @torch.no_grad()
    def evaluate(self, held_out: Sequence[Packed]) -> dict[str, Any]:
        """Losses on held-out text, of which each rank processes its share.

        Ranks exchange messages, so all of them run the same number of batches; those that are added to get it have
        weight 0.
        """
        team = self.team
        each = -(-len(held_out) // team.plan.batches)
        if self.pipeline is not None:
            each = max(each, self.pipeline.microbatches)
        weights = [int(batch.predictions) for batch in held_out]
        rest = each * team.plan.batches - len(held_out)
        padded = [*zip(held_out, weights, strict=True), *[(held_out[0], 0)] * rest]
        mine = padded[team.place("batch") * each :][:each]
        text = [(batch.to(self.device), weight / max(sum(weights), 1)) for batch, weight in mine]
        sums, load = torch.zeros(3, device=self.device), no_load(self.model)
        if self.pipeline is None:
            for batch, share in text:
                output = self.model(*batch, mtp=True)
                sums += torch.stack(losses(output, batch, self.model.config, balance_alpha=0.0)) * share
                if share:
                    count(load, output)
            if isinstance(self.model, FSDPModule):
                # Its own weights (embedding, head, MTP modules) stay gathered until a backward, but the next forward
                # may be of other weights, such as their average.
                self.model.reshard()
        else:
            n = self.pipeline.microbatches
            for first in range(0, each, n):
                part = [*text[first : first + n]]
                part += [(part[0][0], 0.0)] * (n - len(part))
                sums += self.pipeline.evaluate([batch for batch, _ in part], [share for _, share in part])
                load += self.pipeline.load()
        sums, load = team.total(sums), team.total(load)
        main, ahead, _ = sums.tolist()
        return dict(validation_loss=main, validation_mtp_loss=ahead, load=load.tolist())

    def _culprit(self, pending: Pending) -> str:
        return f"seen by rank {dist.get_rank()} of {dist.get_world_size()}; a run in one process would name the tensor"
