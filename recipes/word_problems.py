"""Make word problems in the form of GSM8K, for where the data set itself cannot be had.

    python recipes/word_problems.py made        writes made/train.jsonl and made/test.jsonl

As in GSM8K, `answer` is a solution in words: the sum of each step stands between << and >>, and the
number that is asked for at the end, after ####. They are far easier: five stories of two steps.
"""

import json
import operator
import random
import re
import sys
from pathlib import Path

NAMES = ["Ann", "Ben", "Chen", "Dora", "Emil", "Fatma", "Goran", "Hana", "Ivan", "Julia"]
WORKED_OUT = {"*": operator.mul, "+": operator.add, "-": operator.sub}
THINGS = ["apples", "books", "cards", "coins", "eggs", "marbles", "pens", "plums", "shells"]

# A question, and for each step of its solution: what comes before the sum, the sum, what follows.
STORIES = [
    (
        "{name} buys {a} boxes of {b} {thing} and gives away {c}. How many {thing} are left?",
        [("{name} buys ", "{a}*{b}", " {thing}."), ("There are ", "{0}-{c}", " left.")],
    ),
    (
        "{name} has {b} {thing}, and then finds {a} bags with {c} {thing} each. "
        "How many {thing} does {name} have now?",
        [("In the bags are ", "{a}*{c}", " {thing}."), ("{name} now has ", "{b}+{0}", ".")],
    ),
    (
        "A shop has {b} {thing} in the morning. It sells {c} of them and gets {a} more. "
        "How many {thing} does it have in the evening?",
        [("After the sale there are ", "{b}-{c}", "."), ("Then it has ", "{0}+{a}", ".")],
    ),
    (
        "{name} buys {c} {thing} for {a} dollars each, and pays with {paid} dollars. "
        "How many dollars does {name} get back?",
        [("They cost ", "{a}*{c}", " dollars."), ("{name} gets back ", "{paid}-{0}", ".")],
    ),
    (
        "{name} has {b} {thing}, and a friend has {a} times as many. "
        "How many {thing} do they have together?",
        [("The friend has ", "{a}*{b}", "."), ("Together they have ", "{b}+{0}", ".")],
    ),
]


def problem(rng: random.Random) -> dict[str, str]:
    """Return a question and its answer, as GSM8K writes them."""
    question, steps = rng.choice(STORIES)
    a, b, c = rng.randint(3, 12), rng.randint(20, 60), rng.randint(4, 19)
    given = {"a": a, "b": b, "c": c, "paid": a * c + rng.randint(1, 20)}
    given |= {"name": rng.choice(NAMES), "thing": rng.choice(THINGS)}
    found, lines = list[int](), list[str]()
    for before, term, after in steps:
        told = term.format(*found, **given)
        left, sign, right = re.split(r"([*+-])", told)
        found.append(WORKED_OUT[sign](int(left), int(right)))
        words = [before.format(**given), f"{told} = <<{told}={found[-1]}>>{found[-1]}"]
        lines.append("".join([*words, after.format(**given)]))
    answer = "\n".join([*lines, f"#### {found[-1]}"])
    return {"question": question.format(**given), "answer": answer}


def main(folder: str = "made", train: int = 1024, test: int = 128) -> None:
    """Write the two files; no question is in both."""
    rng, rows = random.Random(0), dict[str, dict[str, str]]()
    while len(rows) < train + test:
        row = problem(rng)
        rows[row["question"]] = row
    lines = [json.dumps(row) + "\n" for row in rows.values()]
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "train.jsonl").write_text("".join(lines[test:]))
    (Path(folder) / "test.jsonl").write_text("".join(lines[:test]))


if __name__ == "__main__":
    main(*sys.argv[1:2])
