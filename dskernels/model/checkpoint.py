"""Checkpoints in the Hugging Face layout: safetensors shards, bf16 or fp8 in 128x128 blocks, with the MTP modules."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import dskernels as ds
from dskernels.model.config import Config
from dskernels.model.hf_names import Entry, entries, mtp_prefix
from dskernels.model.model import DeepseekV3
from dskernels.types import Fp8Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SCALE_SUFFIX = "_scale_inv"
FP8_BLOCK = (128, 128)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Progress = Callable[[int, int], None]


def save(
    model: DeepseekV3,
    folder: str | Path,
    *,
    fp8: bool = False,
    scale_format: str = "fp32",
    shard_size: int = 5_000_000_000,
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint that `load`, ``transformers``, vLLM and SGLang read.

    Every file is written in full under another name first and the index comes last, so that an interruption leaves
    what was there before. Other files in the folder stay.

    Args:
        model: what to write.
        folder: made if it does not exist.
        fp8: write the linear layers in e4m3 with a ``weight_scale_inv`` for each 128x128 block (not embedding, head,
            router, norms and the MTP projection).
        scale_format: of those scales, "fp32" or "ue8m0" (powers of two).
        shard_size: bytes after which a new file begins.
        progress: called with the number of tensors written and their total.

    Raises:
        ValueError: a shard size below 1, or a scale format that is not known.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size: expected at least 1 byte, got {shard_size}")
    if scale_format not in ("fp32", "ue8m0"):
        raise ValueError(f'scale_format: expected "fp32" or "ue8m0", got {scale_format!r}')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    written: list[tuple[Path, list[str]]] = []
    total_size = 0
    try:
        for shard in _shards(_tensors(model, fp8, scale_format, progress), shard_size):
            written.append((folder / f"model-{len(written) + 1:05d}.partial", list(shard)))
            total_size += sum(tensor.nbytes for tensor in shard.values())
            save_file(shard, written[-1][0], metadata={"format": "pt"})
    except BaseException:
        for path, _ in written:
            path.unlink(missing_ok=True)
        raise

    # All tensors are on the disk; from here on files are only renamed.
    stale = {path.name for path in folder.iterdir() if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", path.name)}
    weight_map = {}
    for i, (path, names) in enumerate(written, 1):
        file = SINGLE_FILE if len(written) == 1 else f"model-{i:05d}-of-{len(written):05d}.safetensors"
        os.replace(path, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(written) > 1:
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    else:
        (folder / INDEX_FILE).unlink(missing_ok=True)
    _write_json(folder / "config.json", _hf_config(model, scale_format if fp8 else None))
    for name in stale - set(weight_map.values()):
        (folder / name).unlink()


@torch.no_grad()
def load(
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    fp8: bool = False,
    mtp: bool | None = None,
    progress: Progress | None = None,
) -> DeepseekV3:
    """Reads a checkpoint in the Hugging Face layout, in bf16, fp16, fp32 or fp8 in blocks.

    Args:
        folder: with ``config.json`` and ``*.safetensors``.
        device: where to; by default torch's default device.
        dtype: of the parameters, into which fp8 weights are dequantised; by default what ``config.json`` says, else
            bf16. The router bias is fp32 always.
        fp8: compute in fp8, see `DeepseekV3`.
        mtp: whether to read the MTP modules. None reads them if they are there, and warns if the config announces
            some and they are not (``transformers`` leaves them out when it saves).
        progress: called with the number of tensors read and their total.

    Raises:
        FileNotFoundError: the folder, ``config.json``, the weights or one of their shards is not there.
        ValueError: a file is damaged, a tensor is missing, unknown, of another shape or of an unreadable type, or the
            architecture or quantisation is not known. The message is one line and names the file and the tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    config = Config.from_hf(folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    block = _fp8_block(raw, folder)
    files = _Files(folder)
    config = _config_with_mtp(config, files, mtp, folder)
    _refuse_unknown(files, config)
    dtype = DTYPES.get(raw.get("torch_dtype") or raw.get("dtype") or "", torch.bfloat16) if dtype is None else dtype

    model = DeepseekV3(config, fp8=fp8, device="meta", dtype=dtype)
    model.to_empty(device=torch.get_default_device() if device is None else device)
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    wanted = sorted(
        (entry for entry in entries(config) if not entry.copy), key=lambda entry: str(files.path(entry.name))
    )
    for done, entry in enumerate(wanted, 1):
        part = parameters[entry.parameter][entry.part]
        part.copy_(_read(files, entry, list(part.shape), block))
        if progress is not None:
            progress(done, len(wanted))
    return model


def _tensors(
    model: DeepseekV3, fp8: bool, scale_format: str, progress: Progress | None
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors in the order of the file, one at a time on the CPU."""
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    table = list(entries(model.config))
    for done, entry in enumerate(table, 1):
        # A tensor of its own: safetensors refuses views of shared memory.
        tensor = parameters[entry.parameter].detach()[entry.part].clone(memory_format=torch.contiguous_format)
        if fp8 and entry.quantized:
            data, scale, _ = ds.quantize(tensor, FP8_BLOCK, scale_format=scale_format)
            yield entry.name, data.cpu()
            yield entry.name + SCALE_SUFFIX, scale.contiguous().cpu()
        else:
            yield entry.name, tensor.cpu()
        if progress is not None:
            progress(done, len(table))


def _shards(tensors: Iterator[tuple[str, Tensor]], shard_size: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_size:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _hf_config(model: DeepseekV3, scale_format: str | None) -> dict[str, Any]:
    values = model.config.to_hf()
    values["torch_dtype"] = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    if scale_format is not None:
        values["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(FP8_BLOCK),
            **({"scale_fmt": "ue8m0"} if scale_format == "ue8m0" else {}),
        }
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _fp8_block(raw: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    """The block that scales belong to, also where the config mentions none (it may be plain bf16)."""
    quantization = raw.get("quantization_config")
    if quantization is None:
        return FP8_BLOCK
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size", FP8_BLOCK)
    if method != "fp8" or quantization.get("fmt", "e4m3") != "e4m3" or not block or len(block) != 2:
        raise ValueError(
            f"{folder / 'config.json'}: quantisation {method} with blocks {block} is not implemented, fp8 in blocks is"
        )
    return block[0], block[1]


class _Files:
    """The tensors of a folder by name, whichever shard they are in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.handles: dict[Path, Any] = {}
        self.paths: dict[str, Path] = {}
        index, single = folder / INDEX_FILE, folder / SINGLE_FILE
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self.paths = {name: folder / file for name, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{index}: not an index of tensors (JSON with a weight_map)") from None
        elif single.is_file():
            self.paths = dict.fromkeys(self._open(single).keys(), single)
        else:
            raise FileNotFoundError(f"{folder}: neither {INDEX_FILE} nor {SINGLE_FILE}")

    def path(self, name: str) -> Path:
        """The file of a tensor."""
        if name not in self.paths:
            raise ValueError(f"{self.folder}: tensor {name} is missing, no file has it")
        return self.paths[name]

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        path = self.path(name)
        file = self._open(path)
        try:
            return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: tensor {name} cannot be read ({error})") from None

    def _open(self, path: Path) -> Any:
        if path not in self.handles:
            try:
                self.handles[path] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise FileNotFoundError(f"{path}: no such file") from None
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from None
        return self.handles[path]


def _config_with_mtp(config: Config, files: _Files, mtp: bool | None, folder: Path) -> Config:
    """The config with the MTP modules that are to be read."""
    announced = config.num_nextn_predict_layers
    without = config.replace(num_nextn_predict_layers=0)
    if not announced or mtp is False:
        if mtp:
            raise ValueError(f"{folder / 'config.json'}: mtp=True, but num_nextn_predict_layers is 0")
        return without
    prefix = mtp_prefix(config, 0) + "."
    if mtp is None and not any(name.startswith(prefix) for name in files.paths):
        warnings.warn(f"{folder}: config.json announces {announced} MTP module(s), the files have none", stacklevel=4)
        return without
    return config


def _refuse_unknown(files: _Files, config: Config) -> None:
    """A tensor nobody reads is a model somebody misunderstands."""
    known = {entry.name for entry in entries(config)}
    first_mtp = config.num_hidden_layers
    for name, path in files.paths.items():
        if name in known or name.removesuffix(SCALE_SUFFIX) in known or name.endswith("rotary_emb.inv_freq"):
            continue
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= first_mtp and not config.num_nextn_predict_layers:
            continue
        raise ValueError(f"{path}: unknown tensor {name}")


def _read(files: _Files, entry: Entry, shape: list[int], block: tuple[int, int]) -> Tensor:
    """The tensor of an entry, dequantised to fp32 if it is fp8."""
    path, tensor = files.path(entry.name), files.read(entry.name)
    _check_shape(path, entry.name, tensor, shape)
    if tensor.dtype in DTYPES.values():
        return tensor
    if tensor.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"{path}: tensor {entry.name} has type {tensor.dtype}; readable are {', '.join(DTYPES)} and e4m3"
        )
    scale_name = entry.name + SCALE_SUFFIX
    scale = files.read(scale_name)
    _check_shape(
        files.path(scale_name), scale_name, scale, [-(-n // step) for n, step in zip(shape, block, strict=True)]
    )
    return Fp8Tensor(tensor, scale.float(), block).dequantize()


def _check_shape(path: Path, name: str, tensor: Tensor, shape: list[int]) -> None:
    if list(tensor.shape) != shape:
        raise ValueError(f"{path}: tensor {name} has shape {list(tensor.shape)}, expected {shape}")
