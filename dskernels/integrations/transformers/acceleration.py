"""`accelerate` and `accelerated`: replace the parts of a transformers model, and put them back."""

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

OWNER = "_dskernels_acceleration"  # the attribute that marks a model as accelerated


class Acceleration:
    """An accelerated model and the means to undo it; used as a context manager, it undoes at the end of the block.

    Attributes:
        model: the model.
        report: what was replaced, what was left alone, and why.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.report = Report()
        self._patches = Patches()

    def undo(self) -> None:
        """Restore the model: no weight was changed, no attribute of ours remains. Calling it twice is no error."""
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
        model: any model of transformers 5.17 or newer. It can still be moved, cast, trained and saved: its weights, and
            the names and types of its modules, do not change. A model without any part that is recognised stays as it
            is.
        fp8: also multiply by plain weights in e4m3, forward and backward: the decoder's linear layers (not router,
            embedding and head) and the experts. The weights stay, and quantised copies are kept beside them until they
            change. To store weights in e4m3 only, load the model with transformers' ``FineGrainedFP8Config`` instead:
            such layers are multiplied in e4m3 with or without this option.
        graphs: on a GPU, capture the decode step as a CUDA graph and replay it (see the module `graphs`). The graph
            occupies the memory of the intermediate results of one step.
        verbose: print the report.

    Returns:
        The `Acceleration`, with `report` and `undo`.

    Raises:
        TypeError: `model` is not a `transformers.PreTrainedModel`, or an option is not a bool.
        ValueError: the model is accelerated already.

    Outputs are as close to the unchanged model's as its own outputs in the same precision are to fp64; with e4m3,
    within the error of e4m3. One exception: where the scores of two experts differ by less than that error, the other
    one may be chosen. Attention weights (``output_attentions``) are not returned. transformers itself computes the
    calls that the operations do not support: static caches, custom masks, gradients through a cache, dropout. Other
    layers stay accelerated during such calls.
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
    """Accelerate models inside a ``with`` block, and restore them at its end.

    ``with accelerated(): model = AutoModel.from_pretrained(...)`` accelerates what `from_pretrained` returns inside.

    Args:
        models: the models to accelerate; if there are none, every model that is loaded inside the block.
        fp8: see :func:`accelerate`.
        graphs: see :func:`accelerate`.
        verbose: see :func:`accelerate`.

    Yields:
        A list with the `Acceleration` of each model; it grows as models are loaded.

    Raises:
        TypeError, ValueError: as :func:`accelerate`; models that were accelerated before the failing one are restored.
    """
    done: list[Acceleration] = []
    patches = Patches()
    options: dict[str, Any] = {"fp8": fp8, "graphs": graphs, "verbose": verbose}
    try:
        for model in models:
            done.append(accelerate(model, **options))  # one by one, so that if one is refused, the others are undone
        if not models:
            _hook_loading(patches, done, options)
        yield done
    finally:
        patches.undo()
        for acceleration in reversed(done):
            acceleration.undo()


def _hook_loading(patches: Patches, done: list[Acceleration], options: dict[str, Any]) -> None:
    """Accelerate whatever `PreTrainedModel.from_pretrained` returns, until undone."""
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


# ---- one function for each kind of part ------------------------------------------------------------------------------


def _replace_experts(model: nn.Module, patches: Patches, report: Report, fp8: bool) -> None:
    """Replace stacked experts, through transformers' `ExpertsInterface`.

    The interface is chosen in the configuration, so all experts that share one are replaced, or none of them.
    """
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
    """Replace routers, and blocks that consist of a router, experts and shared experts."""
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
    """Replace latent attention, and with it the model's masks and continuous batching.

    Returns the state that the attention layers share, or None if the model also has attention of another kind.
    """
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
    """Capture the decode steps of a model that has a head as CUDA graphs."""
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        patches.forward(model, model_forward(type(model).forward), Graphs(shared))
        report.replaced["decode step (a CUDA graph, on a GPU)"] += 1


_batching: list[Any] = []  # one entry for each accelerated model: what it replaced in transformers


def _batch_continuously(patches: Patches) -> None:
    """Let continuous batching make caches of latents for models that use our attention; other models are unaffected."""
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
    """Replace norms, linear layers that multiply in e4m3, and gated networks made of such layers."""
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
