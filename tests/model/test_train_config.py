"""How to train: schedules, and fields out of their range."""

import math

import pytest

from dskernels.model.train import TrainConfig


def test_schedules_are_those_of_the_report():
    config = TrainConfig(
        steps=1480, warmup_steps=20, learning_rate=2.2e-4, final_learning_rate=2.2e-5, bias_update_rate=0.001
    )
    assert config.learning_rate_at(0) == pytest.approx(2.2e-4 / 20)
    assert config.learning_rate_at(19) == config.learning_rate_at(999) == 2.2e-4
    assert config.learning_rate_at(1215) == pytest.approx((2.2e-4 + 2.2e-5) / 2)  # half of the cosine, 1000 to 1430
    assert config.learning_rate_at(1430) == config.learning_rate_at(1479) == pytest.approx(2.2e-5)
    assert [config.mtp_lambda_at(step) for step in (0, 999, 1000, 1479)] == [0.3, 0.3, 0.1, 0.1]
    assert [config.bias_update_rate_at(step) for step in (0, 1429, 1430)] == [0.001, 0.001, 0.0]


def test_a_schedule_without_a_cosine_ends_at_its_constant():
    config = TrainConfig(steps=10, warmup_steps=0, decay_from=1.0, settle_from=1.0)
    assert {config.learning_rate_at(step) for step in range(10)} == {config.learning_rate}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_tokens", 1),
        ("microbatches", 0),
        ("microbatches", 3),
        ("sequence_length", 1),
        ("warmup_steps", -1),
        ("decay_from", 0.99),
        ("settle_from", 1.5),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("final_learning_rate", -1e-5),
        ("betas", (0.9, 1.0)),
        ("weight_decay", -0.1),
        ("clip", 0.0),
        ("bias_update_rate", -0.001),
        ("balance_alpha", -1.0),
        ("mtp_lambda", -0.3),
        ("final_mtp_lambda", math.nan),
        ("precision", "fp4"),
        ("ema", 1.0),
        ("ema", -0.1),
        ("validate_every", 0),
        ("validation_batches", 0),
    ],
)
def test_a_field_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        TrainConfig(**{name: value})
