"""From what a run wrote, through votes in a browser, to a policy that writes what was preferred."""

import json
import signal
import subprocess
import sys

import pytest

from tests.browser import browser  # noqa: F401  a fixture
from tests.evaluation.people.test_page import counted
from trl import cli

VOTES = 60
QUICK = (
    "--ppo.batch-size", "16", "--ppo.minibatch-size", "16", "--ppo.forward-batch-size", "16",
    "--sampling.max-new-tokens", "8", "--data.held-out", "80", "--steps", "2", "--eval-every", "2",
    "--quiet",
)  # fmt: skip


def trl(*arguments):
    assert cli.main(list(map(str, arguments))) == 0


def vote(page, votes):
    """Choose the text with fewer words that begin with a t, by keyboard, as somebody who reads."""

    def worth(side):
        text = page.get_by_role("region", name=f"{side} response").inner_text()
        return -sum(word.startswith("t") for word in text.lower().split())

    for done in range(votes):
        left, right = worth("Left"), worth("Right")
        page.keyboard.press("3" if left == right else "1" if left > right else "2")
        counted(page, done + 1)


@pytest.mark.slow
def test_from_a_run_through_votes_to_a_policy_and_no_file_is_edited(browser, tmp_path):  # noqa: F811
    before, taste, after = (tmp_path / name for name in ("before", "taste", "after"))
    trl("train", "sentiment", *QUICK, "--out", before)
    command = [sys.executable, "-m", "trl", "label", "--from", str(before), "--port", "0"]
    page = browser.new_page()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as label:
        try:
            page.goto(label.stdout.readline().split()[1])  # me: the link
            page.wait_for_selector("#answers button")
            vote(page, VOTES)
        finally:
            page.close()
            label.send_signal(signal.SIGINT)
        assert f"{VOTES} votes. Go on: trl label --store" in label.stdout.read()
    assert label.returncode == 0
    votes = tmp_path / "votes.jsonl"
    trl("label", "--from", before, "--export", votes)
    fit = ("--epochs", 4, "--batch-size", 8, "--learning-rate", 5e-4, "--quiet", "--out", taste)
    trl("reward", votes, "--model", "starter", *fit)
    told = json.loads((taste / "summary.json").read_text())
    assert told["train_preferences"] + told["test_preferences"] == VOTES
    reward = json.dumps([{"kind": "reward_model", "name": str(taste / "reward_model")}])
    trl("train", "sentiment", *QUICK, "--reward", reward, "--out", after)
    trl("report", before, after, "--out", tmp_path / "report.html")
    assert "reward_model" in (tmp_path / "report.html").read_text()
