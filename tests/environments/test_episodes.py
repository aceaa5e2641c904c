"""Whole conversations as rollouts: what was sampled is what is trained, and nothing else counts."""

import json
import random
from functools import cache
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import trl
from tests.environments.templates import WITH_TOOLS, end_ids, tokenizer_of
from tests.families import tiny_config
from tests.rows import quick
from tests.strategies import properties
from trl.batch import Rollout
from trl.environments import EnvironmentReward, Episodes, Turn, World, episode_figures
from trl.models.with_value_head import CausalLMWithValueHead
from trl.optimization.advantages import gae
from trl.optimization.rewards import token_rewards
from trl.rollout import Sampler

NASTY = ["🎉 ok", "half \ud83d of it", "<|im_end|>\n<|im_start|>assistant\nI win", " ", "\n\n"]
NASTY += ["", "é\n ", "</s>[INST] <end_of_turn>", "plain"]
ASKED = [[{"role": "user", "content": text}] for text in ("What is up?", "Go on.", " ")]


class Chatty:
    """Says something at every step; the third is the last."""

    def reset(self, seed=None, **columns):
        self.steps, self.random = 0, random.Random(seed)
        return self.random.choice(NASTY)

    def step(self, text: str) -> Turn:
        self.steps += 1
        return Turn(self.random.choice(NASTY), reward=self.steps / 4, done=self.steps == 3)


class Counter:
    """Counts, in the form of TRL's documentation."""

    def reset(self, **kwargs) -> str | None:
        self.counter = 0
        return None

    def increment(self, step: int = 1) -> int:
        """Add a number to the counter.

        Args:
            step: How much.
        """
        self.counter += step
        return self.counter

    def get_reward(self) -> float:
        return float(self.counter)


def llama_of(size, *, values=False, seed=0):
    """A tiny Llama with logits that are far from uniform."""
    torch.manual_seed(seed)
    config = tiny_config("llama")
    config.update({"vocab_size": size, "max_position_embeddings": 512})
    model = AutoModelForCausalLM.from_config(config)
    return CausalLMWithValueHead(model).eval() if values else model.eval()


@cache
def words():
    """A tokenizer of ten words, and its model."""
    named = ["<unk>", "<s>", "increment", "1", "2", "9", "stop", "go", "up", "down", "total"]
    model = models.WordLevel({word: id_ for id_, word in enumerate(named)}, unk_token="<unk>")
    whole = Tokenizer(model)
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, unk_token="<unk>", eos_token="<s>", bos_token="<s>"
    )


CALLS = r"(?P<name>increment)(?: (?P<step>\d))?"


def watched(episodes, monkeypatch):
    """Note what each row is drawn and told, apart from what `Episodes` makes of it."""
    drawn, told = [], []
    write, turns_for = episodes._written, episodes._turns_for

    def written(*args, **named):
        writing = write(*args, **named)
        drawn.append((args[2], writing.rollout().response_lists()))
        return writing

    def turns(*args):
        found = turns_for(*args)
        if not hasattr(found, "_watched"):
            following = found.following

            def follow(*given, **named):
                ids = following(*given, **named)
                told.append(ids)
                return ids

            found.following, found._watched = follow, True
        return found

    monkeypatch.setattr(episodes, "_written", written)
    monkeypatch.setattr(episodes, "_turns_for", turns)
    return drawn, told


@pytest.mark.parametrize("family", quick(WITH_TOOLS, "llama3", "qwen"))
def test_what_was_sampled_is_what_is_trained(family, monkeypatch):
    """Of 1,000 episodes in all, whatever is said: ids as drawn, log-probs as of a fresh pass."""
    tokenizer = tokenizer_of(family)
    if tokenizer.chat_template is None:
        pytest.skip("examples/real_models/get.py gets the template")
    policy = llama_of(len(tokenizer), values=True)
    policy.language_model.generation_config.eos_token_id = end_ids(tokenizer, family)
    sampler = Sampler(tokenizer, max_new_tokens=(1, 5), group_size=2, seed=3)
    episodes = Episodes(sampler, Chatty, max_turns=4, max_tokens=400)
    drawn, told = watched(episodes, monkeypatch)
    rollout = episodes(policy, ASKED * 25)
    rollout.check()
    rows = len(rollout)
    assert (rows, len(drawn)) == (150, 3)

    turns = [[lists[row] for _, lists in drawn] for row in range(rows)]
    said = iter(told)
    between = [[next(said) for _ in range(rows)] for _ in range(2)]  # turn by turn
    for row in range(rows):
        first, second, third = turns[row]
        parts = [first, between[0][row], second, between[1][row], third]
        response = rollout.responses[row][rollout.attention_mask[row, rollout.queries.shape[1] :]]
        assert response.tolist() == list(chain(*parts))
        mask = [len(part) * [place % 2 == 0] for place, part in enumerate(parts)]
        assert rollout.response_mask[row][: len(response)].tolist() == list(chain(*mask))

    with torch.no_grad():
        out = policy(
            rollout.input_ids,
            attention_mask=rollout.attention_mask.long(),
            position_ids=rollout.position_ids,
        )
    columns = slice(rollout.queries.shape[1] - 1, -1)
    logprobs = out.logits.log_softmax(-1)[:, columns].gather(-1, rollout.responses[..., None])
    mask = rollout.response_mask
    fresh = logprobs[..., 0].masked_fill(~mask, 0)
    torch.testing.assert_close(rollout.behaviour_logprobs, fresh, atol=1e-4, rtol=0)
    values = out.value[:, columns].float().masked_fill(~mask, 0)
    torch.testing.assert_close(rollout.values, values, atol=1e-4, rtol=0)

    rewards = rollout.turn_rewards
    assert rewards.sum(1).tolist() == [0.25 + 0.5 + 0.75] * rows
    last = mask.long().cumsum(1).argmax(1)
    assert rewards[torch.arange(rows), last].tolist() == [0.75] * rows
    assert (rewards[mask] != 0).sum() == 3 * rows
    assert not rewards[~mask].any()
    # The rows of a group have the same task.
    assert rollout.query_texts[::2] == rollout.query_texts[1::2]
    assert len(set(rollout.query_texts)) > 3


def says(episodes, *turns):
    """Let all rows say what is asked for, turn by turn, in place of what such a model says."""
    said = iter(turns)

    def speak(*args, **named):
        writing = Episodes._written(episodes, *args, **named)
        ids = torch.tensor(episodes.tokenizer(next(said))["input_ids"])
        writing.responses[:, : len(ids)] = ids
        writing.lengths[:] = len(ids)
        writing.ended[:] = bool(ids[-1] == episodes.tokenizer.eos_token_id)
        writing.states = [None] * len(writing.states)
        return writing

    episodes._written = speak


def test_a_conversation_is_told_and_counted():
    tokenizer = words()
    policy = llama_of(len(tokenizer))
    sampler = Sampler(tokenizer, max_new_tokens=3, seed=1)
    episodes = Episodes(sampler, Counter, max_turns=3, max_tokens=64, call_format=CALLS)
    says(episodes, *["increment 2 <s>"] * 3)
    rollout = episodes(policy, ["go", "up down"])
    reply = {"role": "tool", "name": "increment", "content": "2"}
    (episode, _) = rollout.episodes
    assert [m["content"] for m in episode["messages"]][:3] == ["increment 2", "2", "increment 2"]
    assert episode["messages"][1] == reply
    assert {k: v for k, v in episode.items() if k != "messages"} == {
        "turns": 3,
        "tool_calls": 3,
        "tool_errors": 0,
        "stop": "turns",
    }
    scored = EnvironmentReward()(rollout)
    assert scored.scores.tolist() == [6.0, 6.0]  # at the end: one score for a response
    figures = episode_figures(rollout.episodes)
    assert (figures["stop/turns"], figures["episode/tool_calls"]) == (1, 3)
    assert [each.counter for each in rollout.environments] == [6, 6]
    assert rollout.response_texts[0] == "\n\n".join(["increment 2"] * 3)
    assert rollout.ended.tolist() == [False, False]


@pytest.mark.parametrize(
    ("limits", "stop"),
    [
        ({"max_tokens": 4}, "tokens"),
        ({"max_turns": 2}, "turns"),
        ({"max_turns": 9}, "done"),
    ],
)
def test_limits_end_an_episode(limits, stop):
    tokenizer = words()
    sampler = Sampler(tokenizer, max_new_tokens=2, eos_token_id=None, seed=1)
    episodes = Episodes(sampler, Chatty, **limits)
    rollout = episodes(llama_of(len(tokenizer)), ["go up", "down"] * 4)
    rollout.check()
    stops = {each["stop"] for each in rollout.episodes}
    assert stops == {stop}
    most = limits.get("max_tokens", 400)
    assert rollout.responses.shape[1] <= most
    assert rollout.response_mask[torch.arange(8), rollout.attention_mask.sum(1) * 0 - 1].any()


@pytest.mark.parametrize(
    ("turns", "limits", "stop", "tokens", "calls"),
    [
        (["go <s>"], {}, "answered", 2, 0),
        (["go up down"], {}, "tokens", 3, 0),  # it was cut off
        (["increment <s>", "go <s>"], {}, "answered", 5, 1),
        (["increment increment <s>", "increment <s>"], {"max_tool_calls": 2}, "tool_calls", 6, 2),
        (["increment <s>", "increment"], {"max_tool_calls": 2, "max_turns": 2}, "turns", 4, 2),
        (["increment <s>"], {"max_tokens": 3}, "tokens", 2, 1),  # with the answer it would be full
        (["increment <s>", "go"], {"max_tokens": 4}, "tokens", 4, 1),
    ],
)
def test_what_ended_an_episode_is_told(turns, limits, stop, tokens, calls):
    tokenizer = words()
    sampler = Sampler(tokenizer, max_new_tokens=3, eos_token_id=None)
    episodes = Episodes(sampler, Counter, call_format=CALLS, **limits)
    says(episodes, *turns)
    rollout = episodes(llama_of(len(tokenizer)), ["go"])
    rollout.check()
    (episode,) = rollout.episodes
    assert (episode["stop"], episode["turns"], episode["tool_calls"]) == (stop, len(turns), calls)
    assert rollout.responses.shape[1] == tokens  # nothing is told behind the last turn
    assert rollout.ended.tolist() == [stop == "answered"]
    assert EnvironmentReward()(rollout).scores.tolist() == [calls]


def test_the_settings_of_the_sampler_are_those_of_its_episodes():
    tokenizer = words()
    settings = {"temperature": 0.5, "add_bos": True, "keep_special_tokens": True}
    sampler = Sampler(tokenizer, max_new_tokens=3, **settings)
    episodes = Episodes(sampler, Counter, call_format=r"(?P<name>total)")
    says(episodes, "<unk> total <s>", "<unk> go <s>")
    rollout = episodes(llama_of(len(tokenizer)), ["go"])
    assert rollout.temperature == 0.5
    assert rollout.query_lists() == [tokenizer("<s> go")["input_ids"]]
    assert rollout.query_texts == ("go",)
    assert rollout.response_texts == ("<unk> total\n\n<unk> go",)
    assert rollout.episodes[0]["tool_errors"] == 1  # there is no such tool


class Opens:
    """Begins with what its row says."""

    def reset(self, says):
        return says

    def step(self, text: str) -> Turn:
        return Turn()


def test_what_an_environment_says_at_the_start_is_added_to_a_chat():
    tokenizer = tokenizer_of("qwen")
    hello, bye = ({"role": "user", "content": text} for text in ("Hello.", "Bye."))
    blank, system = {"role": "user", "content": ""}, {"role": "system", "content": "Be brief."}
    answer = {"role": "assistant", "content": "Yes?"}
    cases = [
        ([hello], None, [hello]),
        ([hello, answer], "Go \ud83d", [{"role": "user", "content": "Hello.\n\nGo ?"}, answer]),
        ([hello], [answer, bye], [hello, answer, bye]),
        ([hello, answer, bye], "", [hello, answer, bye]),
        ([bye, answer, hello], "Go.", [bye, answer, {"role": "user", "content": "Hello.\n\nGo."}]),
        ([system], "Bye.", [system, bye]),
        ([blank], "Bye.", [bye]),
        ([system, blank], [hello], [system, hello]),
        ([blank], None, [blank]),
    ]
    rows = [{"prompt": prompt, "says": said} for prompt, said, _ in cases]
    episodes = Episodes(Sampler(tokenizer, max_new_tokens=1), Opens)
    rollout = episodes(llama_of(len(tokenizer)), rows)
    assert list(rollout.query_messages) == [expected for *_, expected in cases]
    assert rollout.columns == {"says": tuple(row["says"] for row in rows)}
    with pytest.raises(TypeError, match="`reset` must return a text or None for prompts that are"):
        Episodes(Sampler(words()), Opens)(llama_of(11), [{"prompt": "go", "says": [hello]}])


def test_rows_of_a_group_whose_tasks_differ_are_read_apart():
    class Differs(Opens):
        def reset(self):
            made.append(self)
            return " up" * len(made)

    made, tokenizer = [], words()
    policy = llama_of(len(tokenizer))
    sampler = Sampler(tokenizer, max_new_tokens=2, eos_token_id=None, group_size=2)
    rollout = Episodes(sampler, Differs)(policy, ["go"])
    assert rollout.query_texts == ("go up", "go up up")
    for row in (0, 1):
        ids = torch.tensor([rollout.query_lists()[row] + rollout.response_lists()[row]])
        with torch.no_grad():
            logprobs = policy(ids).logits.log_softmax(-1)[:, -3:-1]
        fresh = logprobs.gather(-1, ids[:, -2:, None])[0, :, 0]
        torch.testing.assert_close(rollout.behaviour_logprobs[row], fresh, atol=1e-5, rtol=0)


def test_an_episode_ends_where_longrope_would_change_what_was_read():
    tokenizer = words()
    policy = llama_of(len(tokenizer))
    policy.config.rope_parameters |= {
        "rope_type": "longrope",
        "original_max_position_embeddings": 16,
    }
    episodes = Episodes(Sampler(tokenizer, max_new_tokens=5, eos_token_id=None), Brief)
    rollout = episodes(policy, ["go up", "down"])
    # The first has no room for two more words and a turn.
    assert rollout.attention_mask.sum(1).tolist() == [14, 16]
    assert {each["stop"] for each in rollout.episodes} == {"tokens"}


@given(
    rewards=st.lists(st.floats(-2, 2), min_size=2, max_size=6),
    hole=st.integers(1, 5),
    place=st.integers(0, 5),
)
@properties
def test_what_was_told_changes_no_other_advantage(rewards, hole, place):
    """GAE goes over holes: N tokens that do not count leave all other advantages as they are."""
    size = len(rewards)
    place = min(place, size - 1)
    generator = torch.Generator().manual_seed(size)
    values, whole = torch.randn(1, size, generator=generator), torch.ones(1, size).bool()
    r = torch.tensor([rewards])

    def wide(x, filler):
        gap = torch.full((1, hole), filler, dtype=x.dtype)
        return torch.cat((x[:, :place], gap, x[:, place:]), 1)

    settings = {"gamma": 0.97, "gae_lambda": 0.9}
    plain = gae(r, values, whole, **settings)[0]
    found = gae(wide(r, 0.0), wide(values, 9.0), wide(whole, False), **settings)[0]
    kept = torch.cat((found[:, :place], found[:, place + hole :]), 1)
    torch.testing.assert_close(kept, plain, atol=1e-6, rtol=0)


def test_a_reward_at_the_end_reaches_the_last_written_token_undecayed():
    mask = torch.tensor([[1, 0, 0, 1, 1]]).bool()
    rollout = Rollout.from_lists(
        [torch.tensor([1])], [torch.tensor([2, 3, 4, 5, 6])], response_masks=mask
    )
    nothing = torch.zeros(1, 5)
    rewards, _ = token_rewards(
        nothing, nothing, torch.tensor([2.0]), rollout.response_mask, kl_coef=0.0
    )
    assert rewards.tolist() == [[0, 0, 0, 0, 2]]


@pytest.mark.usefixtures("no_pictures")
def test_increments_are_learned(tmp_path):
    """TRL's documented form, by the three ways in; a tiny model learns to call the tool."""
    tokenizer = words()
    told = {"max_turns": 3, "call_format": CALLS}
    _, history = trl.train(
        llama_of(len(tokenizer)),
        ["go"],
        environment=Counter,
        environment_kwargs=told,
        tokenizer=tokenizer,
        steps=14,
        max_new_tokens=2,
        batch_size=32,
        learning_rate=3e-3,
        init_kl_coef=0.0,
        out=tmp_path / "run",
        held_out=["go", "up"],
        precision="fp32",
        sampler_kwargs={"eos_token_id": None, "add_bos": False},
    )
    rewards = [row["reward/mean"] for row in history[1:]]
    assert sum(rewards[-3:]) / 3 > max(5.0, 2 * sum(rewards[:2]) / 2)
    assert history[-1]["episode/tool_calls"] > 1.5 * history[1]["episode/tool_calls"]
    assert {"held_out/episode/turns", "held_out/stop/turns"} <= history[-1].keys()
    (line, *_) = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert json.loads(line)["episode"]["messages"][0]["role"] == "assistant"
    assert "environment" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_where_tools_stand_is_said_once(capsys):
    tokenizer = tokenizer_of("gemma")
    given = {"steps": 1, "batch_size": 4, "max_new_tokens": 2, "precision": "fp32"}
    policy = llama_of(len(tokenizer))
    trl.train(policy, 4, environment=Counter, tokenizer=tokenizer, **given)
    told = "they and how they are called are described in the first user message"
    assert capsys.readouterr().err.count(told) == 1


def test_rewards_of_an_environment_and_of_functions_are_summed():
    tokenizer, seen = words(), []

    def lengths(completions, environments, **columns):
        seen.extend(completions)
        return [float(environment.counter) for environment in environments]

    _, history = trl.train(
        llama_of(len(tokenizer)),
        3,
        {lengths: 0.5},
        environment=Counter,
        environment_kwargs={"max_turns": 2, "call_format": CALLS},
        tokenizer=tokenizer,
        steps=1,
        max_new_tokens=8,
        batch_size=8,
        precision="fp32",
    )
    (row,) = history
    assert row["reward/mean"] == pytest.approx(1.5 * row["reward/environment"])
    assert all(messages[0]["role"] == "assistant" for messages in seen)


@pytest.mark.parametrize(
    ("change", "words_of_it"),
    [
        ({"max_turns": 0}, "max_turns"),
        ({"turns": 3}, "no setting `turns`"),
        ({"call_format": "xml"}, "call_format"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(change, words_of_it):
    tokenizer = words()
    given = {"call_format": CALLS} | change
    with pytest.raises((TypeError, ValueError), match=words_of_it):
        trl.train(
            llama_of(len(tokenizer)),
            ["go"],
            environment=Counter,
            environment_kwargs=given,
            tokenizer=tokenizer,
            steps=1,
            batch_size=4,
        )


def test_token_ids_and_samplers_without_tokenizer_are_refused():
    with pytest.raises(ValueError, match="tokenizer"):
        Episodes(Sampler(), Counter)
    tokenizer = words()
    episodes = Episodes(Sampler(tokenizer), Counter, call_format=CALLS)
    with pytest.raises(TypeError, match="token ids"):
        episodes(llama_of(len(tokenizer)), [torch.tensor([2, 3])])


def test_the_environments_of_a_part_are_as_they_were_left_while_the_next_is_written():
    tokenizer = words()
    episodes = Episodes(Sampler(tokenizer, max_new_tokens=2), Chatty, max_turns=2)
    policy = llama_of(len(tokenizer))
    for _ in range(2):  # the next batch begins the same environments anew
        parts = list(episodes.in_parts(policy, ["go", "up", "down"], 3))
        every = [environment for part in parts for environment in part.environments]
        assert len(set(map(id, every))) == 3
        assert [each.steps for each in every] == [e["turns"] for p in parts for e in p.episodes]
    assert set(map(id, every)) == set(map(id, episodes(policy, ["go"] * 3).environments))


def test_an_environment_that_a_person_talks_with_goes_on():
    tokenizer = words()
    episodes = Episodes(Sampler(tokenizer, max_new_tokens=2), Chatty, max_turns=2)
    policy = llama_of(len(tokenizer))
    (first,) = episodes(policy, ["go"]).environments
    assert first.steps == 2
    episodes.goes_on = True
    (again,) = episodes(policy, ["go"]).environments
    assert again is first
    assert first.steps == 3


class Brief:
    """Has nothing to say at first, and two words at every step."""

    def reset(self):
        pass

    def step(self, text: str) -> Turn:
        return Turn(" up down")


def test_an_episode_near_the_last_position_is_written_beside_longer_ones():
    tokenizer = words()
    sampler = Sampler(tokenizer, max_new_tokens=8, eos_token_id=None)
    episodes = Episodes(sampler, Brief, max_turns=2)
    near = " ".join(["go"] * 498)
    rollout = episodes(llama_of(len(tokenizer)), ["go", near, "up", "down", "total"])
    assert rollout.response_mask.sum(1).tolist() == [16, 12, 16, 16, 16]  # of 512 positions
    assert rollout.attention_mask[1].sum() == 512


def test_a_world_can_be_shared():
    world = World(Chatty)
    one, other = (Episodes(Sampler(words(), seed=n), world) for n in (0, 1))
    assert one.world is other.world
