"""Every way a folder can be wrong: one line that names the file and the tensor."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from dskernels.model import load, save

TENSOR = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    save(tiny_model(), folder / "plain", shard_size=400_000)
    save(tiny_model(), folder / "fp8", fp8=True)
    save(tiny_model(), folder / "single")
    return folder


@pytest.fixture
def folder(saved, tmp_path, request):
    shutil.copytree(saved / request.param, tmp_path / "model")
    return tmp_path / "model"


def file_of(folder, name):
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return folder / "model.safetensors"
    return folder / json.loads(index.read_text())["weight_map"][name]


def edit(folder, name, change):
    """Replace a tensor in its file, or remove it if `change` gives None."""
    path = file_of(folder, name)
    tensors = load_file(path)
    tensor = change(tensors.pop(name))
    save_file(tensors if tensor is None else {**tensors, name: tensor}, path)
    return path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def assert_one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


@pytest.mark.parametrize("folder", ["plain", "single"], indirect=True)
@pytest.mark.parametrize("keep", [0.5, 0.0, 0.001], ids=["half", "empty", "header"])
def test_truncated_shard(folder, keep):
    path = file_of(folder, TENSOR)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match="truncated") as error:
        load(folder)
    # Of a file without its header only an index can say what should be in it.
    assert_one_line(error, path, *(["tensor model."] if keep == 0.5 or "of" in path.name else []))


@pytest.mark.parametrize("folder", ["plain", "single"], indirect=True)
@pytest.mark.parametrize("missing", [1, 200])
def test_truncated_shard_names_the_tensor_that_is_cut(folder, missing):
    path = file_of(folder, TENSOR)
    with safe_open(path, framework="pt") as shard:
        last = shard.offset_keys()[-1]
    content = path.read_bytes()
    path.write_bytes(content[:-missing])
    with pytest.raises(ValueError, match="truncated, tensor") as error:
        load(folder)
    assert_one_line(error, path, last, f"{len(content):,}", f"{len(content) - missing:,}")


@pytest.mark.parametrize("folder", ["single"], indirect=True)
def test_damaged_headers(folder):
    """Whatever a byte of the header is, and whatever its length: a line with the file's name, or the right tensors."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    random = torch.Generator().manual_seed(0)
    for _ in range(60):
        at = int(torch.randint(0, 8 + length, (1,), generator=random))
        value = int(torch.randint(0, 256, (1,), generator=random))
        path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
        try:
            load(folder)
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017 - some of them do no harm
            assert str(folder) in str(error)  # noqa: PT017
    path.write_bytes(content + b"more")
    with pytest.raises(ValueError, match="4 bytes after the last tensor") as error:
        load(folder)
    assert_one_line(error, path)


@pytest.mark.parametrize("folder", ["plain"], indirect=True)
def test_missing_shard(folder):
    path = file_of(folder, TENSOR)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no such file") as error:
        load(folder)
    assert_one_line(error, path)


@pytest.mark.parametrize("folder", ["plain"], indirect=True)
def test_tensor_missing_in_its_shard(folder):
    """The index promises it."""
    path = edit(folder, TENSOR, lambda tensor: None)
    with pytest.raises(ValueError, match="says that it is in this file") as error:
        load(folder)
    assert_one_line(error, path, TENSOR)


@pytest.mark.parametrize("folder", ["single"], indirect=True)
def test_tensor_missing_altogether(folder):
    edit(folder, TENSOR, lambda tensor: None)
    with pytest.raises(ValueError, match="is missing") as error:
        load(folder)
    assert_one_line(error, folder, TENSOR)


@pytest.mark.parametrize("folder", ["plain", "fp8"], indirect=True)
def test_misshapen_tensor(folder):
    path = edit(folder, TENSOR, lambda tensor: tensor[:-1].clone())
    with pytest.raises(ValueError, match=r"has shape \[31, 64\], expected \[32, 64\]") as error:
        load(folder)
    assert_one_line(error, path, TENSOR)


@pytest.mark.parametrize("folder", ["plain"], indirect=True)
def test_tensor_of_unreadable_type(folder):
    """Integers, and e4m3 without a scale."""
    path = edit(folder, TENSOR, lambda tensor: tensor.to(torch.int8))
    with pytest.raises(ValueError, match="has type I8; readable are") as error:
        load(folder)
    assert_one_line(error, path, TENSOR)
    edit(folder, TENSOR, lambda tensor: tensor.to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="is missing") as error:
        load(folder)
    assert_one_line(error, folder, TENSOR + "_scale_inv")


@pytest.mark.parametrize("folder", ["fp8"], indirect=True)
def test_misshapen_scale(folder):
    path = edit(folder, TENSOR + "_scale_inv", lambda scale: scale.expand(2, 1).contiguous())
    with pytest.raises(ValueError, match=r"has shape \[2, 1\], expected \[1, 1\]") as error:
        load(folder)
    assert_one_line(error, path, TENSOR + "_scale_inv")


@pytest.mark.parametrize("folder", ["single"], indirect=True)
@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.5.self_attn.o_proj.weight", "x"]
)
def test_unknown_tensor(folder, name):
    path = folder / "model.safetensors"
    save_file({**load_file(path), name: torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="unknown tensor") as error:
        load(folder)
    assert_one_line(error, path, name)


@pytest.mark.parametrize("folder", ["single"], indirect=True)
def test_rotary_tables_of_old_checkpoints_are_no_harm(folder):
    path = folder / "model.safetensors"
    save_file({**load_file(path), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}, path)
    save(load(folder), folder.parent / "again")
    again = load_file(folder.parent / "again" / "model.safetensors")
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in again


@pytest.mark.parametrize("folder", ["plain"], indirect=True)
def test_tensor_that_the_index_does_not_list(folder):
    path = file_of(folder, TENSOR)
    save_file({**load_file(path), "model.layers.1.mlp.experts.99.up_proj.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="which the index does not list") as error:
        load(folder)
    assert_one_line(error, path, "model.layers.1.mlp.experts.99.up_proj.weight")


@pytest.mark.parametrize("folder", ["single"], indirect=True)
def test_layers_beyond_those_that_the_config_has(folder):
    """They are an MTP module's where one is announced, and may be left out; else they are one layer too many."""
    load(folder, mtp=False)
    path = edit_config(folder, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"unknown tensor model\.layers\.4\.") as error:
        load(folder)
    assert_one_line(error, path.parent / "model.safetensors")


@pytest.mark.parametrize("folder", ["plain", "single"], indirect=True)
@pytest.mark.parametrize("part", ["embed_tokens", "shared_head.head"])
def test_mtp_module_with_an_embedding_or_head_of_its_own(folder, part):
    """Computing with the main model's would be another model."""
    name = f"model.layers.4.{part}.weight"
    path = edit(folder, name, lambda tensor: tensor + 1)
    with pytest.raises(ValueError, match="is not the copy") as error:
        load(folder)
    assert_one_line(error, path, name)
    load(folder, mtp=False)


@pytest.mark.parametrize("folder", ["single"], indirect=True)
def test_unknown_architecture_or_quantisation(folder):
    path = edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ValueError, match="quantisation awq") as error:
        load(folder)
    assert_one_line(error, path)
    for broken in ("fp8", {"quant_method": "fp8", "weight_block_size": [128]}, {"quant_method": "fp8", "fmt": "e5m2"}):
        path = edit_config(folder, quantization_config=broken)
        with pytest.raises(ValueError, match=r"quantisation|quantization_config") as error:
            load(folder)
        assert_one_line(error, path)
    path = edit_config(folder, quantization_config={"quant_method": "fp8", "scale_fmt": "int"})
    with pytest.raises(ValueError, match="scale_fmt = 'int'") as error:
        load(folder)
    assert_one_line(error, path)
    path = edit_config(folder, architectures=["DeepseekV32ForCausalLM"])
    with pytest.raises(ValueError, match="unknown architecture DeepseekV32ForCausalLM") as error:
        load(folder)
    assert_one_line(error, path)


@pytest.mark.parametrize("folder", ["plain"], indirect=True)
@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"weight_map": 1}',
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../x.safetensors"}}',
        '{"weight_map": {"a": 1}}',
    ],
)
def test_broken_index(folder, content):
    path = folder / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="not an index of tensors") as error:
        load(folder)
    assert_one_line(error, path)


@pytest.mark.parametrize("folder", ["single"], indirect=True)
def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors\.index\.json nor model\.safetensors"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(folder / "nowhere")


@pytest.mark.parametrize("folder", ["plain"], indirect=True)
def test_weights_that_do_not_fit_are_not_begun(folder, monkeypatch):
    """Said at once, not after minutes of reading."""
    monkeypatch.setattr("dskernels.model.checkpoint.free_memory", lambda device: 1_000_000)
    read = []
    with pytest.raises(torch.OutOfMemoryError, match=r"the weights take .* GB, cpu has 0\.0 GB free") as error:
        load(folder, progress=lambda *done: read.append(done))
    assert_one_line(error, folder)
    assert read == []
    monkeypatch.setattr("dskernels.model.checkpoint.free_memory", lambda device: None)
    load(folder)
