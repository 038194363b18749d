"""Whether what a call did was right: a result that is, or a clean error that names the argument."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor

import dskernels as ds
from benchmarks import exact
from dskernels.reference.mla import unpack_fp8
from dskernels.types import Fp8Tensor
from fuzz.allowing import SUMS, least
from fuzz.drawing import Call, leaves

# Roundings of the result, over the largest magnitude; a call says how many times as much it may lose.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2e-6, torch.float64: 1e-6}
E4M3 = 0.066  # half a step of e4m3 next to the largest of a tile, its scale rounded up to a power of two
NETWORKS = ("fused_experts", "feed_forward")
ATTENTION = ("mla_decode", "mla_prefill", "mla_prefill_cached")
OUTCOMES: defaultdict[str, Counter[str]] = defaultdict(Counter)  # of this run, operation by operation


class Memory:
    """All bytes behind the tensors of a call, to see what was written, and to put them back."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.tensors = [(path, x) for path, x in leaves(arguments) if not x.is_meta and x.layout is torch.strided]
        self.tensors = [(path, x) for path, x in self.tensors if not x.is_quantized]
        self.before = [_bytes(x).clone() for _, x in self.tensors]

    def restore(self) -> None:
        for (_, x), before in zip(self.tensors, self.before, strict=True):
            _bytes(x).copy_(before)

    def check(self, writes: tuple[str, ...]) -> None:
        """Raise if anything was written but for the elements of what is written to."""
        written = [x for path, x in self.tensors if path in writes]
        for (path, x), before in zip(self.tensors, self.before, strict=True):
            after = _bytes(x)
            if torch.equal(after, before):
                continue
            expected = before.clone()
            for out in written:
                if out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
                    _over(expected, out).copy_(out.detach())
            if not torch.equal(after, expected):
                raise WrongError(f"{path}: bytes were written that do not belong to a result")


class WrongError(Exception):
    """What no caller may see."""


def _bytes(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.detach().untyped_storage())


def _over(memory: Tensor, like: Tensor) -> Tensor:
    return torch.empty(0, dtype=like.dtype, device=like.device).set_(
        memory.untyped_storage(), like.storage_offset(), like.shape, like.stride()
    )


def attempt(call: Call, impl: str | None) -> Any:
    """The result of a call, or the clean error."""
    function = getattr(ds, call.function)
    parameters = inspect.signature(function).parameters
    how = {"impl": impl} if "impl" in parameters else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(**call.arguments, **how)
    except (TypeError, ValueError) as error:
        named = re.match(r"\w+", str(error))
        if named is None or named[0] not in (*parameters, *_inner_operations(call.function)):
            raise WrongError(
                f"impl={impl!r}: an error that names no argument: {type(error).__name__}: {error}"
            ) from error
        return error


def _inner_operations(function: str) -> tuple[str, ...]:
    """Registered operations, of which one that a function is made of may not take what `impl=` is asked for."""
    return (function, *ds.dispatch.OPERATIONS)


def judge(call: Call, impl: str, valid: bool) -> str:
    """Run a call by the reference and by `impl`; raise `WrongError` if something is not right. Says what happened."""
    memory = Memory(call.arguments)
    try:
        wants = attempt(call, "reference")
        memory.check(call.writes)
        refused = isinstance(wants, Exception)
        if refused and valid:
            raise WrongError(f"the reference refuses a valid call: {wants}")
        kept = None if refused else [x.detach().clone() for x in flat(wants)]
        if not refused and kept is not None and not any(x.is_meta for x in kept):
            memory.restore()  # what was written to is an argument of the exact computation
            _compare_exact(call, wants, kept)
        if impl == "reference":
            return "refused" if refused else "right"
        memory.restore()
        got = attempt(call, impl)
        memory.check(call.writes)
        if isinstance(got, Exception):
            if not refused and "cannot run this" not in str(got):
                raise WrongError(f"impl={impl!r} refuses what the reference takes: {got}")
            return "refused"
        if refused:
            raise WrongError(f"impl={impl!r} takes what the reference refuses: {wants}")
        _compare(call, _comparable(call, got), _comparable(call, _refilled(wants, iter(kept))), impl)
        return "right"
    finally:
        memory.restore()


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result; an Fp8Tensor gives two."""
    return [x for _, x in leaves({"result": result})]


def _left_open(call: Call) -> bool:
    """Whether the contract says nothing about the numbers: logits of what is not finite, sequences that overlap, a norm
    of squares that are zero in fp32 without an eps."""
    given = call.arguments
    if call.function == "route_hidden":
        return not all(bool(x.isfinite().all()) for x in (given["x"], given["weight"]))
    rows = given.get("kv", given.get("x"))
    if given.get("eps") == 0 and isinstance(rows, Tensor) and rows.numel() and not rows.is_meta and _vanishing(rows):
        return True
    return overlapping(call)


def overlapping(call: Call) -> bool:
    """Whether offsets of sequences do not ascend from 0 to the rows there are.

    Two sequences may hold one token then, and both write its row: which of them is last differs from call to call.
    """
    given = call.arguments
    for name, rows in (("cu_seqlens_q", given.get("q")), ("cu_seqlens_k", given.get("k"))):
        if name in given and isinstance(given[name], Tensor) and not given[name].is_meta:
            ends = given[name].tolist()
            if ends and (ends != sorted(ends) or ends[0] != 0 or ends[-1] > rows.shape[0]):
                return True
    return False


def settled(call: Call, x: Tensor) -> Tensor:
    """A result without what the contract leaves open of it: zeros in rows of a cache that several tokens go to.

    Programs write such a row at once, each its whole one, so that in any call other parts of it may be another token's.
    All other rows are determined: those of one token, and those of none.
    """
    if call.function != "write_latent_cache" or x.is_meta:
        return x
    slots, writers = call.arguments["slots"].unique(return_counts=True)
    open_ = slots[(writers > 1) & (slots >= 0) & (slots < x.shape[:2].numel())]
    x = x.clone()
    x[open_ // x.shape[1], open_ % x.shape[1]] = 0
    return x


def _vanishing(rows: Tensor) -> bool:
    return float(rows.detach().abs().float().amax(-1).min()) < 2.0**-60


def _comparable(call: Call, result: Any) -> list[Tensor]:
    """What is compared between implementations: bytes where they are to be the same, else what they stand for."""
    if call.bits:
        return flat(result)
    return [x.dequantize() if fp8 and not x.data.is_meta else x.data if fp8 else x for x, fp8 in _values(result)]


def _values(result: Any) -> list[tuple[Any, bool]]:
    """The parts of a result, an Fp8Tensor being one, and whether it is one."""
    if isinstance(result, Fp8Tensor):
        return [(result, True)]
    if isinstance(result, Tensor):
        return [(result, False)]
    return [part for each in result for part in _values(each)]


def _compare_exact(call: Call, result: Any, kept: list[Tensor]) -> None:
    if call.exact is None or any(
        x.is_complex() or x.is_quantized or x.layout is not torch.strided for _, x in leaves(call.arguments)
    ):
        return
    if _left_open(call):
        return
    needs = inspect.signature(call.exact).parameters
    extra = {"result": result} if "result" in needs else {}
    try:
        wants = call.exact(**call.arguments, **extra)
    except OverflowError:
        return  # an int beyond fp64, which a call may have turned into an infinity
    parts = _values(_refilled(result, iter(kept)))
    for i, ((got, fp8), want) in enumerate(zip(parts, wants, strict=False)):
        if want is None:
            continue
        if list(got.shape) != list(want.shape):
            raise WrongError(f"result {i}: shape {list(got.shape)}, expected {list(want.shape)}")
        if not torch.isfinite(want[~want.isnan()]).all() or (
            want.isnan().any() and call.function != "grouped_gemm_masked"
        ):
            continue  # infinities and NaN are compared between implementations
        tolerance = E4M3 if fp8 else _rounding(call, got.dtype) * call.loose * _sharper(call)
        got, want = (got if fp8 else settled(call, got)), settled(call, want)
        if not fp8 and got.is_floating_point() and want.numel():
            largest, limits = float(want.abs().nan_to_num(0).max()), torch.finfo(got.dtype)
            if largest > limits.max or largest < 2**16 * limits.tiny:
                continue  # an overflow, or subnormal results
        if call.function in ATTENTION and call.apart is not None:
            difference, off = got.double() - want, _apart(call, i, want)
            got = want + difference - difference.clamp(-off, off)
        error = _error(call, got, want)
        if not error <= tolerance and not (fp8 and _tiny(want)):
            raise WrongError(f"reference, result {i}: error {error:.3g} of the largest, allowed {tolerance:.3g}")


def _rounding(call: Call, dtype: torch.dtype) -> float:
    """Of a result, or of what is rounded on the way to it: keys and values that are projected from latents."""
    given = call.arguments
    inside = call.function in ("mla_prefill_cached", "fused_experts", "feed_forward")
    inside |= call.function == "mla_decode" and given["cache"].dtype == torch.uint8  # whose rows are multiplied out
    if inside and dtype.is_floating_point:
        dtype = next(iter(given.values())).dtype
    return ROUNDING.get(dtype, 0.0)


def _sharper(call: Call) -> float:
    """How many times as much attention may lose as with the scales that are drawn, 1 at most.

    What is lost in a score is multiplied by the scale, and the result moves by that between the values: with a scale of
    2^70, which spoiling gives, the largest score takes all, and which one is the largest a rounding may decide.
    """
    given = call.arguments.get("scale", 1.0) if call.function in ATTENTION else 1.0
    return max(abs(float(given)), 1.0) if isinstance(given, (int, float)) else 1.0


def _error(call: Call, got: Any, want: Tensor) -> float:
    """The largest error, over the largest magnitude of the result or of the terms that it is made of."""
    error, largest = exact.error(got, want), float(want.abs().nan_to_num(0).max()) if want.numel() else 0.0
    size = call.size(**call.arguments)
    return error * largest / size if size > largest else error


def _tiny(want: Tensor) -> bool:
    """Whether a tile's scale is at its least, 2^-126, where e4m3 has no step left."""
    return float(want.abs().max()) < 448 * 2.0**-124


def _refilled(result: Any, kept: Any) -> Any:
    if isinstance(result, Tensor):
        return next(kept)
    if isinstance(result, tuple):
        parts = [_refilled(x, kept) if isinstance(x, (Tensor, tuple)) else x for x in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    return result


def _compare(call: Call, gots: list[Tensor], wants: list[Tensor], impl: str) -> None:
    if len(gots) != len(wants):
        raise WrongError(f"impl={impl!r}: {len(gots)} results, the reference has {len(wants)}")
    quantized = not call.bits and "quantize" in call.function
    for i, (got, want) in enumerate(zip(gots, wants, strict=True)):
        if got.shape != want.shape or got.dtype != want.dtype or got.device != want.device:
            raise WrongError(
                f"impl={impl!r}, result {i}: {list(got.shape)} {got.dtype} {got.device}, the reference has "
                f"{list(want.shape)} {want.dtype} {want.device}"
            )
        if got.is_meta or not got.numel() or _left_open(call):
            continue
        got, want = settled(call, got), settled(call, want)
        if call.function == "write_latent_cache" and got.dtype == torch.uint8:
            _compare_rows(call, got, want, impl)
            continue
        if call.bits or not got.is_floating_point():
            if got.dtype == torch.uint8:
                continue
            same = _same(got, want)
            if not same:
                raise WrongError(f"impl={impl!r}, result {i}: other bytes than the reference's")
            continue
        a, b = got.detach().double(), want.double()
        counts = torch.ones_like(a, dtype=torch.bool)
        if call.function == "grouped_gemm_masked":
            rows = (
                torch.arange(a.shape[1], device=a.device)[None, :, None]
                < call.arguments["counts"].clamp(0, a.shape[1])[:, None, None]
            )
            counts = rows.expand(a.shape)
        lost = [~x.isfinite() if _either(call) else x.isnan() for x in (a, b)]
        if not torch.equal(lost[0][counts], lost[1][counts]):
            raise WrongError(f"impl={impl!r}, result {i}: NaN where the reference has none, or the reverse")
        counts = counts & ~lost[1] & (a != b)
        if not counts.any():
            continue
        size = max(float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 0.0, call.size(**call.arguments))
        # What overflows in one may be the largest number in the other.
        most = torch.finfo(got.dtype).max
        a, b = a.clamp(-most, most), b.clamp(-most, most)
        worst = float(((a - b).abs().nan_to_num(math.inf) - _apart(call, i, a))[counts].max())
        tolerance = 2 * _rounding(call, got.dtype) * call.loose * _sharper(call) if not quantized else 2 * E4M3
        # Both are rounded: where subnormal, to a grid of this step.
        if worst > tolerance * size + max(least(got.dtype), 1e-30):
            raise WrongError(
                f"impl={impl!r}, result {i}: off by {worst:.3g}, the largest is {size:.3g}, allowed {tolerance:.3g}"
            )


def _compare_rows(call: Call, got: Tensor, want: Tensor, impl: str) -> None:
    """Rows of e4m3: the same bytes where no token goes, else what they stand for, element by element.

    Implementations are a few ulp of fp32 apart before they round, as nothing in a sum of squares cancels out (with an
    eps below 0 it does). So an element is at most one step of e4m3 to one side, an eighth of the larger one or 2^-9 of
    the scale, and one of the rope part a step of bf16, 2^-7, besides what is lost of products that cancel out there.
    """
    given = call.arguments
    slots = given["slots"][(given["slots"] >= 0) & (given["slots"] < got.shape[:2].numel())]
    untouched = torch.ones(got.shape[:2], dtype=torch.bool, device=got.device)
    untouched[slots // got.shape[1], slots % got.shape[1]] = False
    if not torch.equal(got[untouched], want[untouched]):
        raise WrongError(f"impl={impl!r}: bytes were written of a row that no token goes to")
    if given["eps"] < 0:
        return
    latent = given["kv"].shape[1]
    a, b = (unpack_fp8(x, latent).double() for x in (got, want))
    if not torch.equal(a.isfinite(), b.isfinite()):  # infinite or NaN by the order of multiplying
        raise WrongError(f"impl={impl!r}: a row is not finite where the reference's is, or the reverse")
    larger = torch.maximum(a.abs(), b.abs())
    scales = want[..., latent : latent + 4 * -(-latent // 128)].contiguous().view(torch.float32).double()
    least_step = 2.0**-9 * scales.repeat_interleave(128, -1)[..., :latent]
    key, angle = (max([0.0, *(float(x.abs().max()) for x in xs if x.numel())])
                  for xs in ((given["k_rope"].detach(),), (given["cos"].detach(), given["sin"].detach())))  # fmt: skip
    # Each of two products and their sum are rounded in fp32, in either implementation; the last is bf16's least step.
    of_rope = 2.0**-7 * larger[..., latent:] + 2.0**-21 * key * angle + 2.0**-133
    allowed = torch.cat([torch.maximum(larger[..., :latent] / 8, least_step), of_rope], -1)
    over = a.isfinite() & ((a - b).abs() > 1.0001 * allowed)
    if over.any():
        raise WrongError(f"impl={impl!r}: {int(over.sum())} numbers of rows in e4m3 are more than a step off")


def _either(call: Call) -> bool:
    """Whether what is not finite may be NaN by one implementation and infinite by the other.

    Of a tile with an infinity in it, what comes after the SwiGLU is. So is a sum of a tile whose scale is infinite: it
    is infinity by the sign of what was added up, and NaN if that is zero, as it may be but for roundings, or if each
    number is multiplied by the scale before and one of them is zero. That it is not finite holds in any order. What
    `fp8_linear` quantises to such a tile holds a NaN in e4m3, which is 480 in Triton's interpreter.
    """
    linear = call.function == "fp8_linear"
    parts = [x for path, x in leaves(call.arguments) if path.endswith(".scale") or (linear and x.device.type == "cpu")]
    return call.function in NETWORKS or any(
        x.is_floating_point() and not x.is_meta and bool(x.detach().float().isinf().any()) for x in parts
    )


def _apart(call: Call, i: int, result: Tensor) -> Tensor:
    """How far implementations may be apart in this result besides what its rounding loses."""
    if call.apart is None:
        return result.new_zeros(())
    off = call.apart(loss=SUMS[result.device.type], **call.arguments)
    off = off[i] if isinstance(off, list) else off
    return off.detach().nan_to_num(0.0, 0.0, 0.0).to(result.device)


def _same(got: Tensor, want: Tensor) -> bool:
    """Equal, any NaN being as good as another."""
    if got.dtype == torch.float8_e4m3fn:
        got, want = got.float(), want.float()
    return torch.equal(got, want) or bool(((got == want) | ((got != got) & (want != want))).all())
