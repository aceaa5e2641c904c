"""Runs that are stopped, on one process or several."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState

from tests.training.runs import assert_same_run, tiny_recipe
from trl.training import loop, run


def stopped_and_gone_on(folder: Path, **changes: Any) -> run.Result:
    """Make a run, and another that is stopped in its third step, goes on, and ends as the first.

    Args:
        folder: Has the parts of `make_parts`.
        **changes: To `tiny_recipe`.
    """
    whole, stopped = (tiny_recipe(folder, folder / out, **changes) for out in ("whole", "stopped"))
    calls, score = 0, loop.score

    def score_and_stop(scorer: Any, rollout: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 and PartialState().is_main_process:  # one is asked, all of them stop
            os.kill(os.getpid(), signal.SIGINT)
        return score(scorer, rollout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_report", lambda runs, out: out / "report.html")  # takes seconds
        run.run_recipe(whole)
        with pytest.MonkeyPatch.context() as stopping:
            stopping.setattr(loop, "score", score_and_stop)
            assert run.run_recipe(stopped).interrupted
        result = run.run_recipe(stopped, resume="auto")
    if PartialState().is_main_process:
        assert_same_run(folder / "whole", folder / "stopped")
    return result
