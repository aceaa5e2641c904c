"""Checkpoints are whole or not there."""

import errno
import json
import os
import shutil
import subprocess

import pytest

from trl.training.checkpoints import (
    MANIFEST,
    CheckpointError,
    Checkpoints,
    damage,
    disk_full_told,
    replaced_folder,
)


def write(checkpoints, step, text="x" * 100):
    return checkpoints.write(step, lambda folder: (folder / "state.pt").write_text(text))


def test_the_last_n_are_kept_and_the_newest_is_found(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.newest() == (None, [])
    for step in (2, 10, 100):
        write(checkpoints, step)
    assert [path.name for path in checkpoints.all()] == ["step-000010", "step-000100"]
    assert checkpoints.newest() == (tmp_path / "checkpoints" / "step-000100", [])
    # Nothing else is left behind, hidden or not.
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000010", "step-000100"]


def cut(path):
    os.truncate(path / "state.pt", 7)


def flip(path):
    (path / "state.pt").write_text("y" * 100)


def lose(path):
    (path / "state.pt").unlink()


def lose_manifest(path):
    (path / MANIFEST).unlink()


def garble_manifest(path):
    (path / MANIFEST).write_text('{"state.pt": [1')


def reshape_manifest(path):
    (path / MANIFEST).write_text('["state.pt"]')


def nest_manifest(path):
    (path / MANIFEST).write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (nest_manifest, "manifest.json cannot be read"),
        (cut, "state.pt has 7 bytes in place of 100"),
        (flip, "state.pt has other content than was written"),
        (lose, "state.pt is missing"),
        (lose_manifest, "there is no manifest.json"),
        (garble_manifest, "manifest.json cannot be read"),
        (reshape_manifest, "manifest.json cannot be read"),
    ],
)
def test_a_damaged_one_is_told_and_the_one_before_is_taken(tmp_path, harm, words):
    checkpoints = Checkpoints(tmp_path, keep=3)
    good, bad = write(checkpoints, 1), write(checkpoints, 2)
    assert damage(bad) is None
    harm(bad)
    assert words in damage(bad)
    chosen, problems = checkpoints.newest()
    assert chosen == good
    assert len(problems) == 1
    assert words in problems[0]
    harm(good)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint is whole: .*step-000002.*step-000001"
    ):
        checkpoints.newest()


def test_a_write_that_fails_leaves_the_others_and_nothing_of_its_own(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    good = write(checkpoints, 1)

    def broken(folder):
        (folder / "state.pt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.write(2, broken)
    assert os.listdir(tmp_path) == ["step-000001"]
    assert damage(good) is None


def test_what_an_earlier_crash_left_is_cleared_away(tmp_path):
    (tmp_path / ".step-000003.partial").mkdir()
    (tmp_path / ".step-000003.partial" / "junk").write_text("junk")
    (tmp_path / ".step-000003.old").mkdir()
    path = write(Checkpoints(tmp_path, keep=1), 3)
    assert sorted(os.listdir(path)) == [MANIFEST, "state.pt"]
    assert os.listdir(tmp_path) == ["step-000003"]
    assert json.loads((path / MANIFEST).read_text())["state.pt"][0] == 100


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "best"
    for text in ("first", "second"):
        with replaced_folder(target) as partial:
            (partial / text).write_text(text)
            assert not (target / text).exists()
    assert os.listdir(target) == ["second"]
    assert os.listdir(tmp_path) == ["best"]


def test_a_full_disk_is_told_whoever_raises(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="the disk is full") as caught, disk_full_told(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="a bug"), disk_full_told(tmp_path):
        raise RuntimeError("a bug")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(OSError, match="the disk is full"), disk_full_told(tmp_path):
        raise RuntimeError("PytorchStreamWriter failed writing file")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of two megabytes; only root can make one."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)], capture_output=True
    )
    if made.returncode:
        pytest.skip("no disk can be mounted here")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_on_a_full_disk_the_last_checkpoint_stays_good(small_disk):
    checkpoints = Checkpoints(small_disk / "checkpoints", keep=2)
    good = write(checkpoints, 1, "x" * 1_200_000)
    with pytest.raises(OSError, match="the disk is full"):
        write(checkpoints, 2, "y" * 1_200_000)
    assert damage(good) is None
    assert os.listdir(good.parent) == ["step-000001"]
