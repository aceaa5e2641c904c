"""The report and the comparison as a browser shows them, opened as files."""

import pytest

from tests.browser import SIZES, browser, complaints
from tests.report.test_page import make_chat_run, make_episode_run
from tests.training.run_folders import ENTROPY, make_run
from trl.report import write_report

pytestmark = pytest.mark.slow
__all__ = ["browser"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    chat = make_chat_run(folder / "chat")
    others = [
        make_run(folder / f"{name}-with-a-long-name", steps=6, learning_rate=rate, warnings=ENTROPY)
        for name, rate in (("one", 1e-5), ("two", 3e-5), ("three", 1e-4))
    ]
    return {
        "report": write_report([chat], folder / "report.html"),
        "episodes": write_report([make_episode_run(folder / "episodes")], folder / "episodes.html"),
        "comparison": write_report(others, folder / "comparison.html"),
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["report", "episodes", "comparison"])
def test_a_page_is_whole_and_can_be_read_by_everybody(name, size, scheme, pages, browser):
    def open_all(page):
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")

    assert complaints(browser, pages[name], size, scheme, start=open_all) == []
