"""Some ranks on the CPU, over gloo, or a GPU each: a function runs on all of them, and what one says is wrong fails the
test.

Processes are forked from a server that has imported torch and dskernels and done nothing else, so that a world starts
in half a second.
"""

import contextlib
import datetime
import os
import tempfile
import time
import traceback
from multiprocessing import get_context
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["world", "dskernels.model.parallel.pipeline", "dskernels.model.train", "torch.distributed.checkpoint"]
)
LIMIT = 300  # seconds that a world may take: a few, on a machine that does nothing else


def run(ranks, function, *args, gpus=False):
    """``function(rank, *args)`` on so many ranks; gives what each returns, raises what the first raises."""
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            here, there = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(
                target=_main, args=(rank, ranks, gpus, folder, there, function, args), daemon=True
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        results, failed, deadline = [None] * ranks, {}, time.monotonic() + LIMIT
        waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                failed |= dict.fromkeys(waiting.values(), "nothing in time")
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, results[rank] = pipe.recv()
                except EOFError:
                    ok, results[rank] = False, "died"
                if not ok:  # the others may wait for it for ever
                    failed[rank], deadline = results[rank], min(deadline, time.monotonic() + 30)
        for process in processes:
            process.join(0 if failed else 10)
            process.kill()
    if failed:
        raise AssertionError("\n".join(f"rank {rank}: {failed[rank]}" for rank in sorted(failed)))
    return results


@contextlib.contextmanager
def case(name):
    """What fails in it fails with this name, and with what it was: one world has many cases."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"case: {name}") from error


def _main(rank, ranks, gpus, folder, pipe, function, args):
    try:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
        store = dist.FileStore(f"{folder}/store", ranks)
        timeout = datetime.timedelta(seconds=LIMIT)
        if gpus:
            os.environ.update(NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1")
            torch.cuda.set_device(rank)
        options = dict(rank=rank, world_size=ranks, store=store, timeout=timeout)
        dist.init_process_group("nccl" if gpus else "gloo", **options)
        result = function(rank, *args)
        dist.barrier()
        dist.destroy_process_group()
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
