"""What faasd and systemd tell each other."""

import os
import re
import socket

from host import process
from host.errors import EXPECTED


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)), if it asked to be told."""
    address = os.environ.get('NOTIFY_SOCKET')
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(state.encode(), '\0' + address[1:] if address.startswith('@') else address)


def is_restart() -> bool:
    """True if systemd ends this process to start it again. False also when that cannot be told: then all is ended."""
    if 'NOTIFY_SOCKET' not in os.environ:
        return False
    try:
        with open('/proc/self/cgroup') as file:  # the last part of a unit's path has this suffix
            units = set(re.findall(r'([^/\n]+\.service)', file.read()))
        jobs = process.run(['systemctl', 'list-jobs', '--no-legend', '--plain']).stdout.splitlines()
    except EXPECTED:
        return False
    return any(line.split()[1:3] == [unit, 'restart'] for line in jobs for unit in units)
