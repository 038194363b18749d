"""What a layer launches, in a decode step and for a prompt, on weights kept in fp8: the list in docs/run_a_model.md."""

import pytest
import torch
from test_stacked_weights import WHOLE
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from dskernels.model import Batch, DeepseekV3, LatentCache, keep_in_fp8
from dskernels.model.steps import place

# Of these torch launches nothing; `clone` and the like are not among them.
VIEWS = (
    "view",
    "split",
    "split_with_sizes",
    "slice",
    "select",
    "unsqueeze",
    "transpose",
    "permute",
    "expand",
    "alias",
    "detach",
    "t",
)
MAKING = ("empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided")


class Launched(TorchDispatchMode):
    """The operations that run, those inside ours not among them."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        quiet = name.split("_unsafe")[0].lstrip("_") in (*VIEWS, *MAKING) or name == "_unsafe_view"
        if function.namespace == "dskernels" or not quiet:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def kept_model(**changes):
    config = {**WHOLE, "num_hidden_layers": 3, "v_head_dim": 128, "num_nextn_predict_layers": 0, **changes}
    model = DeepseekV3(tiny_model(**config).config, fp8=True)
    return keep_in_fp8(model)


NORM, GEMM = "rmsnorm_quantize", "fp8_gemm"
DECODE = ["write_latent_cache", "mla_decode_queries", "mla_decode", "mla_values_quantize", GEMM]
DENSE = [NORM, GEMM, "swiglu_quantize", GEMM]
EXPERTS = [NORM, "route_hidden", "fused_experts"]
HEAD_DIM = {"q_lora_rank": None, "num_attention_heads": 8, "n_shared_experts": 2}


@pytest.mark.parametrize("changes", [{"q_lora_rank": 128}, HEAD_DIM], ids=["compressed query", "two shared experts"])
def test_a_decode_step(changes):
    """One launch for the places, one for embedding and angles, one for the last norm; then the head."""
    model = kept_model(**changes)
    cache = LatentCache(model.config, pages=4, page_size=8, dtype=torch.float32)
    tokens, cached, active = torch.tensor([3, 4]), torch.tensor([9, 2]).int(), torch.ones(2).int()
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    with torch.no_grad(), Launched() as launched:
        placed = place(tokens, tokens.new_empty(2, 0), cached, active, table, page_size=8)
        hidden, _ = model.trunk(placed.tokens, placed.batch(table), cache.data)
        model.lm_head(hidden)
    down = [NORM, GEMM, NORM, GEMM] if changes.get("q_lora_rank") else [NORM, GEMM]
    layers = [*down, *DECODE, *DENSE, *2 * [*down, *DECODE, *EXPERTS]]
    assert [name for name in launched.names if not name.startswith("mm")] == [
        "place_tokens",
        "embed_tokens",
        *layers,
        "add_norm",
    ]


def test_a_prompt():
    """Quantising the attention's output is the one thing that no other kernel does."""
    model = kept_model(q_lora_rank=128)
    cache = LatentCache(model.config, pages=4, page_size=8, dtype=torch.float32)
    cu_seqlens, table = torch.tensor([0, 20], dtype=torch.int32), torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
    batch, tokens = Batch.prompt(cu_seqlens, 20, table, 8), torch.arange(20)
    with torch.no_grad(), Launched() as launched:
        model.trunk(tokens, batch, cache.data)
    attention = ["write_latent_cache", "apply_rope_", "apply_rope", NORM, GEMM, "mla_prefill", "fp8_linear"]
    down = [NORM, GEMM, NORM, GEMM]
    layers = [*down, *attention, *DENSE, *2 * [*down, *attention, *EXPERTS]]
    assert launched.names == ["embed_tokens", *layers, "add_norm"]
