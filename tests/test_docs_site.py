"""The documentation is right: its Python runs, what it names exists, and the site builds.

The pages of the site, the five programs in examples/, and the guide for code of old releases, whose
changes turn an old script into one that runs here.
"""

import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import trl
from trl import evaluation, starter
from trl.config import OLD_SPELLINGS, PPOConfig, paths
from trl.config.recipe import ClassifierRecipe, Recipe, RewardRecipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SCRIPTS = ROOT / "tests/data/moving"
NAMES = [page.relative_to(DOCS).as_posix() for page in PAGES]
BLOCK = re.compile(r"^```(python[^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft
}


def load_hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load_hooks()


def run(arguments, folder):
    """Run Python on the arguments; return what it printed."""
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    return result.stdout


# -- the pages -----------------------------------------------------------------------------------


def blocks(page):
    """The Python blocks of a page that are to run."""
    found = BLOCK.findall(page.read_text())
    assert {kind for kind, _ in found} <= {"python", "python no-run"}, page
    return [code for kind, code in found if kind == "python"]


# Runs the pages one after the other, each in a folder and a namespace of its own.
RUNNER = """
import contextlib, io, json, os, sys, traceback, warnings
import torch
from trl.report import page

torch.set_num_threads(1)
page.draw = lambda chart, png: ("<svg></svg>", [{} for _ in chart.panels])  # charts take seconds
pages, told = json.load(open("pages.json")), {}
home = os.getcwd()
for name, (code, arguments) in pages.items():
    os.makedirs(os.path.join(home, name))
    os.chdir(os.path.join(home, name))
    torch.manual_seed(0)
    problem, printed, sys.argv = "", io.StringIO(), [name, *arguments]
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always", UserWarning)
        try:
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
        except BaseException:
            problem = traceback.format_exc()
    told[name] = [printed.getvalue(), problem, *(str(warning.message) for warning in warned)]
json.dump(told, open(os.path.join(home, "told.json"), "w"))
"""
WITH_PYTHON = [name for name, page in zip(NAMES, PAGES, strict=True) if blocks(page)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Where the blocks of the pages, and the new script of the guide, were run in order."""
    folder = tmp_path_factory.mktemp("pages")
    code = {name: ("\n".join(blocks(DOCS / name)), []) for name in WITH_PYTHON}
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(starter.prompts("train")[:40]) + "\n")
    models = [str(starter.LANGUAGE_MODEL), str(starter.CLASSIFIER)]
    code["new.py"] = (SCRIPTS / "new.py").read_text(), [*models, str(prompts), "2", "tuned"]
    (folder / "pages.json").write_text(json.dumps(code))
    run(["-c", RUNNER], folder)
    return folder


@pytest.fixture(scope="module")
def told(ran):
    """What each of them said: what it printed, its error, and its warnings."""
    return json.loads((ran / "told.json").read_text())


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_of_a_page_runs_in_order(name, told):
    _, problem, *warned = told[name]
    assert not problem, problem
    assert warned == []


def test_few_blocks_are_left_out():
    every = [kind for page in PAGES for kind, _ in BLOCK.findall(page.read_text())]
    assert len(every) > 20
    assert every.count("python no-run") <= 3


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_page_lead_to_pages(name):
    page = DOCS / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            found = page.parent / path if path else page
            assert found.is_file(), f"{name}: {target}"
            assert not anchor or anchor in anchors(found), f"{name}: {target}"


def anchors(page):
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w]+", "-", title.lower()).strip("-") for title in titles}


def test_every_page_is_in_the_navigation():
    def files(entries):
        for entry in entries:
            for value in entry.values():
                yield from files(value) if isinstance(value, list) else [value]

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(files(config["nav"])) == NAMES


def test_files_that_pages_name_exist():
    roots = "trl|tests|docs|examples|recipes|benchmarks"
    for page in PAGES:
        for path in re.findall(rf"`((?:{roots})/[\w./-]+)(?:::[\w.]+)?`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_every_function_and_test_of_the_details_exists():
    named = re.findall(r"`((?:trl|tests)/[\w/]+\.py)::([\w.]+)`", (DOCS / "details.md").read_text())
    assert len(named) > 60
    for path, name in named:
        *outer, last = name.split(".")
        source = (ROOT / path).read_text()
        if outer:
            assert re.search(rf"^class {outer[0]}\b", source, re.MULTILINE), (path, name)
        indent = "    " if outer else ""
        assert re.search(rf"^{indent}(def|class) {last}\b", source, re.MULTILINE), (path, name)


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", line).group() for line in project["dependencies"]}
    table = (DOCS / "design.md").read_text().split("## Dependencies")[1]
    assert set(re.findall(r"^\| `([\w-]+)` \| \w", table, re.MULTILINE)) == declared


# -- what the site is made of ----------------------------------------------------------------------


def test_every_setting_stands_in_the_tables():
    for cls in (Recipe, ClassifierRecipe, RewardRecipe):
        rows = re.findall(r"^\| `([\w.]+)` \|", hooks.made("settings", cls.__name__), re.MULTILINE)
        assert sorted(rows) == sorted(setting.path for setting in paths(cls))


def test_a_text_in_a_table_stays_on_its_line_and_is_no_markup():
    assert hooks.cell("a | b\n`x_y|` *c* d_e <f>") == r"a \| b `x_y\|` \*c\* d\_e \<f>"


def test_cells_know_their_column_and_long_names_may_break():
    table = "<table><tr><th>a &amp; b</th><th></th></tr><tr><td>{}</td>\n<td>2</td></tr></table>"
    long = "<code>trl/ppo.py::PPOTrainer</code>"
    page = hooks.on_page_content(table.format(long), None, None, None)
    assert page == (
        "<table><tr><th>a &amp; b</th><th></th></tr><tr>"
        '<td data-label="a &amp; b"><code>trl/<wbr>ppo.<wbr>py::<wbr>PPOTrainer</code></td>\n'
        '<td data-label="">2</td></tr></table>'
    )
    assert hooks.on_page_content("<p>trl/ppo.py</p>", None, None, None) == "<p>trl/ppo.py</p>"


def asked_for(page, what):
    """What the comments of a page name."""
    text = (DOCS / page).read_text()
    return re.findall(rf"^<!-- {what} (.+) -->$", text, re.MULTILINE)


def test_every_recipe_is_shown_once_with_its_facts():
    every = [path.stem for path in (ROOT / "recipes").glob("*.yaml")]
    names = " ".join(asked_for("recipes.md", "recipes")).split()
    assert sorted(names) == sorted(every)
    page = hooks.made("recipes", " ".join(names))
    assert re.findall(r"^### (.+)$", page, re.MULTILINE) == names
    for path in (ROOT / "recipes").glob("*.yaml"):
        own = page.split(f"### {path.stem}\n")[1].split("\n### ")[0]
        assert f"    trl train {path.stem}" in own
        assert re.findall(r"^\* \*\*(\w+)\*\*", own, re.MULTILINE) == ["hardware", "time", "result"]


def test_every_public_name_stands_once_in_the_api():
    made = "\n".join(hooks.made("api", each) for each in asked_for("api.md", "api"))
    names = re.findall(r"^::: (trl\.\S+)$", made, re.MULTILINE)
    assert sorted(name for name in names if name.rpartition(".")[2] in trl._HOME) == sorted(
        f"{home}.{name}" for name, home in trl._HOME.items()
    )


def test_the_names_of_the_api_are_where_it_says():
    of_trl, others = (DOCS / "api.md").read_text().split("\n## Core")
    asked = [re.findall(r"^<!-- api (.+) -->$", part, re.MULTILINE) for part in (of_trl, others)]
    made = ["\n".join(map(hooks.api, each)) for each in asked]
    first, every = (
        re.findall(r"^::: (\S+)$", text, re.MULTILINE) for text in (made[0], "\n".join(made))
    )
    parts = [each.rpartition(".") for each in every]
    assert {each.rpartition(".")[2] for each in first} == set(trl._HOME)
    assert all(hasattr(trl, each.rpartition(".")[2]) for each in first)
    assert all(hasattr(importlib.import_module(module), name) for module, _, name in parts)
    scorers = {name for module, _, name in parts if module == "trl.evaluation"}
    assert scorers == set(evaluation.__all__) - {"CHECKS"}


def test_included_texts_are_relinked():
    text = "[a](docs/metrics.md) [b](trl/ppo.py) [c](https://x.org) [d](#top)"
    assert hooks.relinked(text, "README.md", "../") == (
        "[a](../metrics.md) `trl/ppo.py` [c](https://x.org) d"
    )
    assert "import-linter" in hooks.included("CONTRIBUTING.md", "## Layers")
    with pytest.raises(ValueError, match="README.md has no heading '## Sped'"):
        hooks.included("README.md", "## Sped")


def test_a_notebook_becomes_a_page(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["# A `title`\n", "text"]},
        {
            "cell_type": "code",
            "source": ["1 + 1"],
            "outputs": [
                {"output_type": "execute_result", "data": {"text/plain": ["2"]}},
                {"output_type": "display_data", "data": {"image/png": "iVBO\nRw0"}},
            ],
        },
    ]
    path = tmp_path / "00-a.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    assert hooks.title_of(path) == "A title"
    assert hooks.notebook_page(path) == (
        "# A `title`\ntext\n\n```python\n1 + 1\n```\n\n```text\n2\n```\n\n"
        '<img alt="Output of the cell above" src="data:image/png;base64,iVBORw0">'
    )


def test_an_output_that_is_a_table_is_one_on_the_page():
    table = {"text/html": ["<table>\n\n", "<tr></tr></table>"], "text/plain": ["<HTML object>"]}
    assert hooks.shown_output({"data": table}) == "<table>\n<tr></tr></table>"


def test_links_from_a_notebook_lead_to_pages():
    text = "[b](02-ppo.ipynb#9-Learning) [c](../docs/howto/reward.md) [d](index.ipynb) [e](run.py)"
    assert hooks.relinked(text, "notebooks/00-core.ipynb", "../") == (
        "[b](../notebooks/02-ppo.md) [c](../howto/reward.md) `notebooks/index.ipynb` "
        "`notebooks/run.py`"
    )
    text = "![a](../docs/demo.png)"
    assert hooks.relinked(text, "notebooks/00-core.ipynb", "../") == "![a](../demo.png)"


class Requests(HTMLParser):
    """Collects what a browser fetches to show a page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        wanted = "href" if tag == "link" else "src"
        if tag != "a":
            self.found += [value for name, value in attrs if name == wanted and value]


def test_the_site_builds_and_asks_nothing_of_the_outside(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT,
        env=ENVIRONMENT | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        parser = Requests()
        parser.feed(text)
        outside = [url for url in parser.found if re.match(r"(https?:)?//", url)]
        assert outside == [], page
        assert not COMMENT_LEFT.search(text), page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text()), sheet


COMMENT_LEFT = re.compile(r"<!-- (settings|recipes|api|include)\b")


# -- examples --------------------------------------------------------------------------------------

STEPS = {"custom_reward": 6, "llama": 40, "lora": 6, "resume": 2, "rloo": 6}


def test_every_example_is_run_and_short():
    scripts = {path.stem: path for path in (ROOT / "examples").glob("*.py")}
    del scripts["ppo_in_one_page"]  # test_examples.py
    assert scripts.keys() == STEPS.keys()
    for path in scripts.values():
        text = path.read_text()
        assert len(text.splitlines()) < 80
        assert re.search(r"^ +assert ", text, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_an_example_checks_its_own_result(name, tmp_path):
    if name == "lora":
        pytest.importorskip("peft")
    run([str(ROOT / "examples" / f"{name}.py"), "--steps", str(STEPS[name])], tmp_path)


# -- coming from elsewhere -------------------------------------------------------------------------


def test_settings_that_stand_beside_those_of_others_exist():
    """In the right column: fields of PPOConfig, of a recipe, parameters of `train`, flags."""
    page = (DOCS / "howto/coming.md").read_text()
    known = OURS | {"data.chat_template_kwargs", "--resume", "peft_config"}
    known |= {setting.path for setting in paths(Recipe)}
    known |= {*inspect.signature(trl.train).parameters, *inspect.signature(trl.Sampler).parameters}
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:4]:
        for _, ours in table(part):
            for code in re.findall(r"`([^`]+)`", ours.split("goes away")[0]):
                name = re.match(r"(?:[a-z][\w.]*|--[a-z]+)(?=$|[:=])", code)
                assert not name or name[0] in known | NO_SETTINGS, code


NO_SETTINGS = {
    *("sequence", "rloo", "dr_grpo"),  # values beside the first one
    *("prompts", "completions", "completion_ids", "log_metric", "log_extra", "texts", "queries"),
    *("episodes", "answer", "datasets.Dataset"),
}

# -- moving from old releases ----------------------------------------------------------------------

GUIDE = (ROOT / "docs/moving.md").read_text()

# The fields of PPOConfig of trl 0.11.4, and those that trl.experimental.ppo of 1.12.0 adds to
# TrainingArguments, in the order of their sources.
OF_0_11 = """
    exp_name seed log_with task_name model_name query_dataset reward_model remove_unused_columns
    tracker_kwargs accelerator_kwargs project_kwargs tracker_project_name push_to_hub_if_best_kwargs
    steps learning_rate adap_kl_ctrl init_kl_coef kl_penalty target horizon gamma lam cliprange
    cliprange_value vf_coef batch_size forward_batch_size mini_batch_size
    gradient_accumulation_steps world_size ppo_epochs max_grad_norm optimize_cuda_cache
    optimize_device_cache early_stopping target_kl compare_steps ratio_threshold use_score_scaling
    use_score_norm score_clip whiten_rewards gradient_checkpointing is_encoder_decoder is_peft_model
    backward_batch_size global_backward_batch_size global_batch_size dataset_num_proc
""".split()
OURS = {entry.name for entry in fields(PPOConfig)}


def section_of(title):
    """The text below a heading, up to the next one of its level or above."""
    level = title.split()[0]
    text = GUIDE.split(f"\n{title}\n", 1)[1]
    return re.split(rf"^#{{1,{len(level)}}} ", text, maxsplit=1, flags=re.MULTILINE)[0]


def table(text):
    """The cells of the first table of a text, without its head."""
    lines = re.search(r"^\|.*?(?=\n\n|\Z)", text, re.DOTALL | re.MULTILINE).group().splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def moved(script):
    """The script with the changes of the guide."""
    for old, new in table(section_of("### The same script, before and after")):
        (wanted,) = re.findall(r"`(.*)`", old)
        found = re.findall(rf"^( *){re.escape(wanted)}\n", script, re.MULTILINE)
        assert len(found) == 1, wanted
        lines = [] if new == "(delete)" else re.fullmatch("`(.*)`", new).group(1).split("`<br>`")
        put = "".join(f"{found[0]}{line}\n" for line in lines)
        script = script.replace(f"{found[0]}{wanted}\n", put)
    return script


def test_the_changes_of_the_guide_make_the_new_script_of_the_old_one():
    assert moved((SCRIPTS / "old.py").read_text()) == (SCRIPTS / "new.py").read_text()


def test_the_new_script_runs_and_saves_a_policy(ran, told):
    printed, problem, *warned = told["new.py"]
    assert not problem, problem
    assert warned == []
    assert re.findall(r"step (\d): reward (\S+), KL (\S+)", printed)[1][0] == "1"
    assert trl.CausalLMWithValueHead.from_pretrained(ran / "new.py" / "tuned").v_head is not None


def test_every_field_of_the_old_config_has_a_row():
    rows = table(section_of("### `PPOConfig`"))
    told = [name for old, _ in rows for name in re.findall(r"`([a-z_]+)(?:=[^`]*)?`", old)]
    assert set(told) == set(OF_0_11)
    marked = {name for old, _ in rows if "†" in old for name in re.findall(r"`(\w+)`", old)}
    assert marked == set(OLD_SPELLINGS) - {"lr"}
    for old, new in rows:
        names = re.findall(r"`([a-z_]+)(?:=[^`]*)?`", old)
        if new == "unchanged":
            assert set(names) <= OURS
        elif "†" in old:
            assert OLD_SPELLINGS[names[0]] in new


def test_settings_that_the_guide_names_exist():
    known = OURS | {setting.path for setting in paths(Recipe)} | {"PPOTrainer"}
    for heading in ("### `PPOConfig`", "## From `trl.experimental.ppo` of 1.x"):
        for _, new in table(section_of(heading)):
            if new.startswith(("`", "unchanged")) and "trl" not in new:
                for name in re.findall(r"`([a-z_.]+)(?:=[^`]*)?`", new.split(":")[0])[:1]:
                    assert name in known | {"max_new_tokens", "eos_token_id"}, new


def test_old_names_are_understood_or_refused_as_the_guide_says():
    with pytest.raises(TypeError, match="no field `mini_batch_size`. Did you mean `minibatch_siz"):
        PPOConfig(mini_batch_size=8)
    with pytest.raises(TypeError, match="kl_penalty"):
        PPOConfig(kl_penalty="full")
    config = PPOConfig.from_kwargs(mini_batch_size=8, lam=0.9, target=3.0, adap_kl_ctrl=False)
    assert (config.minibatch_size, config.gae_lambda, config.kl_target) == (8, 0.9, 3.0)
    model = trl.CausalLMWithValueHead.from_pretrained(starter.LANGUAGE_MODEL)
    with pytest.raises((TypeError, ValueError), match="`model` must"):
        trl.PPOTrainer(config, model)
