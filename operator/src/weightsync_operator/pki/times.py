"""How long certificates live, and how long each step of a rotation waits."""

from dataclasses import dataclass
from typing import Final

_YEAR: Final = 365 * 86400.0
_MOST_SKEW: Final = 300.0


@dataclass(frozen=True, slots=True)
class PkiTimes:
    """In seconds. The defaults, and why:

    A year for the authority: nobody has to do anything for its rotation, so it may be short, and it leaves four
    months between the first try (two thirds) and the end. A day for a serving certificate: it is never stored,
    so a stolen one is of use for a day at most, and renewed at half it outlives an API server that is away for
    twelve hours. Ten minutes before a new authority signs: the kubelet brings a changed ConfigMap into running
    pods within about two. Half a minute between two looks: how long a ConfigMap that somebody deleted is away.
    """

    authority: float = _YEAR
    certificate: float = 86400.0
    grace: float = 600.0
    check: float = 30.0

    def __post_init__(self) -> None:
        if min(self.authority, self.certificate, self.grace, self.check) <= 0:
            raise ValueError("certificates' times must be above zero")
        if self.check > self.certificate / 4:
            raise ValueError(
                f"a certificate of {self.certificate:g} s, renewed at half of that, can't be looked after each "
                f"{self.check:g} s: look at least four times in its life"
            )
        needed = 6 * max(self.certificate, 2 * (self.grace + self.check))
        if self.authority < needed:
            raise ValueError(
                f"an authority of {self.authority:g} s is too short to be rotated in time with certificates of "
                f"{self.certificate:g} s and {self.grace:g} s of grace: give it {needed:g} s or more"
            )

    @property
    def skew(self) -> float:
        """How far the clocks of two machines may differ."""
        return min(_MOST_SKEW, self.certificate / 10)

    @property
    def trusted_after(self) -> float:
        """For how long what a retired authority signed may still be in use.

        A replica signs with what it has just read, so the last such certificate is one request younger.
        """
        return self.certificate + self.check + 2 * self.skew
