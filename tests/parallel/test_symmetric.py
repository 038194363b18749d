"""Rows written into the memory of other ranks: the kernel in one process, the exchange on two GPUs."""

import os
import re

import pytest
import torch
import torch.distributed as dist
from world import CONTEXT

from compiling import Compile, assert_clean, compile_all
from dskernels.model.parallel.decode import DecodeExperts
from dskernels.model.parallel.symmetric_triton import BLOCK, SUM_BLOCK, put, sum_ranks
from dskernels.types import Routing


@pytest.mark.parametrize("width", [12, 2060])
def test_rows_land_in_their_slots(device, width):
    tokens, ranks, rank, head = 3, 2, 1, 4
    slots = [torch.full((ranks * tokens, width), -7, dtype=torch.int32, device=device) for _ in range(ranks)]
    peers = torch.tensor([memory.data_ptr() for memory in slots], dtype=torch.int64, device=device)
    rows = torch.randint(0, 2**30, (tokens, width), dtype=torch.int32, device=device)
    needed = torch.tensor([[1, 0], [1, 1], [0, 1]], dtype=torch.uint8, device=device)
    put(rows, needed, peers, slot=rank * tokens, head=head, rows_of_rank=0)
    for r in range(ranks):
        assert (slots[r][:tokens] == -7).all()
        for t in range(tokens):
            words = width if needed[t, r] else head
            assert torch.equal(slots[r][rank * tokens + t, :words], rows[t, :words])
            assert (slots[r][rank * tokens + t, words:] == -7).all()

    own = torch.randint(0, 2**30, (ranks * tokens, width), dtype=torch.int32, device=device)
    put(own, needed.T.contiguous().T, peers, slot=0, head=0, rows_of_rank=tokens)
    for r in range(ranks):
        for t in range(tokens):
            wanted = own[r * tokens + t] if needed[t, r] else torch.full_like(own[0], -7)
            assert torch.equal(slots[r][t], wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_ranks_are_summed_in_fp32_in_their_order(device, ranks, dtype):
    parts = [torch.randn(3, SUM_BLOCK - 5, device=device).to(dtype) for _ in range(ranks)]
    out = torch.full_like(parts[0], float("nan"))
    sum_ranks(parts, out=out)
    want = torch.zeros(out.shape, device=device)
    for part in parts:
        want += part
    assert torch.equal(out, want.to(dtype))


def test_compiles_without_spills_and_writes_16_bytes_at_a_time():
    signature = {"p_rows": "*i32", "p_needed": "*u8", "p_peers": "*i64"}
    numbers = ("slot", "width", "head", "rows_of_rank", "stride_row", "stride_needed_token", "stride_needed_rank")
    signature |= dict.fromkeys(numbers, "i32")
    kernel = "dskernels.model.parallel.symmetric_triton:put_kernel"
    sums = {"p_out": "*bf16", **{f"p_{i}": "*bf16" for i in range(9)}, "size": "i32"}
    of_sums = {"PARTS": 9, "BLOCK": SUM_BLOCK}
    reports = compile_all(
        [
            Compile(kernel, signature, {"BLOCK": BLOCK}, num_warps=8, targets=["sm_90"]),
            Compile(kernel.replace("put", "sum"), sums, of_sums, num_warps=8, targets=["sm_90"]),
        ]
    )
    assert_clean(reports)
    assert re.search(r"\bST[^ ]*\.128", reports[0].code)


def one_gpu(rank, folder, errors):
    try:
        from dskernels.model.parallel.symmetric import SymmetricDecodeExperts

        os.environ.update(NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1")
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)
        store = dist.FileStore(f"{folder}/store", 2)
        dist.init_process_group("nccl", rank=rank, world_size=2, store=store, device_id=device)
        torch.manual_seed(1)
        w13, w2 = (torch.randn(*shape, device=device).bfloat16() / 16 for shape in ((8, 512, 256), (8, 256, 256)))
        own = slice(4 * rank, 4 * rank + 4)
        for wire in ("same", "fp8"):
            exchange = SymmetricDecodeExperts(dist.group.WORLD, 8, tokens=16, hidden=256, top_k=2, wire=wire)
            plain = DecodeExperts(dist.group.WORLD, 8, wire=wire)
            for tokens in (16, 5, 16):
                x = torch.randn(tokens, 256, device=device).bfloat16()
                ids = torch.randint(-1, 8, (tokens, 2), device=device).int()
                none = ids.new_empty(0)
                routing = Routing(torch.rand(tokens, 2, device=device), ids, none, none)
                got = exchange(x, w13[own], w2[own], routing)
                want = plain(x, w13[own], w2[own], routing)
                torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
        dist.destroy_process_group()
        errors.put(None)
    except BaseException as error:
        errors.put(f"rank {rank}: {type(error).__name__}: {error}")


@pytest.mark.gpu
def test_two_gpus(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    errors = CONTEXT.Queue()
    processes = [CONTEXT.Process(target=one_gpu, args=(rank, str(tmp_path), errors), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    said = [errors.get(timeout=120) for _ in processes]
    for process in processes:
        process.kill()
    assert said == [None, None]
