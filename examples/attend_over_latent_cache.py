"""Cache latents in pages, attend to them without making a key or a value, and compare with attention written out."""

import torch
import torch.nn.functional as F

import dskernels as ds

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
heads, requests, context, page = (128, 32, 4096, 64) if device == "cuda" else (4, 3, 150, 64)
latent, nope, rope, value = 512, 128, 64, 128  # DeepSeek-V3's
scale = (nope + rope) ** -0.5
torch.manual_seed(0)


def randn(*shape: int, size: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=device) * size).to(dtype)


# The up-projections of keys and of values, which decode takes to the other side of the attention.
w_uk, w_uv = randn(heads, nope, latent, size=latent**-0.5), randn(heads, value, latent, size=latent**-0.5)
norm_weight = torch.ones(latent, device=device, dtype=dtype)

# Which pages a request has, and where in them its tokens go.
pages = -(-context // page)
block_table = torch.randperm(requests * pages, device=device).int().view(requests, pages)
cache = torch.empty(requests * pages, page, latent + rope, device=device, dtype=dtype)
positions = torch.arange(context, device=device).expand(requests, -1)
slots = block_table.long().gather(1, positions // page) * page + positions % page
angles = positions[..., None] * 10000.0 ** (-torch.arange(0, rope, 2, device=device) / rope)
cos, sin = angles.cos(), angles.sin()

# Each token leaves a normed latent and one rotated key for all heads: 576 numbers, where 128 heads have 40,960.
kv, k_rope = randn(requests, context, latent), randn(requests, context, rope)
flat = (kv.flatten(0, 1), k_rope.flatten(0, 1), norm_weight, cos.flatten(0, 1), sin.flatten(0, 1))
ds.write_latent_cache(*flat, cache, slots.flatten(), eps=1e-6)

# A new token of each request: its query takes W^UK, attends to the latents, and its sum of latents takes W^UV.
q = randn(requests, heads, nope + rope)
absorbed = ds.mla_decode_queries(q, w_uk, cos[:, -1], sin[:, -1])
lengths = torch.full((requests,), context, dtype=torch.int32, device=device)
out, lse = ds.mla_decode(absorbed[:, None], cache, block_table, lengths, scale=scale)
out = torch.einsum("bhl,hvl->bhv", out[:, 0], w_uv)
print(f"out {tuple(out.shape)}, log-sum-exp {tuple(lse.shape)}, by:")
print(ds.explain(ds.mla_decode, absorbed[:, None], cache, block_table, lengths, scale=scale))

# The same written out for one request: keys and values of every head, and softmax.
c = F.rms_norm(kv[0].double(), (latent,), eps=1e-6)
keys = torch.einsum("sl,hnl->hsn", c, w_uk.double())
shared = ds.apply_rope(k_rope[0, :, None], cos[0], sin[0])[:, 0].double()
rotated = ds.apply_rope(q[:1, :, nope:], cos[:1, -1], sin[:1, -1])[0].double()
scores = torch.einsum("hn,hsn->hs", q[0, :, :nope].double(), keys) + rotated @ shared.T
weights = (scale * scores).softmax(-1)
expected = torch.einsum("hs,sl,hvl->hv", weights, c, w_uv.double())
error = (out[0] - expected).norm() / expected.norm()
print(f"relative distance from attention written out in fp64: {error:.1e}")
assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5)
