"""A WireGuard interface: whether it is there, its peers and its addresses; it is made by the kernel or wireguard-go."""

import errno
import fcntl
import ipaddress
import json
import re
import socket
import struct
import subprocess
import time

from host import process
from host.errors import FaasError

HANDSHAKE_FRESH_S = 180  # WireGuard's REJECT_AFTER_TIME: no session is older
SIOCGIFINDEX, IFREQ = 0x8933, '16si20x'  # linux/sockios.h, linux/if.h
MTU = 1420  # of the document; below 1280 the kernel takes IPv6 away from an interface, with its addresses


class VPNError(FaasError):
    """WireGuard on this host is not as it must be."""

    status = 503


class Interface:
    """The WireGuard interface called `interface`, with the address `gateway`."""

    def __init__(self, interface: str, gateway: str) -> None:
        self.interface, self.gateway = interface, gateway

    def index(self) -> int:
        """The number of the interface, 0 if there is none. Raises OSError when that cannot be told."""
        # socket.if_nametoindex() and the C library's do not say why they fail: it may be for want of a descriptor.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            try:
                found = fcntl.ioctl(sock, SIOCGIFINDEX, struct.pack(IFREQ, self.interface.encode(), 0))
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise
                return 0
        return struct.unpack(IFREQ, found)[1]

    def public_keys(self) -> set[str]:
        """Those of the peers on wg0. Raises CommandError, OSError."""
        return set(self._show('peers').split())

    def active(self) -> set[str]:
        """The public keys of the peers with a fresh handshake; none when wg0 is away. Raises CommandError, OSError."""
        try:
            stamps = [line.split('\t') for line in self._show('latest-handshakes').splitlines()]
        except process.CommandError:
            if self.index():
                raise
            return set()
        return {key for key, stamp in stamps if time.time() - int(stamp) < HANDSHAKE_FRESH_S}

    def _show(self, what: str) -> str:
        return process.run(['wg', 'show', self.interface, what]).stdout.strip()

    def _make_interface(self) -> subprocess.Popen | None:
        try:
            process.run(['ip', 'link', 'add', self.interface, 'type', 'wireguard'])
            return None
        except process.CommandError as error:
            if not re.search('not supported|Unknown device type', error.stderr):
                raise
            if not process.installed('wireguard-go'):
                raise VPNError(
                    f'the kernel has no WireGuard ({error.reason}) and wireguard-go is not installed',
                    "'make deps' installs what is missing",
                ) from error
        # As -f does, but without its banner about kernels.
        child = process.start(['wireguard-go', self.interface], WG_PROCESS_FOREGROUND='1', LOG_LEVEL='silent')
        try:
            deadline = time.monotonic() + 10
            while not self._answers():
                if child.poll() is not None or time.monotonic() > deadline:
                    raise VPNError('wireguard-go does not start', 'it needs /dev/net/tun and root')
                time.sleep(0.01)
        except BaseException:
            process.finish(child)
            raise
        return child

    def set_up(self) -> None:
        """Give wg0 its MTU and its address and bring it up, also if all is so already. Raises CommandError, OSError."""
        # The MTU first: with one below 1280 the interface takes no IPv6 address.
        process.run(['ip', 'link', 'set', 'mtu', str(MTU), 'dev', self.interface])
        process.run(['ip', '-6', 'address', 'replace', f'{self.gateway}/64', 'dev', self.interface, 'nodad'])
        process.run(['ip', 'link', 'set', 'up', 'dev', self.interface])

    def _answers(self) -> bool:
        return self.index() > 0 and process.run(['wg', 'show', self.interface], ok=(0, 1)).returncode == 0

    def take_down(self, child: subprocess.Popen | None = None) -> None:
        """Remove wg0 and end its wireguard-go, if any; both may be gone already. Raises CommandError, OSError."""
        try:
            process.run(['ip', 'link', 'delete', self.interface])
        except process.CommandError:
            if self.index():
                raise
        finally:
            if child is not None:
                process.finish(child)

    def _link(self) -> tuple[bool, set[ipaddress.IPv6Address]]:
        """(True if wg0 is up, the IPv6 addresses on it)."""
        (link,) = json.loads(process.run(['ip', '-json', 'address', 'show', 'dev', self.interface]).stdout)
        addresses = {ipaddress.IPv6Address(i['local']) for i in link['addr_info'] if i['family'] == 'inet6'}
        return 'UP' in link['flags'], addresses
