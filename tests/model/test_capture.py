"""Where CUDA graphs are captured."""

import threading

import pytest
import torch

from dskernels.model import LatentCache, generate
from dskernels.model.capture import stream_of
from model.tiny import SMALL, tiny_model


def test_a_thread_has_one_stream_of_a_device(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or len(made))
    first, second = torch.device("cuda", 6), torch.device("cuda", 7)
    assert stream_of(first) == stream_of(first) != stream_of(second)
    other = []
    thread = threading.Thread(target=lambda: other.append(stream_of(first)))
    thread.start()
    thread.join()
    assert other[0] not in (stream_of(first), stream_of(second))


@pytest.mark.gpu
def test_caches_that_come_and_go_leave_no_memory_behind():
    """Found by soak: each cache captured on a stream of its own, of which torch kept 32 MB for cuBLAS."""
    model = tiny_model(**SMALL).to("cuda")

    def used():
        cache = LatentCache(model.config, pages=8, page_size=4, dtype=torch.float32, device="cuda")
        generate(model, [[1, 2, 3], [4]], max_new_tokens=4, cache=cache, eos=()).finish()
        del cache
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    used()
    first = used()
    assert max(used() for _ in range(4)) <= first + 2**20
