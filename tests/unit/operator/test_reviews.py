"""What is made of a TokenReview's answer. The answers of a real API server are in tests/integration."""

from typing import Any

import pytest

from weightsync_operator.kube.reviews import User, review_token


class OneAnswer:
    """Stands for an Api whose API server says one thing."""

    def __init__(self, **status: Any) -> None:
        self.status = status

    async def request(self, method: str, path: str, **_: Any) -> dict[str, Any]:
        assert (method, path) == ("POST", "/apis/authentication.k8s.io/v1/tokenreviews")
        return {"status": self.status}


USER = {"username": "system:serviceaccount:default:agent", "uid": "u"}


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"authenticated": False, "error": "expired"},
        # An authenticator that knows no audiences, such as a webhook: the token was made for who knows whom.
        {"authenticated": True, "user": USER},
        {"authenticated": True, "user": USER, "audiences": ["https://kubernetes.default.svc"]},
    ],
)
async def test_a_token_that_is_not_ours_is_nobody_s(status: dict[str, Any]) -> None:
    assert await review_token(OneAnswer(**status), "token", "weightsync") is None  # type: ignore[arg-type]


async def test_a_token_that_is_ours() -> None:
    api = OneAnswer(authenticated=True, user=USER, audiences=["weightsync"])
    user = await review_token(api, "token", "weightsync")  # type: ignore[arg-type]
    assert user == User("system:serviceaccount:default:agent", "u")
    assert (user.namespace, user.pod_name, user.pod_uid) == ("default", "", "")
