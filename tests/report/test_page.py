import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from rich.console import Console

from tests.conftest import undrawn
from tests.training.run_folders import ENTROPY, HOSTILE, KL_NEGATIVE, make_run, write_lines
from trl.report import compare, write_report
from trl.report.page import visible

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EMPTY = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Page(HTMLParser):
    """Checks that tags close in order, and keeps tags, attributes, ids, texts and scripts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.values, self.ids = [], [], [], []
        self.text, self.scripts, self.styles = "", "", ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.values += [(name, value or "") for name, value in attributes]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts += data
        elif self.open[-1:] == ["style"]:
            self.styles += data
        else:
            self.text += data


def page_of(path):
    return Page(path.read_text(encoding="utf-8"))


def needs_nothing_else(page):
    for name, value in page.values:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert value.startswith(("#", "data:")), (name, value)
        if name not in ("content", "aria-label", "data-hover"):
            assert not re.search(r"url\((?!#)", value), (name, value)
        assert not name.startswith("on")
    assert not {"iframe", "object", "embed", "base", "form", "img"} & set(page.tags)
    for code in (page.scripts, page.styles):
        assert not re.search(r"https?:|//[a-z]|@import|url\(|\bimport\b|fetch\(|XMLHttp", code)
    assert len(page.ids) == len(set(page.ids))
    ours = {value.removeprefix("#") for name, value in page.values if name == "href"} - {"data:,"}
    assert ours <= set(page.ids)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return [
        make_run(runs / "ppo", steps=300, eval_every=25, warnings=KL_NEGATIVE, prompts=64),
        make_run(
            runs / "rloo", steps=18, total=30, algorithm="rloo", learning_rate=3e-5, finished=False
        ),
        make_run(runs / "two", steps=25, scorers=("sentiment", "short"), warnings=ENTROPY),
    ]


@pytest.fixture(scope="module")
def one(folders, tmp_path_factory):
    return write_report(folders[:1], tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def three(folders, tmp_path_factory):
    return write_report(folders, tmp_path_factory.mktemp("three") / "comparison.html")


def test_report_of_one_run(one):
    page = page_of(one)
    needs_nothing_else(page)
    assert one.name == "report.html"
    for part in ("ppo", "gpt2", "300 steps", "18 min", "kl negative", "step 12"):
        assert part in page.text
    for part in ("mean reward", "+0.10", "explained variance", "I saw film number 0", "great"):
        assert part in page.text or part.capitalize() in page.text
    assert "on 64 of 64 prompts" in page.text
    assert "ppo.learning_rate" in page.text
    assert "1.41e-05" in page.text
    assert "metadata" not in page.tags
    assert page.tags.count("figure") == page.tags.count("figcaption") == 14
    assert page.text.index("kl negative") < page.text.index("mean reward")
    pictures = sorted(path.name for path in (one.parent / "report").iterdir())
    assert len(pictures) == 14
    assert all(
        (one.parent / "report" / name).read_bytes().startswith(b"\x89PNG") for name in pictures
    )


def test_every_mark_in_the_samples_is_a_listed_word(one):
    marks = set(re.findall(r'<mark class="up">(.*?)</mark>', one.read_text())) - {
        "more",
        "more often",
    }
    assert {"great", "lovely", "wonderful", "heart", "happy"} >= marks >= {"great"}


def test_report_of_three_runs(three):
    page = page_of(three)
    needs_nothing_else(page)
    assert three.name == "comparison.html"
    assert (three.parent / "comparison" / "kl.png").is_file()
    for part in ("3 runs", "18 of 30 steps, not finished", "Settings that differ", "kl negative"):
        assert part in page.text
    assert "None were recorded." in page.text
    assert "summary.json is missing" in page.text
    assert "scored by different rewards" in page.text
    assert [name for name in page.ids if name.startswith("show")] == ["show0", "show1", "show2"]
    differing = page.text[page.text.index("Settings that differ") : page.text.index("Warnings")]
    parts = ("held-out reward", "Settings that differ", "Held-out prompts", "Charts")
    assert [*map(page.text.index, parts)] == sorted(map(page.text.index, parts))
    assert ("data-run", "rloo") in page.values  # what a cell is of, where there is no head
    assert "ppo.learning_rate" in differing
    assert "ppo.batch_size" not in differing
    assert "out" not in differing.split()


def test_a_report_is_small(one):
    assert one.stat().st_size < 600_000


def test_a_long_run_is_no_larger(tmp_path):
    rows = [
        {"step": s, "reward/mean": s % 7, "reward/std": 1, "objective/kl": s} for s in range(9_000)
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    path = write_report([tmp_path], tmp_path)
    assert path.stat().st_size < 200_000
    assert "means over blocks of steps" in page_of(path).text


def hostile_run(folder):
    make_run(folder, steps=2, prompts=1)
    bad = "<b>x</b></script><script>alert(3)</script>\x00\ud800{{ 1 }}$"
    write_lines(
        folder / "samples.jsonl",
        [
            {"step": s, "prompt": text, "response": f"{text} {s}", "parts": {bad: 1, "b": 2}}
            | {"notes": {bad: bad, "answer": "n" * 500, "none": ""}}
            for s in (0, 2)
            for text in HOSTILE
        ],
    )
    write_lines(
        folder / "warnings.jsonl",
        [{"step": 1, "name": bad, "seen": bad, "causes": [bad], "fix": bad}],
    )
    (folder / "recipe.yaml").write_text(f"name: {json.dumps('<i>' + HOSTILE[0])}\nmodel: '<u>m'\n")
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write(
            json.dumps({"step": 3, f"reward/{bad}": 1, "reward/_b": 2, f"held_out/{bad}": 3})
        )
    return folder


@pytest.mark.parametrize("count", [1, 2])
def test_hostile_texts_are_shown_as_text(tmp_path, count):
    runs = [hostile_run(tmp_path / f"<s>run{number} & 'co'") for number in range(count)]
    path = write_report(runs, tmp_path)
    text = path.read_text(encoding="utf-8")
    page = page_of(path)
    needs_nothing_else(page)
    assert page.tags.count("script") == 1
    assert not {"b", "i", "u", "s"} & set(re.findall(r"<(\w+)>(?:x|<|m|run)", text))
    assert "alert" not in page.scripts
    assert (
        "<script>alert(1)</script> & <img src=x onerror=alert(2)> {{ 7 * 7 }} **bold**" in page.text
    )
    for named in ("‹U+0000›", "‹U+001B›", "‹U+202E›", "half � of"):
        assert named in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text)
    for shown in ("مرحبا", "😀 👩‍👩‍👧‍👦", "]]> --> </textarea></style></svg>", "<u>m"):
        assert shown in page.text
    assert "(18,500 more characters)" in page.text
    assert f"answer: {'n' * 200} … (300 more characters)" in page.text
    assert "none:" not in page.text
    assert len(re.findall("(?:long){400,}", page.text)) == 0


CHAT = [
    {"role": "system", "content": "Be <b>brief</b>."},
    {"role": "user", "content": "Name a river."},
]


def make_chat_run(folder):
    """A run whose prompts are chats, with a warning that names settings."""
    fix = "Lower `ppo.init_kl_coef`, or <i>`a`"
    make_run(folder, steps=2, prompts=8, warnings=[KL_NEGATIVE[0] | {"fix": fix}])
    lines = (folder / "samples.jsonl").read_text().splitlines()
    chats = [json.loads(line) | {"prompt": "joined", "messages": CHAT} for line in lines]
    chats[-1]["messages"] = [7, {"role": "user"}]  # as nobody writes it
    write_lines(folder / "samples.jsonl", chats)
    return folder


@pytest.mark.usefixtures("no_pictures")
def test_a_chat_is_shown_as_its_messages_and_code_as_code(tmp_path):
    page = write_report([make_chat_run(tmp_path / "chat")], tmp_path)
    html = page.read_text()
    needs_nothing_else(page_of(page))
    first = html[html.index('<article class="sample">') :]
    first = first[: first.index("</article>")]
    assert re.findall(r'"bubble (own)?"><p class="label">(\w+)</p>.*?<bdi>(.*?)</bdi>', first) == [
        ("", "system", "Be &lt;b&gt;brief&lt;/b&gt;."),
        ("own", "user", "Name a river."),
    ]
    assert first.count('class="cell bubble"') == 2  # before and after, beside one another
    assert first.index("before") < first.index("after, step 2")
    assert "joined" not in html
    assert "Lower <code>ppo.init_kl_coef</code>, or &lt;i&gt;<code>a</code>" in html


def make_episode_run(folder):
    """A run of episodes over several turns, which says more at its end."""
    make_run(folder, steps=4, prompts=8, eval_every=4)
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        line["messages"] = [{"role": "user", "content": "What is 12 * 12?"}]
        line["response"] = "Let me see.\n\nIt is 144."
        line["episode"] = (
            EPISODE if line["step"] else EPISODE | {"messages": EPISODE["messages"][:1]}
        )
    lines[-1]["episode"] = {"messages": [7, {"role": None}], "turns": "x", "stop": 3}
    lines[-2]["episode"] = {"messages": EPISODE["messages"] * 20, "turns": 60}
    write_lines(folder / "samples.jsonl", lines)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        held_out = {"held_out/accuracy": 0.1 * row["step"], "held_out/episode/turns": 2.5}
        row |= {"episode/turns": 2 + 0.1 * row["step"], "episode/tool_calls": 1, "stop/done": 0.7}
        row |= {"stop/turns": 0.3 - 0.01 * row["step"], **held_out, "held_out/stop/done": 0.5}
    write_lines(folder / "metrics.jsonl", rows)
    return folder


CALL = '<tool_call>\n{"name": "<b>times</b>", "arguments": {"a": 12}}\n</tool_call>'
EPISODE = {
    "messages": [
        {"role": "assistant", "content": f"Let me see. {CALL}", "reward": -0.1},
        {"role": "tool", "name": "<i>times", "content": "<script>alert(1)</script>144 \u202e"},
        {"role": "assistant", "content": '{"name": "again"}'},
        {"role": "tool", "content": "no such tool " + "x" * 2_000},
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": "It is 144.", "reward": 1.0},
    ],
    "turns": 3,
    "tool_calls": 2,
    "tool_errors": 1,
    "stop": "<done>",
    "tools": "You can call <b>times</b>.",
}


@pytest.mark.usefixtures("no_pictures")
def test_an_episode_is_shown_as_a_conversation(tmp_path):
    page = write_report([make_episode_run(tmp_path / "episodes")], tmp_path)
    html = page.read_text()
    needs_nothing_else(page_of(page))
    first = html[html.index('<article class="sample">') :]
    first = first[: first.index("</article>")]
    found = re.findall(
        r'"bubble turn (\w*)"><p class="label"><bdi>(.*?)</bdi>(?: <b>(.*?)</b>)?</p>'
        r'<p class="text" dir="auto">(.*?)</p>',
        first,
        re.DOTALL,
    )
    told = r'"bubble "><p class="label">tools</p>.*?<bdi>You can call &lt;b&gt;times&lt;/b&gt;\.<'
    assert re.search(told, first)
    assert first.index(">tools<") < first.index(">user<")
    texts = [(*three, re.sub("</?mark.*?>", "", text)[:24]) for *three, text in found]
    before, after = texts[:2], texts[2:]
    said = ("", "assistant", "", "Let me see.")
    called = ("call", "tool call", "−0.10", "&lt;tool_call&gt;\n{&#34;")
    assert before == [said, called]
    assert after == [
        said,
        called,
        ("tool", "tool &lt;i&gt;times", "", "&lt;script&gt;alert(1)&l"),
        ("call", "tool call", "", "{&#34;name&#34;: &#34;ag"),
        ("tool", "tool", "", "no such tool xxxxxxxxxxx"),
        ("own", "user", "", "So?"),
        ("", "assistant", "+1.00", "It is 144."),
    ]
    assert "513 more characters" in first
    assert "turns 3 · tool calls 2 · tool errors 1 · stopped by &lt;done&gt;" in first
    assert "80 more messages" in html
    assert "<script>alert" not in html
    assert "<th>accuracy</th>" in html
    assert "<th>share stopped by: done</th>" in html
    for name in ("accuracy", "episodes", "stops"):
        assert f'id="chart-{name}"' in html
    assert "Tool calls: 1 throughout." in html


def test_visible_names_what_cannot_be_seen():
    assert visible("a\tb\nc é 😀") == "a\tb\nc é 😀"
    assert visible("\x7f\x85\u2067\ud83d") == "‹U+007F›‹U+0085›‹U+2067›\ufffd"
    assert visible(3) == 3


def test_a_run_without_held_out_prompts_shows_its_last_batch(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": n, "reward/mean": 0.5} for n in range(3)])
    rollouts = [{"step": n, "prompt": "p", "response": f"said {n}", "reward": n} for n in (1, 2)]
    write_lines(tmp_path / "rollouts.jsonl", rollouts)
    page = page_of(write_report([tmp_path], tmp_path))
    assert "No prompts were held out: these are the first of the last batch." in page.text
    assert "training, step 2" in page.text
    assert "said 2" in page.text
    assert "said 1" not in page.text


def test_a_run_that_has_just_begun(tmp_path):
    write_lines(
        tmp_path / "metrics.jsonl", [{"step": 0, "held_out/reward/mean": 0.5, "held_out/kl": 0}]
    )
    write_lines(tmp_path / "samples.jsonl", [{"step": 0, "prompt": "p", "response": ""}])
    page = page_of(write_report([tmp_path], tmp_path))
    assert "0 steps, not finished" in page.text
    assert "+0.50" in page.text
    assert "before → after" not in page.text
    assert "nothing" in page.text  # in place of the empty response
    assert "The words that moved" not in page.text


def test_a_run_with_one_step_and_nan(tmp_path):
    text = '{"step": 1, "reward/mean": 1.5, "reward/std": NaN, "objective/kl": NaN}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    page = page_of(write_report([tmp_path], tmp_path))
    assert "Nothing was measured on held-out prompts yet." in page.text
    assert "NaN" not in page.text + str(page.values)
    assert re.search("Not drawn, since it was not measured: kl to the reference", page.text)


@pytest.mark.parametrize("name", ["recipe.yaml", "summary.json", "warnings.jsonl"])
def test_an_empty_file_is_enough(tmp_path, name):
    (tmp_path / name).write_text("")
    page = page_of(write_report([tmp_path], tmp_path / "new" / "folder"))
    assert "There is nothing to draw yet." in page.text
    assert "What this report lacks" in page.text


def test_a_report_is_not_written_into_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "report.html")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="`out` must be a folder or a file"):
        write_report([tmp_path], tmp_path)


def test_a_folder_that_is_no_run_leaves_nothing_behind(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty is not the folder of a run"):
        write_report([tmp_path / "empty"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def better(folders, tmp_path_factory):
    """A run of a higher reward, with other prompts."""
    folder = make_run(tmp_path_factory.mktemp("better") / "better", gain=4)
    samples = (folder / "samples.jsonl").read_text()
    (folder / "samples.jsonl").write_text(samples.replace("I saw", "We saw"))
    return folder


@pytest.fixture(scope="module")
def beside(folders, better):
    """The report of both, without its charts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.report.page.draw", undrawn)
        return write_report([folders[0], better], better)


def test_runs_with_other_prompts_have_their_own_samples(beside):
    text = page_of(beside).text
    assert "We saw film number 1" in text
    assert "I saw film number 1" in text
    assert "“before” is of" not in text


def browser_says(path, tmp_path, *flags):
    result = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *(
                "--disable-sync",
                f"--user-data-dir={tmp_path / 'browser'}",
                "--enable-logging=stderr",
            ),
            *(*flags, path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("which", ["one", "three", "hostile"])
def test_a_browser_opens_it_without_a_complaint_and_shows_figures_at_the_pointer(
    which, request, tmp_path
):
    if which == "hostile":
        path = write_report([hostile_run(tmp_path / "<s>run")], tmp_path)
    else:
        path = request.getfixturevalue(which)
    dom, console = browser_says(path, tmp_path, "--dump-dom")
    assert console == []
    assert "data-hover" in dom
    # the same page with a pointer on its first chart; its policy lets only its own script run
    move = """<script>
      const svg = document.querySelector('.chart > svg'), box = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent('pointermove', {
        clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 }));
    </script></body>"""
    text = re.sub(r'<meta http-equiv="Content-Sec[^>]*>', "", path.read_text(encoding="utf-8"))
    moved = tmp_path / "moved.html"
    moved.write_text(text.replace("</body>", move), encoding="utf-8")
    dom, console = browser_says(moved, tmp_path, "--dump-dom")
    assert console == []
    assert re.search(r'<div class="tip".*?<div>step \d+</div>', dom)


def shown(table):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_comparison_in_the_terminal(folders):
    text = shown(compare(folders))
    for part in ("ppo", "rloo", "two", "18 of 30 steps, not finished"):
        assert part in text
    order = [
        text.index(part) for part in ("verdict", "ppo.learning_rate", "mean reward", "progress")
    ]
    assert order == sorted(order)
    assert re.search(r"ppo.learning_rate\s+│\s+1.41e-05 │\s+3e-05 │\s+1.41e-05", text)
    assert "ppo.batch_size" not in text


def rows_of(table):
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_the_best_run_is_marked_where_rewards_compare(folders, better, beside, tmp_path):
    (mean,) = (
        row for row in rows_of(compare([folders[0], better])) if row[0].plain == "mean reward"
    )
    assert [re.fullmatch(r"\+[23]\.\d\d", cell.plain) is not None for cell in mean] == [
        False,
        True,
        True,
    ]
    assert [str(cell.style) for cell in mean[1:]] == ["", "bold green"]
    other = make_run(tmp_path / "other", gain=4, scorers=("other",))
    rows = rows_of(compare([folders[0], other]))  # another reward
    assert all(str(cell.style) == "" for row in rows for cell in row)
    assert "★" in beside.read_text()
    assert 'class="best"' in beside.read_text()


def test_parts_of_the_reward_come_with_their_weights(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "reward/mean": 0.5}])
    row = {"step": 1, "prompt": "p", "response": "r", "reward": 0.2, "parts": {"a": 1.0, "b": -1.6}}
    write_lines(tmp_path / "rollouts.jsonl", [row])
    (tmp_path / "summary.json").write_text(json.dumps({"weights": {"a": 1.0, "b": 0.5}}))
    page = page_of(write_report([tmp_path], tmp_path))
    assert "a +1.00 · 0.5 × b −1.60" in page.text
