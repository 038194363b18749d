"""How a model is spread over ranks: the plan, the groups of ranks that it forms, and what it changes in the model."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from dskernels.gemm.weights import counts_changes
from dskernels.model.config import Config
from dskernels.model.model import DeepseekV3
from dskernels.model.parallel.copies import CopyEngines
from dskernels.model.parallel.engines import reach_each_other
from dskernels.model.parallel.exchange import Wire
from dskernels.model.parallel.expert import ExpertParallel
from dskernels.model.parallel.fixed import largest_message
from dskernels.model.parallel.mail import Collective, Mail
from dskernels.model.parallel.shards import local

TIMEOUT = 600.0  # seconds that a rank waits for the others before it raises an error
# Up to how many ranks every token is sent to all of them without counting. With 8 choices per token, 99.9% of the
# (token, rank) pairs are needed on 2 ranks and 90% on 4, but only 66% on 8.
MOST_FIXED = 4

Exchange = Literal["auto", "counted", "fixed"]


@dataclass(frozen=True)
class Plan:
    """How the ranks of a run divide the work. The number of ranks is the product of data, expert, pipeline and tensor.

    Attributes:
        data: the number of ranks that have the same experts, process different text, and share the memory of all
            weights (FSDP2).
        expert: the number of ranks that share the experts of each layer; each also processes its own text.
        pipeline: the number of ranks that share the layers, two stages each, in the form of a V (`Pipeline`).
        tensor: the number of ranks that share heads and experts for the same text, for generation
            (`parallelize_decode`).
        wire: the format in which a token is sent to its experts, see `ExpertParallel`.
        exchange: "counted" sends each token only to the ranks of its experts, and the host waits once per layer for the
            number of tokens. "fixed" sends all tokens to all ranks and waits for nothing: by copy engines if the GPUs
            can access each other's memory, else by `torch.distributed`. "auto" means "fixed" for at most 4 ranks with
            such GPUs if the number of tokens of a rank is known in advance (`train`, `Pipeline`,
            ``parallelize(tokens=...)``), else "counted".
        reshard: free gathered weights after the forward of each block, and gather them again for its backward: less
            memory, more messages. Without it, `train` keeps the whole weights on every rank and divides only the state
            of the optimiser (`WholeAdamW`): gradients are summed once per step, and updated weights sent once.
        overlap: train on two micro-batches at a time, so that messages of one travel while the other computes, see
            `overlapped`. This needs twice the memory between forward and backward, and ``reshard=False``.
        sms: the most SMs of a GPU that a message of NCCL may occupy while something else computes; None leaves it to
            NCCL.

    Raises:
        ValueError: a number is below 1, ``exchange`` is unknown, ``overlap`` is combined with ``reshard`` or a
            pipeline, or ``tensor`` with any of the other three.
    """

    data: int = 1
    expert: int = 1
    pipeline: int = 1
    tensor: int = 1
    wire: Wire = "same"
    exchange: Exchange = "auto"
    reshard: bool = True
    overlap: bool = False
    sms: int | None = None

    def __post_init__(self) -> None:
        for name in ("data", "expert", "pipeline", "tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.exchange not in ("auto", "counted", "fixed"):
            raise ValueError(f'exchange: expected "auto", "counted" or "fixed", got {self.exchange!r}')
        if self.overlap and (self.reshard or self.pipeline > 1):
            raise ValueError(
                "overlap: expected reshard=False and pipeline=1, "
                f"got reshard={self.reshard} and pipeline={self.pipeline}"
            )
        if self.sms is not None and self.sms < 1:
            raise ValueError(f"sms: expected at least 1, got {self.sms}")
        if self.tensor > 1 and self.ranks != self.tensor:
            raise ValueError(
                f"tensor: is for generation, expected data, expert and pipeline to be 1, "
                f"got {self.data}, {self.expert} and {self.pipeline}"
            )

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return self.data * self.expert * self.pipeline * self.tensor

    @property
    def batches(self) -> int:
        """The number of ranks that process different text; with a pipeline, the number of pipelines."""
        return self.data * self.expert

    def check(self, config: Config, ranks: int) -> None:
        """Raise a ValueError if the plan does not fit the model or the number of ranks."""
        if self.ranks != ranks:
            raise ValueError(
                f"plan: data {self.data} x expert {self.expert} x pipeline {self.pipeline} x tensor {self.tensor} are "
                f"{self.ranks} ranks, but there are {ranks}"
            )
        for name, size, what in (
            ("expert", config.n_routed_experts, "n_routed_experts"),
            ("tensor", config.n_routed_experts, "n_routed_experts"),
            ("tensor", config.num_attention_heads, "num_attention_heads"),
        ):
            if size % getattr(self, name):
                raise ValueError(f"{name}: {getattr(self, name)} ranks do not divide {what} = {size}")
        if 2 * self.pipeline > config.num_hidden_layers and self.pipeline > 1:
            raise ValueError(
                f"pipeline: {self.pipeline} ranks have {2 * self.pipeline} stages, more than the "
                f"{config.num_hidden_layers} layers"
            )


@dataclass(frozen=True)
class Team:
    """The ranks of a run and their groups, as this rank sees them.

    Attributes:
        plan: how they divide the work.
        mesh: of the dimensions pipeline, data, expert and tensor; ranks of one expert group are neighbours.
        batch: data and expert as one dimension: the ranks that have the same layers and process different text.
        device: of this rank.
    """

    plan: Plan
    mesh: DeviceMesh
    batch: DeviceMesh
    device: torch.device

    @classmethod
    def start(cls, plan: Plan, device: torch.device | str | None = None, *, timeout: float = TIMEOUT) -> Team:
        """Join the ranks that torchrun has started: with NCCL if there is a GPU for each, else with gloo on the CPU.

        Args:
            plan: for the number of ranks that there are.
            device: by default a GPU for each rank if there are GPUs.
            timeout: seconds after which a rank that waits for a dead one ends with an error.

        Raises:
            ValueError: the plan is for another number of ranks.
        """
        if not dist.is_initialized():
            # Multicast over NVLink has made shared hosts hang, and no measurement here has shown a gain from it.
            os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
            os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
            if plan.sms is not None:
                os.environ["NCCL_MAX_CTAS"] = str(plan.sms)  # each CTA of NCCL occupies one SM
            local = int(os.environ.get("LOCAL_RANK", 0))
            if device is None:
                device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
            device = torch.device(device)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            limit = datetime.timedelta(seconds=timeout)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit)
        device = torch.device(device or "cpu")
        if plan.ranks != dist.get_world_size():
            raise ValueError(
                f"plan: {plan.ranks} ranks expected, but there are {dist.get_world_size()} (torchrun --nproc-per-node)"
            )
        shape = (plan.pipeline, plan.data, plan.expert, plan.tensor)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("pipeline", "data", "expert", "tensor"))
        return cls(plan, mesh, mesh["data", "expert"]._flatten("batch"), device)

    def group(self, name: str) -> dist.ProcessGroup:
        """This rank's group along a dimension of the mesh, or "batch"."""
        return (self.batch if name == "batch" else self.mesh[name]).get_group()

    def place(self, name: str) -> int:
        """This rank's number within that group."""
        return (self.batch if name == "batch" else self.mesh[name]).get_local_rank()

    def total(self, x: Tensor, name: str = "batch") -> Tensor:
        """Sum a tensor over a group, in place."""
        if self.group(name).size() > 1:
            dist.all_reduce(x, group=self.group(name))
        return x

    def close(self) -> None:
        """Leave the group of ranks."""
        dist.destroy_process_group()


def parallelize(
    model: DeepseekV3, team: Team, *, dtype: torch.dtype | None = None, tokens: int | None = None
) -> DeepseekV3:
    """Spread a model over the ranks of a team, for training: experts over the expert ranks, all else by FSDP2.

    The code of the model does not change; each rank then calls it with its own text. Gradients are summed over the
    ranks, not averaged, so the loss of each rank must be its share of the whole loss. For a pipeline see `Pipeline`.

    Args:
        model: the same on every rank, in fp32 (FSDP2's sharded parameters are the optimiser's master weights). It is
            changed in place and moved to the team's device. If it is on the meta device, each rank allocates only the
            rows that it will hold, and leaves them uninitialised.
        team: the ranks.
        dtype: the parameters are rounded to this type for computing, usually bf16; gradients are summed in fp32.
        tokens: the most tokens that a rank processes at a time, the same on every rank, see `Plan.exchange`.

    Raises:
        ValueError: the plan does not fit the model, or its exchange is "fixed" and `tokens` is missing.
    """
    team.plan.check(model.config, dist.get_world_size())
    spread_experts(model, team, tokens=tokens, dtype=dtype or torch.float32)
    if not is_meta(model):
        model.to(team.device)
    shard(model, team, dtype=dtype)
    return model


def is_meta(module: nn.Module) -> bool:
    """Whether a module has shapes only, and no memory."""
    return next(module.parameters()).is_meta


def move(module: nn.Module, device: torch.device) -> None:
    """Move a module to a device; one on the meta device gets memory there, uninitialised."""
    if is_meta(module):
        module.to_empty(device=device)
    else:
        module.to(device)


def spread_experts(model: nn.Module, team: Team, *, tokens: int | None, dtype: torch.dtype) -> None:
    """Replace the experts of every layer by this rank's part of them; tokens are sent in ``dtype``, see
    `parallelize`."""
    ranks, place = team.plan.expert, team.place("expert")
    found = expert_modules(model)
    if ranks == 1 or not found:
        return
    mail = mail_for(found[0][1], team, tokens, dtype)
    for experts, config in found:
        per_rank = config.n_routed_experts // ranks
        own = slice(place * per_rank, (place + 1) * per_rank)
        experts.w13 = nn.Parameter(experts.w13.detach()[own].clone())
        experts.w2 = nn.Parameter(experts.w2.detach()[own].clone())
        experts.compute = ExpertParallel(
            team.group("expert"),
            config.n_routed_experts,
            wire=team.plan.wire,
            most_ranks=most_ranks(config, ranks),
            mail=mail,
            tokens=None if mail is None else tokens,
        )


def mail_for(config: Config, team: Team, tokens: int | None, dtype: torch.dtype) -> Mail | None:
    """What carries the tokens of all layers to all ranks, or None if they are counted; every rank must call this."""
    group, exchange = team.group("expert"), team.plan.exchange
    if exchange == "counted" or (exchange == "auto" and (tokens is None or group.size() > MOST_FIXED)):
        return None
    if tokens is None:
        raise ValueError('exchange: "fixed" needs `tokens`, the most that a rank processes at a time, got None')
    if not reach_each_other(group):
        return Collective(group) if exchange == "fixed" else None
    return CopyEngines(group, largest_message(tokens, config.hidden_size, config.num_experts_per_tok, dtype))


def expert_modules(model: nn.Module) -> list:
    """The `Experts` of a model, or of some of its layers, each with the config of the model."""
    from dskernels.model.moe import MoE

    return [(m.experts, m.gate.config) for m in model.modules() if isinstance(m, MoE)]


def most_ranks(config: Config, ranks: int) -> int | None:
    """The most ranks that the experts of a token can be on, if the router limits its groups; None if this is no
    limit."""
    per_group, per_rank = config.n_routed_experts // config.n_group, config.n_routed_experts // ranks
    if per_group % per_rank == 0:
        most = config.topk_group * (per_group // per_rank)
    elif per_rank % per_group == 0:
        most = config.topk_group
    else:
        return None
    return most if most < min(ranks, config.num_experts_per_tok) else None


def shard(model: nn.Module, team: Team, *, dtype: torch.dtype | None) -> None:
    """Apply FSDP2 over the ranks that process different text: experts over those of them that have the same experts,
    all else over all of them.

    Args:
        model: on the team's device, or on the meta device: then the shards of this rank are allocated, uninitialised.
        team: the ranks.
        dtype: see `parallelize`.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    reshard = team.plan.reshard
    for experts, _ in expert_modules(model):
        fully_shard(experts, mesh=team.mesh["data"], mp_policy=policy, reshard_after_forward=reshard)
    # Weights of MTP modules are read outside of the modules' own forward, so they belong to the root, which stays
    # gathered.
    for block in cast(nn.ModuleList, model.layers):
        fully_shard(block, mesh=team.batch, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=team.batch, mp_policy=policy, reshard_after_forward=False)
    if is_meta(model):
        model.to_empty(device=team.device)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
            module.register_forward_pre_hook(_Renewal(module))


class _Renewal:
    """A hook that marks gathered weights as changed, so that quantised copies of them are made anew.

    FSDP2 gathers a weight into the same memory without changing its version counter, even if the values have changed.
    The version counters of the shards do change.
    """

    def __init__(self, unit: nn.Module) -> None:
        self.weights = [
            (module, name, local(parameter))
            for module in _of_unit(unit)
            for name, parameter in module.named_parameters(recurse=False)
        ]
        self.seen = -1

    def __call__(self, unit: nn.Module, args: object) -> None:
        version = sum(shard._version for _, _, shard in self.weights)
        if version != self.seen:
            gathered = [getattr(module, name) for module, name, _ in self.weights]
            torch.autograd.graph.increment_version(gathered)
            counts_changes(gathered)
            self.seen = version


def _of_unit(unit: nn.Module) -> Iterator[nn.Module]:
    """A module whose weights FSDP2 gathers together: itself, and its submodules that are not gathered separately."""
    yield unit
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _of_unit(child)
