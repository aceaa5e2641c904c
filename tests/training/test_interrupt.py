"""Ctrl-C: once, twice, and not at all."""

import os
import signal
import threading

import pytest

from trl.training.interrupt import GracefulStop


def test_the_first_asks_and_the_second_stops(capfd):
    before = signal.getsignal(signal.SIGINT)
    with GracefulStop() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        assert capfd.readouterr().err.count("Ctrl-C again") == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_cluster_sends_asks_too():
    for each in (signal.SIGTERM, signal.SIGHUP):
        with GracefulStop() as stop:
            os.kill(os.getpid(), each)
            assert stop.asked


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with GracefulStop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_is_changed():
    asked = []

    def run():
        with GracefulStop() as stop:
            asked.append(stop.asked)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert asked == [False]
