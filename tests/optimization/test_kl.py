import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import properties
from trl.optimization.kl import (
    AdaptiveKLController,
    FixedKLController,
    update_by_episodes,
)


@pytest.mark.parametrize(
    ("current", "error"),
    [
        (12, 0.2),  # 12 / 8 − 1 = 0.5, clipped
        (8.8, 0.1),
        (8, 0.0),
        (7.2, -0.1),
        (4, -0.2),  # −0.5, clipped
        (-3, -0.2),  # an estimate may be negative
    ],
)
def test_the_error_is_clipped(current: float, error: float) -> None:
    by_episodes = update_by_episodes(0.5, current, 8, n_steps=10, horizon=100)
    assert by_episodes == pytest.approx(0.5 * (1 + error / 10), abs=1e-12)


@pytest.mark.parametrize(
    ("current", "expected"),
    [
        (12, 0.204),  # 0.2·(1 + 0.2·1000/10000)
        (8.8, 0.202),  # 0.2·(1 + 0.1·0.1)
        (8, 0.2),
        (4, 0.196),  # 0.2·(1 − 0.2·0.1)
    ],
)
def test_adaptive_controller(current: float, expected: float) -> None:
    controller = AdaptiveKLController(init_kl_coef=0.2, target=8, horizon=10000)
    assert controller.value == 0.2
    controller.update(current, n_steps=1000)
    assert controller.value == pytest.approx(expected, rel=1e-9)


def test_fixed_controller_stays() -> None:
    controller = FixedKLController(0.15)
    controller.update(100.0, n_steps=256)
    assert controller.value == 0.15


def test_controllers_resume() -> None:
    for first, second in (
        (AdaptiveKLController(0.2, 6, 100), AdaptiveKLController(0.9, 6, 100)),
        (FixedKLController(0.2), FixedKLController(0.9)),
    ):
        first.update(10, 10)
        second.load_state_dict(first.state_dict())
        assert second.value == first.value


@properties
@given(
    st.lists(st.tuples(st.floats(-10, 50), st.integers(1, 500)), min_size=1, max_size=10),
    st.floats(0.01, 2),
    st.floats(0.5, 20),
)
def test_controller_agrees_with_a_plain_loop(
    batches: list[tuple[float, int]], init: float, target: float
) -> None:
    controller = AdaptiveKLController(init, target, horizon=1000)
    coefficient = init
    for current, n_steps in batches:
        before = controller.value
        controller.update(current, n_steps)
        missed = (current - target) / target
        if missed > 0.2:
            missed = 0.2
        elif missed < -0.2:
            missed = -0.2
        coefficient = coefficient + coefficient * missed * n_steps / 1000
        assert controller.value == pytest.approx(coefficient, rel=1e-9)
        assert controller.value > 0
        if abs(current - target) > 1e-3:
            assert (controller.value > before) == (current > target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_kl_coef": -0.1}, "`init_kl_coef` must be >= 0 and finite, got -0.1"),
        ({"init_kl_coef": math.nan}, "`init_kl_coef` must be >= 0 and finite, got nan"),
        ({"target": 0}, "`target` must be > 0 and finite, got 0"),
        ({"horizon": -5}, "`horizon` must be > 0 and finite, got -5"),
    ],
)
def test_adaptive_controller_checks_its_settings(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveKLController(**({"init_kl_coef": 0.2, "target": 6, "horizon": 100} | arguments))


def test_fixed_controller_checks_its_coefficient() -> None:
    assert FixedKLController(0).value == 0
    with pytest.raises(ValueError, match="`kl_coef` must be >= 0 and finite, got -1"):
        FixedKLController(-1)


def test_update_checks_its_arguments() -> None:
    controller = AdaptiveKLController(0.2, 6, horizon=100)
    with pytest.raises(ValueError, match="`current` must be a finite KL, got nan"):
        controller.update(math.nan, 10)
    with pytest.raises(ValueError, match="`n_steps` must be > 0"):
        controller.update(6.0, 0)
    with pytest.raises(ValueError, match="negative, got 500 with a horizon of 100"):
        controller.update(0.0, 500)
    assert controller.value == 0.2


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_coefficient_that_is_none_is_not_loaded(value: float) -> None:
    for controller in (FixedKLController(0.2), AdaptiveKLController(0.2, 6, 10_000)):
        with pytest.raises(ValueError, match="`value` must be >= 0 and finite"):
            controller.load_state_dict({"value": value})
        assert controller.value == 0.2
