"""Times and counts that no spec sets. Seconds."""

from typing import Final

GRACE: Final = 2.0
"""Agents keep each deadline themselves; ours comes after theirs, so that they can say what was wrong."""
RECONNECT: Final = 5.0
"""Within this time an agent that lost its session, or its operator, is back if it is alive."""
BATCH: Final = 5.0
"""Longest wait of a late joiner for others that are about to join."""
SETTLE: Final = 2.0
"""From the first report of a broken epoch until the culprit must have been told."""
QUIET: Final = 2.0
"""A step that is over sooner is never shown in the status."""
BACKOFF: Final = 5.0
BACKOFF_LIMIT: Final = 60.0
"""First and longest wait before an excluded member is tried again."""
TRIES: Final = 3
"""After so many tries even a restarted member waits."""
RETRIES: Final = 2
"""Epochs that may be lost with nobody to blame before the rollout has failed."""
CRASHES: Final = 2
"""Engines that crash on one version before it counts as rejected."""
NAMES: Final = 5
"""Pods that a message names before it only counts them."""
