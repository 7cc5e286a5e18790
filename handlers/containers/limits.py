"""What an instance may use, and what it uses: limits of cgroups (v1 or v2), a function's own or the server's."""

import contextlib
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from handlers.images import wants
from handlers.images.spec import Spec

FOLDER_WRITABLE = 64 << 20  # bytes of a folder's /tmp


class Limits(NamedTuple):
    """What one instance may use: bytes of memory, number of processes and threads, cores, bytes that it may write.

    What it writes is in memory, so it counts there, too. `writable` None: half of the memory for an image, 64 MiB for
    a folder.
    """

    memory: int
    pids: int
    cpus: float
    writable: int | None = None

    def writable_by(self, spec: Spec) -> int:
        """Bytes that an instance of the Spec may write."""
        if self.writable is not None:
            return self.writable
        return self.memory // 2 if spec.layers else min(FOLDER_WRITABLE, self.memory)


class Bounds(NamedTuple):
    """The limits of a server: `default` for what asks for none, and the `most` that one may ask for."""

    default: Limits
    most: Limits

    def of(self, spec: Spec) -> Limits:
        """The limits of an instance: what its function asks for, at most `most`."""
        asked = {name: spec.settings[name] for name in Limits._fields if name in spec.settings}
        limits = self.default._replace(**asked)
        most = {name: min(getattr(limits, name), getattr(self.most, name)) for name in ('memory', 'pids', 'cpus')}
        limits = limits._replace(**most)
        return limits._replace(writable=min(limits.writable_by(spec), limits.memory))

    def check(self, spec: Spec) -> None:
        """Raise wants.BadWant if the function asks for more than the server allows."""
        for name in ('memory', 'pids', 'cpus'):
            asked, most = spec.settings.get(name), getattr(self.most, name)
            if asked is not None and asked > most:
                shown = [wants.to_text(each) if name == 'memory' else f'{each:g}' for each in (asked, most)]
                raise wants.BadWant(
                    f'{name}: {shown[0]} is more than FAAS_{name.upper()}_MAX, {shown[1]}',
                    'ask for less, or raise that setting of the server',
                )
        memory, writable = self.of(spec).memory, spec.settings.get('writable', 0)
        if writable > memory:
            raise wants.BadWant(
                f'writable: {wants.to_text(writable)} is more than the memory, {wants.to_text(memory)}',
                'what a function writes is in memory: raise memory, too',
            )


def usage(folders: Iterable[str]) -> dict[str, float]:
    """What a container uses: bytes of memory, processes and threads, seconds of processor time.

    `folders` are its cgroups: one with cgroup v2, one for each controller with v1. What cannot be read is left out.
    """
    found = {}
    for folder in folders:
        for name, key, unit in (
            ('memory.current', 'memory', 1),
            ('memory.usage_in_bytes', 'memory', 1),
            ('pids.current', 'pids', 1),
            ('cpuacct.usage', 'cpu_s', 1e9),
        ):
            with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, name)) as file:
                found[key] = int(file.read()) / unit if unit > 1 else int(file.read())
        with contextlib.suppress(OSError), open(os.path.join(folder, 'cpu.stat')) as file:
            if micros := re.search(r'^usage_usec ([0-9]+)$', file.read(), re.M):
                found['cpu_s'] = int(micros[1]) / 1e6
    return found


def hits(folders: Iterable[str]) -> dict[str, int]:
    """How often a container came up against a limit: {'pids', 'memory'}. For the folders see usage().

    'pids' counts processes and threads that could not start, 'memory' processes that were killed for lack of it.
    """
    found = {'pids': 0, 'memory': 0}
    for folder in folders:
        for name, key, word in (
            ('pids.events', 'pids', 'max'),
            ('memory.events', 'memory', 'oom_kill'),
            ('memory.oom_control', 'memory', 'oom_kill'),
        ):
            with contextlib.suppress(OSError), open(os.path.join(folder, name)) as file:
                if count := re.search(rf'^{word} ([0-9]+)$', file.read(), re.M):
                    found[key] = max(found[key], int(count[1]))
    return found
