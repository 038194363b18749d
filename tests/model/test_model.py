"""The forward pass: packing, the MTP modules, gradients, fp8, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from tiny import packed, random_prompts, tiny_model

import dskernels as ds
from dskernels.model import Batch, Config, DeepseekV3, LatentCache, shift, targets


@torch.no_grad()
@pytest.mark.parametrize("q_lora_rank", [48, None])
def test_packed_sequences_do_not_see_each_other(q_lora_rank):
    model = tiny_model(q_lora_rank=q_lora_rank, num_nextn_predict_layers=2)
    prompts = random_prompts(20, 1, 65, 3)
    tokens, cu_seqlens = packed(*prompts)
    together = model(tokens, cu_seqlens, mtp=True)
    for prompt, start in zip(prompts, cu_seqlens.tolist(), strict=False):
        alone = model(torch.tensor(prompt), mtp=True)
        rows = slice(start, start + len(prompt))
        torch.testing.assert_close(together.logits[rows], alone.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.hidden[rows], alone.hidden, rtol=0, atol=1e-5)
        for k in range(2):
            torch.testing.assert_close(together.mtp_logits[k][rows], alone.mtp_logits[k], rtol=0, atol=1e-5)


def test_shift_and_targets():
    """An empty sequence, one of a single token, and one shorter than the shift."""
    sequences = [[10, 11, 12, 13], [], [20], [30, 31]]
    tokens, cu_seqlens = packed(*(torch.tensor(s, dtype=torch.int64) for s in sequences))
    for k in (1, 2, 3):
        wanted = [s[i + k] if i + k < len(s) else -100 for s in sequences for i in range(len(s))]
        assert targets(tokens, cu_seqlens, k).tolist() == wanted
        clamped = [s[min(i + k, len(s) - 1)] for s in sequences for i in range(len(s))]
        assert shift(tokens, cu_seqlens, k).tolist() == clamped
    empty = torch.empty(0, dtype=torch.int64)
    assert targets(empty, torch.zeros(2, dtype=torch.int32)).shape == (0,)


@torch.no_grad()
def test_mtp_row_depends_on_the_past_and_on_the_next_token_alone():
    """Row i of module 1 has seen the tokens up to i + 1: it cannot see the token i + 2 that it is to predict."""
    model = tiny_model()
    tokens = torch.randint(0, 257, (24,))
    changed = tokens.clone()
    changed[12] = (changed[12] + 1) % 257
    before, after = model(tokens, mtp=True).mtp_logits[0], model(changed, mtp=True).mtp_logits[0]
    # Other rows go through the experts in other company and may be summed in another order.
    torch.testing.assert_close(before[:11], after[:11], rtol=0, atol=1e-5)
    assert (before[11] - after[11]).abs().max() > 0.1


@torch.no_grad()
def test_mtp_concatenates_the_embedding_first():
    """With the second half of the projection zero the hidden state has no influence, the embedding has all."""
    model = tiny_model()
    module = model.mtp[0]
    module.eh_proj.weight[:, 64:] = 0
    tokens = torch.randint(0, 257, (10,))
    batch = Batch.prompt(torch.tensor([0, 10], dtype=torch.int32), 10)
    a, _ = model.predict(tokens, torch.randn(10, 64), batch)
    b, _ = model.predict(tokens, torch.randn(10, 64), batch)
    assert torch.equal(a, b)
    c, _ = model.predict(tokens.flip(0), torch.randn(10, 64), batch)
    assert not torch.equal(a, c)


def test_every_parameter_gets_a_gradient():
    """The router through the gates, the experts wherever a token went (top 8 of 16: all of them)."""
    model = tiny_model(num_experts_per_tok=8)
    tokens, cu_seqlens = packed(*random_prompts(60, 30))
    out = model(tokens, cu_seqlens, mtp=True)
    loss = F.cross_entropy(out.logits, targets(tokens, cu_seqlens))
    loss = loss + F.cross_entropy(out.mtp_logits[0], targets(tokens, cu_seqlens, 2))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.flatten(1 if parameter.dim() > 2 else 0).abs().amax(-1).min() > 0, name


def test_gradient_is_the_slope():
    """Against a central difference along a random direction of all parameters; 2e-3: ulps of the loss by the step."""
    model = tiny_model(num_hidden_layers=2)
    tokens, cu_seqlens = packed(*random_prompts(30, 11))

    def loss():
        return F.cross_entropy(model(tokens, cu_seqlens).logits, targets(tokens, cu_seqlens))

    loss().backward()
    used = [p for p in model.parameters() if p.grad is not None]
    direction = [torch.randn_like(p) for p in used]
    slope = sum((p.grad * d).sum() for p, d in zip(used, direction, strict=True))
    values = []
    with torch.no_grad():
        for step in (1e-4, -1e-4):
            for p, d in zip(used, direction, strict=True):
                p += step * d
            values.append(loss().double())
            for p, d in zip(used, direction, strict=True):
                p -= step * d
    # Choices of experts do not change within the step, else the loss would jump.
    torch.testing.assert_close((values[0] - values[1]) / 2e-4, slope.double(), rtol=2e-3, atol=0)


def test_what_training_needs_of_the_routers():
    """Logits with a gradient and a load for each expert block, in the order of `moe_layers`."""
    model = tiny_model()
    tokens, cu_seqlens = packed(*random_prompts(40, 24))
    out = model(tokens, cu_seqlens, mtp=True)
    assert len(out.routers) == len(model.moe_layers) == 3 + 1
    assert len(model(tokens, cu_seqlens).routers) == 3
    lengths = cu_seqlens.diff()
    for moe, router in zip(model.moe_layers, out.routers, strict=True):
        assert router.logits.dtype == torch.float32
        assert router.routing.load.sum() == 64 * 4
        ds.balance_loss(router.logits, top_k=4, alpha=1e-4, sequence_lengths=lengths).backward(retain_graph=True)
        assert moe.gate.weight.grad.abs().sum() > 0
        bias = moe.gate.e_score_correction_bias
        before = bias.clone()
        ds.update_bias(bias, router.routing.load, 0.001)
        overloaded = router.routing.load > router.routing.load.float().mean()
        assert (bias < before)[overloaded].all()
        assert (bias > before)[~overloaded & (router.routing.load < router.routing.load.float().mean())].all()


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, {"n_shared_experts": 0}, {"q_lora_rank": None, "n_shared_experts": 2}])
def test_fp8_is_near_the_full_precision(config):
    """e4m3 keeps 3 bits: a relative error of the logits of several percent, and not zero."""
    wide = tiny_model(num_hidden_layers=2, hidden_size=128, initializer_range=0.02, **config)
    narrow = DeepseekV3(wide.config, fp8=True)
    narrow.load_state_dict(wide.state_dict())
    tokens, cu_seqlens = packed(*random_prompts(40, 24))
    a, b = wide(tokens, cu_seqlens, mtp=True), narrow(tokens, cu_seqlens, mtp=True)
    for x, y in ((a.logits, b.logits), (a.mtp_logits[0], b.mtp_logits[0])):
        error = (x - y).norm() / x.norm()
        assert 1e-3 < error < 0.25


def test_fp8_trains():
    model = DeepseekV3(Config.from_name("tiny", num_hidden_layers=2), fp8=True)
    tokens, cu_seqlens = packed(*random_prompts(40, 24))
    out = model(tokens, cu_seqlens, mtp=True)
    F.cross_entropy(out.logits, targets(tokens, cu_seqlens)).backward()
    for name in ("layers.0.self_attn.kv_b_proj", "layers.0.mlp.w13", "layers.1.mlp.shared_experts.w2"):
        assert model.get_parameter(name + ".weight").grad.abs().sum() > 0, name
    assert model.layers[1].mlp.experts.w13.grad.abs().sum() > 0


@torch.no_grad()
def test_prompt_then_extend_then_decode_is_one_pass():
    """The three ways of attention agree: each text at once, or through the cache packed, packed, then absorbed."""
    model = tiny_model()
    cache = LatentCache(model.config, pages=8, page_size=8, dtype=torch.float32)
    texts = [torch.randint(0, 257, (30,)), torch.randint(0, 257, (17,))]
    table = cache.block_table([cache.admit(30), cache.admit(17)])
    steps = [(0, 13, 25, 30), (0, 1, 12, 17)]  # where the pieces of each text begin and end

    parts = [[], []]
    for i, kind in enumerate(("prompt", "extend", "decode")):
        tokens, cu_seqlens = packed(*(text[cuts[i] : cuts[i + 1]] for text, cuts in zip(texts, steps, strict=True)))
        lengths = torch.tensor([cuts[i + 1] for cuts in steps], dtype=torch.int32)
        if kind == "prompt":
            batch = Batch.prompt(cu_seqlens, len(tokens), table, 8)
        elif kind == "extend":
            batch = Batch.extend(cu_seqlens, len(tokens), lengths, table, 8)
        else:
            batch = Batch.decode(lengths, 5, table, 8)
        hidden, _ = model.trunk(tokens, batch, cache.data)
        for part, rows in zip(parts, hidden.split(cu_seqlens.diff().tolist()), strict=True):
            part.append(rows)
    for text, part in zip(texts, parts, strict=True):
        torch.testing.assert_close(torch.cat(part), model(text).hidden, rtol=0, atol=1e-5)


def test_initial_weights():
    """N(0, 0.006^2) by default (report section 4.2), norms 1, router biases 0, and the same for the same generator."""
    config = Config.from_name("demo", initializer_range=0.006)
    model = DeepseekV3(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        elif parameter.numel() > 5000:
            assert parameter.std().item() == pytest.approx(0.006, rel=0.05), name
            assert abs(parameter.mean().item()) < 3e-4
    assert all((moe.gate.e_score_correction_bias == 0).all() for moe in model.moe_layers)
    generator = torch.Generator()
    model.init_weights(generator.manual_seed(1))
    first = model.lm_head.weight.clone()
    model.init_weights(generator.manual_seed(1))
    assert torch.equal(first, model.lm_head.weight)


def test_dtype_and_device_of_a_new_model():
    model = DeepseekV3(Config.from_name("tiny"), dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if "bias" in name else torch.bfloat16), name
    assert all(p.is_meta for p in DeepseekV3(Config.from_name("deepseek-v3"), device="meta").parameters())


@torch.no_grad()
def test_bf16_forward_is_near_fp32():
    model = tiny_model()
    tokens = torch.randint(0, 257, (40,))
    wide = model(tokens).logits
    narrow = model.to(torch.bfloat16)(tokens).logits
    assert narrow.dtype == torch.bfloat16
    assert (wide - narrow).norm() / wide.norm() < 0.1


@pytest.mark.parametrize(
    ("tokens", "cu_seqlens", "error", "message"),
    [
        (torch.zeros(4), None, TypeError, "tokens: expected integers, got torch.float32"),
        (torch.zeros(1, 4, dtype=torch.int64), None, ValueError, r"tokens: expected \[T\]"),
        (torch.zeros(4, dtype=torch.int64), torch.tensor([0, 4]), TypeError, "cu_seqlens: expected int32"),
        (torch.zeros(4, dtype=torch.int64), torch.tensor(0, dtype=torch.int32), ValueError, "cu_seqlens: expected"),
        (torch.zeros(4, dtype=torch.int64), torch.zeros(1, dtype=torch.int32), ValueError, "at least one sequence"),
        (
            torch.zeros(4, dtype=torch.int64),
            torch.zeros(2, dtype=torch.int32, device="meta"),
            ValueError,
            "on cpu like",
        ),
    ],
)
def test_forward_refuses(tokens, cu_seqlens, error, message):
    with pytest.raises(error, match=message):
        tiny_model(num_hidden_layers=1)(tokens, cu_seqlens)


def test_cached_attention_needs_the_cache():
    model = tiny_model(num_hidden_layers=1)
    batch = Batch.decode(torch.tensor([3], dtype=torch.int32), 1, torch.zeros(1, 1, dtype=torch.int32), 8)
    with pytest.raises(ValueError, match="cache: a batch of kind"):
        model.trunk(torch.zeros(1, dtype=torch.int64), batch)
