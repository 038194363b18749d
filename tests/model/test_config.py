"""Shapes, counts, rotary frequencies and the two directions of config.json."""

import json
import math

import pytest
import torch

from dskernels.model import PRESETS, Config, DeepseekV3, LatentCache, Yarn
from dskernels.model.rope import Rope, frequencies, softmax_scale

# config.json of DeepSeek-V3 as published, without the fields that do not describe the model.
V3_JSON = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.006,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_parameter_counts_of_deepseek_v3():
    count = Config.from_name("deepseek-v3").parameter_count()
    assert count.total == 671_025_397_760
    assert round(count.active / 1e9, 2) == 36.62
    assert round(count.mtp / 1e9, 2) == 11.61


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_the_model(name):
    config = Config.from_name(name)
    model = DeepseekV3(config, device="meta")
    matrices = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1}
    count = config.parameter_count()
    assert sum(n for name, n in matrices.items() if not name.startswith("mtp.")) == count.total
    assert sum(n for name, n in matrices.items() if name.startswith("mtp.")) == count.mtp


def test_latent_cache_bytes_of_deepseek_v3():
    """70,272 bytes a token over 61 layers in bf16 (report section 2.1.1 and facts of the release)."""
    config = Config.from_name("deepseek-v3", num_nextn_predict_layers=0)
    cache = LatentCache(config, pages=1, page_size=1, device="meta")
    assert cache.data.nbytes == 70_272
    assert LatentCache(config, pages=1, page_size=1, dtype=torch.float8_e4m3fn, device="meta").data.shape[-1] == 656


@pytest.mark.parametrize("name", PRESETS)
def test_config_json_round_trip(name):
    config = Config.from_name(name)
    assert Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_published_config_is_the_preset(tmp_path):
    assert Config.from_hf(V3_JSON) == Config.from_name("deepseek-v3")
    (tmp_path / "config.json").write_text(json.dumps(V3_JSON))
    assert Config.from_hf(tmp_path) == Config.from_hf(tmp_path / "config.json") == Config.from_name("deepseek-v3")


def test_rope_parameters_of_transformers_5():
    values = {**V3_JSON, "rope_theta": None, "rope_scaling": None}
    values["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "yarn", **V3_JSON["rope_scaling"]}
    assert Config.from_hf(values) == Config.from_name("deepseek-v3")
    values["rope_parameters"] = {"rope_theta": 50000.0, "rope_type": "default"}
    read = Config.from_hf(values)
    assert (read.rope_theta, read.rope_scaling) == (50000.0, None)


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_our_config(name):
    transformers = pytest.importorskip("transformers")
    config = Config.from_name(name)
    v3 = config.scoring_func == "sigmoid"
    read = (transformers.DeepseekV3Config if v3 else transformers.DeepseekV2Config).from_dict(config.to_hf())
    same = "vocab_size hidden_size q_lora_rank n_routed_experts num_experts_per_tok routed_scaling_factor rms_norm_eps"
    for field in same.split():
        assert getattr(read, field) == getattr(config, field), field
    assert read.rope_parameters["rope_theta"] == config.rope_theta
    assert read.rope_parameters["rope_type"] == ("yarn" if config.rope_scaling else "default")
    assert (
        Config.from_hf({**read.to_dict(), "architectures": config.to_hf()["architectures"]}).replace(
            initializer_range=config.initializer_range
        )
        == config
    )


def test_softmax_scale_of_deepseek_v3():
    assert softmax_scale(Config.from_name("deepseek-v3")) == pytest.approx(0.1352338, abs=5e-8)
    assert softmax_scale(Config.from_name("moonlight")) == pytest.approx(192**-0.5)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "kimi-k2", "moonlight"])
def test_frequencies_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    rope = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = Config.from_name(name)
    theirs = rope.DeepseekV3RotaryEmbedding(transformers.DeepseekV3Config.from_dict(config.to_hf()))
    torch.testing.assert_close(frequencies(config), theirs.inv_freq, rtol=1e-6, atol=0)
    assert Rope(config).scale == pytest.approx(theirs.attention_scaling)


def test_ramp_without_width():
    """Both ends of the ramp on the same pair: kept up to it, interpolated after it, and no division of zero by zero."""
    # beta such that the pair index is a whole number: dim * ln(context / (2 pi beta)) / (2 ln base) = 8
    beta = 4096 / (2 * math.pi * 10000.0 ** (8 * 2 / 64))
    yarn = Yarn(factor=4.0, beta_fast=beta, beta_slow=beta)
    got = frequencies(Config.from_name("deepseek-v3", rope_scaling=yarn))
    plain = frequencies(Config.from_name("deepseek-v3", rope_scaling=None))
    ratio = plain / got
    assert ratio.isfinite().all()
    torch.testing.assert_close(ratio[:8], torch.ones(8))
    torch.testing.assert_close(ratio[10:], torch.full((22,), 4.0))


@pytest.mark.parametrize(
    "change", [lambda m: m.to(torch.bfloat16), lambda m: m.to_empty(device="cpu"), lambda m: m.half()]
)
def test_frequencies_stay_exact(change):
    config = Config.from_name("tiny")
    rope = change(Rope(config))
    assert torch.equal(rope.frequencies, frequencies(config))
    cos, sin = rope(torch.tensor([0, 1000]))
    assert cos.dtype == sin.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"q_lora_rank": 0}, "q_lora_rank"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim must be even"),
        ({"first_k_dense_replace": 5}, "first_k_dense_replace"),
        ({"n_shared_experts": -1}, "n_shared_experts"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
        ({"scoring_func": "relu"}, "scoring_func"),
        ({"n_group": 3}, "n_group 3 does not divide"),
        ({"topk_group": 5}, "topk_group 5 is more than n_group 4"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than the 8 experts"),
    ],
)
def test_impossible_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        Config.from_name("tiny", **changes)


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match=r"no preset 'deepseek'; there are deepseek-v3, deepseek-v2,"):
        Config.from_name("deepseek")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "unknown architecture LlamaForCausalLM"),
        ({"architectures": None, "model_type": "llama"}, "unknown architecture model_type llama"),
        ({"attention_bias": True}, "attention_bias = True is not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ({"rope_interleave": False}, "rope_interleave = False"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope scaling 'linear' is not implemented"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn needs a factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}}, "truncate"),
        ({"hidden_size": None}, "missing hidden_size"),
        ({"n_group": 7}, "n_group 7 does not divide"),
    ],
)
def test_configs_of_other_models(changes, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**V3_JSON, **changes}))
    with pytest.raises(ValueError, match=message) as error:
        Config.from_hf(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_softmax_with_normalised_and_scaled_gates_is_refused():
    values = {**Config.from_name("deepseek-v2").to_hf(), "norm_topk_prob": True}
    with pytest.raises(ValueError, match="norm_topk_prob"):
        Config.from_hf(values)


def test_greedy_selection_ignores_the_groups():
    values = {**Config.from_name("deepseek-v2-lite").to_hf(), "topk_method": "greedy", "n_group": 8, "topk_group": 3}
    assert (Config.from_hf(values).n_group, Config.from_hf(values).topk_group) == (1, 1)


def test_unreadable_config_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object, got list"):
        Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**V3_JSON, "hidden_size": "wide"}))
    with pytest.raises(ValueError, match=r"config\.json: hidden_size must be a whole number, got 'wide'"):
        Config.from_hf(tmp_path)


@pytest.mark.parametrize("name", [*V3_JSON, *(f"rope_scaling.{name}" for name in V3_JSON["rope_scaling"])])
def test_nonsense_in_any_field_is_one_line(name, tmp_path):
    """Each field with each kind of JSON value: a model, or one line that names the file."""
    path = tmp_path / "config.json"
    for junk in (None, True, -1, 0, 1, 2.5, 1e40, "", "x", [], [None], {}, {"a": 1}):
        outer, _, inner = name.partition(".")
        value = {**V3_JSON["rope_scaling"], inner: junk} if inner else junk
        path.write_text(json.dumps({**V3_JSON, outer: value}))
        try:
            config = Config.from_hf(tmp_path)
            DeepseekV3(
                config.replace(num_hidden_layers=min(config.num_hidden_layers, 4), first_k_dense_replace=0),
                device="meta",
            )
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017 - some of it is sensible
            assert "\n" not in str(error)  # noqa: PT017


# config.json of the others as published, without the fields that do not describe the model.
V2_LITE_JSON = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
MOONLIGHT_JSON = {
    **V2_LITE_JSON,
    "architectures": ["DeepseekV3ForCausalLM"],
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "vocab_size": 163840,
}
KIMI_K2_JSON = {
    **V3_JSON,
    "aux_loss_alpha": 0.001,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**V3_JSON["rope_scaling"], "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}


@pytest.mark.parametrize(
    ("name", "values"),
    [("deepseek-v2-lite", V2_LITE_JSON), ("moonlight", MOONLIGHT_JSON), ("kimi-k2", KIMI_K2_JSON)],
)
def test_published_configs_are_the_presets(name, values):
    assert Config.from_hf(values) == Config.from_name(name)
