"""Makes sockets in a cgroup of its own, and passes each on after it has seen that the guard holds it; see guard.py.

Arguments: the descriptor of the channel, the folder of the cgroup, the uid to live as. A message asks for a socket. One
with a descriptor asks whether the guard holds that socket.
"""

import os
import resource
import socket
import sys

HELD = b'held'


def is_held(sock: socket.socket) -> bool:
    """True if this process may not bind `sock`. It changes nothing at one that is bound."""
    try:
        sock.bind(('::1', 0))
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def answer(channel: socket.socket, sent: list[int]) -> None:
    for fd in sent:
        with socket.socket(fileno=fd) as sock:
            channel.send(HELD if is_held(sock) else b'not held')
    if not sent:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            if is_held(sock):
                socket.send_fds(channel, [HELD], [sock.fileno()])
            else:
                channel.send(b'the kernel does not ask the guard')


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    with open(os.path.join(sys.argv[2], 'cgroup.procs'), 'w') as file:
        file.write('0')
    uid = int(sys.argv[3])
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir('/')
    while True:
        asked, fds, _, _ = socket.recv_fds(channel, 16, 1)
        if not asked:
            return
        try:
            answer(channel, fds)
        except OSError as error:  # no descriptor is left
            channel.send(str(error.strerror).encode())


if __name__ == '__main__':
    main()
