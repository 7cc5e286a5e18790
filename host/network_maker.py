"""Makes networks for instances, and changes nftables, without a program that must start first. See maker.py.

Its argument is the descriptor of a channel of messages. A message is a text for nft. With a descriptor of a user
namespace, it wants a network of that namespace, too. An answer is N and the descriptor of the network, or N and
why there is none; or R and what is wrong with the rules, nothing when they are in place. Both are made side by side.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
MOST_TEXT = 128 << 10  # of one message
LIBRARY = 'libnftables.so.1'  # what nft is made of

libc = ctypes.CDLL(None, use_errno=True)


class Spare:
    """A process that waits to make one network: a fork takes longer than all the rest."""

    def __init__(self, channel: socket.socket) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._pid = os.fork()
            if not self._pid:
                self._socket.close()
                try:
                    wait_and_make(theirs, channel)
                finally:
                    os._exit(0)

    def make(self, users: int) -> None:
        """Have it answer with a network of the user namespace `users`."""
        socket.send_fds(self._socket, [b'?'], [users])

    def end(self) -> None:
        self._socket.close()
        os.waitpid(self._pid, 0)


def wait_and_make(asked: socket.socket, channel: socket.socket) -> None:
    """Only a process of one thread may enter a user namespace, and it does not come back."""
    _, fds, _, _ = socket.recv_fds(asked, 1, 1)
    if not fds:
        return
    if libc.setns(fds[0], CLONE_NEWUSER) or libc.unshare(CLONE_NEWNET):
        channel.send(b'N' + os.strerror(ctypes.get_errno()).encode())
        return
    with open('/proc/self/ns/net') as file:
        socket.send_fds(channel, [b'N'], [file.fileno()])


class Rules:
    """libnftables(3), or nft where there is no such library."""

    def __init__(self) -> None:
        self._library = None
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(LIBRARY)
            library.nft_ctx_new.restype = ctypes.c_void_p
            library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
            context = ctypes.c_void_p(library.nft_ctx_new(0))
            library.nft_ctx_buffer_error(context)
            library.nft_ctx_buffer_output(context)
            self._library, self._context = library, context

    def change(self, text: bytes) -> bytes:
        """What is wrong with the text; nothing when it is done."""
        if self._library is None:
            child = subprocess.run(['nft', '-f', '-'], input=text, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            return child.stderr or b'nft failed' if child.returncode else b''
        if not self._library.nft_run_cmd_from_buffer(self._context, text):
            return b''
        return self._library.nft_ctx_get_error_buffer(self._context) or b'nft failed'


def go_home() -> None:
    """Leave the mount namespace of the thread that started this: what is mounted there would stay as long as we do."""
    with open(f'/proc/{os.getppid()}/ns/mnt') as file:
        if libc.setns(file.fileno(), CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), 'setns')
    os.chdir('/')


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    go_home()
    rules, spare = Rules(), Spare(channel)
    while True:
        text, fds, _, _ = socket.recv_fds(channel, MOST_TEXT, 1)
        if not text:
            break
        if fds:
            spare.make(fds[0])
            os.close(fds[0])
        channel.send(b'R' + rules.change(text)[:4096])
        if fds:
            spare.end()
            spare = Spare(channel)
    spare.end()


if __name__ == '__main__':
    main()
