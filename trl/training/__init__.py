"""Whole runs on top of the trainer.

loop.py         rollout, evaluation, optimisation, again and again; `trl.train`
run.py          a recipe as a run in a folder, which can be stopped and gone on with
parts.py        what a recipe names, as objects
data.py         prompts, and text for a pretraining loss
sources.py      files and hub datasets as tables
held_out.py     measuring on prompts that are not trained on
folder.py       the files of a run
checkpoints.py  checkpoints that are whole or not there
interrupt.py    Ctrl-C
diagnosis.py    what looks wrong, in words
display.py      a run on the screen
tracking.py     a run in TensorBoard, W&B and the like
report/         a run as a page
profile.py      where the time goes
classifier.py   training a classifier to score with
tools.py        sampling and scoring by hand
"""
