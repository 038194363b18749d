"""Weights kept in e4m3, checkpoints written back to the byte, and how much of a checkpoint the host holds."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import random_prompts, tiny_model

import dskernels as ds
from dskernels.model import Config, DeepseekV3, generate, keep_in_fp8, load, save
from dskernels.types import Fp8Tensor

# Gate and up end inside a block (96 and 160 rows, as 10,944 in DeepSeek-V2-Lite), and so does kv_a_proj_with_mqa with
# 144 rows, as 576 in all of them.
RAGGED = {
    "hidden_size": 320,
    "kv_lora_rank": 128,
    "intermediate_size": 160,
    "moe_intermediate_size": 96,
    "n_shared_experts": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_hidden_layers": 2,
}
E4M3 = torch.float8_e4m3fn


def read_folder(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def as_bytes(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bytes(a, b):
    a, b = read_folder(a), read_folder(b)
    assert a.keys() == b.keys()
    for name in a:
        assert as_bytes(a[name]) == as_bytes(b[name]), name


def edit(folder, change):
    """Replace the tensors of a folder of one file."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def block(tensors, name):
    return Fp8Tensor(tensors[name], tensors[name + "_scale_inv"], (128, 128))


@pytest.fixture(params=["fp32", "ue8m0"])
def scale_format(request):
    return request.param


@pytest.fixture
def saved(tmp_path, scale_format):
    """A ragged fp8 checkpoint."""
    torch.manual_seed(0)
    save(tiny_model(**RAGGED).bfloat16(), tmp_path / "a", fp8=True, scale_format=scale_format)
    return tmp_path / "a"


def test_weights_are_kept_as_they_are_stored(saved):
    """No dequantising and quantising again: the bytes of the file, the scales of the file."""
    model, tensors = load(saved, fp8=True), read_folder(saved)
    attention = model.layers[0].self_attn
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert torch.equal(attention.kv_a_proj_with_mqa.weight.view(torch.uint8), tensors[name].view(torch.uint8))
    assert torch.equal(attention.kv_a_proj_with_mqa.weight_scale_inv, tensors[name + "_scale_inv"])
    experts = model.layers[1].mlp.experts
    up = tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    assert torch.equal(experts.w13[3, 128 : 128 + 96].view(torch.uint8), up.view(torch.uint8))
    assert not experts.w13[3, 96:128].float().any()  # what fills the gate's block up
    assert not experts.w2[3, :, 96:].float().any()
    assert all(not p.requires_grad for p in model.parameters() if p.dtype == E4M3)
    assert {p.dtype for p in model.parameters()} == {E4M3, torch.bfloat16}


def test_a_feed_forward_on_kept_weights_is_that_of_the_file(saved):
    """Gate, up and down one by one, unfilled, through the reference's product; only the order of sums may differ."""
    model, tensors = load(saved, fp8=True), read_folder(saved)
    x = torch.randn(9, 320)
    prefix = "model.layers.0.mlp."
    gate, up = (ds.reference.fp8_linear(x, block(tensors, f"{prefix}{n}_proj.weight")) for n in ("gate", "up"))
    want = ds.reference.fp8_linear(F.silu(gate) * up, block(tensors, f"{prefix}down_proj.weight"))
    got = model.layers[0].mlp(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_a_model_on_kept_weights_generates(saved):
    """Every kind of pass: prompts, further pieces of a prompt, decode, drafts. Close to the dequantised model."""
    kept, wide = load(saved, fp8=True, dtype=torch.float32), load(saved, dtype=torch.float32)
    prompts = random_prompts(40, 7)
    tokens = torch.tensor(prompts[0])
    # e4m3 activations carry 2^-4 of relative error each; over some layers the logits stay much closer than they vary.
    want = wide(tokens).logits
    assert (kept(tokens).logits - want).std() < 0.15 * want.std()
    texts = [generate(kept, prompts, max_new_tokens=5, drafts=k, prefill_tokens=16).finish() for k in (0, 1)]
    assert [len(text) for text in texts[0]] == [5, 5]


def test_nothing_is_written_out_in_a_step(saved, monkeypatch):
    """A step may be under capture in a CUDA graph: what absorbed attention multiplies by is there before it."""
    models = load(saved, fp8=True), keep_in_fp8(load(saved, fp8=True, trainable=True))
    monkeypatch.setattr(Fp8Tensor, "dequantize", lambda *a: pytest.fail("dequantised"))
    for model in models:
        kv_b = model.layers[0].self_attn.kv_b_proj
        assert kv_b.dense(torch.bfloat16).dtype == torch.bfloat16


def test_keeping_in_fp8_is_what_a_checkpoint_does(tmp_path, scale_format):
    """`keep_in_fp8`, a plain checkpoint read with fp8=True, and an fp8 checkpoint read so are the same model."""
    model = tiny_model(DeepseekV3(Config.from_name("tiny", **RAGGED), fp8=True).config)
    save(model, tmp_path / "plain")
    save(model, tmp_path / "fp8", fp8=True, scale_format=scale_format)
    want = load(tmp_path / "fp8", fp8=True).state_dict()
    trained = load(tmp_path / "plain", fp8=True, trainable=True)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in trained.parameters())
    kept = keep_in_fp8(trained, scale_format=scale_format).state_dict()
    assert kept.keys() == want.keys()
    for name, tensor in kept.items():
        assert as_bytes(tensor) == as_bytes(want[name]), name
    if scale_format == "fp32":
        read = load(tmp_path / "plain", fp8=True).state_dict()
        assert all(as_bytes(tensor) == as_bytes(want[name]) for name, tensor in read.items())


def test_casts_leave_kept_weights_alone(saved):
    model = load(saved, fp8=True)
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.float().bfloat16()
    for name, tensor in model.state_dict().items():
        assert as_bytes(tensor) == as_bytes(want[name]), name


def test_arguments_of_keep_in_fp8():
    with pytest.raises(ValueError, match="made with fp8=True"):
        keep_in_fp8(tiny_model())
    with pytest.raises(ValueError, match="scale_format"):
        keep_in_fp8(DeepseekV3(Config.from_name("tiny"), fp8=True, device="meta"), scale_format="e8m0")


# ---- writing back ---------------------------------------------------------------------------------------------------


def test_fp8_is_written_back_to_the_byte(saved, tmp_path, scale_format):
    save(load(saved, fp8=True), tmp_path / "b", shard_size=100_000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    assert_same_bytes(saved, tmp_path / "b")
    a, b = (json.loads((folder / "config.json").read_text()) for folder in (saved, tmp_path / "b"))
    assert a == b
    assert b["quantization_config"].get("scale_fmt") == (None if scale_format == "fp32" else "ue8m0")
    other = {"fp32": "ue8m0", "ue8m0": "fp32"}[scale_format]
    with pytest.raises(ValueError, match="the weights are in fp8 with"):
        save(load(saved, fp8=True), tmp_path / "c", scale_format=other)


def test_kept_weights_are_written_in_bf16_on_request(saved, tmp_path):
    save(load(saved, fp8=True), tmp_path / "b", fp8=False)
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    want, got = load(saved).state_dict(), load(tmp_path / "b").state_dict()
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain_checkpoints_are_written_back_to_the_byte(tmp_path, dtype):
    save(tiny_model().to(dtype), tmp_path / "a", shard_size=500_000)
    save(load(tmp_path / "a"), tmp_path / "b")
    assert_same_bytes(tmp_path / "a", tmp_path / "b")


def test_what_others_store_differently_is_written_back_to_the_byte(saved, tmp_path, scale_format):
    """Router biases in bf16, norms in fp32, scales in a byte, rotary tables, an MTP module without its copies, and
    fields of config.json that mean nothing here.
    """

    def change(tensors):
        for name, tensor in list(tensors.items()):
            if "bias" in name:
                tensors[name] = tensor.bfloat16()
            elif "norm" in name:
                tensors[name] = torch.randn(tensor.shape)
            elif name.endswith("_scale_inv") and scale_format == "ue8m0":
                tensors[name] = tensor.to(torch.float8_e8m0fnu)
            elif name.startswith("model.layers.2.") and ("embed" in name or "head.head" in name):
                del tensors[name]
        return {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8)}

    edit(saved, change)
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration.Config"}, "aux_loss_alpha": 0.001}
    (saved / "config.json").write_text(json.dumps(config))
    save(load(saved, fp8=True), tmp_path / "b")
    assert_same_bytes(saved, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == config


def test_what_has_changed_is_written_as_it_is_now(tmp_path):
    """A bias that came in bf16 and was trained is not rounded; a dropped MTP module is not announced any more."""
    save(tiny_model().bfloat16(), tmp_path / "a")
    edit(tmp_path / "a", lambda t: {n: x.bfloat16() if "bias" in n else x for n, x in t.items()})
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "note": "kept"}))
    model = load(tmp_path / "a", mtp=False)
    bias = model.layers[1].mlp.gate.e_score_correction_bias
    bias += 1e-4
    save(model, tmp_path / "b")
    written = read_folder(tmp_path / "b")
    assert torch.equal(written["model.layers.1.mlp.gate.e_score_correction_bias"], bias)
    assert written["model.layers.2.mlp.gate.e_score_correction_bias"].dtype == torch.bfloat16
    values = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (values["num_nextn_predict_layers"], values["note"]) == (0, "kept")
    save(load(tmp_path / "a", dtype=torch.float32), tmp_path / "c")
    assert {tensor.dtype for tensor in read_folder(tmp_path / "c").values()} == {torch.float32}


def test_the_tokenizer_goes_along(saved, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (saved / name).write_text("{}")
    save(load(saved, fp8=True), tmp_path / "b", tokenizer_from=saved)
    assert {path.name for path in (tmp_path / "b").iterdir()} == {path.name for path in saved.iterdir()}
    save(load(saved, fp8=True), saved, tokenizer_from=saved)  # in its own place


# ---- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
import torch
from dskernels.model import load

def resident(name):
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith(name))

folder, fp8, device = sys.argv[1], sys.argv[2] == "fp8", sys.argv[4]
load(sys.argv[3], fp8=fp8, device=device)  # whatever is loaded or allocated once
before, peak = resident("VmRSS"), 0
def look(done, total):
    global peak
    peak = max(peak, resident("VmRSS"))
model = load(folder, fp8=fp8, device=device, progress=look)
held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if t.device.type == "cpu")
print(peak - before - held)
"""


def beyond_the_model(folder, small, kind, device):
    """Bytes that are resident at most while a model is read, less those of the model."""
    command = [sys.executable, "-c", MEASURE, folder, kind, small, device]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_the_host_holds_less_than_two_shards(tmp_path, kind):
    """More than ten shards of 4 MB; what is resident beyond the model itself, at every tensor."""
    shard = 4_000_000
    model = DeepseekV3(Config.from_name("tiny", hidden_size=256, moe_intermediate_size=256, n_routed_experts=64))
    model = model.bfloat16()
    save(model, tmp_path / "a", fp8=kind == "fp8", shard_size=shard)
    files = len(list((tmp_path / "a").glob("*.safetensors")))
    assert files > 10
    save(tiny_model().bfloat16(), tmp_path / "small", fp8=kind == "fp8")
    beyond = beyond_the_model(tmp_path / "a", tmp_path / "small", kind, "cpu")
    assert beyond < 2 * shard, f"{beyond:,} bytes beyond the model with {files} shards of {shard:,}"


@pytest.mark.gpu
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_host_holds_less_than_two_shards_of_what_goes_to_a_gpu(tmp_path):
    """0.4 GB in fp8, straight to the device, in more than ten shards of 32 MB."""
    shard = 32_000_000
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 1024, "n_routed_experts": 32}
    save(
        DeepseekV3(Config.from_name("tiny", **sizes), device="cuda").bfloat16(),
        tmp_path / "a",
        fp8=True,
        shard_size=shard,
    )
    files = len(list((tmp_path / "a").glob("*.safetensors")))
    assert files > 10
    save(tiny_model().bfloat16(), tmp_path / "small", fp8=True)
    beyond = beyond_the_model(tmp_path / "a", tmp_path / "small", "fp8", "cuda")
    assert beyond < 2 * shard, f"{beyond:,} bytes beyond the model with {files} shards of {shard:,}"
