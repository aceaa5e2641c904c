"""What runs in a cell (see `warden.py`), where nothing of trl is: Python's library alone.

A program talks in lines of JSON: with who has opened its cell by handle 3, and some with another
cell by handle 4. What runs there may forge every word of it: no program of an answer judges it.
"""

import ast
import builtins
import contextlib
import functools
import importlib
import json
import logging
import os
import re
import sys
import types

MOST_READ = 2**24
"""Bytes of a line; what is longer is cut, and then no JSON."""


class Line:
    """Messages over a handle, each a line of JSON."""

    def __init__(self, handle):
        self.reader = open(handle, "rb", closefd=False)  # noqa: SIM115
        self.writer = open(handle, "wb", buffering=0, closefd=False)  # noqa: SIM115

    def send(self, message):
        """Write one."""
        self.writer.write(json.dumps(message).encode() + b"\n")

    def receive(self):
        """Return the next; None: there is no more."""
        line = self.reader.readline(MOST_READ)
        return json.loads(line) if line else None


def run():
    """Run the program that the first message names; return the exit code."""
    host = Line(3)
    given = host.receive()
    return PROGRAMS[given.pop("program")](host, **given) or 0


def load(modules):
    """Import what programs need, and let it run once, so that no child pays for its first time."""
    for name in modules:
        importlib.import_module(name)
    logging.disable()
    if "math_verify" in modules:
        for text in (r"\frac{1}{2}", "(1, 2)", r"\{3, x+1\}", r"2\sqrt{3} \cdot 10^2"):
            same_math(text, text)


# -- what is data ----------------------------------------------------------------------------------


def told_of(function):
    """Return the program that tells what a function makes of its arguments."""
    return lambda host, **given: host.send(function(**given))


def same_math(answer, right):
    """Tell whether two pieces of LaTeX are equal as mathematics."""
    from math_verify import parse, verify

    answer, right = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (answer, right))
    return bool(answer and right and verify(right, answer, timeout_seconds=None))


def valid_json(text, schemas):
    """Tell whether a text is one JSON value, without doubt which, and fits all schemas."""
    from jsonschema.validators import validator_for

    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_refused)
    except ValueError:
        return False
    return all(validator_for(schema)(schema).is_valid(value) for schema in schemas)


def _once(pairs):
    found = dict(pairs)
    return found if len(found) == len(pairs) else _refused("a name twice")


def _refused(what):
    raise ValueError(what)


def last_match(text, pattern):
    """Return the first group, or all, of the last match; an empty list: there is none."""
    found = [match.group(bool(match.re.groups)) for match in re.finditer(pattern, text)]
    return found[-1:]


# -- what is code ----------------------------------------------------------------------------------


def script(host, code, text):
    """Run an answer as a script, with a text as its standard input."""
    with open("input", "w+", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        os.dup2(file.fileno(), 0)
    os.dup2(3, 1)
    os.close(3)
    sys.stdin, sys.stdout = open(0), open(1, "w", closefd=False)  # noqa: SIM115
    try:
        exec(compile(code, "answer.py", "exec"), _module("__main__"))
        return 0
    except SystemExit as end:
        return int(end.code not in (None, 0))
    finally:
        sys.stdout.flush()


def answer(host, code):
    """Run an answer, then call its functions for the tests, which are in another cell.

    Arguments and results cross over as Python literals. It never hears what they should be.
    """
    tests, names = Line(4), _module("answer")
    exec(compile(code, "answer.py", "exec"), names)
    while (asked := tests.receive()) is not None:
        try:
            if "names" in asked:
                found = [_told(names, name) for name in asked["names"]]
            else:
                arguments, named = ast.literal_eval(asked["arguments"])
                found = repr(names[asked["call"]](*arguments, **named))
            tests.send({"found": found})
        except Exception as error:
            tests.send({"error": type(error).__name__, "text": str(error)})


def _module(name):
    """Return the names of a new module, which others find as one (as dataclasses do)."""
    module = sys.modules[name] = types.ModuleType(name)
    return vars(module)


def _told(names, name):
    """Return "call" for a function, the literal of another value, or None if there is neither."""
    if name not in names:
        return None
    return "call" if callable(names[name]) else repr(names[name])


def tests(host, tests):
    """Run tests of an answer that is in another cell; tell of each whether it held.

    What only imports, defines or assigns is no test: it stands before those that need it.
    """
    other, names, found = Line(4), {"__name__": "tests"}, []
    trees = [ast.parse(test) for test in tests]
    loaded, bound = set().union(*map(_loaded, trees)), set().union(*map(_bound, trees))
    free = sorted(loaded - bound - set(dir(builtins)))
    with contextlib.suppress(Exception):  # the answer has ended: no name is there
        for name, told in zip(free, _ask(other, names=free), strict=True):
            if told is not None:
                call = functools.partial(_call, other, name)
                names[name] = call if told == "call" else ast.literal_eval(told)
    for tree in trees:
        try:
            exec(compile(tree, "tests.py", "exec"), names)
            held = True
        except BaseException:
            held = False
        if not all(isinstance(each, SETUP) for each in tree.body):
            found.append(held)
    host.send(found)


SETUP = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign


def _loaded(tree):
    names = (each for each in ast.walk(tree) if isinstance(each, ast.Name))
    return {each.id for each in names if isinstance(each.ctx, ast.Load)}


def _bound(tree):
    """Return the names that tests themselves give something to."""
    found = set()
    for each in ast.walk(tree):
        if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load):
            found.add(each.id)
        elif isinstance(each, ast.alias):
            found.add((each.asname or each.name).partition(".")[0])
        elif isinstance(each, ast.arg):
            found.add(each.arg)
        elif isinstance(each, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler):
            found.add(each.name)
    return found


def _ask(other, **message):
    """Ask the cell of the answer.

    Raises:
        Exception: what it raised there, if that is one of Python's.
    """
    other.send(message)
    told = other.receive()
    if "error" in told:
        kind = getattr(builtins, told["error"], None)
        known = isinstance(kind, type) and issubclass(kind, Exception)
        raise (kind if known else RuntimeError)(told["text"])
    return told["found"]


def _call(other, name, *arguments, **named):
    return ast.literal_eval(_ask(other, call=name, arguments=repr((arguments, named))))


PROGRAMS = {
    "math": told_of(same_math),
    "json": told_of(valid_json),
    "regex": told_of(last_match),
    "script": script,
    "answer": answer,
    "tests": tests,
}
