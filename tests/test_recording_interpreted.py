"""Public operations that are recorded whole, with what their kernels compute: on the CPU, see recording_interpreted."""

import pytest
import torch

import dskernels as ds
from dskernels import recording
from dskernels.mla.prefill import cached
from recording_interpreted import forget, interpreting_driver, is_recorded  # noqa: F401 - a fixture
from test_mla_prefill_cached import make_inputs

# Lengths and new tokens of three calls of one kind.
SIZES = ([40, 0, 9, 25], [3, 2, 9, 0]), ([7, 0, 18, 11], [5, 6, 0, 3]), ([33, 2, 21, 40], [1, 1, 1, 11])
CACHES = {"fp32": (torch.float32, None), "e4m3": (torch.bfloat16, torch.uint8)}


def check_as_written(function, call, drawn, monkeypatch):
    """The third call of a kind and those after it give the bits of calls that are not recorded."""
    got = [call(*given) for given in [*drawn, *drawn]]
    assert is_recorded(function)
    monkeypatch.setattr(recording, "may_be_recorded", lambda tensors: False)
    forget(monkeypatch)
    want = [call(*given) for given in drawn]
    for results, wanted in zip(got, [*want, *want], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


@pytest.mark.parametrize("way", ["absorbed", "heads"])
@pytest.mark.parametrize("kind", CACHES)
def test_prefill_over_the_cache(interpreting_driver, monkeypatch, way, kind):  # noqa: F811
    dtype, cache_dtype = CACHES[kind]
    monkeypatch.setattr(cached, "is_absorbed", lambda *args: way == "absorbed")
    drawn = [make_inputs("cpu", *sizes, 2, 8, (128, 24, 16, 40), dtype, cache_dtype) for sizes in SIZES]
    width = max(table.shape[1] for *_, table, _, _ in drawn)
    # Calls of one kind have tables and caches of one size, whatever is in them.
    pages = max(inputs[2].shape[0] for inputs in drawn)
    drawn = [
        (q, kv_b, _enlarged(store, pages, 0), _enlarged(table, width, 1), *rest)
        for q, kv_b, store, table, *rest in drawn
    ]

    def call(*given):
        return ds.mla_prefill_cached(*given, scale=0.2, impl="triton")

    check_as_written(ds.mla_prefill_cached, call, drawn, monkeypatch)


def _enlarged(x, size, dim):
    shape = list(x.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)


@pytest.mark.parametrize(("way", "chunk"), [("positions", 13), ("some heads", None)])
def test_prefill_in_parts_is_not_recorded(interpreting_driver, monkeypatch, way, chunk):  # noqa: F811
    """A recording would hold the keys and values of all parts at once."""
    monkeypatch.setattr(cached, "is_absorbed", lambda *args: False)
    inputs = make_inputs("cpu", [40, 0, 9, 25], [3, 2, 9, 0], 2, 8)
    addressable, row = inputs[3].numel() * 8, inputs[1].shape[0] * 4
    monkeypatch.setattr(cached, "CHUNK_BYTES", addressable * row // 2 if way == "some heads" else chunk * row)
    calls = [ds.mla_prefill_cached(*inputs, scale=0.2, impl="triton") for _ in range(4)]
    assert not is_recorded(ds.mla_prefill_cached)
    assert all(torch.equal(a, b) for call in calls for a, b in zip(call, calls[0], strict=True))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("sequences", [0, 1, 3])
def test_balance_loss(interpreting_driver, monkeypatch, score, sequences):  # noqa: F811
    lengths = [[3, 8, 20], [1, 0, 2], [5, -3, 60]]
    drawn = [(torch.randn(40, 48), torch.tensor(n[:sequences], dtype=torch.int32)) for n in lengths]

    def call(logits, lengths):
        return (ds.balance_loss(logits, top_k=5, alpha=0.1, sequence_lengths=lengths, score=score, impl="triton"),)

    check_as_written(ds.balance_loss, call, drawn, monkeypatch)


def test_the_parts_of_a_balance_loss_with_its_gradient(interpreting_driver, monkeypatch):  # noqa: F811
    """Forward and backward are recorded each by itself, and the gradient is another call's by other addresses."""
    drawn = [torch.randn(40, 48) for _ in range(3)]
    lengths = torch.tensor([11, 20], dtype=torch.int32)

    def call(logits):
        x = logits.clone().requires_grad_()
        loss = ds.balance_loss(x, top_k=5, alpha=0.1, sequence_lengths=lengths, impl="triton")
        return loss.detach(), torch.autograd.grad(3 * loss, x)[0]

    got = [call(x) for x in drawn + drawn]
    n = len(interpreting_driver.launches)
    assert n > 0
    monkeypatch.setattr(recording, "may_be_recorded", lambda tensors: False)
    forget(monkeypatch)
    for i, results in enumerate(got):
        assert all(torch.equal(a, b) for a, b in zip(results, call(drawn[i % 3]), strict=True))
    assert len(interpreting_driver.launches) == n


@pytest.mark.parametrize("calls_before", [0, 1, 4])
def test_arguments_are_refused_after_recorded_calls_too(interpreting_driver, monkeypatch, calls_before):  # noqa: F811
    monkeypatch.setattr(cached, "is_absorbed", lambda *args: True)
    q, kv_b, store, table, lengths, cu = make_inputs("cpu", [20, 3], [4, 3], 2, 8)
    logits, sequence = torch.randn(7, 8), torch.tensor([7], dtype=torch.int32)
    for _ in range(calls_before):
        ds.mla_prefill_cached(q, kv_b, store, table, lengths, cu, scale=0.1, impl="triton")
        ds.balance_loss(logits, top_k=2, alpha=0.1, sequence_lengths=sequence, impl="triton")
    with pytest.raises(ValueError, match=r"lengths: expected shape \[2\], got \[1\]"):
        ds.mla_prefill_cached(q, kv_b, store, table, lengths[:1], cu, scale=0.1, impl="triton")
    with pytest.raises(TypeError, match="cu_seqlens_q: expected dtype int32, got int64"):
        ds.mla_prefill_cached(q, kv_b, store, table, lengths, cu.long(), scale=0.1, impl="triton")
    with pytest.raises(TypeError, match="scale: expected a float, got str"):
        ds.mla_prefill_cached(q, kv_b, store, table, lengths, cu, scale="1", impl="triton")
    with pytest.raises(ValueError, match="top_k"):
        ds.balance_loss(logits, top_k=9, alpha=0.1, sequence_lengths=sequence, impl="triton")
    with pytest.raises(TypeError, match="sequence_lengths: expected dtype int32, got int64"):
        ds.balance_loss(logits, top_k=2, alpha=0.1, sequence_lengths=sequence.long(), impl="triton")
