"""A whole faasd on disks that are full, read-only or emptied."""

import contextlib
import os
import signal
import unittest

from tests import lab, serving
from tests.test_faasd import key

STATE = '/var/lib/faasd'


@lab.needs_root
class FullDisk(unittest.TestCase):
    """The state directory is a small file system of its own."""

    def setUp(self):
        self.host = self.enterContext(lab.Host('server'))
        self.host.run(['sh', '-c', f'truncate -s 32M /run/disk && mkfs.ext4 -q /run/disk && '
                       f'mount -o loop,errors=remount-ro /run/disk {STATE} && chmod 711 {STATE}'])
        self.server = serving.Server(self.host, '--standalone').start()
        self.addCleanup(self.server.stop)
        self.ipv6 = self.server.deploy('kept', serving.saying('kept')).json['ipv6']
        self.key = key()
        self.server.api('POST', '/api/vpn/create', {'name': 'laptop', 'public_key': self.key})

    def fill(self):
        self.host.run(['sh', '-c', f'cat /dev/zero >{STATE}/filler'], ok=None)

    def problems(self):
        return ' '.join(item['what'] for item in self.server.api('GET', '/api/health').json['problems'])

    def test_it_serves_starts_removes_and_says_so(self):
        self.fill()
        reply = self.server.deploy('other', serving.saying('other'))
        self.assertEqual(507, reply.status, reply.body)
        self.assertEqual('kept', self.server.get(self.ipv6))
        lab.wait_until(lambda: 'is full' in self.problems(), 15, 'health to name the disk')
        self.assertIn(STATE, self.problems())
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.server.stop(number)
            self.server.lines.clear()
            self.server.start()
            self.assertEqual('kept', self.server.get(self.ipv6))
        self.assertNotIn('Traceback', ''.join(self.server.lines))
        self.fill()  # what the starts have freed
        self.assertEqual(200, self.server.api('DELETE', '/api/vpn/remove/laptop').status)
        self.assertNotIn(self.key, self.host.run(['wg', 'show', 'wg0', 'peers']).stdout)
        self.assertEqual(200, self.server.api('DELETE', '/api/remove/kept').status)
        self.assertEqual([], self.server.api('GET', '/api/list').json)
        self.host.run(['rm', f'{STATE}/filler'])
        lab.wait_until(lambda: self.server.api('GET', '/api/health').json['status'] == 'ok', 20, 'all to be well')
        self.assertEqual(200, self.server.deploy('kept', serving.saying('again')).status)

    def test_a_disk_that_becomes_read_only_is_named_and_locks_out_all_the_same(self):
        loop = self.host.run(['findmnt', '-no', 'SOURCE', STATE]).stdout.strip().rpartition('/')[2]
        self.host.run(['sh', '-c', f'echo a test >/sys/fs/ext4/{loop}/trigger_fs_error'])  # errors=remount-ro
        self.assertEqual('kept', self.server.get(self.ipv6))
        reply = self.server.deploy('other', serving.saying('other'))
        self.assertEqual(507, reply.status, reply.body)
        self.assertIn('read-only', reply.json['error'])
        reply = self.server.api('DELETE', '/api/vpn/remove/laptop')
        self.assertEqual(507, reply.status, reply.body)
        self.assertIn('laptop is locked out', reply.json['error'])
        self.assertNotIn(self.key, self.host.run(['wg', 'show', 'wg0', 'peers']).stdout)
        lab.wait_until(lambda: 'read-only' in self.problems(), 15, 'health to name the disk')
        self.assertNotIn(self.key, self.host.run(['wg', 'show', 'wg0', 'peers']).stdout)
        lab.wait_until(lambda: 'locked out' in str(self.server.api('DELETE', '/api/vpn/remove/laptop').json), 5, 'it')
        self.assertNotIn('Traceback', ''.join(self.server.lines))


@lab.needs_root
class LostRegistry(unittest.TestCase):
    def setUp(self):
        self.host = self.enterContext(lab.Host('server'))
        self.server = serving.Server(self.host, '--standalone').start()
        self.addCleanup(self.server.stop)
        self.ipv6 = self.server.deploy('kept', serving.saying('kept')).json['ipv6']
        self.path = self.host.path(f'{STATE}/registry.db')

    def remove_all(self):
        for path in self.path.parent.glob('registry.db*'):
            path.unlink()

    def test_an_empty_or_missing_one_deletes_no_code_and_says_what_to_do(self):
        self.server.stop()
        code = self.host.path(f'{STATE}/functions/1/1/tree/handler.py')
        daily = self.host.path(f'{STATE}/registry.db.daily')
        kept = {path: path.read_bytes() for path in self.path.parent.glob('registry.db*')}
        self.assertIn(daily, kept)
        for lose in (self.path.unlink, lambda: self.path.write_bytes(b'')):
            self.remove_all()
            for path, data in kept.items():
                path.write_bytes(data)
            lose()
            done = self.host.run([*serving.FAASD, '--standalone'], ok=(1,))
            self.assertIn('has the code of 1 functions', done.stderr)
            self.assertNotIn('Traceback', done.stderr)
            self.assertTrue(code.exists())
        self.host.run(['cp', str(daily).partition('root')[2], str(self.path).partition('root')[2]])
        self.server.lines.clear()
        self.server.start()  # the copy is of the first start: the function came after it

    def test_a_damaged_one_is_one_line(self):
        self.server.stop()
        for path in self.path.parent.glob('registry.db-*'):
            path.unlink()
        self.path.write_bytes(b'not a database' * 1000)
        done = self.host.run([*serving.FAASD, '--standalone'], ok=(1,))
        self.assertIn('is damaged', done.stderr)
        self.assertEqual(1, len(done.stderr.strip().splitlines()), done.stderr)

    def test_one_that_is_replaced_while_faasd_runs_is_noticed(self):
        self.host.run(['cp', f'{STATE}/registry.db', f'{STATE}/other.db'])
        self.host.run(['mv', f'{STATE}/other.db', f'{STATE}/registry.db'])
        lab.wait_until(
            lambda: 'replaced by another file' in str(self.server.api('GET', '/api/health').json['problems']), 15, 'it'
        )

    def test_what_killed_writes_left_is_swept(self):
        self.server.stop()
        left = (
            '/var/lib/faasd/dns/.faas.db.abcd1234',
            '/etc/wireguard/peers/.p.conf.abcd1234',
            '/etc/wireguard/peers/.p.conf.abcd1234.tmp',
            '/run/faasd/.children.json.abcd1234',
            '/etc/coredns/.Corefile.abcd1234',
        )
        mine = '/etc/coredns/.Corefile.swp'
        for path in (*left, mine):
            self.host.path(path).write_text('x')
        self.server.lines.clear()
        self.server.start()
        for path in left:
            self.assertFalse(self.host.path(path).exists(), path)
        self.assertTrue(self.host.path(mine).exists())
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.host.path(mine))


if __name__ == '__main__':
    unittest.main()
