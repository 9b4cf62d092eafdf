"""Waiting ends with an answer or with a reason."""

from collections.abc import Iterator

import pytest

from weightsync_demo.waiting import wait_for


def test_the_first_true_answer_is_returned() -> None:
    answers: Iterator[int | None] = iter([None, 0, 7])
    assert wait_for(lambda: next(answers), 5, "a number", interval=0) == 7


def test_it_asks_at_least_once() -> None:
    assert wait_for(lambda: True, 0, "what holds already")


def test_the_timeout_names_what_was_awaited_and_the_last_answer() -> None:
    with pytest.raises(TimeoutError, match=r"0\.01 s for ten pods: last value \[\]"):
        wait_for(list, 0.01, "ten pods", interval=0.001)


def test_an_ignored_error_is_no_answer_yet_and_is_named_at_the_end() -> None:
    def refuse() -> bool:
        raise ConnectionRefusedError("nobody there")

    with pytest.raises(TimeoutError, match="nobody there"):
        wait_for(refuse, 0.01, "a server", ignoring=OSError, interval=0.001)


def test_any_other_error_passes_through() -> None:
    def fail() -> bool:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        wait_for(fail, 5, "a server", ignoring=OSError)
