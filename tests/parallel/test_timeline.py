"""The order in which a pipeline, and two micro-batches at once, run; walked with the times of their parts."""

from xml.etree import ElementTree

import pytest

from benchmarks import overlap_timeline
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


def messages(events):
    """Of each message in the order in which they leave: its micro-batch, its name, where it leaves and is read."""
    found = {}
    for at, event in enumerate(events):
        if event.kind != "run":
            found.setdefault(event.message[0], [event.microbatch, event.name, at]).append(at)
    return [(microbatch, name, places[0], places[-1]) for microbatch, name, *places in found.values()]


@pytest.mark.parametrize("at_once", [False, True])
def test_micro_batches_take_turns(at_once):
    """Every message is read by its own micro-batch, and at once each travels while the other micro-batch computes."""
    layers = overlap_timeline.LAYERS
    for backward, events in enumerate(overlap_timeline.order(at_once=at_once)):
        sent = messages(events)
        assert len(sent) == 2 * 2 * layers
        for microbatch in (0, 1):
            assert [name for who, name, *_ in sent if who == microbatch] == ["dispatch", "combine"] * layers
            ran = [event for event in events if (event.kind, event.microbatch) == ("run", microbatch)]
            for part in ("attention", "shared", "experts"):
                assert sum(event.name == part for event in ran) == layers
            assert sum(event.share for event in ran if event.name == "sum") == pytest.approx(2 * layers)
        hidden = [
            any(event.kind == "run" and event.microbatch != who for event in events[leaves:read])
            for who, _, leaves, read in sent
        ]
        # What the first one of the backward travels under, the gradient of the loss, is not looked at.
        assert hidden == [at_once and not (backward and i == 0) for i in range(len(sent))]


def test_micro_batches_at_once_wait_less():
    waits = {
        at_once: overlap_timeline.waiting(overlap_timeline.simulate(overlap_timeline.order(at_once=at_once)[0]))
        for at_once in (False, True)
    }
    last = overlap_timeline.COSTS["combine"]  # has only the other's sum to travel under
    assert 0 < waits[True] <= last < waits[False]


def test_picture_of_micro_batches():
    picture = ElementTree.fromstring(overlap_timeline.draw())
    labels = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    for label in ("attention", "shared", "experts", "dispatch", "combine"):
        assert labels.count(label) == 3 * 2 * overlap_timeline.LAYERS  # three panels, two micro-batches
