"""How a model is spread over ranks: the plan, the groups of ranks it makes, and what it does to the model."""

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

TIMEOUT = 600.0  # seconds that a rank waits for the others before it gives up
# Sent to every rank, a token is wanted there by 99.9% of 2 and 90% of 4, as 8 choices fall, but by 66% of 8.
MOST_FIXED = 4

Exchange = Literal["auto", "counted", "fixed"]


@dataclass(frozen=True)
class Plan:
    """What the ranks of a run do for each other. Their number is the product of all four.

    Attributes:
        data: ranks with the same experts and other text, which share the memory of all weights (FSDP2).
        expert: ranks that share the experts of a layer, each with its own text too.
        pipeline: ranks that share the layers, two stages each, in the form of a V (`Pipeline`).
        tensor: ranks that share the heads and the experts for the same text, to generate with (`parallelize_decode`).
        wire: what a token travels to its experts as, see `ExpertParallel`.
        exchange: "counted", tokens to the ranks of their experts alone, whose numbers the host waits for once a layer;
            "fixed", all tokens to all ranks, and no wait: by copy engines where the GPUs reach each other's memory,
            else by `torch.distributed`. "auto" is "fixed" for at most 4 ranks with such GPUs, where the tokens of a
            rank are known beforehand (`train`, `Pipeline`, ``parallelize(tokens=...)``), else "counted".
        reshard: let go of gathered weights after each block's forward, and gather them again for its backward: less
            memory, more messages. Without it `train` leaves whole weights on every rank and spreads what the optimiser
            keeps of them (`WholeAdamW`), with one sum of gradients and one message of weights a step.
        overlap: train on two micro-batches at a time, so that the messages of one travel under the computation of the
            other, see `overlapped`. It wants twice the memory between forward and backward, and ``reshard=False``.
        sms: how many SMs of a GPU a message of NCCL may take from what is computed beside it; None leaves it to NCCL.

    Raises:
        ValueError: a number is below 1, an unknown exchange, ``overlap`` with ``reshard`` or a pipeline, or ``tensor``
            beside others.
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
            raise ValueError("overlap: wants reshard=False, and no pipeline")
        if self.sms is not None and self.sms < 1:
            raise ValueError(f"sms: expected at least 1, got {self.sms}")
        if self.tensor > 1 and self.ranks != self.tensor:
            raise ValueError("tensor: is for generation, where data, expert and pipeline are 1")

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.data * self.expert * self.pipeline * self.tensor

    @property
    def batches(self) -> int:
        """How many of them have a batch of their own."""
        return self.data * self.expert

    def check(self, config: Config, ranks: int) -> None:
        """Raises ValueError where it does not fit the model or the number of ranks."""
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
    """The ranks of a run in their groups, as this rank sees them.

    Attributes:
        plan: what they do.
        mesh: of dimensions pipeline, data, expert and tensor; those of an expert group are neighbours.
        batch: of data and expert as one: the ranks that have other text and the same layers.
        device: this rank's.
    """

    plan: Plan
    mesh: DeviceMesh
    batch: DeviceMesh
    device: torch.device

    @classmethod
    def start(cls, plan: Plan, device: torch.device | str | None = None, *, timeout: float = TIMEOUT) -> Team:
        """Joins the ranks that torchrun has started: NCCL where there is a GPU for each, else gloo on the CPU.

        Args:
            plan: for as many ranks as there are.
            device: by default a GPU for each rank, if there is one.
            timeout: seconds after which a rank that waits for one that died ends with an error.

        Raises:
            ValueError: another number of ranks.
        """
        if not dist.is_initialized():
            # Multicast over NVLink has hung shared hosts, and gains nothing that was measured here.
            os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
            os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
            if plan.sms is not None:
                os.environ["NCCL_MAX_CTAS"] = str(plan.sms)  # a CTA of NCCL's holds one SM
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
        """This rank's group along a dimension, or "batch"."""
        return (self.batch if name == "batch" else self.mesh[name]).get_group()

    def place(self, name: str) -> int:
        """This rank's place in that group."""
        return (self.batch if name == "batch" else self.mesh[name]).get_local_rank()

    def total(self, x: Tensor, name: str = "batch") -> Tensor:
        """The sum of a tensor over a group, in place."""
        if self.group(name).size() > 1:
            dist.all_reduce(x, group=self.group(name))
        return x

    def close(self) -> None:
        """Leaves the other ranks."""
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
    """Leaves each rank its part of the experts of every layer; tokens travel in `dtype`, see `parallelize`."""
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
    """What takes the tokens of all layers to all ranks, where the plan wants that; every rank calls it."""
    group, exchange = team.group("expert"), team.plan.exchange
    if exchange == "counted" or (exchange == "auto" and (tokens is None or group.size() > MOST_FIXED)):
        return None
    if tokens is None:
        raise ValueError('exchange: "fixed" wants to know how many tokens a rank brings, `tokens`')
    if not reach_each_other(group):
        return Collective(group) if exchange == "fixed" else None
    return CopyEngines(group, largest_message(tokens, config.hidden_size, config.num_experts_per_tok, dtype))


def expert_modules(model: nn.Module) -> list:
    """The `Experts` of a model or of some of its layers, each with the model's config."""
    from dskernels.model.moe import MoE

    return [(m.experts, m.gate.config) for m in model.modules() if isinstance(m, MoE)]


def most_ranks(config: Config, ranks: int) -> int | None:
    """The most ranks that a token's experts are on, where its groups are limited; None if that is no limit."""
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
    """Tells those who keep something made of a weight, such as its quantised copy, that it has changed.

    FSDP2 gathers a weight into the same memory under the same version number, whatever it has become. The shards that
    it gathers know better.
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
    """A module that FSDP2 gathers at once, and what is in it and not gathered by itself."""
    yield unit
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _of_unit(child)
