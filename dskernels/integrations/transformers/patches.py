"""Changes to a model that can be undone, and a report of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

STATE = "_dskernels"  # the attribute of a module that holds what its new forward needs


class Report:
    """How many parts of each kind were replaced, and which were left alone, with the reason.

    Attributes:
        replaced: the number of modules of each kind of part.
        kept: the number of modules for each kind of part and reason for leaving it alone.
    """

    def __init__(self) -> None:
        self.replaced: Counter[str] = Counter()
        self.kept: Counter[tuple[str, str]] = Counter()

    def __str__(self) -> str:
        lines = [f"  {count} x {kind}" for kind, count in self.replaced.items()] or ["  nothing"]
        if self.kept:
            lines.append("left as it was:")
            lines += [f"  {count} x {kind}: {reason}" for (kind, reason), count in self.kept.items()]
        return "\n".join(["dskernels replaced:", *lines])


class Patches:
    """Changed attributes, in the order in which they were changed."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def forward(self, module: nn.Module, function: Callable, state: Any) -> None:
        """Give one module another forward, and store the state that it needs in `STATE`; the class does not change.

        The forward is a bound method, so `copy.deepcopy` of a model binds it to the copy.
        """
        self.attribute(module, STATE, state)
        self.attribute(module, "forward", MethodType(function, module))

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an object, which may shadow one of its own or of its class."""
        own = vars(owner)
        had, old = name in own, own.get(name)

        def undo() -> None:
            if had:
                setattr(owner, name, old)
            else:
                delattr(owner, name)

        setattr(owner, name, value)
        self._undo.append(undo)

    def afterwards(self, undo: Callable[[], None]) -> None:
        """Register how to undo something that the caller has done."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Undo everything, in reverse order."""
        while self._undo:
            self._undo.pop()()
