"""The same model through the kernels: training, prompts, decode and drafting against the reference implementation."""

import pytest
import torch
import torch.nn.functional as F
from tiny import packed, random_prompts, tiny_model

import dskernels as ds
from dskernels.model import Batch, DeepseekV3, LatentCache, generate, targets


def small_model(device, **changes):
    """A dense layer, one with experts and the MTP module: every operation, and some after another of its kind."""
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "n_routed_experts": 8, "vocab_size": 64}
    return tiny_model(**{**small, **changes}).to(device)


def loss_and_gradients(model, tokens, cu_seqlens):
    out = model(tokens, cu_seqlens, mtp=True)
    loss = F.cross_entropy(out.logits.float(), targets(tokens, cu_seqlens))
    loss = loss + F.cross_entropy(out.mtp_logits[0].float(), targets(tokens, cu_seqlens, 2))
    for router in out.routers:
        lengths = cu_seqlens.diff()
        loss = loss + ds.balance_loss(router.logits, top_k=4, alpha=0.01, sequence_lengths=lengths)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.detach(), out, dict(zip(dict(model.named_parameters()), gradients, strict=True))


def test_training_step(device):
    """fp32 throughout: what differs is the order of sums."""
    model = small_model(device)
    tokens, cu_seqlens = (x.to(device) for x in packed(*random_prompts(19, 1, 12, vocab_size=64)))
    with ds.use_impl("reference"):
        loss, out, gradients = loss_and_gradients(model, tokens, cu_seqlens)
    with ds.use_impl("triton"):
        loss_k, out_k, gradients_k = loss_and_gradients(model, tokens, cu_seqlens)
    torch.testing.assert_close(loss_k, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(out_k.logits, out.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(out_k.mtp_logits[0], out.mtp_logits[0], rtol=0, atol=1e-4)
    for a, b in zip(out.routers, out_k.routers, strict=True):
        assert torch.equal(a.routing.experts, b.routing.experts)
        assert torch.equal(a.routing.load, b.routing.load)
    for name, gradient in gradients.items():
        error = (gradients_k[name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, name


@pytest.mark.parametrize("options", [{}, {"drafts": 2, "prefill_tokens": 5}], ids=["plain", "drafts, prompt in pieces"])
def test_generation(device, options):
    """The cache's writer, absorbed decode of one and of several ragged tokens, prompts at once and in pieces."""
    model = small_model(device)
    prompts = random_prompts(9, 4, vocab_size=64)
    with ds.use_impl("reference"):
        texts = generate(model, prompts, max_new_tokens=4, page_size=16).finish()
    with ds.use_impl("triton"):
        assert generate(model, prompts, max_new_tokens=4, page_size=16, **options).finish() == texts


def test_fp8_forward(device):
    """Routing may turn at a rounding, so the comparison is of whole logits: below the error of e4m3 itself."""
    wide = small_model(device, hidden_size=128, first_k_dense_replace=2, num_nextn_predict_layers=0)
    model = DeepseekV3(wide.config, fp8=True, device=device)
    model.load_state_dict(wide.state_dict())
    tokens, cu_seqlens = (x.to(device) for x in packed(*random_prompts(19, 12, vocab_size=64)))
    with torch.no_grad():
        with ds.use_impl("reference"):
            expected = model(tokens, cu_seqlens).logits
        with ds.use_impl("triton"):
            got = model(tokens, cu_seqlens).logits
        exact = wide(tokens, cu_seqlens).logits
    assert (got - expected).norm() < 0.5 * (expected - exact).norm()


@pytest.mark.gpu
@torch.no_grad()
def test_decode_step_in_a_cuda_graph():
    """Replayed with other tokens, lengths and pages than it was captured with; drafts of ragged numbers included."""
    model = small_model("cuda").to(torch.bfloat16)
    cache = LatentCache(model.config, pages=16, page_size=16, device="cuda")
    cache.data.normal_(0.0, 0.3)
    tokens = torch.zeros(4, dtype=torch.int64, device="cuda")
    lengths = torch.tensor([2, 2], dtype=torch.int32, device="cuda")
    q_lengths = torch.tensor([2, 2], dtype=torch.int32, device="cuda")
    table = torch.zeros(2, 4, dtype=torch.int32, device="cuda")

    def step(pages):
        batch = Batch.decode(lengths, 2, table, 16, q_lengths)
        hidden, _ = model.trunk(tokens, batch, pages)
        return model.lm_head(hidden)

    for _ in range(2):  # everything is compiled before the capture
        step(cache.data)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(cache.data)
    for new in ([33, 50], [1, 64], [17, 2]):
        tokens.copy_(torch.randint(0, 64, (4,)))
        lengths.copy_(torch.tensor(new))
        q_lengths.copy_(torch.tensor([2, 1]))
        table.copy_(torch.randperm(16)[:8].view(2, 4))
        pages = cache.data.clone()
        graph.replay()
        assert torch.equal(captured[:3], step(pages)[:3])  # the fourth row is padding


def test_compiles_whole():
    """One graph, no break, for training and with other lengths without compiling again."""
    model = small_model("cpu")
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for lengths in ((9, 20), (30, 2), (7, 8)):
        tokens, cu_seqlens = packed(*random_prompts(*lengths, vocab_size=64))
        expected, got = model(tokens, cu_seqlens, mtp=True), compiled(tokens, cu_seqlens, mtp=True)
        torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(got.mtp_logits[0], expected.mtp_logits[0], rtol=0, atol=1e-5)
    assert len(graphs) == 1
