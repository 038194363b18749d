"""Random models of transformers, small enough for a CPU, of the families that share DeepSeek-V3's parts."""

import torch

SIZES = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
EXPERTS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
FAMILIES = {
    "V3": ("DeepseekV3", {**LATENT, **EXPERTS}),
    "V3, yarn, no q_lora": ("DeepseekV3", {**LATENT, **EXPERTS, "q_lora_rank": None, "rope_parameters": YARN}),
    "Moonlight": (
        "DeepseekV3",
        {**LATENT, **EXPERTS, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2},
    ),
    "Kimi-K2": ("DeepseekV3", {**LATENT, **EXPERTS, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827}),
    "V2": (
        "DeepseekV2",
        {**LATENT, **EXPERTS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
    ),
    "V2-Lite": (
        "DeepseekV2",
        {**LATENT, **EXPERTS, "q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 2},
    ),
    "Qwen3-MoE": ("Qwen3Moe", {"num_experts": 8, "num_experts_per_tok": 4, "head_dim": 16, "norm_topk_prob": True}),
    "GLM-4.5": ("Glm4Moe", {**EXPERTS, "n_group": 1, "topk_group": 1, "head_dim": 16, "use_qk_norm": True}),
}


def tiny_model(family, *, seed=0, **changes):
    """A random model, in fp32 and ready to generate; biases of the router are random too."""
    import transformers

    name, options = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.normal_(1.0, 0.2)
        for key, buffer in model.named_buffers():
            if "e_score_correction_bias" in key:
                buffer.normal_(0.0, 0.3)
    return model
