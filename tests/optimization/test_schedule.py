import math

import pytest

from trl.optimization.schedule import schedule_factor


def factors(**settings):
    return [schedule_factor(step, **settings) for step in range(settings["total_steps"] + 2)]


def test_linear_cosine_and_constant() -> None:
    assert factors(total_steps=4) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert factors(total_steps=4, final=0.5) == [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]
    assert factors(total_steps=3, kind="constant") == [1.0] * 5
    half = math.sqrt(0.5) / 2  # ½·cos π/4
    expected = [1.0, 0.5 + half, 0.5, 0.5 - half, 0.0, 0.0]
    assert factors(total_steps=4, kind="cosine") == pytest.approx(expected)


def test_it_rises_at_first() -> None:
    rising = [0.25, 0.5, 0.75]
    assert factors(total_steps=5, warmup_steps=3) == [*rising, 1.0, 0.5, 0.0, 0.0]
    with pytest.raises(ValueError, match="`total_steps` must be > 3, got 3"):
        schedule_factor(0, total_steps=3, warmup_steps=3)
