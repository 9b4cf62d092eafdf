"""Which answers the demo counts as right, across a commit, and wrong."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from weightsync_demo.answers import Answer, Expected, RefusedError, Tally, Traffic, ask

EXPECTED = {
    1: Expected((1, 1, 1, 1), "one", 4.0),
    2: Expected((2, 2, 2, 2), "two", 4.0),
    3: Expected((3, 3, 3, 3), "three", 4.0),
}


def tally(tokens: tuple[int, ...], version: int, admitted: int | None = None) -> Tally:
    traffic = Traffic("vllm-0", lambda: pytest.fail("asked"), EXPECTED.get)
    traffic._check(Answer(tokens, "text", version, version if admitted is None else admitted))
    return traffic.tally


def test_the_versions_own_tokens_are_right() -> None:
    assert tally((2, 2, 2, 2), 2).right == 1


def test_a_request_that_waited_for_the_commit_is_the_new_versions() -> None:
    assert tally((2, 2, 2, 2), 2, admitted=1).right == 1


def test_a_beginning_of_one_version_and_the_rest_of_the_next_is_across_a_commit() -> None:
    seen = tally((1, 1, 2, 2), 2, admitted=1)
    assert (seen.right, seen.across, seen.wrong) == (0, 1, [])


@pytest.mark.parametrize(
    ("tokens", "version", "admitted"),
    [
        pytest.param((1, 1, 1, 1), 2, 2, id="another version than it says"),
        pytest.param((1, 1, 2, 2), 1, 1, id="mixed without a commit"),
        pytest.param((3, 3, 2, 2), 2, 1, id="a beginning that is not the version's that let it in"),
        pytest.param((9, 9, 9, 9), 1, 1, id="what no version answers"),
        pytest.param((1, 1, 1, 1), 7, 7, id="a version that nobody published"),
        pytest.param((1, 1, 1, 1), -1, -1, id="no version named"),
        pytest.param((1, 1, 1, 1), 1, -1, id="let in with no version"),
    ],
)
def test_everything_else_is_wrong(tokens: tuple[int, ...], version: int, admitted: int) -> None:
    seen = tally(tokens, version, admitted)
    assert (seen.right, seen.across, len(seen.wrong)) == (0, 0, 1)


@contextmanager
def server(status: int, body: dict[str, Any], headers: dict[str, str]) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            return

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield httpd.server_port
        httpd.shutdown()
        thread.join()


def test_an_answer_carries_tokens_and_the_versions_that_the_server_names() -> None:
    body = {"choices": [{"token_ids": [5, 6], "text": "hi"}]}
    with server(200, body, {"x-weightsync-version": "7", "x-weightsync-admitted": "6"}) as port:
        assert ask(port, [1], 2) == Answer((5, 6), "hi", 7, 6)


def test_a_server_without_permit_is_refused_and_not_an_error() -> None:
    with server(503, {"error": "no permit"}, {}) as port, pytest.raises(RefusedError, match="no permit"):
        ask(port, [1], 2)


def test_any_other_status_is_an_error_that_names_it() -> None:
    with server(500, {"error": "engine dead"}, {}) as port, pytest.raises(ConnectionError, match="500"):
        ask(port, [1], 2)


@pytest.mark.parametrize(
    ("error", "counted"), [(RefusedError("no permit"), "refused"), (ConnectionError("gone"), "failed")]
)
def test_who_gets_no_answer_is_counted_and_asks_again(error: Exception, counted: str) -> None:
    third, times = threading.Event(), iter(range(1000))

    def question() -> Answer:
        if next(times) == 2:
            third.set()
        raise error

    traffic = Traffic("vllm-0", question, EXPECTED.get, period=0.001)
    traffic.start()
    assert third.wait(10)
    traffic.stop()
    assert getattr(traffic.tally, counted) >= 3
    assert traffic.tally.refused + traffic.tally.failed == getattr(traffic.tally, counted)
