"""A run that is stopped, saved and resumed ends exactly where it would have ended."""

import copy

import numpy as np
import pytest
import torch

from tests.conftest import ragged, tiny_gpt2
from trl.batch import Rollout
from trl.optimization.algorithms import ALGORITHMS
from trl.ppo import PPOTrainer

GROUPS = [0, 0, 1, 1, 0, 1]


def rollout(step):
    """Responses of any lengths, others in each step."""
    two = ragged([3, 5], seed=step)
    responses = ragged([4, 1, 7, 2, 6, 3], seed=100 + step)
    return Rollout.from_lists([two[group] for group in GROUPS], responses, group_ids=GROUPS)


def scores(step):
    return torch.randn(6, generator=torch.Generator().manual_seed(step))


def new_trainer(optimizer=None, **settings):
    defaults = {
        "precision": "fp32",
        "batch_size": 6,
        "minibatch_size": 2,
        "ppo_epochs": 2,
        "learning_rate": 1e-3,
        "adaptive_kl": True,
        "kl_horizon": 20,
        "scale_scores": True,
        "center_scores": True,
    }
    model = tiny_gpt2(0)  # the reference is a copy of it
    made = None if optimizer is None else optimizer(model.parameters())
    return PPOTrainer(model, optimizer=made, **defaults | settings)


def run(trainer, first, last):
    return [trainer.step(rollout(step), scores(step)) for step in range(first, last)]


def snapshot(trainer):
    return copy.deepcopy((trainer.model.state_dict(), trainer.state_dict()))


def assert_same(one, other):
    """Equal to the bit, whatever it is made of."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other, equal_nan=True)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    else:
        assert one == other


def without_time(stats):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in stats]


CASES = [{"algorithm": name} for name in ALGORITHMS if name != "vapo"] + [  # ppo, set otherwise
    {"tf_adam": True},
    {"precision": "bf16"},
    {"value_warmup_steps": 2},  # resumed in the midst of it
    {"optimizer": lambda weights: torch.optim.SGD(weights, lr=1e-3, momentum=0.9)},
]


@pytest.mark.parametrize("settings", CASES, ids=lambda settings: str(*settings.values())[:20])
def test_a_resumed_run_is_the_one_that_was_not_stopped(settings, tmp_path):
    whole, last = new_trainer(**settings), 3 + settings.get("value_warmup_steps", 1) // 2
    run(whole, 0, 1)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    torch.save(whole.model.state_dict(), tmp_path / "weights.pt")
    expected = run(whole, 1, last)

    resumed = new_trainer(**settings)
    resumed.model.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.steps_done == 1
    found = run(resumed, 1, last)
    assert_same(without_time(expected), without_time(found))
    assert_same(whole.model.state_dict(), resumed.model.state_dict())
    assert_same(whole.state_dict(), resumed.state_dict())
    assert found[-1]["objective/kl"] != 0  # the reference is that of the start


def test_a_state_is_a_copy():
    trainer = new_trainer()
    run(trainer, 0, 1)
    state = trainer.state_dict()
    kept = copy.deepcopy(state)
    run(trainer, 1, 2)
    assert_same(state, kept)
    trainer.load_state_dict(state)
    run(trainer, 1, 2)
    assert_same(state, kept)


def test_a_state_holds_nothing_but_plain_values_and_tensors():
    def check(value):
        if isinstance(value, dict):
            for key, inner in value.items():
                assert isinstance(key, str | int)
                check(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                check(inner)
        else:
            assert value is None or isinstance(value, torch.Tensor | int | float | str), value

    trainer = new_trainer()
    run(trainer, 0, 1)
    check(trainer.state_dict())


def test_the_scaler_of_fp16_is_part_of_the_state():
    trainer = new_trainer()
    state = trainer.state_dict()
    assert state["scaler"] is None
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with pytest.raises(ValueError, match="must be of the same precision as the trainer"):
        trainer.load_state_dict(state)
    state = trainer.state_dict()
    with pytest.raises(ValueError, match="`scaler` of `state` must be what"):
        trainer.load_state_dict(with_bad(state, "scaler", "scale", value=float("nan")))
    state["scaler"]["scale"] = 32.0
    trainer.load_state_dict(state)
    assert trainer.accelerator.scaler.get_scale() == 32.0


def with_bad(state, *path, value):
    state = copy.deepcopy(state)
    place = state
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return state


def test_a_state_that_does_not_fit_changes_nothing():
    trainer = new_trainer()
    run(trainer, 0, 1)
    good = trainer.state_dict()
    run(trainer, 1, 2)
    before = snapshot(trainer)
    shapes = copy.deepcopy(good["optimizer"]["shapes"])
    fewer, other = copy.deepcopy(shapes), copy.deepcopy(shapes)
    fewer[0].pop()
    nan, first = float("nan"), ("state", 0)
    other[0][1] = [64, 16]
    cases = [
        (
            {},
            r"be what `state_dict` returned, with \['auto_rate', 'kl_controller', .*got \[\]",
        ),
        (None, "got NoneType"),
        (with_bad(good, "optimizer", "shapes", value=fewer), "of 30 weights in 1 group.*got 29 in"),
        (with_bad(good, "optimizer", "shapes", value=other), "of 30 weights in 1 group.*the same"),
        (with_bad(good, "optimizer", "kind", value="SGD"), "same kind, Adam, got that of SGD"),
        (with_bad(good, "shuffle", value=torch.zeros(3, dtype=torch.uint8)), "`shuffle`"),
        (with_bad(good, "kl_controller", value={}), "`kl_controller`"),
        (with_bad(good, "score_moments", value={"count": 1}), "`score_moments`"),
        (with_bad(good, "steps_done", value="many"), "`steps_done`"),
        (with_bad(good, "steps_done", value=True), "`steps_done`"),
        (with_bad(good, "shuffle", value=None), "`shuffle`"),
        (with_bad(good, "kl_controller", "value", value=nan), "`kl_controller`"),
        (with_bad(good, "kl_controller", "value", value=-0.1), "`kl_controller`"),
        (with_bad(good, "score_moments", "mean", value=nan), "`score_moments`"),
        (with_bad(good, "score_moments", "squares", value=-1.0), "`score_moments`"),
        (with_bad(good, "score_moments", "count", value=-6), "`score_moments`"),
        (with_bad(good, "score_moments", "count", value=2.5), "`score_moments`"),
        (with_bad(good, "value_pretraining", "done", value=nan), "`value_pretraining`"),
        (with_bad(good, "value_pretraining", "explained", value=[nan]), "`value_pretraining`"),
        (with_bad(good, "optimizer", "shapes", value=None), "`optimizer` of `state`"),
        (with_bad(good, "optimizer", "state", value={}), "`optimizer` of `state`"),
        *(
            (with_bad(good, "optimizer", "state", *path, value=value), message)
            for path, value, message in (
                (
                    (*first, "exp_avg"),
                    torch.full((97, 32), nan),
                    r"state\[0\].exp_avg. must be finite real",
                ),
                (
                    (*first, "exp_avg_sq"),
                    torch.full((97, 32), -1.0),
                    "exp_avg_sq. must be >= 0, got -1",
                ),
                (
                    (*first, "exp_avg"),
                    torch.zeros(32, 97),
                    r"have the shape \[97, 32\].*got \[32, 97",
                ),
                ((*first, "exp_avg"), "text", r"have the shape \[97, 32\].*got str"),
                ((*first, "step"), torch.tensor(-1.0), r"state\[0\].step. must be >= 0"),
                (("state", 99), {"step": 1}, "of 30 weights in 1 group"),
                (
                    ("param_groups", 0, "lr"),
                    nan,
                    r"param_groups\[0\].lr. must be as the trainer's, 0.001, got nan",
                ),
                (("param_groups", 0, "lr"), -1.0, "lr. must be as the trainer's, 0.001, got -1"),
                (("param_groups", 0, "params"), [0, 1], "of 30 weights in 1 group"),
                (("param_groups", 0, "params"), [*range(29, -1, -1)], "of 30 weights in 1 group"),
                (
                    ("param_groups", 0, "betas"),
                    (nan, 0.9),
                    r"betas. must be as the trainer's, \(0.9,",
                ),
                (("param_groups", 0, "betas"), (0.9,), r"betas. must be as the trainer's, \(0.9,"),
                (("param_groups", 0, "lr"), None, "lr. must be as the trainer's, 0.001, got None"),
                (("param_groups", 0, "eps"), 1e-300, "eps. must be as the trainer's, 1e-08"),
                (("param_groups", 0, "maximize"), True, "maximize. must be as the trainer's"),
                ((*first, "step"), torch.ones(3), r"step. must have the shape \[\], got \[3\]"),
                ((*first, "step"), None, r"step. must have the shape \[\], got NoneType"),
                ((*first, "exp_avg"), None, "must have the shape .* got NoneType"),
                (
                    (*first, "exp_avg"),
                    torch.zeros(97, 32).to_sparse(),
                    "must be finite real numbers",
                ),
                (
                    (*first, "exp_avg"),
                    torch.zeros(97, 32, device="meta"),
                    "must be finite real numbers",
                ),
                (first, {}, "`optimizer` of `state`"),
                (first, None, "`optimizer` of `state`"),
                (("param_groups", 0), {}, "`optimizer` of `state`"),
            )
        ),
    ]
    for state, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            trainer.load_state_dict(state)
        assert len(str(error.value)) < 500  # not all that the optimiser keeps
        assert_same(before, snapshot(trainer))
    trainer.load_state_dict(good)


def test_the_state_of_another_model_is_refused():
    other = new_trainer()
    other.model.transformer.h[0].requires_grad_(False)
    frozen = PPOTrainer(other.model, precision="fp32", batch_size=6)
    with pytest.raises(ValueError, match="of 30 weights in 1 group.*got 18 in 1"):
        other.load_state_dict(frozen.state_dict())


def test_a_failed_step_does_not_count():
    trainer = new_trainer()
    with pytest.raises(ValueError, match="finite"):
        trainer.step(rollout(0), [float("nan")] * 6)
    assert trainer.steps_done == 0
    run(trainer, 0, 2)
    assert trainer.steps_done == 2
