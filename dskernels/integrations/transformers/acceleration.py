"""`accelerate` and `accelerated`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn

from dskernels.integrations.transformers import paged
from dskernels.integrations.transformers.attention import attention_forward
from dskernels.integrations.transformers.experts import (
    BlockState,
    RouterState,
    block_forward,
    router_forward,
)
from dskernels.integrations.transformers.graphs import Graphs, model_forward
from dskernels.integrations.transformers.interfaces import register
from dskernels.integrations.transformers.latents import AttentionState, Pass
from dskernels.integrations.transformers.linear import GatedState, gated_forward, linear_forward, norm_forward
from dskernels.integrations.transformers.paged import NAME
from dskernels.integrations.transformers.patches import STATE, Patches, Report
from dskernels.integrations.transformers.recognition import (
    is_experts,
    part_of,
    reason_against_activation,
    reason_against_attention,
    reason_against_experts,
    router_options,
)
from dskernels.integrations.transformers.weights import is_fp8_linear, reason_against_fp8
from dskernels.validate import check_bool

OWNER = "_dskernels_acceleration"  # the attribute of an accelerated model


class Acceleration:
    """What was done to a model. Leaving it as a context undoes it.

    Attributes:
        model: the model.
        report: what was replaced, and what was not and why.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.report = Report()
        self._patches = Patches()

    def undo(self) -> None:
        """Makes the model what it was: no weight was changed, and no attribute of ours stays. Twice is no error."""
        self._patches.undo()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def accelerate(model: nn.Module, *, fp8: bool = False, graphs: bool = False, verbose: bool = True) -> Acceleration:
    """Let a model of Hugging Face transformers run on these operations, in place.

    Args:
        model: any model of transformers from 5.17 on. Its weights may still be moved, cast, trained and saved: nothing
            is done to them, and names and types of its modules stay. What recognises nothing changes nothing.
        fp8: multiply by linear layers of the decoder (not by router, embedding and head) and by experts in e4m3,
            forward and backward. The weights stay; their quantised copies are kept beside them until they change. To
            keep them in e4m3 alone, load the model with transformers' ``FineGrainedFP8Config``: such layers are
            multiplied as they are, with or without this.
        graphs: on a GPU, record a decode step as a CUDA graph and replay it, see the module `graphs`. It takes the
            memory of the step's results between its kernels.
        verbose: print the report.

    Returns:
        What was done, with `report` and `undo`.

    Raises:
        TypeError: `model` is no `transformers.PreTrainedModel`, or an option is no bool.
        ValueError: it is accelerated already.

    Outputs agree with the unchanged model's as closely as its own in the same precision agree with fp64, except that
    choices of experts which lie within that error of each other may fall the other way; with e4m3, within its error.
    Attentions are not returned. Calls that ask for what the operations do not compute (static caches, masks of their
    own, gradients through a cache, dropout) are computed by transformers, beside what is replaced in the other layers.
    """
    pretrained = importlib.import_module("transformers").PreTrainedModel
    if not isinstance(model, pretrained):
        raise TypeError(f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}")
    for name, option in (("fp8", fp8), ("graphs", graphs), ("verbose", verbose)):
        check_bool(name, option)
    if OWNER in vars(model):
        raise ValueError("model: expected one that is not accelerated yet; undo that first")
    register()
    acceleration = Acceleration(model)
    patches, report = acceleration._patches, acceleration.report
    try:
        patches.attribute(model, OWNER, True)
        _replace_experts(model, patches, report, fp8)
        _replace_blocks(model, patches, report, fp8)
        shared = _replace_attention(model, patches, report, fp8)
        if graphs and shared is not None:
            _record_steps(model, patches, report, shared)
        _replace_layers(model, patches, report, fp8)
    except BaseException:
        patches.undo()
        raise
    if verbose:
        print(report)
    return acceleration


@contextlib.contextmanager
def accelerated(
    *models: nn.Module, fp8: bool = False, graphs: bool = False, verbose: bool = True
) -> Iterator[list[Acceleration]]:
    """Accelerate models inside a ``with`` block, and undo it at the end of the block.

    ``with accelerated(): model = AutoModel.from_pretrained(...)`` accelerates what `from_pretrained` returns inside.

    Args:
        models: what to accelerate; without any, every model that is loaded inside the block.
        fp8: see :func:`accelerate`.
        graphs: likewise.
        verbose: likewise.

    Yields:
        The `Acceleration` of each model so far; the list grows as models are loaded.

    Raises:
        TypeError, ValueError: as :func:`accelerate`; what was accelerated before is undone.
    """
    done: list[Acceleration] = []
    patches = Patches()
    options: dict[str, Any] = {"fp8": fp8, "graphs": graphs, "verbose": verbose}
    try:
        for model in models:
            done.append(accelerate(model, **options))  # at once, so that all are undone where one cannot be
        if not models:
            _hook_loading(patches, done, options)
        yield done
    finally:
        patches.undo()
        for acceleration in reversed(done):
            acceleration.undo()


def _hook_loading(patches: Patches, done: list[Acceleration], options: dict[str, Any]) -> None:
    """Accelerates what `PreTrainedModel.from_pretrained` returns."""
    owner = importlib.import_module("transformers").PreTrainedModel
    original = vars(owner)["from_pretrained"]

    @functools.wraps(original.__func__)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        loaded = original.__func__(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if OWNER not in vars(model):
            done.append(accelerate(model, **options))
        return loaded

    owner.from_pretrained = classmethod(from_pretrained)

    def undo() -> None:
        owner.from_pretrained = original

    patches.afterwards(undo)


# ---- one kind of part after the other -------------------------------------------------------------------------------


def _replace_experts(model: nn.Module, patches: Patches, report: Report, fp8: bool) -> None:
    """Stacked experts, through `ExpertsInterface`, for each configuration whose experts can all be replaced."""
    by_config: dict[int, list[Any]] = {}
    for module in model.modules():
        if is_experts(module):
            by_config.setdefault(id(module.config), []).append(module)
    for group in by_config.values():
        reasons = [_reason_against_stack(experts) for experts in group]
        reason = next((reason for reason in reasons if reason), None)
        if reason:
            report.kept["experts", reason] += len(group)
            continue
        patches.attribute(group[0].config, "_experts_implementation_internal", NAME)
        for experts in group:
            patches.attribute(experts, STATE, fp8)
        report.replaced["experts"] += len(group)


def _reason_against_stack(experts: Any) -> str | None:
    reason = reason_against_experts(experts)
    if reason is None and experts.gate_up_proj.element_size() == 1:
        reason = reason_against_fp8(experts)
        inner = experts.down_proj.shape[-1]
        if reason is None and inner % 128:
            reason = f"its gate and up of {inner} rows do not end with a block of 128"
    return reason


def _replace_blocks(model: nn.Module, patches: Patches, report: Report, fp8: bool) -> None:
    """Routers, and blocks of router, experts and shared experts."""
    for module in model.modules():
        kind = part_of(module)
        if kind is not None and kind.endswith("router"):
            patches.forward(module, router_forward, RouterState(router_options(kind, module)))
            report.replaced["router"] += 1
    for block in model.modules():
        gate, experts = getattr(block, "gate", None), getattr(block, "experts", None)
        if not isinstance(experts, nn.Module) or STATE not in vars(experts):
            continue
        router = vars(gate).get(STATE) if isinstance(gate, nn.Module) else None
        if isinstance(router, RouterState):
            router.narrow = True
        if part_of(block) == "block with shared experts":
            if reason := reason_against_activation(block.shared_experts):
                report.kept["shared experts", reason] += 1
            else:
                patches.forward(block, block_forward, BlockState(fp8))
                report.replaced["block with shared experts"] += 1


def _replace_attention(model: nn.Module, patches: Patches, report: Report, fp8: bool) -> Pass | None:
    """Latent attention, with the masks and the continuous batching of the model; what its layers share, if that is all
    the attention that there is."""
    shared = Pass()
    configs: dict[int, Any] = {}
    for module in model.modules():
        kind = part_of(module)
        if kind not in ("latent attention", "complex latent attention"):
            if hasattr(module, "kv_b_proj"):
                report.kept["attention", "of latents, but not as in DeepSeek-V3 or V2"] += 1
            elif hasattr(module, "q_proj") and hasattr(module, "o_proj"):
                report.kept["attention", "its cache is not one of latents"] += 1
            continue
        if reason := reason_against_attention(module):
            report.kept["attention", reason] += 1
            continue
        state = AttentionState(shared, kind.startswith("complex"), fp8)
        patches.forward(module, attention_forward, state)
        report.replaced["latent attention"] += 1
        configs[id(module.config)] = module.config
    for config in configs.values():
        patches.attribute(config, "_attn_implementation_internal", NAME)
    if configs:
        _batch_continuously(patches)
    return None if not configs or any(part == "attention" for part, _ in report.kept) else shared


def _record_steps(model: nn.Module, patches: Patches, report: Report, shared: Pass) -> None:
    """Decode steps of a model with a head, as CUDA graphs."""
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        patches.forward(model, model_forward(type(model).forward), Graphs(shared))
        report.replaced["decode step (a CUDA graph, on a GPU)"] += 1


_batching: list[Any] = []  # of each accelerated model one entry: what continuous batching was made of before


def _batch_continuously(patches: Patches) -> None:
    """Continuous batching makes caches of latents for models with our attention; others notice nothing."""
    api: Any = importlib.import_module(paged.API)
    manager = api.ContinuousBatchingManager
    cache, switch = api.PagedAttentionCache, manager.switch_to_cb_friendly_attn
    if not _batching:
        api.PagedAttentionCache = functools.partial(paged.latent_paged_cache, cache)
        manager.switch_to_cb_friendly_attn = functools.partialmethod(paged.keep_attention, switch)
    _batching.append((cache, switch))

    def undo() -> None:
        before = _batching[0]
        _batching.pop()
        if not _batching:
            api.PagedAttentionCache, manager.switch_to_cb_friendly_attn = before

    patches.afterwards(undo)


def _replace_layers(model: Any, patches: Patches, report: Report, fp8: bool) -> None:
    """Norms, linear layers in e4m3, and the gated networks made of them."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if part_of(module) == "norm":
            patches.forward(module, norm_forward, True)
            report.replaced["norm"] += 1
        elif is_fp8_linear(module):
            if reason := reason_against_fp8(module):
                report.kept["linear layer in fp8", reason] += 1
            else:
                patches.forward(module, linear_forward, True)
                report.replaced["linear layer in fp8"] += 1
        elif fp8 and type(module) is nn.Linear and module is not head:
            if module.weight.dtype == torch.float64:
                report.kept["linear layer", "fp64 is not quantised"] += 1
                continue
            patches.forward(module, linear_forward, True)
            report.replaced["linear layer, multiplied in fp8"] += 1
    for module in model.modules():
        layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(isinstance(layer, nn.Module) and STATE in vars(layer) for layer in layers):
            continue
        if type(module).__name__.endswith("MLP") and reason_against_activation(module) is None:
            patches.forward(module, gated_forward, GatedState())
            report.replaced["gated network in fp8"] += 1
