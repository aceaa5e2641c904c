"""Whole runs on top of the trainer.

loop.py         rollout, evaluation, optimisation, again and again
parts.py        what a run is made of, from objects or from what a recipe names
run.py          the steps of a run, measured, watched and written
resume.py       how a run goes on
one_call.py     `trl.train`
held_out.py     measuring on prompts that are not trained on
evaluate.py     the same with several samples of each, for a policy of any origin
overlap.py      scoring one part of a batch while the next is written
folder.py       the files of a run
checkpoints.py  checkpoints that are whole or not there
interrupt.py    Ctrl-C
supervised.py   a supervised fit, in a folder like a run's
classifier.py   training a classifier to score with
tools.py        sampling and scoring by hand
"""
