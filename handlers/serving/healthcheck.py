"""The HEALTHCHECK of an image: a program in the instance that says whether the instance is well."""

from collections.abc import Callable

from handlers.containers.containers import Container
from handlers.serving.instance import Surroundings

MOST_S = 30  # one check may take no longer: it has one of the threads that the function may keep (apart.py)


def checked(around: Surroundings, container: Container, check: dict) -> str | None:
    """None if the instance says that it is well, else what it did instead. It waits for a program of the instance."""
    return around.containers.execute(container, check['args'], min(check['timeout_s'], MOST_S))


class Healthcheck:
    """Runs the check from time to time, until the instance fails it too often. In the loop's thread."""

    def __init__(
        self, around: Surroundings, name: str, container: Container, check: dict, fail: Callable[[str], object]
    ) -> None:
        self._around, self._name, self._container, self._check, self._fail = around, name, container, check, fail
        self._failures, self._ended = 0, False
        self._later()

    def end(self) -> None:
        self._ended = True

    def _later(self):
        self._around.loop.later(self._check['interval_s'], self._look)

    def _look(self):
        if not self._ended and not self._around.apart.call(self._name, self._run, within_s=MOST_S):
            self._later()

    def _run(self):
        self._around.loop.call(self._looked, checked(self._around, self._container, self._check))

    def _looked(self, said):
        self._failures = self._failures + 1 if said else 0
        if self._ended:
            return
        if self._failures >= self._check['retries']:
            self._fail(f'failed its HEALTHCHECK {self._failures} times: {said}')
        else:
            self._later()
