"""The page in a real browser; skipped where there is none (playwright, and Debian's chromium)."""

import os
import re
import shutil
import threading
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn

from tests.evaluation.people.asking import make_store
from tests.evaluation.people.payloads import PAYLOADS
from tests.rows import quick
from trl.evaluation.people.items import Item
from trl.evaluation.people.server import serve
from trl.evaluation.people.store import Store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    not (find_spec("playwright") and CHROMIUM), reason="no playwright, or no chromium, is here"
)
SCREENSHOTS = os.environ.get("TRL_SCREENSHOTS")
"""A folder for pictures, to be looked at."""


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, tmp_path, monkeypatch):
    """Serve items and sign somebody in, in a browser of their own."""
    servers, contexts = [], []

    class Server(uvicorn.Server):
        def __init__(self, config):
            servers.append(self)
            super().__init__(config)

    monkeypatch.setattr(uvicorn, "Server", Server)
    running = {}

    def start(items, **more):
        store = make_store(tmp_path / "s", items, **more)
        ready = threading.Event()

        def started(address):
            running["address"] = address
            ready.set()

        thread = threading.Thread(
            target=serve, args=(store, "127.0.0.1", 0), kwargs={"started": started}
        )
        thread.start()
        ready.wait()
        running["thread"] = thread

    def opened(
        items=None, name="ann", wait="#answers button, #done:not([hidden])", context=None, **more
    ):
        if items is not None:
            start(items, **more.pop("ask", {}))
        looking = Store(tmp_path / "s")
        context = context or chromium.new_context(
            **{"viewport": {"width": 1280, "height": 800}} | more
        )
        contexts.append(context)
        asked, wrong = [], []
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
        page.expose_function("hit", lambda: wrong.append("a text was run"))
        page.goto(f"{running['address']}#join={looking.link(name)}")
        page.wait_for_selector(wait)
        return SimpleNamespace(page=page, store=looking, asked=asked, wrong=wrong,
                               context=context, address=running["address"])  # fmt: skip

    yield opened
    for context in contexts:
        context.close()
    for server in servers:
        server.should_exit = True
    if running:
        running["thread"].join()


def pairs(count):
    return [Item(f"Prompt {i}", (f"The first of {i}", f"The second of {i}")) for i in range(count)]


def votes_of(store):
    return [vote for item in store.items() for vote in item.votes]


def press(ann, key, answers=1):
    """Press a key and wait for as many answers more (or, undone, fewer)."""
    before = int(ann.page.inner_text("#own-words").split()[0])
    ann.page.keyboard.press(key)
    counted(ann.page, before + answers)


def counted(page, answers):
    """Wait until the page says how many answers there are."""
    from playwright.sync_api import expect

    expect(page.locator("#own-words")).to_have_text(re.compile(f"^{answers} of"), timeout=20_000)


def picture(ann, name):
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(exist_ok=True)
        ann.page.screenshot(path=f"{SCREENSHOTS}/{name}.png")


def test_fifty_pairs_by_keyboard_alone(open_page):
    ann = open_page(pairs(50))
    keys = ["1", "2", "3", "4", "ArrowLeft", "ArrowRight", "s"]
    meant = [0, 1, "tie", "both_bad", 0, 1, "skip"]
    expected = {}
    for turn in range(50):
        prompt = ann.page.inner_text("#prompt .prose")
        expected[prompt] = meant[turn % 7]
        press(ann, keys[turn % 7])
        if turn == 20:  # reload in the middle: the same item is there
            now = ann.page.inner_text("#prompt .prose")
            ann.page.reload()
            ann.page.wait_for_selector("#answers button")
            assert ann.page.inner_text("#prompt .prose") == now
    ann.page.wait_for_selector("#done:not([hidden])")
    picture(ann, "done")
    found = {}
    for item in ann.store.items():
        (vote,) = item.votes
        index = type(vote.answer) is int
        found[item.prompt] = vote.shown.index(vote.answer) if index else vote.answer
        assert 0 <= vote.seconds < 60
    assert found == expected
    for answers in range(50, 47, -1):  # undo, again and again
        assert ann.page.inner_text("#own-words").startswith(f"{answers} ")
        press(ann, "u", -1)
        assert ann.page.locator(".was, #skip").count()
    assert len(votes_of(ann.store)) == 47
    assert ann.wrong == []
    assert all(url.startswith(ann.address) for url in ann.asked)


def test_a_draft_flag_and_comment_stay_until_they_are_sent(open_page):
    ann = open_page(pairs(3))
    page = ann.page
    page.keyboard.press("f")
    page.keyboard.press("c")
    page.keyboard.type("1 is 2 long 🙂 u")  # letters in a comment are no keys
    page.keyboard.press("Escape")
    assert page.inner_text("#own-words") == "0 of 3"
    page.close()
    again = ann.context.new_page()
    again.goto(ann.address)
    again.wait_for_selector("#answers button")
    assert again.input_value("#comment") == "1 is 2 long 🙂 u"
    assert again.get_attribute("#flag", "aria-pressed") == "true"
    again.keyboard.press("2")
    counted(again, 1)
    assert again.input_value("#comment") == ""
    (vote,) = votes_of(ann.store)
    assert (vote.flag, vote.comment) == (True, "1 is 2 long 🙂 u")
    again.keyboard.press("u")
    counted(again, 0)
    assert again.input_value("#comment") == "1 is 2 long 🙂 u"
    assert "Right" in again.inner_text("#answers .was")


def test_any_answer_can_be_undone_from_the_list(open_page):
    ann = open_page(pairs(4))
    for key in "123":
        press(ann, key)
    ann.page.keyboard.press("h")
    ann.page.wait_for_selector("#history[open] li")
    told = ann.page.locator("#history-list li")
    words = [words.split("\n") for words in told.all_inner_texts()]
    assert [" ".join(each) for each in words] == [
        "Undo Tie Prompt 2", "Undo Right Prompt 1", "Undo Left Prompt 0"
    ]  # fmt: skip
    picture(ann, "history")
    told.nth(2).get_by_role("button").click()
    counted(ann.page, 2)
    assert ann.page.inner_text("#prompt .prose") == "Prompt 0"


@pytest.mark.slow  # fails at times beside other work: to be mended
def test_an_answer_that_was_not_acknowledged_is_sent_again(open_page):
    ann = open_page(pairs(2))
    lost = []
    ann.page.route("**/api/vote", lambda route: (lost.append(route.fetch()), route.abort()))
    ann.page.keyboard.press("1")  # it is stored, but the page never hears of it
    ann.page.wait_for_selector("#trouble:not([hidden])")
    assert "kept here" in ann.page.inner_text("#trouble")
    ann.page.unroute_all()
    ann.page.reload()
    counted(ann.page, 1)
    assert len(votes_of(ann.store)) == 1
    assert lost[0].status == 200


def test_two_people_at_once_never_see_the_same(open_page):
    ann, ben = open_page(pairs(20)), open_page(name="ben")
    for turn in range(10):
        assert ann.page.inner_text("#prompt .prose") != ben.page.inner_text("#prompt .prose")
        press(ann, "1" if turn % 2 else "2")
        press(ben, "ArrowRight")
    for each in (ann, ben):
        each.page.reload()
        each.page.wait_for_selector("#done:not([hidden])")
        assert each.page.inner_text("#all-words") == "20 of 20"
    assert {len(item.votes) for item in ann.store.items()} == {1}
    assert ann.wrong == ben.wrong == []


@pytest.mark.parametrize(
    ("question", "count", "keys", "answers"),
    [
        ("rating", 1, "15", [1, 5]),
        ("thumbs", 1, "12", [False, True]),
        ("best", 4, "45", [3, "both_bad"]),
    ],
)
def test_other_questions(question, count, keys, answers, open_page):
    items = [Item("Who?", tuple(f"Answer {i}, {j}" for j in range(count))) for i in range(2)]
    ann = open_page(items, ask={"question": question})
    picture(ann, question)
    for key in keys:
        press(ann, key)
    found = [
        vote.shown.index(vote.answer) if count > 1 and vote.answer in vote.shown else vote.answer
        for vote in votes_of(ann.store)
    ]
    assert found == answers


@pytest.mark.parametrize(
    "place",
    quick(
        ["prompt", "response", "role", "comment", "guidelines"], "response", "comment", "guidelines"
    ),
)
def test_no_text_is_ever_run(place, open_page):
    everything = "\n\n".join(PAYLOADS).replace("\0", "")
    if place == "guidelines":
        ann = open_page(pairs(1), ask={"guidelines": everything})
    elif place == "comment":
        ann = open_page(pairs(2))
        ann.page.fill("#comment", everything[:9000])
        ann.page.click("#skip")
        counted(ann.page, 1)
        ann.page.keyboard.press("Escape")
        ann.page.evaluate("document.activeElement.blur()")
        ann.page.keyboard.press("h")
        ann.page.wait_for_selector("#history[open] q")
    else:
        texts = [
            (text, f"{text} other") if place == "response" else ("a", "b") for text in PAYLOADS
        ]
        prompts = {
            "prompt": PAYLOADS,
            "response": ["p"] * len(texts),
            "role": [[{"role": text, "content": text}] for text in PAYLOADS],
        }
        ann = open_page([Item(p, r) for p, r in zip(prompts[place], texts, strict=True)])
        for text in PAYLOADS:
            inside = {"prompt": "#prompt", "response": "#responses", "role": "#prompt"}[place]
            shown = ann.page.evaluate(f"document.querySelector('{inside}').textContent")
            marks = ["```", "\n", " "]  # of code, and around it
            for mark in marks:
                shown, text = shown.replace(mark, ""), text.replace(mark, "")
            assert text.replace("\0", "�") in shown.replace("\0", "�")
            press(ann, "s")
    ann.page.wait_for_timeout(200)
    kinds = (
        "script:not([src='/label.js']), iframe, img, svg, object, embed, form[action], [onerror]"
    )
    assert ann.page.locator(kinds).count() == 0
    assert ann.wrong == []
    assert all(url.startswith((ann.address, "data:,")) for url in ann.asked)


LONG = "A sentence that goes on and on. " * 400
HARD = [
    Item(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "مرحبا، كيف حالك؟ Write `hello` in Python 👩‍👩‍👧‍👦"},
        ],
        (
            f"Here it is:\n```python\ndef hello(name):\n    return '{'x' * 200}'\n```\nDone.",
            "بخير، شكرا لك! هذا نص طويل من اليمين إلى اليسار.\n\nAnd then English, 🎉🎉.",
        ),
    ),
    Item("Go on for long", (LONG, "W" * 3000)),
    Item("", ("", "   ")),
]  # fmt: skip


def test_code_is_shown_as_code_and_nothing_of_a_text_is_hidden(open_page):
    fenced = "Before\n```python\nprint(1)\n```\nafter\n```\ncut off"
    ann = open_page([Item("p", ("```print(1)``` prints", fenced))])
    picture(ann, "code")
    texts = sorted(ann.page.locator("#responses .text").all_inner_texts(), reverse=True)
    assert texts[0] == "```print(1)``` prints"
    assert texts[1].split() == ["Before", "python", "print(1)", "after", "cut", "off"]
    assert ann.page.locator("pre code").all_inner_texts() == ["print(1)\n", "cut off"]


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1280, "light"),
        (390, "dark"),
        pytest.param(1280, "dark", marks=pytest.mark.slow),
        pytest.param(390, "light", marks=pytest.mark.slow),
    ],
)
def test_hard_texts_fit_and_nothing_serious_is_wrong_for_a_reader(width, scheme, open_page):
    view = {
        "viewport": {"width": width, "height": 800},
        "color_scheme": scheme,
        "reduced_motion": "reduce",
    }
    rules = "# How to judge\n\n* Prefer what is **true**\n* [More](https://example.org)\n"
    ann = open_page(HARD, ask={"guidelines": rules}, **view)
    for name in ("chat", "long", "empty"):
        picture(ann, f"{name}-{width}-{scheme}")
        wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        assert ann.page.evaluate(wide), name
        check(ann.page)
        press(ann, "1")
    assert ann.page.evaluate("getComputedStyle(document.body).colorScheme") == scheme
    ann.page.keyboard.press("?")
    ann.page.wait_for_selector("#help[open]")
    picture(ann, f"help-{width}-{scheme}")
    check(ann.page)


def check(page):
    """Let axe-core look for what is wrong for who does not see, hear or point well."""
    if find_spec("axe_playwright_python") is None:
        pytest.skip("no axe-playwright-python is here")
    folder = Path(find_spec("axe_playwright_python").origin).parent
    page.evaluate((folder / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    told = [
        (each["id"], each["help"], [node["html"] for node in each["nodes"]])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert told == []


def test_every_button_has_a_name_and_its_key(open_page):
    ann = open_page(pairs(1), ask={"guidelines": "Be fair."})
    names = [
        ann.page.evaluate("b => b.textContent.trim().replace(/\\s+/g, ' ')", button)
        for button in ann.page.query_selector_all("button:visible")
    ]
    assert names == [
        "Answers H", "Dark or light", "Help ?", "Left is better1←", "Right is better2→", "Tie3",
        "Both bad4", "Undo U", "Skip S", "Flag F",
    ]  # fmt: skip
    for label in ("Left response", "Right response", "Prompt"):
        assert ann.page.get_by_role("region", name=label).count() == 1
    assert ann.page.get_by_label("Comment").count() == 1
    press(ann, "1")
    assert ann.page.inner_text("[role=status]") == "Left is better: stored."


def test_who_has_no_link_is_told(open_page):
    ann = open_page(pairs(1))
    stranger = ann.context.browser.new_context().new_page()
    stranger.goto(f"{ann.address}#join=used")
    stranger.wait_for_selector("#join:not([hidden])")
    assert "ask for a new one" in stranger.inner_text("#trouble")
    assert stranger.locator("#item:visible, #bar:visible").count() == 0
    stranger.context.close()
