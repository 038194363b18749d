"""Random numbers that are a function of their place, and the tokens that are made of them."""

import pytest
import torch
from tiny import SMALL, random_prompts, tiny_model

from dskernels.model import Sampling, generate
from dskernels.model.chance import streams, uniform

CPU = torch.device("cpu")


def test_uniform_numbers_are_uniform():
    """A million: each of 256 bins, and mean and spread, within five standard deviations."""
    u = uniform(streams(1, None, 1000, CPU), torch.arange(1000).expand(1000, -1), 0)
    assert u.dtype == torch.float32
    assert 0 <= u.min() < 1e-5
    assert 1 - 1e-5 < u.max() < 1
    bins = (u * 256).long().flatten().bincount(minlength=256).double()
    expected = 1e6 / 256
    assert ((bins - expected).abs() < 5 * expected**0.5).all()
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / 1e6) ** 0.5


def test_uniform_numbers_are_independent():
    """Of neighbours in every direction: the next prompt, seed, token, purpose. A correlation of 1e5 is 0 +- 0.0032."""
    place = torch.arange(1000).expand(100, -1)
    stream = streams(7, None, 101, CPU)
    u = uniform(stream[:100], place, 0)
    for other in (
        uniform(stream[1:], place, 0),
        uniform(streams(8, None, 100, CPU), place, 0),
        uniform(stream[:100], place + 1, 0),
        uniform(stream[:100], place, 1),
        uniform(stream[:100], place, 2),
    ):
        assert not torch.equal(u, other)
        assert torch.corrcoef(torch.stack((u.flatten(), other.flatten())))[0, 1].abs() < 5 * 0.0032
    # A stream of row b belongs to row b.
    assert torch.equal(uniform(stream[3:4], place[:1], 0), u[3:4])
    assert torch.equal(uniform(stream[:5], torch.arange(5), 2), uniform(stream[:5], torch.arange(5)[:, None], 2)[:, 0])


def test_seeds():
    assert streams(5, None, 3, CPU).unique().numel() == 3
    assert torch.equal(streams(5, None, 3, CPU)[:1], streams([5], None, 1, CPU))
    assert torch.equal(streams(range(3), None, 3, CPU)[1:], streams([1, 2], None, 2, CPU))
    assert torch.equal(streams(-1, None, 1, CPU), streams(2**64 - 1, None, 1, CPU))
    torch.manual_seed(0)
    first = streams(None, None, 4, CPU)
    assert not torch.equal(first, streams(None, None, 4, CPU))
    torch.manual_seed(0)
    assert torch.equal(first, streams(None, None, 4, CPU))
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(first, streams(None, generator, 4, CPU))
    with pytest.raises(ValueError, match="seed: expected None beside a generator"):
        streams(1, generator, 4, CPU)
    with pytest.raises(ValueError, match="seed: expected one or 4, one for each prompt, got 2"):
        streams([1, 2], None, 4, CPU)


def test_a_seed_decides_the_texts():
    model = tiny_model(**SMALL)
    prompts = random_prompts(4, 9, vocab_size=64)
    for options in ({}, {"drafts": 2}):

        def texts(seed, options=options):
            return generate(model, prompts, temperature=1.0, max_new_tokens=12, seed=seed, **options).finish()

        assert texts(1) == texts(1) != texts(2)
    same = generate(model, [prompts[0]] * 4, temperature=1.0, max_new_tokens=12, seed=1).finish()
    assert len(set(map(tuple, same))) == 4  # equal prompts get texts of their own


def test_min_p():
    """At least so likely as a part of the most likely: softmax is .64 .24 .09 .03."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    for min_p, kept in ((0.0, 4), (0.04, 4), (0.06, 3), (0.2, 2), (0.3, 2), (0.4, 1), (1.0, 1)):
        p = Sampling(temperature=1.0, min_p=min_p).probabilities(logits)
        assert (p > 0).sum() == kept
        torch.testing.assert_close(p[0, :kept], logits[0, :kept].softmax(-1))
    # It is a part of the most likely one, whatever else is left out, and of what temperature makes of it.
    assert (Sampling(temperature=1.0, top_p=0.7, min_p=0.2).probabilities(logits) > 0).sum() == 2
    assert (Sampling(temperature=1.0, top_k=3, min_p=0.01).probabilities(logits) > 0).sum() == 3
    assert (Sampling(temperature=3.0, min_p=0.3).probabilities(logits) > 0).sum() == 4


def test_draw():
    """The ends of every interval; weights need not sum to 1; what weighs nothing is never drawn."""
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0])
    u = torch.tensor([0.0, 0.249, 0.25, 0.749, 0.75, 1 - 2**-24])
    assert Sampling(1.0).draw(weights.expand(6, -1), u).tolist() == [1, 1, 3, 3, 4, 4]
    # Sums of 100,000 weights are rounded; still none of the half that weighs nothing.
    weights = torch.rand(100_000)
    weights[::2] = 0
    u = torch.linspace(0, 1 - 2**-24, 500)
    token = Sampling(1.0).draw(weights.expand(500, -1), u)
    assert (token % 2 == 1).all()
    exact = torch.searchsorted(weights.double().cumsum(0), u.double() * weights.double().sum(), right=True)
    assert (token - exact).abs().max() < 20


def test_draw_has_the_distribution():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3])
    n = 200_000
    u = uniform(streams(3, None, n, CPU), torch.full((n,), 5), 1)
    counts = Sampling(1.0).draw(p.expand(n, -1), u).bincount(minlength=4)
    assert counts[1] == 0
    assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt()).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": -0.1}, "min_p: expected 0 to 1"),
        ({"min_p": 1.1}, "min_p: expected 0 to 1"),
        ({"temperature": float("inf")}, "temperature: expected 0 or more, got inf"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more, got nan"),
        ({"top_p": float("nan")}, "top_p: expected more than 0"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
