"""Pages in Chromium, as a phone and a desktop show them; skipped in words where it is not there."""

import shutil
from pathlib import Path

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
SIZES = {"phone": {"width": 390, "height": 844}, "desktop": {"width": 1280, "height": 900}}


@pytest.fixture(scope="module")
def browser():
    """Chromium, driven by playwright."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("chromium is not installed")
    with driver.sync_playwright() as playwright:
        # Nothing of the network is there to lean on: a page is a file.
        flags = ["--no-sandbox", "--disable-background-networking"]
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


def complaints(browser, path, size, scheme, *, start=lambda page: None):
    """What is wrong with a page: errors, requests, what is cut off, what axe says."""
    axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is missing")
    context = browser.new_context(viewport=SIZES[size], color_scheme=scheme, bypass_csp=True)
    context.set_default_timeout(120_000)
    page, found = context.new_page(), []
    page.on("console", lambda told: found.append(told.text) if told.type == "error" else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on(
        "request",
        lambda asked: (
            None if asked.url.startswith(("file:", "data:", "blob:")) else found.append(asked.url)
        ),
    )
    page.goto(path.as_uri())
    start(page)
    found += page.evaluate(
        """[...document.querySelectorAll("td, th, h1, h2, p, li, .bubble")].filter(
             each => each.checkVisibility() && !each.closest("pre, nav, aside, .md-header"))
           .filter(each => each.getBoundingClientRect().right > innerWidth + 1)
           .map(each => "cut off: " + each.textContent.trim().slice(0, 60))"""
    )
    page.evaluate(Path(axe.__file__).with_name("axe.min.js").read_text())
    for rule in page.evaluate("axe.run({preload: false})")["violations"]:
        if rule["impact"] in ("serious", "critical"):
            found.append(f"{rule['id']}: {rule['nodes'][0]['html'][:200]}")
    context.close()
    return found
