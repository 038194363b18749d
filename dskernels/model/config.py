"""The shape of a model: one frozen dataclass, and reading and writing Hugging Face's ``config.json``."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

# How each architecture in config.json routes. Both have the same attention, blocks and tensor names.
ARCHITECTURES = {"DeepseekV3ForCausalLM": "sigmoid", "DeepseekV2ForCausalLM": "softmax"}
TOPK_METHODS = {"sigmoid": ("noaux_tc",), "softmax": ("greedy", "group_limited_greedy")}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "max_position_embeddings",
)


class ParameterCount(NamedTuple):
    """Number of matrix and embedding parameters (norms and router biases are not counted).

    Attributes:
        total: all of the main model.
        active: those a token is multiplied by: no embedding, ``num_experts_per_tok`` routed experts a layer.
        mtp: what the MTP modules add of their own (they share embedding and head with the main model).
    """

    total: int
    active: int
    mtp: int


@dataclass(frozen=True)
class Yarn:
    """Context extension by YaRN (arXiv 2309.00071), with DeepSeek's choice of attention temperature.

    Attributes:
        factor: how many times longer the context becomes.
        original_max_position_embeddings: the context of the pre-training.
        beta_fast: dimensions that turn more often than this within the original context keep their frequency.
        beta_slow: dimensions that turn less often than this are interpolated; between the two a linear ramp.
        mscale: cos and sin are scaled by ``m(mscale) / m(mscale_all_dim)``, ``m(s) = 0.1 s ln(factor) + 1``.
        mscale_all_dim: the softmax scale is multiplied by ``m(mscale_all_dim)^2``; 0 leaves it alone.
    """

    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            if not getattr(self, name) > 0:
                raise ValueError(f"rope_scaling: {name} must be more than 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Config:
    """Every number that defines a model. Fields carry the names of Hugging Face's ``config.json``.

    Attributes:
        vocab_size: rows of the embedding and of the head.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the dense feed-forward blocks.
        moe_intermediate_size: inner width of one expert.
        num_hidden_layers: transformer blocks, without the MTP modules.
        first_k_dense_replace: how many of the first blocks have a dense feed-forward instead of experts.
        num_attention_heads: heads.
        q_lora_rank: rank of the compressed query; None projects queries directly.
        kv_lora_rank: width of the latent that is cached in place of keys and values.
        qk_nope_head_dim: width of a head's query and key without position.
        qk_rope_head_dim: width of the rotated part, whose key all heads share.
        v_head_dim: width of a head's value.
        n_routed_experts: experts a token may be sent to.
        num_experts_per_tok: experts a token is sent to.
        n_shared_experts: experts that every token goes through (kept as one feed-forward, this many times as wide).
        n_group: groups that the routed experts are divided into.
        topk_group: groups a token may choose its experts from.
        scoring_func: "sigmoid" with a selection bias (DeepSeek-V3) or "softmax" without one (DeepSeek-V2).
        norm_topk_prob: whether the gates of the chosen experts are divided by their sum.
        routed_scaling_factor: what the gates are multiplied by.
        num_nextn_predict_layers: multi-token prediction modules.
        rope_theta: base of the rotary frequencies.
        rope_scaling: YaRN, or None for plain rotary embedding.
        max_position_embeddings: the longest context.
        rms_norm_eps: epsilon of every RMSNorm, those of the two latents included.
        initializer_range: standard deviation of the initial weights (report section 4.2: 0.006).
        bos_token_id: token that starts a text, None if there is none.
        eos_token_id: tokens that end a text.

    Raises:
        ValueError: a field is out of range, or two of them do not fit each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_group: int = 1
    topk_group: int = 1
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in SIZES:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not (self.rope_theta > 1 and self.rms_norm_eps >= 0):
            raise ValueError(
                f"rope_theta must be more than 1 and rms_norm_eps not negative, got {self.rope_theta} and "
                f"{self.rms_norm_eps}"
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even (pairs are rotated), got {self.qk_rope_head_dim}")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace must be in [0, num_hidden_layers = {self.num_hidden_layers}], "
                f"got {self.first_k_dense_replace}"
            )
        if self.n_shared_experts < 0 or self.num_nextn_predict_layers < 0:
            raise ValueError("n_shared_experts and num_nextn_predict_layers must not be negative")
        if self.scoring_func not in TOPK_METHODS:
            raise ValueError(f'scoring_func must be "sigmoid" or "softmax", got {self.scoring_func!r}')
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_group {self.n_group} does not divide n_routed_experts {self.n_routed_experts}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group {self.topk_group} is more than n_group {self.n_group}")
        reachable = self.topk_group * self.n_routed_experts // self.n_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than the {reachable} experts of "
                f"{self.topk_group} of {self.n_group} groups"
            )

    @classmethod
    def from_name(cls, name: str, **changes: Any) -> Config:
        """The preset called ``name``, with the fields in ``changes`` replaced.

        Raises:
            ValueError: there is no such preset; the message lists those that exist.
        """
        from dskernels.model.presets import PRESETS  # a circular import: presets are instances of this class

        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return PRESETS[name].replace(**changes)

    def replace(self, **changes: Any) -> Config:
        """A copy of this config with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> Config:
        """Reads Hugging Face's description of a model.

        Args:
            source: a folder with a ``config.json``, the file itself, or its content as a dict.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not JSON, a field is missing, or it describes a model that this library does not
                implement.
        """
        if isinstance(source, Mapping):
            return _read_hf(source, "config")
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return _read_hf(read_json(path), str(path))

    def to_hf(self) -> dict[str, Any]:
        """The content of a ``config.json`` that ``transformers``, vLLM and SGLang read."""
        sigmoid = self.scoring_func == "sigmoid"
        values: dict[str, Any] = {
            "architectures": ["DeepseekV3ForCausalLM" if sigmoid else "DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        }
        values.update(dataclasses.asdict(self))
        if sigmoid:
            values["topk_method"] = "noaux_tc"
        else:
            values["topk_method"] = "greedy" if self.n_group == 1 else "group_limited_greedy"
        values["rope_scaling"] = None if self.rope_scaling is None else {"type": "yarn", **values["rope_scaling"]}
        eos = list(self.eos_token_id)
        values["eos_token_id"] = (eos[0] if eos else None) if len(eos) < 2 else eos
        values.update(
            hidden_act="silu",
            attention_bias=False,
            moe_layer_freq=1,
            num_key_value_heads=self.num_attention_heads,
            rope_interleave=True,
            tie_word_embeddings=False,
        )
        return values

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query and key, both parts."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of a cached token: its latent and its rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def parameter_count(self) -> ParameterCount:
        """Number of matrix and embedding parameters: in total, used by one token, and in the MTP modules."""
        h, heads = self.hidden_size, self.num_attention_heads
        q_width, kv_width = heads * self.qk_head_dim, heads * (self.qk_nope_head_dim + self.v_head_dim)
        attention = h * q_width if self.q_lora_rank is None else self.q_lora_rank * (h + q_width)
        attention += h * self.latent_dim + self.kv_lora_rank * kv_width + heads * self.v_head_dim * h
        expert = 3 * h * self.moe_intermediate_size
        always = h * self.n_routed_experts + self.n_shared_experts * expert  # gate and shared experts
        dense_layers = self.first_k_dense_replace
        moe_layers = self.num_hidden_layers - dense_layers
        trunk = self.num_hidden_layers * attention + dense_layers * 3 * h * self.intermediate_size + moe_layers * always
        vocabulary = self.vocab_size * h
        routed = self.n_routed_experts * expert
        return ParameterCount(
            total=trunk + moe_layers * routed + 2 * vocabulary,
            active=trunk + moe_layers * self.num_experts_per_tok * expert + vocabulary,
            mtp=self.num_nextn_predict_layers * (2 * h * h + attention + always + routed),
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file.

    Raises:
        ValueError: it is not JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _read_hf(values: Mapping[str, Any], where: str) -> Config:
    architectures = values.get("architectures") or [f"model_type {values.get('model_type')}"]
    architecture = str(architectures[0] if isinstance(architectures, list | tuple) else architectures)
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{where}: unknown architecture {architecture}; known are {', '.join(ARCHITECTURES)}")
    scoring = ARCHITECTURES[architecture]
    fixed = {  # fields that vary in other models but not in these
        "attention_bias": False,
        "hidden_act": "silu",
        "mlp_bias": False,
        "moe_layer_freq": 1,
        "rope_interleave": True,
        "scoring_func": scoring,
        "tie_word_embeddings": False,
    }
    for name, expected in fixed.items():
        if values.get(name) not in (None, expected):
            raise ValueError(f"{where}: {name} = {values[name]!r} is not implemented, only {expected!r} is")
    method = values.get("topk_method") or TOPK_METHODS[scoring][0]
    if method not in TOPK_METHODS[scoring]:
        raise ValueError(f"{where}: topk_method = {method!r} is not implemented for {architecture}")

    known = _known(values, Config, where)
    known["scoring_func"] = scoring
    if method == "greedy":
        known["n_group"] = known["topk_group"] = 1
    # transformers renamed this field in 5.x and reads both names.
    if values.get("num_mtp_layers"):
        known.setdefault("num_nextn_predict_layers", _number(values, "num_mtp_layers", int, where))
    known.setdefault("norm_topk_prob", scoring == "sigmoid")
    if scoring == "softmax" and known["norm_topk_prob"] and known.get("routed_scaling_factor", 1.0) != 1.0:
        # With norm_topk_prob, DeepSeek-V2's own code leaves out the scale, and transformers leaves out the
        # normalisation.
        raise ValueError(
            f"{where}: norm_topk_prob together with routed_scaling_factor has no agreed meaning with softmax"
        )
    known["rope_theta"], known["rope_scaling"] = _read_rope(values, where)
    eos = values.get("eos_token_id")
    known["eos_token_id"] = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if not all(type(token) is int for token in known["eos_token_id"]):
        raise ValueError(f"{where}: eos_token_id must be tokens, got {eos!r}")
    required = {f.name for f in dataclasses.fields(Config) if f.default is dataclasses.MISSING}
    if missing := sorted(required - known.keys()):
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    try:
        return Config(**known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _read_rope(values: Mapping[str, Any], where: str) -> tuple[float, Yarn | None]:
    """The rotary base and scaling, from ``rope_theta`` and ``rope_scaling``, or from transformers 5's
    ``rope_parameters``."""
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise ValueError(f"{where}: rope_scaling must be an object, got {scaling!r}")
    of = scaling if scaling.get("rope_theta") else values
    theta = float(_number(of, "rope_theta", float, where)) if of.get("rope_theta") is not None else 10000.0
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ValueError(f"{where}: rope scaling {kind!r} is not implemented, only 'yarn' is")
    if scaling.get("truncate") is False or scaling.get("attention_factor") is not None:
        raise ValueError(f"{where}: yarn with truncate = false or its own attention_factor is not implemented")
    if not scaling.get("factor"):
        raise ValueError(f"{where}: yarn needs a factor")
    given = _known(scaling, Yarn, f"{where}: rope_scaling")
    # Absent fields have the meaning that they have in DeepSeek's code: no temperature unless mscale_all_dim is given.
    try:
        return theta, Yarn(**{"mscale_all_dim": 0.0, **given})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _known(values: Mapping[str, Any], cls: type, where: str) -> dict[str, Any]:
    """Those entries that are fields of a dataclass, with their types checked."""
    known = {}
    for f in dataclasses.fields(cls):
        value, kind = values.get(f.name), str(f.type).removesuffix(" | None")
        if value is None:
            continue
        if kind in ("int", "float"):
            _number(values, f.name, int if kind == "int" else float, where)
        elif kind == "bool" and not isinstance(value, bool):
            raise ValueError(f"{where}: {f.name} must be true or false, got {value!r}")
        known[f.name] = value
    return known


def _number(values: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """A JSON number of this type: true is not a number, 64.0 is not a size, and infinity is refused."""
    value = values[name]
    right = type(value) is int or (kind is float and type(value) is float and math.isfinite(value))
    if not right:
        raise ValueError(f"{where}: {name} must be {'a whole number' if kind is int else 'a number'}, got {value!r}")
    return value
