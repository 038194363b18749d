"""Which implementation of an operation runs: decided at each call, inside the registered operation.

Every operation has up to three implementations with the same meaning: ``hopper`` (sm_90 only), ``triton`` (any Triton
GPU) and ``reference`` (PyTorch, anywhere). ``impl=None`` takes the first of these, in this order, that the tensors'
device and the arguments allow. An explicit ``impl=``, or :class:`use_impl`, is obeyed or raises: nothing falls back
silently. :func:`dskernels.explain` says what would run, and why the others would not (dskernels.choice).

A call takes one of two ways. The slow one goes through torch's dispatcher, which sees to autograd, transforms, tracing
and autocast, and ends in `Operation._run`. The fast one, for eager calls on plain CUDA tensors with which the
dispatcher would have nothing to do, goes straight to the implementation that was found for a call of the same metadata.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from dskernels.choice import IMPLEMENTATIONS, OPERATIONS, Choice, check_impl, choices, forced, reason_of_device
from dskernels.device import PLAIN, dispatch_modes, several_gpus
from dskernels.gradients import (
    Differentiated,
    Gradient,
    Straight,
    is_asked_for,
    is_transformed,
    is_wrapped,
    no_gradient,
)
from dskernels.metadata import ByMetadata

_STRAIGHT_DEVICES = ("cuda",)  # devices for which calls take the fast way, as the host's time of a call matters there

_library = torch.library.Library("dskernels", "FRAGMENT")


class Operation:
    """A `torch.library` operation and the implementations behind it.

    The schema names the operation and its flat arguments, without defaults; ``str? impl=None`` is appended to it.

    Args:
        schema: e.g. ``"merge(Tensor a, Tensor b) -> Tensor"``; an operation that fills ``Tensor(a!) out`` returns
            ``()``.
        reference: callable with the schema's arguments, in PyTorch.
        triton: ``"module:function"``, imported on first use. If the module has a function ``<function>_supports``, that
            takes the same arguments, looks at their metadata only, and returns None or the reason why the
            implementation does not take them.
        hopper: likewise.
        composite: instead of the three, a callable that is made of other operations, to which it passes ``impl`` on.
        fake: returns empty tensors of the results' metadata; None for an operation that only writes to its arguments.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable | None = None,
        triton: str | None = None,
        hopper: str | None = None,
        composite: Callable | None = None,
        fake: Callable | None = None,
    ) -> None:
        if (reference is None) == (composite is None):
            raise ValueError(f"{schema}: give either `reference` or `composite`")
        self.name = schema.partition("(")[0]
        self.targets: dict[str, Callable | str | None] = {"hopper": hopper, "triton": triton, "reference": reference}
        self.composite = composite
        self.fake = fake or (lambda *args: None)
        head, _, returns = schema.rpartition(") -> ")
        _library.define(f"{head}, str? impl=None) -> {returns}")
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dskernels::{self.name}", lambda *args: self.fake(*self._split(args)[0]))
        self.overload = getattr(torch.ops.dskernels, self.name).default
        arguments = self.overload._schema.arguments
        self.arity = len(arguments) - 1
        self.writes = [i for i, argument in enumerate(arguments) if argument.is_write]
        types = [str(argument.type) for argument in arguments[:-1]]
        at = {kind: [i for i, type_ in enumerate(types) if type_ == kind] for kind in set(types)}
        self._located = at.get("Tensor", [None])[0]
        self._floats = at.get("float", [])
        tensors = sorted(at.get("Tensor", []) + at.get("Optional[Tensor]", []))
        values = sorted(at.get("int", []) + at.get("bool", []) + self._floats)
        self._tensors, self._values = _picker(tensors), _picker(values)
        self._candidates: dict[tuple[str | None, torch.device], list[str | tuple[Callable | None, Callable]]] = {}
        known = self._located is not None and len(tensors) + len(values) == self.arity
        self._straight = ByMetadata() if known else None
        self._gradient: Gradient | None = None
        OPERATIONS[self.name] = self

    def __call__(self, *args: Any, impl: str | None = None) -> Any:
        """Run the registered operation on its flat arguments.

        An eager call on plain CUDA tensors, of the same metadata and values as an earlier one, goes straight to the
        implementation. Through torch's dispatcher and `choose`, which would end there too, it takes 14 us more (a call
        of fp8_gemm 29 instead of 15, on a host where ``x.add_(1)`` takes 12).
        """
        if impl is not None:
            check_impl(impl)
        if torch.compiler.is_dynamo_compiling():
            return self.overload(*args, impl)
        if self._straight is None or dispatch_modes() or profiler._is_profiler_enabled:
            return self._by_torch(args, impl)
        if forward_ad._current_level >= 0:
            self._refuse_tangents(args)
        tensors, also = self._seen(args, impl)
        if also is None:
            return self._by_torch(args, impl)
        found = self._straight.find(tensors, also)
        if found is None:
            result = self._by_torch(args, impl)
            asked = self._gradient is not None and not self.writes and meets_autograd(tensors)
            if asked or meets_nothing_else(tensors):
                self._straight.keep(tensors, also, (self._bound(args, impl or forced.get()), asked))
            return result
        (launch, asked), addresses = found
        if asked:
            return Straight.apply(*args, impl, functools.partial(launch, addresses, args), self._gradient)
        result = launch(addresses, args)
        if self.writes:
            self._note_writes(args)
        return result

    def _by_torch(self, args: tuple, impl: str | None) -> Any:
        """Run the registered operation through torch's dispatcher.

        It runs inside `Differentiated` if a gradient may be asked for that the registered one would not give: of an
        operation without a gradient, which then has to raise, or inside a transform of `torch.func`.
        """
        plain = torch.compiler.is_compiling() or (self._gradient is not None and not is_transformed())
        if plain or not (is_transformed() or is_asked_for(args)):
            return self.overload(*args, impl)
        if self.writes:
            with torch.no_grad():
                return self.overload(*args, impl)
        return Differentiated.apply(*args, impl, self.overload, self._gradient or no_gradient(self.name))

    def _seen(self, args: tuple, impl: str | None) -> tuple[tuple[Tensor, ...], Hashable]:
        """The tensor arguments, and everything else that decides what runs; None for that if it cannot be a key."""
        tensors = given = self._tensors(args)
        absent = None
        for x in given:
            if x is None:
                tensors = tuple([x for x in given if x is not None])
                absent = tuple([x is None for x in given])
                break
        if type(tensors[0]) not in PLAIN or choices.get() is not None:
            return tensors, None
        for i in self._floats:
            if type(args[i]) is not float:  # the dispatcher would convert it
                return tensors, None
        device = torch._C._cuda_getDevice() if several_gpus() else 0
        return tensors, (impl, forced.get(), device, torch.is_grad_enabled(), absent, self._values(args))

    def _refuse_tangents(self, args: tuple) -> None:
        """Raise for forward-mode differentiation: torch would go on without the tangents, as if they were zero."""
        for argument, x in zip(self.overload._schema.arguments, args, strict=False):
            if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(
                    f"{argument.name}: {self.name} has no forward-mode derivative (torch.func.jvp, dual numbers), use "
                    "torch.autograd.grad or Tensor.backward"
                )

    def _bound(self, args: tuple, impl: str | None) -> Callable[[Sequence[int], tuple], Any]:
        """A function that runs arguments of this metadata, given the addresses of the tensors, and the arguments."""
        if self.composite is not None:
            function: Callable = functools.partial(self.composite, impl=impl)
        else:
            function = self._chosen(args, impl, self._device_of(args))
        if torch._C._is_any_autocast_enabled():  # a call outside of autocast does not find this, see `ByMetadata`
            return lambda addresses, args: _without_autocast(function, args)
        bound = getattr(function, "bound", None)  # `Planned` and `Recorded` have one
        return (lambda addresses, args: function(*args)) if bound is None else bound(args)

    def _note_writes(self, args: tuple) -> None:
        """Increment the version counters of arguments that were written to.

        Kernels write without torch's knowledge, and autograd and our caches rely on versions to notice a change.
        """
        for i in self.writes:
            if isinstance(args[i], Tensor) and not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])

    def register_autograd(self, backward: Callable, save: Callable) -> None:
        """Give the operation a gradient.

        ``save(ctx, args, output)`` keeps what the backward needs; ``backward(ctx, *grads)`` returns one gradient (or
        None) for each schema argument. ``ctx.impl`` is the implementation that the forward was asked for, which the
        backward passes on.
        """

        names = [argument.name for argument in self.overload._schema.arguments]

        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            args, impl = self._split(inputs)
            ctx.impl = impl or forced.get()
            save(ctx, args, output)
            saved = getattr(ctx, "to_save", ())
            for name, x in zip(names, args, strict=False):
                if isinstance(x, Tensor) and x.is_inference() and any(x is y for y in saved):
                    raise ValueError(
                        f"{name}: expected a tensor that was not made in inference mode, as a gradient needs it"
                    )

        def run_backward(ctx: Any, *grads: Tensor) -> tuple:
            with torch.no_grad(), torch._C._DisableAutocast():
                results = (*backward(ctx, *grads), None)
            # Inside a transform, the operations that `backward` has run raise for a second derivative themselves.
            if torch.is_grad_enabled() and not is_transformed():
                return self._differentiable_once(results, (*grads, *ctx.saved_tensors))
            return results

        self._gradient = Gradient(setup_context, run_backward)
        torch.library.register_autograd(f"dskernels::{self.name}", run_backward, setup_context=setup_context)

    def _differentiable_once(self, results: tuple, inputs: Sequence[Tensor | None]) -> tuple:
        """Gradients for ``create_graph=True`` that raise when they are differentiated, for any input of the backward.

        Otherwise torch would only warn, and go on with zero or with a part of the second derivative.
        """
        behind = [x.flatten()[:0].float().sum() for x in inputs if x is not None and x.requires_grad]
        zero = sum(behind, torch.zeros(()))  # a zero that depends, for autograd, on all of these inputs
        said = f"{self.name}: the gradient of its gradient was asked for, which there is not"
        asked = [x.detach() + zero.to(x) if isinstance(x, Tensor) else x for x in results]
        return torch._C._functions.DelayedError(said.encode(), len(asked))(*asked)

    def choose(self, args: Sequence[Any], impl: str | None = None) -> Choice:
        """The implementation that takes these arguments; ValueError if the one that was asked for does not."""
        if impl is not None:
            if impl not in IMPLEMENTATIONS:
                raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
            if reason := self._reason_against(impl, args, asked_for=True):
                raise ValueError(f"{self.name}: impl={impl!r} cannot run this: {reason}")
            return Choice(self.name, impl, {})
        rejected: dict[str, str] = {}
        for candidate in IMPLEMENTATIONS[:-1]:
            reason = self._reason_against(candidate, args, asked_for=False)
            if reason is None:
                return Choice(self.name, candidate, rejected)
            rejected[candidate] = reason
        return Choice(self.name, "reference", rejected)

    def _split(self, args: tuple) -> tuple[tuple, str | None]:
        """The schema's arguments, and impl: the dispatcher leaves a trailing ``impl=None`` out."""
        return args[: self.arity], args[self.arity] if len(args) > self.arity else None

    def _run(self, *args: Any) -> Any:
        """What torch's dispatcher calls: choose an implementation, and run it on the device of the tensors."""
        if torch._C._is_any_autocast_enabled():
            return _without_autocast(self._run, args)
        impl = forced.get()
        if len(args) > self.arity:
            args, impl = args[:-1], args[-1] or impl
        if self.composite is not None:
            return self.composite(*args, impl=impl)
        told = choices.get()
        if told is not None:
            told.append(self.choose(args, impl))
            return self.fake(*args)
        device = self._device_of(args)
        function = self._chosen(args, impl, device)
        if device.type == "cuda" and device.index != torch._C._cuda_getDevice():
            with torch.cuda.device(device):  # kernels are launched on the current device, wherever their arguments are
                result = function(*args)
        else:
            result = function(*args)
        self._note_writes(args)
        return result

    def _device_of(self, args: Sequence[Any]) -> torch.device:
        return _device_of(args) if self._located is None else args[self._located].device

    def _chosen(self, args: Sequence[Any], impl: str | None, device: torch.device) -> Callable:
        """The function of the implementation that `choose` names.

        Which implementations the device allows is remembered; only their `supports` functions are asked each time.
        """
        candidates = self._candidates.get((impl, device))
        if candidates is None:
            candidates = self._candidates[impl, device] = self._fit_for(impl, device)
        for i, candidate in enumerate(candidates):
            if isinstance(candidate, str):
                candidate = candidates[i] = _supports(candidate), _load(candidate)
            supports, function = candidate
            if supports is None or supports(*args) is None:
                return function
        return self._function(self.choose(args, impl).impl)

    def _fit_for(self, impl: str | None, device: torch.device) -> list[str | tuple[Callable | None, Callable]]:
        """The targets that can run on `device`, the best first, if they take the arguments.

        Empty for the CPU, where an environment variable decides (TRITON_INTERPRET), which may change.
        """
        if device.type == "cpu":
            return []
        return [
            target
            for name, target in self.targets.items()
            if isinstance(target, str)
            and impl in (None, name)
            and reason_of_device(name, device, asked_for=impl is not None) is None
        ]

    def _reason_against(self, impl: str, args: Sequence[Any], asked_for: bool) -> str | None:
        """Why an implementation does not take these arguments, or None; `asked_for` as in `reason_of_device`."""
        target = self.targets[impl]
        if target is None:
            return "there is no such kernel for this operation"
        if impl == "reference":
            return None
        reason = reason_of_device(impl, _device_of(args), asked_for)
        if reason is None and (supports := _supports(target)) is not None:
            reason = supports(*args)
        return reason

    def _function(self, impl: str) -> Callable:
        target = self.targets[impl]
        return _load(target) if isinstance(target, str) else target  # type: ignore[return-value]


def _without_autocast(function: Callable, args: Sequence[Any]) -> Any:
    """Call a function without autocast: an operation's arguments alone decide in which dtypes it computes."""
    with torch._C._DisableAutocast():
        return function(*args)


@contextlib.contextmanager
def differentiating() -> Iterator[None]:
    """Let autograd record inside an implementation: for a reference backward that differentiates the reference.

    `torch.enable_grad` alone is not enough if a dispatch mode (opcheck's, a FLOP counter's) runs the operation, since
    torch excludes autograd's dispatch keys there, among them the one that notices writes to a part of a tensor.
    """
    keys = torch._C.DispatchKey
    recording = torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False)
    seeing_writes = torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False)
    with torch.enable_grad(), recording, seeing_writes:
        yield


def meets_nothing_else(tensors: Sequence[Tensor]) -> bool:
    """Whether torch's dispatcher would do nothing with these tensors but call the implementation.

    That is so if they are plain tensors on the current GPU, and neither autograd nor a transform nor a tracer is
    involved. `ByMetadata` notices if this changes; modes and the profiler are looked for at each call. A tensor that
    stands for other numbers than those in its memory, such as a negative view, is not among these: the dispatcher
    materialises it first.
    """
    return _meets_the_implementation(tensors) and not _is_asked_for(tensors)


def meets_autograd(tensors: Sequence[Tensor]) -> bool:
    """The same where autograd has a part in it, which asks for a gradient, and nothing else has."""
    return _is_asked_for(tensors) and _meets_the_implementation(tensors)


def _is_asked_for(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd would ask for a gradient, were it not for being below it."""
    below_autograd = torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)
    return not below_autograd and is_asked_for(tensors)


def _meets_the_implementation(tensors: Sequence[Tensor]) -> bool:
    """Whether the dispatcher, but for autograd, would do no more than to call it."""
    return (
        all(type(x) in PLAIN and x.device.type in _STRAIGHT_DEVICES for x in tensors)
        and not any(x.is_neg() or x.is_conj() or x._is_zerotensor() or is_wrapped(x) for x in tensors)
        and tensors[0].device.index in (None, torch._C._cuda_getDevice())
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def _picker(positions: Sequence[int]) -> Callable[[tuple], tuple]:
    """A function that returns the elements of a tuple at these positions, as a tuple."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda args: tuple([args[i] for i in positions])


def _device_of(args: Sequence[Any]) -> torch.device:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device
    raise ValueError("an operation needs a tensor argument")


@functools.cache
def _load(target: str) -> Callable:
    """The function that ``"module:function"`` names."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


@functools.cache
def _supports(target: str) -> Callable | None:
    """The `supports` function beside the function that ``"module:function"`` names, if there is one."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), f"{function}_supports", None)
