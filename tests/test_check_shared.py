"""Processes that check a device at the same time: one runs, the others take its result; and what a fork takes along."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cards import Card, plugged_in, rows
from processes import forks

from flatcore._check import cache, prove
from flatcore._check.record import Check
from flatcore._engine import proof


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Card]:
    with plugged_in(monkeypatch, tmp_path / "cache") as found:
        yield found


@forks
def test_a_forked_child_has_its_parents_verdict_and_no_lock_of_another_thread(card: Card) -> None:
    def states() -> list[Any]:
        return [proof.find(0).state, card.runs]

    with proof._lock:
        assert in_children(states) == [["passed", 1]]
    prove.prove(0)
    assert in_children(states) == [["passed", 1]]


def in_children(*calls: Callable[[], Any], wait: bool = True) -> list[Any]:
    """What each call returns in a forked process of its own, all at once."""
    children = []
    for call in calls:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(writing, json.dumps(call()).encode())
            finally:
                os._exit(0)
        os.close(writing)
        children.append((pid, reading))
    found = []
    for pid, reading in children:
        with open(reading) as pipe:  # noqa: PTH123  (a descriptor)
            text = pipe.read()
        os.waitpid(pid, 0)
        found.append(json.loads(text) if text else None)
    return found


@forks
@pytest.mark.parametrize("check", (Check(rows()), Check((), "CUDA out of memory")), ids=("passed", "not checked"))
@pytest.mark.parametrize("fresh", (False, True))
def test_processes_that_start_at_once_share_one_run(card: Card, tmp_path: Path, check: Check, fresh: bool) -> None:
    runs = tmp_path / "runs"

    def run() -> Check:
        with runs.open("a") as file:
            file.write("x")
        time.sleep(0.5)
        return check

    def call() -> str:
        return cache.shared(cache.key(0), run, 60.0, fresh).to_json()

    assert in_children(call, call, call) == [check.to_json()] * 3
    assert runs.read_text() == "x"
    # later on, what was found is kept, and what could not be found is tried again
    assert in_children(call) == [check.to_json()] and runs.read_text() == ("xx" if fresh or check.reason else "x")


@forks
def test_a_holder_that_dies_lets_go_and_one_that_lives_is_waited_for_so_long(card: Card) -> None:
    key = cache.key(0)

    def dies() -> None:
        cache._locked(key, 1.0).__enter__()
        os._exit(1)

    assert in_children(dies) == [None]
    assert cache.shared(key, lambda: Check(rows()), 0.2).ok
    with cache._locked(key, 1.0):
        (text,) = in_children(lambda: cache.shared(key, card._run, 0.2, True).to_json())
    assert "another process has held" in str(Check.from_json(json.dumps(json.loads(text))).reason)


@forks
def test_a_child_that_is_forked_meanwhile_does_not_keep_the_lock(card: Card) -> None:
    key = cache.key(0)
    with cache._locked(key, 1.0):
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
            os._exit(0)
    try:
        assert in_children(lambda: cache.shared(key, lambda: Check(rows()), 0.2, True).ok) == [True]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_lock_where_no_file_can_be_made(card: Card, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLATCORE_CACHE", str(tmp_path / "file"))
    assert cache.shared(cache.key(0), lambda: Check(rows()), 1.0).ok
    assert prove.prove(0).ok and proof.verdicts[0].file is None
