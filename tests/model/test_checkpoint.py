"""Hugging Face checkpoints: exact round trips, the published names, fp8 in blocks."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from dskernels.model import Config, DeepseekV3, load, save, writing
from dskernels.model.hf_names import entries

ATTENTION = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
GATED = ["gate_proj", "up_proj", "down_proj"]


def read_folder(folder):
    """All tensors of a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_weights(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_size", [1, 100_000, 10**9])
def test_round_trip_is_exact(tmp_path, dtype, shard_size):
    """In one file, in several, and with every tensor in a file of its own."""
    model = tiny_model(n_routed_experts=8).to(dtype)
    save(model, tmp_path, shard_size=shard_size)
    again = load(tmp_path)
    assert again.config == model.config
    assert again.embed_tokens.weight.dtype == dtype
    assert_same_weights(model, again)
    tensors = len(list(entries(model.config)))
    files = len(list(tmp_path.glob("*.safetensors")))
    assert files == tensors if shard_size == 1 else files == 1 if shard_size == 10**9 else 1 < files < tensors


def test_published_names(tmp_path):
    """Names and shapes as in the released checkpoints, the MTP module with its copies included."""
    model = tiny_model(n_routed_experts=4, n_group=1, topk_group=1, num_hidden_layers=2)
    save(model, tmp_path)
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(3):
        expected |= {f"model.layers.{layer}.self_attn.{name}.weight" for name in ATTENTION}
        expected |= {f"model.layers.{layer}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")}
        if layer == 0:
            expected |= {f"model.layers.0.mlp.{name}.weight" for name in GATED}
            continue
        expected |= {f"model.layers.{layer}.mlp.gate.{name}" for name in ("weight", "e_score_correction_bias")}
        expected |= {f"model.layers.{layer}.mlp.shared_experts.{name}.weight" for name in GATED}
        expected |= {f"model.layers.{layer}.mlp.experts.{e}.{name}.weight" for e in range(4) for name in GATED}
    mtp = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")
    expected |= {f"model.layers.2.{name}.weight" for name in mtp}

    tensors = read_folder(tmp_path)
    assert tensors.keys() == expected
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (32 + 16, 64)
    assert tensors["model.layers.1.mlp.experts.3.up_proj.weight"].shape == (32, 64)
    assert tensors["model.layers.2.eh_proj.weight"].shape == (64, 128)
    w13 = model.layers[1].mlp.experts.w13[3]
    assert torch.equal(tensors["model.layers.1.mlp.experts.3.gate_proj.weight"], w13[:32])
    assert torch.equal(tensors["model.layers.1.mlp.experts.3.up_proj.weight"], w13[32:])
    assert torch.equal(tensors["model.layers.2.embed_tokens.weight"], model.embed_tokens.weight)
    assert torch.equal(tensors["model.layers.2.shared_head.head.weight"], model.lm_head.weight)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "tiny"])
def test_every_parameter_has_its_names(name):
    """Each element of each parameter is in exactly one tensor that is read."""
    config = Config.from_name(name)
    covered = dict.fromkeys(DeepseekV3(config, device="meta").state_dict(), 0)
    parameters = DeepseekV3(config, device="meta").state_dict()
    for entry in entries(config):
        if not entry.copy:
            covered[entry.parameter] += parameters[entry.parameter][entry.part].numel()
    assert covered == {name: tensor.numel() for name, tensor in parameters.items()}
    names = [entry.name for entry in entries(config)]
    assert len(names) == len(set(names))


@pytest.fixture
def ragged():
    """Shapes that end inside a block of 128, as the 576 rows of kv_a_proj_with_mqa: 144 = 128 + 16, 320 = 2.5 x 128."""
    return tiny_model(
        hidden_size=320, kv_lora_rank=128, n_routed_experts=4, n_group=1, topk_group=1, num_hidden_layers=2
    )


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_fp8_checkpoint(tmp_path, ragged, scale_format):
    save(ragged, tmp_path, fp8=True, scale_format=scale_format)
    raw = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert raw["quant_method"] == "fp8"
    assert raw["weight_block_size"] == [128, 128]
    assert raw.get("scale_fmt") == ("ue8m0" if scale_format == "ue8m0" else None)

    tensors = read_folder(tmp_path)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert tensors[name].shape == (144, 320)
    assert tensors[name + "_scale_inv"].shape == (2, 3)
    high = ("embed_tokens", "norm", "lm_head", "head", "gate.weight", "bias", "eh_proj")
    for key, tensor in tensors.items():
        if key.endswith("_scale_inv"):
            assert tensor.dtype == torch.float32
            if scale_format == "ue8m0":
                assert torch.equal(tensor.log2(), tensor.log2().round())
        else:
            kept = any(part in key for part in high)
            assert (tensor.dtype == torch.float8_e4m3fn) == (not kept), key
            assert (key + "_scale_inv" in tensors) == (not kept)

    again = load(tmp_path)
    originals, loaded = dict(ragged.named_parameters()), dict(again.named_parameters())
    for entry in entries(ragged.config):
        if entry.copy or entry.parameter not in originals:
            continue
        want, got = originals[entry.parameter][entry.part], loaded[entry.parameter][entry.part]
        if not entry.quantized:
            assert torch.equal(got, want)
            continue
        q, s = tensors[entry.name].float(), tensors[entry.name + "_scale_inv"]
        for r in range(s.shape[0]):  # by hand, block by block: w = q * scale_inv
            for c in range(s.shape[1]):
                block = (slice(128 * r, 128 * r + 128), slice(128 * c, 128 * c + 128))
                assert torch.equal(got[block], q[block] * s[r, c])
        # Half a step of e4m3 is 2^-4 of the value, or half the smallest step 2^-9 times the scale.
        bound = torch.maximum(want.abs() * 2.0**-4, 2.0**-10 * s.max())
        assert ((got - want).abs() <= bound * 1.0001).all()


def test_fp8_checkpoint_in_bf16(tmp_path, ragged):
    """Dequantised in fp32 and rounded once."""
    save(ragged, tmp_path, fp8=True)
    wide, narrow = load(tmp_path), load(tmp_path, dtype=torch.bfloat16)
    for name, tensor in wide.state_dict().items():
        expected = tensor if "bias" in name else tensor.bfloat16()
        assert torch.equal(narrow.state_dict()[name], expected), name


def test_fp8_loses_nothing_twice(tmp_path, ragged):
    """With powers of two as scales, weights that were read from fp8 are written without a further error."""
    save(ragged, tmp_path / "a", fp8=True, scale_format="ue8m0")
    once = load(tmp_path / "a")
    save(once, tmp_path / "b", fp8=True, scale_format="ue8m0")
    assert_same_weights(load(tmp_path / "b"), once)


def test_names_of_other_readers(tmp_path):
    """torch_dtype for older readers, an index with the total size."""
    save(tiny_model().to(torch.bfloat16), tmp_path, shard_size=200_000)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tensors = read_folder(tmp_path)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as shard:
            assert name in shard.keys()  # noqa: SIM118 - not a dict
            assert shard.metadata() == {"format": "pt"}


def test_saving_over_another_checkpoint(tmp_path):
    """Stale shards and a stale index go, other files stay."""
    (tmp_path / "loss.png").write_bytes(b"picture")
    save(tiny_model(), tmp_path, shard_size=100_000)
    small = tiny_model(num_hidden_layers=2)
    save(small, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "loss.png", "model.safetensors"]
    assert_same_weights(load(tmp_path), small)
    save(small, tmp_path, shard_size=100_000)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_weights(load(tmp_path), small)


def test_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old = tiny_model()
    save(old, tmp_path, shard_size=100_000)
    before = sorted(path.name for path in tmp_path.iterdir())
    written = []

    def fail_on_third(tensors, path, metadata):
        if len(written) == 2:
            raise OSError("disk full")
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(writing, "save_file", fail_on_third)
    with pytest.raises(OSError, match="disk full"):
        save(tiny_model(), tmp_path, shard_size=100_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert_same_weights(load(tmp_path), old)


def test_progress(tmp_path):
    """Tensors that are written, bytes that are read: these are what takes the time."""
    model = tiny_model()
    seen = []
    save(model, tmp_path, progress=lambda done, total: seen.append((done, total)))
    total = len(list(entries(model.config)))
    assert seen == [(i + 1, total) for i in range(total)]
    seen.clear()
    load(tmp_path, progress=lambda done, total: seen.append((done, total)))
    done, totals = zip(*seen, strict=True)
    nbytes = sum(tensor.nbytes for tensor in read_folder(tmp_path).values())
    assert set(totals) == {nbytes}
    assert list(done) == sorted(done)
    assert done[-1] == nbytes


def test_mtp_can_be_left_out(tmp_path):
    model = tiny_model()
    save(model, tmp_path)
    without = load(tmp_path, mtp=False)
    assert len(without.mtp) == 0
    assert without.config.num_nextn_predict_layers == 0
    tokens = torch.arange(20)
    assert torch.equal(without(tokens).logits, model(tokens).logits)
    save(without, tmp_path / "without")
    assert len(load(tmp_path / "without").mtp) == 0
    with pytest.raises(ValueError, match="mtp=True, but num_nextn_predict_layers is 0"):
        load(tmp_path / "without", mtp=True)


def test_arguments_of_save(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="shard_size"):
        save(model, tmp_path, shard_size=0)
    with pytest.raises(ValueError, match="scale_format"):
        save(model, tmp_path, fp8=True, scale_format="e8m0")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        save(model, tmp_path, tokenizer_from=tmp_path / "nowhere")
