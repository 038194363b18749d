"""Recognise the parts of a model that these operations can compute."""

from __future__ import annotations

import functools
import importlib
import inspect
import textwrap
from typing import Any

from torch import nn

SILU = ("silu", "swish")
_V2, _V3, _QWEN3 = (
    f"transformers.models.{name}.modeling_{name}" for name in ("deepseek_v2", "deepseek_v3", "qwen3_moe")
)
# A part of another model counts as one of these if the source of its forward reads the same: transformers copies such
# parts verbatim from one modelling file to the next, and checks that the copies stay equal.
ORIGINALS = {
    "sigmoid router": f"{_V3}:DeepseekV3TopkRouter",
    "grouped softmax router": f"{_V2}:DeepseekV2TopkRouter",
    "softmax router": f"{_QWEN3}:Qwen3MoeTopKRouter",
    "latent attention": f"{_V3}:DeepseekV3Attention",
    "complex latent attention": f"{_V2}:DeepseekV2Attention",
    "block with shared experts": f"{_V3}:DeepseekV3MoE",
    "norm": f"{_V3}:DeepseekV3RMSNorm",
}


def part_of(module: nn.Module) -> str | None:
    """The key of `ORIGINALS` whose forward is the same as the module's, or None."""
    return _part_with(type(module).forward)


@functools.cache
def _part_with(forward: Any) -> str | None:
    text = _text(forward)
    return None if text is None else _texts().get(text)


@functools.cache
def _texts() -> dict[str, str]:
    """The source texts of the forwards of `ORIGINALS`, with their keys."""
    found = {}
    for kind, place in ORIGINALS.items():
        module, _, name = place.partition(":")
        text = _text(getattr(importlib.import_module(module), name).forward)
        if text is not None:
            found[text] = kind
    return found


def _text(forward: Any) -> str | None:
    """The source of a forward; None if there is none."""
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))
    except (OSError, TypeError):
        return None


def router_options(kind: str, router: Any) -> dict[str, Any]:
    """The options of `dskernels.route_hidden` that correspond to a router of this kind."""
    if kind == "softmax router":
        return {"top_k": router.top_k, "score": "softmax", "normalize": bool(router.norm_topk_prob)}
    options = {"top_k": router.top_k, "scale": float(router.routed_scaling_factor)}
    if kind == "grouped softmax router":
        grouped = router.topk_method == "group_limited_greedy"
        groups = (router.num_group, router.topk_group) if grouped else (1, 1)
        options |= {"score": "softmax", "normalize": False}
    else:
        groups = (router.num_group, router.topk_group)
        options |= {"score": "sigmoid", "normalize": bool(router.norm_topk_prob)}
    return options | {"n_groups": groups[0] or 1, "top_groups": groups[1] or 1}


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked experts that transformers calls through its `ExpertsInterface`."""
    return hasattr(module, "is_concatenated") and hasattr(module, "down_proj") and hasattr(module, "num_experts")


def reason_against_experts(experts: Any) -> str | None:
    """Why `dskernels.fused_experts` does not compute what these stacked experts do, or None."""
    if not experts.has_gate or not experts.is_concatenated or experts.is_transposed or experts.has_bias:
        return "expected gate and up stacked one after the other, [E, 2I, H], without a bias"
    default = importlib.import_module("transformers.integrations.moe")._default_apply_gate
    if type(experts)._apply_gate is not default and not _is_plain_fp8_gate(experts):
        return "it gates in its own way"
    if reason := reason_against_activation(experts):
        return reason
    if getattr(experts, "has_post_expert_norm", False) or getattr(experts, "_is_expert_parallel", False):
        return "its experts are spread over processes, or normed"
    return None


def _is_plain_fp8_gate(experts: Any) -> bool:
    """Whether fine-grained fp8 experts, which support several activations, use plain SiLU gating here."""
    return type(experts).__name__ == "FP8Experts" and not any(
        getattr(experts, name, None) for name in ("limit", "swiglu_limit", "swiglu_alpha")
    )


def reason_against_activation(module: Any) -> str | None:
    """Why the activation of a gated network is not SiLU, or None."""
    activation = getattr(module, "act_fn", None)
    name = type(activation).__name__.lower()
    if isinstance(activation, nn.SiLU) or name.removesuffix("activation") in SILU or activation is nn.functional.silu:
        return None
    return f"the activation is {type(activation).__name__}, not SiLU"


def reason_against_attention(attention: Any) -> str | None:
    """Why the operations do not compute this latent attention, although its forward is known, or None."""
    config = attention.config
    if not getattr(config, "rope_interleave", True):
        return "it rotates halves of the key, not adjacent pairs"
    if not getattr(config, "is_causal", True):
        return "it is not causal"
    if attention.num_key_value_groups != 1:
        return "several heads share keys and values"
    if attention.kv_b_proj.bias is not None:
        return "kv_b_proj has a bias"
    return None
