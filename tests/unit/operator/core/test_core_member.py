"""What a member's own words make it."""

import pytest

from weightsync_contract.messages import Hello, Observed, PodRef, Transfer, TransferState, VersionId
from weightsync_contract.reasons import Role
from weightsync_operator.core.membership import Member, Standing
from weightsync_operator.core.model import AgentView, PodView, VersionTarget

TARGET = VersionTarget(VersionId("run", 2), "layout", "digest", 100)


def member(transfer: Transfer) -> Member:
    hello = Hello(1, 1, PodRef("ns", "pod", "uid"), Role.INFERENCE, "i", 1)
    view = AgentView(hello, Observed(1, 1, 1, 1, transfer), connected=True, changed_at=0.0)
    return Member(PodView("uid", "ns", "pod"), view, Standing.READY)


@pytest.mark.parametrize("state", [TransferState.STAGED, TransferState.ABORTING])
def test_what_is_staged_stays_wanted_also_while_the_agent_leaves_its_group(state: TransferState) -> None:
    told = Transfer(state, version=TARGET.version, digest="digest", bytes=100, total_bytes=100)
    assert member(told).holds(TARGET, verify=True)


@pytest.mark.parametrize(
    "told",
    [
        pytest.param(Transfer(TransferState.ABORTING), id="leaves with nothing"),
        pytest.param(
            Transfer(TransferState.RECEIVING, version=TARGET.version, bytes=99), id="still receives"
        ),
        pytest.param(
            Transfer(TransferState.STAGED, version=VersionId("run", 1), digest="digest"), id="older"
        ),
        pytest.param(
            Transfer(TransferState.STAGED, version=TARGET.version, digest="other"), id="other bytes"
        ),
    ],
)
def test_anything_less_is_not_held(told: Transfer) -> None:
    assert not member(told).holds(TARGET, verify=True)
