"""What a step does beside the model: the kernels against the PyTorch that says what they mean, to the bit."""

import pytest
import torch

from compiling import Compile, assert_clean, compile_all
from dskernels import use_impl
from dskernels.model import steps
from dskernels.model.chance import uniform
from registering import check_registration

PAGE = 4


def sequences(drafts, rows, device, *, eos=2, pages=5, vocab=6):
    """Some rows without a sequence, lengths up to the last page and beyond, few tokens so that many drafts stand."""
    lengths = torch.randint(1, PAGE * pages, (rows,), dtype=torch.int32)
    active = (torch.rand(rows) < 0.8).int()
    tokens = {
        "drafts": torch.randint(0, vocab, (rows, drafts)),
        "eos": torch.randint(0, 2 * vocab, (rows, eos)),
        "block_table": torch.randperm(rows * pages, dtype=torch.int32).view(rows, pages),
        "last": torch.randint(0, vocab, (rows,)),
        "lengths": lengths * active,
        "active": active,
        "left": torch.randint(1, 6, (rows,), dtype=torch.int32) * active,
        "new": torch.full((rows, drafts + 3), -7),
    }
    return {name: tensor.to(device) for name, tensor in tokens.items()}


def flat(result):
    """The tensors of nested tuples."""
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]


def both(function, s, *given, **options):
    """What the kernel and the reference return and write."""
    results = []
    for impl in ("triton", "reference"):
        mine = {name: tensor.clone() for name, tensor in s.items()}
        with use_impl(impl):
            returned = function(*given, **mine, **options)
        results.append([*flat(returned), *mine.values()])
    return zip(*results, strict=True)


def assert_same(pairs):
    for got, expected in pairs:
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("drafts", [0, 1, 2, 4])
@pytest.mark.parametrize("ahead", [0, 3])
def test_place(device, drafts, ahead):
    s = sequences(drafts, 13, device)
    names = ("last", "drafts", "lengths", "active", "block_table")
    assert_same(both(steps.place, {name: s[name] for name in names}, page_size=PAGE, ahead=ahead))


@pytest.mark.parametrize("drafts", [0, 1, 2, 4])
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("eos", [0, 1, 3])
def test_advance(device, drafts, greedy, eos):
    size = 64 if device == "cuda" else 24
    s = sequences(drafts, size, device, eos=eos)
    likely = torch.randint(0, 6, (size, drafts + 1), device=device)
    stands = torch.rand(size, drafts, device=device) < 0.8
    chosen = torch.cat((torch.where(stands, s["drafts"], likely[:, :-1]), likely[:, -1:]), 1)
    accepted = None
    if not greedy:
        accepted, chosen = torch.randint(0, drafts + 1, (size,), device=device), likely[:, 0].contiguous()
    assert_same(both(steps.advance, s, chosen, accepted, page_size=PAGE))


def test_advance_in_words(device):
    """One sequence of each kind: all drafts stand, none does, an end token among them, no room for all, no sequence."""
    drafts = torch.tensor([[1, 2], [1, 2], [9, 2], [1, 2], [1, 2]], device=device)
    chosen = torch.tensor([[1, 2, 3], [4, 2, 3], [9, 2, 3], [1, 2, 3], [1, 2, 3]], device=device)
    lengths = torch.tensor([7, 7, 7, 7, 0], dtype=torch.int32, device=device)
    active = torch.tensor([1, 1, 1, 1, 0], dtype=torch.int32, device=device)
    left = torch.tensor([9, 9, 9, 2, 0], dtype=torch.int32, device=device)
    last, new = torch.full((5,), 8, device=device), torch.zeros(5, 5, dtype=torch.int64, device=device)
    eos = torch.full((5, 1), 9, device=device)
    table = torch.arange(25, dtype=torch.int32, device=device).view(5, 5)
    written = last, lengths, active, left, new
    advanced = steps.advance(chosen, None, drafts, eos, table, *written, page_size=PAGE)
    assert [row[: row[3]] for row in new.tolist()] == [[1, 2, 3], [4], [9], [1, 2], []]
    assert new[:, 4].tolist() == [2, 0, 2, 2, 0]
    assert lengths.tolist() == [10, 8, 0, 0, 0]
    assert active.tolist() == [1, 1, 0, 0, 0]
    assert left.tolist() == [6, 8, 8, 0, 0]
    assert last[:2].tolist() == [3, 4]
    # The module takes in what was cached, also of a text that ended: somebody may begin with it.
    assert advanced.q_lengths.tolist() == [3, 1, 1, 2, 0]
    assert advanced.placed.lengths.tolist() == [10, 8, 8, 9, 0]
    assert advanced.placed.slots.view(5, 3).tolist() == [
        [7, 8, 9],
        [27, -1, -1],
        [47, -1, -1],
        [67, 68, -1],
        [-1, -1, -1],
    ]
    assert advanced.rows.tolist() == [2, 3, 8, 11, 14]


def test_chances_are_those_of_their_place(device):
    stream = torch.randint(-(2**63), 2**63 - 1, (40,), device=device)
    places = torch.randint(0, 2**31 - 20, (40,), dtype=torch.int32, device=device)
    s = {"stream": stream, "places": places}
    for options in (
        {"ahead": 0, "count": 1, "purposes": 1, "first": 2},
        {"ahead": 3, "count": 5, "purposes": 2, "first": 0},
    ):
        assert_same(both(steps.chances, s, **options))
    numbers = steps.chances(stream, places, 1, 2, 2, 0)
    assert torch.equal(numbers[:, 1, 1], uniform(stream, places + 2, 1))
    assert 0 <= numbers.min() < 0.1 < 0.9 < numbers.max() < 1


@pytest.mark.parametrize("drafts", [0, 2])
def test_no_row_is_no_work(device, drafts):
    s = sequences(drafts, 0, device)
    chosen = torch.zeros(0, drafts + 1, dtype=torch.int64, device=device)
    assert_same(both(steps.advance, s, chosen, None, page_size=PAGE))


def test_registration(device):
    s = sequences(2, 3, device)
    names = ("last", "drafts", "lengths", "active", "block_table")
    ops = torch.ops.dskernels
    check_registration(ops.place_tokens.default, (*(s[name] for name in names), PAGE, 0))
    chosen = torch.zeros(3, 3, dtype=torch.int64, device=device)
    check_registration(ops.advance_sequences.default, (chosen, None, *s.values(), PAGE))
    check_registration(ops.chances.default, (s["last"], s["lengths"], 0, 2, 2, 0))


def test_kernels_compile_without_spills():
    common = {"p_drafts": "*i64", "p_last": "*i64", "p_lengths": "*i32", "p_active": "*i32", "p_block_table": "*i32"}
    common |= {"p_tokens": "*i64", "p_positions": "*i64", "p_slots": "*i64", "p_seen": "*i32", "p_cu_seqlens": "*i32"}
    common |= {"queries": "i32", "pages": "i32", "page_size": "i32"}
    further = {"p_chosen": "*i64", "p_accepted": "*i64", "p_eos": "*i64", "p_left": "*i32", "p_new": "*i64"}
    further |= {"p_q_lengths": "*i32", "p_rows": "*i64", "ends": "i32"}
    module = "dskernels.model.triton_steps"
    kernels = [
        Compile(f"{module}:place_kernel", signature={**common, "ahead": "i32"}, constants={"BLOCK": 4}, num_warps=1),
        Compile(
            f"{module}:chances_kernel",
            signature={
                **{"p_stream": "*i64", "p_places": "*i32", "p_out": "*fp32"},
                **dict.fromkeys(("ahead", "count", "purposes", "first", "numbers"), "i32"),
            },
            constants={"BLOCK": 128},
            num_warps=1,
        ),
    ]
    for greedy in (True, False):
        constants = {"GREEDY": greedy, "BLOCK": 4}
        kernels.append(
            Compile(f"{module}:advance_kernel", signature=common | further, constants=constants, num_warps=1)
        )
    assert_clean(compile_all(kernels), max_registers=128)
