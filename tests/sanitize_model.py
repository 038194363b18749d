"""More kernels on small shapes for `sanitize`: those around a model, and portable ones that no case of `parity` runs.

Each is a registered operation or a launcher of one; what comes out, and what is written to, is compared with the
reference, or with plain PyTorch, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import dskernels as ds
from dskernels import parity
from dskernels.dispatch import Operation
from dskernels.gemm.config import GemmConfig
from dskernels.gemm.triton_narrow import narrow
from dskernels.mla.absorb.values import _mla_values_quantize
from dskernels.mla.prefill.absorbed import _group_tokens, _take_results
from dskernels.model import few, layers, optimizer, steps
from dskernels.model.parallel.symmetric_triton import SUM_BLOCK, put, sum_ranks
from dskernels.model.parallel.triton_wire import choices, unload
from dskernels.moe.triton_sort import append_choices, sort
from dskernels.parity.inputs import quantized
from dskernels.routing import hopper_gate, triton_gate

Run = Callable[[torch.device], bool]
CPU = torch.device("cpu")


def kernels() -> Iterator[tuple[str, Run]]:
    """Name each, with what runs it on a device and says whether the result was right."""
    yield "update of the optimiser", update
    yield "cross_entropy and its gradient", loss
    yield "apply_rope", rope
    yield "gradient of a norm of wide rows", wide_norm
    yield "values of heads in e4m3", values
    yield "new tokens in groups", groups
    yield "products of few rows, the norm before them", products
    yield "norm of a sum", norm
    yield "embedding and angles", embedding
    yield "a draft taken in", draft
    yield "places of tokens, and how texts go on", texts
    yield "rows for other ranks", rows_for_ranks
    yield "sum over ranks", sum_over_ranks
    yield "tokens off the wire", wire
    yield "choices sorted", sorted_choices
    yield "products of a gate, in parts, and its gradients", gate
    yield "fp8_gemm of few rows, in parts", narrow_rows
    yield "fused_experts, few tokens in plain weights", few_experts


def moved(values: Any, device: torch.device) -> Any:
    """Copies there, of whatever is a tensor."""
    return [x.detach().to(device, copy=True) if isinstance(x, Tensor) else x for x in values]


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result."""
    return [result] if isinstance(result, Tensor) else [x for part in result or () for x in flat(part)]


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Whether these agree: integers to the bit, numbers by the largest of them."""
    got, want = got.cpu(), want.cpu()
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not got.is_floating_point():
        return torch.equal(got, want)
    a, b = got.double(), want.double()
    return a.numel() == 0 or bool((a - b).abs().max() <= tolerance * b.abs().max())


def alike(operation: Operation, device: torch.device, *args: Any, tolerance: float = 1e-5) -> bool:
    """Whether the kernel returns and writes what the reference does, and leaves all else as it was."""
    there, here = moved(args, device), moved(args, CPU)
    got, want = flat(operation(*there, impl="triton")), flat(operation(*here, impl="reference"))
    wanted = [*want, *(here[i] if i in operation.writes else x for i, x in enumerate(args) if isinstance(x, Tensor))]
    pairs = zip([*got, *(x for x in there if isinstance(x, Tensor))], wanted, strict=True)
    return all(close(a, b, tolerance) for a, b in pairs)


def update(device: torch.device) -> bool:
    """Moments in both dtypes; numbers that are no whole block; a step that is left out."""
    right = True
    for dtype, n, skip in ((torch.bfloat16, 2051, None), (torch.float32, 2048, 0.0), (torch.float32, 100, 1.0)):
        moments = torch.randn(n).to(dtype), torch.rand(n).to(dtype)
        numbers = (torch.tensor(x) for x in (3.0, 1e-2, 1.5))
        left_out = None if skip is None else torch.tensor(skip)
        given = torch.randn(n), torch.randn(n), *moments, *numbers, left_out, 0.9, 0.95, 0.1
        right &= alike(optimizer._adamw, device, *given, tolerance=1e-2 if dtype == torch.bfloat16 else 1e-5)
        right &= alike(optimizer._add_gradient, device, torch.randn(n), torch.randn(n).to(dtype), skip is None)
    return right


def loss(device: torch.device) -> bool:
    logits, targets = torch.randn(33, 1300), torch.randint(0, 1300, (33,))
    results = []
    for where, impl in ((device, "triton"), (CPU, "reference")):
        x, ids = moved((logits, targets), where)
        nats = ds.cross_entropy(x.requires_grad_(), ids, impl=impl)
        results.append([nats, *torch.autograd.grad(nats.sum(), x)])
    return all(close(got.detach(), want.detach(), 1e-5) for got, want in zip(*results, strict=True))


def rope(device: torch.device) -> bool:
    angle = torch.rand(21, 32) * 6
    x, cos, sin = torch.randn(21, 3, 64).bfloat16(), angle.cos(), angle.sin()
    got = ds.apply_rope(*moved((x, cos, sin), device), impl="triton")
    return close(got, ds.apply_rope(x, cos, sin, impl="reference"), 2**-7)


def wide_norm(device: torch.device) -> bool:
    dy, x, more = (torch.randn(5, 8200).bfloat16() for _ in range(3))
    weight = torch.rand(8200).bfloat16()
    got = ds.rmsnorm_backward(*moved((dy, x, weight, 1e-6, more), device), impl="triton")
    want = ds.rmsnorm_backward(dy, x, weight, 1e-6, more, impl="reference")
    return all(close(a, b, 2**-6) for a, b in zip(got, want, strict=True))


def values(device: torch.device) -> bool:
    latents, w_uv = torch.randn(21, 2, 256).bfloat16(), torch.randn(2, 128, 256).bfloat16() / 16
    data, scale = _mla_values_quantize(*moved((latents, w_uv), device), impl="triton")
    want, of_want = _mla_values_quantize(latents, w_uv, impl="reference")
    return close(scale, of_want, 1e-2) and close(data.float(), want.float(), 0.13)  # a step of e4m3


def groups(device: torch.device) -> bool:
    table = torch.arange(12, dtype=torch.int32).view(3, 4)
    lengths, cu = (torch.tensor(x, dtype=torch.int32) for x in ([40, 7, 0], [0, 9, 9, 14]))
    q = torch.randn(17, 3, 40).bfloat16()
    given = q, table, lengths, cu, 4, 16, 24, 16
    got, want = _group_tokens(*moved(given, device), impl="triton"), _group_tokens(*given, impl="reference")
    # Of queries only the rope part is written.
    pairs = zip([got[0], got[1][..., 24:], *got[2:]], [want[0], want[1][..., 24:], *want[2:]], strict=True)
    right = all(torch.equal(a.cpu(), b) for a, b in pairs)
    place, places = want[2], len(want[0])
    return right & alike(_take_results, device, torch.randn(places, 3, 24), torch.randn(places // 4, 3, 4), place)


def products(device: torch.device) -> bool:
    x, update, norm = torch.randn(3, 300), torch.randn(3, 300), torch.rand(300)
    weight, second, gated = torch.randn(40, 300) / 17, torch.randn(24, 300) / 17, torch.randn(4, 96)
    whole = alike(few._products, device, x, update, norm, weight, second, 1e-6, False, True)
    return whole and alike(few._products, device, gated, None, None, torch.randn(33, 48), None, 1e-6, True, False)


def norm(device: torch.device) -> bool:
    return alike(layers._add_norm, device, torch.randn(9, 100), torch.randn(9, 100), torch.rand(100), 1e-6)


def embedding(device: torch.device) -> bool:
    tokens, positions = torch.tensor([3, 36, 0]), torch.tensor([0, 400, 17])
    table, frequencies, hidden = torch.randn(37, 40), torch.tensor([1.0, 0.1, 0.01]), torch.randn(3, 40)
    alone = alike(few._embed, device, tokens, positions, table, frequencies, 1.25, None, None, None, 1e-6)
    norms = hidden, torch.rand(40), torch.rand(40)
    return alone and alike(few._embed, device, tokens, positions, table, frequencies, 1.25, *norms, 1e-6)


def draft(device: torch.device) -> bool:
    lengths, active = (torch.tensor(x, dtype=torch.int32) for x in ([4, 0, 7], [1, 0, 1]))
    table, logits = torch.arange(9, dtype=torch.int32).view(3, 3), torch.randn(3, 5000)
    given = torch.randn(5000, 40), torch.tensor([1.0, 0.1, 0.01]), 1.25, torch.randn(3, 40), *torch.rand(2, 40), 1e-6
    drafts = torch.full((3, 4), -1)
    return alike(few._look_ahead, device, logits, drafts, 2, lengths, active, table, 4, *given)


def texts(device: torch.device) -> bool:
    """Drafts that stand or fall, greedily and by how many were accepted; rows without a sequence."""
    rows, k, right = 13, 2, True
    active = (torch.rand(rows) < 0.8).int()
    lengths, left = (torch.randint(1, n, (rows,), dtype=torch.int32) * active for n in (20, 6))
    drafts, last, eos = (torch.randint(0, 6, shape) for shape in ((rows, k), (rows,), (rows, 2)))
    table = torch.randperm(rows * 5).int().view(rows, 5)
    right &= alike(steps._place, device, last, drafts, lengths, active, table, 4, 1)
    for chosen, accepted in (
        (torch.randint(0, 6, (rows, k + 1)), None),
        (torch.randint(0, 6, (rows,)), torch.randint(0, k + 1, (rows,))),
    ):
        written = last, lengths, active, left, torch.full((rows, k + 3), -7)
        right &= alike(steps._advance, device, chosen, accepted, drafts, eos, table, *written, 4)
    return right and alike(steps._chances, device, torch.randint(0, 2**60, (rows,)), lengths, 1, 3, 2, 1)


def rows_for_ranks(device: torch.device) -> bool:
    """All of a row where it is needed, else its head."""
    width, tokens = 2060, 3
    slots = [torch.full((tokens, width), -7, dtype=torch.int32, device=device) for _ in range(2)]
    peers = torch.tensor([memory.data_ptr() for memory in slots], device=device)
    rows, needed = torch.randint(0, 2**30, (tokens, width)).int(), torch.tensor([[1, 0], [1, 1], [0, 1]]).bool()
    put(*moved((rows, needed), device), peers, slot=0, head=4, rows_of_rank=0)
    wanted = [torch.where(needed[:, r, None] | (torch.arange(width) < 4), rows, -7) for r in range(2)]
    return all(torch.equal(got.cpu(), want) for got, want in zip(slots, wanted, strict=True))


def sum_over_ranks(device: torch.device) -> bool:
    right = True
    for ranks in (1, 4, 9):
        parts = [torch.randn(3, SUM_BLOCK - 5).bfloat16() for _ in range(ranks)]
        out = torch.full_like(parts[0], torch.nan, device=device)
        sum_ranks(moved(parts, device), out=out)
        right &= torch.equal(out.cpu(), torch.stack(parts).float().cumsum(0)[-1].bfloat16())
    return right


def wire(device: torch.device) -> bool:
    """Tokens in e4m3 with exponents in bytes, and choices, of rows that lie apart."""
    q = ds.quantize(torch.randn(5, 300), scale_format="ue8m0", impl="reference")
    exponents = torch.zeros(5, 7, dtype=torch.uint8)
    exponents[:, :3] = (q.scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    data, bytes_ = moved((q.data, exponents), device)
    right = torch.equal(unload(data, bytes_[:, :3], torch.bfloat16).cpu(), q.dequantize(torch.bfloat16))
    weights, experts = torch.rand(700, 5), torch.randint(-1, 20, (700, 5)).int()
    got, ids = choices(*(x[:, :3] for x in moved((weights, experts), device)), 5, 6)
    here = (experts[:, :3] >= 5) & (experts[:, :3] < 11)
    right &= torch.equal(got.cpu(), weights[:, :3])
    return right and torch.equal(ids.cpu(), torch.where(here, experts[:, :3] - 5, -1))


def sorted_choices(device: torch.device) -> bool:
    """So many that they are counted first, with ids that are none; and with shared experts behind them."""
    experts, weights = torch.randint(-1, 9, (700, 4)).int(), torch.rand(700, 4)
    more = append_choices(*moved((experts, weights), device), 9, 2)
    shared = torch.tensor([9, 10], dtype=torch.int32).expand(700, 2)
    right = torch.equal(more[0].cpu(), torch.cat((experts, shared), 1))
    right &= torch.equal(more[1].cpu(), torch.cat((weights, torch.ones(700, 2)), 1))
    offsets, index, source = (x.cpu() for x in sort(experts.to(device), 9))
    ids = experts.flatten()
    counts = torch.bincount(ids[ids >= 0].long(), minlength=9)
    right &= torch.equal(offsets[1:].long(), counts.cumsum(0)) and int(offsets[0]) == 0
    order = torch.argsort(ids.long(), stable=True)[int((ids < 0).sum()) :]
    right &= torch.equal(source[: len(order)].long(), order)
    return right and torch.equal(index.flatten()[order].long(), torch.arange(len(order)))


def gate(device: torch.device) -> bool:
    """K in parts; gradients by the portable kernel, and as pieces for torch's products."""
    x, weight, dlogits = torch.randn(7, 2048).bfloat16(), torch.randn(16, 2048).bfloat16() / 45, torch.randn(7, 16)
    on_gpu, of_gate, gradient = moved((x, weight, dlogits), device)
    right = close(triton_gate.gate(on_gpu, of_gate), x.float() @ weight.float().T, 1e-5)
    wanted = dlogits @ weight.float(), dlogits.T @ x.float()
    for function in (triton_gate.gate_backward, *((hopper_gate.gate_backward,) if device.type == "cuda" else ())):
        got = function(gradient, on_gpu, of_gate, True, True)
        right &= all(close(a.float(), b, 2**-7) for a, b in zip(got, wanted, strict=True))
    return right


def narrow_rows(device: torch.device) -> bool:
    a, b = quantized(0, 5, 1424, (1, 128), CPU), quantized(1, 200, 1424, (128, 128), CPU)
    x, w, out = a.to(device), b.to(device), torch.full((5, 200), torch.nan, device=device)
    config = GemmConfig(16, 64, num_warps=4, num_stages=3)
    narrow(x.data, x.scale, w.data, w.scale, 128, None, out, False, config, 3)
    return parity.difference(out.cpu(), ds.reference.fp8_gemm(a, b, out_dtype=torch.float32)) < parity.E4M3_SUMS


def few_experts(device: torch.device) -> bool:
    w13, w2, shared = torch.randn(6, 160, 96), torch.randn(6, 96, 80), (torch.randn(64, 96), torch.randn(96, 32))
    experts, weights = torch.tensor([[4, 0], [3, -1], [4, 3]], dtype=torch.int32), torch.rand(3, 2)
    right = True
    for n_shared, both in ((1, None), (0, shared)):
        results = []
        for where, impl in ((device, "triton"), (CPU, "reference")):
            x, up, down, ids, w = moved((torch.ones(3, 96) / 9, w13, w2, experts, weights), where)
            network = None if both is None else tuple(moved(both, where))
            routing = ds.Routing(w, ids, ids, ids)
            results.append(ds.fused_experts(x, up, down, routing, n_shared=n_shared, shared=network, impl=impl))
        right &= close(*results, 1e-4)
    return right
