"""The manual as a browser shows it, opened as files: links, search, sizes, and who can read it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import browser, complaints

pytestmark = pytest.mark.slow
__all__ = ["browser"]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = ["-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)
    return folder


def test_links_and_search_need_no_server(site, browser):
    page = browser.new_page()
    page.set_default_timeout(120_000)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((site / "index.html").as_uri())
    page.click("[data-md-component=search-query]")
    page.keyboard.type("gae_lambda")
    page.click(".md-search-result__link[href*='#'][href*='gae_lambda'] >> nth=0")
    page.wait_for_url("**/*#*gae_lambda*")
    assert "gae_lambda" in page.content()
    page.goto((site / "howto" / "reward.html").as_uri())
    links = page.evaluate("[...document.querySelectorAll('a[href]')].map(each => each.href)")
    files = {Path(link.partition("#")[0][7:]) for link in links if link.startswith("file://")}
    assert len(files) > 20
    assert [path for path in files if not path.is_file()] == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    page.close()


@pytest.mark.parametrize(("size", "scheme"), [("phone", "light"), ("desktop", "dark")])
@pytest.mark.parametrize("name", ["index", "settings", "metrics", "recipes", "howto/reward"])
def test_a_page_is_whole_and_can_be_read_by_everybody(name, size, scheme, site, browser):
    assert complaints(browser, site / f"{name}.html", size, scheme) == []
