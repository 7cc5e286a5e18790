"""Scaler: how many instances a function should have. Today 0 or 1."""

from typing import NamedTuple

CRASH_AGE_S = 10  # an instance that dies before this age is crashing: the next start waits
CRASH_FIRST_DELAY_S, CRASH_LAST_DELAY_S = 0.5, 30


class Situation(NamedTuple):
    """What the number of instances depends on. Times are of one clock, in seconds."""

    now: float
    instances: int  # that serve or are being started
    waiting: bool  # a client waits for an instance
    last_use: float
    failures: int  # of young instances, one after the other
    last_failure: float
    idle_timeout_s: float  # 0: never


def instances_wanted(situation: Situation) -> int:
    """How many instances there should be now."""
    if situation.instances:
        idle_s = situation.now - situation.last_use
        return 0 if 0 < situation.idle_timeout_s < idle_s and not situation.waiting else situation.instances
    return 1 if situation.waiting and situation.now >= start_time(situation.failures, situation.last_failure) else 0


def start_time(failures: int, last_failure: float) -> float:
    """When the next instance may be started: ever later after one failure more."""
    if not failures:
        return last_failure
    return last_failure + min(CRASH_LAST_DELAY_S, CRASH_FIRST_DELAY_S * 2 ** min(failures - 1, 10))


class Scaler:
    """Remembers what `instances_wanted` needs to know of one function."""

    def __init__(self, idle_timeout_s: float, now: float) -> None:
        self.idle_timeout_s, self._last_use = idle_timeout_s, now
        self._failures, self._last_failure = 0, now

    def wanted(self, now: float, instances: int, waiting: bool) -> int:
        """How many instances there should be."""
        return instances_wanted(
            Situation(
                now, instances, waiting, self._last_use, self._failures, self._last_failure, self.idle_timeout_s
            )
        )

    def delay_s(self, now: float) -> float:
        """How long the next start has to wait."""
        return max(0.0, start_time(self._failures, self._last_failure) - now)

    def used(self, now: float) -> None:
        """The function has connections."""
        self._last_use = max(self._last_use, now)

    def failed(self, now: float, age_s: float) -> None:
        """An instance of that age has ended that should not have."""
        self._failures = self._failures + 1 if age_s < CRASH_AGE_S else 0
        self._last_failure = now

    def recovered(self) -> None:
        """An instance has grown old enough, or the code is another."""
        self._failures = 0
