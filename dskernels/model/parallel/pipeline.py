"""The layers of one model distributed over the ranks of a pipeline, with the schedules of
`torch.distributed.pipelining`.

The stages form a V: with P ranks, rank r has the stages r and 2P - 1 - r. The first and the last stage, which share the
embedding and the head with the MTP modules, are therefore on the same rank. The backward of a stage is split in two
(`dskernels.later`): the gradient of its input, which the preceding stage waits for, and the gradients of its weights,
which fill the bubbles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble

import dskernels as ds
from dskernels.later import WeightGradients
from dskernels.model.batch import Batch
from dskernels.model.data import Packed
from dskernels.model.loss import Losses, losses
from dskernels.model.model import DeepseekV3
from dskernels.model.moe import MoE, RouterOutput
from dskernels.model.parallel.engines import reach_each_other
from dskernels.model.parallel.handover import HandedStage, Handover, rank_of
from dskernels.model.parallel.plan import Team, move, spread_experts
from dskernels.model.parallel.shares import dimension

SCHEDULES = {"dualpipev": ScheduleDualPipeV, "zbv": ScheduleZBVZeroBubble}


class Stage(DeepseekV3):
    """Some blocks of a model, under the names that they have in it; the first stage embeds, the last has the losses.

    Attributes:
        layers: the blocks, by their number in the whole model.
        queue: gradients of weights that are still to be computed.
        text: the micro-batches of the step.
        shares: for each micro-batch, the factors of its main and MTP loss, and of its balance loss, in the loss of the
            step.
        sums: main, MTP and balance loss, summed over the micro-batches so far.
        load: of each expert, by the place of its layer in `moe_layers` of the whole model.
    """

    layers: nn.ModuleDict  # type: ignore[assignment]

    def __init__(self, model: DeepseekV3, place: int, stages: int) -> None:
        nn.Module.__init__(self)
        self.config, self.fp8 = model.config, model.fp8
        blocks, bounds = len(model.layers), split(len(model.layers), stages)
        self.first, self.last = place == 0, place == stages - 1
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in range(*bounds[place])})
        self.rope = model.rope
        if self.first or (self.last and len(model.mtp)):
            self.embed_tokens = model.embed_tokens
        if self.last:
            self.norm, self.lm_head, self.mtp = model.norm, model.lm_head, model.mtp
        dense = model.config.first_k_dense_replace
        self.moe_places = [i - dense for i in range(*bounds[place]) if i >= dense]
        if self.last:
            self.moe_places += [blocks - dense + i for i in range(len(model.mtp))]
        self.queue = WeightGradients()
        self.text: Sequence[Packed] = ()
        self.shares: Sequence[tuple[float, float]] = ()
        self.mtp_lambda, self.balance_alpha = 0.0, 0.0
        self.sums: Tensor | None = None
        self.load: dict[int, Tensor] = {}

    def begin(
        self, text: Sequence[Packed], shares: Sequence[tuple[float, float]], mtp_lambda: float, balance_alpha: float
    ) -> None:
        """Prepare a step; the arguments are the attributes of the same names."""
        self.text, self.shares, self.mtp_lambda, self.balance_alpha = text, shares, mtp_lambda, balance_alpha
        self.sums, self.load = None, {}

    def forward(self, x: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        """Run micro-batch number ``index`` (``[1]``, on the CPU): tokens or hidden states in, hidden states or its loss
        out."""
        i = int(index)
        text, (share, balance_share) = self.text[i], self.shares[i]
        with self.queue.collecting():
            if self.last:
                self._incoming = x
                output = super().forward(text.tokens, text.cu_seqlens, mtp=self.mtp_lambda > 0)
                parts = losses(output, text, self.config, balance_alpha=self.balance_alpha)
                main, ahead, balance = parts.main * share, parts.mtp * share, parts.balance * balance_share
                self._note(Losses(main, ahead, balance), output.routers, balance_share > 0 or share > 0)
                return (main + self.mtp_lambda * ahead + balance)[None]
            x = self.embed_tokens(x) if self.first else x
            x, routers = self._through(x, Batch.prompt(text.cu_seqlens, text.tokens.shape[0]))
            zero = torch.zeros((), device=x.device)
            balance = sum((self._balance(router, text) for router in routers), zero) * balance_share
            self._note(Losses(zero, zero, balance), routers, balance_share > 0 or share > 0)
            return cast(Tensor, _WithLoss.apply(x, balance)) if balance.requires_grad else x

    def trunk(self, tokens: Tensor, batch: Batch, cache: Tensor | None = None) -> tuple[Tensor, list[RouterOutput]]:
        """The part of the trunk that the last stage runs."""
        x, routers = self._through(self._incoming, batch)
        return self.norm(x), routers

    def _through(self, x: Tensor, batch: Batch) -> tuple[Tensor, list[RouterOutput]]:
        cos, sin = self.rope(batch.positions)
        update, routers = None, []
        for block in self.layers.values():
            x, update, router = block(x, update, batch, cos, sin)
            if router is not None:
                routers.append(router)
        return x if update is None else x + update, routers

    def _balance(self, router: RouterOutput, text: Packed) -> Tensor:
        return ds.balance_loss(
            router.logits,
            top_k=self.config.num_experts_per_tok,
            alpha=self.balance_alpha,
            sequence_lengths=text.cu_seqlens.diff(),
            score=self.config.scoring_func,
        )

    def _note(self, parts: Losses, routers: Sequence[RouterOutput], counted: bool) -> None:
        numbers = torch.stack([part.detach().float() for part in parts])
        self.sums = numbers if self.sums is None else self.sums + numbers
        if not counted:
            return
        for place, router in zip(self.moe_places, routers, strict=False):
            load = router.routing.load.long()
            self.load[place] = self.load[place] + load if place in self.load else load


class _WithLoss(torch.autograd.Function):
    """Hidden states for the next stage, and a loss of this stage: in the backward, when the gradient of the hidden
    states arrives, the loss gets gradient 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.shape = loss.shape
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor]:
        return dx, torch.ones(ctx.shape, device=dx.device)


class Pipeline:
    """A model whose layers are distributed over the ranks of the pipeline, ready to run steps.

    Args:
        model: the same on every rank; each keeps only its stages. If it is on the meta device, each rank allocates only
            its stages, and leaves them uninitialised. Experts may be spread over ranks too.
        team: the ranks.
        tokens: the number of tokens in each micro-batch.
        microbatches: of a step, at least twice the number of ranks in the pipeline.
        schedule: "dualpipev" (arXiv 2412.19437, in the form of a V) or "zbv" (arXiv 2401.10241, section 6).
        collect: called after the gradients of weights of each micro-batch, such as `MasterAdamW.collect`; by default
            they are summed in ``.grad``.

    Attributes:
        stages: the two stages of this rank.
        schedule: torch's schedule.
        handover: carries messages between GPUs of one host; None if `torch.distributed` carries them.

    Raises:
        ValueError: the plan does not fit the model, too few micro-batches, or an unknown schedule.
    """

    def __init__(
        self,
        model: DeepseekV3,
        team: Team,
        *,
        tokens: int,
        microbatches: int,
        schedule: str = "dualpipev",
        collect: Callable[[], None] | None = None,
    ) -> None:
        team.plan.check(model.config, dist.get_world_size())
        ranks = team.plan.pipeline
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected {', '.join(SCHEDULES)}, got {schedule!r}")
        if microbatches < 2 * ranks:
            raise ValueError(f"microbatches: expected at least {2 * ranks} for {ranks} ranks, got {microbatches}")
        spread_experts(model, team, tokens=tokens, dtype=next(model.parameters()).dtype)
        self.team, self.microbatches = team, microbatches
        self.collect = collect or (lambda: None)
        place = team.place("pipeline")
        self.places = places = (place, 2 * ranks - 1 - place)
        self.stages = [Stage(model, i, 2 * ranks) for i in places]
        for stage in self.stages:
            move(stage, team.device)
        dtype, hidden = next(model.parameters()).dtype, model.config.hidden_size
        self.shape, self.dtype = (tokens, hidden), dtype
        wide = torch.empty(tokens, hidden, dtype=dtype, device="meta", requires_grad=True)
        ids = torch.empty(tokens, dtype=torch.int64, device="meta")
        loss = torch.empty(1, device="meta", requires_grad=True)
        self.handover: Handover | None = None
        if reach_each_other(team.group("pipeline")):
            self.handover = Handover(team.group("pipeline"), microbatches, self.shape, dtype)
        kind = PipelineStage if self.handover is None else HandedStage
        pipeline_stages: list[Any] = [
            kind(
                stage,
                i,
                2 * ranks,
                team.device,
                input_args=(ids if stage.first else wide,),
                output_args=(loss if stage.last else wide,),
                group=team.group("pipeline"),
                dw_builder=self._builder(stage),
            )
            for i, stage in zip(places, self.stages, strict=True)
        ]
        for pipeline_stage in pipeline_stages:
            pipeline_stage.handover = self.handover
        self.schedule = SCHEDULES[schedule](
            pipeline_stages, microbatches, loss_fn=lambda output, _: output.sum(), scale_grads=False
        )

    def _builder(self, stage: Stage) -> Callable[[], Callable[[], None]]:
        def build() -> Callable[[], None]:
            gradients = stage.queue.take()

            def run() -> None:
                gradients()
                self.collect()

            return run

        return build

    def step(
        self, text: Sequence[Packed], shares: Sequence[tuple[float, float]], *, mtp_lambda: float, balance_alpha: float
    ) -> Tensor:
        """Run forward and backward of a step.

        Args:
            text: its micro-batches, on this device, the same on all ranks of the pipeline.
            shares: see `Stage`.
            mtp_lambda: weight of the MTP loss.
            balance_alpha: weight of the balance loss.

        Returns:
            Main, MTP and balance loss, summed over all stages, fp32 ``[3]``, on every rank of the pipeline.
        """
        for stage in self.stages:
            stage.begin(text, shares, mtp_lambda, balance_alpha)
        if self.handover is not None:
            self.handover.begin()
        index = torch.arange(self.microbatches)
        tokens = (torch.cat([batch.tokens for batch in text]),) if self.stages[0].first else ()
        self.schedule.step(*tokens, target=index, losses=[], return_outputs=False, index=index)
        return self._sums()

    @torch.no_grad()
    def evaluate(self, text: Sequence[Packed], shares: Sequence[float]) -> Tensor:
        """Losses without a backward, with the arguments and the result of `step`; `load` then counts only micro-batches
        whose share is not 0."""
        for stage in self.stages:
            stage.begin(text, [(share, 0.0) for share in shares], 1.0, 0.0)
        ranks, group = self.team.plan.pipeline, self.team.group("pipeline")
        here, mine = self.team.place("pipeline"), dict(zip(self.places, self.stages, strict=True))
        for i, batch in enumerate(text):  # one after the other: torch's V-shaped schedules cannot run forwards alone
            x = batch.tokens
            for place in range(2 * ranks):
                if place not in mine:
                    continue
                before = rank_of(place - 1, ranks) if place else here
                if before != here:
                    x = torch.empty(self.shape, dtype=self.dtype, device=self.team.device)
                    dist.recv(x, group=group, group_src=before)
                x = mine[place](x, torch.tensor([i]))
                after = rank_of(place + 1, ranks) if place + 1 < 2 * ranks else here
                if after != here:
                    dist.send(x, group=group, group_dst=after)
        return self._sums()

    def _sums(self) -> Tensor:
        """The losses summed over all stages. It synchronises the ranks of the pipeline, which `Handover` relies on."""
        sums = torch.stack([cast(Tensor, stage.sums) for stage in self.stages]).sum(0)
        dist.all_reduce(sums, group=self.team.group("pipeline"))
        return sums

    def load(self) -> Tensor:
        """How often each expert of each layer was chosen, int64 ``[layers, experts]``, on every rank of the
        pipeline."""
        config = self.stages[0].config
        layers = config.num_hidden_layers - config.first_k_dense_replace + config.num_nextn_predict_layers
        load = torch.zeros(layers, config.n_routed_experts, dtype=torch.int64, device=self.team.device)
        for stage in self.stages:
            for place, counts in stage.load.items():
                load[place] += counts
        dist.all_reduce(load, group=self.team.group("pipeline"))
        return load

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of this rank, each once, by their names in the whole model."""
        return {name: p for stage in self.stages for name, p in stage.named_parameters()}

    def moe_layers(self) -> dict[int, MoE]:
        """The layers with experts of this rank, by their place in `DeepseekV3.moe_layers` of the whole model."""
        found: dict[int, MoE] = {}
        for stage in self.stages:
            blocks = [*stage.layers.values(), *(stage.mtp if stage.last else ())]
            here = [block.mlp for block in blocks if isinstance(block.mlp, MoE)]
            found.update(zip(stage.moe_places, here, strict=True))
        return found

    def reduce(self) -> None:
        """Sum gradients over the ranks that process different text; in a pipeline, no weights are sharded."""
        for name, parameter in self.named_parameters().items():
            if parameter.grad is not None:
                self.team.total(parameter.grad, dimension(name))


def split(layers: int, stages: int) -> list[tuple[int, int]]:
    """The first layer of each stage, and the one after its last. The last stage, which also has the head and the MTP
    modules, is one of the shorter ones."""
    short, longer = divmod(layers, stages)
    sizes = [short + (i < longer) for i in range(stages)]
    ends = [sum(sizes[: i + 1]) for i in range(stages)]
    return [(end - size, end) for size, end in zip(sizes, ends, strict=True)]
