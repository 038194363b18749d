"""A folder with a model is data: nothing in it is run, and nothing that could run is read."""

import ast
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

from dskernels.model import Config, DeepseekV3, load, save

ROOT = Path(__file__).parent.parent
RUNS = {"eval", "exec", "compile", "__import__"}
UNPICKLES = {
    ("torch", "load"),
    ("numpy", "load"),
    ("np", "load"),
    ("pickle", "load"),
    ("pickle", "loads"),
    ("os", "system"),
    ("runpy", "run_path"),
}


def sources():
    return [path for path in (ROOT / "dskernels").rglob("*.py") if "reference" not in path.parts]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_or_runs_text(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"} & {
                n.split(".")[0] for n in names
            }
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name):
            assert node.func.id not in RUNS, f"line {node.lineno}"
        elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            assert (node.func.value.id, node.func.attr) not in UNPICKLES, f"line {node.lineno}"


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.write_text, (Path(self.path), "ran")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    save(DeepseekV3(Config.from_name("tiny")), path)
    return path


def test_code_and_pickles_beside_the_weights_are_not_run(folder, tmp_path):
    trap = tmp_path / "trap"
    code = f"open({str(trap)!r}, 'w').write('ran')\n"
    for name in (
        "modeling_deepseek.py",
        "configuration_deepseek.py",
        "tokenization_x.py",
        "__init__.py",
        "conftest.py",
    ):
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "model.pt", "optimizer.pt", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Payload(trap)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    load(folder)
    assert not trap.exists()


def test_weights_that_are_a_pickle_are_refused(folder, tmp_path):
    trap = tmp_path / "trap"
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(ValueError, match=re.escape(weights.name)):
        load(folder)
    weights.unlink()
    torch.save({"x": torch.zeros(2)}, folder / "pytorch_model.bin")
    with pytest.raises((ValueError, FileNotFoundError)):
        load(folder)
    assert not trap.exists()


def test_shards_stay_in_their_folder(folder, tmp_path):
    """An index names files; a name that leads elsewhere is not followed."""
    (weights,) = folder.glob("*.safetensors")
    shutil.move(weights, tmp_path / "outside.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "outside.safetensors", "pt") as shard:
        index = {"weight_map": dict.fromkeys(shard.keys(), "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"not an index of tensors .* beside it"):
        load(folder)
