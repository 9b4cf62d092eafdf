"""What users are told about the operator's own authority: what is wrong, what that means, what to do."""

from weightsync_contract.names import CA_NAME
from weightsync_operator.pki.core import Broken, NotOurs, Seen


def secret_name(namespace: str) -> str:
    """The authority's Secret, as people name it."""
    return f"{namespace}/{CA_NAME}"


def no_authority(seen: Seen, namespace: str) -> str:
    """Why nothing can be signed with what the Secret says."""
    secret = secret_name(namespace)
    match seen:
        case NotOurs():
            return (
                f"Secret {secret} is not this operator's and is left as it is: delete it, or give the operator "
                "--session-cert and --session-key"
            )
        case Broken(why):
            return f"Secret {secret} can't be used ({why}): the leader has to replace it"
    return f"there is no Secret {secret}: the leader has to make it"


def replaced(why: str, namespace: str) -> str:
    """An authority that others trusted is gone."""
    return (
        f"the authority in Secret {secret_name(namespace)} had to be replaced: {why}. Sessions that are open "
        "stay; an agent that dials is refused until the kubelet has brought the new ConfigMap into its pod, "
        "some two minutes. Engines serve on"
    )


def not_ours(namespace: str, owner: str) -> str:
    """A namespace's ConfigMap has another owner; ``owner`` is its operator's namespace, if it has one."""
    whose = f"belongs to the operator in namespace {owner}" if owner else "was made by somebody else"
    return (
        f"ConfigMap {namespace}/{CA_NAME} {whose} and is left as it is, so agents of this namespace can't check "
        "the operator's certificate with it: delete the ConfigMap, and it is made anew"
    )


def not_kept(namespace: str, error: Exception) -> str:
    """A namespace's ConfigMap can't be read or written."""
    return (
        f"ConfigMap {namespace}/{CA_NAME}, which agents check the operator's certificate with, can't be kept: "
        f"{error}"
    )
