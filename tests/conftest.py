"""Where the tests run: on a GPU where there is one, else on the CPU with kernels in Triton's interpreter.

DSKERNELS_TEST_DEVICE says it by force. `cpu` takes the interpreter although there is a GPU; `cuda` (`make test-gpu`)
fails where there is none, and runs only what a GPU can decide: the tests that take `device` or are marked `gpu`.
"""

import gc
import os
import random

# Of what is imported and collected nothing is garbage, and looking for it took 6.0 of 22.9 seconds of a worker.
gc.disable()

_PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
if _PARALLEL:
    # The workers share the cores; torch threads of each worker would only wait for one another.
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy
import pytest
import torch
from hypothesis import register_random, settings

import in_part

if _PARALLEL:
    torch.set_num_threads(1)

_FORCED = os.environ.get("DSKERNELS_TEST_DEVICE")
_DEVICE = _FORCED or ("cuda" if torch.cuda.is_available() else "cpu")

# Triton reads this when @triton.jit runs: before any module with a kernel is imported.
if _DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreting

    interpreting.make_faster()
else:
    os.environ.pop("TRITON_INTERPRET", None)

# The same examples in every run, so that anybody can repeat a failure; `--hypothesis-profile=search` seeks new ones.
# No deadline: the interpreter takes its time.
settings.register_profile("ci", derandomize=True, max_examples=25, deadline=None)
settings.register_profile("search", max_examples=500, deadline=None)
settings.load_profile("ci")


class _TorchRandom:
    """torch's generator as hypothesis wants it, so that it is seeded before every example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()  # hypothesis keeps only a weak reference
register_random(_torch_random)


def pytest_configure(config):
    if _DEVICE not in ("cpu", "cuda"):
        raise pytest.UsageError(f"DSKERNELS_TEST_DEVICE: expected cpu or cuda, got {_DEVICE}")
    if _DEVICE == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("DSKERNELS_TEST_DEVICE=cuda, but torch.cuda.is_available() is False here")


def pytest_collection_finish():
    gc.freeze()  # half a million objects, which no collection between the tests looks at again
    gc.enable()


def pytest_collection_modifyitems(config, items):
    if in_part.IN_PART and _DEVICE == "cpu":
        items[:], rest = in_part.chosen(items)
        config.hook.pytest_deselected(items=rest)
    if _DEVICE == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU (make test-gpu)"))
    elif _FORCED:
        needed = [item for item in items if item.get_closest_marker("gpu") or "device" in item.fixturenames]
        config.hook.pytest_deselected(items=[item for item in items if item not in needed])
        items[:] = needed


@pytest.fixture(scope="session")
def device():
    """Return where kernels run: "cuda", or "cpu" for the interpreter."""
    return _DEVICE


@pytest.fixture(scope="session")
def sm_90(device):
    """Return whether kernels run on a GPU of sm_90: on the CPU they do not, and any other GPU skips the test."""
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an sm_90 GPU")
    return device == "cuda"


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
