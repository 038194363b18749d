"""A whole combine in one kernel: ranks that are streams of one GPU."""

import pytest
import torch

from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels.model.parallel import hopper_combine
from dskernels.model.parallel.engines import PeerMemory
from dskernels.model.parallel.hopper_combine import MOST_PIECES, PIECE, STAGES, PushAndSum
from dskernels.moe.rows import ExpertRows


@pytest.mark.gpu
@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.bfloat16), (3, torch.float16)])
def test_sums_of_all_ranks_are_those_of_their_rows(ranks, dtype):
    """Few pieces, so that the kernels of all ranks are on the GPU at once; twice, in the same place."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    torch.manual_seed(ranks)
    capacity, hidden, k, rows = 90, 1032, 3, 500  # three pieces, the last of which is not whole
    counts = [90, 77, 0][:ranks]
    size = ranks * capacity * hidden * 2
    memories = [torch.zeros(size + 4 * MOST_PIECES * ranks, dtype=torch.uint8, device="cuda") for _ in range(ranks)]
    addresses = [memory.data_ptr() for memory in memories]
    kernels = [PushAndSum(PeerMemory(memory, addresses, None), rank) for rank, memory in enumerate(memories)]
    streams = [torch.cuda.Stream() for _ in range(ranks)]
    for number, gathered in ((1, True), (2, False), (7, True)):
        leaving = [
            [torch.randn(capacity, hidden, device="cuda").to(dtype) for _ in range(ranks - 1)] for _ in range(ranks)
        ]
        own, residuals, outs = [], [], []
        for tokens in counts:
            y = torch.randn(rows if gathered else tokens, hidden, device="cuda").to(dtype)
            index = torch.randint(-1, rows, (tokens, k), device="cuda").int() if gathered else None
            weights = torch.rand(tokens, k + 2, device="cuda")[:, :k] if gathered else None
            own.append(ExpertRows(y, index, weights))
            residuals.append(torch.randn(tokens, hidden, device="cuda").to(dtype) if gathered else None)
            outs.append(torch.full((tokens, hidden), float("nan"), dtype=dtype, device="cuda"))
        assert all(kernel.supports(made.rows, capacity) is None for kernel, made in zip(kernels, own, strict=True))
        torch.cuda.synchronize()
        for rank, (kernel, stream) in enumerate(zip(kernels, streams, strict=True)):
            with torch.cuda.stream(stream):
                kernel(leaving[rank], own[rank], residuals[rank], outs[rank], slot=0, flags=size, number=number)
        torch.cuda.synchronize()
        for rank, tokens in enumerate(counts):
            # What another rank has for this one is the one before, or at, this one's number among its others.
            others = [leaving[other][rank - (rank > other)] for other in range(ranks) if other != rank]
            place = torch.arange(tokens, device="cuda", dtype=torch.int32)
            places = torch.stack([place + i * capacity for i in range(ranks - 1)], 1)
            want = own[rank].sums(came=torch.cat(others), places=places, residual=residuals[rank])
            assert torch.equal(outs[rank], want)


def test_compiles_without_spills():
    for others in (1, 3):
        options = hopper_combine.options(others, torch.bfloat16)
        assert_clean([compile_cuda(hopper_combine.SOURCE, options, STAGES * PIECE)])
