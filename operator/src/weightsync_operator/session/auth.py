"""Who an agent is: a token bound to a pod, told by the API server, and nothing that the agent says itself."""

import asyncio
import base64
import binascii
import json
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final

from weightsync_contract.messages import Hello
from weightsync_contract.names import LABEL_ROLE, PROTOCOL_MAX, PROTOCOL_MIN, TOKEN_AUDIENCE
from weightsync_contract.reasons import RefusalCode
from weightsync_operator.core.model import PodView
from weightsync_operator.kube.errors import KubeError
from weightsync_operator.kube.reviews import User

MAX_SESSION_SECONDS: Final = 1800.0
_PARALLEL_REVIEWS: Final = 16

FindPod = Callable[[str, str], Awaitable[PodView | None]]
"""The pod of a namespace with a uid, looked for in an authoritative LIST before None is answered."""


class RefusedError(Exception):
    """The session must not be opened or go on."""

    def __init__(self, code: RefusalCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Authenticator:
    """Checks an agent's hello against its token and the API server's pods.

    ``review`` answers a token's user for an audience, or None; it may raise KubeError.
    """

    def __init__(self, review: Callable[[str, str], Awaitable[User | None]], find_pod: FindPod) -> None:
        self._review = review
        self._find_pod = find_pod
        # Below the number of threads that speak to the API server: a thousand agents that come back at once
        # must not keep the Lease from being renewed.
        self._reviews = asyncio.Semaphore(_PARALLEL_REVIEWS)

    async def check(self, token: str, hello: Hello) -> PodView:
        """The pod that the agent speaks for. Raises RefusedError."""
        _check_protocol(hello)
        if not token:
            raise RefusedError(
                RefusalCode.TOKEN_INVALID,
                f"no bearer token: mount a projected serviceAccountToken with audience {TOKEN_AUDIENCE}",
            )
        try:
            async with self._reviews:
                user = await self._review(token, TOKEN_AUDIENCE)
            if user is None:
                raise RefusedError(
                    RefusalCode.TOKEN_INVALID,
                    f"the token is expired, revoked or not for audience {TOKEN_AUDIENCE}: read the token "
                    "file again, and see that the volume asks for this audience",
                )
            _check_bound(user, hello)
            pod = await self._find_pod(hello.pod.namespace, hello.pod.uid)
        except KubeError as error:
            raise RefusedError(
                RefusalCode.TOKEN_UNREACHABLE, f"the API server can't be asked now: {error}"
            ) from error
        return _check_pod(pod, hello)


def session_seconds(token: str, now: float | None = None) -> float:
    """How long a session may last: until its token expires, at most 30 minutes, less up to a tenth."""
    remaining = _expiry(token) - (time.time() if now is None else now)
    return max(0.0, min(remaining, MAX_SESSION_SECONDS)) * random.uniform(0.9, 1.0)


def _expiry(token: str) -> float:
    # Not trusted for anything but shortening: the API server has said already that the token is good.
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return float(claims["exp"])
    except (IndexError, KeyError, TypeError, ValueError, binascii.Error):
        return float("inf")


def _check_protocol(hello: Hello) -> None:
    if hello.protocol_min > PROTOCOL_MAX or hello.protocol_max < PROTOCOL_MIN:
        raise RefusedError(
            RefusalCode.PROTOCOL,
            f"the agent speaks protocols {hello.protocol_min} to {hello.protocol_max}, this operator "
            f"{PROTOCOL_MIN} to {PROTOCOL_MAX}: upgrade the older one",
        )


def _check_bound(user: User, hello: Hello) -> None:
    if not user.pod_uid:
        raise RefusedError(
            RefusalCode.WRONG_POD,
            f"the token of {user.name} is bound to no pod: use a projected serviceAccountToken",
        )
    speaks_for = (user.namespace, user.pod_name, user.pod_uid)
    claimed = (hello.pod.namespace, hello.pod.name, hello.pod.uid)
    if speaks_for != claimed:
        raise RefusedError(
            RefusalCode.WRONG_POD,
            f"the token is bound to pod {'/'.join(speaks_for)}, the agent says that it is "
            f"{'/'.join(claimed)}: give the agent its own pod's namespace, name and uid",
        )


def _check_pod(pod: PodView | None, hello: Hello) -> PodView:
    if pod is None:
        raise RefusedError(
            RefusalCode.UNKNOWN_POD,
            f"the API server has no pod {hello.pod.namespace}/{hello.pod.name} with uid {hello.pod.uid} and "
            f"a label {LABEL_ROLE}: label the pod with its role",
        )
    role = dict(pod.labels).get(LABEL_ROLE)
    if role != hello.role.value:
        raise RefusedError(
            RefusalCode.WRONG_POD,
            f"the pod's label {LABEL_ROLE} is {role}, the agent was started as {hello.role.value}: "
            "make them equal",
        )
    return pod
