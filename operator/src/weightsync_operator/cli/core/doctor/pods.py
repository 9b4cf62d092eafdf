"""Pods as the checks see them: the agent, the container that it is for, users, arguments, mounts."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from weightsync_contract.names import GROUP
from weightsync_operator.cli.core.doctor.facts import Document, annotations, name_of

AGENT: Final = "weightsync-agent"
ANNOTATION_CONTAINER: Final = f"{GROUP}/container"
_AGENT_MODULE: Final = "weightsync_engine.agent"


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of a fleet. ``agent`` is None where it has none."""

    document: Document
    agent: Document | None
    served: Document | None
    """The container that the agent is for; None where the annotation names none of them."""

    @property
    def name(self) -> str:
        """Its name."""
        return name_of(self.document)


def read_pod(document: Document) -> Pod:
    """Find agent and served container."""
    spec = document["spec"]
    every = [*(spec.get("initContainers") or ()), *spec["containers"]]
    agent = next((each for each in every if _is_agent(each)), None)
    others = [each for each in spec["containers"] if each is not agent]
    wanted = annotations(document).get(ANNOTATION_CONTAINER) or (others[0]["name"] if others else "")
    return Pod(document, agent, next((each for each in others if each["name"] == wanted), None))


def alive(document: Document) -> bool:
    """Neither ended nor about to."""
    phase = (document.get("status") or {}).get("phase")
    return phase not in ("Succeeded", "Failed") and not document["metadata"].get("deletionTimestamp")


def user_of(pod: Pod, container: Document) -> int | None:
    """The user that a container runs as; None where its image decides."""
    own = (container.get("securityContext") or {}).get("runAsUser")
    return own if own is not None else (pod.document["spec"].get("securityContext") or {}).get("runAsUser")


def arguments(container: Document) -> list[str]:
    """Command and arguments, the words of a shell's script among them."""
    words: list[str] = []
    for word in [*(container.get("command") or ()), *(container.get("args") or ())]:
        if re.search(r"\s", word):
            try:
                words += shlex.split(word, comments=True)
                continue
            except ValueError:
                pass
        words.append(word)
    return words


def option(words: list[str], name: str) -> str | None:
    """What an option is given, ``--a=b`` or ``--a b``; None where it is not there."""
    for at, word in enumerate(words):
        # vLLM takes _ for - in its options.
        head, equals, value = word.partition("=")
        if head.replace("_", "-") == name:
            return value if equals else (words[at + 1] if at + 1 < len(words) else "")
    return None


def options(words: list[str], name: str) -> list[str]:
    """All that an option is given, where it may be there several times."""
    found = []
    for at, word in enumerate(words):
        value = option(words[at : at + 2], name) if word.partition("=")[0].replace("_", "-") == name else None
        if value is not None:
            found.append(value)
    return found


def environment(container: Document) -> dict[str, str | None]:
    """Variables by name; None where the value comes from elsewhere."""
    return {each["name"]: each.get("value") for each in container.get("env") or ()}


def mount_at(container: Document, path: str) -> Document | None:
    """The mount at a path."""
    mounts: list[Mapping[str, Any]] = container.get("volumeMounts") or []
    return next((each for each in mounts if each["mountPath"].rstrip("/") == path), None)


def volume(pod: Pod, name: str) -> Document:
    """A volume of the pod by name; empty where there is none."""
    volumes: list[Mapping[str, Any]] = pod.document["spec"].get("volumes") or []
    return next((each for each in volumes if each["name"] == name), {})


def claims(container: Document) -> set[tuple[str, str]]:
    """Resource claims that a container uses, as (name, request)."""
    found = (container.get("resources") or {}).get("claims") or ()
    return {(each["name"], each.get("request", "")) for each in found}


def gpus(container: Document) -> int:
    """GPUs that it gets from the device plugin."""
    limits = (container.get("resources") or {}).get("limits") or {}
    return int(limits.get("nvidia.com/gpu", 0) or 0)


def statuses(pod: Pod) -> list[Document]:
    """What the kubelet says of its containers."""
    status = pod.document.get("status") or {}
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _is_agent(container: Document) -> bool:
    return container["name"] == AGENT or _AGENT_MODULE in arguments(container)
