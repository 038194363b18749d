"""Fine-grained fp8: checkpoints of transformers multiplied as they are, and plain weights multiplied in e4m3."""

import copy

import pytest
import torch
from tiny_models import tiny_model

import dskernels as ds

transformers = pytest.importorskip("transformers", minversion="5.17")
from transformers.integrations import finegrained_fp8  # noqa: E402

from dskernels.integrations.transformers import accelerate  # noqa: E402

transformers.logging.set_verbosity_error()
# Gate and up end with whole blocks, as those of all published models do; other sizes do not. Every token takes all
# experts, as a choice that turns at a rounding would hide what rounding itself does.
SIZES = {"hidden_size": 192, "intermediate_size": 256, "moe_intermediate_size": 128, "num_experts_per_tok": 8}
KEPT = ["lm_head", "gate"]


def small(family, **changes):
    groups = {} if family == "Qwen3-MoE" else {"n_group": 1, "topk_group": 1}
    return tiny_model(family, **{**SIZES, **groups, **changes})


def quantized(model, scale_fmt="float"):
    """The model with linear layers and experts as a fine-grained fp8 checkpoint has them, and the same dequantised."""
    plain = copy.deepcopy(model)
    config = transformers.FineGrainedFP8Config(scale_fmt=scale_fmt)
    kept = [name for name, module in model.named_modules() if name.split(".")[-1] in KEPT]
    finegrained_fp8.replace_with_fp8_linear(model, kept, config)
    scale_format = "ue8m0" if scale_fmt == "ue8m0" else "fp32"
    with torch.no_grad():
        for name, module in model.named_modules():
            weights = {"FP8Linear": ["weight"], "FP8Experts": ["gate_up_proj", "down_proj"]}
            for weight in weights.get(type(module).__name__, ()):
                fill(module, weight, getattr(plain.get_submodule(name), weight), scale_format)
    return model.eval(), plain


def fill(module, name, original, scale_format):
    """Stores a matrix or a stack quantised, and puts into `original` what that stands for."""
    matrices = original if original.dim() == 3 else original[None]
    blocks = [ds.quantize(matrix, (128, 128), scale_format=scale_format) for matrix in matrices]
    for matrix, block in zip(matrices, blocks, strict=True):
        matrix.copy_(block.dequantize())
    data, scale = torch.stack([block.data for block in blocks]), torch.stack([block.scale for block in blocks])
    dtype = getattr(module, f"{name}_scale_inv").dtype
    for key, stored in ((name, data), (f"{name}_scale_inv", scale.to(dtype))):
        stored = stored if original.dim() == 3 else stored[0]
        setattr(module, key, torch.nn.Parameter(stored, requires_grad=False))


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("family", ["V3", "Qwen3-MoE", "GLM-4.5"])
def test_checkpoints_in_fp8(family, scale_fmt):
    """Against the dequantised weights in fp32: what is left is the error of quantised activations, 3% a product."""
    model, plain = quantized(small(family), scale_fmt)
    tokens = torch.randint(1, 257, (2, 24))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with accelerate(model, verbose=False) as acceleration:
        got = model(tokens).logits
        text = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert relative(got, plain(tokens).logits) < 0.15
    assert text.shape == (2, 28)
    assert acceleration.report.replaced["experts"] >= 1
    assert acceleration.report.replaced["linear layer in fp8"] >= 8
    after = model.state_dict()
    assert all(torch.equal(x.view(torch.uint8), after[name].view(torch.uint8)) for name, x in before.items())


def test_what_is_not_taken_is_said():
    model, _ = quantized(small("V3", moe_intermediate_size=192))
    model.model.layers[0].self_attn.o_proj.block_size = (64, 64)
    with accelerate(model, verbose=False) as acceleration:
        text = str(acceleration.report)
    assert "its gate and up of 192 rows do not end with a block of 128" in text
    assert "its blocks are (64, 64), not (128, 128)" in text


@pytest.fixture
def one_thread():
    """What two add up in whatever order they are done is not the same twice, with transformers alone too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_plain_weights_multiplied_in_fp8():
    """Logits as a checkpoint in fp8 gives them, gradients within twice their error; and undone."""
    model = small("V3")
    tokens = torch.randint(1, 257, (2, 24))

    def run():
        model.zero_grad()
        with torch.no_grad():
            logits = model(tokens).logits
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        return logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    logits, gradients = run()
    with accelerate(model, fp8=True, verbose=False) as acceleration:
        got, got_gradients = run()
        text = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert text.shape == (2, 28)
    assert acceleration.report.replaced["linear layer, multiplied in fp8"] == 16
    in_fp8, _ = quantized(small("V3"))
    with accelerate(in_fp8, verbose=False), torch.no_grad():
        assert relative(got, in_fp8(tokens).logits) < 1e-5  # the same products
    assert 0.01 < relative(got, logits) < 0.25
    assert got_gradients.keys() == gradients.keys()
    # What the logits are off by has come together on one way; gradients go there and back.
    errors = sorted(relative(g, gradients[name]) for name, g in got_gradients.items())
    assert errors[len(errors) // 2] < 2 * relative(got, logits)
    again, again_gradients = run()
    assert torch.equal(again, logits)
    assert all(torch.equal(g, gradients[name]) for name, g in again_gradients.items())
