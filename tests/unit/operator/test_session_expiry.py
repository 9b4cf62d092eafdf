"""A session never outlives its token, nor half an hour."""

import base64
import json

import pytest

from weightsync_operator.session.auth import session_seconds


def token(**claims: object) -> str:
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"header.{payload}.signature"


@pytest.mark.parametrize(("expiry", "at_most"), [(1600, 600.0), (99_999, 1800.0), (900, 0.0)])
def test_the_token_s_end_bounds_the_session(expiry: int, at_most: float) -> None:
    seconds = session_seconds(token(exp=expiry), now=1000.0)
    assert at_most * 0.9 <= seconds <= at_most


@pytest.mark.parametrize("opaque", ["", "static", "a.b.c", "a.bm8=.c", token(), token(exp="soon")])
def test_a_token_that_does_not_say_is_checked_again_after_half_an_hour(opaque: str) -> None:
    assert 1620.0 <= session_seconds(opaque, now=1000.0) <= 1800.0


def test_not_all_agents_come_back_at_once() -> None:
    assert len({session_seconds("static", now=0.0) for _ in range(20)}) > 10
