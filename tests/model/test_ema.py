"""The average of the weights against its formula in fp64."""

from types import SimpleNamespace

import pytest
import torch

from dskernels.model.ema import EMA_EVERY, Ema


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_it_is_the_formulas(decay):
    """Of the masters as they were every ten steps, whatever they are when it is looked at; little of the first ones."""
    torch.manual_seed(0)
    optimizer = SimpleNamespace(flat=torch.randn(50))
    ema, wanted = Ema(optimizer, decay), optimizer.flat.double()
    for step in range(12 * EMA_EVERY):
        optimizer.flat += 0.1 * torch.randn(50)
        if (step + 1) % EMA_EVERY == 0:
            n = (step + 1) // EMA_EVERY - 1
            d = min(decay**EMA_EVERY, (n + 1) / (n + 10))
            wanted = d * wanted + (1 - d) * optimizer.flat.double()
        ema.start(step)
    optimizer.flat += 7.0
    ema.finish()
    torch.testing.assert_close(ema.average.double(), wanted, rtol=1e-5, atol=1e-5)
    before = ema.average.clone()
    ema.finish()  # nothing is asked for
    assert torch.equal(ema.average, before)
