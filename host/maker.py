"""The process that makes networks and changes nftables for egress; see network_maker.py for its messages."""

import array
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

from host import process
from host.errors import FaasError
from host.network_maker import MOST_TEXT

ANSWER_MAX_S = 10


class MakerError(FaasError):
    """The process does not answer as it should."""

    status = 503


class Maker:
    """Starts the process when it is needed first, and again when it has ended."""

    def __init__(self) -> None:
        self._child: subprocess.Popen | None = None
        self._channel: socket.socket | None = None
        self._lock = threading.Lock()

    def make(self, users: int, rules: str, meanwhile: Callable[[int], None]) -> str:
        """Make a network of the user namespace `users`, and put the rules in place: what is wrong with them.

        `meanwhile` is called with the descriptor of the network (it owns it), before it is known of the rules.
        Raises MakerError, OSError, CommandError.
        """
        with self._lock:
            try:
                self._send(rules, [users])
                wrong, made = None, False
                while wrong is None or not made:
                    said, fds = self._answer()
                    if said[:1] == b'R':
                        wrong = said[1:].decode(errors='replace')
                    elif not fds:
                        raise MakerError(f'no network can be made: {said[1:].decode()}')
                    else:
                        made = True
                        meanwhile(fds[0])
                return wrong
            except BaseException:
                self._end()
                raise

    def change(self, rules: str) -> str:
        """What is wrong with the rules, '' when they are in place. Raises MakerError, OSError, CommandError."""
        with self._lock:
            try:
                self._send(rules, [])
                return self._answer()[0][1:].decode(errors='replace')
            except BaseException:
                self._end()
                raise

    def is_author(self, message: bytes) -> bool:
        """True if the netlink message tells of a change that the process made (nlmsghdr, its port is the pid)."""
        child = self._child
        return child is not None and message[12:16] == child.pid.to_bytes(4, sys.byteorder)

    def _send(self, rules, fds):
        text = rules.encode()
        if not 0 < len(text) <= MOST_TEXT:
            raise MakerError(f'the rules have {len(text)} bytes')
        if self._child is None or self._child.poll() is not None:
            self._end()
            self._start()
        socket.send_fds(self._channel, [text], fds)

    def _answer(self):
        said, extra, _, _ = self._channel.recvmsg(8192, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        fds = array.array('i')
        for level, kind, data in extra:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data)
        if not said:
            raise MakerError('the maker of networks has ended')
        return said, list(fds)

    def _start(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            program = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'network_maker.py')
            argv = [sys.executable, '-I', '-S', program, str(theirs.fileno())]
            try:
                self._child = process.popen(
                    argv, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
                )
            except BaseException:
                ours.close()
                raise
        for side in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            ours.setsockopt(socket.SOL_SOCKET, side, 2 * MOST_TEXT)
        ours.settimeout(ANSWER_MAX_S)
        self._channel = ours

    def _end(self):
        if self._child:
            self._channel.close()  # it ends by itself then
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(1)
            if self._child.returncode is None:
                self._child.kill()
                self._child.wait()
        self._child = self._channel = None

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()
