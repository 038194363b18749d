"""Operators of Triton's interpreter, on numpy at once where nothing has to be found out about their types.

`x + y` of two tensors goes through eight functions there: types are promoted and cast, shapes made alike by copies, a
sum of integers made again in int64 to see whether it overflows (which is asserted in debug mode alone, and else thrown
away), and of each step a tensor with a type is made. Of tests of small blocks that was two thirds of the time (three
files of them: 42 CPU seconds, 13 with this). What is here takes numbers, and tensors of types that numpy has, in one
step, and leaves everything else, errors too, to what was there. Formats that are not numpy's are converted by tables,
which the interpreter's own conversion makes. tests/test_interpreting.py compares both.
"""

import functools

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

SEMANTIC = interpreter.interpreter_semantic
constexpr, tensor = tl.constexpr, tl.tensor

# numpy computes with these as the interpreter does; bf16 and formats of 8 bits are integers to it.
FLOATS = {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}
SIGNED = {"int8": np.int8, "int16": np.int16, "int32": np.int32, "int64": np.int64}
UNSIGNED = {"uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64}
NATIVE = {name: np.dtype(type_) for name, type_ in (FLOATS | SIGNED | UNSIGNED).items()}
LIMITS = {name: (np.iinfo(type_).min, np.iinfo(type_).max) for name, type_ in (SIGNED | UNSIGNED).items()}
BYTES = {name: dtype.itemsize for name, dtype in NATIVE.items()} | {"bf16": 2, "int1": 1, "fp8e4nv": 1, "fp8e5": 1}
# Booleans are compared and combined as integers are, and not added.
LOGICAL = {*SIGNED, *UNSIGNED, "int1"}
_LONG = {"fp16": "float16", "fp32": "float32", "fp64": "float64"}

_types, _numbers = {}, {}  # of results: type, numel and shape of a block; of numbers: an array of one element
_new, _ONE = tensor.__new__, (constexpr(1), tl.tuple([]))
_ALL = slice(None)
DIRECT, ORIGINAL = {}, {}  # what stands for `+` and its like in a kernel; what was there before


def _handle(data, dtype):
    """A handle without the look at its size: numpy's result has it."""
    handle = TensorHandle.__new__(TensorHandle)
    handle.data, handle.dtype, handle.attr = data, dtype, {}
    return handle


def _result(data, element, block):
    """The tensor that has these data, each of this type: a block, or a scalar."""
    result = _new(tensor)
    result.handle = _handle(data, element)
    if not block:
        result.type = result.dtype = element
        result.numel, result.shape = _ONE
        return result
    key = element.name, data.shape, getattr(element, "address_space", 0)
    known = _types.get(key)
    if known is None:
        made = tensor(result.handle, tl.block_type(element, list(data.shape)))
        known = _types[key] = made.type, made.dtype, made.numel, made.shape
    result.type, result.dtype, result.numel, result.shape = known
    return result


def _number(x, name):
    """This number as the type of a tensor that it meets; None where it is of a higher kind than that, or too large."""
    kind = type(x)
    key = kind, x, name
    found = _numbers.get(key)
    if found is None and x == x and name in NATIVE:
        low, high = LIMITS.get(name, (-(1 << 63), (1 << 63) - 1))
        if not (low <= x <= high if kind is int else kind is float and name in FLOATS):
            return None
        found = _numbers[key] = np.array([x], dtype=NATIVE[name])
        found += 0  # as there, no zero has a sign
        found.flags.writeable = False
    return found


@functools.cache
def _computed(a, b):
    """The type that tensors of these two are combined in, where numpy casts to it as the interpreter does."""
    if a not in NATIVE or b not in NATIVE:
        return None
    try:
        types = [getattr(tl, _LONG.get(name, name)) for name in (a, b)]
        found = SEMANTIC.computation_type_impl(types[0], False, types[1], False, False)
    except TypeError:
        return None
    return found if found.name in NATIVE else None


def _operands(a, b, names, mixed=True):
    """Arrays of both, the type they meet in, one of `names`, and whether either is a block; None: look closer."""
    if type(a) is tensor:
        element = a.dtype
        if type(b) is tensor:
            other = b.dtype
            x, y, block = a.handle.data, b.handle.data, a.type is not element or b.type is not other
            if element is not other and element.name != other.name:
                element = _computed(element.name, other.name) if mixed else None
                if element is None or element.name not in names:
                    return None
                to = NATIVE[element.name]
                return x.astype(to, copy=False), y.astype(to, copy=False), element, block
            return (x, y, element, block) if element.name in names else None
        if element.name in names and (y := _number(b, element.name)) is not None:
            return a.handle.data, y, element, a.type is not element
    elif type(b) is tensor and (element := b.dtype).name in names and (x := _number(a, element.name)) is not None:
        return x, b.handle.data, element, b.type is not element
    return None


def _arithmetic(ufunc, names, mixed=True):
    def make(original):
        def operator(self, a, b, *options):
            found = _operands(a, b, names, mixed)
            if found is None:
                return original(self, a, b, *options)
            x, y, element, block = found
            return _result(ufunc(x, y), element, block)

        return operator

    return make


def _compared(ufunc):
    def make(original):
        def operator(self, a, b):
            found = _operands(a, b, NATIVE)
            if found is None:
                return original(self, a, b)
            x, y, _, block = found
            return _result(ufunc(x, y), tl.int1, block)

        return operator

    return make


def _add(original):
    sums = _arithmetic(np.add, NATIVE)(original)

    def add(self, a, b, sanitize_overflow):
        if type(a) is tensor and type(a.dtype) is tl.pointer_type:
            size = BYTES.get(a.dtype.element_ty.name)
            if size and type(b) is int:
                offset = np.uint64(size * b & 0xFFFFFFFFFFFFFFFF)
                return _result(a.handle.data + offset, a.dtype, a.type is not a.dtype)
            if size and type(b) is tensor and b.dtype.name in LIMITS:
                data = a.handle.data + np.uint64(size) * b.handle.data.astype(np.uint64)
                return _result(data, a.dtype, a.type is not a.dtype or b.type is not b.dtype)
        return sums(self, a, b, sanitize_overflow)

    return add


def _where(original):
    def where(self, condition, x, y):
        if type(x) is tensor and type(y) is tensor:
            element = x.dtype
            same = element is y.dtype or element.name == y.dtype.name in NATIVE
            values = (x.handle.data, y.handle.data, element, x.type is not element or y.type is not y.dtype)
            found = values if same and type(element) is tl.dtype else None
        else:
            found = _operands(x, y, NATIVE)
        if found is None or type(condition) is not tensor or condition.dtype.name != "int1":
            return original(self, condition, x, y)
        x, y, element, block = found
        chosen = np.where(condition.handle.data, x, y)
        return _result(chosen, element, block or condition.type is not condition.dtype)

    return where


def _cast(original):
    def cast(self, x, to, fp_downcast_rounding=None):
        if fp_downcast_rounding is None:
            to_scalar = to.scalar
            if to_scalar is x.dtype:
                return x
            if to_scalar.name == x.dtype.name and type(to_scalar) is tl.dtype:
                return x
            # What does not fit into an integer is left as it is there, where fp16 goes by fp32.
            known = (x.dtype.name in NATIVE and x.dtype.name != "fp16") or x.dtype.name == "int1"
            if to_scalar.name in NATIVE and known:
                return _result(x.handle.data.astype(NATIVE[to_scalar.name]), to_scalar, x.type is not x.dtype)
        return original(self, x, to, fp_downcast_rounding)

    return cast


def _alike(original):
    def broadcast_impl_value(self, a, b):
        if a.type is b.type:
            return a, b
        x, y = a.handle.data, b.handle.data
        a_block, b_block = a.type is not a.dtype, b.type is not b.dtype
        if x.shape == y.shape and a_block == b_block:
            return a, b
        if a_block and not b_block and y.size == 1:
            return a, _result(np.broadcast_to(y.reshape(()), x.shape), b.dtype, True)
        if b_block and not a_block and x.size == 1:
            return _result(np.broadcast_to(x.reshape(()), y.shape), a.dtype, True), b
        return original(self, a, b)

    return broadcast_impl_value


def _getitem(original):
    def getitem(a, slices, _semantic=None):
        """`x[:, None]`."""
        known = type(slices) is tuple and all(each is None or each == _ALL for each in slices)
        if known and a.type is not a.dtype:
            return _result(a.handle.data[slices], a.dtype, True)
        return original(a, slices, _semantic=SEMANTIC)

    return getitem


def _scalar_constant(original):
    def scalar_constant(self, value, dtype):
        if dtype is not None and dtype.name in NATIVE and (found := _number(value, dtype.name)) is not None:
            return tensor(_handle(found, dtype), dtype)
        return original(self, value, dtype)

    return scalar_constant


def _convert_float(original):
    @functools.cache
    def table(source, target, rounding):
        every = np.arange(1 << source.primitive_bitwidth, dtype=getattr(np, f"uint{source.primitive_bitwidth}"))
        return original(every, source, target, rounding)

    def convert(data, source, target, rounding):
        bits = source.primitive_bitwidth
        if bits <= 16:
            found = np.ascontiguousarray(data).view(getattr(np, f"uint{bits}"))
            return table(source, target, rounding)[found].reshape(data.shape)
        if source.name == "fp32" and target.name == "bf16" and rounding is None:
            found = np.ascontiguousarray(data).view(np.uint32)
            size = found & np.uint32(0x7FFFFFFF)
            if not ((size != 0) & (size < 0x00800000)).any():  # subnormal numbers have rules of their own there
                return (found >> np.uint32(16)).astype(np.uint16).reshape(data.shape)
        return original(data, source, target, rounding)

    return convert


def _value(x):
    return x.value if type(x) is constexpr else x


def _direct():
    """What stands for `+` and its like in a kernel: two functions between them and numpy instead of eight."""
    found = {"__getitem__": _getitem(tensor.__getitem__)}

    def both(name, operator):
        found[f"__{name}__"] = lambda a, b, _semantic=None: operator(SEMANTIC, a, _value(b))
        found[f"__r{name}__"] = lambda a, b, _semantic=None: operator(SEMANTIC, _value(b), a)

    def compared(name, operator):
        # A number is a tensor of its own type here, as there.
        found[f"__{name}__"] = lambda a, b, _semantic=None: operator(SEMANTIC, a, SEMANTIC.to_tensor(b))

    for name, method in (("add", "add"), ("sub", "sub"), ("mul", "mul")):
        operator = getattr(TritonSemantic, method)
        both(name, lambda self, a, b, operator=operator: operator(self, a, b, True))
    for name, method in (("truediv", "truediv"), ("floordiv", "floordiv"), ("mod", "mod")):
        both(name, getattr(TritonSemantic, method))
    for name, method in (("and", "and_"), ("or", "or_"), ("xor", "xor_")):
        both(name, getattr(TritonSemantic, method))
    for name, method in (
        ("lt", "less_than"),
        ("le", "less_equal"),
        ("gt", "greater_than"),
        ("ge", "greater_equal"),
        ("eq", "equal"),
        ("ne", "not_equal"),
    ):
        compared(name, getattr(TritonSemantic, method))
    return found


_BUILTIN = core.builtin(lambda: None).__code__  # of what checks that a function of the language is called in a kernel


def called(name, member, package):
    """What the interpreter calls in a kernel for a function of the language."""
    if package is tensor and (found := DIRECT.get(name)) is not None:
        return found
    function = member.__wrapped__ if getattr(member, "__code__", None) is _BUILTIN else member

    def call(*args, _semantic=None, **options):
        return function(*args, _semantic=SEMANTIC, **options)

    return call


def _quotient(x, y):
    """As the interpreter divides integers: to zero."""
    return (x - np.fmod(x, y)) // y


def make_direct():
    """Put all this where the interpreter looks."""
    real = FLOATS.keys() - {"fp16"}  # which / computes in fp32
    new = {
        "add": _add,
        "sub": _arithmetic(np.subtract, NATIVE),
        "mul": _arithmetic(np.multiply, NATIVE),
        "truediv": _arithmetic(np.divide, real),
        "floordiv": _arithmetic(_quotient, SIGNED, mixed=False),
        "mod": _arithmetic(np.fmod, SIGNED, mixed=False),
        "minimum": _arithmetic(np.minimum, NATIVE),
        "maximum": _arithmetic(np.maximum, NATIVE),
        "and_": _arithmetic(np.bitwise_and, LOGICAL),
        "or_": _arithmetic(np.bitwise_or, LOGICAL),
        "xor_": _arithmetic(np.bitwise_xor, LOGICAL),
        "less_than": _compared(np.less),
        "less_equal": _compared(np.less_equal),
        "greater_than": _compared(np.greater),
        "greater_equal": _compared(np.greater_equal),
        "equal": _compared(np.equal),
        "not_equal": _compared(np.not_equal),
        "where": _where,
        "cast": _cast,
        "broadcast_impl_value": _alike,
        "scalar_constant": _scalar_constant,
    }
    for name, make in new.items():
        ORIGINAL[name] = getattr(TritonSemantic, name)
        setattr(TritonSemantic, name, make(ORIGINAL[name]))
    ORIGINAL["_convert_float"] = interpreter._convert_float
    interpreter._convert_float = _convert_float(interpreter._convert_float)
    DIRECT.update(_direct())
