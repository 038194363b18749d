"""Which implementation of an operation runs, decided at each call, inside the registered operation.

Every operation has up to three implementations that mean the same: ``hopper`` (sm_90 only), ``triton`` (any Triton GPU)
and ``reference`` (PyTorch, anywhere). ``impl=None`` takes the first of these, in this order, that the tensors' device
and the arguments allow. An explicit ``impl=``, or :class:`use_impl`, is obeyed or raises: nothing falls back silently.
:func:`dskernels.explain` says what would run, and why not the others (dskernels.choice).
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
from dskernels.gradients import Differentiated, Gradient, is_asked_for, is_transformed, is_wrapped, no_gradient
from dskernels.metadata import ByMetadata

_STRAIGHT_DEVICES = ("cuda",)  # where the host's share of a call matters

_library = torch.library.Library("dskernels", "FRAGMENT")


class Operation:
    """A `torch.library` operation and the implementations behind it.

    The schema names the operation and its flat arguments, without defaults; ``str? impl=None`` is appended to it.

    Args:
        schema: e.g. ``"merge(Tensor a, Tensor b) -> Tensor"``; an operation that fills ``Tensor(a!) out`` returns
            ``()``.
        reference: callable with the schema's arguments, in PyTorch.
        triton: ``"module:function"``, imported on first use; likewise `hopper`. A function ``<function>_supports``
            beside it, with the same arguments, returns None or the reason why it does not take them; it sees metadata
            only.
        composite: instead of the three, a callable that is built of other operations and takes ``impl`` to hand on.
        fake: what the operation returns, as empty tensors; None for an operation that only writes to its arguments.
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

        Eager calls on plain CUDA tensors that meet again what was run before go straight to the implementation. Torch's
        dispatcher, which would end there too, and `choose` take 14 us more (of fp8_gemm 29 and 15, on a host where
        ``x.add_(1)`` takes 12).
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
            if meets_nothing_else(tensors):
                self._straight.keep(tensors, also, self._bound(args, impl or forced.get()))
            return result
        launch, addresses = found
        result = launch(addresses, args)
        if self.writes:
            self._note_writes(args)
        return result

    def _by_torch(self, args: tuple, impl: str | None) -> Any:
        """Run the registered operation; as `Differentiated` where autograd would not know how."""
        plain = torch.compiler.is_compiling() or (self._gradient is not None and not is_transformed())
        if plain or not (is_transformed() or is_asked_for(args)):
            return self.overload(*args, impl)
        if self.writes:
            with torch.no_grad():
                return self.overload(*args, impl)
        return Differentiated.apply(*args, impl, self.overload, self._gradient or no_gradient(self.name))

    def _seen(self, args: tuple, impl: str | None) -> tuple[tuple[Tensor, ...], Hashable]:
        """The tensors, and what else decides what runs; None for that where it must be decided anew."""
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
            if type(args[i]) is not float:  # the dispatcher makes it one
                return tensors, None
        device = torch._C._cuda_getDevice() if several_gpus() else 0
        return tensors, (impl, forced.get(), device, torch.is_grad_enabled(), absent, self._values(args))

    def _refuse_tangents(self, args: tuple) -> None:
        """Forward-mode differentiation: torch would go on without the tangents, as if they were zero."""
        for argument, x in zip(self.overload._schema.arguments, args, strict=False):
            if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(
                    f"{argument.name}: {self.name} has no forward-mode derivative (torch.func.jvp, dual numbers), use "
                    "torch.autograd.grad or Tensor.backward"
                )

    def _bound(self, args: tuple, impl: str | None) -> Callable[[Sequence[int], tuple], Any]:
        """What runs arguments of this metadata, given the addresses of the tensors among them, and them."""
        if self.composite is not None:
            function: Callable = functools.partial(self.composite, impl=impl)
        else:
            function = self._chosen(args, impl, self._device_of(args))
        if torch._C._is_any_autocast_enabled():  # what is kept here is not found outside of it
            return lambda addresses, args: _without_autocast(function, args)
        bound = getattr(function, "bound", None)  # as cuda.driver.Planned has it
        return (lambda addresses, args: function(*args)) if bound is None else bound(args)

    def _note_writes(self, args: tuple) -> None:
        """Raise the version of what was written: kernels write behind torch's back; autograd and caches go by it."""
        for i in self.writes:
            if isinstance(args[i], Tensor) and not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])

    def register_autograd(self, backward: Callable, save: Callable) -> None:
        """Give the operation a gradient.

        ``save(ctx, args, output)`` keeps what the backward needs; ``backward(ctx, *grads)`` returns one gradient (or
        None) for each schema argument. ``ctx.impl`` holds the implementation that the forward was asked for, to hand
        on.
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
            if torch.is_grad_enabled() and not is_transformed():  # there, what `backward` has run says so itself
                return self._differentiable_once(results, (*grads, *ctx.saved_tensors))
            return results

        self._gradient = Gradient(setup_context, run_backward)
        torch.library.register_autograd(f"dskernels::{self.name}", run_backward, setup_context=setup_context)

    def _differentiable_once(self, results: tuple, inputs: Sequence[Tensor | None]) -> tuple:
        """Gradients that are to be differentiated again (``create_graph=True``): that raises, whichever of the inputs
        of the backward it is for, where torch would warn, and go on with zero or a part of it."""
        behind = [x.flatten()[:0].float().sum() for x in inputs if x is not None and x.requires_grad]
        zero = sum(behind, torch.zeros(()))  # of which autograd knows what it came from
        said = f"{self.name}: the gradient of its gradient was asked for, which there is not"
        asked = [x.detach() + zero.to(x) if isinstance(x, Tensor) else x for x in results]
        return torch._C._functions.DelayedError(said.encode(), len(asked))(*asked)

    def choose(self, args: Sequence[Any], impl: str | None = None) -> Choice:
        """Name the implementation that takes these arguments; raise if the one asked for does not."""
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
        """(schema arguments, impl): the dispatcher leaves a trailing ``impl=None`` out."""
        return args[: self.arity], args[self.arity] if len(args) > self.arity else None

    def _run(self, *args: Any) -> Any:
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
            with torch.cuda.device(device):  # a launch goes to the current device, wherever its arguments are
                result = function(*args)
        else:
            result = function(*args)
        self._note_writes(args)
        return result

    def _device_of(self, args: Sequence[Any]) -> torch.device:
        return _device_of(args) if self._located is None else args[self._located].device

    def _chosen(self, args: Sequence[Any], impl: str | None, device: torch.device) -> Callable:
        """The function that `choose` names: what the device decides is kept, only `supports` is asked each time."""
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
        """Targets, the best first, that run on `device` if they take the arguments. On the CPU there are none, as there
        an environment variable, not the device, decides."""
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
    """Call a function: which dtypes an operation computes in its arguments say, autocast has no say in its products."""
    with torch._C._DisableAutocast():
        return function(*args)


@contextlib.contextmanager
def differentiating() -> Iterator[None]:
    """Let autograd record inside an implementation: for a reference backward, which differentiates the reference.

    `torch.enable_grad` alone does not where a dispatch mode (opcheck's, a FLOP counter's) runs the operation, since
    torch switches autograd's dispatch keys off there; also the one that sees writes to a part of a tensor.
    """
    keys = torch._C.DispatchKey
    recording = torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False)
    seeing_writes = torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False)
    with torch.enable_grad(), recording, seeing_writes:
        yield


def meets_nothing_else(tensors: Sequence[Tensor]) -> bool:
    """Whether torch's dispatcher would do no more with these than to call the implementation.

    The tensors are plain, on the current GPU, and no autograd, transform or tracer has a part in it. `ByMetadata` sees
    whether that is still so. (Modes and the profiler are looked for at each call.) What stands for other numbers than
    its memory holds, as a negative view does, the dispatcher writes out first.
    """
    below_autograd = torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)
    return (
        all(type(x) in PLAIN and x.device.type in _STRAIGHT_DEVICES for x in tensors)
        and not any(x.is_neg() or x.is_conj() or x._is_zerotensor() or is_wrapped(x) for x in tensors)
        and tensors[0].device.index in (None, torch._C._cuda_getDevice())
        and (below_autograd or not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors))
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def _picker(positions: Sequence[int]) -> Callable[[tuple], tuple]:
    """A function from a tuple to the tuple of what stands at these positions."""
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
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


@functools.cache
def _supports(target: str) -> Callable | None:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), f"{function}_supports", None)
