"""The operators that stand in for the interpreter's own: the same values and types, whatever types and shapes."""

import itertools

import numpy as np
import pytest
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

import interpreting_operators as operators

pytestmark = pytest.mark.skipif(
    not operators.ORIGINAL, reason="kernels run on a GPU, or in an interpreter unknown here"
)

TYPES = {
    **{name: (getattr(tl, name), np.dtype(name)) for name in ("int8", "int16", "int32", "int64", "uint8", "uint32")},
    "int1": (tl.int1, np.dtype(bool)),
    "fp16": (tl.float16, np.dtype(np.float16)),
    "fp32": (tl.float32, np.dtype(np.float32)),
    "fp64": (tl.float64, np.dtype(np.float64)),
    "bf16": (tl.bfloat16, np.dtype(np.uint16)),
}
SHAPES = [((4, 2), (4, 2)), ((4, 1), (1, 2)), ((2,), (4, 2)), ((), (4, 2)), ((4,), ()), ((), ())]
NUMBERS = [0, 1, -3, 7, 200, 1 << 40, 0.5, -0.0, 1e300, float("inf"), float("nan"), True]


@pytest.fixture(scope="module")
def original():
    """The interpreter's semantics without anything of ours."""
    plain = type("Plain", (TritonSemantic,), {k: v for k, v in operators.ORIGINAL.items() if k != "_convert_float"})
    return plain(interpreter.interpreter_builder)


@pytest.fixture(autouse=True)
def _in_a_kernel(monkeypatch):
    """What the interpreter does to triton.language before it launches a kernel."""
    scope = interpreter._LangPatchScope()
    interpreter._patch_lang_core(tl, scope)
    with np.errstate(all="ignore"):
        yield
    scope.restore()


def a_tensor(name, shape, seed):
    type_, dtype = TYPES[name]
    random = np.random.default_rng(seed)
    if dtype.kind == "f":
        data = random.choice([0.0, -0.0, 1.5, -2.25, np.inf, -np.inf, np.nan, 1e-3, 60000.0], shape or 1).astype(dtype)
    elif name == "bf16":
        data = random.integers(0, 1 << 16, shape or 1).astype(dtype)
    elif name == "int1":
        data = random.integers(0, 2, shape or 1).astype(dtype)
    else:
        info = np.iinfo(dtype)
        data = random.choice([info.min, info.max, 1, 2, 3, 5, 7, 100], shape or 1).astype(dtype)
    return tl.tensor(TensorHandle(data, type_), tl.block_type(type_, list(shape)) if shape else type_)


def outcome(function, *args):
    try:
        found = function(*args)
    except Exception as error:
        return type(error)
    data = np.asarray(found.handle.data)
    name = found.dtype.name
    assert found.type.scalar is found.dtype
    assert found.handle.dtype.scalar == found.dtype or found.dtype.is_bool()  # of a comparison there: its operands'
    assert found.shape == (found.type.shape if found.type.is_block() else ())
    assert data.shape == (tuple(found.type.shape) if found.type.is_block() else (1,))
    if name == "int1":
        data = data.astype(bool)  # numbers, where it was spread over a block
    return name, data.shape, data.dtype, data.tobytes() if data.dtype.kind != "f" else repr(data.tolist())


BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "minimum", "maximum", "and_", "or_", "xor_"]
COMPARED = ["less_than", "less_equal", "greater_than", "greater_equal", "equal", "not_equal"]
OPTIONS = {"add": (True,), "sub": (True,), "mul": (True,)} | dict.fromkeys(
    ("minimum", "maximum"), (tl.PropagateNan.NONE,)
)


@pytest.mark.parametrize("name", [*BINARY, *COMPARED])
def test_operators(original, name):
    ours, theirs, options = (
        getattr(interpreter.interpreter_semantic, name),
        getattr(original, name),
        OPTIONS.get(name, ()),
    )
    pairs = itertools.product(TYPES, TYPES)
    for seed, (a, b) in enumerate(pairs):
        a_shape, b_shape = SHAPES[seed % len(SHAPES)]
        x, y = a_tensor(a, a_shape, seed), a_tensor(b, b_shape, seed + 1)
        assert outcome(ours, x, y, *options) == outcome(theirs, x, y, *options), (a, b, a_shape, b_shape)
    for seed, (a, number) in enumerate(itertools.product(TYPES, NUMBERS)):
        x = a_tensor(a, SHAPES[seed % len(SHAPES)][0], seed)
        assert outcome(ours, x, number, *options) == outcome(theirs, x, number, *options), (a, number)
        assert outcome(ours, number, x, *options) == outcome(theirs, number, x, *options), (number, a)


def test_shapes_that_do_not_go_together(original):
    x, y = a_tensor("fp32", (4, 2), 0), a_tensor("fp32", (2, 4), 0)
    assert outcome(interpreter.interpreter_semantic.add, x, y, True) is outcome(original.add, x, y, True) is ValueError


def test_pointers(original):
    for element in ("fp32", "bf16", "int64", "int1"):
        pointer = tl.pointer_type(TYPES[element][0])
        for shape in ((), (4, 1)):
            data = np.full(shape or 1, 1 << 40, np.uint64)
            x = tl.tensor(TensorHandle(data, pointer), tl.block_type(pointer, list(shape)) if shape else pointer)
            for offset in (*(a_tensor(name, (1, 2), 0) for name in ("int32", "uint32", "int64")), 3, -3):
                for args in ((x, offset), (offset, x)):
                    ours = interpreter.interpreter_semantic.add(*args, True)
                    theirs = original.add(*args, True)
                    assert ours.type == theirs.type
                    assert ours.handle.get_element_ty() == theirs.handle.get_element_ty()
                    assert ours.handle.data.tolist() == theirs.handle.data.tolist()


@pytest.mark.parametrize("name", TYPES)
def test_where_casts_and_shapes(original, name):
    ours = interpreter.interpreter_semantic
    for seed, (a_shape, b_shape) in enumerate(SHAPES):
        x, y, condition = a_tensor(name, a_shape, seed), a_tensor(name, b_shape, 9), a_tensor("int1", b_shape, seed)
        assert outcome(ours.where, condition, x, y) == outcome(original.where, condition, x, y), (a_shape, b_shape)
        for number in NUMBERS:
            assert outcome(ours.where, condition, x, number) == outcome(original.where, condition, x, number), number
        for to, (type_, _) in TYPES.items():
            assert outcome(ours.cast, x, type_) == outcome(original.cast, x, type_), to
        for each, other in zip(ours.broadcast_impl_value(x, y), original.broadcast_impl_value(x, y), strict=True):
            assert outcome(lambda each=each: each) == outcome(lambda other=other: other)
    for number in NUMBERS:
        constant = outcome(ours.scalar_constant, number, TYPES[name][0])
        assert constant == outcome(original.scalar_constant, number, TYPES[name][0]), number


def test_conversions_of_formats_that_numpy_has_not():
    rounding = interpreter._ir.ROUNDING_MODE.RTNE
    narrow, wide = [tl.float8e4nv, tl.float8e5], [tl.bfloat16, tl.float16]
    for source, target in [
        *itertools.product(narrow, [*wide, tl.float32]),
        *itertools.product(wide, [*narrow, tl.float32]),
    ]:
        every = np.arange(1 << source.primitive_bitwidth).astype(f"uint{source.primitive_bitwidth}")[::-1]
        for how in (None, rounding):
            want = operators.ORIGINAL["_convert_float"](every, source, target, how)
            got = interpreter._convert_float(every.reshape(2, -1), source, target, how)
            assert got.dtype == want.dtype
            assert (got.reshape(-1) == want).all(), (source, target)
    numbers = np.random.default_rng(0).integers(0, 1 << 32, 1 << 12).astype(np.uint32)
    for each in (numbers, numbers & np.uint32(0x807FFFFF), np.zeros(4, np.uint32)):
        want = operators.ORIGINAL["_convert_float"](each, tl.float32, tl.bfloat16, None)
        assert (interpreter._convert_float(each.view(np.float32), tl.float32, tl.bfloat16, None) == want).all()
