"""Choose experts for a batch of tokens, run them, and let the bias even out their load."""

import torch

import dskernels as ds

device = "cuda" if torch.cuda.is_available() else "cpu"
tokens, experts, top_k, hidden, width = (4096, 256, 8, 7168, 2048) if device == "cuda" else (64, 16, 4, 256, 128)
torch.manual_seed(0)


def random_weights(*shape: int) -> ds.Fp8Tensor:
    """Experts in e4m3, blocks of 128x128, made one by one: 256 of DeepSeek-V3's take 45 GB in fp32."""
    made = [ds.quantize(torch.randn(*shape, device=device) * shape[-1] ** -0.5, (128, 128)) for _ in range(experts)]
    data = torch.stack([w.data.view(torch.uint8) for w in made]).view(torch.float8_e4m3fn)
    return ds.Fp8Tensor(data, torch.stack([w.scale for w in made]), (128, 128))


w13, w2 = random_weights(2 * width, hidden), random_weights(hidden, width)  # gate and up together, and down
gate = torch.randn(experts, hidden, device=device, dtype=torch.bfloat16) * hidden**-0.5
bias = torch.zeros(experts, device=device)
x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)

# Four of eight groups of experts, top_k experts in them, by sigmoid(logit) + bias; weights by sigmoid(logit) alone.
routing, logits = ds.route_hidden(x, gate, bias, top_k=top_k, n_groups=8, top_groups=4, scale=2.5)
print(f"token 0 chose {routing.experts[0].tolist()} with weights {[round(w, 3) for w in routing.weights[0].tolist()]}")

y = ds.fused_experts(x, w13, w2, routing)  # sorted, multiplied, gated, multiplied, summed
print(f"y {tuple(y.shape)} in {y.dtype}, by:")
print(ds.explain(ds.fused_experts, x, w13, w2, routing))

expected = ds.reference.fused_experts(
    x[:4], w13, w2, ds.Routing(routing.weights[:4], routing.experts[:4], *routing[2:])
)
error = (y[:4] - expected).float().norm() / expected.float().norm()
print(f"relative distance from the reference: {error:.1e}")
assert error < 5e-2

# A gate that likes some experts better, and the bias that takes it back: a step against the load, no auxiliary loss.
logits = logits + torch.linspace(-1, 1, experts, device=device)
for step in range(201):
    load = ds.route(logits, bias, top_k=top_k, n_groups=8, top_groups=4).load
    if step % 100 == 0:
        print(f"step {step:3}: the busiest expert has {load.max() / load.float().mean():.2f} times the mean load")
    ds.update_bias(bias, load, rate=0.01)
assert load.max() < 2 * load.float().mean()
