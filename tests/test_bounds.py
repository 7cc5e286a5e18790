"""What a function may use of things that all functions, faasd and the machine share; each bound is attacked here."""

import contextlib
import os
import re
import stat
import unittest

from tests import images, lab, programs, serving

OOM_FUNCTIONS, OOM_OWN = '500', '-500'
READER = """
def handle(connection, address):
    connection.recv(4096)
    with open('/proc/self/oom_score_adj') as file:
        before = file.read().strip()
    told = []
    for wanted in ('400', '-500', '1000', '500'):
        try:
            with open('/proc/self/oom_score_adj', 'w') as file:
                file.write(wanted)
            told.append('set')
        except OSError as error:
            told.append(error.strerror)
    connection.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\n' + ' '.join([before, *told]).encode())
"""
CONTROL = """
import socket
while True:
    with socket.socket(socket.AF_UNIX) as control:
        control.connect('/control.sock')
        _, fds, _, _ = socket.recv_fds(control, 1, 1)
    for fd in fds:
        with socket.socket(fileno=fd) as connection:
            connection.recv(4096)
            connection.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\ncontrol')
"""


def image():
    """An image with a folder that everybody in it may write, and a program of root's that anybody runs as root."""
    busybox = programs.Files().put('/usr/bin/busybox', programs.static_busybox().read_bytes(), 0o4755)
    busybox.folder('/tmp', '/var/shared', mode=0o1777).put('/www/index.html', 'image')
    command = ['/usr/bin/busybox', 'httpd', '-f', '-p', '[::]:80', '-h', '/www']
    return images.image([busybox.layer()], {'Cmd': command})


def writable_by_others(top):
    """The files and folders below `top` that any user of the machine can reach and write, or run as another user."""
    found = []
    if not os.lstat(top).st_mode & stat.S_IXOTH:
        return found
    with os.scandir(top) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                mode = entry.stat(follow_symlinks=False).st_mode
                if not stat.S_ISLNK(mode) and mode & (stat.S_IWOTH | stat.S_ISUID):
                    found.append(f'{stat.filemode(mode)} {entry.path}')
                if stat.S_ISDIR(mode):
                    found += writable_by_others(entry.path)
    return found


@lab.needs_root
class Bounds(unittest.TestCase):
    """One faasd, with a function of each kind."""

    @classmethod
    def setUpClass(cls):
        cls.host = cls.enterClassContext(lab.Host('server'))
        cls.server = cls.enterClassContext(serving.standalone(cls.host))
        cls.addresses = {}
        for name, source in (
            ('folder', {'handler.py': READER}),
            ('image', image()),
            ('control', {'faas.toml': 'command = ["python3", "serve.py"]', 'serve.py': CONTROL}),
        ):
            cls.deploy(name, source)

    @classmethod
    def deploy(cls, name, source):
        reply = cls.server.deploy(name, source)
        assert reply.status == 200, reply.body
        cls.addresses[name] = reply.json['ipv6']
        return reply.json

    def get(self, name, path='/', **options):
        return self.server.get(self.addresses[name], path, **options)

    def processes(self, *names):
        """{name: pid} of the host's processes with these names."""
        lines = self.host.sh('ps -eo pid=,comm=').splitlines()
        return {name: pid for pid, name in map(str.split, lines) if name in names}

    def test_no_user_of_the_host_writes_where_instances_live(self):
        self.assertEqual('image', self.get('image').strip())
        self.assertEqual('control', self.get('control'))
        found = [
            each
            for top in ('/run/faasd', '/var/lib/faasd', '/etc/wireguard', '/etc/coredns')
            for each in writable_by_others(str(self.host.path(top)))
        ]
        self.assertEqual([], found)

    def test_functions_are_ended_before_what_serves_them(self):
        before, attempts = self.get('folder').split(' ', 1)
        self.assertEqual(OOM_FUNCTIONS, before)
        faasd = self.host.run(['pgrep', '-of', 'faasd.py']).stdout.strip()
        helpers = self.processes('coredns', 'wireguard-go')
        self.assertIn('coredns', helpers)
        if may_lower_oom_score():
            self.assertEqual('Permission denied Permission denied set set', attempts)
            for pid in (faasd, *helpers.values()):
                self.assertEqual(OOM_OWN, self.host.run(['cat', f'/proc/{pid}/oom_score_adj']).stdout.strip(), pid)

    def test_the_units_say_the_same(self):
        for unit in ('faasd.service', 'faas-coredns.service', 'wg-quick@.conf'):
            self.assertIn(f'OOMScoreAdjust={OOM_OWN}\n', (lab.REPO / 'systemd' / unit).read_text(), unit)
        # Without that runc cannot keep a function from setting its own to that of faasd.
        self.assertIn('CAP_SYS_RESOURCE', (lab.REPO / 'systemd/faasd.service').read_text())


def may_lower_oom_score():
    """True if root of this machine has CAP_SYS_RESOURCE, as it has unless the machine is a container."""
    with open('/proc/self/status') as file:
        return int(re.search(r'CapEff:\s*(\w+)', file.read())[1], 16) >> 24 & 1


if __name__ == '__main__':
    unittest.main()
