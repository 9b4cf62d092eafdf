"""Where versions come from, and which one is wanted."""

from dataclasses import dataclass

from weightsync_contract.messages import Published, Source, Transfer, VersionId
from weightsync_contract.reasons import Reason, Role
from weightsync_operator.core.model import AgentView, PodView, VersionTarget, World
from weightsync_operator.core.spec import describe


@dataclass(frozen=True, slots=True)
class Trainer:
    """A trainer's pod whose agent has a session or had one."""

    pod: PodView
    view: AgentView

    @property
    def source(self) -> Source:
        return (self.view.observed.source if self.view.observed else None) or Source()

    @property
    def transfer(self) -> Transfer:
        return self.view.observed.transfer if self.view.observed else Transfer()


@dataclass(frozen=True, slots=True)
class SourceView:
    """The trainer that the fleet follows, if there is one, and what people are told about it."""

    trainer: Trainer | None
    usable: bool
    """Its agent has a session: versions can be had from it."""
    latest: Published | None
    """The newest version of the run that was published in last; not always a later one than the current."""
    reason: Reason
    message: str
    rivals: tuple[str, ...] = ()
    """Names of other pods that publish too."""

    @property
    def uid(self) -> str:
        return self.trainer.pod.uid if self.trainer else ""

    def retains(self, version: VersionId) -> Published | None:
        """The copy that can be had at this moment."""
        if not self.usable or self.trainer is None:
            return None
        return next((each for each in self.trainer.source.versions if each.version == version), None)


def target(published: Published) -> VersionTarget:
    """What is needed to bring a version and to check it."""
    return VersionTarget(published.version, published.layout, published.digest, published.total_bytes)


def look(world: World, incumbent: str) -> SourceView:
    """Choose the trainer to follow; ``incumbent`` is the uid of the one followed so far.

    Of several that publish the incumbent stays. Pods of a training job whose process never published are no
    publishers. Raises nothing; what is wrong is in reason and message.
    """
    pods = [pod for pod in world.trainers if pod.uid not in world.claims]
    if not pods:
        return _none(f"no pod matches the trainer selector {describe(world.spec.trainer)}")
    publishers = _publishers(world, pods)
    if not publishers:
        return _nobody(world, pods)
    active = [each for each in publishers if each.source.connected and each.view.connected]
    chosen = _choose(world, publishers, active, incumbent)
    if chosen is None:
        both = " and ".join(each.pod.name for each in active)
        message = f"{both} publish, and none of them was followed before: stop all but one"
        return SourceView(None, False, None, Reason.TRAINER_CONFLICT, message)
    rivals = tuple(each.pod.name for each in active if each is not chosen)
    return _describe(world, chosen, rivals)


def _publishers(world: World, pods: list[PodView]) -> list[Trainer]:
    found = []
    for pod in sorted(pods, key=lambda pod: (pod.name, pod.uid)):
        view = world.agents.get(pod.uid)
        if view is None or view.hello.role is not Role.TRAINER:
            continue
        trainer = Trainer(pod, view)
        if trainer.source.run or trainer.source.versions:
            found.append(trainer)
    return found


def _nobody(world: World, pods: list[PodView]) -> SourceView:
    if all(pod.succeeded for pod in pods):
        return SourceView(None, False, None, Reason.TRAINER_COMPLETED, "the trainer's pod has completed")
    connected = [pod for pod in pods if (view := world.agents.get(pod.uid)) and view.connected]
    if not connected:
        return _none(f"no agent of {_names(pods)} has connected: is the sidecar running?")
    return _none(f"no process of {_names(connected)} has published: call weightsync_engine.client.publish()")


def _choose(world: World, publishers: list[Trainer], active: list[Trainer], incumbent: str) -> Trainer | None:
    alive = [each for each in publishers if not each.pod.finished]
    for each in publishers:
        followed = each.pod.uid == incumbent or (
            not incumbent and world.status.source is not None and world.status.source.pod == each.pod.name
        )
        # One that publishes takes over from one whose publisher is gone, never from one that is there.
        others = [other for other in active if other is not each and other.source.versions]
        gone = each.pod.finished or each.pod.terminating or not each.source.connected
        if followed and not (gone and others):
            return each
    able = [each for each in active if each.source.versions and not each.pod.terminating] or active
    if len(able) > 1:
        return None
    return next(iter([*able, *alive, *publishers]))


def _describe(world: World, trainer: Trainer, rivals: tuple[str, ...]) -> SourceView:
    name, source = trainer.pod.name, trainer.source
    usable = trainer.view.connected and trainer.view.observed is not None and not trainer.pod.finished
    latest, conflict = _latest(world, source)
    if rivals:
        message = f"{', '.join(rivals)} publish too; {name} was first and stays: stop the others"
        return SourceView(trainer, usable, latest, Reason.TRAINER_CONFLICT, message, rivals)
    if conflict:
        return SourceView(trainer, usable, None, Reason.VERSION_CONFLICT, conflict)
    if source.completed or trainer.pod.succeeded:
        kept = f"; its agent still keeps {len(source.versions)} versions" if usable else ""
        return SourceView(
            trainer, usable, latest, Reason.TRAINER_COMPLETED, f"{name}: training has completed{kept}"
        )
    if not usable:
        return SourceView(
            trainer, False, latest, Reason.NO_PUBLISHER, f"the agent of {name} is not connected"
        )
    process = "" if source.connected else "; its training process is not connected"
    message = f"{name}, run {source.run}{process}"
    return SourceView(trainer, usable, latest, Reason.CONNECTED, message)


def _latest(world: World, source: Source) -> tuple[Published | None, str]:
    """The newest version of the run that was published in last, and what is wrong with it."""
    if not source.versions:
        return None, ""
    run = source.versions[-1].version.run
    newest = max(
        (each for each in source.versions if each.version.run == run), key=lambda each: each.version.version
    )
    current = world.status.current
    if current is None or (current.run, current.version) != (run, newest.version.version):
        return newest, ""
    if newest.digest and current.digest and newest.digest != current.digest:
        message = (
            f"{newest.version} was published again with other bytes ({newest.digest}, not {current.digest}): "
            "publish it under another number"
        )
        return None, message
    return newest, ""


def _none(message: str) -> SourceView:
    return SourceView(None, False, None, Reason.NO_PUBLISHER, message)


def _names(pods: list[PodView]) -> str:
    return ", ".join(pod.name for pod in pods[:5])
