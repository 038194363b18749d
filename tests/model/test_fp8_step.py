"""A training step in e4m3: what is computed again, what is kept, what is quantised, and that gradients are right."""

import pytest
import torch
import torch.nn.functional as F
from tiny import packed, random_prompts, tiny_model

import dskernels as ds
from dskernels import dispatch
from dskernels.model import DeepseekV3, targets

# One dense layer, one of experts, the MTP module; widths of whole tiles, so that Hopper's kernels take them.
SMALL = {
    **{"num_hidden_layers": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    **{"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "vocab_size": 64},
    "num_attention_heads": 2,
}


def models(device="cpu", dtype=None, **changes):
    """The same weights in full precision, in e4m3, and in e4m3 with recomputation."""
    plain = tiny_model(**{**SMALL, **changes}).to(device, dtype)
    found = [plain]
    for recompute in (False, True):
        model = DeepseekV3(plain.config, fp8=True, recompute=recompute, device=device, dtype=dtype)
        model.load_state_dict(plain.state_dict())
        found.append(model)
    return found


def step(model, tokens, cu_seqlens):
    """Loss, gradients by name, and the routers' output."""
    out = model(tokens, cu_seqlens, mtp=True)
    loss = F.cross_entropy(out.logits.float(), targets(tokens, cu_seqlens))
    loss = loss + F.cross_entropy(out.mtp_logits[0].float(), targets(tokens, cu_seqlens, 2))
    for router in out.routers:
        loss = loss + ds.balance_loss(router.logits, top_k=2, alpha=0.01, sequence_lengths=cu_seqlens.diff())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), dict(zip(dict(model.named_parameters()), gradients, strict=True)), out.routers


def text(device="cpu"):
    return (x.to(device) for x in packed(*random_prompts(19, 12, vocab_size=64)))


@pytest.mark.parametrize("q_lora_rank", [None, 48])
@pytest.mark.parametrize("fp8", [False, True])
def test_recomputation_changes_no_bit(fp8, q_lora_rank):
    plain, kept, again = models(q_lora_rank=q_lora_rank)
    if not fp8:
        kept = plain
        again = DeepseekV3(plain.config, recompute=True)
        again.load_state_dict(plain.state_dict())
    tokens, cu_seqlens = text()
    calls = []
    route = dispatch.OPERATIONS["route_hidden"].targets
    before = route["reference"]
    route["reference"] = lambda *args: calls.append(1) or before(*args)
    try:
        want, got = (step(model, tokens, cu_seqlens) for model in (kept, again))
    finally:
        route["reference"] = before
    assert torch.equal(got[0], want[0])
    for name, gradient in want[1].items():
        assert torch.equal(got[1][name], gradient), name
    # Each router ran once: nothing is counted twice.
    assert len(calls) == 2 * len(want[2])
    for a, b in zip(got[2], want[2], strict=True):
        assert torch.equal(a.routing.load, b.routing.load)
        assert a.routing.load.sum() == 2 * len(tokens)
