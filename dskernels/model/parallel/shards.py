"""What this rank holds of each parameter, as plain tensors: what an optimiser updates, and checkpoints keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Shard(NamedTuple):
    """This rank's part of a parameter.

    Attributes:
        name: of the parameter, as one process calls it.
        parameter: as the model has it.
        local: this rank's rows, sharing their memory.
    """

    name: str
    parameter: nn.Parameter
    local: Tensor


def shards(model: nn.Module) -> list[Shard]:
    """Every parameter of a model, sharded or not."""
    return [Shard(name, p, local(p)) for name, p in model.named_parameters()]


def local(tensor: Tensor) -> Tensor:
    """The rows of this rank, detached, in the same memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class LocalParameters(nn.Module):
    """The shards as a module's own parameters: any optimiser of element-wise steps takes it as it takes a model.

    Names are those of one process; a dot becomes a slash, since a parameter's own name holds none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shards = shards(model)
        for shard in self.shards:
            self.register_parameter(shard.name.replace(".", "/"), nn.Parameter(shard.local))

    def collect(self) -> None:
        """Hands the gradients of the model's parameters over, which then have none."""
        for shard, mine in zip(self.shards, self.parameters(), strict=True):
            gradient = shard.parameter.grad
            mine.grad = None if gradient is None else local(gradient)
            shard.parameter.grad = None

    def named_shapes(self) -> Iterator[tuple[str, torch.Size]]:
        """Names, and shapes of the whole parameters: these say what is a matrix."""
        for shard in self.shards:
            yield shard.name, shard.parameter.shape
