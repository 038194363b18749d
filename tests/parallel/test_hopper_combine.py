"""A whole combine in one kernel: ranks that are streams of one GPU."""

import pytest
import torch

from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels.model.parallel import hopper_combine
from dskernels.model.parallel.engines import PeerMemory
from dskernels.model.parallel.hopper_combine import MOST_PIECES, PushAndSum, rows_of_piece
from dskernels.moe.rows import ExpertRows


@pytest.mark.gpu
@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.bfloat16), (3, torch.float16)])
def test_sums_of_all_ranks_are_those_of_their_rows(ranks, dtype):
    """Few pieces, so that the kernels of all ranks are on the GPU at once; twice, in the same place."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    torch.manual_seed(ranks)
    capacity, hidden, k, rows = 90, 1032, 3, 500
    counts = [90, 77, 0][:ranks]
    size = ranks * capacity * hidden * 2
    memories = [torch.full((size + 4096 * 4 * ranks,), 0, dtype=torch.uint8, device="cuda") for _ in range(ranks)]
    addresses = [memory.data_ptr() for memory in memories]
    kernels = [PushAndSum(PeerMemory(memory, addresses, None), rank) for rank, memory in enumerate(memories)]
    streams = [torch.cuda.Stream() for _ in range(ranks)]
    for number, gathered in ((1, True), (2, False), (7, True)):
        made, residuals, outs = [], [], []
        for tokens in counts:
            n = rows if gathered else ranks * capacity
            y = torch.randn(n, hidden, device="cuda").to(dtype)
            index = torch.randint(-1, rows, (ranks * capacity, k), device="cuda").int() if gathered else None
            weights = torch.rand(ranks * capacity, k + 2, device="cuda")[:, :k] if gathered else None
            made.append(ExpertRows(y, index, weights))
            residuals.append(torch.randn(tokens, hidden, device="cuda").to(dtype) if gathered else None)
            outs.append(torch.full((tokens, hidden), float("nan"), dtype=dtype, device="cuda"))
        assert all(kernel.supports(rows_) is None for kernel, rows_ in zip(kernels, made, strict=True))
        torch.cuda.synchronize()
        for rank, (kernel, stream) in enumerate(zip(kernels, streams, strict=True)):
            with torch.cuda.stream(stream):
                kernel(made[rank], residuals[rank], outs[rank], capacity, slot=0, flags=size, number=number)
        torch.cuda.synchronize()
        for rank, tokens in enumerate(counts):
            own = slice(rank * capacity, rank * capacity + tokens)
            others = [made[other].of(own).sums() for other in range(ranks) if other != rank]
            came = torch.cat(others)
            places = torch.arange(len(came), device="cuda", dtype=torch.int32).view(ranks - 1, tokens).T.contiguous()
            want = made[rank].of(own).sums(came=came, places=places, residual=residuals[rank])
            assert torch.equal(outs[rank], want)


def test_compiles_without_spills():
    for others in (1, 3):
        options = hopper_combine.options(others, torch.bfloat16, 4)
        assert_clean([compile_cuda(hopper_combine.SOURCE, options, 0)])


def test_pieces_have_numbers_of_their_own():
    for capacity in (1, 4, 16384, 16385, 100_000, 10**6):
        assert 1 <= -(-capacity // rows_of_piece(capacity)) <= MOST_PIECES
    assert rows_of_piece(16384) == 4
