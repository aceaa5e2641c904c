"""Hostile folders, texts and servers: nothing is written elsewhere, no secret is shown."""

import json
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import yaml

from tests.evaluation.rollouts import make_rollout
from trl import EndpointScorer, ScoringError, cli
from trl.batch import Rollout
from trl.config import SettingsError, read_yaml
from trl.config.errors import hidden, refuse
from trl.config.recipe import RewardConfig
from trl.config.secrets import filled, masked
from trl.data.sources import read_table, streamed_dataset
from trl.training import fingerprints, tools
from trl.training.folder import RunFolder
from trl.watch.tracking import Trackers

ESCAPE = "\x1b]0;owned\x07\x9b31m‮"

# -- links in the folder of a run ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("metrics.jsonl", "scores.jsonl", "samples.jsonl", "warnings.jsonl", "recipe.yaml"),
        *(".recipe.yaml.partial", "summary.json", "trackers.json", ".lock", "report.html"),
        *("checkpoints", "policy", "best", ".best", ".policy.partial", ".policy.old", "wandb"),
        *("checkpoints/step-000002", "checkpoints/.step-000002.partial", "tensorboard"),
    ],
)
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_no_run_writes_through_a_link(name, kind, tmp_path):
    target, folder = tmp_path / "target", tmp_path / "run"
    (folder / name).parent.mkdir(parents=True)
    if kind == "file":
        target.write_text("mine")
    elif kind == "folder":
        target.mkdir()
    (folder / name).symlink_to(target)
    told = rf"a link to {target}: delete it"
    with pytest.raises(FileExistsError, match=told) as caught, RunFolder(folder).in_use():
        pass
    assert caught.value.filename == str(folder / name)
    assert not target.is_file() or target.read_text() == "mine"


def test_links_that_are_no_business_of_a_run_stay(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")  # a larger one
    (tmp_path / "disk" / "notes.txt").symlink_to("/etc/hostname")
    run = RunFolder(tmp_path / "run")
    with run.in_use():
        run.add("metrics", {"step": 0})
    assert (tmp_path / "disk" / "metrics.jsonl").is_file()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(FileExistsError, match="a pipe or a device"), RunFolder(tmp_path).in_use():
        pass


def in_time(work):
    """Call a function that might wait for ever, and return what it raised."""
    raised = []

    def call():
        try:
            work()
        except Exception as error:
            raised.append(error)

    thread = Thread(target=call, daemon=True)
    thread.start()
    thread.join(60)
    return raised[0] if raised else None


@pytest.mark.parametrize(
    "read",
    [
        read_yaml,
        lambda path: read_table(str(path)),
        lambda path: streamed_dataset([str(path)]),
        Rollout.load,
    ],
)
def test_a_pipe_in_place_of_a_file_is_refused(read, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    error = in_time(lambda: read(tmp_path / "pipe.jsonl"))
    assert isinstance(error, ValueError)
    assert "pipe or" in str(error)
    assert "pipe.jsonl" in str(error)


@pytest.mark.parametrize("name", ["report.html", "report", "report/reward.png"])
def test_no_report_is_written_through_a_link(name, tmp_path, capsys):
    run, target = tmp_path / "run", tmp_path / "target"
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text("steps: 3")
    (run / name).symlink_to(target)
    assert cli.main(["report", str(run)]) == 2
    assert f"a link to {target}" in capsys.readouterr().err
    assert not target.exists()


# -- secrets ---------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """Answers with what it was asked, as servers that are being mended do; notes it too."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            told = f"{self.path} {self.headers['Authorization']}"
            self.server.seen.append(told)
            self.send_response(404)
            self.end_headers()
            self.wfile.write(told.encode())

        def log_message(self, *told):
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    made.seen = []
    thread = Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_a_secret_is_sent_and_shown_nowhere(server, monkeypatch):
    monkeypatch.setenv("SCORER_KEY", "sesame+open")
    monkeypatch.setenv("SCORER_HEADER", "Bearer abracadabra")
    path = "s/opensesame1234567890/x?key=${SCORER_KEY}&model=a"  # the server tells both
    url = f"http://127.0.0.1:{server.server_port}/{path}"
    scorer = EndpointScorer(url, headers={"Authorization": "${SCORER_HEADER}"}, retries=0)
    with pytest.raises(ScoringError) as caught:
        scorer(make_rollout(("a", "b")))
    (seen,) = server.seen
    assert "abracadabra" in seen
    assert "sesame" in seen
    told = str(caught.value) + scorer.name
    assert "abracadabra" not in told
    assert "sesame" not in told
    assert "${SCORER_KEY}" in told


def test_another_key_is_the_same_scorer_and_another_model_is_not(monkeypatch):
    def of(url, **headers):
        return fingerprints.of_scorer(EndpointScorer(url, headers=headers))

    url = "https://host/score?key=${SCORER_KEY}&model=a"
    monkeypatch.setenv("SCORER_KEY", "first")
    before = of(url, a="first")
    monkeypatch.setenv("SCORER_KEY", "second")
    assert of(url, a="second") == before
    assert of(url.replace("model=a", "model=b"), a="second") != before


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://me:sesame@host/score", "hold no user and no password"),
        ("https://sesame@host/score", "hold no user and no password"),
        ("htp://host/${SECRET}", "be a URL such as"),
        ("${SECRET}", "be a URL such as"),
        ("https://${USERINFO}/score", "hold no user and no password"),
        ("https://host/${NOT_SET}", "name variables of the environment that are set"),
    ],
)
def test_what_is_refused_of_a_url_is_not_shown(url, words, monkeypatch):
    monkeypatch.setenv("SECRET", "sesame")
    monkeypatch.setenv("USERINFO", "me:sesame@host")
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ValueError, match=words) as caught:
        EndpointScorer(url)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "https://me:sesame@host/score",
            "https://host/s?key=sesame",
            "https://h/?a=1&x-token=sesame",
        ),
        *("https://host/s?API_KEY=sesame", "https://host/s?password=sesame#x"),
        *("https://host/v1/sesame1234567890abcdef", "https://host/v1/sk-1sesame234567890abcd/s"),
    ],
)
def test_a_recipe_holds_no_secret(url, tmp_path, capsys):
    reward = {"kind": "endpoint", "name": url}
    with pytest.raises(SettingsError, match=r"\$\{NAME\}") as caught:
        RewardConfig(**reward)
    assert "sesame" not in str(caught.value)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"reward": [reward]}))
    assert cli.main(["train", str(tmp_path / "recipe.yaml")]) == 2
    assert "sesame" not in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump({"reward": [reward]}))
    for other in "a", "b":  # of an older trl, or written by hand
        (tmp_path / other).mkdir()
        recipe = {"reward": [reward], "model": {"name": other}}
        (tmp_path / other / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "sesame" not in (tmp_path / "a" / "compare.html").read_text()
    RewardConfig(kind="endpoint", name="https://host/s?key=${KEY}&model=a&tokens=")


def test_what_is_hidden_and_masked(monkeypatch):
    assert hidden("https://a.b/c?d=e&keyword#f, x@y.z") == "https://a.b/c?d=e&keyword#f, x@y.z"
    assert hidden("at https://u:p@h/x: no") == "at https://…@h/x: no"
    for plain in (
        "https://host-7/v1/llama-3-8b-instruct/20250101/a1_b2",
        "/tmp/a1b2c3d4e5f6a7b8c9d0e1",
    ):
        assert hidden(plain) == plain
    assert (
        hidden("at https://h/v1/sk-abc123DEF456ghi789JKL0-x/s: no") == "at https://h/v1/sk-…/s: no"
    )
    monkeypatch.setenv("KEY", "a b/c")
    assert masked("k at /a b/c", ["https://h/${KEY}"]) == "k at /${KEY}"
    assert masked("a%20b%2Fc, a b/c, d", ["${KEY}", "plain"], ["d", "long"]) == "${KEY}, ${KEY}, d"
    assert filled("x${KEY}y$KEY", "name") == "xa b/cy$KEY"
    with pytest.raises(ValueError, match=r"got 'https://…@h'"):
        refuse("name", "be another", "'https://u:p@h'")


# -- what a terminal would take for orders ---------------------------------------------------------


def clean(text):
    return not any(sign in text for sign in ESCAPE if not sign.isalnum() and sign not in "]0;")


def test_texts_of_a_model_give_the_terminal_no_orders(capsys):
    rows = [{"prompt": f"a{ESCAPE}", "response": ESCAPE, "tokens": 1, "ended": True}]
    tools.show(rows, None)
    assert clean(capsys.readouterr().out)
    tools.show(rows, "-")
    line = capsys.readouterr().out
    assert clean(line)
    assert json.loads(line) == rows[0]


def test_a_folder_gives_the_terminal_no_orders(tmp_path, capsys):
    for name in ("a", "b" + ESCAPE.replace("/", "")):
        run = tmp_path / name
        run.mkdir()
        (run / "recipe.yaml").write_text(json.dumps({"model": {"name": name + ESCAPE}}))
        rows = [{"step": s, "prompt": ESCAPE, "response": ESCAPE, "reward": 1.0} for s in (0, 1)]
        (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [str(path) for path in tmp_path.iterdir()]
    assert cli.main(["compare", *runs]) == 0
    assert clean(capsys.readouterr().out)
    assert cli.main(["compare", *runs, f"none{ESCAPE}"]) == 2
    assert cli.main(["train", f"none{ESCAPE}"]) == 2
    assert clean(capsys.readouterr().err)


def test_samples_before_and_after_give_the_terminal_no_orders(tmp_path, capsys):
    from rich.console import Console

    from trl.report import before_after_tables, read_runs

    rows = [{"step": s, "prompt": ESCAPE, "response": ESCAPE, "reward": 1.0} for s in (0, 1)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Console(width=120).print(*before_after_tables(*read_runs([tmp_path])))
    told = capsys.readouterr().out
    assert "Samples" in told
    assert clean(told)


def test_what_a_tracker_says_when_it_fails_is_shown_as_text(tmp_path, monkeypatch):
    def broken(self):
        raise RuntimeError(f"http://me:sesame@host refused {ESCAPE}")

    monkeypatch.setattr(Trackers, "_tensorboard", broken)
    with pytest.warns(UserWarning, match="is given up") as caught:
        Trackers(["tensorboard"], out=tmp_path)
    told = str(caught[0].message)
    assert "sesame" not in told
    assert clean(told)
