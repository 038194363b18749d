"""Every public operation on whatever arguments: the outcome is right, or a clean error that names the argument.

`make fuzz CASES=20000` looks for new ones, and says how many of each operation were right and how many refused; in
`make test` a few that are the same each time.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

import dskernels as ds
from dskernels import dispatch, recording, repeated
from dskernels.metadata import ByMetadata
from fuzz import operations_fp8, operations_model
from fuzz.drawing import Call, Draw
from fuzz.judging import OUTCOMES, Memory, WrongError, attempt, judge
from fuzz.spoiling import spoil

CALLS = operations_fp8.CALLS | operations_model.CALLS
NOT_CALLED = {"explain", "use_impl", "Fp8Tensor", "LoadStatistics", "Permuted", "Routing"}
CASES = int(os.environ.get("DSKERNELS_FUZZ_CASES", "0"))  # of all operations together; 0 for the few of `make test`
EACH = -(-CASES // len(CALLS)) or 4
# One case in this many runs in Triton's interpreter too, which takes 20 times as long as the reference.
KERNELS = 6

profile = settings(
    max_examples=EACH,
    derandomize=CASES == 0,
    database=None if CASES == 0 else settings.default.database,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink] if CASES else [Phase.generate],
)


@pytest.fixture(autouse=True)
def _straight_on_the_cpu(monkeypatch):
    """Later calls of known metadata go by themselves, as on a GPU."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(dispatch, "_STRAIGHT_DEVICES", ("cpu",))
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
        monkeypatch.setattr(
            recording.Recorded, "bound", lambda self, args: lambda addresses, args: self.function(*args)
        )
        monkeypatch.setattr(repeated, "_kind", _valid_once)
        for operation in dispatch.OPERATIONS.values():
            if operation._straight is not None:
                monkeypatch.setattr(operation, "_straight", ByMetadata())
        for name in CALLS:
            if hasattr(getattr(ds, name), "known"):
                monkeypatch.setattr(getattr(ds, name).known, "kinds", ByMetadata())


def _valid_once(function, tensors):
    """What a later call of known metadata runs. On a GPU nothing is validated then: so nothing may be refused here."""

    def call(addresses, tensors, args, kwargs):
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise WrongError(f"it is taken for a call that was valid: {error}") from error

    return call


def known(call: Call, impl: str) -> None:
    """Run a valid call, as what looks like it may be taken for it."""
    memory = Memory(call.arguments)
    attempt(call, impl)
    memory.restore()


def test_no_operation_is_left_out():
    assert set(CALLS) == set(ds.__all__) - NOT_CALLED


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("operation", CALLS)
def test_is_right_or_says_what_is_wrong(operation):
    # Whatever else is raised is wrong: `judge` has taken what a call may raise.
    @profile
    @given(st.data())
    def run(data):
        d = Draw(data.draw)
        call = CALLS[operation](d)
        impl = "triton" if d.chance(KERNELS) else "reference"
        spoils = d.one(0, 1, 1, 2)
        if spoils and d.chance():
            known(call, impl)
        for _ in range(spoils):
            spoil(d, call)
        try:
            OUTCOMES[operation][judge(call, impl, valid=not call.notes)] += 1
        except Exception as error:
            OUTCOMES[operation]["wrong"] += 1
            note(f"{operation}, impl={impl}: {'; '.join(call.notes) or 'valid'}")
            raise WrongError(
                f"{operation}: {'; '.join(call.notes) or 'a valid call'}: {type(error).__name__}: {error}"
            ) from error

    run()
