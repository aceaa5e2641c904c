"""Bad input: an error that names parameter, rule, value and fix, before anything changes."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import VOCABULARY, ragged, tiny_gpt2
from trl.batch import Rollout
from trl.gpt2 import GPT2HeadWithValueModel
from trl.ppo import PPOTrainer

GOOD = (ragged([3, 4]), ragged([2, 3], seed=1), torch.tensor([1.0, -1.0]))


@pytest.fixture
def ppo():
    return PPOTrainer(tiny_gpt2(0), tiny_gpt2(1), precision="fp32", batch_size=2)


def snapshot(ppo):
    return (
        copy.deepcopy(ppo.model.state_dict()),
        copy.deepcopy(ppo.optimizer.state_dict()),
        ppo.kl_ctl.value,
        ppo.score_moments.count,
        ppo.shuffle.get_state(),
    )


def unchanged(one, other):
    return (
        all(torch.equal(one[0][key], other[0][key]) for key in one[0])
        and str(one[1]) == str(other[1])
        and one[2:4] == other[2:4]
        and torch.equal(one[4], other[4])
    )


def with_part(position, value):
    parts = list(GOOD)
    parts[position] = value
    return parts


CASES = {
    "more queries than responses": (
        with_part(0, ragged([3, 4, 5])),
        ValueError,
        r"same number of rows, got 3 and 2: pass one response for each query",
    ),
    "fewer scores": (
        with_part(2, torch.tensor([1.0])),
        ValueError,
        r"`scores` must be real numbers of the shape \[2\], .*, got torch.float32 \[1\]",
    ),
    "more scores": (with_part(2, [1.0, 2.0, 3.0]), ValueError, "2 responses, got a list of 3"),
    "empty response": (
        with_part(1, [torch.tensor([], dtype=torch.long), torch.tensor([1])]),
        ValueError,
        r"`response\[0\]` must have at least one token, got none: leave the row out",
    ),
    "empty query": (
        with_part(0, [torch.tensor([1]), torch.tensor([], dtype=torch.long)]),
        ValueError,
        r"`query\[1\]` must have at least one token",
    ),
    "no rows": (with_part(0, []), ValueError, "`query` must have at least one row"),
    "nan score": (
        with_part(2, torch.tensor([1.0, float("nan")])),
        ValueError,
        "`scores` must be finite numbers, got nan for 1 of 2 responses, in row 1",
    ),
    "infinite score": (
        with_part(2, [float("-inf"), 1.0]),
        ValueError,
        "must be finite numbers, got -inf for 1 of 2 responses, in row 0",
    ),
    "2-D scores": (
        with_part(2, torch.ones(2, 1)),
        ValueError,
        r"`scores` must be real numbers of the shape \[2\].*\[2, 1\]: use scores.squeeze",
    ),
    "scores that are text": (
        with_part(2, ["good", "bad"]),
        ValueError,
        "`scores` must be one number .*, got 'good'",
    ),
    "no response": ((GOOD[0],), TypeError, "`query` and `response` must be tensors"),
    "no scores": (GOOD[:2], TypeError, "`scores` must be given"),
    "token beyond the vocabulary": (
        with_part(1, [torch.tensor([1]), torch.tensor([2, VOCABULARY])]),
        ValueError,
        r"`response\[1\]` must hold token ids from 0 to 96, got 2 to 97: encode with",
    ),
    "negative token": (
        with_part(0, [torch.tensor([-1]), torch.tensor([2])]),
        ValueError,
        r"`query\[0\]` must hold token ids from 0 to 96, got -1 to",
    ),
    "too long": (
        with_part(0, ragged([3, 62])),
        ValueError,
        "must fit the model's 64 positions, got 62 . 3 tokens in row 1 of `query`: shorten",
    ),
    "float tokens": (
        with_part(0, [torch.tensor([1.0]), torch.tensor([2.0])]),
        TypeError,
        r"`query\[0\]` must hold token ids of an integer dtype, got torch.float32: convert",
    ),
    "tokens that are lists": (
        with_part(1, [[1, 2], [3]]),
        TypeError,
        r"`response\[0\]` must be a 1-D tensor of token ids, got list: wrap it",
    ),
    "2-D rows": (
        with_part(1, [torch.ones(1, 2).long(), torch.ones(1, 2).long()]),
        ValueError,
        r"`response\[0\]` must be 1-D, got shape \[1, 2\]",
    ),
    "1-D tensor instead of a batch": (
        with_part(0, torch.tensor([1, 2])),
        ValueError,
        r"`query` must be a tensor \[batch, length\] or a list.*unsqueeze",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_step_refuses(ppo, case):
    arguments, error, message = CASES[case]
    before = snapshot(ppo)
    with pytest.raises(error, match=message):
        ppo.step(*arguments)
    assert unchanged(before, snapshot(ppo))
    ppo.step(*GOOD)  # and goes on working
    assert not unchanged(before, snapshot(ppo))


ROLLOUT = Rollout.from_lists(*GOOD[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_mask": ROLLOUT.response_mask.long()}, "`response_mask` must be bool"),
        ({"query_mask": ROLLOUT.query_mask[:, :2]}, "`query_mask` must be bool and of the shape"),
        (
            {"response_mask": torch.tensor([[True, True, False], [False] * 3])},
            "`response_mask` must count a token in every row, got none in row 1",
        ),
        (
            {"query_mask": torch.tensor([[True, True, True, False], [True] * 4])},
            "`query_mask` must have its padding on the left, got padding after a token in row 0",
        ),
        (
            {"responses": ROLLOUT.responses.float()},
            r"`responses` must be integers \[batch, length\]",
        ),
    ],
)
def test_a_rollout_made_by_hand_is_checked(ppo, change, message):
    before = snapshot(ppo)
    with pytest.raises(ValueError, match=message):
        ppo.step(replace(ROLLOUT, **change), GOOD[2])
    assert unchanged(before, snapshot(ppo))


@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_a_model_that_gives_no_numbers_is_named(ppo, name):
    getattr(ppo, name).transformer.ln_f.weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match=f"`{name}` must give finite log-probs, got nan"):
        ppo.step(*GOOD)


@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_a_model_on_another_device(ppo, name):
    getattr(ppo, name).to("meta")
    with pytest.raises(
        ValueError, match=rf"`{name}` must be on cpu.*on meta: call {name}.to\('cpu'\)"
    ):
        ppo.step(*GOOD)


def test_a_nan_loss_stops_with_the_last_good_weights(ppo):
    ppo.step(*GOOD)
    before = snapshot(ppo)
    hook = ppo.model.v_head.register_forward_hook(
        lambda _module, _inputs, output: output * float("nan") if output.requires_grad else output
    )
    with pytest.raises(FloatingPointError, match=r"the loss is nan.*the last good weights"):
        ppo.step(*GOOD)
    hook.remove()
    assert all(torch.equal(before[0][key], ppo.model.state_dict()[key]) for key in before[0])
    assert str(before[1]) == str(ppo.optimizer.state_dict())
    assert before[2] == ppo.kl_ctl.value
    assert all(weight.grad is None for weight in ppo.model.parameters())
    ppo.step(*GOOD)


def test_a_nan_in_the_middle_keeps_the_updates_before_it(ppo):
    calls = []

    def poison(_module, _inputs, output):
        calls.append(1)
        return output * float("nan") if len(calls) > 6 else output

    ppo.model.v_head.register_forward_hook(poison)
    start = copy.deepcopy(ppo.model.state_dict())
    with pytest.raises(FloatingPointError):
        ppo.step(*GOOD)
    assert all(torch.isfinite(weight).all() for weight in ppo.model.parameters())
    assert any(not torch.equal(start[key], ppo.model.state_dict()[key]) for key in start)


def recorded(ppo):
    old = ppo.before_update(ROLLOUT)
    return replace(ROLLOUT, behaviour_logprobs=old.logprobs, values=old.values)


def test_recorded_values_of_another_policy_are_refused(ppo):
    rollout, before = recorded(ppo), snapshot(ppo)
    off = replace(rollout, values=rollout.values + 1e6)
    with pytest.raises(RuntimeError, match="before the first update the values differ by"):
        ppo.step(off, GOOD[2])
    assert unchanged(before, snapshot(ppo))
    ppo.step(rollout, GOOD[2])


def test_what_was_recorded_with_a_graph_is_trained_as_without(ppo):
    """The gradient went back through both sides of the ratio, and was 0."""
    plain, found = recorded(ppo), []
    other = PPOTrainer(tiny_gpt2(0), tiny_gpt2(1), precision="fp32", batch_size=2)
    graph = 0 * other.model(plain.input_ids)[0].sum()  # of the weights that are trained
    attached = {name: getattr(plain, name) + graph for name in ("behaviour_logprobs", "values")}
    for trainer, rollout in ((ppo, plain), (other, replace(plain, **attached))):
        trainer.step(rollout, GOOD[2])
        found.append(trainer.model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("epochs", [1, 4])
def test_weights_that_an_update_has_lost_are_not_called_good(epochs):
    model = tiny_gpt2(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e38)
    settings = {"precision": "fp32", "batch_size": 2, "ppo_epochs": epochs, "minibatch_size": 2}
    ppo = PPOTrainer(model, tiny_gpt2(1), optimizer=optimizer, **settings)
    ppo.config = replace(ppo.config, max_grad_norm=None)
    with pytest.raises(
        FloatingPointError, match="update has made weights that are NaN or infinite"
    ):
        ppo.step(*GOOD[:2], [1e4, -1e4])


def test_models_that_cannot_be_trained():
    config = tiny_gpt2().config
    with pytest.raises(TypeError, match="`model` must have a value head"):
        PPOTrainer(GPT2LMHeadModel(config))
    with pytest.raises(TypeError, match=r"`model` must be a causal language model.*got str"):
        PPOTrainer("gpt2")
    with pytest.raises(ValueError, match=r"`model` must be trained in float32, got.*bfloat16"):
        PPOTrainer(tiny_gpt2().bfloat16())
    with torch.device("meta"):
        empty = GPT2HeadWithValueModel(config)
    with pytest.raises(ValueError, match=r"`model` must hold weights, got.*meta device"):
        PPOTrainer(empty)
    model = tiny_gpt2()
    with pytest.raises(ValueError, match="`ref_model` must have weights of its own"):
        PPOTrainer(model, model)
    smaller = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match="same vocabulary, got 97 and 50"):
        PPOTrainer(tiny_gpt2(), smaller)
    frozen = tiny_gpt2()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="must have weights to train"):
        PPOTrainer(frozen, tiny_gpt2(1))


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0},
        {"forward_batch_size": -1},
        {"cliprange": -0.2},
        {"cliprange_value": 0},
        {"init_kl_coef": -0.1},
        {"vf_coef": -1},
        {"lr": 0},
        {"ppo_epochs": 0},
    ],
)
def test_bad_settings_are_refused_by_the_trainer(settings):
    with pytest.raises(ValueError, match="must be"):
        PPOTrainer(tiny_gpt2(), tiny_gpt2(1), **settings)


def test_fp16_on_a_cpu():
    with pytest.raises(ValueError, match="`precision` must be 'fp32', 'bf16' or 'auto' on a CPU"):
        PPOTrainer(tiny_gpt2(), tiny_gpt2(1), precision="fp16", batch_size=2)
