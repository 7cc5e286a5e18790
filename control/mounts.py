"""Folders of the server that functions see: a service that is restarted makes its folder anew."""

import threading

from control.deployments import Deployments
from control.events import Emit
from control.functions import Functions
from host.errors import EXPECTED


class Mounts:
    """Redeploys the functions whose instances see a folder that is no longer the one at its path."""

    def __init__(self, functions: Functions, deployments: Deployments, emit: Emit) -> None:
        self._functions, self._deployments, self._emit = functions, deployments, emit
        self._tried: dict[str, set[tuple]] = {}  # {function: the folders that it was redeployed for}
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """For the monitor. It does not wait: an instance may take long to start."""
        if self._thread and self._thread.is_alive():
            return
        changed = self._functions.changed_mounts()
        wanted = {name: now for name, now in changed.items() if now != self._tried.get(name)}
        self._tried = {name: now for name, now in self._tried.items() if name in changed} | wanted
        if wanted:
            self._thread = threading.Thread(target=self._redeploy, args=(wanted,), name='mounts', daemon=True)
            self._thread.start()

    def _redeploy(self, wanted):
        for name, folders in wanted.items():
            paths = ', '.join(sorted(path for path, *_ in folders))
            try:
                self._deployments.redeploy(name, f'{paths} was made anew')
            except EXPECTED as error:
                self._emit('mounts', f'{name} goes on with a former {paths}: {error}', name=name, problem=True)
