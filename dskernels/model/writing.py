"""Write checkpoints in the Hugging Face layout, byte for byte as they were read if nothing has changed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dskernels.model.checkpoint import E4M3, Progress
from dskernels.model.config import Config
from dskernels.model.fp8_weights import FP8_BLOCK, SCALE_SUFFIX, quantize_weight
from dskernels.model.hf_names import entries
from dskernels.model.model import DeepseekV3
from dskernels.model.shards import INDEX_FILE, SINGLE_FILE
from dskernels.model.tokens import TOKENIZER_FILES
from dskernels.types import Fp8Tensor


@torch.no_grad()
def save(
    model: DeepseekV3,
    folder: str | Path,
    *,
    fp8: bool | None = None,
    scale_format: str | None = None,
    shard_size: int = 5_000_000_000,
    tokenizer_from: str | Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint that `load`, ``transformers``, vLLM and SGLang can read.

    A model that was read and not changed is written as it was: every tensor to the byte, and ``config.json`` with every
    field; only the division into files follows ``shard_size``. (This does not hold for dequantised weights, nor for a
    tensor of more than two million elements that was stored in a wider type than the model's.)

    Every file is first written completely under another name, and the index comes last, so an interruption leaves what
    was there before. Other files in the folder stay. The host holds the content of one file at a time.

    Args:
        model: the model.
        folder: created if it does not exist.
        fp8: write the linear layers in e4m3 with a ``weight_scale_inv`` for each 128x128 block (not embedding, head,
            router, norms and the MTP projection). None does so if the model keeps its weights in fp8.
        scale_format: of those scales, "fp32" or "ue8m0" (powers of two). None takes the model's own.
        shard_size: the number of bytes after which a new file begins.
        tokenizer_from: a folder whose tokenizer, chat template and generation settings are copied.
        progress: called with the number of tensors written and their total.

    Raises:
        ValueError: a shard size below 1, or a scale format that is unknown or not that of weights kept in fp8.
        FileNotFoundError: ``tokenizer_from`` is not a folder.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size: expected at least 1 byte, got {shard_size}")
    if scale_format not in (None, "fp32", "ue8m0"):
        raise ValueError(f'scale_format: expected "fp32" or "ue8m0", got {scale_format!r}')
    kept = any(parameter.dtype == E4M3 for parameter in model.parameters())
    fp8 = kept if fp8 is None else fp8
    if kept and fp8 and scale_format not in (None, model.scale_format):
        raise ValueError(
            f'scale_format: the weights are in fp8 with "{model.scale_format}" scales, not {scale_format!r}'
        )
    scale_format = scale_format or model.scale_format
    if tokenizer_from is not None and not Path(tokenizer_from).is_dir():
        raise FileNotFoundError(f"{tokenizer_from}: no such folder")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    written: list[tuple[Path, list[str]]] = []
    total_size = 0
    try:
        for shard in in_shards(_tensors(model, kept, fp8, scale_format, progress), shard_size):
            written.append((folder / f"model-{len(written) + 1:05d}.partial", list(shard)))
            total_size += sum(tensor.nbytes for tensor in shard.values())
            save_file(shard, written[-1][0], metadata={"format": "pt"})
    except BaseException:
        for path, _ in written:
            path.unlink(missing_ok=True)
        raise

    # All data is on the disk; from here on files are only renamed.
    stale = {path.name for path in folder.iterdir() if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", path.name)}
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
    if tokenizer_from is not None and not folder.samefile(tokenizer_from):
        for name in TOKENIZER_FILES:
            if (Path(tokenizer_from) / name).is_file():
                shutil.copyfile(Path(tokenizer_from) / name, folder / name)


def _tensors(
    model: DeepseekV3, kept: bool, fp8: bool, scale_format: str, progress: Progress | None
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors in the order of the file, one at a time on the CPU."""
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    source = model.source
    table = [
        entry
        for entry in entries(model.config, kept_in_fp8=kept)
        if not entry.copy or source is None or entry.name in source.copies
    ]
    dtype = model.embed_tokens.weight.dtype

    def stored(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """The value as it was stored, if it still means the same."""
        # A separate tensor: safetensors refuses views that share memory.
        tensor = tensor.clone(memory_format=torch.contiguous_format).cpu()
        exact = None if source is None else source.exact.get(name)
        if exact is not None and exact.shape == tensor.shape and torch.equal(exact.to(tensor.dtype), tensor):
            return name, exact
        return name, tensor

    for done, entry in enumerate(table, 1):
        tensor = entry.from_part(parameters[entry.parameter].detach()[entry.part])
        if tensor.dtype == E4M3:
            scale = entry.from_part(parameters[entry.parameter + SCALE_SUFFIX][entry.scale_part])
            if fp8:
                yield stored(entry.name, tensor)
                yield stored(entry.name + SCALE_SUFFIX, scale)
            else:
                yield stored(entry.name, Fp8Tensor(tensor, scale, FP8_BLOCK).dequantize(dtype))
        elif fp8 and entry.quantized:
            data, scale, _ = quantize_weight(tensor.contiguous(), scale_format)
            yield stored(entry.name, data)
            yield stored(entry.name + SCALE_SUFFIX, scale)
        else:
            yield stored(entry.name, tensor)
        if progress is not None:
            progress(done, len(table))
    yield from (source.extras if source else {}).items()


def in_shards(tensors: Iterable[tuple[str, Tensor]], shard_size: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in portions of at most this many bytes, or of one tensor."""
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
    """The config that was read, with what has changed since, or a new one."""
    ours = model.config.to_hf()
    values = ours
    if model.source is not None:
        values = dict(model.source.config)
        before = Config.from_hf(values).to_hf()
        changed = {name for name in ours if ours[name] != before[name]}
        if changed & {"rope_theta", "rope_scaling"}:
            values.pop("rope_parameters", None)
            changed |= {"rope_theta", "rope_scaling"}
        if "num_nextn_predict_layers" in changed:
            values.pop("num_mtp_layers", None)
        values.update({name: ours[name] for name in changed})
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    for name in {"torch_dtype", "dtype"} & values.keys() or {"torch_dtype"}:
        values[name] = dtype
    if scale_format is None:
        values.pop("quantization_config", None)
        return values
    ours = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    quantization = {**(values.get("quantization_config") or ours), "weight_block_size": list(FP8_BLOCK)}
    if (quantization.get("scale_fmt") == "ue8m0") != (scale_format == "ue8m0"):
        quantization["scale_fmt"] = scale_format
        if scale_format == "fp32":
            del quantization["scale_fmt"]  # other readers take its absence for fp32
    values["quantization_config"] = quantization
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
