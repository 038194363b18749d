"""Kept fp8 weights that share a launch are stored as one: what multiplies the hidden state, and all experts."""

import pytest
import torch
from test_checkpoint_fp8 import as_bytes, assert_same_bytes, read_folder
from tiny import packed, random_prompts, tiny_model

from dskernels.model import Batch, LatentCache, generate, keep_in_fp8, load, save

WHOLE = {
    "hidden_size": 192,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
}
CONFIGS = {
    "compressed query": {"q_lora_rank": 128},
    "query of the hidden state, two shared experts": {
        "q_lora_rank": None,
        "num_attention_heads": 8,
        "n_shared_experts": 2,
    },
    "none shared": {"n_shared_experts": 0},
}


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def config(request):
    return {**WHOLE, **CONFIGS[request.param]}


@pytest.fixture
def saved(tmp_path, config):
    save(tiny_model(**config), tmp_path / "a", fp8=True)
    return tmp_path / "a"


def test_where_the_weights_are(saved, config):
    model, tensors = load(saved, fp8=True), read_folder(saved)
    attention, mlp = model.layers[1].self_attn, model.layers[1].mlp
    prefix = "model.layers.1"
    if config.get("q_lora_rank", 48) != 48:  # 48 rows are not whole blocks
        names = ["q_proj" if config["q_lora_rank"] is None else "q_a_proj", "kv_a_proj_with_mqa"]
        assert [getattr(attention, name) for name in names] == [None, None]
        together = torch.cat([tensors[f"{prefix}.self_attn.{name}.weight"].view(torch.uint8) for name in names])
        assert torch.equal(attention.qkv_a_proj.weight.view(torch.uint8), together)
    else:
        assert attention.qkv_a_proj is None
    n_shared = config.get("n_shared_experts", 1)
    assert mlp.shared_experts is None
    assert mlp.experts.n_shared == n_shared
    assert mlp.experts.w13.shape[0] == 4 + n_shared
    for e in range(n_shared):
        half = slice(128 * e, 128 * (e + 1))
        gate, up, down = (tensors[f"{prefix}.mlp.shared_experts.{n}_proj.weight"] for n in ("gate", "up", "down"))
        w13, w2 = mlp.experts.w13[4 + e].view(torch.uint8), mlp.experts.w2[4 + e].view(torch.uint8)
        assert torch.equal(w13, torch.cat((gate[half], up[half])).view(torch.uint8))
        assert torch.equal(w2, down[:, half].view(torch.uint8))


def test_written_back_to_the_byte(saved, tmp_path):
    save(load(saved, fp8=True), tmp_path / "b", shard_size=100_000)
    assert_same_bytes(saved, tmp_path / "b")
    save(load(saved, fp8=True), tmp_path / "c", fp8=False)
    want, got = load(saved).state_dict(), load(tmp_path / "c").state_dict()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_keeping_in_fp8_is_what_a_checkpoint_does(tmp_path, config):
    save(tiny_model(**config), tmp_path / "plain")
    save(tiny_model(**config), tmp_path / "fp8", fp8=True)  # other weights, of the same shapes
    kept = keep_in_fp8(load(tmp_path / "plain", fp8=True, trainable=True)).state_dict()
    read = load(tmp_path / "plain", fp8=True).state_dict()
    assert kept.keys() == read.keys() == load(tmp_path / "fp8", fp8=True).state_dict().keys()
    for name, tensor in kept.items():
        assert as_bytes(tensor) == as_bytes(read[name]), name


def test_computes_what_separate_weights_do(tmp_path, config):
    """The same bytes, in products of their own and with nothing fused: weights that may be trained."""
    save(tiny_model(**config), tmp_path / "plain")
    kept, apart = load(tmp_path / "plain", fp8=True), load(tmp_path / "plain", fp8=True, trainable=True)
    tokens, cu_seqlens = packed(*random_prompts(40, 24))
    with torch.no_grad():
        got, want = kept(tokens, cu_seqlens, mtp=True), apart(tokens, cu_seqlens, mtp=True)
    for a, b in ((got.logits, want.logits), (got.mtp_logits[0], want.mtp_logits[0])):
        # A sum in another order may move an activation by a step of e4m3, an expert of near-ties may change.
        assert (a - b).norm() < 0.02 * b.norm()
    # With a gradient wanted nothing is fused either, and some scales are powers of two.
    want = apart(tokens, cu_seqlens)
    torch.testing.assert_close(
        kept(tokens, cu_seqlens).logits, want.logits, rtol=0, atol=1e-4 * want.logits.abs().max().item()
    )


@torch.no_grad()
def test_prompt_then_extend_then_decode(saved):
    """All kinds of attention on stacked weights. What they quantise is not the same, and where that turns the choice of
    an expert a token is far off: so it is the median token that has to be near what the dequantised weights give.
    """
    model = load(saved, fp8=True)
    cache = LatentCache(model.config, pages=8, page_size=8, dtype=torch.float32)
    text = torch.randint(0, 257, (30,))
    table = cache.block_table([cache.admit(30)])
    parts = []
    for kind, start, end in (("prompt", 0, 13), ("extend", 13, 25), ("decode", 25, 30)):
        lengths, cu_seqlens = (torch.tensor(x, dtype=torch.int32) for x in ([end], [0, end - start]))
        if kind == "prompt":
            batch = Batch.prompt(cu_seqlens, end, table, 8)
        elif kind == "extend":
            batch = Batch.extend(cu_seqlens, end - start, lengths, table, 8)
        else:
            batch = Batch.decode(lengths, 5, table, 8)
        parts.append(model.trunk(text[start:end], batch, cache.data)[0])
    want = load(saved)(text).hidden
    errors = (torch.cat(parts) - want).norm(dim=1) / want.norm(dim=1)
    assert errors.median() < 0.2
    assert len(generate(model, [text.tolist()], max_new_tokens=4, drafts=1).finish()[0]) == 4
