"""The kernel's memory for the connections of a function, which its limit of memory does not cover."""

import errno
import os
import socket
from collections.abc import Iterable

import registry
from control.events import Emit
from handlers.containers.limits import Bounds
from handlers.serving.pool import Pool
from host import sock_diag

AFTER = 3 / 4  # of the bound: so much is left when the heaviest connections were ended
MACHINE_PART = 32  # of its memory. The kernel shortens all buffers when all TCP connections have a 16th (tcp_mem)


class TCPMemory:
    """Ends the heaviest connections of a function whose connections take more than its limit of memory.

    A connection takes up to 4 MiB for what its client does not read (net.ipv4.tcp_wmem), and 6 MiB for what the
    function does not. Idle ones take nothing. On a small machine the bound is less.
    """

    def __init__(self, bounds: Bounds, emit: Emit) -> None:
        """`bounds` are those of instances."""
        self._bounds, self._emit = bounds, emit
        self._machine = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')

    def most(self, pool: Pool) -> int:
        """How many bytes the connections of a function may take."""
        revision = pool.revision
        memory = self._bounds.of(revision.spec).memory if revision else self._bounds.default.memory
        return min(memory, self._machine // MACHINE_PART)

    def look(self, taken: dict[bytes, int], functions: Iterable[tuple[registry.Function, Pool]]) -> None:
        """`taken` is {address packed: bytes}. Raises OSError."""
        for function, pool in functions if taken else ():
            amount = taken.get(socket.inet_pton(socket.AF_INET6, function.ipv6), 0)
            if amount > (most := self.most(pool)):
                self._relieve(function, pool, amount, most)

    def _relieve(self, function: registry.Function, pool: Pool, amount: int, most: int) -> None:
        text = f"its connections take {amount >> 20} MiB of the kernel's memory, and {most >> 20} MiB are allowed"
        ended, left = 0, amount
        try:
            for size, connection in sock_diag.heaviest(function.ipv6, 80):
                if left <= most * AFTER:
                    break
                sock_diag.end(connection)
                ended, left = ended + 1, left - size
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return pool.around.loop.call(pool.instances.kill, text)  # a kernel without CONFIG_INET_DIAG_DESTROY
        self._emit('handler', f'{function.name}: {text}: ended the {ended} heaviest', name=function.name, problem=True)
