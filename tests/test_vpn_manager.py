"""Keys, peer files, addresses and the table: what is written, and that the real wg0 and nft agree with it."""

import base64
import contextlib
import errno
import os
import pathlib
import shutil
import stat
import subprocess
import tempfile
import time
import unittest
from unittest import mock

import registry
import vpn_manager
from host import process, wireguard
from tests import inside, lab

KEYS = [base64.b64encode(bytes((number,)) * 32).decode() for number in range(1, 30)]


def peer(number, name=None, **more):
    row = registry.Peer(name or f'peer{number}', KEYS[number], None, f'fd00:faa5:0:100::{number + 10:x}', 'peer', 0)
    return row._replace(**more)


class Keys(unittest.TestCase):
    @lab.not_in_check
    def test_a_key_as_wg_prints_it_is_good(self):
        for key in (*KEYS, subprocess.run(['wg', 'genkey'], capture_output=True, text=True).stdout.strip()):
            self.assertEqual(key, vpn_manager.check_key(key))

    def test_anything_else_is_refused_in_one_line_with_a_hint(self):
        good = KEYS[0]
        for bad in (
            [
                '',
                good[:-1],
                good + '=',
                good[:-2] + 'B=',
                good + '\n',
                ' ' + good,
                good[:-1] + 'é',
                good.replace('A', '_'),
            ]
            + [
                base64.b64encode(bytes(32)).decode(),
                base64.b64encode(b'x' * 31).decode(),
                base64.b64encode(b'x' * 33).decode(),
            ]
            + [None, 7, good.encode(), [good], 'AQEB\nPublicKey = x']
        ):
            with self.subTest(bad), self.assertRaises(vpn_manager.BadKey) as caught:
                vpn_manager.check_key(bad)
            self.assertNotIn('\n', str(caught.exception))
            self.assertTrue(caught.exception.hint)


class PeerFiles(unittest.TestCase):
    GOOD = f'# Client: laptop\n[Peer]\nPublicKey = {KEYS[0]}\nAllowedIPs = fd00:faa5:0:100::a/128\n'

    def test_the_documents_form_is_read(self):
        self.assertEqual((KEYS[0], None, 'fd00:faa5:0:100::a'), vpn_manager.parse_peer(self.GOOD))

    def test_so_is_what_a_person_may_write(self):
        for text in (
            self.GOOD.rstrip('\n'),
            self.GOOD.replace('\n', '\r\n'),
            self.GOOD.replace(' = ', '='),
            self.GOOD.replace('/128', ''),
            self.GOOD.replace('Peer', 'peer').replace('PublicKey', 'publickey').replace('\n', ' # words\n'),
            '\n\n' + self.GOOD + '\n \n',
            self.GOOD.replace('fd00:faa5:0:100::a', 'FD00:FAA5:0000:0100::000A'),
        ):
            with self.subTest(text):
                self.assertEqual((KEYS[0], None, 'fd00:faa5:0:100::a'), vpn_manager.parse_peer(text))

    def test_a_preshared_key_is_kept(self):
        text = self.GOOD + f'PresharedKey = {KEYS[1]}\n'
        self.assertEqual((KEYS[0], KEYS[1], 'fd00:faa5:0:100::a'), vpn_manager.parse_peer(text))

    def test_what_would_harm_others_is_refused_with_one_line(self):
        peer_line, key_line = '[Peer]\n', f'PublicKey = {KEYS[0]}\n'
        for text in (
            '\ufeff' + self.GOOD,
            self.GOOD.replace('#', ';'),
            self.GOOD.replace(key_line, ''),
            self.GOOD.replace(peer_line, ''),
            self.GOOD.replace('AllowedIPs = fd00:faa5:0:100::a/128\n', ''),
            self.GOOD.replace('fd00:faa5:0:100::a/128', '0.0.0.0/0'),
            self.GOOD.replace('fd00:faa5:0:100::a/128', '::/0'),
            self.GOOD.replace('fd00:faa5:0:100::a/128', 'fd00:faa5:0:100::/64'),
            self.GOOD.replace('/128', '/128, fd00:faa5:0:100::b/128'),
            self.GOOD.replace('/128', '/129'),
            self.GOOD + self.GOOD,
            self.GOOD + key_line,
            self.GOOD + '[Interface]\n',
            '[Interface]\nPrivateKey = x\n' + self.GOOD,
            self.GOOD + 'PostUp = reboot\n',
            self.GOOD + 'Endpoint = somewhere.example:1\n',
            self.GOOD + 'words\n',
            self.GOOD + 'PresharedKey = short\n',
            self.GOOD.replace(KEYS[0], base64.b64encode(bytes(32)).decode()),
            '\0\0',
            '',
        ):
            with self.subTest(text), self.assertRaises((vpn_manager.BadPeerFile, vpn_manager.BadKey)) as caught:
                vpn_manager.parse_peer(text)
            self.assertNotIn('\n', str(caught.exception))


class Endpoints(unittest.TestCase):
    def test_each_way_to_write_one(self):
        for text, host, port in (
            ('faas.example.com', 'faas.example.com', 51820),
            ('faas.example.com:443', 'faas.example.com', 443),
            ('localhost', 'localhost', 51820),
            ('203.0.113.10', '203.0.113.10', 51820),
            ('203.0.113.10:1', '203.0.113.10', 1),
            ('[2001:db8::1]:65535', '2001:db8::1', 65535),
            ('[2001:db8::1]', '2001:db8::1', 51820),
            ('2001:db8::1', '2001:db8::1', 51820),
            ('::1', '::1', 51820),
            ('::ffff:203.0.113.10', '::ffff:203.0.113.10', 51820),
        ):
            with self.subTest(text):
                self.assertEqual((host, port), vpn_manager.split_endpoint(text, 51820))
                again = vpn_manager.join_endpoint(host, port)
                self.assertEqual((host, port), vpn_manager.split_endpoint(again, 1))

    def test_what_is_none(self):
        for text in [
            '',
            ':51820',
            'host:',
            'host:0',
            'host:65536',
            'host:x',
            'a b',
            '[2001:db8::1',
            '2001:db8::1]:1',
            '[::1]:0',
        ] + ['http://host', 'host:1:2', '[host]:1', ':::', '[]:1', 'host\n', 'host:٣']:
            with self.subTest(text), self.assertRaises(vpn_manager.VPNError) as caught:
                vpn_manager.split_endpoint(text, 51820)
        self.assertIn('[IPv6]:port', caught.exception.hint)


@lab.not_in_check
class ServerFiles(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder, self.events = pathlib.Path(folder.name, 'wireguard'), []
        self.manager = vpn_manager.VPNManager(
            lambda area, text, **_: self.events.append(text),
            registry.GATEWAY,
            registry.ZONE_SERVER,
            'faas.example.com',
            directory=self.folder,
        )
        self.manager.ensure_keys()

    def mode(self, name):
        return stat.S_IMODE((self.folder / name).stat().st_mode)

    def test_keys_are_made_private_once_and_kept(self):
        private = (self.folder / 'server_private.key').read_text()
        self.assertEqual((0o600, 0o700), (self.mode('server_private.key'), self.mode('peers')))
        derived = subprocess.run(['wg', 'pubkey'], input=private, capture_output=True, text=True).stdout.strip()
        self.assertEqual(derived, self.manager.get_server_public_key())
        self.manager.ensure_keys()
        self.assertEqual(private, (self.folder / 'server_private.key').read_text())
        self.assertEqual(1, len(self.events))

    def test_a_public_key_that_is_wrong_or_missing_is_derived_and_a_loose_mode_is_tightened(self):
        right = self.manager.get_server_public_key()
        public, private = self.folder / 'server_public.key', self.folder / 'server_private.key'
        public.write_text(KEYS[0] + '\n')
        private.chmod(0o644)
        self.manager.ensure_keys()
        self.assertEqual((right, 0o600), (self.manager.get_server_public_key(), self.mode('server_private.key')))
        public.unlink()
        self.manager.ensure_keys()
        self.assertEqual(right, self.manager.get_server_public_key())

    def test_a_private_key_without_a_newline_is_a_key(self):
        private = self.folder / 'server_private.key'
        private.write_text(private.read_text().strip())
        right = self.manager.get_server_public_key()
        self.manager.ensure_keys()
        self.assertEqual(right, self.manager.get_server_public_key())

    def test_keys_that_are_right_are_not_written(self):
        for name in 'server_private.key', 'server_public.key', 'peers':
            self.assertTrue((self.folder / name).exists())
        no_write = OSError(errno.EROFS, 'Read-only file system')
        with (
            mock.patch.object(vpn_manager.files, 'write_file', side_effect=no_write),
            mock.patch.object(vpn_manager.os, 'chmod', side_effect=no_write),
        ):
            self.manager.ensure_keys()

    def test_a_private_key_that_cannot_be_looked_at_is_not_replaced(self):
        private = self.folder / 'server_private.key'
        before = private.read_text()
        with (
            mock.patch('os.stat', side_effect=OSError(errno.EIO, 'Input/output error')),
            self.assertRaises(OSError) as caught,
        ):
            self.manager._keys.ensure()
        self.assertEqual(errno.EIO, caught.exception.errno)
        self.assertEqual(before, private.read_text())

    def test_a_private_key_that_is_none_is_an_error_and_stays(self):
        (self.folder / 'server_private.key').write_text('garbage\n')
        with self.assertRaises(vpn_manager.BadKey):
            self.manager.ensure_keys()
        self.assertEqual('garbage\n', (self.folder / 'server_private.key').read_text())

    def test_wg0_conf_is_in_the_documents_form_without_its_routing_and_kept_once_there(self):
        self.manager.write_wg0_conf()
        private = (self.folder / 'server_private.key').read_text().strip()
        text = (self.folder / 'wg0.conf').read_text()
        self.assertTrue(
            text.startswith(
                f'[Interface]\nAddress = fd00:faa5:0:100::1/64\nListenPort = 51820\nPrivateKey = {private}\n\n'
                '# Client peers (dynamically managed by faasd)\n'
            ),
            text,
        )
        self.assertNotRegex(text, 'PostUp|FORWARD|SaveConfig')
        self.assertEqual(0o600, self.mode('wg0.conf'))
        (self.folder / 'wg0.conf').write_text('mine')
        self.manager.write_wg0_conf()
        self.assertEqual('mine', (self.folder / 'wg0.conf').read_text())

    def test_a_peer_file_is_the_documents_to_the_letter(self):
        self.manager.add_peer(peer(0, 'laptop'))
        text = (self.folder / 'peers/laptop.conf').read_text()
        self.assertEqual(PeerFiles.GOOD, text)
        self.assertEqual(0o600, self.mode('peers/laptop.conf'))
        self.manager.add_peer(peer(0, 'laptop', preshared_key=KEYS[1]))
        text = (self.folder / 'peers/laptop.conf').read_text()
        self.assertEqual((KEYS[0], KEYS[1], 'fd00:faa5:0:100::a'), vpn_manager.parse_peer(text))

    def test_a_newcomer_is_told_the_documents_three_fields(self):
        self.assertEqual(
            {
                'ipv6': 'fd00:faa5:0:100::a',
                'server_public_key': self.manager.get_server_public_key(),
                'endpoint': 'faas.example.com',
            },
            self.manager.create_client_config('fd00:faa5:0:100::a'),
        )

    def test_links_and_folders_in_peers_are_no_peer_files(self):
        peers = self.folder / 'peers'
        (peers / 'a.conf').write_bytes(b'\xff')
        (peers / 'b.conf').symlink_to('/etc/passwd')
        (peers / 'c.conf').mkdir()
        (peers / 'd.conf~').touch()
        self.assertEqual({'a': '\ufffd'}, self.manager.peer_files())

    def test_a_missing_folder_has_no_files_and_is_made_for_the_next_one(self):
        (self.folder / 'peers').rmdir()
        self.assertEqual({}, self.manager.peer_files())
        self.manager.remove_peer('laptop')
        self.manager.add_peer(peer(0, 'laptop'))
        self.assertEqual((0o700, 0o600), (self.mode('peers'), self.mode('peers/laptop.conf')))

    def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(self):
        self.manager.add_peer(peer(0))
        with inside.no_descriptor_left():
            self.assertRaises(OSError, self.manager.peer_files)
            self.assertRaises(OSError, self.manager.files_changed, [peer(0)])
        (self.folder / 'peers/peer0.conf').unlink()
        (self.folder / 'peers').rmdir()
        (self.folder / 'peers').touch()
        self.assertRaises(NotADirectoryError, self.manager.peer_files)

    def test_each_change_of_a_peer_file_is_noticed_until_it_is_mended(self):
        peers, folder = [peer(0), peer(1)], self.folder / 'peers'
        for each in peers:
            self.manager.add_peer(each)
        path, other = folder / 'peer0.conf', folder / 'other.conf'
        text = path.read_text()

        def gone():
            for each in folder.iterdir():
                each.unlink()
            folder.rmdir()

        for change in (
            lambda: path.write_text(text.replace('::a', '::f')),
            lambda: os.truncate(path, len(text) // 2),
            lambda: os.truncate(path, 0),
            path.unlink,
            lambda: (path.unlink(), path.symlink_to('/dev/null')),
            gone,
        ):
            self.assertFalse(self.manager.files_changed(peers))
            change()
            self.assertTrue(self.manager.files_changed(peers))
            self.assertTrue(self.manager.files_changed(peers))
            for each in peers:
                self.manager.add_peer(each)
            self.assertEqual(text, path.read_text())
        self.assertFalse(self.manager.files_changed(peers))
        self.assertTrue(self.manager.files_changed([peer(0, preshared_key=KEYS[9]), peer(1)]))
        other.write_text('words')
        self.assertTrue(self.manager.files_changed(peers))
        self.manager.complain('other', 'no key')
        self.assertFalse(self.manager.files_changed(peers))  # it is known what is wrong with it
        other.write_text('other words')
        self.assertTrue(self.manager.files_changed(peers))
        other.unlink()
        self.assertFalse(self.manager.files_changed(peers))

    def test_files_that_have_not_changed_are_not_read_again(self):
        self.manager.add_peer(peer(0))
        self.assertFalse(self.manager.files_changed([peer(0)]))
        with mock.patch('builtins.open', side_effect=AssertionError('it is read')):
            self.assertFalse(self.manager.files_changed([peer(0)]))
            self.assertEqual(['peer0'], list(self.manager.peer_files()))

    def test_the_folders_it_writes_to_are_named(self):
        self.assertEqual([str(self.folder), str(self.folder / 'peers')], self.manager.folders)

    def test_a_bad_file_is_named_once_for_each_reason(self):
        self.events.clear()
        for why in ('no key', 'no key', 'no address', 'no key'):
            self.manager.complain('laptop', why)
        self.assertEqual(3, len(self.events))
        self.assertIn('peers/laptop.conf: no key', self.events[0])


class Live(inside.InHost):
    """On the real interface: the kernel's WireGuard, or wireguard-go."""

    def setUp(self):
        self.events = []

    def up(self):
        """A manager with its wg0 up. In the host."""
        manager = vpn_manager.VPNManager(
            lambda area, text, **_: self.events.append(text), registry.GATEWAY, registry.ZONE_SERVER, '203.0.113.10'
        )
        manager.ensure_keys()
        child = manager.bring_up()
        self.stack.callback(manager.take_down, child)
        return manager

    @staticmethod
    def shown(field):
        return process.run(['wg', 'show', 'wg0', field]).stdout

    def allowed(self):
        return dict(line.split('\t') for line in self.shown('allowed-ips').splitlines())

    def tearDown(self):
        for path in self.host.path('/etc/wireguard/peers').glob('*'):
            path.unlink()

    @inside.inside
    def test_it_comes_up_with_our_key_port_and_address_and_goes_without_a_trace(self):
        manager = vpn_manager.VPNManager(lambda *_, **__: None, registry.GATEWAY, registry.ZONE_SERVER, '203.0.113.10')
        manager.ensure_keys()
        with self.assertRaisesRegex(vpn_manager.VPNError, 'there is no interface wg0') as caught:
            manager.check_interface()
        self.assertIn('--standalone', caught.exception.hint)
        self.assertEqual(set(), manager.active())
        child = manager.bring_up()
        manager.check_interface()
        self.assertEqual('51820\n', self.shown('listen-port'))
        self.assertEqual(manager.get_server_public_key(), self.shown('public-key').strip())
        self.assertTrue(manager.index())
        manager.take_down(child)
        self.assertFalse(manager.index())
        self.assertNotIn('wireguard-go', process.run(['ps', '-e']).stdout)
        self.assertEqual([], [each for each in os.listdir('/run') if each.startswith('faasd-')])
        manager.take_down()

    @inside.inside
    def test_an_interface_that_is_not_ours_is_told_with_what_to_do(self):
        manager = self.up()
        process.run(['ip', '-6', 'address', 'del', f'{registry.GATEWAY}/64', 'dev', 'wg0'])
        with self.assertRaisesRegex(vpn_manager.VPNError, 'does not have the address'):
            manager.check_interface()
        process.run(['ip', '-6', 'address', 'add', f'{registry.GATEWAY}/64', 'dev', 'wg0'])
        process.run(['wg', 'set', 'wg0', 'private-key', '/dev/stdin'], input=process.run(['wg', 'genkey']).stdout)
        with self.assertRaisesRegex(vpn_manager.VPNError, 'runs with another key'):
            manager.check_interface()
        manager = vpn_manager.VPNManager(
            lambda *_, **__: None, registry.GATEWAY, registry.ZONE_SERVER, 'x', interface='lo'
        )
        with self.assertRaisesRegex(vpn_manager.VPNError, 'lo is not a WireGuard interface'):
            manager.check_interface()

    @inside.inside
    def test_files_and_wg0_hold_just_the_peers_at_each_step(self):
        manager = self.up()
        one, two = peer(0, 'one'), peer(1, 'two', preshared_key=KEYS[5])
        for peers, removed in (
            ([one, two], ()),
            ([two], ['one']),
            ([one, two], ()),
            ([], ['one', 'two']),
            ([], ['one']),
        ):
            manager.project(peers, removed)
            self.assertEqual({each.public_key: f'{each.ipv6}/128' for each in peers}, self.allowed())
            files = manager.peer_files()
            self.assertEqual({each.name for each in peers}, files.keys())
            for each in peers:
                self.assertEqual(
                    (each.public_key, each.preshared_key, each.ipv6), vpn_manager.parse_peer(files[each.name])
                )
            # An empty list of peers must not take the key and the port along.
            self.assertEqual('51820\n', self.shown('listen-port'))
            self.assertEqual(manager.get_server_public_key(), self.shown('public-key').strip())
        self.assertEqual([], [each for each in os.listdir('/run') if each.startswith('faasd-')])

    @inside.inside
    def test_a_preshared_key_reaches_wg0(self):
        manager = self.up()
        manager.project([peer(0, preshared_key=KEYS[5]), peer(1)])
        self.assertEqual(
            {f'{KEYS[0]}\t{KEYS[5]}', f'{KEYS[1]}\t(none)'}, set(self.shown('preshared-keys').splitlines())
        )

    @inside.inside
    def test_a_broken_file_stops_nobody_and_is_left_as_it_is(self):
        manager = self.up()
        broken = pathlib.Path(manager.peers_dir, 'broken.conf')
        broken.write_bytes(b'\xef\xbb\xbf; no\n[Peer]')
        manager.project([peer(0)])
        self.assertEqual([KEYS[0]], list(self.allowed()))
        self.assertEqual(b'\xef\xbb\xbf; no\n[Peer]', broken.read_bytes())
        manager.project([], ['peer0'])
        self.assertEqual(['broken.conf'], os.listdir(manager.peers_dir))

    @inside.inside
    def test_a_file_that_was_changed_by_hand_is_written_again(self):
        manager = self.up()
        manager.project([peer(0)])
        path = pathlib.Path(manager.peers_dir, 'peer0.conf')
        before = path.read_text()
        path.write_text('words')
        manager.project([peer(0)])
        self.assertEqual(before, path.read_text())
        stamp = path.stat().st_mtime_ns
        manager.project([peer(0)])
        self.assertEqual(stamp, path.stat().st_mtime_ns)

    @inside.inside
    def test_a_sync_that_fails_is_an_error_and_its_file_with_the_key_is_gone(self):
        manager = self.up()
        manager.take_down()
        lab.wait_until(lambda: not manager.index(), 5, 'the end of wg0')
        with self.assertRaises(process.CommandError) as caught:
            manager.project([peer(0)])
        self.assertNotIn(manager._keys.private(), ' '.join(caught.exception.argv))
        self.assertEqual([], [each for each in os.listdir('/run') if each.startswith('faasd-')])

    @inside.inside
    def test_the_file_for_wg_is_private(self):
        with vpn_manager.private_file('text') as path:
            self.assertEqual('text', process.run(['cat', path]).stdout)
            self.assertEqual(1, process.run(['setpriv', '--reuid', '65534', 'cat', path], ok=(1,)).returncode)
        self.assertFalse(os.path.exists(path))

    def on_a_disk(self, manager, options):
        """Put peers/ on a file system of its own."""
        process.run(['mount', '-t', 'tmpfs', '-o', f'mode=700,{options}', 'test', manager.peers_dir])
        self.stack.callback(process.run, ['umount', '--lazy', manager.peers_dir])

    @inside.inside
    def test_who_is_removed_is_locked_out_on_a_read_only_disk_and_the_files_follow_later(self):
        manager = self.up()
        self.on_a_disk(manager, 'size=1m')
        manager.project([peer(0), peer(1)])
        process.run(['mount', '-o', 'remount,ro', manager.peers_dir])
        with self.assertRaises(OSError) as caught:
            manager.project([peer(1), peer(2)], ['peer0'])
        self.assertEqual(errno.EROFS, caught.exception.errno)
        self.assertEqual({KEYS[1], KEYS[2]}, manager.public_keys())
        self.assertTrue(manager.files_changed([peer(1), peer(2)]))
        process.run(['mount', '-o', 'remount,rw', manager.peers_dir])
        manager.project([peer(1), peer(2)], ['peer0'])
        self.assertEqual({'peer1', 'peer2'}, manager.peer_files().keys())
        self.assertFalse(manager.files_changed([peer(1), peer(2)]))

    @inside.inside
    def test_on_a_full_disk_a_removal_makes_room_and_what_cannot_be_written_keeps_nobody_out(self):
        manager = self.up()
        self.on_a_disk(manager, 'size=64k')
        manager.project([peer(0), peer(1)])
        pathlib.Path(manager.peers_dir, 'large').write_bytes(bytes(56 << 10))
        manager.project([peer(2), peer(1)], ['peer0'])  # the file that goes makes room for the one that comes
        self.assertEqual({'peer1', 'peer2'}, manager.peer_files().keys())
        with self.assertRaises(OSError) as caught:
            manager.project([peer(1), peer(2), peer(3)])
        self.assertEqual(errno.ENOSPC, caught.exception.errno)
        self.assertEqual({KEYS[1], KEYS[2], KEYS[3]}, manager.public_keys())

    @inside.inside
    def test_without_the_folder_peers_are_locked_out_and_the_folder_comes_back(self):
        manager = self.up()
        manager.project([peer(0), peer(1)])
        shutil.rmtree(manager.peers_dir)
        manager.project([peer(1)], ['peer0'])
        self.assertEqual({KEYS[1]}, manager.public_keys())
        self.assertEqual(['peer1.conf'], os.listdir(manager.peers_dir))
        self.assertEqual(0o700, stat.S_IMODE(os.stat(manager.peers_dir).st_mode))
        # Another thing of that name: WireGuard follows all the same.
        shutil.rmtree(manager.peers_dir)
        pathlib.Path(manager.peers_dir).touch()
        self.stack.callback(os.mkdir, manager.peers_dir)
        self.stack.callback(os.unlink, manager.peers_dir)
        self.assertRaises(OSError, manager.project, [], ['peer1'])
        self.assertEqual(set(), manager.public_keys())

    @inside.inside
    def test_who_is_locked_out_stays_out_until_the_registry_has_it_no_more(self):
        manager = self.up()
        peers = [peer(0), peer(1)]
        manager.project(peers)
        manager.lock_out([])
        manager.lock_out([KEYS[0], KEYS[7]])  # one that wg0 does not have is no error
        self.assertEqual({KEYS[1]}, manager.public_keys())
        self.assertTrue(manager.holds(peers))
        self.assertTrue(manager.files_changed(peers))
        manager.project(peers)  # the disk had no room to note the removal
        self.assertEqual({KEYS[1]}, manager.public_keys())
        self.assertEqual(['peer1'], list(manager.peer_files()))
        self.assertFalse(manager.files_changed(peers))
        self.assertEqual({KEYS[0]}, manager.locked_out())
        manager.project(peers[1:], ['peer0'])
        self.assertEqual(set(), manager.locked_out())
        manager.project(peers)  # a new peer with the same key
        self.assertEqual({KEYS[0], KEYS[1]}, manager.public_keys())

    @inside.inside
    def test_who_is_locked_out_while_wg0_is_away_does_not_come_back_with_it(self):
        manager = self.up()
        manager.take_down()
        lab.wait_until(lambda: not manager.index(), 5, 'the end of wg0')
        self.assertRaises(process.CommandError, manager.lock_out, [KEYS[0]])
        self.up()
        manager.project([peer(0), peer(1)])
        self.assertEqual({KEYS[1]}, manager.public_keys())

    @inside.inside
    def test_a_lock_out_reads_no_file(self):
        manager = self.up()
        manager.project([peer(0), peer(1)])
        process.run(['mount', '-t', 'tmpfs', '-o', 'ro', 'nothing', '/etc/wireguard'])
        self.stack.callback(process.run, ['umount', '/etc/wireguard'])
        manager.lock_out([KEYS[0]])
        self.assertEqual({KEYS[1]}, manager.public_keys())

    @inside.inside
    def test_what_cannot_be_told_is_not_taken_for_an_interface_that_is_gone(self):
        manager = self.up()
        for look in manager.index, manager.check_interface, manager.active, vpn_manager.default_address:
            with inside.no_descriptor_left(), self.subTest(look), self.assertRaises(OSError) as caught:
                look()
            self.assertEqual(errno.EMFILE, caught.exception.errno)
        self.assertGreater(manager.index(), 0)
        # wg itself has no descriptor left.
        program, path = self.stack.enter_context(tempfile.TemporaryDirectory()), os.environ['PATH']
        pathlib.Path(program, 'wg').write_text('#!/bin/sh\necho "No socket: Too many open files" >&2; exit 1\n')
        os.chmod(os.path.join(program, 'wg'), 0o755)
        os.environ['PATH'] = f'{program}:{path}'
        self.stack.callback(os.environ.update, PATH=path)
        for look in manager.check_interface, manager.active:
            with self.subTest(look), self.assertRaisesRegex(process.CommandError, 'Too many open files'):
                look()

    @inside.inside
    def test_a_port_that_cannot_be_tried_is_not_taken_for_free(self):
        refused = mock.patch.object(vpn_manager.socket.socket, 'bind', side_effect=OSError(errno.ENOMEM, 'No memory'))
        with refused, self.assertRaises(OSError) as caught:
            vpn_manager.refuse_taken(vpn_manager.socket.SOCK_DGRAM, '::', 51820, 'hint')
        self.assertEqual(errno.ENOMEM, caught.exception.errno)

    @inside.inside
    def test_a_wg0_that_is_too_narrow_for_ipv6_is_set_up_again(self):
        manager = self.up()
        process.run(['ip', 'link', 'set', 'mtu', '1000', 'dev', 'wg0'])  # the kernel takes its addresses away
        with self.assertRaisesRegex(vpn_manager.VPNError, 'does not have the address'):
            manager.check_interface()
        manager.set_up()
        manager.check_interface()
        self.assertIn(' mtu 1420 ', process.run(['ip', 'link', 'show', 'wg0']).stdout)

    @inside.inside
    def test_nothing_is_left_of_a_wg0_that_does_not_come_up(self):
        manager = vpn_manager.VPNManager(lambda *_, **__: None, registry.GATEWAY, registry.ZONE_SERVER, 'x')
        manager.ensure_keys()
        broken = OSError(errno.EMFILE, 'Too many open files')
        for step in '_answers', '_reload_wireguard', 'set_up':
            with mock.patch.object(manager, step, side_effect=broken), self.subTest(step):
                with contextlib.suppress(OSError):
                    manager.take_down(manager.bring_up())  # the kernel's WireGuard needs no _answers
                lab.wait_until(lambda: not manager.index(), 5, 'the end of wg0')
                self.assertNotIn('wireguard-go', process.run(['ps', '-e']).stdout)

    @inside.inside
    def test_only_function_addresses_are_added_and_taken_away(self):
        manager = self.up()
        manager.project_addresses(['fd00:faa5:1:0::a', 'fd00:faa5:1:0::b'])
        process.run(['ip', '-6', 'address', 'add', '2001:db8:5::1/128', 'dev', 'wg0'])
        own = {registry.GATEWAY, registry.ZONE_SERVER, '2001:db8:5::1'}
        for wanted in (['fd00:faa5:1:0::b', 'fd00:faa5:1:0::ffff'], [], ['fd00:faa5:1:0::a'], ['fd00:faa5:1:0::a']):
            manager.project_addresses(wanted)
            found = {str(each) for each in manager._link()[1] if not each.is_link_local}
            self.assertEqual({vpn_manager.ipaddress.IPv6Address(each).compressed for each in {*wanted, *own}}, found)
        self.assertEqual(4, sum('Configured fd00:faa5:1:0::' in text for text in self.events), self.events)
        self.assertIn('Configured fd00:faa5:1:0::ffff/128 on wg0 interface', self.events)

    @inside.inside
    def test_an_address_can_be_bound_at_once(self):
        manager = self.up()
        addresses = [f'fd00:faa5:1:0::{host:x}' for host in range(10, 60)]
        manager.project_addresses(addresses)
        for address in addresses:
            with vpn_manager.socket.socket(vpn_manager.socket.AF_INET6) as sock:
                sock.bind((address, 80, 0, 0))


@lab.needs_root
class Tunnel(unittest.TestCase):
    def test_a_real_peers_handshake_is_seen_and_outlives_a_projection(self):
        with lab.pair() as (server, laptop):
            private = laptop.run(['wg', 'genkey']).stdout
            public = laptop.run(['wg', 'pubkey'], input=private).stdout.strip()
            row = peer(0, 'laptop', public_key=public)

            def begin():
                manager = vpn_manager.VPNManager(lambda *_, **__: None, registry.GATEWAY, registry.ZONE_SERVER, 'x')
                manager.ensure_keys()
                self.process = manager.bring_up()
                manager.project([row, peer(1)])
                return manager.get_server_public_key(), manager.active()

            key, active = inside.call(server, begin)
            self.assertEqual(set(), active)
            inside.tunnel(laptop, private, key, row.ipv6)
            laptop.run(['ping', '-c1', '-W5', registry.GATEWAY])

            def again():
                manager = vpn_manager.VPNManager(lambda *_, **__: None, registry.GATEWAY, registry.ZONE_SERVER, 'x')
                before = manager.active()
                manager.project([row, peer(1), peer(2)])
                after = manager.active(), manager.public_keys()
                manager.project([peer(1)], ['laptop'])
                with mock.patch('time.time', return_value=time.time() + wireguard.HANDSHAKE_FRESH_S):
                    return before, after, manager.active()

            before, after, removed = inside.call(server, again)
            self.assertEqual({public}, before)
            self.assertEqual(({public}, {public, KEYS[1], KEYS[2]}), after)  # no new session was needed
            self.assertEqual(set(), removed)
            self.assertTrue(laptop.run(['ping', '-c1', '-W1', registry.GATEWAY], ok=(1,)))


if __name__ == '__main__':
    unittest.main()
