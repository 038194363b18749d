"""What is changed of a model, so that it can be changed back, and what to say of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

STATE = "_dskernels"  # the attribute of a module that holds what its new forward needs


class Report:
    """What was replaced, how often, and what was left as it was, with the reason.

    Attributes:
        replaced: of each kind of part the number of modules.
        kept: of each kind of part that stayed, the reasons and how many modules each concerns.
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
    """Changes of attributes in the order in which they were made."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def forward(self, module: nn.Module, function: Callable, state: Any) -> None:
        """Gives one module another forward, and the state that it finds in `STATE`; its class stays as it is.

        The forward is a method of the module, which `copy.deepcopy` of a model binds to the copy.
        """
        self.attribute(module, STATE, state)
        self.attribute(module, "forward", MethodType(function, module))

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute of an object, over one of its own or one that its class has."""
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
        """Notes how to undo what the caller has done."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Changes everything back, the last first."""
        while self._undo:
            self._undo.pop()()
