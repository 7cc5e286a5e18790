"""What faasd and systemd tell each other."""

import os
import re
import socket

from host import process


def notify(state):
    """Tell systemd (sd_notify(3)), if it asked to be told."""
    address = os.environ.get('NOTIFY_SOCKET')
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(state.encode(), '\0' + address[1:] if address.startswith('@') else address)


def is_restart():
    """True if it is systemd that ends this process, to start it again."""
    if 'NOTIFY_SOCKET' not in os.environ:
        return False
    with open('/proc/self/cgroup') as file:  # of every unit it is the last part that ends so
        units = set(re.findall(r'([^/\n]+\.service)', file.read()))
    jobs = process.run(['systemctl', 'list-jobs', '--no-legend', '--plain'], ok=range(256)).stdout.splitlines()
    return any(line.split()[1:3] == [unit, 'restart'] for line in jobs for unit in units)
