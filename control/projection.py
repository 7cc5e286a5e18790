"""One worker for each thing outside the registry that follows the registry."""

import threading
from collections.abc import Callable


class Projection:
    """Carries what the registry says to one place outside it.

    Calls that arrive while one run is under way share the next run.
    """

    def __init__(self, apply: Callable[[], None], is_current: Callable[[], bool] = lambda: True) -> None:
        """`is_current()` is a cheap look at the place. It raises OSError when it cannot tell."""
        self._apply, self._is_current = apply, is_current
        self._turn, self._count = threading.Lock(), threading.Lock()
        self._wanted = self._done = 0  # generations
        self.stale = False  # the last run failed

    def sync(self) -> None:
        """Return when a run that began after this call has ended. Raises what that run raised."""
        with self._count:
            self._wanted += 1
            mine = self._wanted
        with self._turn:
            if self._done >= mine:
                return
            generation, self.stale = self._wanted, True
            self._apply()
            self._done, self.stale = generation, False

    def sync_if_stale(self) -> None:
        """Do again what failed."""
        if self.stale:
            self.sync()

    def heal(self) -> None:
        """Do it again as well when somebody else has changed the place."""
        if self.stale or not self._is_current():
            self.sync()
