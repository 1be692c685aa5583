"""Error messages of failed handlers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from jobd.client import Discard, Retry
from jobd.client.api_request import request_for
from jobd.client.apis import WorkerApi
from jobd.client.worker.error_text import failure_message, failure_options


def raised(error: Callable[[], Any]) -> str:
    """Return the message of the error that `error` raises."""
    try:
        error()
    except BaseException as caught:
        return failure_message(caught)
    raise AssertionError("nothing was raised")


def test_a_long_message_keeps_its_first_line_and_its_end() -> None:
    def deep(left: int) -> None:
        if left == 0:
            raise ValueError("the first line " + "x" * 500 + "\nthe second line\n" + "y\n" * 2000)
        [deep][left % 1](left - 1)

    message = raised(lambda: deep(3))
    assert len(message) == 4096
    assert message.startswith("ValueError: the first line " + "x" * 500 + "\nthe second line\n")
    assert "\n[...]\n" in message
    assert "raise ValueError" in "".join(message.splitlines()[-2:])

    def long() -> None:
        raise ValueError("x" * 10_000)

    assert raised(long) == "ValueError: " + "x" * (4096 - 13) + "…"
    assert failure_message(Discard("")) == "Discard"
    assert failure_options(Retry(after=0.005)) == {"error_code": "Retry", "retry_after_ms": 5}


def test_a_subclass_of_retry_need_not_call_its_init() -> None:
    class NotYet(Retry):
        def __init__(self, left: int) -> None:
            self.left = left

    assert failure_options(NotYet(3)) == {"error_code": "NotYet", "retry_after_ms": None}


def test_the_message_has_the_chain_notes_and_group_of_an_error() -> None:
    def chained() -> None:
        try:
            dict[str, int]()["a"]
        except KeyError as missing:
            error = LookupError("no customer\nof this name")
            error.add_note("a note")
            raise error from missing

    message = raised(chained)
    assert message.startswith("LookupError: no customer\nof this name\na note\nTraceback (most recent call last):\n")
    assert "KeyError: 'a'\n\nThe above exception was the direct cause of the following exception:\n" in message
    assert message.count("no customer") == 1

    def grouped() -> None:
        raise ExceptionGroup("two of three", [ValueError("one"), KeyError("two")])

    message = raised(grouped)
    assert message.startswith("ExceptionGroup: two of three (2 sub-exceptions)\n")
    assert "| ValueError: one" in message
    assert "| KeyError: 'two'" in message


def test_an_error_without_frames_of_the_handler_is_one_line() -> None:
    assert failure_message(asyncio.CancelledError()) == "CancelledError"
    assert failure_message(TypeError("no result")) == "TypeError: no result"
    assert "client" + "/api_request.py" not in raised(lambda: request_for(WorkerApi.get_job, ""))


def test_an_error_whose_str_raises_has_a_message() -> None:
    class ErrorWithoutText(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    assert failure_message(ErrorWithoutText()) == "ErrorWithoutText: <exception str() failed>"
    assert failure_message(OSError("no such file: \udcff\x00")) == "OSError: no such file: \\udcff\\x00"
    assert failure_message(Retry("line one\nline two")) == "line one\nline two"
