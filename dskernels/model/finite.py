"""Find where a number that is not finite came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dskernels.model.data import Packed


def first_nonfinite(model: nn.Module, text: Sequence[Packed], gradients: Callable[[], Mapping[str, Tensor]]) -> str:
    """Say which tensor was the first that is not finite, in the order in which a training step computes them.

    Parameters and buffers come first, then the output of each module in a forward pass that is run again, then
    gradients from the loss backwards, which ``gradients`` computes, by parameter name.
    """
    state: list[tuple[str, str, Tensor]] = [("parameter", *named) for named in model.named_parameters()]
    state += [("buffer", *named) for named in model.named_buffers()]
    return (
        _first(state)
        or _first_output(model, text)
        or _first(("gradient of", name, gradient) for name, gradient in reversed(list(gradients().items())))
        or "every parameter, module output and gradient is finite by itself"
    )


def _first(tensors: Iterable[tuple[str, str, Tensor]]) -> str | None:
    for kind, name, tensor in tensors:
        if tensor.is_floating_point() and (bad := int((~tensor.isfinite()).sum())):
            return f"the first tensor not finite is {kind} {name} ({bad} of {tensor.numel()} numbers)"
    return None


@torch.no_grad()
def _first_output(model: nn.Module, text: Sequence[Packed]) -> str | None:
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if not found and isinstance(output, Tensor) and (said := _first([("the output of", name, output)])):
            found.append(said)

    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        device = next(model.parameters()).device
        for batch in text:
            model(*batch.to(device), mtp=True)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
