"""The rate follows the distance: exactly where the two are proportional, bounded elsewhere."""

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl.optimization.auto_rate import (
    FIRST,
    GROW,
    KEEP,
    LEAST_WAY,
    ROUNDING,
    SHRINK,
    TOO_FAR,
    AutoRate,
)


def made(target=0.01, initial=3e-5, lowest=1e-8, highest=1e-2):
    return AutoRate(target, initial, lowest, highest)


def step(rate, moves, updates=4, floor=0.0, factor=1.0):
    """A step in which every update moves √approxkl by `moves` times the rate; returns the rates."""
    rate.begin(updates, factor)
    distance, used = 0.0, list[float]()
    for _ in range(updates):
        rate.measured(floor + distance**2)
        if rate.too_far:
            break
        used.append(rate.rate)
        distance += moves * rate.rate
        rate.applied()
    return used, distance


def test_worked_by_hand():
    rate = made(target=0.04, initial=1e-3)  # a way of 0.2
    rate.begin(4)
    rate.measured(1e-6)  # rounding, before the first update
    assert rate.rate == pytest.approx(1e-5)
    rate.applied()
    rate.measured(1e-6 + 0.02**2)  # 1e-5 has moved by 0.02: c = 2000
    # 0.18 are left for three updates, 0.06 each: 3e-5, just what is allowed
    assert rate.rate == pytest.approx(3e-5)
    rate.applied()
    rate.measured(1e-6 + 0.09**2)  # 4e-5 have moved by 0.09
    c = math.sqrt((KEEP * 0.02**2 + 0.09**2) / (KEEP * 1e-5**2 + 4e-5**2))
    assert rate.rate == pytest.approx(0.11 / 2 / c)


@given(
    moves=st.floats(1e-1, 1e6),
    initial=st.floats(1e-6, 1e-2),
    updates=st.integers(2, 16),
    floor=st.sampled_from([0.0, 1e-4]),
)
@settings(max_examples=60, deadline=None)
def test_steps_come_to_end_at_the_target_wherever_they_begin(moves, initial, updates, floor):
    rate = AutoRate(0.01, initial, 0.0, math.inf)
    for _ in range(20):
        used, distance = step(rate, moves, updates, floor)
    assert len(used) == updates
    assert distance == pytest.approx(0.1, rel=0.02)


def test_the_first_update_is_small_and_none_grows_by_more_than_allowed():
    rate = made(initial=1e-3)
    used, _ = step(rate, moves=1.0, updates=8)
    assert used[0] == pytest.approx(FIRST * 1e-3)
    assert all(b / a <= GROW * (1 + 1e-9) for a, b in itertools.pairwise(used))
    assert used[-1] == pytest.approx(min(1e-2, used[0] * GROW**7))


def test_a_policy_that_does_not_move_makes_it_grow_to_its_bound():
    rate = made()
    for _ in range(10):
        step(rate, moves=0.0)
    assert rate.rate == 1e-2
    assert rate.stats()["ppo/auto_rate/at_bound"] == 1.0


def test_the_lowest_rate_holds_and_is_told():
    rate = made(lowest=1e-7)
    for _ in range(10):
        used, _ = step(rate, moves=1e9)
    assert used == [1e-7]  # and each step ends once it went too far
    assert rate.stats()["ppo/auto_rate/at_bound"] == -1.0


def test_too_far_is_twice_the_way():
    rate = made()
    rate.begin(4)
    rate.measured(0.0)
    rate.applied()
    rate.measured((TOO_FAR * 0.1 * 0.999) ** 2)
    assert not rate.too_far
    rate.applied()
    rate.measured((TOO_FAR * 0.1 * 1.001) ** 2)
    assert rate.too_far


def test_beyond_the_way_updates_go_on_in_small():
    rate = made()
    for _ in range(10):
        step(rate, moves=1e4)
    before = rate.rate
    rate.begin(4)
    rate.measured(0.0)
    rate.applied()
    rate.measured(0.15**2)
    assert rate.rate == pytest.approx(max(before / SHRINK, LEAST_WAY * 0.1 / 4 / 1.5e4), rel=0.1)


def test_rounding_in_low_precision_is_no_movement():
    rate = AutoRate(0.01, 3e-5, 1e-9, 1e-2, low_precision=True)
    noise = itertools.cycle([3e-4, 3.3e-4, 2.8e-4, 3.1e-4])
    for _ in range(30):
        rate.begin(4)
        distance = 0.0
        for update in range(4):
            rate.measured(distance**2 + next(noise) if update else 1e-12)
            distance += 1e3 * rate.rate
            rate.applied()
    assert distance == pytest.approx(0.1, rel=0.1)
    rate.begin(4, factor=0.05)  # a way of which the square is a tenth of the noise
    for approxkl in (1e-12, 3e-4, 3.3e-4, 2.8e-4):
        before = rate.rate
        rate.measured(approxkl)
        rate.applied()
    assert not rate.too_far
    assert rate.rate > 1e-7
    assert before > 1e-7


def test_rounding_is_where_the_line_meets_no_rate():
    rate = AutoRate(0.01, 1e-4, 1e-9, 1e-2, low_precision=True)
    rate.begin(4)
    assert rate.measured(0.0) == pytest.approx(1e-6)
    rate.applied()
    # s = 1e-6: one point, all is movement; c = sqrt(.0012) / 1e-6
    assert rate.measured(0.0012) == pytest.approx((0.1 - 0.0012**0.5) / 3 / 0.0012**0.5 * 1e-6)
    rate.rate = 1e-6
    rate.applied()
    # s = 2e-6: the line through both is .001 + 2e8 s²; (.0008 + .0012/2) / (4.5e-12) = c²
    c = math.sqrt((0.0008 + KEEP * 0.0012) / (4e-12 + KEEP * 1e-12))
    assert rate.measured(0.0018) == pytest.approx((0.1 - 0.0008**0.5) / 2 / c)


def test_no_more_than_a_share_of_the_target_is_rounding():
    rate = AutoRate(0.01, 1e-4, 1e-9, 1e-2, low_precision=True)
    rate.begin(4)
    for approxkl in (0.0, 0.0064, 0.0064):  # the line is level
        rate.measured(approxkl)
        rate.rate = 1e-6
        rate.applied()
    moved = 0.0064 - ROUNDING * 0.01
    c = math.sqrt((moved + KEEP * 0.0064) / (4e-12 + KEEP * 1e-12))
    rate.rate = 1e-6
    rate.begin(4)
    assert rate.measured(0.0) == pytest.approx(0.1 / 4 / c)
    other = AutoRate(0.01, 1e-2, 1e-9, 1e-2, low_precision=True)
    other.begin(4)
    other.measured(0.0)
    other.applied()
    other.measured(0.09)
    assert other.too_far
    assert other.rate == pytest.approx(1e-4 / SHRINK)


@pytest.mark.parametrize("updates", [4, 16])
@pytest.mark.parametrize("noise", [3e-4, 1e-3, 2e-3])
@pytest.mark.parametrize("jump", [0.0, 0.15], ids=["", "jump"])
def test_steps_come_to_the_target_under_rounding_that_varies(noise, updates, jump):
    """As bf16 does where few tokens are written; `jump` is a first update that moves far, once."""
    rng = random.Random(updates)
    rate, ways = AutoRate(0.01, 3e-5, 1e-8, 1e-2, low_precision=True), list[float]()
    for step_ in range(60):
        rate.begin(updates)
        distance, moves = 0.0, 2e4 * math.exp(rng.gauss(0, 0.3))
        for update in range(updates):
            rounding = noise * math.exp(rng.gauss(0, 0.5)) if update else 0.0
            rate.measured(distance**2 + rounding + (jump if update and not step_ else 0.0))
            if rate.too_far:
                break
            distance += moves * rate.rate
            rate.applied()
        ways.append(distance**2)
    assert statistics.mean(ways[20:]) == pytest.approx(0.01, rel=0.15)
    assert max(ways[1:]) < 0.05


def test_a_schedule_scales_the_way():
    rate = made()
    for _ in range(20):
        _, distance = step(rate, moves=1e3, factor=0.5)
    assert distance == pytest.approx(0.05, rel=0.02)


def test_a_skipped_update_says_nothing():
    rate = made()
    rate.begin(4)
    rate.measured(0.0)
    before = rate.rate
    rate.measured(0.0)  # the update before was not applied
    assert rate.rate == before


def test_it_goes_on_from_its_state():
    one, other = made(), made(initial=1e-4)
    for _ in range(3):
        step(one, 1e3)
    other.load_state_dict(one.state_dict())
    assert [step(one, 1e3) for _ in range(3)] == [step(other, 1e3) for _ in range(3)]
