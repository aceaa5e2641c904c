"""A training beside a notebook, which goes on to take clicks: people judge in a panel.

scorer = HumanScorer("votes.sqlite", page=False)
run = Beside("gpt2", prompts, scorer, steps=20, out="runs/mine")
run  # the last line of a cell: judge, stop, go on
model, history = run.result()  # in a later cell, once it is at its end
"""

from __future__ import annotations

import copy
import os
import threading
from html import escape
from typing import Any

from trl.config.errors import refuse
from trl.evaluation.people.asking import Stopped
from trl.evaluation.people.panel import Panel, need_widgets
from trl.evaluation.people.scorer import HumanScorer
from trl.evaluation.weighted_sum import WeightedSum
from trl.training.loop import Row
from trl.training.one_call import Trained, train

__all__ = ["Beside"]


class Beside:
    """`trl.train` in a thread, and a panel to judge, to stop it and to let it go on.

    Args:
        model: See `trl.train`; of a loaded one a copy is trained.
        prompts: See there.
        reward: See there; a `HumanScorer` is among the scorers.
        out: The folder of the run, from which it goes on.
        name: Who judges in the panel.
        **training: All else of `trl.train`.

    Attributes:
        panel: Where people judge.
        widget: All of it, to be shown.
        button: Stops the training, or lets it go on.
        history: The rows of the steps of this session.

    Raises:
        ImportError: if ipywidgets is not installed.
        ValueError: if no `HumanScorer` is in the reward.
    """

    def __init__(
        self,
        model: Any,
        prompts: Any,
        reward: Any,
        *,
        out: str | os.PathLike[str],
        name: str = "me",
        **training: Any,
    ) -> None:
        widgets = need_widgets()
        parts = WeightedSum(reward if isinstance(reward, list | dict) else [reward]).parts
        people = [scorer for scorer, _ in parts.values() if isinstance(scorer, HumanScorer)]
        if len(people) != 1:
            fix = "HumanScorer(store, page=False) alone, or in a list with others"
            refuse("reward", "have one HumanScorer", str(len(people)), fix)
        self.scorer = people[0]
        self.scorer.tells = False  # the panel does
        self.training = {"model": model, "prompts": prompts, "reward": reward, "out": out}
        self.training |= {"quiet": True, "resume": "auto"} | training
        self.also = self.training.pop("on_step", None)
        self.history: list[Row] = []
        self.status = widgets.HTML()
        self.button = widgets.Button()
        self.button.on_click(lambda _: self._clicked())
        self.start()
        self.scorer.path.parent.mkdir(parents=True, exist_ok=True)
        self.panel = Panel(self.scorer.path, name, also=self._show)
        self.widget = widgets.VBox([widgets.HBox([self.button, self.status]), self.panel.widget])

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)
        self.panel.tick()

    @property
    def running(self) -> bool:
        """Whether it trains, or waits for people."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Train, or go on from where it was stopped."""
        self.scorer.stopping.clear()
        self._ended: Trained | BaseException | None = None
        self._told = "It begins."
        self._thread = threading.Thread(target=self._train, name="training", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it: at once if it waits for people, else after this step; all is kept."""
        self._told = "It ends after this step."
        self.scorer.stop()

    def result(self) -> Trained:
        """Return what `trl.train` returned.

        Raises:
            RuntimeError: while it runs: a cell that waited would keep clicks from being seen.
            BaseException: what ended the training early.
        """
        if self.running or self._ended is None:
            raise RuntimeError("The training goes on: look again once it is at its end.")
        if isinstance(self._ended, BaseException):
            raise self._ended
        return self._ended

    def _train(self) -> None:
        try:
            # A loaded model as it was at first: from there it goes on.
            model = copy.deepcopy(self.training["model"])
            given = self.training | {"model": model, "on_step": self._on_step}
            self._ended = train(**given)
            stopped = self.scorer.stopping.is_set()
            self._told = "It was stopped." if stopped else "It is at its end."
        except BaseException as error:
            self._ended = error
            self._told = "It was stopped." if isinstance(error, Stopped) else repr(error)
        finally:
            self.scorer.close()

    def _on_step(self, step: int, row: Row) -> bool:
        self.history.append(row)
        reward = f", reward {row['reward/mean']:+.2f}" if "reward/mean" in row else ""
        self._told = f"Step {step}{reward}."
        also = self.also is not None and self.also(step, row)
        return bool(also) or self.scorer.stopping.is_set()

    def _clicked(self) -> None:
        self.stop() if self.running else self.start()
        self.panel.refresh()

    def _show(self) -> None:
        """Say how it goes; the training itself changes no widget, which is for another thread."""
        self.status.value = escape(self._told)
        self.button.description = "Stop" if self.running else "Go on"
