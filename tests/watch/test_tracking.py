"""Trackers: what arrives in them, what is checked first, and that none of them ends a run."""

import json
import math
import sys
import types

import numpy as np
import pytest

from trl.config.recipe import TRACKERS
from trl.watch import tracking
from trl.watch.markdown import escaped, markdown_table
from trl.watch.tracking import Trackers, tracked_name

ROW = {
    "step": 3,
    "reward/mean": 0.5,
    "objective/kl": 2.0,
    "tokens_per_second": 100.0,
    "episodes": 64,
    "note": "no number",
    "flag": True,
}
NOT_FINITE = ROW | {
    "ppo/val/explained_variance": math.nan,
    "objective/kl_dist": np.array([[0.0, math.nan, 2.0], [math.inf, 1.0, 0.0]], np.float32),
    "objective/ref_logprobs": np.full((2, 3), math.nan, np.float32),  # without a reference
    "objective/logprobs": np.full((2, 3), -1.5, np.float32),
}
SAMPLES = [{"prompt": "I saw", "response": " a | b\n[bold]", "score": 0.25}]


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    """No settings of this machine's user come in."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "MLFLOW_RUN_ID", "MLFLOW_TAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))


def test_every_tracker_of_a_recipe_can_be_started():
    assert all(hasattr(Trackers, f"_{name}") for name in TRACKERS)


def test_all_that_is_wrong_is_said_at_once_before_anything_is_made(monkeypatch, tmp_path):
    for name in ("mlflow", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError) as raised:
        Trackers(["mlflow", "trackio"], out=tmp_path / "run")
    for name in ("mlflow", "trackio"):
        assert f"The tracker '{name}' cannot be imported (ModuleNotFoundError" in str(raised.value)
        assert f"pip install --upgrade {name}." in str(raised.value)
    with pytest.raises(ValueError, match=r"`names` must be trackers of .*got \['tensorbord'\]"):
        Trackers(["tensorbord"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_trackers_are_no_trouble(tmp_path):
    trackers = Trackers([], out=tmp_path / "run")
    trackers.log(NOT_FINITE, 1)
    trackers.log_samples(SAMPLES, 1)
    trackers.close()
    assert not (tmp_path / "run").exists()


def test_names_have_groups_and_only_letters_that_all_take():
    assert tracked_name("reward/mean") == "reward/mean"
    assert tracked_name("tokens_per_second/rollout") == "speed/tokens_per_second_rollout"
    assert tracked_name("reward/a:b (c)") == "reward/a_b _c_"
    assert tracked_name("episodes") == "progress/episodes"


def test_samples_as_markdown_show_their_text():
    assert escaped(" a | b\n[bold] <i>") == r"a \| b \[bold\] &lt;i>"
    assert markdown_table(["a", "b"], [["x", "1"]]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| x | 1 |",
    ]
    assert "| --- | ---: |" in markdown_table(["a", "b"], [], numbers=True)


# --- tensorboard --------------------------------------------------------------------------------


def events(folder):
    """What TensorBoard reads back: {tag: [(step, value)]} and the texts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    tags = accumulator.Tags()
    scalars = {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in tags["scalars"]
    }
    texts = {
        tag: accumulator.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in tags["tensors"]
    }
    return scalars, texts


def test_tensorboard_reads_back_what_was_logged_and_a_resumed_run_has_no_doubles(tmp_path):
    pytest.importorskip("tensorboard")
    settings = {"out": tmp_path, "run_name": "my run", "config": {"ppo": {"gamma": 1.0}}}
    first = Trackers(["tensorboard"], **settings)
    assert first.notes == [f"TensorBoard: tensorboard --logdir {tmp_path / 'tensorboard'}"]
    for step in (1, 2, 3, 4):
        first.log(ROW | {"reward/mean": float(step)}, step)
    first.log_samples(SAMPLES, 4)
    first.close()
    first.close()
    second = Trackers(["tensorboard"], **settings, resume_step=2)
    for step in (3, 4, 5):
        second.log(ROW | {"reward/mean": 10.0 * step}, step)
    second.close()
    scalars, texts = events(tmp_path / "tensorboard" / "my_run")
    assert set(scalars) == {
        "reward/mean",
        "objective/kl",
        "speed/tokens_per_second",
        "progress/episodes",
    }
    assert scalars["reward/mean"] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert [step for step, _ in scalars["objective/kl"]] == [1, 2, 3, 4, 5]
    assert '"gamma": 1.0' in texts["config/text_summary"]


def logged_twice(trackers):
    """Log what is not finite twice: the first time it is said."""
    names = "`objective/kl_dist`, `objective/ref_logprobs`, `ppo/val/explained_variance`"
    with pytest.warns(UserWarning, match=f"no NaN and no infinity.*left out of {names}$"):
        trackers.log(NOT_FINITE, 1)
    trackers.log(NOT_FINITE, 2)  # a warning would be an error here, and so is a tracker given up


def test_tensorboard_has_histograms_of_what_is_finite(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(["tensorboard"], out=tmp_path / "a")
    logged_twice(trackers)
    trackers.close()
    folder = tmp_path / "a" / "tensorboard" / "a"
    accumulator = EventAccumulator(str(folder), size_guidance={"histograms": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    assert "ppo/val/explained_variance" not in tags["scalars"]
    assert sorted(tags["histograms"]) == ["objective/kl_dist", "objective/logprobs"]
    for event in accumulator.Histograms("objective/kl_dist"):
        found = event.histogram_value
        assert (found.min, found.max, found.num, found.sum) == (0, 2, 4, 3)
    assert [event.step for event in accumulator.Histograms("objective/kl_dist")] == [1, 2]


def test_tensorboard_shows_samples_as_text(tmp_path):
    pytest.importorskip("tensorboard")
    trackers = Trackers(["tensorboard"], out=tmp_path / "a")
    trackers.log_samples(SAMPLES, 4)
    trackers.close()
    _, texts = events(tmp_path / "a" / "tensorboard" / "a")
    assert r"a \| b \[bold\]" in texts["samples/text_summary"]


# --- wandb --------------------------------------------------------------------------------------


class NoWandB:
    """Writes down what it is made with."""

    name = "wandb"
    made = None

    def __init__(self, project, **how):
        NoWandB.made = how

    def start(self):
        pass

    finish = start


def test_wandb_without_key_runs_offline_and_says_so(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setattr(tracking.tracking, "WandBTracker", NoWandB)
    (note,) = Trackers(["wandb"], out=tmp_path).notes
    assert "offline, since there is no API key" in note
    assert NoWandB.made["mode"] == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert Trackers(["wandb"], out=tmp_path).notes == []
    assert NoWandB.made["resume"] == "allow"
    monkeypatch.setenv("WANDB_MODE", "offline")
    (note,) = Trackers(["wandb"], out=tmp_path).notes
    assert "WANDB_MODE says so" in note
    assert "resume" not in NoWandB.made


def test_a_login_of_wandb_is_found(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setattr(tracking.tracking, "WandBTracker", NoWandB)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "netrc").write_text("machine my.host login user password made-up\n")
    monkeypatch.setenv("WANDB_BASE_URL", "https://my.host")
    assert Trackers(["wandb"], out=tmp_path).notes == []
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.host")
    assert len(Trackers(["wandb"], out=tmp_path).notes) == 1


@pytest.mark.filterwarnings("ignore")  # of what wandb needs
def test_wandb_offline_writes_a_folder_and_goes_on_with_the_same_run(tmp_path):
    pytest.importorskip("wandb")
    settings = {"out": tmp_path, "project": "p", "config": {"ppo": {"gamma": 1.0}}}
    for resume_step in (None, 1):
        trackers = Trackers(["wandb"], **settings, resume_step=resume_step)
        (note,) = trackers.notes
        assert "offline, since there is no API key" in note
        assert "wandb sync" in note
        trackers.log(ROW, 1)
        trackers.log_samples(SAMPLES, 1)
        trackers.close()
    name = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    kept = list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(kept) in (1, 2)  # two that start within a second share a folder
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/table/samples_*.json"))
    assert list((tmp_path / "wandb").glob("offline-run-*")) == [path.parent for path in kept]


def test_wandb_has_histograms_of_what_is_finite(tmp_path):
    pytest.importorskip("wandb")
    trackers = Trackers(["wandb"], out=tmp_path)
    logged_twice(trackers)
    run = trackers._running["wandb"].tracker
    assert "ppo/val/explained_variance" not in dict(run.summary)
    assert sum(run.summary["objective/kl_dist"]["values"]) == 4
    assert sum(run.summary["objective/logprobs"]["values"]) == 6
    trackers.close()


# --- trackio and mlflow: stand-ins --------------------------------------------------------------


class StandIn:
    """Writes down what it is called with."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))

        return call

    def named(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def mlflow(monkeypatch):
    module, calls = types.ModuleType("mlflow"), StandIn()
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="run-7"))
    module.search_experiments = lambda **_: []
    module.create_experiment = lambda **_: "1"
    for name in ("log_metrics", "log_params", "log_text", "end_run"):
        setattr(module, name, getattr(calls, name))
    limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
    module.utils = types.SimpleNamespace(validation=limits)

    def start_run(**kwargs):
        calls.start_run(**kwargs)
        return run

    module.start_run = start_run
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return calls


def test_mlflow_gets_figures_samples_and_settings_and_goes_on_with_its_run(mlflow, tmp_path):
    config = {"ppo": {"gamma": 1.0}, "steps": 3}
    trackers = Trackers(["mlflow"], out=tmp_path / "a", project="p", config=config)
    trackers.log(ROW, 3)
    trackers.log_samples([{"prompt": "a", "parts": {"x": 1.0}}], 3)
    trackers.close()
    figures = {
        "reward/mean": 0.5,
        "objective/kl": 2.0,
        "speed/tokens_per_second": 100.0,
        "progress/episodes": 64.0,
    }
    assert mlflow.named("log_metrics") == [((figures,), {"step": 3})]
    assert mlflow.named("log_params") == [(({"ppo.gamma": 1.0, "steps": 3},), {})]
    table = "| prompt | parts.x |\n| --- | --- |\n| a | +1.000 |\n"
    assert mlflow.named("log_text") == [((table, "samples/step-3.md"), {})]
    assert mlflow.named("end_run")
    assert mlflow.named("start_run")[0][1]["run_id"] is None
    assert mlflow.named("start_run")[0][1]["run_name"] == "a"

    Trackers(["mlflow"], out=tmp_path / "a", project="p", config=config, resume_step=3).close()
    assert mlflow.named("start_run")[1][1]["run_id"] == "run-7"
    assert len(mlflow.named("log_params")) == 1

    Trackers(["mlflow"], out=tmp_path / "a", project="p", config=config).close()  # anew
    assert mlflow.named("start_run")[2][1]["run_id"] is None


@pytest.fixture
def trackio(monkeypatch):
    module, run, calls = types.ModuleType("trackio"), StandIn(), StandIn()
    module.Table = lambda dataframe: ("table", dataframe.to_dict("records"))

    def init(**kwargs):
        calls.init(**kwargs)
        return run

    module.init = init
    monkeypatch.setitem(sys.modules, "trackio", module)
    return run, calls


def test_trackio_gets_figures_and_samples_and_goes_on_with_its_run(trackio, tmp_path):
    pytest.importorskip("pandas")
    run, calls = trackio
    trackers = Trackers(["trackio"], out=tmp_path / "a", project="p", config={"steps": 3})
    trackers.log(ROW, 3)
    trackers.log_samples(SAMPLES, 3)
    trackers.close()
    ((_, first),) = calls.named("init")
    assert first["project"] == "p"
    assert first["name"].startswith("a-")
    assert first["config"] == {"steps": 3}
    (figures, samples) = run.named("log")
    assert figures[0][0]["reward/mean"] == 0.5
    assert figures[1] == {"step": 3}
    assert samples[0][0] == {"samples": ("table", SAMPLES)}
    Trackers(["trackio"], out=tmp_path / "a", project="p", resume_step=3).close()
    again = calls.named("init")[1][1]
    assert again["name"] == first["name"]
    assert again["resume"] == "allow"


# --- trouble ------------------------------------------------------------------------------------


def test_a_tracker_that_fails_is_given_up_once_and_the_others_go_on(mlflow, trackio, tmp_path):
    run, _ = trackio
    trackers = Trackers(["mlflow", "trackio"], out=tmp_path)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    sys.modules["mlflow"].log_metrics = full
    with pytest.warns(UserWarning, match="'mlflow' has failed and is given up.*No space left"):
        trackers.log(ROW, 1)
    trackers.log(ROW, 2)  # without another warning, which would be an error here
    assert [kwargs["step"] for _, kwargs in run.named("log")] == [1, 2]
    trackers.close()
    assert run.named("finish")


@pytest.mark.parametrize("resume_step", [None, 3])
def test_a_tracker_that_does_not_start_ends_no_run(mlflow, trackio, tmp_path, resume_step):
    def away(**kwargs):
        raise ConnectionError("the server is away")

    sys.modules["mlflow"].start_run = away
    with pytest.warns(
        UserWarning, match="'mlflow' has failed.*goes on without it: ConnectionError"
    ):
        trackers = Trackers(["mlflow", "trackio"], out=tmp_path, resume_step=resume_step)
    trackers.log(ROW, 4)
    assert [kwargs["step"] for _, kwargs in trackio[0].named("log")] == [4]


def test_only_the_main_process_logs(mlflow, tmp_path, monkeypatch):
    monkeypatch.setattr(
        tracking, "PartialState", lambda: types.SimpleNamespace(is_main_process=False)
    )
    trackers = Trackers(["mlflow"], out=tmp_path / "a")
    trackers.log(ROW, 1)
    trackers.close()
    assert mlflow.calls == []
    assert not (tmp_path / "a").exists()
