"""COMMITTING: those who have the version staged and verified switch to it."""

from weightsync_contract.messages import ServingState
from weightsync_contract.reasons import FailureCode, Reason
from weightsync_operator.core.blame import LASTING, REASON_OF_CODE
from weightsync_operator.core.exclusion import exclude
from weightsync_operator.core.facts import Facts, State
from weightsync_operator.core.goal import ahead
from weightsync_operator.core.limits import CRASHES, GRACE, RECONNECT
from weightsync_operator.core.membership import Member, Standing
from weightsync_operator.core.memory import Round, Step
from weightsync_operator.core.outcome import fail
from weightsync_operator.core.waves import done


def commit(facts: Facts, state: State) -> State | None:
    """Take what each member says of its switch; end when nobody is waited for any more."""
    round_ = state.round
    if round_ is None or round_.step is not Step.COMMITTING:
        return None
    open_ = _open(facts, state, round_)
    for member in open_:
        after = _failed(facts, state, round_, member)
        if after is not None:
            return after
    if _crashed(facts, state, round_) >= CRASHES and not round_.catch_up:
        message = f"{CRASHES} engines failed on it; last, {round_.message}"
        return fail(facts, state, Reason.ENGINE_REJECTED, message)
    if open_ and facts.now < round_.deadline + GRACE:
        return _spare(facts, state, round_, open_)
    if open_:
        member = open_[0]
        why = "its agent's session is gone" if not member.connected else "it did not switch in time"
        return exclude(facts, state, member, Reason.COMMIT_TIMEOUT, f"{member.name}: {why}")
    told = [member for member in facts.scope(round_) if not round_.waves or member.uid in round_.committed]
    if any(member.serves(round_.target.version) for member in told):
        return done(facts, state)
    return fail(facts, state, round_.reason, round_.message or "nobody is left who could switch to it")


def _open(facts: Facts, state: State, round_: Round) -> list[Member]:
    version = round_.target.version
    return [
        member
        for member in facts.scope(round_)
        if member.uid in round_.committed
        and not member.serves(version)
        and not ahead(facts, state, member, version)
        and not state.memory.excluded(member.uid)
    ]


def _failed(facts: Facts, state: State, round_: Round, member: Member) -> State | None:
    """The member said that it can't."""
    serving, version = member.serving, round_.target.version
    failure = serving.failure
    if failure is not None and (member.uid, failure) in round_.stale:
        failure = None
    if serving.state is ServingState.FENCED:
        state = state.change(fallen=(*round_.fallen, member.uid)) if round_.waves else state
        reason = REASON_OF_CODE.get(failure.code, Reason.FENCED) if failure else Reason.FENCED
        return exclude(facts, state, member, reason, f"{member.name}: {member.message or 'fenced'}")
    if serving.state is ServingState.APPLYING:
        return None
    if failure is not None and failure.version == version:
        lasting = failure.code in LASTING or failure.code is FailureCode.DIGEST_MISMATCH
        message = f"{member.name}: {failure.message}"
        return exclude(facts, state, member, REASON_OF_CODE[failure.code], message, lasting)
    if member.connected and not member.holds(round_.target, facts.verify) and not member.has(version):
        message = f"{member.name}: what it had staged is lost"
        return exclude(facts, state, member, Reason.TRANSFER_FAILED, message)
    return None


def _spare(facts: Facts, state: State, round_: Round, open_: list[Member]) -> State | None:
    """Engines that are down keep nobody waiting once all others have switched: what is staged stays with
    their agents, and they switch when they are back."""
    if facts.now < round_.step_began + RECONNECT or any(
        each.standing is not Standing.PENDING for each in open_
    ):
        return None
    member = open_[0]
    message = f"{member.name}: its engine does not answer; it switches once it is back"
    return exclude(facts, state, member, Reason.COMMIT_TIMEOUT, message)


def _crashed(facts: Facts, state: State, round_: Round) -> int:
    crashes = (Reason.ENGINE_REJECTED, Reason.FENCED)
    return sum(
        1
        for each in state.memory.exclusions
        if each.active
        and each.uid in round_.scope
        and each.version == round_.target.version
        and each.reason in crashes
    )
