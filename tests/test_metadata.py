"""Values kept by tensors' metadata: which go when there are too many."""

import torch

from dskernels.metadata import ByMetadata


def of(n):
    return (torch.empty(n, 1),)


def test_those_not_asked_for_of_late_go():
    """Of at most 8, four are the latest; one that is asked for stays, however many come."""
    kept = ByMetadata(most=8)
    used = of(100)
    kept.keep(used, None, "used")
    for n in range(50):
        kept.keep(of(n), None, n)
        assert kept.find(used, None) == ("used", [used[0].data_ptr()])
        found = [m for m in range(n + 1) if any(entry[2] == m for part in parts(kept) for entry in part)]
        assert found[-3:] == list(range(n + 1))[-3:]
        assert len(found) <= 8
    assert kept.find(of(0), None) is None
    assert kept.find(of(49), None)[0] == 49


def test_those_of_one_key_go_one_by_one():
    """A first tensor of one shape, and second ones of many: a page table that grows."""
    kept, first = ByMetadata(most=8), torch.empty(3)
    for n in range(100):
        pair = first, torch.empty(n)
        kept.keep(pair, None, n)
        assert kept.find(pair, None)[0] == n
        assert sum(len(part) for part in parts(kept)) <= 8
    assert kept.find((first, torch.empty(1)), None) is None


def parts(kept):
    assert len(kept._going) <= 4
    return [*kept._kept.values(), *kept._before.values()]
