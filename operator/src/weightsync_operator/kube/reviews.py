"""Who a bearer token speaks for, and what he may do: TokenReview and SubjectAccessReview."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from weightsync_contract.names import GROUP, PLURAL
from weightsync_operator.kube.api import Api

_POD_NAME: Final = "authentication.kubernetes.io/pod-name"
_POD_UID: Final = "authentication.kubernetes.io/pod-uid"
_SERVICE_ACCOUNT: Final = "system:serviceaccount:"


@dataclass(frozen=True, slots=True)
class User:
    """Whom the API server takes a token's bearer for."""

    name: str
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        """The namespace of a ServiceAccount; empty for anybody else."""
        if not self.name.startswith(_SERVICE_ACCOUNT):
            return ""
        return self.name.removeprefix(_SERVICE_ACCOUNT).split(":")[0]

    @property
    def pod_name(self) -> str:
        """The pod that the token is bound to; empty if it is bound to none."""
        return next(iter(self.extra.get(_POD_NAME, ())), "")

    @property
    def pod_uid(self) -> str:
        """The uid of the pod that the token is bound to; empty if it is bound to none."""
        return next(iter(self.extra.get(_POD_UID, ())), "")


async def review_token(api: Api, token: str, audience: str = "") -> User | None:
    """The token's user; None if it is no good, or not for ``audience`` (the API server's unless given)."""
    audiences = [audience] if audience else []
    answer = await api.request(
        "POST",
        "/apis/authentication.k8s.io/v1/tokenreviews",
        body={
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, **({"audiences": audiences} if audiences else {})},
        },
    )
    status = answer.get("status", {})
    if not status.get("authenticated"):
        return None
    # An authenticator that knows no audiences answers without any: such a token was not made for us.
    if audience and audience not in status.get("audiences", ()):
        return None
    user = status.get("user", {})
    return User(
        name=user.get("username", ""),
        uid=user.get("uid", ""),
        groups=tuple(user.get("groups") or ()),
        extra=user.get("extra") or {},
    )


async def may_read(api: Api, user: User, namespace: str, name: str) -> bool:
    """Whether ``user`` may get this WeightSync."""
    answer = await api.request(
        "POST",
        "/apis/authorization.k8s.io/v1/subjectaccessreviews",
        body={
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {
                "user": user.name,
                "uid": user.uid,
                "groups": list(user.groups),
                "extra": {key: list(values) for key, values in user.extra.items()},
                "resourceAttributes": {
                    "verb": "get",
                    "group": GROUP,
                    "resource": PLURAL,
                    "namespace": namespace,
                    "name": name,
                },
            },
        },
    )
    return bool(answer.get("status", {}).get("allowed"))
