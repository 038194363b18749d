"""The order that the engine runs, walked with the times of its parts."""

import pytest

from benchmarks.pipeline_timeline import bubble, draw, formula, order, simulate


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("schedule", ["dualpipev", "zbv"])
def test_waiting_is_within_the_published_bubble(schedule, ranks):
    microbatches = 3 * ranks
    actions = order(schedule, ranks, microbatches)
    slots = simulate(actions)
    done = [(slot.kind, slot.stage, slot.microbatch) for slot in slots]
    assert len(done) == len(set(done)) == sum(map(len, actions.values()))
    for stage in range(2 * ranks):  # every half of every backward once, in one piece or in two
        for microbatch in range(microbatches):
            kinds = {kind for kind, s, m in done if (s, m) == (stage, microbatch)}
            assert kinds in ({"F", "B"}, {"F", "I", "W"})
    if schedule == "dualpipev":
        assert bubble(slots) <= 1.1 * formula(ranks)
    assert bubble(slots) <= 0.6 * (ranks - 1) * 6  # 1F1B waits (P - 1)(F + B), with stages of twice the layers


def test_picture():
    picture = draw("dualpipev", 2, 4)
    assert picture.startswith("<svg")
    assert picture.count("<rect") == 4 * 2 * 2 * 3 + 4
