"""Triton's interpreter, without what it does again at every launch, call of a helper, and operation.

While a kernel runs, the interpreter has its own functions in place of triton.language's. It puts them there before each
launch, looking at every member of triton.language: a third of the time of a test of small shapes. It does so again
whenever a kernel calls another `@triton.jit` function, though they are there; and as `tl.tensor` is among what it
changes, Python forgets each time what it has found out about that class. And for every result it makes a type, and of
the sizes of its shape, which it takes apart twice, constants with types of their own: a third of what is left.
"""

import functools
import inspect

import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

import interpreting_operators as operators


@functools.cache
def _builtins(package):
    """What is replaced, as it is when nothing is, before the first kernel; and by what."""
    found = [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
    return [(name, member, operators.called(name, member, package)) for name, member in found]


def _patch_builtin(package, builder, scope):
    builtins = _builtins(package)
    if builtins and getattr(package, builtins[0][0]) is builtins[0][1]:  # else they are replaced already
        for name, _, called in builtins:
            scope.set_attr(package, name, called)


# A launch replaces what is in triton.language, and puts it back. Triton's own helpers look into triton.language.core;
# there it stays replaced.
_replaced = {tl}


@functools.cache
def _packages(function):
    return {package for package in (tl, tl.core) if any(value is package for value in function.__globals__.values())}


def _call_helper(helper, *args, **kwargs):
    """What `InterpretedFunction.__call__` does, but for replacing what is replaced."""
    packages = _packages(helper.fn)
    if not packages <= _replaced:
        interpreter._patch_lang(helper.fn)
        _replaced.update(packages)
    try:
        return helper.rewrite()(*args, **kwargs)
    except Exception as error:  # as there: whatever a kernel's body raises
        raise interpreter.InterpreterError(repr(error)) from error


_original = {
    name: getattr(owner, name)
    for owner, name in (
        (interpreter, "_get_np_dtype"),
        (interpreter, "_patch_lang_tensor"),
        (TritonSemantic, "computation_type_impl"),
        (tl.dtype, "__eq__"),
        (tl.block_type, "__init__"),
    )
}
_numpy_dtypes, _computed, _shapes, _block_names = {}, {}, {}, {}


def _get_np_dtype(dtype):
    if dtype.is_block() or dtype.is_ptr():
        return _original["_get_np_dtype"](dtype)
    found = _numpy_dtypes.get(dtype.name)
    if found is None:
        found = _numpy_dtypes[dtype.name] = _original["_get_np_dtype"](dtype)
    return found


def _computation_type(self, a, a_is_scalar, b, b_is_scalar, div_or_mod):
    key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
    found = _computed.get(key)
    if found is None:
        arguments = a, a_is_scalar, b, b_is_scalar, div_or_mod
        found = _computed[key] = _original["computation_type_impl"](self, *arguments)
    return found


def _dtype_eq(self, other):
    return self is other or _original["__eq__"](self, other)


def _block_type_init(self, element_ty, shape):
    sizes = tuple([getattr(size, "value", size) for size in shape])
    known = _shapes.get(sizes)
    if known is None:
        _original["__init__"](self, element_ty, shape)
        _shapes[sizes] = self.shape, self.numel, tl.constexpr(self.numel), tl.tuple(list(map(tl.constexpr, sizes)))
        return
    self.element_ty = element_ty
    self.shape, self.numel, *_ = known
    key = sizes, element_ty.name
    self.name = _block_names.get(key) or _block_names.setdefault(key, f"<{self.shape}, {element_ty}>")


def _patch_lang_tensor(tensor, scope):
    """Numpy 2.4 makes no number of an array of one element any more, which Triton 3.6 asks it to."""
    _original["_patch_lang_tensor"](tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


_SCALAR = tl.constexpr(1), tl.tuple([])


def _tensor_init(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _shapes[tuple(type.shape.values)][2:] if type.is_block() else _SCALAR


def make_faster():
    """Only where this Triton's interpreter is the one that is known here (3.6, 3.7)."""
    if triton.__version__.startswith(("3.6.", "3.7.")):
        interpreter._patch_builtin = _patch_builtin
        interpreter._patch_lang_tensor = _patch_lang_tensor
        interpreter.InterpretedFunction.__call__ = _call_helper
        interpreter._get_np_dtype = _get_np_dtype
        tl.dtype.__eq__ = _dtype_eq
        tl.block_type.__init__ = _block_type_init
        tl.tensor.__init__ = _tensor_init
        TritonSemantic.computation_type_impl = _computation_type
        operators.make_direct()
