"""The model against transformers' DeepseekV3ForCausalLM and DeepseekV2ForCausalLM, through checkpoints both ways."""

import copy
import warnings

import pytest
import torch
from tiny import packed, random_prompts, randomize, tiny_model

from dskernels.model import Config, Yarn, generate, load, save, shift

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

YARN = Yarn(factor=8.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0)
V2 = {"scoring_func": "softmax", "norm_topk_prob": False, "num_nextn_predict_layers": 0}
VARIANTS = {
    "grouped, q_lora": {},
    "no q_lora": {"q_lora_rank": None},
    "ungrouped": {"n_group": 1, "topk_group": 1},
    "gates not normalised": {"norm_topk_prob": False},
    "two shared experts, all layers sparse": {"n_shared_experts": 2, "first_k_dense_replace": 0},
    "all layers dense": {"first_k_dense_replace": 4},
    "yarn": {"rope_scaling": YARN},
    "yarn with scaled cos and sin": {"rope_scaling": Yarn(factor=8.0, mscale=1.0, mscale_all_dim=0.5)},
    "yarn without temperature": {"rope_scaling": Yarn(factor=8.0, mscale_all_dim=0.0), "q_lora_rank": None},
    "yarn, equal betas": {"rope_scaling": Yarn(factor=32.0, beta_fast=1.0, beta_slow=1.0), "rope_theta": 50000.0},
    "V2, ungrouped": {**V2, "n_group": 1, "topk_group": 1, "n_shared_experts": 2},
    "V2, grouped, yarn": {**V2, "routed_scaling_factor": 16.0, "rope_scaling": YARN},
}


def transformers_class(config):
    return (
        transformers.DeepseekV3ForCausalLM if config.scoring_func == "sigmoid" else transformers.DeepseekV2ForCausalLM
    )


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def pair(request, tmp_path):
    """One of our models, and transformers' model loaded from what we saved."""
    model = tiny_model(**request.param)
    save(model, tmp_path)
    theirs = transformers_class(model.config).from_pretrained(tmp_path).eval()
    assert theirs.dtype == torch.float32
    return model, theirs


@torch.no_grad()
def test_logits(pair):
    """Packed against one by one: at most twice as far from their fp64 as their fp32 is, some ulp of logits up to 3."""
    ours, theirs = pair
    prompts = random_prompts(37, 1, 90)
    tokens, cu_seqlens = packed(*prompts)
    got = ours(tokens, cu_seqlens).logits
    expected = torch.cat([theirs(torch.tensor([prompt])).logits[0] for prompt in prompts])
    in_double = copy.deepcopy(theirs).double()
    in_double.config._experts_implementation = "eager"  # torch's grouped product takes no doubles
    exact = torch.cat([in_double(torch.tensor([prompt])).logits[0] for prompt in prompts])
    assert expected.std() > 0.3  # the comparison has something to compare
    off_by = (expected - exact).abs().max()
    assert off_by < 1e-5
    assert (got - exact).abs().max() <= 2 * off_by


@torch.no_grad()
def test_greedy_generation(pair):
    """Absorbed decode over the paged cache, token for token; 12 tokens after 90 pass a page boundary at 96."""
    ours, theirs = pair
    prompts = random_prompts(5, 90)
    got = generate(ours, prompts, max_new_tokens=12, page_size=16).finish()
    for prompt, tokens in zip(prompts, got, strict=True):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert tokens == expected.tolist()


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, V2, {"q_lora_rank": None, "rope_scaling": YARN}], ids=["V3", "V2", "yarn"])
def test_we_load_what_transformers_saves(changes, tmp_path):
    config = Config.from_name("tiny", **{"num_nextn_predict_layers": 0, **changes})
    cls = transformers_class(config)
    theirs = randomize(cls(cls.config_class.from_dict(config.to_hf())).eval())
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load(tmp_path)
    assert ours.config == config
    tokens = torch.randint(0, 257, (50,))
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens[None]).logits[0], rtol=0, atol=1e-5)


def test_mtp_that_transformers_leaves_out(tmp_path):
    """Its config.json announces the MTP module that its save_pretrained does not write."""
    config = transformers.DeepseekV3Config.from_dict(Config.from_name("tiny").to_hf())
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"announces 1 MTP module\(s\), the files have none"):
        assert len(load(tmp_path).mtp) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load(tmp_path, mtp=False).mtp) == 0
    with pytest.raises(ValueError, match=r"tensor model\.layers\.4\..* is missing"):
        load(tmp_path, mtp=True)


@torch.no_grad()
def test_latent_norms_take_the_models_epsilon(tmp_path):
    """transformers leaves the norms of the two latents at 1e-6, whatever the config says."""
    model = tiny_model(rms_norm_eps=1e-2)
    save(model, tmp_path)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(0, 257, (20,))
    assert (model(tokens).logits - theirs(tokens[None]).logits[0]).abs().max() > 1e-3
    for name, module in theirs.named_modules():
        if name.endswith("a_layernorm"):
            module.variance_epsilon = 1e-2
    torch.testing.assert_close(model(tokens).logits, theirs(tokens[None]).logits[0], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("modules", [1, 2])
def test_mtp_modules(tmp_path, monkeypatch, modules):
    """Hidden states and logits of the MTP modules against transformers' own, which reads them from our checkpoint."""
    modeling_layers = pytest.importorskip("transformers.modeling_layers")
    model = tiny_model(num_nextn_predict_layers=modules)
    save(model, tmp_path)
    # transformers finds MTP layers by this pattern, which names the 61 of DeepSeek-V3 alone.
    patterns = [rf"model\.layers\.{4 + k}.*" for k in range(modules)]
    monkeypatch.setattr(transformers.DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", patterns)
    main = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path).eval()
    theirs = modeling_layers.MtpModel.from_pretrained(main).eval()

    tokens = torch.randint(0, 257, (30,))
    cu_seqlens = torch.tensor([0, 30], dtype=torch.int32)
    out = model(tokens, cu_seqlens, mtp=True)
    hidden = main.model(tokens[None]).last_hidden_state
    position_ids = torch.arange(30)[None]
    cos_sin = theirs.rotary_emb(hidden, position_ids=position_ids)
    mask = theirs.create_masks_for_mtp_layer(0, hidden, None, position_ids)
    for k in range(modules):
        embeds = theirs.embed_tokens(shift(tokens, cu_seqlens, k + 1))[None]
        hidden = theirs.layers[k](
            embeds, hidden, position_embeddings=cos_sin, position_ids=position_ids, past_key_values=None, **mask
        )
        torch.testing.assert_close(out.mtp_logits[k], main.lm_head(hidden)[0], rtol=0, atol=1e-5)


def test_casting_keeps_the_router_bias():
    """transformers' `.to(bfloat16)` rounds it; here it stays fp32 and exact."""
    model = tiny_model()
    bias = model.moe_layers[0].gate.e_score_correction_bias.clone()
    assert not torch.equal(bias, bias.bfloat16().float())
    model.to(torch.bfloat16)
    assert torch.equal(model.moe_layers[0].gate.e_score_correction_bias, bias)
    assert model.embed_tokens.weight.dtype == torch.bfloat16
