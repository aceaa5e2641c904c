"""How much code there is, room by room: whoever adds to one raises its row, and says why.

`python tests/code_lines.py` counts, without blank lines, comments, docstrings, texts under fields.
"""

import pytest

from tests.code_lines import by_file, by_room, long_functions

MOST = {
    "__init__.py": 83,
    "__main__.py": 4,
    "anatomy.py": 130,
    "axes.py": 41,
    "batch.py": 435,
    "cli": 713,
    "compute": 1327,
    "config": 1606,
    "core.py": 240,
    "data": 973,
    "environments": 1608,
    "evaluation": 4296,
    "fit.py": 83,
    "gguf.py": 57,
    "gpt2.py": 83,
    "kernels": 321,
    "models": 1974,
    "optimization": 1438,
    "ppo.py": 408,
    "report": 1153,
    "rollout": 1086,
    "saved.py": 108,
    "scored.py": 170,
    "starter": 16,
    "training": 4653,
    "watch": 1267,
}
IN_ALL = 24273
MOST_IN_A_FILE, MOST_IN_A_FUNCTION = 450, 60


@pytest.fixture(scope="module")
def files():
    return by_file()


def test_no_room_grows_unseen(files):
    rooms = by_room(files)
    assert rooms.keys() == MOST.keys()
    assert {room: count for room, count in rooms.items() if count > MOST[room]} == {}
    assert sum(files.values()) <= IN_ALL


def test_the_table_is_not_slack(files):
    rooms = by_room(files)
    assert {room: rooms[room] for room, most in MOST.items() if rooms[room] < most - 30} == {}


def test_no_file_and_no_function_is_too_long(files):
    assert {name: count for name, count in files.items() if count > MOST_IN_A_FILE} == {}
    assert long_functions(MOST_IN_A_FUNCTION) == {}
