"""What a diagnosis finds in rows of figures: recorded ones of real runs, and made ones."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from tests.families import tiny_model
from tests.training.test_loop import tokenizer
from trl.batch import Rollout
from trl.config import PPOConfig, paths, recipe
from trl.rollout import Sampler
from trl.watch import at_start as before_start
from trl.watch import symptoms
from trl.watch.diagnosis import Diagnosis, Finding
from trl.watch.symptoms import SYMPTOMS

RUNS = Path(__file__).parents[1] / "data" / "runs"
HEALTHY = {
    "reward/mean": 1.0,
    "reward/std": 0.5,
    "response/length": 20.0,
    "response/ended": 0.0,
    "objective/kl": 5.0,
    "objective/kl_coef": 0.05,
    "ppo/policy/entropy": 3.5,
    "ppo/policy/approxkl": 0.005,
    "ppo/policy/clipfrac": 0.05,
    "ppo/first_log_ratio": 5e-7,
    "ppo/grad_norm": 1.5,
    "ppo/updates": 4.0,
    "ppo/skipped_updates": 0.0,
    "ppo/val/explained_variance": 0.3,
    "ppo/loss/total": 0.1,
}


def recorded(name):
    return [json.loads(line) for line in (RUNS / f"{name}.jsonl").read_text().splitlines()]


def found(rows, *, config=None, rollouts=None, scores=None, **settings):
    """The findings in rows, by name; a row is HEALTHY where it says nothing else."""
    run = Diagnosis(config or PPOConfig(), **settings)
    findings = []
    for number, row in enumerate(rows):
        more = (rollouts[number], scores[number] if scores else None) if rollouts else ()
        risen = {"reward/mean": 1.0 + 0.1 * min(number, 10)}
        findings += run.look({"step": number + 1} | HEALTHY | risen | row, *more)
    assert len({finding.name for finding in findings}) == len(findings)  # each is said once
    return {finding.name: finding for finding in findings}


def noise(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).tolist()


# --- real runs ----------------------------------------------------------------------------------


def sentiment():
    """The settings that the runs were recorded with, but for what a test changes."""
    return PPOConfig(
        learning_rate=2e-4,
        adaptive_kl=False,
        init_kl_coef=0.052,
        vf_coef=0.5,
        batch_size=128,
        minibatch_size=32,
        ppo_epochs=1,
    )


def test_a_good_run_is_not_complained_about():
    run = Diagnosis(sentiment())
    assert [finding for row in recorded("healthy") for finding in run.look(row)] == []


def test_a_run_with_a_wild_learning_rate_is_explained():
    config = dataclasses.replace(sentiment(), init_kl_coef=0.0, learning_rate=3e-3)
    run = Diagnosis(config)
    findings = [finding for row in recorded("too-fast") for finding in run.look(row)]
    assert {finding.name: finding.step for finding in findings} == {
        "update_too_large": 1,
        "entropy_collapsed": 5,
        "repeated_text": 20,
        "value_not_learning": 30,
    }
    by_name = {finding.name: finding for finding in findings}
    assert "approxkl 34.2" in by_name["update_too_large"].seen
    assert "only 0.1% of the token pairs on the held-out prompts" in by_name["repeated_text"].seen


# --- each finding -------------------------------------------------------------------------------


def constant(**figures):
    return [{name.replace("__", "/"): value for name, value in figures.items()}] * 40


TROUBLE = {
    "negative_kl": [{"objective/kl": -0.5 + 0.2 * x} for x in noise(20)],
    "ratio_not_one": [{"ppo/first_log_ratio": 5e-4}] * 6,
    "constant_score": [{"reward/std": 0.0, "reward/mean": 1.0}] * 4,
    "entropy_collapsed": [{"ppo/policy/entropy": value} for value in (3.5, 0.4, 0.3, 0.2)],
    "value_not_learning": [{"ppo/val/explained_variance": -0.01, "reward/mean": 1.0}] * 31,
    "kl_above_target": [{"objective/kl": 19.0}] * 6,
    "kl_runaway": [{"objective/kl": 4.0 * step} for step in range(12)],
    "updates_without_signal": [
        {"reward/mean": 1.0},
        {"objective/constant_scores": 1.0, "reward/std": 0.0, "reward/mean": 1.0},
        {"reward/mean": 1.0},
    ],
    "updates_skipped": [{"ppo/updates": 0.0, "ppo/skipped_updates": 4.0}] * 3,
    "gradient_clipped": [{"ppo/grad_norm": 60.0}] * 11,
    "reward_falling": [{"reward/mean": 1.0 - 0.1 * step} for step in range(20)],
    "learning_rate_too_small": [
        {"ppo/policy/approxkl": 1e-8, "objective/kl": 0.0, "reward/mean": 1 + 0.1 * x}
        for x in noise(21)
    ],
    "update_too_large": [{"ppo/policy/approxkl": 0.6}],
    "rate_at_bound": [{"ppo/auto_rate/at_bound": -1.0}] * 5,
    "clip_fraction": [{"ppo/policy/clipfrac": 0.45}] * 3,
    "penalty_outweighs_reward": [
        {"objective/kl": 6.0, "objective/kl_coef": 0.2, "reward/std": 0.9, "reward/mean": 1.0}
    ]
    * 6,
    "coefficient_cannot_act": [{"objective/kl": 9.0, "objective/kl_coef": 0.02}] * 21,
    "texts_break": [
        {"objective/kl": 31.0, "reward/mean": 1.0 + step, "reward/std": 0.5} for step in range(9)
    ],
    "nothing_learned": [{"reward/mean": 1.0 + 0.05 * x, "objective/kl": 3.0} for x in noise(41)],
    "never_ends": [{"response/ended": value} for value in (0.8, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0)],
    "length_exploited": [
        {"response/length": 20.0 + step, "reward/mean": 0.05 * step} for step in range(31)
    ],
}
EQUAL = TROUBLE["updates_without_signal"]
TRIED_BELOW = {"repeated_text", "no_group_signal", "not_a_number", "answers_cut"} | {
    *("part_never_varies", "no_tool_called", "conversations_cut"),
}


def test_trouble_of_every_kind_is_tried_out():
    assert set(TROUBLE) | TRIED_BELOW == {each.name for each in SYMPTOMS if not each.at_start}
    assert len({each.name for each in SYMPTOMS}) == len(SYMPTOMS)
    names = {each.name for each in SYMPTOMS}
    assert {name for each in SYMPTOMS for name in each.explained_by} <= names


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_is_found_and_nothing_else(name):
    fixed = PPOConfig(adaptive_kl=name in ("kl_above_target", "coefficient_cannot_act"))
    (finding,) = found(TROUBLE[name], config=fixed).values()
    assert finding.name == name
    assert re.search(r"\d", finding.seen)  # with the numbers
    assert finding.causes
    assert "`" in finding.fix


NO_TROUBLE = {
    "kl_around_0": [{"objective/kl": 0.3 * x} for x in noise(400)],
    "small_kl_of_small_batches": [{"objective/kl": 0.1 + 0.16 * x} for x in noise(400, 1)],
    "no_reference": [{"objective/kl": float("nan")}] * 40,
    "critic_free": [{"ppo/val/explained_variance": float("nan")}] * 40,
    "one_token_off": [
        {"ppo/first_log_ratio": 9e-4 if step % 5 == 0 else 5e-7} for step in range(9)
    ],
    "two_batches_of_zeros": [{"reward/std": 0.0, "reward/mean": 0.0}] * 2 + [{}] * 9,
    "a_low_entropy_from_the_start": [{"ppo/policy/entropy": 0.3}] * 9,
    "values_that_take_a_while": [
        {"ppo/val/explained_variance": x} for x in [-0.3] * 20 + [0.1] * 19
    ],
    "never_expected_to_end": [{"response/ended": 0.0}] * 40,
    "fp16_finds_its_scale": [{"ppo/updates": 0.0, "ppo/skipped_updates": 4.0}] * 2 + [{}] * 9,
    "a_noisy_reward": [{"reward/mean": 1.0 + 0.05 * x} for x in noise(400, 2)],
    "the_end_of_the_schedule": [{"ppo/policy/approxkl": 0.005}] * 9
    + [{"ppo/policy/approxkl": 1e-8}] * 30,
    "longer_without_reward": [
        {"response/length": 20.0 + step, "reward/mean": 1 + 0.1 * x}
        for step, x in enumerate(noise(40))
    ],
    "a_reward_that_is_all_right": [{"reward/mean": 0.1 * step} for step in range(40)],
    "gradients_of_20_times_the_limit": [{"ppo/grad_norm": 20.0}] * 40,
    "a_rate_that_passes_its_bounds": [
        {"ppo/auto_rate/at_bound": bound} for bound in (0.0, 1.0, 1.0, 1.0, 1.0, 0.0, -1.0, 1.0)
    ],
    "rows_of_an_evaluation": [{"held_out/distinct_2": 0.9}, {"held_out/distinct_2": 0.7}] * 9,
}


@pytest.mark.parametrize("name", NO_TROUBLE)
def test_no_false_alarm(name):
    assert found(NO_TROUBLE[name], config=PPOConfig(adaptive_kl=False)) == {}


def test_the_score_of_a_batch_of_one_is_always_constant():
    one = PPOConfig(batch_size=1, minibatch_size=1, max_grad_norm=1.0)
    assert found(TROUBLE["constant_score"], config=one) == {}


def test_long_responses_may_have_a_larger_kl():
    rows = [{"objective/kl": 4.0 * step, "response/length": 200.0} for step in range(12)]
    assert found(rows, config=PPOConfig(adaptive_kl=False)) == {}


def test_what_explains_another_finding_comes_alone():
    rows = [{"reward/mean": 1.0, "reward/std": 0.0, "ppo/val/explained_variance": 0.0}] * 45
    assert set(found(rows)) == {"constant_score"}


@pytest.mark.parametrize("name", ["ppo/loss/total", "ppo/val/error"])
def test_a_figure_that_stops_being_a_number(name):
    rows = [{name: 0.5}, {name: float("nan")}]
    (finding,) = found(rows).values()
    assert finding.name == "not_a_number"
    assert f"`{name}` is not a finite number" in finding.seen


def test_bf16_may_round_and_hides_small_steps():
    rows = [{"ppo/first_log_ratio": 0.02}] * 9
    assert found(rows, precision="bf16") == {}
    assert set(found(rows)) == {"ratio_not_one"}
    small = [{"ppo/policy/approxkl": 1.1e-3, "objective/kl": 0.01}] * 21  # rounding alone
    rows = [row | {"reward/mean": 1 + 0.1 * x} for row, x in zip(small, noise(21), strict=True)]
    assert set(found(rows, precision="bf16")) == {"learning_rate_too_small"}
    assert found(rows, config=PPOConfig(adaptive_kl=False)) == {}


def test_responses_that_must_end():
    rows = [{"response/ended": 0.0}] * 5
    assert set(found(rows, config=PPOConfig(missing_eos_penalty=1.0))) == {"never_ends"}


@pytest.mark.parametrize(
    ("changed", "config"),
    [
        ({}, PPOConfig(algorithm="reinforce++")),  # no critic that could have residues
        ({}, PPOConfig(value_warmup_steps=3)),  # the policy is left alone
        ({}, PPOConfig(batch_size=1, minibatch_size=1)),
        ({"ppo/updates": 0.0}, PPOConfig()),
        ({"objective/constant_scores": 0.0}, PPOConfig()),
    ],
)
def test_equal_scores_that_move_no_policy_are_let_be(changed, config):
    assert found([row | changed for row in EQUAL], config=config) == {}


@pytest.mark.parametrize("name", ["updates_without_signal", "constant_score", "value_not_learning"])
def test_a_reward_that_is_won_by_all_has_been_learnt(name):
    rows, config = TROUBLE[name], PPOConfig(adaptive_kl=False, batch_size=16)
    begun = {"reward/mean": 0.7, "reward/std": 0.4}
    noise = 3 * 0.4 / 16**0.5  # three standard errors of the mean of the first batch
    more = {"reward/mean": 0.7 + 1.01 * noise}
    assert found([begun] + [row | more for row in rows], config=config) == {}
    less = {"reward/mean": 0.7 + 0.99 * noise}
    assert set(found([begun] + [row | less for row in rows], config=config)) == {name}


def test_updates_made_of_equal_scores_are_told_with_their_numbers():
    (finding,) = found(EQUAL).values()
    assert finding.step == 2
    assert "got the same score, 1, and 4 updates" in finding.seen
    assert "(approxkl 0.005)" in finding.seen


# --- texts and scores ---------------------------------------------------------------------------


def rollout(rows, **more):
    one = [torch.tensor([1])] * len(rows)
    made = Rollout.from_lists(one, [torch.tensor(row) for row in rows])
    return dataclasses.replace(made, **more)


def with_parts(*parts, steps=12):
    run, found = Diagnosis(PPOConfig(adaptive_kl=False)), []
    for step in range(steps):
        names = dict(zip(("first", "second", "repetition_penalty"), parts, strict=False))
        parts_now = {name: torch.tensor(of_step(step)) for name, of_step in names.items()}
        row = {"step": step + 1, "reward/mean": 1.0 + 0.1 * step}
        found += run.look(HEALTHY | row, rollout(random_rows(2)), torch.ones(2), parts_now)
    return {finding.name: finding for finding in found}


def test_a_part_of_the_reward_that_never_varies_is_named():
    varies, nothing = (lambda step: [0.5 * step, 1.0]), (lambda step: [0.0, float("nan")])
    finding = with_parts(varies, nothing)["part_never_varies"]
    assert finding.step == 10
    assert "`second` has given 0 to every response of 10 steps" in finding.seen
    for parts in [
        (nothing,),  # alone it is the score, of which another finding tells
        (varies, lambda step: [0.0, 1.0 * (step == 7)]),
        (varies, lambda step: [0.0, 1.0]),  # of the same mean in each batch
        (varies, varies, nothing),  # a penalty
    ]:
        assert "part_never_varies" not in with_parts(*parts)


def in_conversations(figures, config=None, **episode):
    row = {f"stop/{name}": 0.0 for name in ("done", "answered", "turns", "tokens", "tool_calls")}
    row |= {"episode/tool_calls": 0.0} | figures
    rollouts = [rollout(random_rows(2), episodes=({"tools": "f"} | episode,) * 2)] * 4
    config = config or PPOConfig(batch_size=8, minibatch_size=8, adaptive_kl=False)
    return found([row | {"reward/mean": 1.0}] * 4, rollouts=rollouts, config=config)


def test_tools_that_nobody_calls_are_named():
    (finding,) = in_conversations({"stop/answered": 1.0}).values()
    assert (finding.name, finding.step) == ("no_tool_called", 2)
    assert "in the 16 conversations of 2 steps" in finding.seen
    small = PPOConfig(batch_size=2, minibatch_size=2, adaptive_kl=False)
    assert in_conversations({"stop/answered": 1.0}, small) == {}  # eight are too few
    assert in_conversations({"stop/answered": 1.0, "episode/tool_calls": 0.1}) == {}
    game = rollout(random_rows(2), episodes=({"turns": 2},) * 2)
    row = {"stop/done": 1.0, "episode/tool_calls": 0.0}
    assert found([row] * 4, rollouts=[game] * 4, config=PPOConfig(adaptive_kl=False)) == {}


def test_conversations_that_never_end_are_named():
    cut = {"stop/turns": 0.75, "stop/tokens": 0.25, "episode/tool_calls": 3.0}
    (finding,) = in_conversations(cut).values()
    assert (finding.name, finding.step) == ("conversations_cut", 2)
    assert "100% were cut at a limit (turns 75%, tokens 25%)" in finding.seen
    assert in_conversations(cut | {"stop/turns": 0.7, "stop/done": 0.05}) == {}


def random_rows(count=16, length=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 5000, (count, length), generator=generator).tolist()


def test_texts_that_repeat_themselves_are_found_by_their_token_pairs():
    stuck = [[n, *[7] * 19] for n in range(16)]
    rollouts = [rollout(random_rows())] + [rollout(stuck)] * 3
    (finding,) = found([{}] * 4, rollouts=rollouts).values()
    assert finding.name == "repeated_text"
    # the pairs (n, 7), of which (7, 7) is one, among 16 · 19
    assert f"{16 / 304:.1%} of the token pairs" in finding.seen
    assert "100% at the start" in finding.seen


def test_one_response_in_most_of_the_batch_is_found():
    same = [[1, 2, 3, 4, 5, 6, 7]] * 9 + random_rows(7)
    (finding,) = found([{}] * 3, rollouts=[rollout(same)] * 3).values()
    assert finding.name == "repeated_text"
    assert "56% of the responses are the same text" in finding.seen


def test_short_answers_may_be_equal():
    assert found([{}] * 5, rollouts=[rollout([[5, 2]] * 16)] * 5) == {}


def test_json_may_be_the_same_in_all_responses():
    same = rollout([[1, 2, 3, 4, 5, 6, 7, 1, 2, 3]] * 16)
    for text, names in (
        ('{"colour": "red"}', set()),
        ('```json\n[{"a": 1}]\n```', set()),
        ('{"colour": "red', {"repeated_text"}),
        ("17", {"repeated_text"}),
    ):
        written = dataclasses.replace(same, response_texts=(text,) * 9 + ("no",) * 7)
        first = rollout(random_rows(), response_texts=("no",) * 16)
        assert set(found([{}] * 4, rollouts=[first] + [written] * 3)) == names, text


def test_groups_with_equal_scores_teach_nothing_if_they_are_compared():
    groups = rollout(random_rows(8), group_ids=torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    equal = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.5])
    batches = {"rollouts": [groups] * 3, "scores": [equal] * 3}
    rloo, rows = PPOConfig(algorithm="rloo"), [{"reward/mean": 1.0}] * 3
    assert set(found(rows, **batches, config=rloo)) == {"no_group_signal"}
    assert found([{}] * 3, **batches, config=rloo) == {}  # the reward rises: all have learnt it
    assert found(rows, **batches) == {}
    batches["scores"][1] = equal + torch.tensor([0.1] + [0.0] * 7)
    assert found(rows, **batches, config=rloo) == {}


def test_answers_to_chats_are_to_end():
    chats = [{"role": "user", "content": "Hello."}]
    batch = rollout(random_rows(8))
    answers = dataclasses.replace(batch, query_messages=(chats,) * 8)
    cut = [{"response/ended": 0.1, "response/length": 24.0}] * 5
    (finding,) = found(cut, rollouts=[answers] * 5).values()
    assert finding.name == "answers_cut"
    assert (
        "10% end by themselves, over 5 steps: the others are cut off at 24 tokens" in finding.seen
    )
    assert found(cut, rollouts=[batch] * 5) == {}  # texts that are gone on with
    assert found([*cut[:4], {"response/ended": 0.11}], rollouts=[answers] * 5) == {}


def test_length_that_does_not_pay_inside_of_a_batch_is_no_exploit():
    lengths = [torch.arange(1, 2 + n % 8).tolist() for n in range(16)]
    batch = rollout(lengths)
    pays = batch.response_mask.sum(1).float()
    rows = TROUBLE["length_exploited"]
    many = {"rollouts": [batch] * len(rows)}
    assert "length_exploited" in found(rows, **many, scores=[pays] * len(rows))
    assert "length_exploited" not in found(rows, **many, scores=[-pays] * len(rows))


def test_scores_of_all_processes_beside_a_rollout_of_one_are_let_be():
    run = Diagnosis(PPOConfig())
    groups = rollout(random_rows(8), group_ids=torch.arange(8) // 2)
    run.look({"step": 1} | HEALTHY, groups, torch.arange(16.0))
    assert "batch/distinct_2" in run.history.first
    assert not {"batch/score_length", "batch/equal_groups"} & set(run.history.first)


def test_padding_is_no_text():
    run = Diagnosis(PPOConfig())
    run.look({"step": 1}, rollout([[1, 2], [1, 2, 3], [4]]))
    assert run.history.first["batch/distinct_2"] == 2 / 3  # (1, 2) twice and (2, 3)


# --- before the first step ----------------------------------------------------------------------


def at_start(config=None, policy=None, words=None, sampler=None, **settings):
    run = Diagnosis(config or PPOConfig(), **settings)
    findings = run.look_at_start(policy or tiny_model("llama"), words, sampler=sampler)
    assert run.look_at_start(policy or tiny_model("llama"), words, sampler=sampler) == []
    return {finding.name: finding for finding in findings}


def test_padding_with_the_eos_changes_nothing_and_is_not_complained_about():
    plain, with_eos = tokenizer(), tokenizer()
    plain.pad_token, with_eos.pad_token = "<pad>", "</s>"
    policy = tiny_model("llama")
    assert at_start(words=with_eos) == {}
    one, other = (
        Sampler(words, max_new_tokens=30)(policy, ["w3", "w4 w5"] * 8)
        for words in (plain, with_eos)
    )
    assert one.ended.any()
    assert torch.equal(one.response_mask, other.response_mask)
    assert torch.equal(one.responses, other.responses)
    ends = one.responses[one.ended].gather(1, one.response_mask[one.ended].sum(1, keepdim=True) - 1)
    assert (ends == plain.eos_token_id).all()  # the EOS is inside of the mask


def test_a_generation_config_that_cuts_is_named():
    policy = tiny_model("llama")
    assert at_start(policy=policy) == {}
    policy.generation_config = GenerationConfig(top_k=20, top_p=0.8, do_sample=True, min_length=3)
    (finding,) = at_start(policy=policy).values()
    assert finding.name == "generation_config_cuts"
    assert "top_p=0.8, top_k=20, min_length=3" in finding.seen
    assert finding.step == 0


def test_a_sampler_that_cuts_is_named():
    with pytest.warns(UserWarning, match="top_k=5"):
        sampler = Sampler(tokenizer(), top_k=5)
    assert "top_k=5" in at_start(sampler=sampler)["sampler_cuts"].seen


def test_a_penalty_without_an_end_is_named():
    policy = tiny_model("llama")
    policy.generation_config.eos_token_id = None
    config = PPOConfig(missing_eos_penalty=1.0)
    assert set(at_start(config, policy)) == {"no_end"}
    assert at_start(config, policy, words=tokenizer()) == {}
    endless = Sampler(tokenizer(), eos_token_id=None)
    assert set(at_start(config, policy, sampler=endless)) == {"no_end"}
    stops = Sampler(tokenizer(), eos_token_id=None, stop_strings=["w3"])
    assert at_start(config, policy, sampler=stops) == {}


def test_a_controller_that_cannot_move_is_named():
    assert set(at_start(PPOConfig(init_kl_coef=0.0))) == {"kl_coef_stays_0"}
    assert at_start(PPOConfig(init_kl_coef=0.0, adaptive_kl=False)) == {}


# --- findings and state -------------------------------------------------------------------------


def test_a_finding_is_a_line_of_json_and_a_text():
    finding = Finding("a", 3, "seen", ("one", "two"), "fix")
    row = {"name": "a", "step": 3, "seen": "seen", "causes": ["one", "two"], "fix": "fix"}
    assert json.loads(json.dumps(finding.row())) == row
    assert str(finding) == "seen\nUsual causes:\n  1. one\n  2. two\nWhat to do: fix"


@pytest.mark.parametrize("at", [3, 19, 29])
def test_a_resumed_run_finds_the_same(at):
    whole, first = Diagnosis(PPOConfig()), Diagnosis(PPOConfig())
    rows = recorded("too-fast")
    expected = [finding for row in rows for finding in whole.look(row)]
    found_first = [finding for row in rows[:at] for finding in first.look(row)]
    state = json.loads(json.dumps(first.state_dict()))
    second = Diagnosis(PPOConfig())
    second.load_state_dict(state)
    found_second = [finding for row in rows[at:] for finding in second.look(row)]
    assert found_first + found_second == expected
    assert found_second
    assert first.state_dict() == state  # the second run has left it alone


def test_a_state_is_a_copy_and_has_the_best_reward():
    run, rows = Diagnosis(PPOConfig()), [{"reward/mean": 0.2 * step} for step in range(20)]
    for row in rows:
        run.look(HEALTHY | row)
    state = run.state_dict()
    kept = json.loads(json.dumps(state))
    again = Diagnosis(PPOConfig())
    again.load_state_dict(state)
    assert again.history.best_reward == pytest.approx(3.4)
    names = [f.name for _ in range(6) for f in again.look(HEALTHY | {"reward/mean": 1.0})]
    run.look(HEALTHY | {"reward/mean": 1.0})
    assert names == ["reward_falling"]  # from the best, 3.4, though it began at 0
    assert state == kept


def test_every_setting_that_is_named_exists():
    known = {setting.path.replace(".N", "") for setting in paths(recipe.Recipe)}
    sections = {path.split(".")[0] for path in known if "." in path}
    texts = [
        Path(symptoms.__file__),
        Path(before_start.__file__),
        Path(__file__).parents[2] / "docs" / "metrics.md",
    ]
    named = {
        path
        for text in texts
        for path in re.findall(rf"`((?:{'|'.join(sections)})\.[a-z_]+)", text.read_text())
    }
    assert named - known == set()
    assert len(named) > 20
