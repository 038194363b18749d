"""A linear layer whose products run in e4m3."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import dskernels as ds
from dskernels.types import Fp8Tensor

BLOCK = (128, 128)


class Fp8Linear(nn.Module):
    """``x @ weight.T + bias`` in e4m3, see `dskernels.fp8_linear`: all three products of training, or inference only.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        bias: whether there is one.
        keep: how the weight is stored: in its own dtype (False), for training; or in e4m3 (True), with half the memory
            of bf16 and without a gradient.
        device: of the parameters.
        dtype: of the parameters that are not in e4m3.

    Attributes:
        weight: ``[out_features, in_features]``, as in `torch.nn.Linear`; in e4m3 with `keep`.
        weight_scale_inv: with `keep`, the scales of its 128x128 blocks, float32
            ``[ceil(out_features / 128), ceil(in_features / 128)]``, as in DeepSeek's checkpoints; else None.
        bias: ``[out_features]`` or None.

    A state dict of `torch.nn.Linear` can be loaded with either `keep`: the weight is quantised on loading if necessary.
    """

    weight_scale_inv: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        keep: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        plain = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight, self.bias = plain.weight, plain.bias
        self.register_buffer("weight_scale_inv", None)
        if keep:
            self.keep()

    @torch.no_grad()
    def keep(self) -> Fp8Linear:
        """Quantise the weight and drop the original. Calling it again has no effect."""
        if self.weight_scale_inv is None:
            data, scale, _ = _quantized(self.weight)
            self.weight = nn.Parameter(data, requires_grad=False)
            self.weight_scale_inv = scale
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """Called by `to` and the like; a weight in e4m3 and its scales keep their types."""
        if self.weight_scale_inv is None:
            super()._apply(fn, recurse)
            return self

        def moved(x: Tensor) -> Tensor:
            result = fn(x)
            kept = x is self.weight or x is self.weight_scale_inv
            return x.to(result.device) if kept and result.dtype != x.dtype else result

        super()._apply(moved, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        """Quantise a plain weight, if this layer keeps it in e4m3."""
        given = state_dict.get(f"{prefix}weight")
        if self.weight_scale_inv is not None and given is not None and given.dtype != torch.float8_e4m3fn:
            data, scale, _ = _quantized(given)
            state_dict = {**state_dict, f"{prefix}weight": data, f"{prefix}weight_scale_inv": scale}
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def operand(self) -> Tensor | Fp8Tensor:
        """The weight in the form that the operations take."""
        scale = self.weight_scale_inv
        return self.weight if scale is None else Fp8Tensor(self.weight, scale, BLOCK)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]`` in the dtype of `x`."""
        return ds.fp8_linear(x, self.operand, self.bias)

    def extra_repr(self) -> str:
        """The sizes, as `torch.nn.Linear` shows them."""
        kept = ", kept in e4m3" if self.weight_scale_inv is not None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{kept}"


def convert_linear_to_fp8(
    model: nn.Module, filter: Callable[[str, nn.Linear], bool] | None = None, *, keep: bool = False
) -> list[str]:
    """Replace the linear layers of a model by `Fp8Linear`, in place.

    Args:
        model: any model. A bare `torch.nn.Linear` cannot be replaced in place.
        filter: called with the name and the layer; says whether to replace it. By default all layers but ``lm_head``
            and those with fewer than 128 rows or columns, which is less than one block.
        keep: store the weights only in e4m3, for inference. Otherwise the parameters remain the same objects, so an
            optimiser that was made before still trains them.

    Returns:
        The names of the layers that were replaced. Subclasses of `torch.nn.Linear` are left alone: they compute
        something else.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    wanted = filter or _large
    found = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear and name]
    replaced = []
    for name, linear in found:
        if not wanted(name, linear):
            continue
        with torch.device("meta"):
            layer = Fp8Linear(linear.in_features, linear.out_features, linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        model.set_submodule(name, layer.keep() if keep else layer)
        replaced.append(name)
    return replaced


def _large(name: str, linear: nn.Linear) -> bool:
    return name.split(".")[-1] != "lm_head" and min(linear.in_features, linear.out_features) >= BLOCK[0]


def _quantized(weight: Tensor) -> Fp8Tensor:
    """Quantise a weight; on the meta device, only make the shapes."""
    if weight.device.type != "meta":
        return ds.quantize(weight.detach(), BLOCK)
    grid = [-(-size // step) for size, step in zip(weight.shape, BLOCK, strict=True)]
    scale = torch.empty(grid, dtype=torch.float32, device="meta")
    return Fp8Tensor(torch.empty_like(weight, dtype=torch.float8_e4m3fn), scale, BLOCK)
