"""The loop of choices, reward models and PPO, with a simulated annotator and tiny models."""

import json
import runpy
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch

from tests.training.kills import session
from tests.training.runs import assert_same_run, lines, make_parts, tiny_recipe
from trl import cli
from trl import config as settings
from trl.config import SettingsError
from trl.config.recipe import (
    PeopleConfig,
    PreferencesRecipe,
    RewardConfig,
    SimulatedConfig,
)
from trl.evaluation.people import asking
from trl.evaluation.people.items import Item, Vote
from trl.evaluation.people.store import Shown, Store
from trl.training import reward, run, taste
from trl.training.folder import RunFolder
from trl.training.taste import Simulated, at_chance, disagreement, schedule, tune_to_taste


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take seconds."""
    monkeypatch.setattr(run, "write_report", lambda runs, out: out / "report.html")
    monkeypatch.setattr(reward, "write_report", lambda *_: None)


def hidden(parts, **more):
    scorer = RewardConfig(kind="function", name=f"{parts / 'reward.py'}:count_w7")
    return SimulatedConfig(reward=(scorer,), **more)


def loop_of(parts, out, **people):
    """A loop of seconds: two rounds of two steps each."""
    plain = tiny_recipe(parts, out, steps=4, eval_every=4)
    given = {name: getattr(plain, name) for name in plain.__dataclass_fields__} | {"reward": ()}
    who = {"choices": 24, "first": 12, "rounds": 2, "simulated": hidden(parts)} | people
    fit = {"batch_size": 8, "learning_rate": 1e-2, "precision": "fp32", "held_out": 0.2}
    return PreferencesRecipe(**given, people=PeopleConfig(**who), reward_model=fit)


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    """A loop that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "loop"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_report", lambda runs, out: out / "report.html")
        patch.setattr(reward, "write_report", lambda *_: None)
        summary = tune_to_taste(loop_of(parts, out))
    return out, summary


# -- when what is asked ----------------------------------------------------------------------------


def test_the_schedule_of_the_paper():
    people = PeopleConfig(choices=1000, first=200, rounds=5)
    plan = schedule(people, 100)
    assert [count for count, _ in plan] == [200, 400, 600, 800, 1000]
    assert [step for _, step in plan] == [11, 23, 37, 55, 100]
    # By their rule, evenly spaced choices: 1 - (1 - n/T)^2 of those after the first.
    shares = [1 - (1 - step / 100) ** 2 for _, step in plan]
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=0.01)
    assert schedule(replace(people, rounds=1), 100) == [(1000, 100)]
    two = replace(people, per_item=2, annotators=("ann", "ben"))
    assert schedule(two, 100)[0] == (100, 11)
    few = schedule(PeopleConfig(choices=8, rounds=4), 4)
    assert few == [(2, 1), (4, 2), (6, 3), (8, 4)]


def test_disagreement_is_what_an_answer_would_tell():
    alike = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert disagreement(alike) == pytest.approx(0, abs=1e-12)
    sure = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    assert disagreement(sure) == pytest.approx(0.6931, abs=1e-3)
    unsure = torch.tensor([[0.0, 0.0], [0.1, 0.0]])  # though each is, they agree on that
    assert disagreement(unsure) < 0.001
    assert disagreement(sure) > disagreement(torch.tensor([[1.0, 0.0], [0.0, 1.0]])) > 0.05


def test_who_chooses_blindly_is_named():
    def items(rights, name):
        return [
            Item(f"p{i}", ("a", "b", "c", "d"), gold=2, votes=(Vote(name, 2 if right else i % 2),))
            for i, right in enumerate(rights)
        ]

    assert at_chance(items([True] * 8, "ann")) == {}
    assert at_chance(items([False] * 7, "ben")) == {}  # too few to say
    told = at_chance(items([True, True] + [False] * 6, "ben"))["ben"]
    assert (told["share"], told["of"], told["chance"]) == (0.25, 8, 0.25)
    plain = [Item("p", ("a", "b"), votes=(Vote("cat", 0),)) for _ in range(20)]
    assert at_chance(plain) == {}


# -- the simulated annotator -----------------------------------------------------------------------


def test_the_simulated_annotator_chooses_by_its_reward_whatever_the_order(parts):
    texts = ("w1", "w7 w7", "w7", "w2")
    shown = Shown(1, "w3 ", texts)
    exact = Simulated(hidden(parts, noise=0.0))
    assert exact.choose("me", shown) == 1
    many = [Shown(i, f"w3 w{i} ", texts) for i in range(60)]
    noisy = Simulated(hidden(parts, noise=0.2))
    assert 0.7 < sum(noisy.choose("me", each) == 1 for each in many) / 60 < 0.97  # 0.8 + 0.2/4
    warm = Simulated(hidden(parts, noise=0.0, temperature=1.0))
    chosen = [warm.choose("me", each) for each in many]
    assert 0.45 < chosen.count(1) / 60 < 0.77  # e²/(e² + e + 2) = 0.61
    turned = [replace(each, responses=texts[::-1]) for each in many[:20]]
    assert [3 - warm.choose("me", each) for each in turned] == chosen[:20]
    assert [warm.choose("you", each) for each in many[:20]] != chosen[:20]


# -- the loop --------------------------------------------------------------------------------------


def asked(out):
    """What the store holds, less times."""
    store = Store(out / "votes.sqlite")
    found = [(item.key, [(v.annotator, v.answer) for v in item.votes]) for item in store.items()]
    store.close()
    return found


def check_same(first, second):
    """Check that two loops ended alike, bit for bit."""
    assert_same_run(first / "run", second / "run")
    for name in (
        *("summary.json", "prompts.json", "round-1/items.jsonl", "round-2/items.jsonl"),
        *("round-1/preferences.jsonl", "round-2/preferences.jsonl", "round-2/result.json"),
    ):
        assert (first / name).read_text() == (second / name).read_text(), name
    weights = "reward-1/reward_model/model.safetensors"
    for number in (1, 2):
        ours, theirs = (out / f"round-{number}" / weights for out in (first, second))
        assert ours.read_bytes() == theirs.read_bytes()
    assert asked(first) == asked(second)


def test_rounds_of_choices_a_reward_model_and_steps(whole, parts):
    out, summary = whole
    assert [each["choices"] for each in summary["rounds"]] == [12, 24]
    assert [each["step"] for each in summary["rounds"]] == [1, 4]
    rows = lines(out / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert "held_out/reward/taste" in rows[-1]
    first, second = (lines(out / f"round-{number}" / "items.jsonl") for number in (1, 2))
    assert {source for row in first for source in row["sources"]} == {"step 0"}
    assert {source for row in second for source in row["sources"]} == {"step 1"}
    prompts = [row["prompt"] for row in (*first, *second)]
    assert len(set(prompts)) == len(prompts) == 24  # none twice while there are others
    before = lines(out / "round-1" / "preferences.jsonl")
    assert lines(out / "round-2" / "preferences.jsonl")[: len(before)] == before
    for row in before:
        (vote,) = row["votes"]
        counts = [f"{row['prompt']}{text}".split().count("w7") for text in row["responses"]]
        assert vote["annotator"] == "me"
        assert 0 <= vote["answer"] < len(counts)
    # PPO is one run, whose reward is another model in each round.
    name = settings.read_yaml(out / "run" / "recipe.yaml")["reward"][0]["name"]
    assert name == str(out / "round-2" / "reward-1" / "reward_model")
    assert (out / "run" / "policy" / "config.json").is_file()


def test_what_is_done_is_not_done_again(whole, parts, tmp_path, monkeypatch):
    out, summary = whole
    shutil.copytree(out, tmp_path / "loop")
    with pytest.raises(FileExistsError, match="--resume"):
        tune_to_taste(loop_of(parts, tmp_path / "loop"))
    with pytest.raises(SettingsError, match="people.choices"):
        tune_to_taste(loop_of(parts, tmp_path / "loop", choices=25), resume=True)
    for name in ("run_recipe", "train_reward", "load_policy"):
        monkeypatch.setattr(taste, name, None)
    changed = loop_of(parts, tmp_path / "loop", minutes=1.0)
    assert tune_to_taste(changed, resume=True) == summary


def test_a_loop_that_is_killed_goes_on(whole, parts, tmp_path):
    """For somebody who chooses on a page: tests/training/test_taste_killed.py."""
    whole_out, _ = whole
    out = tmp_path / "loop"
    for how in (3, 0.31, 39):
        ended, told = session(lambda out: tune_to_taste(loop_of(parts, out), resume=True), out, how)
        assert ended == "killed", told
    assert tune_to_taste(loop_of(parts, out), resume=True)
    check_same(whole_out, out)


def test_an_ensemble_asks_what_it_disagrees_about(parts, tmp_path, monkeypatch):
    """With known answers among it."""
    seen, found = [], taste.Taste._disagreements

    def record(self, number, groups):
        seen.append((groups, found(self, number, groups)))
        return seen[-1][1]

    monkeypatch.setattr(taste.Taste, "_disagreements", record)
    out, gold = tmp_path / "loop", tmp_path / "gold.jsonl"
    rows = [{"prompt": f"w{i} ", "responses": ["w1", "w7 w7", "w2"], "gold": 1} for i in range(20)]
    gold.write_text("".join(json.dumps(row) + "\n" for row in rows))
    who = {"annotators": ("ann", "ben"), "per_item": 2, "gold": str(gold), "candidates": 2}
    who |= {"ensemble": 2, "pick": "disagreement", "choices": 32, "first": 16}
    recipe = loop_of(parts, out, **who, simulated=hidden(parts, noise=0.0))
    summary = tune_to_taste(recipe)
    assert [each["choices"] for each in summary["rounds"]] == [16, 32]
    assert [len(each["accuracy"]) for each in summary["rounds"]] == [2, 2]
    assert summary["at_chance"] == {}
    rewards = settings.read_yaml(out / "run" / "recipe.yaml")["reward"]
    assert [float(each["weight"]) for each in rewards] == [0.5, 0.5]
    order = json.loads((out / "prompts.json").read_text())
    first, second = (
        [row["prompt"] for row in lines(out / f"round-{number}" / "items.jsonl")]
        for number in (1, 2)
    )
    assert first == order[:8]
    store = Store(out / "votes.sqlite")
    items = list(store.items())
    store.close()
    assert sum(item.gold is not None for item in items) == 20
    assert {len(item.votes) for item in items} == {2}
    told = lines(out / "round-2" / "preferences.jsonl")
    assert len(told) == 16  # the known answers are not learnt from
    ((groups, worth),) = seen
    assert [prompt for prompt, _ in groups] == order[8:24]
    assert max(worth) > 0
    best = sorted(range(16), key=lambda place: -worth[place])[:8]
    assert second == [order[8 + place] for place in sorted(best)]


# -- people ----------------------------------------------------------------------------------------


def sign_in(link):
    address, token = link.split("#join=")
    client = httpx.Client(base_url=address, headers={"Origin": address.rstrip("/")})
    client.post("/api/join", json={"token": token}).raise_for_status()
    state = client.get("/api/state").raise_for_status().json()
    client.headers["X-CSRF-Token"] = state["csrf"]
    return client


def answer(client, count):
    """Take the first of the responses so many times."""
    for _ in range(count):
        item = client.get("/api/state").raise_for_status().json()["item"]
        body = {"item": item["id"], "client": f"c{item['id']}", "answer": 0}
        client.post("/api/vote", json=body).raise_for_status()


@pytest.mark.parametrize(
    ("low", "told"), [((0.2, 0.3), False), ((0.2, 0.25), True), ((0.1, 0.2), True)]
)
def test_reward_models_that_are_no_better_than_chance_are_told(low, told):
    """If one of them is, they are of some use."""
    said = []
    loop = SimpleNamespace(people=PeopleConfig(responses=4), _say=said.append)
    fits = [{"accuracy": 0.3, "interval": [each, 0.5]} for each in low]
    taste.Taste._say_if_it_learnt_nothing(loop, fits)
    assert bool(said) is told
    assert not told or "right in 0.30, 0.30 of the cases, chance is in 0.25" in said[0]


def test_people_choose_on_a_page_until_their_time_is_over(parts, tmp_path, monkeypatch):
    """All of the first round while it waits, and three of the second."""
    out, people = tmp_path / "loop", []

    def say(self, text):
        if not text.startswith(("ann: ", "the page at http://")):
            return
        if not people:
            people.append(sign_in(text[5:]))
            threading.Thread(target=answer, args=(people[0], 12)).start()
        else:
            answer(people[0], 3)
            assert 0 < json.loads((out / "waited.json").read_text()) < 600
            (out / "waited.json").write_text("599.9")

    monkeypatch.setattr(taste.Taste, "_say", say)
    monkeypatch.setattr(asking, "GRACE", 0.1)
    who = {"simulated": None, "annotators": ("ann",), "port": 0, "minutes": 10.0}
    summary = tune_to_taste(loop_of(parts, out, **who))
    people[0].close()
    assert [each["choices"] for each in summary["rounds"]] == [12, 15]
    assert len(lines(out / "round-2" / "items.jsonl")) == 12


def test_neither_what_is_skipped_nor_a_known_answer_is_waited_for(parts, tmp_path, monkeypatch):
    """Where nobody chose in time, it is asked once more."""
    monkeypatch.setattr(asking, "GRACE", 0.0)
    (tmp_path / "round-1").mkdir()
    rows = [{"prompt": p, "responses": [f"{p}1", f"{p}2"], "sources": ["", ""]} for p in "ab"]
    (tmp_path / "round-1/items.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    store = Store(tmp_path / "votes.sqlite", make=True)
    recipe = loop_of(parts, tmp_path, simulated=None, minutes=1e-6)
    loop = taste.Taste(recipe, RunFolder(tmp_path), store, ())
    loop.told, loop.address, me = "", "", store.join(store.link("ann"))
    loop.gold = [Item("g", ("h", "i"), gold=0)]
    with pytest.raises(ValueError, match="`choices` must be there"):
        loop._ask(1)
    loop.people = replace(loop.people, minutes=None)
    (tmp_path / "waited.json").unlink()
    asked = [Item(row["prompt"], tuple(row["responses"])) for row in rows]
    for number, answer in zip(asking.ask(store, asked, again=True).items, (0, "skip"), strict=True):
        assert asking.waits(store).left
        store.vote(me, number, f"c{number}", answer)
    loop._ask(1)
    (row,) = lines(tmp_path / "round-1/preferences.jsonl")
    assert (row["prompt"], [vote["annotator"] for vote in row["votes"]]) == ("a", ["ann"])
    assert asking.waits(store) is None
    assert store.next(me).prompt == "g"
    store.close()


def test_the_command_takes_a_model_and_prompts(parts, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(taste, "tune_to_taste", lambda recipe, **how: made.append((recipe, how)))
    command = ["taste", str(parts / "model"), str(parts / "prompts.txt")]
    code = f"{parts / 'reward.py'}:count_w7"
    simulated = f"{{reward: [{{kind: function, name: '{code}'}}]}}"
    more = ["--people.simulated", simulated, "--out", str(tmp_path / "a")]
    assert cli.main([*command, *more, "--trust", str(parts / "reward.py"), "--resume"]) == 130
    ((recipe, how),) = made
    assert (recipe.model.name, recipe.data.prompts) == (command[1], command[2])
    assert recipe.people.simulated.reward[0].name == code
    assert how["resume"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"choices": 3, "rounds": 4, "first": None}, "people.rounds|`rounds` must be <= the items"),
        ({"first": 30}, "`first` must be <= choices"),
        ({"pick": "disagreement"}, "`ensemble` must be >= 2"),
        ({"annotators": ()}, "`annotators` must name as many people as judge each item"),
        ({"per_item": 2}, "`annotators` must name as many people as judge each item"),
        ({"rounds": 5}, "`people.rounds` must be <= the steps"),
    ],
)
def test_settings_that_cannot_work_are_refused(parts, tmp_path, changes, told):
    with pytest.raises(SettingsError, match=told):
        loop_of(parts, tmp_path, **changes)


def test_the_reward_model_has_settings_of_its_own(parts, tmp_path):
    recipe = loop_of(parts, tmp_path / "a")
    with pytest.raises(SettingsError, match="`reward_model` must not have train"):
        replace(recipe, reward_model={"train": "mine.jsonl"})
    with pytest.raises(SettingsError, match="epochs"):
        tune_to_taste(replace(recipe, reward_model={"epochs": 0}))
    with pytest.raises(SettingsError, match="epoch"):
        tune_to_taste(replace(recipe, reward_model={"epoch": 2}))
    assert not (tmp_path / "a" / "votes.sqlite").exists()


def test_the_measuring_script_compares_at_the_same_kl():
    path = Path(__file__).parents[2] / "benchmarks" / "taste.py"
    measuring = runpy.run_path(str(path))
    p, kl = measuring["P"], measuring["KL"]
    curve = [{p: 0.5, kl: 0.0}, {p: 0.7, kl: 4.0}, {p: 0.9, kl: 6.0}]
    assert measuring["at_kl"](curve, 2.0) == pytest.approx(0.6)
    assert measuring["at_kl"](curve, 9.0) == 0.9
    far = {"curve": [{p: 0.5, kl: 0.0}, {p: 0.6, kl: 5.0}]}
    found = {
        "hidden-0": {"curve": curve},
        "far-0": far,
        "online-0": {"curve": [curve[0], {p: 0.68, kl: 5.0}]},
    }
    assert measuring["share"](found, "online", 0) == pytest.approx(0.6)
    for arm in measuring["ARMS"]:
        recipe = measuring["recipe_of"](arm, 1, Path("a"))
        assert recipe.total_steps == measuring["STEPS"]
        loop = isinstance(recipe, PreferencesRecipe)
        assert loop == (arm not in measuring["ALONE"])
        # The reward model never begins as the hidden one, which chooses.
        name = taste.reward_recipe(recipe, Path("a"), 1, 1).model if loop else ""
        assert "bert" not in name
        assert name != "starter"
