"""Read checkpoints in the Hugging Face layout: safetensors shards, bf16 or fp8 in 128x128 blocks, MTP modules."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from dskernels.device import free_memory
from dskernels.model.config import Config, read_json
from dskernels.model.fp8_weights import (
    FP8_BLOCK,
    SCALE_SUFFIX,
    keep_in_fp8,
    quantize_weight,
    whole_blocks,
    write_out_for_decode,
)
from dskernels.model.hf_names import Entry, entries, mtp_prefix
from dskernels.model.model import DeepseekV3
from dskernels.model.shards import Shards
from dskernels.types import Fp8Tensor

if TYPE_CHECKING:
    from dskernels.model.train_pieces import Piece

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
E4M3 = torch.float8_e4m3fn
SMALL = 1 << 21  # elements; routers of DeepSeek-V3 have 1.8 M
ROWS = 4096  # rows of a copy of the embedding that are compared at a time
# Config fields that may differ between a model and the one whose weights it takes: a longer context, other text. The
# number of MTP modules is determined by the tensors.
NOT_LEARNT = {"max_position_embeddings", "rope_scaling", "initializer_range", "bos_token_id", "eos_token_id"}
NOT_LEARNT |= {"num_nextn_predict_layers"}

Progress = Callable[[int, int], None]


@dataclass
class Source:
    """What `save` writes back unchanged, beyond what the model computes with.

    Attributes:
        config: the content of ``config.json``.
        copies: the copies of embedding and head that the MTP modules came with.
        exact: small tensors in the type in which they were stored, if the model holds them in another.
        extras: stored tensors that could be computed: the rotary frequencies of older checkpoints.
    """

    config: dict[str, Any]
    copies: set[str] = field(default_factory=set)
    exact: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def load(
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    fp8: bool = False,
    trainable: bool = False,
    mtp: bool | None = None,
    progress: Progress | None = None,
) -> DeepseekV3:
    """Read a checkpoint in the Hugging Face layout, in bf16, fp16, fp32 or fp8 in blocks.

    All headers are checked first. Then the files are mapped one by one, and each tensor is copied straight to its place
    on the device, so the host never holds more than the pages of one file, which it may drop, and one tensor.

    Args:
        folder: contains ``config.json`` and ``*.safetensors``.
        device: of the model; by default torch's default device. "meta" checks the headers and reads no tensor.
        dtype: of the parameters, to which fp8 weights are dequantised; by default the one in ``config.json``, else
            bf16. The router bias is always fp32.
        fp8: compute in fp8, with weights in e4m3: those of an fp8 checkpoint as they are stored; others are quantised
            once, one by one, as they are read. Such weights have no gradient.
        trainable: with ``fp8``, keep all weights in ``dtype`` and quantise them at each use, as training requires.
        mtp: whether to read the MTP modules. None reads them if they exist, and warns if the config announces some that
            do not (``transformers`` leaves them out when it saves).
        progress: called with the number of bytes read and their total.

    Returns:
        The model; `save` writes it as it was read.

    Raises:
        FileNotFoundError: the folder, ``config.json``, the weights or one of their shards does not exist.
        ValueError: a file is damaged, a tensor is missing, unknown, of another shape or of an unreadable type, or the
            architecture or quantisation is not known. The message is one line and names the file and the tensor.
        torch.OutOfMemoryError: the weights do not fit in the memory of the device.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    config = Config.from_hf(folder)
    raw = read_json(folder / "config.json")
    keep = fp8 and not trainable
    block = fp8_block_of(raw, folder, keep)
    shards = Shards(folder)
    config, dropped = _config_with_mtp(config, shards, mtp, folder)
    announced = DTYPES.get(str(raw.get("torch_dtype") or raw.get("dtype")), torch.bfloat16)

    model = DeepseekV3(config, fp8=fp8, device="meta", dtype=announced if dtype is None else dtype)
    _check(shards, list(entries(config)), dict(_tensors_of(model)), block, dropped)
    if keep:
        keep_in_fp8(model, scale_format=scale_format_of(raw))
    device = torch.get_default_device() if device is None else torch.device(device)
    if device.type == "meta":
        return model
    needed, free = sum(tensor.nbytes for _, tensor in _tensors_of(model)), free_memory(device)
    if free is not None and needed > free:
        raise torch.OutOfMemoryError(
            f"{folder}: the weights take {needed / 1e9:,.1f} GB, {device} has {free / 1e9:,.1f} GB free"
        )
    model.to_empty(device=device)
    parameters = dict(_tensors_of(model))
    if keep:
        clear_filling(config, parameters)
    model.source = Source(raw)
    table = list(entries(config, kept_in_fp8=keep))
    _read_all(Reader(shards, parameters, block, model), table, dtype in (None, announced), progress)
    write_out_for_decode(model)
    model.source.extras = {
        name: shards.read(name).clone() for name in shards if _is_rotary(name) and not _of_layers(name, dropped)
    }
    shards.close()
    return model


@torch.no_grad()
def load_weights(model: DeepseekV3, folder: str | Path, *, into: Mapping[str, Piece] | None = None) -> None:
    """Read a checkpoint's weights and router biases into an existing model, converted to the model's type.

    Args:
        model: one that `load` could make from the folder; context length, boundary tokens and the standard deviation of
            initial weights may differ.
        folder: see `load`.
        into: read these rows of its parameters and buffers, by name, instead of the model, which may then be on the
            meta device; tensors without any of these rows are checked, but not read.

    Raises:
        FileNotFoundError: as `load`.
        ValueError: as `load`; or the model is another one. The message is one line and names the tensor that has
            another shape, is missing or does not belong to the model, or else the config field that differs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    theirs, raw = Config.from_hf(folder), read_json(folder / "config.json")
    block, shards = fp8_block_of(raw, folder, False), Shards(folder)
    parameters, table = dict(_tensors_of(model)), list(entries(model.config))
    _check(shards, table, parameters, block, range(0))
    for name in (each.name for each in dataclasses.fields(Config) if each.name not in NOT_LEARNT):
        there, here = getattr(theirs, name), getattr(model.config, name)
        if there != here:
            raise ValueError(f"{folder / 'config.json'}: {name} is {there!r}, that of the model is {here!r}")
    model.source = Source(raw)
    _read_all(Reader(shards, parameters, block, model, into), table, False, None)
    model.source = None  # it is no longer the model that was read
    shards.close()


def scale_format_of(raw: Mapping[str, Any]) -> str:
    """How a checkpoint's scales are rounded."""
    quantization = raw.get("quantization_config") or {}
    return "ue8m0" if quantization.get("scale_fmt") == "ue8m0" else "fp32"


def _tensors_of(model: DeepseekV3) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def fp8_block_of(raw: Mapping[str, Any], folder: Path, keep: bool) -> tuple[int, int]:
    """The block that scales belong to, even if the config does not mention any (a plain bf16 checkpoint has none)."""
    quantization = raw.get("quantization_config")
    if quantization is None:
        return FP8_BLOCK
    file = folder / "config.json"
    if not isinstance(quantization, dict):
        raise ValueError(f"{file}: quantization_config must be an object, got {quantization!r}")
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size", FP8_BLOCK)
    sizes = isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    if method != "fp8" or quantization.get("fmt", "e4m3") != "e4m3" or not sizes:
        raise ValueError(f"{file}: quantisation {method} with blocks {block} is not implemented, fp8 in blocks is")
    if quantization.get("scale_fmt") not in (None, "fp32", "float", "ue8m0"):
        raise ValueError(f"{file}: scale_fmt = {quantization['scale_fmt']!r} is not implemented, ue8m0 is")
    if keep and tuple(block) != FP8_BLOCK:
        raise ValueError(
            f"{file}: weights in blocks of {block} cannot stay in fp8, only those of {list(FP8_BLOCK)} can"
        )
    return block[0], block[1]


def _config_with_mtp(config: Config, shards: Shards, mtp: bool | None, folder: Path) -> tuple[Config, range]:
    """The config with the MTP modules that are to be read, and the layers that are left out."""
    announced = config.num_nextn_predict_layers
    layers = range(config.num_hidden_layers, config.num_hidden_layers + announced)
    if not announced:
        if mtp:
            raise ValueError(f"{folder / 'config.json'}: mtp=True, but num_nextn_predict_layers is 0")
        return config, layers
    without = config.replace(num_nextn_predict_layers=0)
    if mtp is None and not any(name.startswith(mtp_prefix(config, 0) + ".") for name in shards):
        warnings.warn(f"{folder}: config.json announces {announced} MTP module(s), the files have none", stacklevel=4)
        return without, layers
    return (without, layers) if mtp is False else (config, range(0))


def _check(
    shards: Shards, table: list[Entry], shapes: Mapping[str, Tensor], block: tuple[int, int], dropped: range
) -> None:
    """Check that everything exists and has the right shape and type; an unknown tensor means that the model was
    misunderstood."""
    known: set[str] = set()
    for entry in table:
        if entry.copy and entry.name not in shards:
            continue
        stored = shards[entry.name]
        shape = list(shapes[entry.parameter][entry.part].shape)
        known.add(entry.name)
        _check_shape(stored.file, entry.name, stored.shape, shape)
        if stored.dtype in DTYPES.values():
            continue
        if stored.dtype != E4M3:
            raise ValueError(
                f"{stored.file}: tensor {entry.name} has type {str(stored.dtype).removeprefix('torch.')}; "
                f"readable are {', '.join(DTYPES)} and float8_e4m3fn with scales"
            )
        name = entry.name + SCALE_SUFFIX
        scale = shards[name]
        known.add(name)
        grid = [-(-n // step) for n, step in zip(shape, block, strict=False)]
        _check_shape(scale.file, name, scale.shape, grid)
        if scale.dtype not in (*DTYPES.values(), torch.float8_e8m0fnu):
            raise ValueError(f"{scale.file}: tensor {name} has type {scale.dtype}, which is none of a scale")
    everything = [*((name, stored.file, "") for name, stored in shards.items())]
    everything += [(name, file, ", which the index does not list") for name, file in shards.unlisted.items()]
    for name, file, where in everything:
        if name not in known and not _of_layers(name, dropped) and not _is_rotary(name):
            raise ValueError(f"{file}: unknown tensor {name}{where}")


def _check_shape(file: Path, name: str, shape: list[int], expected: list[int]) -> None:
    if shape != expected:
        raise ValueError(f"{file}: tensor {name} has shape {shape}, expected {expected}")


def _of_layers(name: str, layers: range) -> bool:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) in layers


def _is_rotary(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq")


def clear_filling(config: Config, parameters: Mapping[str, Tensor]) -> None:
    """Zero the parts that fill up widths to whole blocks."""
    inner = (
        config.intermediate_size,
        config.moe_intermediate_size,
        config.n_shared_experts * config.moe_intermediate_size,
    )
    if any(size != whole_blocks(size) for size in inner):
        for tensor in parameters.values():
            if tensor.dtype == E4M3:
                tensor.view(torch.uint8).zero_()


@dataclass
class Reader:
    """Copies tensors from the files to their places: in the parameters, or in pieces of them if there are any."""

    shards: Shards
    parameters: Mapping[str, Tensor]
    block: tuple[int, int]
    model: DeepseekV3
    pieces: Mapping[str, Piece] | None = None

    def fill(self, entry: Entry) -> None:
        """Read a tensor into its part of a parameter; it is quantised or dequantised on the device if needed."""
        place = self._place(entry)
        if place is None:
            return
        part, rows = place
        tensor = self.shards.read(entry.name).to(part.device)
        scale = None
        if tensor.dtype == E4M3:
            scale = self.shards.read(entry.name + SCALE_SUFFIX).to(part.device).float()
        if part.dtype == E4M3:
            if scale is None:
                tensor, scale, _ = quantize_weight(tensor, self.model.scale_format)
            part.copy_(entry.to_part(tensor))
            self.parameters[entry.parameter + SCALE_SUFFIX][entry.scale_part].copy_(entry.to_part(scale))
        else:
            part.copy_((tensor if scale is None else Fp8Tensor(tensor, scale, self.block).dequantize())[rows])

    def _place(self, entry: Entry) -> tuple[Tensor, slice] | None:
        """Where a tensor goes, and which of its rows go there; None if no piece has any of them."""
        everything = slice(None)
        if self.pieces is None:
            return self.parameters[entry.parameter][entry.part], everything
        piece = self.pieces.get(entry.parameter)
        if piece is None:
            return None
        first, *rest = entry.part or (everything,)
        # An expert's matrix is one row of the stack of all experts.
        begin, end = (first, first + 1) if isinstance(first, int) else first.indices(piece.total)[:2]
        found = piece.shared(begin, end)
        if found is None:
            return None
        here, there = found
        if isinstance(first, int):
            return piece.rows[here.start][tuple(rest)], everything
        within = (here, *rest)
        return piece.rows[within], there

    def compare(self, entry: Entry) -> None:
        """Check that a tensor is the copy that it is meant to be, as far as its original is here."""
        place = self._place(entry)
        if place is None:
            return
        original, stored = place[0], self.shards[entry.name]
        copy = self.shards.read(entry.name)[place[1]]
        for start in range(0, len(original), ROWS):
            ours = original[start : start + ROWS]
            if not torch.equal(copy[start : start + ROWS].to(ours.device).to(ours.dtype), ours):
                raise ValueError(
                    f"{stored.file}: tensor {entry.name} is not the copy of the main model's that it should be "
                    "(MTP modules with an embedding or head of their own are not implemented)"
                )


def _read_all(reader: Reader, table: list[Entry], keep_types: bool, progress: Progress | None) -> None:
    """Read file by file; copies come at the end, when their originals have been read."""
    shards, source = reader.shards, cast(Source, reader.model.source)
    there = [(entry, [entry.name]) for entry in table if entry.name in shards]
    for entry, names in there:
        if shards[entry.name].dtype == E4M3:
            names.append(entry.name + SCALE_SUFFIX)
    there.sort(key=lambda item: (item[0].copy, str(shards[item[0].name].file), shards[item[0].name].begin))
    # The scale of a weight may be in another file than the weight; a file is closed as soon as nothing needs it any
    # more.
    left = Counter(shards[name].file for _, names in there for name in names)
    total = sum(shards[name].nbytes for _, names in there for name in names)
    done = 0
    for entry, names in there:
        if entry.copy:
            reader.compare(entry)
            source.copies.add(entry.name)
        else:
            reader.fill(entry)
        for name, parameter in zip(names, (entry.parameter, entry.parameter + SCALE_SUFFIX), strict=False):
            stored, held = shards[name], reader.parameters.get(parameter)
            if (
                keep_types
                and held is not None
                and E4M3 not in (stored.dtype, held.dtype)
                and stored.dtype != held.dtype
            ):
                tensor = shards.read(name)
                if tensor.numel() <= SMALL:
                    source.exact[name] = tensor.clone()
            done += stored.nbytes
            left[stored.file] -= 1
            if not left[stored.file]:
                del left[stored.file]
                shards.close(keep=left)
        if progress is not None:
            progress(done, total)
