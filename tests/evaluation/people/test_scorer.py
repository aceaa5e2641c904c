"""People as a scorer: what is asked, what it counts, and that nothing is asked twice."""

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import trl
from tests.evaluation.people.voting import Voter
from tests.evaluation.rollouts import make_rollout
from tests.families import tiny_model
from tests.ranks import launch
from tests.training.test_loop import tokenizer
from trl import HumanScorer, WeightedSum
from trl.config import SettingsError
from trl.config.recipe import Recipe, RewardConfig
from trl.evaluation.people import asking
from trl.evaluation.people.asking import Stopped, enough
from trl.evaluation.people.scorer import for_held_out
from trl.evaluation.people.store import Store
from trl.training import run
from trl.training.checkpoints import step_of
from trl.training.fingerprints import of_scorer
from trl.training.named import load_scorer
from trl.training.tools import score_texts


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(asking, "GRACE", 0.0)
    monkeypatch.setattr(asking, "EVERY", 0.02)


def by_length(shown):
    """The longest is best; of one, its stars count."""
    return max(range(len(shown.responses)), key=lambda i: len(shown.responses[i]))


QUESTIONS = {
    "thumbs": (lambda shown: "*" in shown.responses[0], ["*", "", "**"], [1.0, -1.0, 1.0]),
    "rating": (lambda shown: 1 + len(shown.responses[0]), ["****", "", "**"], [1.0, -1.0, 0.0]),
    "pair": (by_length, ["*", "**"], [0.0, 1.0]),
    "best": (by_length, ["*", "***", "**", "***"], [0.0, 1.0, 0.0, 1.0]),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answers_to_a_question_are_scores(question, tmp_path):
    answer, responses, scores = QUESTIONS[question]
    scorer = HumanScorer(tmp_path / "s", question=question, page=False)
    rollout = make_rollout(*[("Write.", text) for text in responses])
    with Voter(scorer.path, answer) as voter:
        found = scorer(rollout)
        assert found.scores.tolist() == scores
        once = len(voter.seen)
        other = replace(rollout, group_ids=torch.zeros(len(responses), dtype=torch.long))
        assert scorer(other).scores.tolist() == scores
        assert len(voter.seen) == once == (1 if question in ("pair", "best") else 3)
    scorer.close()


def test_a_tie_and_all_bad_and_several_votes_share_the_wins(tmp_path):
    scorer = HumanScorer(
        tmp_path / "s", question="best", page=False, per_item=2, annotators=["ann", "ben"]
    )
    texts = [("Write.", "a"), ("Write.", "b"), ("Go.", "same"), ("Go.", "same")]
    with (
        Voter(scorer.path, lambda shown: shown.responses.index("a")),
        Voter(scorer.path, lambda shown: "both_bad", name="ben"),
    ):
        found = trl.evaluation.score(scorer, texts)
    assert found.scores.tolist() == [0.5, 0.0, 0.0, 0.0]
    assert found.counted.tolist() == [True, True, False, False]  # nothing to choose from
    assert scorer(texts).figures["human/judged"].tolist() == [1, 1, 0, 0]
    scorer.close()


def test_rows_that_nobody_judged_have_the_score_of_the_fallback_or_none(tmp_path, capsys):
    def answer(shown):
        if shown.responses[0] == "last":
            return enough(Store(scorer.path))
        return True

    texts = [("", "early"), ("", "last"), ("", "early")]
    scorer = HumanScorer(tmp_path / "s", timeout=300, page=False)
    with Voter(scorer.path, answer):
        alone = trl.evaluation.score(scorer, texts)
        mixed = trl.evaluation.score(
            WeightedSum([(scorer, 2.0), (lambda texts: [0.5 for _ in texts], 1.0)]), texts
        )
        scorer.fallback = trl.as_scorer(lambda texts: [-3.0 for _ in texts])
        instead = trl.evaluation.score(scorer, texts)
    assert alone.totals.isnan().tolist() == [False, True, False]
    assert mixed.scores.tolist() == [2.5, 0.5, 2.5]
    assert instead.scores.tolist() == [1.0, -3.0, 1.0]
    told = capsys.readouterr().err
    # How many wait depends on how quick the person was.
    assert len(re.findall(r"trl: \d responses? waits? until", told)) == 3
    assert told.count(f"for me: trl label --store {scorer.path}") == 3
    scorer.close()


def test_a_page_is_served_where_the_message_says(tmp_path, capsys):
    import httpx

    scorer = HumanScorer(tmp_path / "s", timeout=0.3, port=0, annotators=["ann"])
    scorer([("", "one")])
    told = capsys.readouterr().err
    address, _, token = told.split("ann: ")[1].strip().partition("#join=")
    origin = {"Origin": address.rstrip("/")}
    with httpx.Client(base_url=address, headers=origin) as browser:
        assert browser.post("/api/join", json={"token": token}).json() == {"name": "ann"}
        csrf = {"X-CSRF-Token": browser.get("/api/state").json()["csrf"]}
        assert browser.post("/api/enough", json={}).status_code == 403
        assert browser.post("/api/enough", json={}, headers=csrf).json()["waiting"] is None
    capsys.readouterr()
    second = HumanScorer(tmp_path / "t", timeout=0.1, port=int(address.rsplit(":")[-1][:-1]))
    second([("", "one")])  # its port is taken: another is found
    assert capsys.readouterr().err.count("http://127.0.0.1:") == 1
    scorer.close()
    second.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)


def test_a_stop_from_another_thread_ends_the_waiting(tmp_path):
    scorer = HumanScorer(tmp_path / "s", page=False)
    scorer.stop()
    with pytest.raises(Stopped):
        scorer([("", "one")])
    scorer.close()


def test_what_a_scorer_is_does_not_depend_on_who_judges_where(tmp_path):
    one, other = (
        HumanScorer(tmp_path / name, annotators=names, page=False, timeout=0.1)
        for name, names in (("s", ["ann"]), ("t", ["ben", "cleo"]))
    )
    one([("", "text")])  # its store is open
    assert of_scorer(one) == of_scorer(other)
    assert of_scorer(one) != of_scorer(HumanScorer(tmp_path / "s", question="rating"))
    one.close()


def test_people_are_not_asked_of_held_out_prompts_unless_they_are_to_be(tmp_path):
    scorer = HumanScorer(tmp_path / "s", page=False, fallback=lambda texts: [9.0 for _ in texts])
    judge = for_held_out(WeightedSum([scorer, (lambda texts: [1.0 for _ in texts], 0.0)]))
    assert judge([("", "one")]).scores.tolist() == [9.0]
    assert not scorer.path.exists()
    asked = WeightedSum([HumanScorer(tmp_path / "s", page=False, held_out=True)])
    assert for_held_out(asked) is asked


def test_what_cannot_be_asked_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`per_item` must be at most the 1 annotators, got 2"):
        HumanScorer(tmp_path / "s", per_item=2)
    with pytest.raises(ValueError, match="`question` must be"):
        HumanScorer(tmp_path / "s", question="stars")
    three = HumanScorer(tmp_path / "s", question="pair", page=False)
    with pytest.raises(ValueError, match="prompt` must be 2 to 2 for the question 'pair', got 3"):
        three([("", "a"), ("", "b"), ("", "c")])
    monkeypatch.setattr("trl.evaluation.people.scorer.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs starlette, .*'\.\[people\]'"):
        HumanScorer(tmp_path / "s")
    # -- in a recipe
    with pytest.raises(SettingsError, match=r"`sampling.group_size` must be 2 to 4"):
        Recipe(reward=(RewardConfig(kind="human", arguments={"question": "best"}),))
    human = RewardConfig(kind="human", arguments={"page": False, "fallback": "nobody"})
    with pytest.raises(ValueError, match=r"`fallback` must be the title of another reward"):
        load_scorer([human])
    with pytest.raises(SettingsError, match=r"missing|unexpected"):
        load_scorer([RewardConfig(kind="human", arguments={"stars": 5})])


def test_a_recipe_names_people_and_who_judges_in_their_place(tmp_path):
    human = RewardConfig(
        kind="human", arguments={"page": False, "timeout": 60, "fallback": "short"}
    )
    short = RewardConfig(
        kind="length", title="short", weight=0.0, arguments={"max_tokens": 9, "soft_tokens": 2}
    )
    scorer, judge = load_scorer([human, short], out=str(tmp_path))
    (people, _), (length, _) = judge.parts.values()
    assert people.path == tmp_path / "human.votes.sqlite"
    assert people.fallback is length
    assert list(scorer.parts) == ["human"]


def test_the_command_that_scores_asks_people_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    human = RewardConfig(kind="human", arguments={"page": False, "question": "rating"})
    with Voter(tmp_path / "human.votes.sqlite", lambda shown: 5):
        rows = score_texts(["A film.", "A play."], [human])
    again = score_texts(["A film.", "A play."], [human])
    assert [row["score"] for row in rows] == [row["score"] for row in again] == [1.0, 1.0]


# -- whole runs ------------------------------------------------------------------------------------

SMALL = {
    "prompts": [f"w{a} w{b}" for a in range(1, 8) for b in range(9, 14)],
    "steps": 4,
    "checkpoint_every": 2,
    "max_new_tokens": (2, 5),
    "batch_size": 8,
    "minibatch_size": 8,
    "ppo_epochs": 1,
    "learning_rate": 1e-2,
    "precision": "fp32",
    "quiet": True,
}


def opinion(shown):
    """Of some responses this person says nothing."""
    text = shown.responses[0]
    return None if len(text) % 5 == 1 else len(text) % 2 == 0


def run_with_people(folder, end=0):
    """Tune a policy with a person beside it, who ends the program after so many answers."""
    asking.GRACE, asking.EVERY = 0.0, 0.02
    run.write_report = lambda runs, out: out / "report.html"
    path, count = Path(folder) / "votes", []

    def answer(shown):
        found = opinion(shown)
        if found is None:
            enough(store)
        elif end and len(count) >= end - 1:
            signal.raise_signal(signal.SIGKILL)
        count.append(found)
        return found

    store = Store(path, make=True)
    scorer = HumanScorer(path, page=False)
    with Voter(path, answer):
        policy, history = trl.train(
            tiny_model("llama"), reward=scorer, tokenizer=tokenizer(), resume="auto",
            out=f"{folder}/run", **SMALL,
        )  # fmt: skip
    rows = [
        {k: v for k, v in row.items() if "time/" not in k and "per_sec" not in k} for row in history
    ]
    torch.save({"weights": policy.state_dict(), "rows": json.dumps(rows)}, f"{folder}/end.pt")


def test_ctrl_c_while_it_waits_ends_at_once_and_saves_what_was_before(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "write_report", lambda runs, out: out / "report.html")
    path, seen = tmp_path / "votes", []

    def answer(shown):
        seen.append(shown)
        return os.kill(os.getpid(), signal.SIGINT) if len(seen) == 11 else True

    def tune():
        return trl.train(
            tiny_model("llama"), reward=HumanScorer(path, page=False), tokenizer=tokenizer(),
            out=tmp_path / "run", resume="auto", **SMALL | {"steps": 3, "checkpoint_every": 50},
        )  # fmt: skip

    with Voter(path, answer), pytest.raises(Stopped) as stopped:
        tune()
    assert [step_of(each) for each in (tmp_path / "run/checkpoints").iterdir()] == [1]
    assert "Go on with" in stopped.value.__notes__[0]
    assert len(stopped.value.trained.history) == 1
    with Voter(path, lambda shown: True):
        assert [row["step"] for row in tune().history] == [1, 2, 3]


@pytest.mark.distributed
def test_a_run_that_is_killed_while_it_waits_asks_nothing_twice_and_ends_the_same(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    codes, told = launch(run_with_people, 1, whole, str(whole))
    assert codes == [0], told[0]
    ends = []
    for end in (3, 4, 0):
        codes, told = launch(run_with_people, 1, broken, str(broken), end)
        ends += codes
    assert ends[-1] == 0, told[0]
    assert ends[:2] == [-9, -9]
    one, other = (torch.load(folder / "end.pt") for folder in (whole, broken))
    assert one["rows"] == other["rows"]
    assert '"response/counted"' in one["rows"]
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]), name
    said = [
        {(i.prompt, i.responses): [v.answer for v in i.votes] for i in Store(f / "votes").items()}
        for f in (whole, broken)
    ]
    assert said[0].keys() == said[1].keys()
    # What was left at "enough" is answered later, if the end of the run leaves time for it.
    assert max(len(answers) for side in said for answers in side.values()) == 1
    for item, answers in said[0].items():
        assert not (answers and said[1][item]) or answers == said[1][item]
