"""The promises of the layout, kept by tests: layers, light imports, public names, dependencies."""

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import trl

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl"
SOURCES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "transformers", "accelerate", "numpy", "matplotlib", "rich", "datasets"}
MADE_LATE = {"pydantic", "yaml"}  # they come with the first configuration


def in_a_new_python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return result.stdout


def test_imports_follow_the_layers():
    result = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as f; f()"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout


def test_light_modules_do_not_load_heavy_ones():
    code = "import json, sys, trl, trl.config, trl.cli, trl.starter; "
    loaded = json.loads(in_a_new_python(code + "print(json.dumps(list(sys.modules)))"))
    assert not (HEAVY | MADE_LATE) & set(loaded)


def test_import_trl_is_instant():
    # CPU time: other work on the machine does not count
    code = "import time; t = time.process_time(); import trl; print(time.process_time() - t)"
    assert float(in_a_new_python(code)) < 0.15


def test_public_names_are_listed_lazy_and_found():
    assert set(trl.__all__) == set(trl._HOME) | {"__version__"}
    assert trl.__all__ == sorted(trl.__all__)
    assert {"Loop", "as_scorer"} <= set(trl.__all__)  # of loops of one's own
    assert set(trl.__all__) <= set(dir(trl))
    for name, home in trl._HOME.items():
        assert getattr(trl, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="no attribute 'PPOTrainr'"):
        trl.PPOTrainr  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == trl._HOME


def test_every_module_lists_only_names_it_has():
    for info in pkgutil.walk_packages(trl.__path__, "trl."):
        if info.name == "trl.__main__":
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", []):
            assert hasattr(module, name), f"{info.name}.__all__ names {name}, which is not there"


def test_public_functions_and_classes_have_docstrings():
    missing = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert missing == []


IMPORTED_AS = {"jinja2": "Jinja2", "yaml": "PyYAML"}
"""Names of packages that are imported under another."""


def test_declared_dependencies_are_the_imported_ones():
    imported = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").split(".")[0])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", line).group() for line in project["dependencies"]}
    # Imported where they are asked for; requests comes with wandb.
    extras = {"gguf", "peft", "mlflow", "pandas", "trackio", "datasets", "requests", "wandb"}
    extras |= {"jsonschema", "markupsafe", "math_verify"}  # markupsafe comes with Jinja2
    extras |= {"IPython", "ipywidgets"}  # which brings IPython along
    extras |= {"krippendorff", "markdown_it", "nh3", "starlette", "uvicorn"}
    imported = {IMPORTED_AS.get(name, name) for name in imported}
    assert declared == imported - set(sys.stdlib_module_names) - {"trl"} - extras


def test_constraints_pin_every_dependency_and_name_no_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [line for extra in project["optional-dependencies"].values() for line in extra]
    needed = {re.match(r"[\w-]+", line).group() for line in project["dependencies"] + optional}
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert needed <= {pin.split("==")[0] for pin in pins}
    assert "torch==2.13.0" in pins


def test_no_bucket_for_what_has_no_place():
    assert not [path for path in SOURCES if path.stem in ("utils", "helpers", "misc", "common")]


def test_the_trainer_never_asks_for_an_algorithm_by_name():
    assert not re.search(r"algorithm\s*(==|!=|in\b)", (PACKAGE / "ppo.py").read_text())


def test_package_holds_nothing_of_one_machine():
    for path in SOURCES:
        assert not re.search(r"\.\./shared|/home/|/root/", path.read_text()), path


def test_the_starter_models_fit_in_20_megabytes():
    files = [path for path in (PACKAGE / "starter").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20 * 2**20
