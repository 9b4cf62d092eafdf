"""Which of the operator's words count."""

from weightsync_contract.messages import Desired, ObjectRef, Released
from weightsync_contract.reasons import RefusalCode
from weightsync_engine.agent.core.effects import KillChild, OpenChild, Report, SendNack, WriteJournal
from weightsync_engine.agent.core.events import DesiredReceived, ReleasedReceived, SessionOpened
from weightsync_engine.agent.core.journal import Seen


def refusal(effects):
    (effect,) = effects
    assert isinstance(effect, SendNack)
    return effect.nack


def test_a_higher_term_and_epoch_are_durable_before_they_count(member, kit):
    did = member.desire(group=kit.group(3))
    assert did[0] == WriteJournal(Seen("cr-1", 1, 3))
    assert isinstance(did[1], OpenChild)
    assert (member.told.term, member.told.seq, member.told.highest_term) == (1, 1, 1)


def test_a_term_that_can_not_be_made_durable_is_not_obeyed(member, kit):
    member.journal_works = False
    did = member.desire(group=kit.group())
    assert [type(effect) for effect in did] == [WriteJournal]
    assert member.told.term == 0
    member.journal_works = True
    member.seq -= 1
    assert any(isinstance(effect, OpenChild) for effect in member.desire(group=kit.group())), "said again"


def test_a_lower_term_is_refused_and_told_the_higher(member, kit):
    member.term = 5
    member.desire()
    nack = refusal(member.send(DesiredReceived(Desired(kit.REF, 4, 99))))
    assert (nack.code, nack.term) == (RefusalCode.STALE_TERM, 5)
    assert member.told.term == 5


def test_a_lower_sequence_is_refused(member, kit):
    member.desire()
    member.desire()
    nack = refusal(member.send(DesiredReceived(Desired(kit.REF, 1, 1))))
    assert (nack.code, nack.seq) == (RefusalCode.STALE_SEQ, 2)


def test_a_higher_term_may_begin_its_sequence_anew(member, kit):
    member.seq = 50
    member.desire()
    member.send(DesiredReceived(Desired(kit.REF, 2, 1)))
    assert (member.told.term, member.told.seq) == (2, 1)


def test_an_older_epoch_is_refused_under_whatever_term(member, kit):
    member.desire(group=kit.group(7))
    nack = refusal(member.send(DesiredReceived(Desired(kit.REF, 1, 2, group=kit.group(6)))))
    assert nack.code is RefusalCode.STALE_EPOCH
    assert member.told.transfer.epoch == 7


def test_terms_and_epochs_outlive_the_agent(member, kit):
    member.term = 5
    member.desire(group=kit.group(7))
    agent = member.restart()
    assert refusal(agent.send(DesiredReceived(Desired(kit.REF, 4, 99)))).code is RefusalCode.STALE_TERM
    assert (
        refusal(agent.send(DesiredReceived(Desired(kit.REF, 5, 1, group=kit.group(6))))).code
        is RefusalCode.STALE_EPOCH
    )
    assert agent.told.highest_term == 5
    assert agent.told.transfer.epoch == 7, "an operator that lost its status goes on from there"


def test_each_weightsync_has_terms_of_its_own(member, kit):
    member.term = 5
    member.desire()
    other = ObjectRef("default", "other", "cr-2")
    member.send(DesiredReceived(Desired(other, 1, 1)))
    assert (member.told.term, member.told.highest_term) == (1, 5)


def test_the_last_of_two_words_that_wait_for_the_journal_counts(member, kit):
    first = Desired(kit.REF, 1, 1, group=kit.group(1))
    second = Desired(kit.REF, 2, 1, group=kit.group(2))
    member.send(DesiredReceived(first), DesiredReceived(second))
    assert member.told.term == 2
    assert member.state.desired.taken == second


def test_a_release_by_an_older_term_is_refused(member, kit):
    member.term = 5
    member.join()
    nack = refusal(member.send(ReleasedReceived(Released(4))))
    assert (nack.code, nack.term) == (RefusalCode.STALE_TERM, 5)
    assert member.told.transfer.state.value == "Joined"


def test_the_released_leave_their_group(member):
    member.join()
    assert KillChild(1) in member.send(ReleasedReceived(Released(1)))
    assert (member.told.term, member.told.seq) == (0, 0)


def test_every_session_hears_everything(member):
    member.send(SessionOpened())
    mark = len(member.did)
    member.send(SessionOpened())
    assert [type(effect) for effect in member.did[mark:]] == [Report]
