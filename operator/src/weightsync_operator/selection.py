"""Which pods a WeightSync selects, and whose a pod is when several select it. Pure."""

from collections.abc import Iterable

from weightsync_contract.messages import ObjectRef
from weightsync_operator.core.model import PodView
from weightsync_operator.core.spec import matches
from weightsync_operator.documents import Stored


def selects(weightsync: Stored, pod: PodView) -> bool:
    """Whether ``pod`` is a trainer or a member by this WeightSync's spec, whoever owns it."""
    if pod.namespace != weightsync.ref.namespace:
        return False
    labels = dict(pod.labels)
    return matches(weightsync.spec.trainer, labels) or matches(weightsync.spec.inference, labels)


def owner(pod: PodView, weightsyncs: Iterable[Stored]) -> Stored | None:
    """Whose pod it is: the one's whose epoch it is in, else the oldest's, of those that select it.

    Being in an epoch comes first so that widening a selector never takes a working pod from somebody.
    """
    candidates = [each for each in weightsyncs if selects(each, pod)]
    return min(candidates, key=lambda each: _precedence(pod, each), default=None)


def claims(weightsync: Stored, pods: Iterable[PodView], others: Iterable[Stored]) -> dict[str, ObjectRef]:
    """Pods (by uid) that ``weightsync`` selects and another one owns."""
    everyone = [weightsync, *(each for each in others if each.ref.uid != weightsync.ref.uid)]
    claimed = {}
    for pod in pods:
        holder = owner(pod, everyone)
        if holder is not None and holder.ref.uid != weightsync.ref.uid:
            claimed[pod.uid] = holder.ref
    return claimed


def _precedence(pod: PodView, weightsync: Stored) -> tuple[bool, str, str]:
    group = weightsync.status.group
    in_epoch = group is not None and any(row.endswith(f":{pod.uid}") for row in group.members)
    return not in_epoch, weightsync.created, weightsync.ref.uid
