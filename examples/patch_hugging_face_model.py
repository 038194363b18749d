"""A model of Hugging Face transformers on these operations, in one line, and back.

The model here is a small random one, so that nothing is downloaded. With a real one the same line follows its
``AutoModelForCausalLM.from_pretrained``.
"""

import time

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dskernels.integrations.transformers import accelerate

device = "cuda" if torch.cuda.is_available() else "cpu"
big = device == "cuda"
torch.manual_seed(0)
config = DeepseekV3Config(
    vocab_size=1000,
    hidden_size=2048 if big else 128,
    intermediate_size=4096 if big else 256,
    moe_intermediate_size=1024 if big else 128,
    num_hidden_layers=4 if big else 2,
    first_k_dense_replace=1,
    num_attention_heads=16 if big else 2,
    num_key_value_heads=16 if big else 2,
    n_routed_experts=64 if big else 16,
    num_experts_per_tok=6 if big else 4,
    n_group=8,
    topk_group=4,
    q_lora_rank=512 if big else 128,
)
model = DeepseekV3ForCausalLM(config).to(device).eval()
tokens = torch.randint(0, config.vocab_size, (2, 16), device=device)
with torch.no_grad():
    exact = model(tokens).logits  # fp32
if big:
    model.to(torch.bfloat16)


def distance(logits: torch.Tensor, other: torch.Tensor) -> float:
    return float((logits - other).float().norm() / other.float().norm())


def generate() -> torch.Tensor:
    start = time.perf_counter()
    options = {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0, "do_sample": False}
    text = model.generate(tokens, max_new_tokens=64 if big else 8, **options)
    print(f"generated {tuple(text.shape)} in {time.perf_counter() - start:.2f} s")
    return text


with torch.no_grad():
    before = model(tokens).logits
text = generate()

acceleration = accelerate(model)  # prints what it replaced, and what not and why
generate()  # kernels are compiled
again = generate()
with torch.no_grad():
    after = model(tokens).logits
print(f"relative distance of the logits: {distance(after, before):.1e}; the same text: {torch.equal(text, again)}")
if big:  # a random router's scores are nearly equal, so that a rounding to bf16 turns choices, with and without
    print(f"from fp32: {distance(before, exact):.1e} before, {distance(after, exact):.1e} after")
    assert distance(after, exact) < 1.5 * distance(before, exact)
else:
    assert distance(after, before) < 1e-4

acceleration.undo()
with torch.no_grad():
    assert torch.equal(model(tokens).logits, before)
print("undone: the same bits as before")
