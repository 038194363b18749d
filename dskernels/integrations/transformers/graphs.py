"""A decode step of a whole accelerated model as a CUDA graph.

Launching a step from Python takes longer than running it: on an H200, `generate` for four prompts took 2.3 times as
long without graphs in bf16, and 3.5 times in e4m3 (docs/porting.md).

The second step over a cache is captured, and later steps replay it as long as everything that it depends on stays the
same: the memory of the cache, the batch, the weights, and torch's modes. Token positions are read from the device, so
the cache may be cropped and requests may be padded. A call that asks for more than logits, has several new tokens, or
goes through a module with somebody else's hook is not captured and runs as before.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, compress
from operator import attrgetter, is_
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from dskernels.integrations.transformers.cache import LatentLayer, Places
from dskernels.integrations.transformers.latents import Pass
from dskernels.integrations.transformers.patches import STATE
from dskernels.model.capture import capturing, mode, stream_of

DEVICES = ("cuda",)
CACHES = ("past_key_values", "cache")  # the name of the cache argument, newer and older
CAPTURING = "transformers.utils.output_capturing"
READ = {"input_ids", "position_ids", "attention_mask", "logits_to_keep", "use_cache", "return_dict", *CACHES}


@dataclass(frozen=True)
class Step:
    """What a call asks for, if it is a decode step.

    Attributes:
        tokens: ``[B, 1]``.
        positions: ``[B, 1]`` or ``[1, 1]``, or None.
        mask: ``[B, length + 1]``, or None.
        layers: of the cache.
        options: the remaining arguments of the forward.
    """

    tokens: Tensor
    positions: Tensor | None
    mask: Tensor | None
    layers: list[LatentLayer]
    options: dict[str, Any]

    @property
    def length(self) -> int:
        """Number of tokens before the new one, padding included."""
        return self.layers[0].length


class Graphs:
    """The captured step of a model (one at a time), and what decides whether it may be replayed.

    Args:
        shared: the state that the model's attention layers share.
    """

    def __init__(self, shared: Pass) -> None:
        self._shared = shared
        self._seen: tuple | None = None
        self._weights: Weights | None = None
        self._of: Callable[[], Any] = lambda: None
        self._recorded: Recorded | None = None
        self._failed = False

    def __deepcopy__(self, memo: dict) -> Graphs:
        """A copy of a model captures its own step."""
        return Graphs(copy.deepcopy(self._shared, memo))

    def run(self, model: nn.Module, step: Step, cache: Any) -> Any:
        """The output of a decode step, replayed if one was captured; None if the step has to run normally."""
        key = self._key(step)
        if self._of() is not cache or self._seen != key or self._weights is None or not self._weights.same():
            # The first step of its kind runs normally: it compiles kernels and makes what is kept.
            self._recorded, self._seen, self._of = None, key, ref(cache)
            self._weights = Weights(model)
            return None
        if self._recorded is None:
            if self._failed or _hooked(model):
                return None
            try:
                self._recorded = Recorded(model, step, cache, self._shared)
            except RuntimeError as error:
                self._failed = True
                warnings.warn(f"dskernels: decode steps are not recorded ({error})", stacklevel=4)
                return None
        return self._recorded.replay(step, cache)

    def _key(self, step: Step) -> tuple:
        return (
            *(step.tokens.shape[0], step.mask is None, step.positions is None or step.positions.shape),
            tuple([(name, value) for name, value in step.options.items() if name not in CACHES]),
            tuple([layer.pages.data_ptr() for layer in step.layers]),
            (torch.is_inference_mode_enabled(), *mode()),
        )


class Weights:
    """The parameters and buffers of a model at this moment: their identities, addresses and version counters.

    They are compared at each step, so this uses functions that are implemented in C, which takes a third of the time of
    walking through the modules in Python. It keeps neither modules nor weights alive.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [ref(module) for module in model.modules()]
        members = self._members()
        self._refs = [_nothing if member is None else ref(member) for member in members]
        self._are_tensors = [isinstance(member, Tensor) for member in members]
        self._are_counted = [isinstance(x, Tensor) and not x.is_inference() for x in members]
        self._state = self._state_of(members)

    def _members(self) -> list[Any]:
        """What modules contain: parameters, buffers, submodules and None."""
        modules = [module() for module in self._modules]
        if None in modules:
            return []
        held = (map(dict.values, map(attrgetter(name), modules)) for name in ("_parameters", "_buffers", "_modules"))
        return list(chain.from_iterable(chain.from_iterable(held)))

    def _state_of(self, members: list[Any]) -> tuple[list[int], list[int]]:
        """Addresses, and version counters where torch keeps them."""
        tensors, counted = list(compress(members, self._are_tensors)), list(compress(members, self._are_counted))
        return list(map(Tensor.data_ptr, tensors)), list(map(attrgetter("_version"), counted))

    def same(self) -> bool:
        """Whether nothing has changed."""
        members, kept = self._members(), [reference() for reference in self._refs]
        if len(members) != len(kept) or not all(map(is_, members, kept)):
            return False
        try:
            return self._state_of(members) == self._state
        except RuntimeError:  # a weight became an inference tensor, whose writes are not counted
            return False


def _nothing() -> None:
    """Stands for a member that is None, where a weak reference is expected."""


class Recorded:
    """A captured decode step, with its inputs at fixed addresses.

    The cache is not kept alive: it may hold gigabytes that nobody uses any more.
    """

    def __init__(self, model: nn.Module, step: Step, cache: Any, shared: Pass) -> None:
        batch, device = step.tokens.shape[0], step.tokens.device
        self._tokens = step.tokens.clone()
        self._positions = step.tokens.new_empty(batch if step.positions is None else step.positions.shape[0], 1)
        self._lengths = torch.empty(batch, dtype=torch.int32, device=device)
        self._is_real = torch.ones(batch, dtype=torch.bool, device=device)
        first = torch.arange(batch, device=device) * step.layers[0].capacity
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device)
        # A replay reads these at their addresses, so everything made before the capture has to live as long as the
        # graph.
        self._kept = first, cu_seqlens

        def run() -> Any:
            slots = torch.where(self._is_real, first + self._lengths - 1, -1)
            with shared.standing(Places(slots, self._lengths, None, None, cu_seqlens)), _held(step.layers):
                given = {"input_ids": self._tokens, "position_ids": self._positions, **step.options}
                return type(model).forward(model, **given)

        self._place(step)
        self._replay, out = record(run)
        if not isinstance(out, dict):
            raise RuntimeError(f"expected an output with names, the model gives a {type(out).__name__}")
        self._kind: Any = type(out)
        self._logits: Any = out.get("logits")
        self._caches = [name for name, value in out.items() if value is cache]
        if set(out) != {"logits", *self._caches}:
            raise RuntimeError(f"expected logits and the cache, the model gives {', '.join(out)}")

    def _place(self, step: Step) -> Tensor | None:
        """Write to the device where the new tokens go, and, if there is padding, which tokens are real."""
        self._tokens.copy_(step.tokens)
        if step.positions is None:
            self._positions.fill_(step.length)
        else:
            self._positions.copy_(step.positions)
        if step.mask is None:
            self._lengths.fill_(step.length + 1)
            return None
        real = step.mask[:, -(step.length + 1) :].bool()
        torch.sum(real, 1, dtype=torch.int32, out=self._lengths)
        self._is_real.copy_(real[:, -1])
        return real

    def replay(self, step: Step, cache: Any) -> Any:
        """Run the captured step for these tokens."""
        real = self._place(step)
        self._replay()
        for layer in step.layers:
            layer.length += 1
            layer.real = real
        return self._kind(logits=self._logits.clone(), **dict.fromkeys(self._caches, cache))


def decode_step(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Step, Any] | None:
    """What a call of a model's forward asks for, and its cache, if it is a decode step over latents; else None."""
    given = dict(kwargs)
    if args:
        if len(args) > 1 or "input_ids" in given:
            return None
        given["input_ids"] = args[0]
    tokens, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.shape[1] != 1 or cache is None:
        return None
    if tokens.device.type not in DEVICES or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    if any(value is not None and value is not False for name, value in given.items() if name not in READ):
        return None
    if given.get("return_dict") is False:
        return None
    layers = getattr(cache, "layers", [])
    if not layers or any(type(layer) is not LatentLayer or layer.padded for layer in layers):
        return None
    length, batch = layers[0].length, tokens.shape[0]
    if not length or any(layer.length != length or layer.capacity <= length for layer in layers):
        return None
    if layers[0].pages.shape[0] * layers[0].pages.shape[1] != batch * layers[0].capacity:
        return None
    if mask is None and layers[0].real is not None:
        return None
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (batch, length + 1)):
        return None
    if positions is not None and positions.shape not in ((batch, 1), (1, 1)):
        return None
    if isinstance(given.get("logits_to_keep"), Tensor):
        return None
    options = {name: given[name] for name in READ - {"input_ids", "position_ids", "attention_mask"} if name in given}
    return Step(tokens, positions, mask, layers, options), cache


def model_forward(original: Callable) -> Callable:
    """Wrap a model's forward so that decode steps are captured; the signature stays that of the original."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        graphs: Graphs = getattr(self, STATE)
        found = decode_step(self, args, kwargs)
        out = None if found is None else graphs.run(self, *found)
        return type(self).forward(self, *args, **kwargs) if out is None else out

    return forward


def record(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Capture what `run` launches as a CUDA graph; returns the graph and the outputs, which each replay overwrites."""
    graph, stream = torch.cuda.CUDAGraph(), stream_of(torch.device("cuda", torch.cuda.current_device()))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), capturing(graph, torch.cuda.graph_pool_handle()):
        out = run()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, out


@contextlib.contextmanager
def _held(layers: list[LatentLayer]) -> Iterator[None]:
    """Restore the token counts of a cache at the end of the block."""
    before = [(layer.length, layer.real) for layer in layers]
    try:
        yield
    finally:
        for layer, (length, real) in zip(layers, before, strict=True):
            layer.length, layer.real = length, real


def _hooked(model: nn.Module) -> bool:
    """Whether a module has a hook that somebody needs to be called.

    The hooks that transformers itself installs do not count while no hidden states are asked for: it leaves them in
    place.
    """
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    others = any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks)
    return others or any(hasattr(module, "_hf_hook") for module in model.modules())
