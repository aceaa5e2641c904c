"""A recipe is data until its reader says otherwise: what of it runs, and by whose word."""

import hashlib
import json
import sys

import pytest

from trl import cli
from trl.config import SettingsError
from trl.config.code import flags_to_go_on, names_of
from trl.config.recipe import ModelConfig, Recipe, RewardConfig
from trl.training.named import load_function

CODE = "open({mark!r}, 'w').close()\ndef one(texts): return [1.0] * len(texts)\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a recipe and a file of code beside it; we stand in another folder."""
    (tmp_path / "theirs" / "deep").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for folder in ("theirs", "theirs/deep", "here", "."):
        code = CODE.format(mark=str(tmp_path / "ran"))
        (tmp_path / folder / f"mine_{len(folder)}.py").write_text(code)
    (tmp_path / "here" / "texts.txt").write_text("A film.\n")
    return tmp_path


def score(place, name, *flags):
    """Return what `trl score` makes of a recipe with a function of that name."""
    reward = [{"kind": "function", "name": name}]
    (place / "theirs" / "recipe.yaml").write_text(json.dumps({"reward": reward}))
    recipe = str(place / "theirs" / "recipe.yaml")
    return cli.main(["score", "texts.txt", "--recipe", recipe, "--out", "-", *flags])


@pytest.mark.parametrize("name", ["mine_6.py:one", "deep/mine_11.py:one", "rewards.py:word_the"])
def test_code_beside_a_recipe_and_what_ships_runs(place, name, capsys):
    assert score(place, name) == 0
    assert '"score"' in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        *("subprocess:call", "os.path:exists", "trl.evaluation:score", "mine_6:one"),
        *("../mine_1.py:one", "{place}/here/mine_4.py:one", "mine_4.py:one", "link.py:one"),
    ],
)
@pytest.mark.parametrize("command", ["score", "train"])
def test_nothing_else_runs_by_the_word_of_a_recipe(place, name, command, capsys):
    (place / "theirs" / "link.py").symlink_to(place / "mine_1.py")
    name = name.format(place=place)
    if command == "score":
        assert score(place, name) == 2
    else:
        recipe = {"reward": [{"kind": "function", "name": name}], "quiet": True}
        (place / "theirs" / "recipe.yaml").write_text(json.dumps(recipe))
        assert cli.main(["train", str(place / "theirs" / "recipe.yaml"), "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert "`reward[0].name` must name a function, or a class, of a file beside" in error
    assert repr(name) in error
    assert "--trust " in error
    assert error.count("\n") == 1
    assert not (place / "ran").exists()


@pytest.mark.parametrize(
    ("name", "trust"),
    [
        ("../mine_1.py:one", "../mine_1.py"),
        ("mine_4.py:one", "mine_4.py"),
        ("mine_4:one", "mine_4"),
        ("here.mine_4:one", "here"),
    ],
)
def test_what_the_reader_names_runs(place, name, trust, monkeypatch):
    monkeypatch.syspath_prepend(place)
    for module in ("here", "here.mine_4", "mine_4"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert score(place, name, "--trust", "json", "--trust", trust) == 0
    assert (place / "ran").exists()
    assert score(place, name, "--trust", "her", "--trust", "mine") == 2


def test_without_a_recipe_files_that_the_reader_types_run_and_modules_need_their_word(
    place, capsys
):
    def scored(name, *flags):
        reward = f"[{{kind: function, name: {name!r}}}]"
        return cli.main(["score", "texts.txt", "--reward", reward, "--out", "-", *flags])

    assert scored("subprocess:call") == 2
    assert "--trust subprocess to run it" in capsys.readouterr().err
    assert scored("mine_4.py:one") == 0
    assert scored("../mine_1.py:one") == 2
    assert scored("math:fsum", "--trust", "math") != 0  # which is run, and is no reward


def test_code_is_listed_with_what_it_imports_before_it_runs(place, capsys):
    code = b"import json, helper\ndef one(texts): return [1.0] * len(texts)\n"
    (place / "theirs" / "listed.py").write_bytes(code)
    (place / "theirs" / "helper.py").write_text("raise RuntimeError('from the helper')")
    (place / "theirs" / "unused.py").write_text("")
    with pytest.raises(RuntimeError, match="from the helper"):  # a bug of theirs
        score(place, "listed.py:one")
    lines = capsys.readouterr().err.splitlines()
    digest = hashlib.sha256(code).hexdigest()
    file = (place / "theirs" / "listed.py").resolve()
    assert lines[0] == f"trl: runs {file} ({len(code)} bytes, SHA-256 {digest})."
    assert "theirs/helper.py (" in lines[1]
    assert len(lines) == 2
    assert score(place, "rewards.py:word_the") == 0
    assert capsys.readouterr().err == ""  # it ships with trl


def test_what_was_listed_is_what_runs(place):
    import os
    import py_compile

    file, other = place / "theirs" / "listed.py", place / "other.py"
    file.write_text("def one(texts): return [1.0] * len(texts)\n")
    other.write_text(CODE.format(mark=str(place / "ran")))
    cache = place / "theirs" / "__pycache__" / f"listed.{sys.implementation.cache_tag}.pyc"
    os.makedirs(cache.parent)
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(other), str(cache), invalidation_mode=mode)
    assert score(place, "listed.py:one") == 0
    assert not (place / "ran").exists()


def test_the_code_of_a_model_runs_by_the_word_of_its_reader_alone(place, capsys):
    (place / "theirs" / "recipe.yaml").write_text("model: {name: a/b, trust_remote_code: true}")
    recipe = str(place / "theirs" / "recipe.yaml")
    assert cli.main(["train", recipe, "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert "`model.trust_remote_code` must be a word of who reads the recipe too" in error
    assert "look at the code of a/b, and add --model.trust-remote-code to run it." in error
    flags = [("model.trust_remote_code", "true")]
    assert cli.read_recipe(recipe, flags).model.trust_remote_code


def test_a_program_says_which_modules_may_run():
    with pytest.raises(SettingsError, match=r"`reward\[0\]\.name` .* 'subprocess:call'"):
        load_function("subprocess:call", "reward[0].name", trust=["sub", "subprocess.x"])
    assert load_function("json.decoder:scanstring", "x", trust=["json"])


def test_how_a_run_goes_on_names_its_code_again(tmp_path):
    rewards = tuple(
        RewardConfig(kind="function", name=name)
        for name in ("/a b/mine.py:f", f"{tmp_path}/own.py:f", "m.n:f", "/a b/mine.py:g")
    )
    recipe = Recipe(reward=rewards, model=ModelConfig(trust_remote_code=True))
    told = flags_to_go_on(recipe, tmp_path)
    assert told == " --trust '/a b/mine.py' --trust m.n --model.trust-remote-code"
    assert flags_to_go_on(Recipe(), tmp_path) == ""


@pytest.mark.parametrize(
    "text", ["def right(texts): return texts", "right = print\nimport os as o"]
)
def test_a_function_that_a_file_lacks_is_told_before_it_runs(place, capsys, text):
    (place / "theirs" / "mine.py").write_text(f"{text}\nopen('ran', 'w')\n")
    (place / "theirs" / "recipe.yaml").write_text("reward: [{kind: function, name: mine.py:rihgt}]")
    assert cli.main(["train", str(place / "theirs" / "recipe.yaml"), "--print-config"]) == 2
    told = capsys.readouterr().err
    assert "`reward[0].name` must name a function of" in told
    assert "which has no function 'rihgt'. Did you mean `right`?" in told
    assert not list(place.glob("**/ran"))


def test_names_that_only_running_tells_are_left_to_it(tmp_path):
    for text in ("from os import *", "def __getattr__(name): ...", "def x(:", "\0"):
        (tmp_path / "mine.py").write_text(text)
        assert names_of(tmp_path / "mine.py") == set()
    assert names_of(tmp_path / "none.py") == set()
    (tmp_path / "mine.py").write_text("import a.b as c\nfrom d import e\nif c: f = 1\nclass G: ...")
    assert {"c", "e", "f", "G"} <= names_of(tmp_path / "mine.py")


def test_of_the_code_of_a_script_a_command_says_where_to_go_on(place, capsys):
    (place / "theirs" / "recipe.yaml").write_text("reward: [{kind: function, name: '__main__:f'}]")
    recipe = str(place / "theirs" / "recipe.yaml")
    for trust in ([], ["--trust", "__main__"]):
        assert cli.main(["train", recipe, *trust]) == 2
        told = capsys.readouterr().err
        assert "got '__main__:f', of the Python script that made the run: go on in that" in told
