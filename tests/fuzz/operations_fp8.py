"""Valid calls of quantising, products and grouped products."""

from __future__ import annotations

import math

import torch

from benchmarks import exact
from dskernels.reference.grouped_gemm import quantize_grouped
from dskernels.types import Fp8Tensor
from fuzz import allowing
from fuzz.drawing import FLOATS, GUARD, Call, Draw, placed

ROWS, COLUMNS = (3, 1, 0, 17, 130), (128, 1, 0, 16, 130, 300)
FEW_ROWS, FEW_COLUMNS = (3, 1, 0, 17), (128, 1, 0, 130)  # of what takes the interpreter long
FORMATS = ("fp32", "ue8m0")


def quantize(d: Draw) -> Call:
    block = d.one((1, 128), (128, 128), (128, 1))
    shape = d.models_or((300, 1424), (d.one(*ROWS), d.one(*COLUMNS)))
    if block == (128, 128) and d.chance(3):
        shape = (d.one(2, 1, 0), *shape)
    transpose = d.chance()
    arguments = {
        "x": d.floats(*shape, dtype=d.one(*FLOATS)),
        "block": block,
        "scale_format": d.one(*FORMATS),
        "transpose": transpose,
    }
    return Call("quantize", arguments, lambda x, transpose, **_: [exact.exact(x.mT if transpose else x)], bits=True)


def quantize_both(d: Draw) -> Call:
    block, shape = d.one((1, 128), (128, 128)), d.models_or((144, 272), (d.one(*FEW_ROWS), d.one(*COLUMNS)))
    if block == (128, 128) and d.chance(3):
        shape = (d.one(2, 1, 0), *shape)
    arguments = {"x": d.floats(*shape, dtype=d.one(*FLOATS)), "block": block, "scale_format": d.one(*FORMATS)}
    return Call("quantize_both", arguments, lambda x, **_: [exact.exact(x), exact.exact(x.mT)], bits=True)


def swiglu_quantize(d: Draw) -> Call:
    rows, columns = d.models_or((300, 1408), (d.one(*ROWS), d.one(*COLUMNS)))
    x = d.floats(rows, 2 * columns, dtype=d.one(*FLOATS))
    arguments = {"gate_up": x, "scale_format": d.one(*FORMATS), "transpose": d.chance()}

    def want(gate_up, transpose, **_):
        product = exact.swiglu(gate_up)
        return [product.T if transpose else product]

    return Call("swiglu_quantize", arguments, want)


def swiglu_quantize_backward(d: Draw) -> Call:
    rows, columns = d.models_or((300, 256), (d.one(*FEW_ROWS), d.one(*FEW_COLUMNS)))
    arguments = {
        "dy": d.floats(rows, columns, dtype=d.one(*FLOATS)),
        "gate_up": d.floats(rows, 2 * columns, dtype=d.one(*FLOATS)),
        "scale_format": d.one(*FORMATS),
    }

    def want(dy, gate_up, **_):
        gradient = exact.swiglu_gradient(dy, gate_up)
        return [gradient, gradient.T]

    return Call("swiglu_quantize_backward", arguments, want)


def rmsnorm_quantize(d: Draw) -> Call:
    shape = d.models_or((33, 7168), (d.one(*FEW_ROWS), d.one(*FEW_COLUMNS)))
    dtype = d.one(*FLOATS)
    arguments = {
        "x": d.floats(*shape, dtype=dtype),
        "weight": d.floats(shape[1], dtype=d.one(*FLOATS)),
        "eps": d.one(1e-6, 1e-2),
        "residual": d.floats(*shape, dtype=dtype) if d.chance() else None,
        "with_normed": d.chance(),
        "scale_format": d.one(*FORMATS),
    }

    def want(x, weight, eps, residual, with_normed, **_):
        total = x if residual is None else x + residual
        normed = exact.rmsnorm(total, weight, eps)
        return [normed] + [exact.exact(total)] * (residual is not None or with_normed) + [normed] * with_normed

    return Call("rmsnorm_quantize", arguments, want)


def rmsnorm_backward(d: Draw) -> Call:
    shape = d.models_or((300, 1536), (d.one(*ROWS), d.one(*COLUMNS)))
    arguments = {
        "dy": d.floats(*shape, dtype=d.one(*FLOATS)),
        "x": d.floats(*shape, dtype=d.one(*FLOATS)),
        "weight": d.floats(shape[1], dtype=d.one(*FLOATS)),
        "eps": d.one(1e-6, 1e-2),
        "dresidual": d.floats(*shape, dtype=d.one(*FLOATS)) if d.chance() else None,
    }
    return Call(
        "rmsnorm_backward", arguments, lambda **given: list(exact.rmsnorm_backward(**given)), size=_gradient_size
    )


def _gradient_size(dy, x, weight, eps, **_) -> float:
    """Of the terms of dx, which cancel out where x and dy are alike, and of those of the gradient of the weight."""
    if not x.numel():
        return 0.0
    r = (exact.exact(x).square().mean(-1).min() + eps) ** -0.5
    other = torch.maximum(exact.exact(weight).abs().max(), exact.exact(x).abs().max())
    return float(r * exact.exact(dy).abs().max() * other)


def _out(d: Draw, arguments: dict, shape: tuple[int, ...], *, accumulate: bool = True) -> tuple[str, ...]:
    """Perhaps an `out` of poison, or one of numbers to add to; what is written."""
    if not d.chance():
        arguments["out_dtype"] = d.one(*FLOATS)
        return ()
    arguments["out"] = d.floats(*shape, dtype=d.one(*FLOATS), kind="normal")
    if accumulate:
        arguments["accumulate"] = d.chance()
    return ("out",)


def _added(want: torch.Tensor, out=None, accumulate=False, **_) -> list[torch.Tensor]:
    return [want + exact.exact(out) if accumulate else want]


def fp8_gemm(d: Draw) -> Call:
    m, n, k = d.models_or((d.one(300, 5), 392, 1424), (d.one(*ROWS), d.one(16, 1, 0, 130), d.one(*COLUMNS)))
    arguments = {
        "a": d.fp8(d.floats(m, k), (1, 128)),
        "b": d.fp8(d.floats(n, k), d.one((128, 128), (1, 128))),
        "bias": d.floats(n, dtype=d.one(*FLOATS), kind="normal") if d.chance() else None,
    }
    writes = _out(d, arguments, (m, n))

    def want(a, b, bias, **rest):
        return _added(exact.fp8_gemm(a, b, bias), **rest)

    def apart(loss, a, b, **_):
        return allowing.sums(exact.exact(a), exact.exact(b), loss)

    return Call("fp8_gemm", arguments, want, writes=writes, loose=8.0, size=_product_size, apart=apart)


def _product_size(a, b, **_) -> float:
    """Of the terms of a sum."""
    largest = [exact.exact(x).nan_to_num(0.0, 0.0, 0.0).abs().flatten() for x in (a, b)]
    return math.prod(float(x.max()) if len(x) else 0.0 for x in largest)


def _grouped_apart(product, *operands: str):
    """Of a product of groups: the sums of its terms' magnitudes, where they are in e4m3."""

    def apart(loss, **given):
        if not isinstance(given[operands[0]], Fp8Tensor):
            return torch.zeros(())
        return loss * product(**{key: exact.exact(x).abs() if key in operands else x for key, x in given.items()})

    return apart


def fp8_linear(d: Draw) -> Call:
    lead = d.one((3,), (2, 3), (), (0,), (17,))
    n, k = d.models_or((392, 1424), (d.one(16, 1, 0, 130), d.one(*COLUMNS)))
    weight = d.floats(n, k, dtype=d.one(*FLOATS), kind="normal")
    arguments = {
        "x": d.floats(*lead, k, dtype=d.one(*FLOATS), kind="normal"),
        "weight": d.fp8(weight, (128, 128)) if d.chance() else weight,
        "bias": d.floats(n, dtype=d.one(*FLOATS), kind="normal") if d.chance() else None,
        "scale_format": d.one(*FORMATS),
        "keep": d.one("fp8", "input"),
    }
    if d.chance(3):
        arguments["quantized"] = d.fp8(arguments["x"].reshape(math.prod(lead), k), (1, 128))

    def apart(loss, x, weight, scale_format, quantized=None, **_):
        rows = (x[None] if x.dim() == 1 else x.flatten(0, -2)) if quantized is None else quantized
        rows = allowing.numbers(rows, (1, 128), scale_format)
        off = allowing.sums(rows, allowing.numbers(weight, (128, 128)), loss)
        return off.unflatten(0, x.shape[:-1]) if x.dim() > 1 else off[0]

    return Call("fp8_linear", arguments, loose=8.0, apart=apart)


def grouped_gemm(d: Draw) -> Call:
    experts, (n, k) = d.one(2, 1, 5), d.models_or((392, 1424), (d.one(16, 1, 0, 130), d.one(*COLUMNS)))
    rows = d.models_or(d.one(300, 40), d.one(*ROWS))
    a, b = d.floats(rows, k, dtype=(dtype := d.one(*FLOATS))), d.floats(experts, n, k, dtype=dtype)
    if d.chance():
        a, b = d.fp8(a, (1, 128)), _stack(d, b)
    arguments = {"a": a, "b": b, "offsets": d.vector(d.bounds(experts, rows))}
    writes = _out(d, arguments, (rows, n), accumulate=False)

    def want(a, b, offsets, **_):
        return [exact.grouped_gemm(a, b, offsets)]

    apart = _grouped_apart(lambda a, b, offsets, **_: exact.grouped_gemm(a, b, offsets), "a", "b")
    return Call("grouped_gemm", arguments, want, writes=writes, loose=8.0, size=_product_size, apart=apart)


def _stack(d: Draw, b: torch.Tensor) -> Fp8Tensor:
    from dskernels.reference.fp8 import quantize as by_reference

    q = by_reference(b.float(), (128, 128)) if b.shape[0] else None
    return Fp8Tensor(d.laid_out(q.data), d.laid_out(q.scale, pad=False), (128, 128))


def grouped_gemm_masked(d: Draw) -> Call:
    experts, (n, k) = d.one(2, 1, 5), d.models_or((392, 1424), (d.one(16, 1, 0, 130), d.one(*COLUMNS)))
    rows = d.models_or(150, d.one(3, 1, 0, 17))
    a, b = d.floats(experts, rows, k, dtype=(dtype := d.one(*FLOATS))), d.floats(experts, n, k, dtype=dtype)
    if d.chance():
        flat = d.fp8(a.reshape(experts * rows, k), (1, 128))
        scale = flat.scale.unflatten(0, (experts, rows))
        a, b = Fp8Tensor(d.laid_out(flat.data.reshape(experts, rows, k)), scale), _stack(d, b)
    arguments = {"a": a, "b": b, "counts": d.integers(experts, low=0, high=rows + 1)}
    writes = _out(d, arguments, (experts, rows, n), accumulate=False)

    def want(a, b, counts, **_):
        return [exact.grouped_gemm_masked(a, b, counts)]

    apart = _grouped_apart(lambda a, b, counts, **_: exact.grouped_gemm_masked(a, b, counts), "a", "b")
    return Call("grouped_gemm_masked", arguments, want, writes=writes, loose=8.0, size=_product_size, apart=apart)


def quantize_grouped_(d: Draw) -> Call:
    rows, experts = d.one(*ROWS), d.one(2, 1, 5)
    arguments = {
        "x": d.floats(rows, d.one(16, 1, 0, 130), dtype=d.one(*FLOATS)),
        "offsets": d.vector(d.bounds(experts, rows)),
        "scale_format": d.one(*FORMATS),
    }
    return Call("quantize_grouped", arguments, bits=True)


def grouped_wgrad(d: Draw) -> Call:
    experts, (n, k) = d.one(2, 1, 5), d.models_or((392, 400), (d.one(16, 1, 0, 130), d.one(16, 1, 0, 130)))
    rows = d.models_or(900, d.one(*ROWS))
    dtype = d.one(*FLOATS)
    dy, x = d.floats(rows, n, dtype=dtype), d.floats(rows, k, dtype=dtype)
    offsets = d.vector(d.bounds(experts, rows))
    quantized = d.chance()
    if quantized:
        dy, x = (quantize_grouped(t, offsets) for t in (dy, x))
        dy, x = (Fp8Tensor(d.laid_out(t.data), placed(t.scale, t.scale.stride(), GUARD)) for t in (dy, x))
    arguments = {"dy": dy, "x": x, "offsets": offsets}
    writes = _out(d, arguments, (experts, n, k))
    arguments.pop("out_dtype", None)
    if writes:
        arguments["out"] = d.laid_out(arguments["out"].float())

    def product(dy, x, offsets, **_):
        if quantized:  # whole tiles of 128 columns for each group
            dy, x = (exact.exact(t).T for t in (dy, x))
            ends = torch.tensor([0, *(128 * -(-(b - a) // 128) for a, b in exact.groups(offsets, dy.shape[0]))])
            offsets = ends.cumsum(0)
        return exact.grouped_wgrad(dy, x, offsets)

    return Call(
        "grouped_wgrad",
        arguments,
        lambda **given: _added(product(**given), **given),
        writes=writes,
        loose=8.0,
        size=lambda dy, x, **_: _product_size(dy, x),
        apart=_grouped_apart(product, "dy", "x"),
    )


CALLS = {
    "quantize": quantize,
    "quantize_both": quantize_both,
    "swiglu_quantize": swiglu_quantize,
    "swiglu_quantize_backward": swiglu_quantize_backward,
    "rmsnorm_quantize": rmsnorm_quantize,
    "rmsnorm_backward": rmsnorm_backward,
    "fp8_gemm": fp8_gemm,
    "fp8_linear": fp8_linear,
    "grouped_gemm": grouped_gemm,
    "grouped_gemm_masked": grouped_gemm_masked,
    "quantize_grouped": quantize_grouped_,
    "grouped_wgrad": grouped_wgrad,
}
