"""Constants a user reads: conditions, reasons, codes. One spelling in status, event, metric and log."""

from enum import StrEnum


class Role(StrEnum):
    """What a pod is to a WeightSync (the value of the label ``weightsync.dev/role``)."""

    TRAINER = "trainer"
    INFERENCE = "inference"


class Condition(StrEnum):
    """Condition types of a WeightSync."""

    READY = "Ready"
    PROGRESSING = "Progressing"
    SOURCE_AVAILABLE = "SourceAvailable"
    MEMBERS_HEALTHY = "MembersHealthy"
    ACTION_TAKEN = "ActionTaken"
    """The answer to the annotation weightsync.dev/action; there only while that is."""


class Reason(StrEnum):
    """Condition reasons; the same word names the Event and the metric label."""

    # Ready
    SYNCED = "Synced"
    ROLLING_OUT = "RollingOut"
    NO_MEMBERS = "NoMembers"
    WAITING_FOR_FIRST_VERSION = "WaitingForFirstVersion"
    DEGRADED = "Degraded"
    UNSUPPORTED = "Unsupported"
    # Progressing
    GROUPING = "Grouping"
    CHECKING = "Checking"
    TRANSFERRING = "Transferring"
    COMMITTING = "Committing"
    PAUSED = "Paused"
    CANARY_PAUSED = "CanaryPaused"
    CANARY_CHECKING = "CanaryChecking"
    CHECK_FAILED = "CheckFailed"
    CANARY_LOST = "CanaryLost"
    SUPERSEDED = "Superseded"
    ABORTED = "Aborted"
    ROLLED_BACK = "RolledBack"
    COMPLETE = "Complete"
    WAITING_FOR_ROSTER = "WaitingForRoster"
    JOIN_TIMEOUT = "JoinTimeout"
    TRANSFER_TIMEOUT = "TransferTimeout"
    TRANSFER_FAILED = "TransferFailed"
    MANIFEST_REFUSED = "ManifestRefused"
    DIGEST_MISMATCH = "DigestMismatch"
    COMMIT_TIMEOUT = "CommitTimeout"
    ENGINE_REJECTED = "EngineRejected"
    # SourceAvailable
    CONNECTED = "Connected"
    NO_PUBLISHER = "NoPublisher"
    TRAINER_CONFLICT = "TrainerConflict"
    VERSION_NOT_RETAINED = "VersionNotRetained"
    VERSION_CONFLICT = "VersionConflict"
    TRAINER_COMPLETED = "TrainerCompleted"
    # MembersHealthy
    ALL_HEALTHY = "AllHealthy"
    FENCED = "Fenced"
    EXCLUDED = "Excluded"
    CONFLICT = "Conflict"
    CAPABILITY_MISSING = "CapabilityMissing"
    AGENT_MISSING = "AgentMissing"
    # ActionTaken
    ACCEPTED = "Accepted"
    STALE = "Stale"
    NOT_PAUSED = "NotPaused"
    PINNED = "Pinned"
    INVALID = "Invalid"
    # Events only: what agents check the operator's certificate with
    AUTHORITY_REPLACED = "AuthorityReplaced"
    AUTHORITY_NOT_OURS = "AuthorityNotOurs"
    BUNDLE_NOT_OURS = "BundleNotOurs"
    BUNDLE_NOT_WRITTEN = "BundleNotWritten"


class Outcome(StrEnum):
    """How a rollout ended, in ``status.rollout.outcome``."""

    IN_PROGRESS = "InProgress"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SUPERSEDED = "Superseded"
    ABORTED = "Aborted"


class FailureCode(StrEnum):
    """Why an agent could not do what was asked of it."""

    JOIN_TIMEOUT = "JoinTimeout"
    TRANSFER_TIMEOUT = "TransferTimeout"
    NO_PROGRESS = "NoProgress"
    PEER_LOST = "PeerLost"
    CHILD_FAILED = "ChildFailed"
    DIGEST_MISMATCH = "DigestMismatch"
    MANIFEST_REFUSED = "ManifestRefused"
    STAGING_FAILED = "StagingFailed"
    ENGINE_UNREACHABLE = "EngineUnreachable"
    ENGINE_RESTARTED = "EngineRestarted"
    COMMIT_TIMEOUT = "CommitTimeout"
    APPLY_FAILED = "ApplyFailed"
    VERSION_NOT_RETAINED = "VersionNotRetained"
    UNSUPPORTED = "Unsupported"


class RefusalCode(StrEnum):
    """Why the operator refuses a session or an agent a desired state."""

    NOT_LEADER = "NotLeader"
    TOKEN_INVALID = "TokenInvalid"
    TOKEN_UNREACHABLE = "TokenReviewUnavailable"
    WRONG_POD = "WrongPod"
    UNKNOWN_POD = "UnknownPod"
    PROTOCOL = "ProtocolUnsupported"
    OVERSIZED = "FrameTooLarge"
    MALFORMED = "FrameMalformed"
    STALE_TERM = "StaleTerm"
    STALE_SEQ = "StaleSequence"
    STALE_EPOCH = "StaleEpoch"
    REPLACED = "Replaced"
    SILENT = "PeerSilent"
    TOKEN_EXPIRED = "TokenExpired"


class PublishCode(StrEnum):
    """Why a publish was refused. Nothing has changed when one of these comes back."""

    UNEQUAL_LENGTHS = "UnequalLengths"
    UNKNOWN_DTYPE = "UnknownDtype"
    BAD_NAME = "BadName"
    DUPLICATE_NAME = "DuplicateName"
    BAD_SHAPE = "BadShape"
    EMPTY = "NoTensors"
    BAD_VERSION = "BadVersion"
    BAD_RUN = "BadRun"
    VERSION_NOT_GROWING = "VersionNotGrowing"
    VERSION_CONFLICT = "VersionConflict"
    ANOTHER_PUBLISHER = "AnotherPublisher"
    TOO_LARGE = "TooLarge"
    NO_SPACE = "NoSpace"
    BAD_FILE = "BadFile"
    MALFORMED = "Malformed"
