"""A reward model of arguments: human preferences over topics it has not seen.

    python benchmarks/ukp.py DATA             each fold, then each point of the curve, that has no
                                              result yet, one after another
    python benchmarks/ukp.py --table          a Markdown table of the results
    python benchmarks/ukp.py DATA --only 0 1  those of some folds

DATA is the folder UKPConvArg1Strict-CSV of the corpus UKPConvArg1 (Habernal and Gurevych, ACL
2016, "Which argument is more convincing?", CC-BY,
https://github.com/UKPLab/acl2016-convincing-arguments): 11,650 pairs of arguments over 16 topics
with two stances each, and which of the two people found more convincing. There are four folds of
four topics each, both stances of a topic in one of them; a model is trained on three folds and
measured on the fourth. The model is all-MiniLM of examples/real_models/get.py, and reads the
argument alone. The curve has the first 100, 300, 1,000 and 3,000 pairs, in random order, of what is
trained on.

A result is a line of results/ukp.jsonl. A killed script goes on where its last fit stopped, in
--work. It computes with one thread; two of them, with other folds, keep two cores busy better than
one with two threads.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

from trl.config.recipe import RewardRecipe
from trl.training.classifier import LINE_BREAK

RESULTS = Path(__file__).parent / "results" / "ukp.jsonl"
MODEL = Path(os.environ.get("TRL_MODELS", "~/.cache/trl/models")).expanduser() / "minilm"
FOLDS = 4
CURVE = (100, 300, 1000, 3000)


def pairs(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Return the rows of each topic, of both stances."""
    topics: dict[str, list[dict[str, str]]] = {}
    for path in sorted(folder.glob("*.csv")):
        rows = topics.setdefault(path.stem.partition("_")[0], [])
        for line in path.read_text(encoding="utf-8").split("\n")[1:]:
            if line.strip():
                _, label, *arguments = LINE_BREAK.sub(" ", line).split("\t")
                chosen, rejected = arguments if label == "a1" else reversed(arguments)
                rows.append({"chosen": chosen, "rejected": rejected})
    return topics


def write_fold(folder: Path, fold: int, work: Path) -> dict[str, str]:
    """Write the two files of a fold, and return their names as settings."""
    topics = pairs(folder)
    held_out = sorted(topics)[fold::FOLDS]
    files = {}
    for part in ("train", "test"):
        rows = [
            row
            for topic in topics
            for row in topics[topic]
            if (topic in held_out) == (part == "test")
        ]
        files[part] = work / f"{part}-{fold}.jsonl"
        files[part].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {part: str(path) for part, path in files.items()}


def fit(folder: Path, fold: int, count: int | None, work: Path) -> dict[str, Any]:
    """Train and measure in a folder of its own; a fit that was stopped goes on."""
    import torch

    from trl.training.reward import train_reward

    torch.set_num_threads(1)
    out = work / f"fold-{fold}-{count or 'all'}"
    files = write_fold(folder, fold, work)
    recipe = RewardRecipe(
        model=str(MODEL),
        out=str(out),
        limit=count,
        epochs=2.0,
        batch_size=16,
        learning_rate=5e-5,
        log_every=25,
        **files,
    )
    if not (out / "summary.json").is_file():
        train_reward(recipe, resume=True)
    told = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    shutil.rmtree(out / "reward_model", ignore_errors=True)
    return {"fold": fold, "limit": count} | told


def results() -> list[dict[str, Any]]:
    """Return what there is."""
    if not RESULTS.is_file():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the folds with their mean, and the curve, as Markdown."""
    whole = sorted((row for row in rows if row["limit"] is None), key=lambda row: row["fold"])
    lines = [
        "| fold | pairs | accuracy | 95 % interval | longer wins | lengths differ by < 20 % "
        "| longer wins there | calibration error | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    columns = []
    for row in whole:
        near = row["like_length"]["accuracy"]
        figures = [row["accuracy"], row["length_rule"], near, row["like_length_rule"], row["ece"]]
        columns.append(figures)
        a, b, c, d, e = (f"{figure:.3f}" for figure in figures)
        low, high = (f"{end:.3f}" for end in row["interval"])
        told = [str(row["fold"] + 1), f"{row['decided']:,}", a, f"{low} to {high}", b, c, d, e]
        lines.append(f"| {' | '.join(told)} | {row['train_seconds'] / 60:.0f} |")
    if whole:
        a, b, c, d, e = (f"{statistics.mean(column):.3f}" for column in zip(*columns, strict=True))
        lines.append(f"| mean | | {a} | | {b} | {c} | {d} | {e} | |")
    lines += ["", "| pairs to train on | folds | accuracy |", "|---|---|---|"]
    for count in (*CURVE, None):
        found = [row["accuracy"] for row in rows if row["limit"] == count]
        if found:
            name = f"{count:,}" if count else "all"
            lines.append(f"| {name} | {len(found)} | {statistics.mean(found):.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Run what has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, nargs="?", help="the folder UKPConvArg1Strict-CSV")
    parser.add_argument("--only", type=int, nargs="+", default=range(FOLDS), help="folds, from 0")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/trl/ukp").expanduser())
    parser.add_argument("--table", action="store_true", help="show the results")
    options = parser.parse_args()
    if options.table:
        print(table(results()))
        return
    if options.data is None:
        parser.error("name the folder UKPConvArg1Strict-CSV")
    options.work.mkdir(parents=True, exist_ok=True)
    for count in (None, *CURVE):
        for fold in options.only:
            if not any((row["fold"], row["limit"]) == (fold, count) for row in results()):
                row = fit(options.data, fold, count, options.work)
                with RESULTS.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
