"""Triton's interpreter, without a look at every member of triton.language for each launch and each call of a helper.

While a kernel runs, the interpreter has its own functions in place of triton.language's. It puts them there before each
launch, and again whenever a kernel calls another `@triton.jit` function: a third of the time of a test of small shapes.
"""

import functools
import inspect

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _builtins(package):
    """What is replaced, as it is when nothing is: before the first kernel."""
    return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtin(package, builder, scope):
    builtins = _builtins(package)
    if builtins and getattr(package, builtins[0][0]) is builtins[0][1]:  # else they are replaced already
        for name, member in builtins:
            interpreter._patch_attr(package, name, member, builder, scope)


def make_faster():
    """Only where this Triton's interpreter is the one that is known here (3.6, 3.7)."""
    if list(inspect.signature(interpreter._patch_builtin).parameters) == ["pkg", "builder", "scope"]:
        interpreter._patch_builtin = _patch_builtin
