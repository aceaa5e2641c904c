"""People as evaluators: a page to judge on, a store that loses nothing, files in and out.

items.py       what is judged, and what may be answered
asking.py      ask, and wait for what they say: for a program that cannot go on without them
scorer.py      people as a scorer of a training
panel.py       to judge in a notebook
store.py       one SQLite file: items, votes, leases, annotators
server.py      the page and its requests
options.py     of the command
formats.py     our lines, and those of TRL, Argilla, Label Studio and UltraFeedback
agreement.py   do people agree with each other, and with answers that are known

Nothing here loads a model; `trl label` (trl/training/label.py) lets models write what is judged.
"""
