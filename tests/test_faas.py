"""The client. Its pure parts, its API against servers that misbehave, and its steps with real ip, wg and tunnels.

The client runs by the Python that runs the tests: `python3.9 -m tests test_faas test_devices` tries it with that one.
"""
import ast
import base64
import concurrent.futures
import contextlib
import fcntl
import gzip
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import socket
import socketserver
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import termios
import threading
import time
import unittest
import urllib.parse
from importlib.machinery import SourceFileLoader
from unittest import mock

from tests import images, lab, programs, serving

REPO = pathlib.Path(__file__).resolve().parent.parent
FAAS = REPO / 'faas'


def load():
    """The client as a module, though its file has no .py."""
    loader = SourceFileLoader('faas_client', str(FAAS))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader('faas_client', loader))
    with mock.patch.object(sys, 'dont_write_bytecode', True):
        loader.exec_module(module)
    return module


faas = load()
NEED_IPV6 = faas.need_ipv6
KEYS = [base64.b64encode(bytes([i]) * 32).decode() for i in (1, 2, 3)]
CONFIG = {'name': 'default', 'private_key': KEYS[0], 'public_key': KEYS[1], 'client_ipv6': 'fd00:faa5:0:100::a',
          'server_public_key': KEYS[2], 'server_endpoint': 'faas.example.com',
          'server_ipv6': 'fd00:faa5:0:100::1', 'allowed_ips': 'fd00:faa5::/32', 'dns': 'fd00:faa5:0:100::1'}
OURS = faas.with_our_server(b'', faas.ZONE_SERVER)


def base64url(raw):
    return base64.urlsafe_b64encode(raw).rstrip(b'=').decode()


def token(**changes):
    fields = {'i': '0123456789abcdef', 's': base64url(b'S' * 32), 'a': '127.0.0.1:51820',
              'e': 'faas.example.com', 'k': KEYS[2], 'n': None, **changes}
    text = base64url(json.dumps(fields, separators=(',', ':')).encode())
    return f'faas1_{text}.{hashlib.sha256(text.encode()).hexdigest()[:8]}'


class Guard(BaseException):
    """A unit test was about to run a real command. No handler in the client may swallow it."""


class TerminalStream(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


class Case(unittest.TestCase):
    """A unit test: a home of its own, no settings of the caller's, no real command, nothing in /run."""

    def setUp(self):
        self.home = self.enterContext(tempfile.TemporaryDirectory())
        kept = {key: value for key, value in os.environ.items() if not key.startswith(('FAAS_', 'SUDO_'))}
        self.enterContext(mock.patch.dict(os.environ, {**kept, 'HOME': self.home}, clear=True))
        for name in ('run', 'Popen'):
            self.enterContext(mock.patch.object(faas.subprocess, name, side_effect=Guard))
        self.enterContext(mock.patch.object(faas, 'RUN_FOLDER', f'{self.home}/run'))
        self.enterContext(mock.patch.object(faas, 'SOCKET', f'{self.home}/faasd.sock'))
        self.enterContext(mock.patch.object(faas, 'address_towards', return_value=None))
        for number in faas.SIGNALS:
            self.addCleanup(signal.signal, number, signal.getsignal(number))

    def enterContext(self, manager):            # unittest has it from 3.11 on
        value = manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)
        return value

    def faas(self, *words, stdin='', asked=False):
        """Run the client here: (exit code, stdout, stderr). `asked`: there is a person at stdin and stderr."""
        kind = TerminalStream if asked else io.TextIOWrapper
        out = io.TextIOWrapper(io.BytesIO(), encoding='utf-8', write_through=True)
        err = kind(io.BytesIO(), encoding='utf-8', write_through=True)
        feed = kind(io.BytesIO(stdin.encode()))
        with mock.patch.multiple(sys, stdout=out, stderr=err, stdin=feed):
            code = faas.main(list(words))
        return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()

    def fails(self, *words, code=1, says='', hints='', **options):
        """The command fails with this code, one error line, and a hint."""
        got, out, err = self.faas(*words, **options)
        self.assertEqual(got, code, out + err)
        self.assertRegex(err, r'\A(Deploying .*\n|warning: other users .*\n)?error: .')
        self.assertNotIn('Traceback', err)
        self.assertIn(says, err)
        self.assertIn(hints, err)
        return err

    def failure(self, call, *args):
        with self.assertRaises(faas.Failure) as caught:
            call(*args)
        return caught.exception

    def folder(self, files, name='f'):
        """A folder that holds these files: {path: content}."""
        folder = pathlib.Path(self.home, name)
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(content)
        return folder


class TestWords(Case):
    def test_labels(self):
        for good in ('a', 'fibonacci', 'a-1', '0x', 'a' * 63):
            self.assertTrue(faas.is_label(good), good)
        for bad in ('', 'A', '../x', '-a', 'a-', 'a.b', 'ä', 'a' * 64, 'a\n', 'a b', None, 7, 'a/b', 'a_b'):
            self.assertFalse(faas.is_label(bad), bad)

    def test_a_bad_name_is_one_clear_error_for_every_verb(self):
        for verb in ('new', 'ip', 'rm', 'logs', 'vpn invite', 'vpn create', 'vpn connect', 'vpn disconnect',
                     'vpn remove'):
            for bad in ('../x', '', 'x' * 64, 'grün', 'A'):
                self.fails(*verb.split(), bad, code=2, says='is not a name', hints='1 to 63 letters')
        self.assertEqual(os.listdir(self.home), [])

    def test_endpoints(self):
        for text, result in {'faas.example.com': ('faas.example.com', 51820), 'h:80': ('h', 80),
                             '192.0.2.1': ('192.0.2.1', 51820), '[2001:db8::1]:7': ('2001:db8::1', 7),
                             '[2001:db8::1]': ('2001:db8::1', 51820), '2001:db8::1': ('2001:db8::1', 51820)}.items():
            self.assertEqual(faas.split_endpoint(text), result)
        for bad in ('', 'a b', 'h:0', 'h:65536', 'h:x', '[zz]:1', 'a:b:c', 'h\nPostUp = x', '[2001:db8::1', 'h/x',
                    'fe80::1%eth0', '::1%\nPostUp = x', '[fe80::1%eth0]:1'):
            with self.assertRaises(ValueError, msg=bad):
                faas.split_endpoint(bad)
        self.assertEqual(faas.join_endpoint('2001:db8::1', 51820), '[2001:db8::1]:51820')
        self.assertEqual(faas.join_endpoint('h', 1), 'h:1')

    def test_addresses_are_written_as_in_the_document(self):
        self.assertEqual(faas.in_document_form('fd00:faa5:1::a'), 'fd00:faa5:1:0::a')
        self.assertEqual(faas.in_document_form('fd00:faa5:0:100::1'), 'fd00:faa5:0:100::1')
        self.assertEqual(faas.in_document_form('fd00:faa5:1:5:fc::10'), 'fd00:faa5:1:5:fc::10')
        self.assertEqual(faas.in_document_form('2001:db8::1'), '2001:db8::1')

    def test_keys(self):
        self.assertTrue(all(map(faas.is_key, KEYS)))
        zero = base64.b64encode(bytes(32)).decode()
        for bad in ('', 'x', zero, KEYS[0] + '\n', KEYS[0][:-1], None, base64.b64encode(b'x' * 31).decode(), 'ä' * 44):
            self.assertFalse(faas.is_key(bad), bad)

    def test_amounts(self):
        for size, text in ((0, '0 B'), (999, '999 B'), (1023, '1023 B'), (1024, '1 KiB'), (393216, '384 KiB'),
                           (1258291, '1.2 MiB'), (3092, '3 KiB'), (5 << 40, '5 TiB')):
            self.assertEqual(faas.in_bytes(size), text)
        for seconds, text in ((0, '0 seconds'), (1, '1 second'), (23, '23 seconds'), (119, '1 minute'),
                              (7200, '2 hours'), (86400, '1 day')):
            self.assertEqual(faas.in_words(seconds), text)
        for text, seconds in (('90s', 90), ('30m', 1800), ('1h', 3600), ('2d', 172800), ('60', 60)):
            self.assertEqual(faas.duration(text), seconds)
        for bad in ('0', '-1', '1w', '', 'h', '1.5h'):
            self.fails('vpn', 'invite', '--expires=' + bad, code=2, says='is not a time')

    def test_what_comes_from_elsewhere_cannot_drive_a_terminal(self):
        self.assertEqual(faas.clean('a\x1b[31m\n b\x9b'), 'a?[31m b?')
        self.assertEqual(faas.clean_log('a\tb\r\n\x1b]0;x\x07'), 'a\tb\n?]0;x?')


class Terminal(io.StringIO):
    encoding = 'utf-8'

    def isatty(self):
        return True


class TestScreen(Case):
    def shown(self, use, stream=None, **environment):
        stream = stream or Terminal()
        with mock.patch.dict(os.environ, {'TERM': 'xterm', **environment}):
            use(faas.Screen(stream))
        return stream.getvalue()

    def test_a_title_and_a_table_are_the_documents(self):
        def use(screen):
            screen.title('FaaS VPN Status')
            screen.table(['Name', 'IPv6', 'Status'], [['default', 'fd00:faa5:0:100::a', 'active']], [12, 22, 8])

        self.assertEqual(self.shown(use), '''
╭─────────────────────────────────────────────╮
│  FaaS VPN Status                            │
╰─────────────────────────────────────────────╯

┌──────────────┬────────────────────────┬──────────┐
│ Name         │ IPv6                   │ Status   │
├──────────────┼────────────────────────┼──────────┤
│ default      │ fd00:faa5:0:100::a     │ active   │
└──────────────┴────────────────────────┴──────────┘
''')
        plain = 'FaaS VPN Status\n\n' \
                'Name          IPv6                    Status\n' \
                'default       fd00:faa5:0:100::a      active\n'
        self.assertEqual(self.shown(use, NO_COLOR='1'), plain)
        self.assertEqual(self.shown(use, TERM='dumb'), plain)
        pipe = io.StringIO()
        self.assertEqual(self.shown(use, pipe), plain)

    def test_signs_go_and_words_stay_in_a_pipe(self):
        def use(screen):
            screen.say('⚙  Found existing config: laptop')
            screen.say('   [✓] DNS resolution: a.faas → ::1')
            screen.say('Status: ✅ Connected')
            screen.say('   [✗] x')

        self.assertIn('⚙  Found', self.shown(use))
        self.assertEqual(self.shown(use, NO_COLOR='1'), 'Found existing config: laptop\n   [ok] DNS resolution: '
                         'a.faas → ::1\nStatus: Connected\n   [failed] x\n')
        latin = io.TextIOWrapper(io.BytesIO(), encoding='latin-1', write_through=True)
        use(faas.Screen(latin))
        self.assertIn(b'a.faas -> ::1\n', latin.buffer.getvalue())

    def test_a_table_grows_and_wide_characters_count_twice(self):
        shown = self.shown(lambda screen: screen.table(['A', 'B'], [['日本', 'x' * 9], ['a\n', '']], [3, 2]))
        self.assertEqual(len({faas.width(line) for line in shown.splitlines()}), 1, shown)


    def list_on(self, room, *functions):
        """What `faas list` shows of (name, reason) on a terminal of so many columns."""
        answer = [{'name': name, 'ipv6': 'fd00:faa5:1:0::a', 'dns': f'{name}.faas', 'created': '2026-11-25',
                   'status': 'crashing' if reason else 'running', 'reason': reason} for name, reason in functions]
        terminal = Terminal()
        with mock.patch.dict(os.environ, {'TERM': 'xterm'}), mock.patch.object(faas, 'Api') as api, \
                mock.patch.object(faas.Screen, 'columns', return_value=room):
            api().request().list.return_value = answer
            faas.cmd_list(mock.Mock(json=False), faas.Screen(terminal))
        return terminal.getvalue().splitlines()

    def test_a_table_fits_the_terminal(self):
        reason = 'ended with exit code 1: ModuleNotFoundError: No module named ' + 'left_pad' * 12
        functions = ('x' * 63, reason), ('a', None), ('日本' * 15, 'short')
        for room in 120, 100, 80, 79, 60, 50, 40:
            lines = self.list_on(room, *functions)
            self.assertLessEqual(max(map(faas.width, lines)), room, '\n'.join(lines))
            text = re.sub(r'[│\s]', '', ''.join(lines))
            for part in ('fd00:faa5:1:0::a', '2026-11-25', 'crashing', 'exitcode1'):
                self.assertIn(part, text if room < 80 else ''.join(lines).replace(' ', ''))
        lines = self.list_on(80, *functions)
        self.assertEqual(['┌──────────────┬───────────────────┬───────────────────┬──────────┬────────────┐',
                          '│ Name         │ IPv6              │ DNS               │ Status   │ Created    │',
                          '├──────────────┼───────────────────┼───────────────────┼──────────┼────────────┤',
                          '│ xxxxxxxxxxxx │ fd00:faa5:1:0::a  │ xxxxxxxxxxxxxxxxx │ crashing │ 2026-11-25 │'],
                         lines[:4])
        self.assertIn('left_pad' * 9, ''.join(lines).replace('x' * 63, ''))
        self.assertEqual(['Name: a', 'IPv6: fd00:faa5:1:0::a', 'DNS: a.faas', 'Status: running', 'Created: 2026-11-25'],
                         [line.rstrip() for line in self.list_on(50, ('a', None)) if line])

    def test_a_pipe_has_one_line_for_each_row(self):
        def use(screen):
            screen.table(['Name', 'Reason'], [['x' * 63, 'y ' * 60]], [12, 6])

        self.assertEqual(f'Name{" " * 61}Reason\n{"x" * 63}  {("y " * 60).strip()}\n', self.shown(use, io.StringIO()))

    def test_text_is_broken_at_blanks_and_inside_of_long_words(self):
        for text, room, lines in (('', 5, ['']), ('a b', 3, ['a b']), ('a bc', 3, ['a', 'bc']),
                                  ('abcdefg h', 3, ['abc', 'def', 'g h']), ('日本x', 4, ['日本', 'x']),
                                  ('日', 1, ['日'])):
            self.assertEqual(lines, faas.wrapped(text, room))


class TestInvite(Case):
    def test_a_token_is_read(self):
        invite = faas.Invite(token(n='laptop', a='[2001:db8::1]:51820', e='[2001:db8::1]:51820'))
        self.assertEqual((invite.id, invite.secret, invite.name), ('0123456789abcdef', b'S' * 32, 'laptop'))
        self.assertEqual((invite.host, invite.port), ('2001:db8::1', 51820))
        self.assertEqual((invite.endpoint, invite.server_key), ('[2001:db8::1]:51820', KEYS[2]))

    def test_a_bad_token_is_told_as_what_it_is(self):
        good = token()
        for bad, says in ((good[:-1], 'cut off'), (good[:40], 'cut off'), (good[:-1] + 'zz', 'damaged'),
                          ('faas1_\udcff.12345678', 'damaged'),
                          (good.replace('e', 'f', 3), 'damaged'), ('faas2_x.12345678', 'not an invite'),
                          ('', 'not an invite')):
            self.assertIn(says, self.failure(faas.Invite, bad).message)
        for changes in ({'i': 7}, {'i': 'XYZ'}, {'s': 'AAAA'}, {'s': '!'}, {'a': 'h:x'}, {'a': None}, {'e': 'a b'},
                        {'k': 'x'}, {'n': '../x'}, {'n': 5}):
            self.assertIn('cannot be read', self.failure(faas.Invite, token(**changes)).message)
        for content in (b'[]', b'{}', b'\xff', b'[' * 3000, b'null'):
            text = base64url(content)
            check = hashlib.sha256(text.encode()).hexdigest()[:8]
            self.assertIn('cannot be read', self.failure(faas.Invite, f'faas1_{text}.{check}').message)

    def test_a_token_comes_from_the_line_to_paste_a_file_or_stdin(self):
        line = f'  ./faas vpn connect laptop --invite {token()}\n'
        file = pathlib.Path(self.home, 'invite')
        file.write_text(line)
        for given in (token(), line, str(file)):
            self.assertEqual(faas.find_invite(given).id, '0123456789abcdef')
        with mock.patch.object(sys, 'stdin', io.TextIOWrapper(io.BytesIO(line.encode()))):
            self.assertEqual(faas.find_invite('-').id, '0123456789abcdef')
        self.assertIn('neither', self.failure(faas.find_invite, '/nonexistent').message)
        self.assertIn('neither', self.failure(faas.find_invite, self.home).message)
        file.write_text('nothing')
        self.assertIn('no invite', self.failure(faas.find_invite, str(file)).message)

    def test_the_proof_covers_each_field_behind_its_length(self):
        self.assertEqual(faas.length_prefixed('a', b'bc', ''), b'\0\0\0\1a\0\0\0\2bc\0\0\0\0')
        self.assertNotEqual(faas.proof(b'k', 'a', 'bc'), faas.proof(b'k', 'ab', 'c'))
        self.assertEqual(faas.proof(b'S' * 32, 'faas1 request', '0123456789abcdef', '0' * 32, b'{}'),
                         '57510227dea4dc94af2248b61d16190b52f06b88c5fd31c8f6795dda723a40b8')


class TestStore(Case):
    def setUp(self):
        super().setUp()
        self.store = faas.Store()
        self.path = pathlib.Path(self.home, '.config/faas/vpn/default.json')

    def test_a_config_is_private_and_has_the_documents_fields_first(self):
        self.store.save('default', {**CONFIG, 'peer': 'laptop'})
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o600)
        for folder in (self.path.parent, self.path.parent.parent):
            self.assertEqual(stat.S_IMODE(folder.stat().st_mode), 0o700)
        self.assertEqual(list(json.loads(self.path.read_text()))[:9], list(faas.Store.FIELDS))
        self.assertEqual(self.store.load('default')['peer'], 'laptop')
        self.assertEqual(os.listdir(self.path.parent), ['default.json'])
        self.path.parent.chmod(0o755)
        self.store.save('default', CONFIG)
        self.assertEqual(stat.S_IMODE(self.path.parent.stat().st_mode), 0o700)

    def test_a_config_of_the_nine_fields_is_enough(self):
        self.store.save('laptop', CONFIG)
        self.assertEqual(self.store.load('laptop')['peer'], 'laptop')
        self.assertIsNone(self.store.load('other'))

    def test_a_write_that_fails_leaves_the_old_file_alone(self):
        self.store.save('default', CONFIG)
        with mock.patch.object(faas.os, 'replace', side_effect=OSError(28, 'No space left on device')), \
                self.assertRaises(OSError):
            self.store.save('default', {**CONFIG, 'peer': 'x'})
        self.assertEqual(self.store.load('default')['peer'], 'default')
        self.assertEqual(os.listdir(self.path.parent), ['default.json'])

    def test_a_config_that_cannot_be_used_is_named_and_can_be_removed(self):
        self.store.make_folder()
        broken = ['', '{', '[]', 'null', '7', '\xff', '[' * 5000, '{}', '"x"', ' ' * 70000]
        for field in faas.Store.FIELDS[1:]:
            broken += [json.dumps({**CONFIG, field: value}) for value in
                       (None, 7, 'x y', 'a\nPostUp = id', '::1%\nPostUp = id', '::1%\nPostUp = id/64')]
        broken += [json.dumps({**CONFIG, 'client_ipv6': address}) for address in
                   (faas.GATEWAY, faas.ZONE_SERVER, '::1', '1.2.3.4', f'{faas.GATEWAY}%x', f'{faas.GATEWAY}a%x')]
        broken += [json.dumps({**CONFIG, 'peer': '../x'}), json.dumps({**CONFIG, 'server_endpoint': '[::1'})]
        self.path.touch(0o600)
        for content in broken:
            self.path.write_bytes(content.encode('latin-1'))
            failure = self.failure(self.store.load, 'default')
            self.assertIn(str(self.path), failure.message)
            self.assertIn('vpn remove default --local', failure.hint)
        code, out, err = self.faas('vpn', 'list')
        self.assertEqual((code, out.splitlines()[-1].split()), (0, ['default', '-', 'broken']))
        self.assertIn('warning: the saved config', err)
        self.assertEqual(self.faas('vpn', 'remove', '--local')[0], 0)
        self.assertFalse(self.path.exists())

    def test_a_config_of_a_newer_version_is_not_misread(self):
        for version in (2, '2', None):
            self.store.save('default', {'version': version, 'what': 'ever'})
            failure = self.failure(self.store.load, 'default')
            self.assertIn(f'default.json is of version {version}, this faas knows 1', failure.message)
            self.assertIn('use the newer faas', failure.hint)
        self.store.save('default', {**CONFIG, 'version': 1, 'later': 'fields are no harm'})
        self.assertEqual(self.store.load('default')['client_ipv6'], CONFIG['client_ipv6'])

    def test_an_mtu_in_a_config_is_a_number_in_range(self):
        for mtu in (1279, 9001, '1420', 1420.0, True, None, [1420]):
            self.store.save('default', {**CONFIG, 'mtu': mtu})
            self.assertIn('mtu is not a number from 1280 to 9000', self.failure(self.store.load, 'default').message)

    def test_a_config_that_others_can_read_is_mended_and_told(self):
        self.store.save('default', CONFIG)
        self.assertEqual(self.faas('vpn', 'list')[2], '')
        for mode in (0o644, 0o640, 0o604, 0o666):
            self.path.chmod(mode)
            self.assertEqual(self.faas('vpn', 'list')[2], f'warning: others could read {self.path}, which holds a '
                             'private key; it is 0600 from now on\n')
            self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o600)
        self.path.chmod(0o644)
        with mock.patch.object(faas.os, 'fchmod', side_effect=PermissionError(1, 'Operation not permitted')):
            code, out, err = self.faas('vpn', 'list')
        self.assertEqual((code, err), (0, f'warning: others can read {self.path}, which holds a private key: '
                                       'chmod 600 it\n'))
        self.assertIn('saved', out)

    def test_names_of_other_files_are_no_configs(self):
        self.store.save('laptop', CONFIG)
        for name in ('x.pending', '.lock', 'A.json', '..json', 'x.json.tmp'):
            (self.path.parent / name).write_text('{}')
        self.assertEqual(self.store.names(), ['laptop'])

    def test_keys_wait_for_the_answer_of_their_own_registration(self):
        self.store.make_folder()
        with mock.patch.object(faas, 'new_keys', side_effect=[(KEYS[0], KEYS[1]), (KEYS[1], KEYS[2])]):
            self.assertEqual(self.store.keys_for('default', 'one'), (KEYS[0], KEYS[1]))
            self.assertEqual(self.store.keys_for('default', 'one'), (KEYS[0], KEYS[1]))
            self.assertEqual(self.store.keys_for('default', 'two'), (KEYS[1], KEYS[2]))
        pending = self.path.parent / 'default.pending'
        self.assertEqual(stat.S_IMODE(pending.stat().st_mode), 0o600)
        pending.write_text('{')
        with mock.patch.object(faas, 'new_keys', return_value=(KEYS[0], KEYS[1])):
            self.assertEqual(self.store.keys_for('default', 'two'), (KEYS[0], KEYS[1]))

    def test_two_commands_at_once_do_not_mix(self):
        with self.store.lock(), mock.patch.object(faas, 'LOCK_WAIT_S', 0.2):
            self.assertEqual(self.faas('vpn', 'remove', '--local'), (
                1, '', 'Waiting for another faas vpn command to end …\n'
                'error: another faas vpn command is still running after 0.2 s\n'
                'hint: wait until it has ended, then try again; to see who it is: '
                f'sudo fuser -v {self.store.folder}/.lock\n'))
        with contextlib.ExitStack() as held:
            held.enter_context(self.store.lock())
            threading.Timer(0.2, held.close).start()
            self.assertIn('no saved config', self.faas('vpn', 'remove', '--local')[2])
        self.fails('vpn', 'remove', '--local', says='no saved config')

    def test_unreadable_files_are_one_line(self):
        self.store.save('default', CONFIG)
        refused = PermissionError(13, 'Permission denied', 'x.json')
        with mock.patch.object(faas, 'open', create=True, side_effect=refused):
            self.fails('vpn', 'list', says='x.json: Permission denied')

    def test_lists(self):
        self.assertEqual(self.faas('vpn', 'list')[:2],
                         (0, 'No saved VPN configurations.\n\nTo connect: ./faas vpn connect\n'))
        self.assertEqual(json.loads(self.faas('vpn', 'list', '--json')[1]), [])
        self.store.save('laptop', CONFIG)
        self.assertEqual(self.faas('vpn', 'list')[1],
                         'Saved VPN Configurations:\n'
                         'Name          IPv6                    Status\n'
                         'laptop        fd00:faa5:0:100::a      saved\n')
        self.assertEqual(json.loads(self.faas('vpn', 'list', '--json')[1]),
                         [{'name': 'laptop', 'ipv6': 'fd00:faa5:0:100::a', 'status': 'saved'}])

    def test_the_list_on_the_server_says_where_its_peers_are(self):
        with mock.patch.object(faas, 'is_this_the_server', return_value=True):
            self.assertEqual(self.faas('vpn', 'list')[:2], (0, 'No saved VPN configurations.\n\nTo list the peers of '
                             'this server: ./faas vpn list --peers\n'))
            self.assertEqual(self.faas('vpn', 'list', '--json')[:2], (0, '[]\n'))

    def test_the_status_of_nothing(self):
        self.assertEqual(self.faas('vpn', 'status'),
                         (3, 'Status: Not connected\n\nTo connect: ./faas vpn connect\n', ''))
        code, out, _ = self.faas('vpn', 'status', '--json')
        self.assertEqual((code, json.loads(out)), (3, {'connected': False}))


class TestResolvConf(Case):
    def test_our_server_comes_first_and_the_rest_stays_byte_for_byte(self):
        for content in (b'', b'nameserver 192.0.2.1\n', b'# \xff\nsearch a b\r\nnameserver 1.1.1.1', b'\n\n'):
            for server in faas.ZONE_SERVER, faas.GATEWAY:
                ours = faas.with_our_server(content, server)
                self.assertEqual(ours, OURS.replace(b'::2', server[-3:].encode()) + content)
                self.assertEqual(faas.with_our_server(ours, server), ours)
                self.assertEqual(faas.without_our_server(ours), content)

    def test_rotation_is_off_meanwhile(self):
        for options in (b'options rotate\n', b'options ndots:2 rotate edns0', b'options\trotate\noptions rotate x\n'):
            ours = faas.with_our_server(options, faas.ZONE_SERVER)
            self.assertNotRegex(ours, rb'[\s]rotate')
            self.assertEqual(faas.without_our_server(ours), options)
        for other in (b'search rotate\n', b'options rotated\n', b'# options rotate\n'):
            self.assertEqual(faas.with_our_server(other, faas.ZONE_SERVER), OURS + other)

    def test_our_lines_go_wherever_others_moved_them(self):
        first, second = OURS.splitlines(keepends=True)
        self.assertEqual(faas.without_our_server(b'a\n' + second + b'b\n' + first + b'c'), b'a\nb\nc')

    def with_resolvers(self, *resolvers, **others):
        """What set_dns says where these are the resolvers, and what it prints; the tunnel."""
        tunnel = faas.Tunnel(faas.Silent(), 'default', 'default.json', CONFIG)
        errors = io.StringIO()
        with mock.patch.multiple(faas, RESOLVERS=resolvers, write_record=mock.Mock(),
                                 **{'answers_dns': lambda *_: True, 'system_lookup': lambda *_: ['::1'], **others}), \
                mock.patch.object(sys, 'stderr', errors):
            return tunnel.set_dns(), errors.getvalue(), tunnel

    def test_a_resolver_that_fails_is_put_back_and_the_next_is_used(self):
        good, bad = FakeResolver('good'), FakeResolver('bad', set=faas.CommandError('no luck'))
        problem, said, tunnel = self.with_resolvers(bad, good)
        self.assertEqual((problem, tunnel.record['dns'], bad.is_set, good.is_set), (None, 'good', None, 'at ::2'))
        self.assertEqual(said, 'warning: bad: no luck; good is used instead\n')

    def test_one_by_which_no_name_is_found_is_put_back_too(self):
        deaf, good = FakeResolver('deaf', splits=True), FakeResolver('good')
        lookup = mock.Mock(side_effect=OSError('no such name'))
        with mock.patch.object(faas, 'lookup_until', lambda ask, name, *_: ask(name)):
            problem, said, _ = self.with_resolvers(deaf, good, system_lookup=lookup)
        self.assertEqual((problem, deaf.is_set, good.is_set), (None, None, 'at ::2'))
        self.assertEqual(deaf.was, ['at ::1'])
        self.assertIn('warning: deaf: no such name', said)

    def test_what_could_not_be_put_back_is_not_forgotten(self):
        stuck = FakeResolver('stuck', set=faas.CommandError('no luck'), restore=faas.CommandError('nor back'))
        good = FakeResolver('good')
        problem, _, tunnel = self.with_resolvers(stuck, good)
        self.assertEqual(problem, 'DNS could not be set up: stuck: no luck; stuck was not put back: nor back')
        self.assertEqual((tunnel.record['dns'], good.is_set), ('stuck', None))

    def test_an_older_server_is_asked_for_every_name(self):
        good = FakeResolver('good')
        problem, said, _ = self.with_resolvers(good, answers_dns=lambda server, *_: server == faas.GATEWAY)
        self.assertEqual((problem, good.is_set), (None, 'at ::1'))
        self.assertIn('asked for every name while connected', said)

    def test_systemd_resolved_counts_only_where_lookups_lead_to_it(self):
        resolv = pathlib.Path(self.home, 'resolv.conf')
        resolved = faas.Resolved()
        with mock.patch.object(faas, 'RESOLV_CONF', str(resolv)):
            for text, runs, nss, answers in (('nameserver 127.0.0.53\n', True, False, True),
                                             ('nameserver 127.0.0.53\n', False, True, False),
                                             ('# nameserver 127.0.0.53\nnameserver 192.0.2.1\n', True, False, False),
                                             ('nameserver 192.0.2.1\n', True, True, True)):
                resolv.write_text(text)
                run = mock.Mock(side_effect=None if runs else faas.CommandError('not running'))
                resolved.is_nss_source = mock.Mock(return_value=nss)
                with mock.patch.object(faas, 'run', run):
                    self.assertEqual(resolved.answers(), answers, (text, runs, nss))

    def test_a_file_of_somebody_else_in_networkmanagers_folder_is_left_alone(self):
        resolver = faas.NetworkManagerDnsmasq()
        resolver.path = os.path.join(self.home, 'faas.conf')
        self.assertFalse(resolver.stands({}))
        for content in b'server=/faas/192.0.2.1\n', b'\xff', b'':
            pathlib.Path(resolver.path).write_bytes(content)
            self.assertFalse(resolver.stands({}))
            with mock.patch.object(faas, 'shell_as_root') as write, self.assertRaisesRegex(faas.CommandError, 'else'):
                resolver.set({}, faas.GATEWAY)
            self.assertFalse(write.called)
        pathlib.Path(resolver.path).write_text(resolver.head)
        self.assertTrue(resolver.stands({}))


class FakeResolver:
    """`is_set` what it is set to now, `was` all it was set to; errors to raise at set and restore."""

    def __init__(self, name, splits=False, set=None, restore=None):
        self.name, self.splits, self.errors, self.is_set, self.was = name, splits, (set, restore), None, []

    def answers(self):
        return True

    def stands(self, record):
        return self.is_set

    def set(self, record, server):
        self.is_set = f'at {server[-3:]}'
        self.was.append(self.is_set)
        if self.errors[0]:
            raise self.errors[0]

    def restore(self, record):
        if self.errors[1]:
            raise self.errors[1]
        self.is_set = None


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers what the test put into server.answer: a function of the handler and the body."""

    protocol_version = 'HTTP/1.1'

    def answer(self):
        length = int(self.headers.get('Content-Length') or 0)
        body = self.rfile.read(length) if self.server.reads else b''
        self.server.seen.append((self.command, self.path, dict(self.headers), body))
        self.server.answer(self, body)

    do_GET = do_POST = do_DELETE = answer

    def send(self, status, content, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, 'Content-Length': str(len(content))}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class TcpServer(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):             # a client that has gone
        pass


class UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def get_request(self):
        return self.socket.accept()[0], ('unix', 0)

    def handle_error(self, *_):
        pass


class ApiCase(Case):
    """With a server on the unix socket (self.serve) or on TCP (tcp=True)."""

    def serve(self, answer, tcp=False, reads=True):
        if tcp:
            server = TcpServer(('127.0.0.1', 0), Handler)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(faas.SOCKET)
            server = UnixServer(faas.SOCKET, Handler)
        server.answer = answer if callable(answer) else lambda handler, body: handler.send(*answer)
        server.seen, server.reads = [], reads
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        self.addCleanup(lambda: (server.shutdown(), thread.join(), server.server_close()))
        return server


class TestApi(ApiCase):
    def test_list(self):
        one = {'name': 'fibonacci', 'ipv6': 'fd00:faa5:1:0::a', 'dns': 'fibonacci.faas', 'status': 'running',
               'reason': None, 'revision': 1, 'created': '2025-01-15'}
        self.serve((200, [one, {**one, 'name': 'hello', 'status': 'crashing', 'reason': 'exit \x1b1'}]))
        code, out, _ = self.faas('list')
        lines = [line.split() for line in out.splitlines()]
        self.assertEqual(code, 0)
        self.assertEqual(lines[0], ['Name', 'IPv6', 'DNS', 'Status', 'Created', 'Reason'])
        self.assertEqual(lines[1], ['fibonacci', 'fd00:faa5:1:0::a', 'fibonacci.faas', 'running', '2025-01-15'])
        self.assertEqual(lines[2][3:], ['crashing', '2025-01-15', 'exit', '?1'])
        self.assertEqual(json.loads(self.faas('list', '--json')[1])[0], one)
        self.serve((200, []))
        self.assertIn('No functions yet.', self.faas('list')[1])

    def test_ip_rm_and_logs(self):
        server = self.serve((200, {'ipv6': 'fd00:faa5:1:0::a'}))
        self.assertEqual(self.faas('ip', 'fibonacci'), (0, 'fd00:faa5:1:0::a\n', ''))
        server.answer = lambda handler, body: handler.send(200, b'')
        self.assertEqual(self.faas('rm', 'fibonacci'), (0, 'Removed fibonacci\n', ''))
        server.answer = lambda handler, body: handler.send(200, b'one\n\xfftwo\x1b\n')
        with mock.patch.object(sys, 'stdout', io.TextIOWrapper(io.BytesIO())) as out:
            self.assertEqual(faas.main(['logs', 'fibonacci', '-n', '7']), 0)
            self.assertEqual(out.buffer.getvalue(), b'one\n\xfftwo\x1b\n')
        self.assertEqual([seen[:2] for seen in server.seen],
                         [('GET', '/api/ip/fibonacci'), ('DELETE', '/api/remove/fibonacci'),
                          ('GET', '/api/logs/fibonacci?lines=7')])
        for bad in ('0', '-1', '1000000', 'x'):         # the server takes six digits
            self.fails('logs', 'fibonacci', '-n', bad, code=2)

    def test_new_sends_the_folder_and_says_what_the_document_says(self):
        server = self.serve((200, {'name': 'fibonacci', 'ipv6': 'fd00:faa5:1:0::a', 'dns': 'fibonacci.faas',
                                   'revision': 1, 'warning': None}))
        folder = self.folder({'handler.py': 'x', 'lib/a.py': 'y'}, 'fibonacci')
        self.assertEqual(self.faas('new', 'fibonacci', str(folder)),
                         (0, 'Deployed fibonacci at fd00:faa5:1:0::a\nDNS: fibonacci.faas → fd00:faa5:1:0::a\n',
                          f'Deploying fibonacci from {folder}\n'))
        method, path, headers, body = server.seen[0]
        self.assertEqual((method, path),
                         ('POST', f'/api/new?name=fibonacci&from={urllib.parse.quote(str(folder), safe="")}'))
        self.assertEqual((headers['Content-Type'], headers['Content-Length']), ('application/x-tar', str(len(body))))
        self.assertEqual(tarfile.open(fileobj=io.BytesIO(body)).getnames(), ['handler.py', 'lib', 'lib/a.py'])

    def in_a_folder_with_examples(self, *examples):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.home)
        self.enterContext(mock.patch.multiple(faas, __file__=f'{self.home}/lib/faas', INSTALLED='/nonexistent'))
        for name in examples:
            self.folder({'handler.py': 'the example'}, f'lib/handlers/{name}')

    def test_an_example_replaces_itself_alone(self):
        self.in_a_folder_with_examples('api')
        server = self.serve(lambda handler, body: handler.send(200, server.listed if handler.command == 'GET' else
                            {'ipv6': 'fd00:faa5:1:0::a', 'dns': 'api.faas', 'warning': None}))
        for server.listed in ([], [{'name': 'apis', 'from': './apis'}], [{'name': 'api', 'from': "the example 'api'"}]):
            del server.seen[:]
            code, out, err = self.faas('new', 'api')
            self.assertEqual((0, "Deploying api from the example 'api'\n"), (code, err))
            self.assertEqual('/api/new?name=api&from=the%20example%20%27api%27', server.seen[-1][1])
        for server.listed, known in (([{'name': 'api', 'from': './api'}], 'was deployed from ./api'),
                              ([{'name': 'api', 'from': "the example 'apis'"}], "from the example 'apis'"),
                              ([{'name': 'api', 'from': None}], 'does not know where it came from'),
                              ([{'name': 'api'}], 'does not know where it came from'),
                              ([{'name': 'api', 'from': ['x\x1b']}], 'was deployed from')):
            del server.seen[:]
            self.fails('new', 'api', says=known, hints=f'./faas new api PATH (the example is {self.home}/lib/handlers/')
            self.assertEqual(['GET'], [seen[0] for seen in server.seen])
        for words in ('api', 'lib/handlers/api'), ('lib/handlers/api/',), ('./lib/handlers/api',):
            self.assertEqual((0, 'Deploying api from ./lib/handlers/api\n'), self.faas('new', *words)[::2])
        self.folder({'handler.py': ''}, 'api')
        self.assertEqual((0, 'Deploying api from ./api\n'), self.faas('new', 'api')[::2])
        shutil.rmtree('api')
        pathlib.Path('api').write_text('a file of that name')
        self.fails('new', 'api', says='./api is not a folder', hints='./faas new api ./api')

    def test_a_folder_may_be_named_with_a_slash(self):
        self.in_a_folder_with_examples('mine')
        server = self.serve((200, {'ipv6': 'fd00:faa5:1:0::a', 'dns': 'x.faas', 'warning': None}))
        self.fails('new', 'mine/', says='there is no file or folder mine/')            # not the example
        self.folder({'handler.py': ''}, 'mine')
        self.folder({'handler.py': ''}, 'Mine')
        for words in ('mine/', './mine', './mine/', f'{self.home}/mine', '../' + os.path.basename(self.home) + '/mine'):
            self.assertEqual(0, self.faas('new', words)[0])
            self.assertIn('/api/new?name=mine&', server.seen[-1][1])
        os.chdir('mine')
        self.assertEqual(0, self.faas('new', '.')[0])
        self.assertIn('/api/new?name=mine&from=.', server.seen[-1][1])
        self.fails('new', '../Mine/', code=2, says="'Mine' is not a name", hints='./faas new NAME ../Mine/')

    def test_a_build_is_shown_while_it_runs_and_its_last_line_counts(self):
        self.in_a_folder_with_examples()

        def lines(*said):
            def answer(handler, body):
                handler.send_response(200)
                handler.send_header('Content-Type', 'application/x-ndjson')
                handler.send_header('Transfer-Encoding', 'chunked')
                handler.end_headers()
                for each in (*(json.dumps(line).encode() + b'\n' for line in said), b''):
                    handler.wfile.write(b'%x\r\n%s\r\n' % (len(each), each))
            return answer

        good = {'ipv6': 'fd00:faa5:1:0::a', 'dns': 'app.faas', 'warning': None, 'hint': None}
        output = {'output': 'Collecting \x1b[1mflask'}, {'output': '\nDone'}
        server = self.serve(lines(*output, {'status': 200, 'answer': good}))
        package = '{"dependencies": {"x": "1"}}'
        self.folder({'requirements.txt': 'flask\n', 'handler.py': '', 'package.json': package}, 'app')
        code, out, err = self.faas('new', 'app')
        self.assertEqual((0, True), (code, 'Collecting ?[1mflask\nDone\n' in err), err)
        self.assertIn('Deployed app at', out)
        self.assertIn('&needs=pip,npm', server.seen[-1][1])
        refused = {'status': 422, 'answer': {'error': 'the build ended', 'hint': 'a hint'}}
        for said, says in (
            ((*output, refused), 'error: the build ended\nhint: a hint\n'),
            (output, 'the answer broke off in the middle'),
            (({'other': 1},), 'it does not speak HTTP'),
        ):
            self.serve(lines(*said))
            code, _, err = self.faas('new', 'app')
            self.assertEqual((1, True), (code, says in err), err)

    def test_a_folder_that_is_almost_a_function_is_told_what_it_lacks(self):
        self.in_a_folder_with_examples()
        for files, hint in ((('Dockerfile', 'package.json'), 'there is a Dockerfile: build it and hand over the image: '
                             'docker build -t app ./app && docker save app | ./faas new app'),
                            (('Containerfile',), 'there is a Containerfile: build it'),
                            (('requirements.txt',), 'there is a requirements.txt: add a handler.py, or a faas.toml'),
                            (('compose.yaml',), 'there is a compose.yaml: each service'),
                            (('Cargo.toml',), 'there is a Cargo.toml: build the program'),
                            (('notes',), 'to name another: ./faas new app PATH')):
            shutil.rmtree('app', ignore_errors=True)
            self.folder(dict.fromkeys(files, ''), 'app')
            self.fails('new', 'app', says='./app has no handler.py, no faas.toml and no Procfile', hints=hint)

    def test_what_is_left_out_is_said_once(self):
        self.serve((200, {'ipv6': 'fd00:faa5:1:0::a', 'dns': 'x.faas', 'warning': None}))
        folder = self.folder({'handler.py': '', '.env': 'SECRET=1', '.venv/x': '', 'a/.venv/y': '', 'notes.txt': ''})
        said = 'Left out: .env, .venv (a .faasignore decides otherwise: !.env)\n'
        self.assertEqual(f'Deploying x from {folder}\n{said}', self.faas('new', 'x', str(folder))[2])
        (folder / '.faasignore').write_text('!.env\n!.venv\nnotes.txt\n')
        self.assertEqual(f'Deploying x from {folder}\n', self.faas('new', 'x', str(folder))[2])

    def test_a_warning_is_no_failure(self):
        self.serve((200, {'name': 'a', 'ipv6': 'fd00:faa5:1:0::a', 'dns': 'a.faas',
                          'warning': 'deployed, not yet in DNS'}))
        code, out, err = self.faas('new', 'a', str(self.folder({'handler.py': ''})))
        self.assertEqual((code, err), (0, f'Deploying a from {self.home}/f\nwarning: deployed, not yet in DNS\n'))
        self.assertTrue(out.startswith('Deployed a at '))

    def test_a_failed_start_shows_the_functions_last_lines(self):
        self.serve((422, {'error': 'a did not start', 'hint': 'mend it', 'log': ['Traceback', '\x1bImportError: x']}))
        code, out, err = self.faas('new', 'a', str(self.folder({'handler.py': ''})))
        self.assertEqual((code, out), (1, ''))
        self.assertEqual(err, f'Deploying a from {self.home}/f\nerror: a did not start\n  | Traceback\n'
                         '  | ?ImportError: x\nhint: mend it\n')

    def test_a_refusal_in_the_middle_of_an_upload_gives_its_reason(self):
        def refuse(handler, body):
            handler.send(413, {'error': 'the upload is too big', 'hint': 'FAAS_MAX_UPLOAD'}, Connection='close')
            handler.close_connection = True

        self.serve(refuse, reads=False)
        folder = self.folder({'handler.py': '', 'big': 'x' * (6 << 20)})
        self.fails('new', 'a', str(folder), says='the upload is too big', hints='FAAS_MAX_UPLOAD')

    def test_answers_that_make_no_sense(self):
        for answer in ((200, b'<html>login</html>'), (200, b'\xff'), (200, b'[' * 9999), (200, b'7'), (200, b'[7]'),
                       (200, b'null'), (200, b''), (502, b'<html><b>Bad\x1b gateway'), (500, b'{"error": 7}'),
                       (404, {'error': 'no such function', 'hint': 'see faas list'}), (302, b'')):
            self.serve(answer)
            for words in (['list'], ['ip', 'a'], ['vpn', 'list', '--peers'], ['vpn', 'invite']):
                if words[0] == 'ip' or answer[1] != b'[]':
                    err = self.fails(*words)
                    self.assertNotIn('\x1b', err)
        self.fails('ip', 'a', says='HTTP 302')

    def test_servers_that_break_off(self):
        def silent(handler, body):
            handler.close_connection = True

        def garbage(handler, body):
            handler.wfile.write(b'SSH-2.0-x\r\n')
            handler.close_connection = True

        def short(handler, body):
            handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n[')
            handler.close_connection = True

        for answer, says in ((silent, 'without an answer'), (garbage, 'does not speak HTTP'),
                             (short, 'broke off in the middle')):
            self.serve(answer)
            self.fails('list', says=says)
        self.serve(lambda handler, body: time.sleep(0.3))
        with mock.patch.object(faas.Api.__init__, '__defaults__', (False, 0.05)):
            self.fails('list', says='no answer in time')
        self.serve((200, b'[' + b' ' * 4096 + b']'))
        with mock.patch.object(faas.exchange, '__defaults__', (None, None, 1024)):
            self.fails('list', says='longer than 1 KiB')

    def test_no_server_at_all_says_both_ways(self):
        err = self.fails('list', says='faasd.sock: No such file')
        self.assertIn('the VPN is not connected', err)
        with mock.patch.object(faas.UnixConnection, 'connect', side_effect=PermissionError(13, 'Permission denied')):
            self.fails('list', says='Permission denied', hints='group faas')
        with mock.patch.object(faas, 'address_towards', return_value='fd00:faa5:0:100::a'), \
                mock.patch.object(faas.TcpConnection, 'connect', side_effect=TimeoutError('timed out')):
            self.fails('list', says='8080: no answer in time', hints='vpn status')

    def test_rm_asks_on_a_terminal_alone(self):
        server = self.serve((200, b''))
        for answer in '', '\n', 'n\n', 'yess\n', '\x1b[A\n':
            code, out, err = self.faas('rm', 'shop', stdin=answer, asked=True)
            self.assertEqual((code, out), (1, ''))
            self.assertTrue(err.startswith('Remove the function shop, its code and its address? [y/N] '), err)
            self.assertIn('error: shop was not removed\nhint: ', err)
        self.assertEqual([], server.seen)
        for answer in 'y\n', 'Y\n', ' yes \n':
            self.assertEqual((0, 'Removed shop\n'), self.faas('rm', 'shop', stdin=answer, asked=True)[:2])
        for words in ('rm', '-y', 'shop'), ('rm', 'shop', '--yes'), ('delete', 'shop', '-y'):
            self.assertEqual((0, 'Removed shop\n', ''), self.faas(*words, asked=True))
        self.assertEqual((0, 'Removed shop\n', ''), self.faas('rm', 'shop', stdin='n\n'))
        self.assertEqual([('DELETE', '/api/remove/shop')] * 7, [seen[:2] for seen in server.seen])

    def test_what_a_server_of_another_version_does_not_know(self):
        def answer(handler, body):
            if handler.path != '/api/health':
                handler.send(404, {'error': f'there is no {handler.path}', 'hint': 'docs/API.md lists what there is'})
            else:
                handler.send(200, {'status': 'ok', **server.health})

        server = self.serve(answer)
        for server.health, hint in (({'version': '0.1.9'}, 'this server runs faasd 0.1.9 and does not know this; this '
                                      'client is 0.2.0: upgrade the server'),
                                    ({'version': '0.10.0'}, 'faasd 0.10.0 .* upgrade the client'),
                             ({}, 'an older faasd .* upgrade the server'), ({'version': faas.VERSION}, 'docs/API.md'),
                             ({'version': 7}, 'faasd 7 .* upgrade the client'), ({'version': []}, 'faasd ')):
            for words in ('ip', 'a'), ('vpn', 'invite'), ('list',):
                err = self.fails(*words, says='there is no /api/')
                self.assertRegex(err, f'\nhint: .*{hint}')
                self.assertEqual(2, len(err.splitlines()))
        self.serve((404, {'error': "there is no function 'a'", 'hint': 'see faas list'}))
        self.fails('ip', 'a', hints='hint: see faas list')
        self.serve((404, {'error': 'there is no /api/ip/a', 'hint': None}))            # health is not there, either
        self.fails('ip', 'a', says='there is no /api/ip/a')

    def test_invite_warns_of_an_address_that_nobody_can_reach(self):
        for endpoint in 'localhost', '127.0.0.1', '[::1]:51820', 'localhost:7':
            self.serve((200, {'token': token(e=endpoint), 'expires': '2026-11-23T21:00:00Z'}))
            code, out, err = self.faas('vpn', 'invite')
            self.assertEqual((code, len(out.splitlines())), (0, 3))
            self.assertIn('warning: no other machine can reach this server at ', err)
            self.assertIn('set FAAS_VPN_ENDPOINT', err)
        self.serve((200, {'token': token(), 'expires': '2026-11-23T21:00:00Z'}))
        self.assertNotIn('warning', self.faas('vpn', 'invite')[2])

    def test_invite_prints_what_is_to_be_pasted_alone(self):
        server = self.serve((200, {'token': token(), 'name': None, 'expires': '2026-11-23T21:00:00Z'}))
        code, out, err = self.faas('vpn', 'invite', 'laptop', '--expires', '30m', '--admin')
        self.assertEqual((code, out), (0, f"./faas vpn connect laptop --invite - <<'EOF'\n{token()}\nEOF\n"))
        self.assertIn('as an admin', err)
        self.assertIn('2026-11-23T21:00:00Z', err)
        self.assertEqual(json.loads(server.seen[0][3]), {'name': 'laptop', 'expires': 1800, 'admin': True})
        self.assertEqual(self.faas('vpn', 'invite')[1], f"./faas vpn connect --invite - <<'EOF'\n{token()}\nEOF\n")

    def test_create_prints_a_configuration_alone(self):
        self.serve((200, {'ipv6': 'fd00:faa5:0:100::b', 'server_public_key': KEYS[2], 'endpoint': '2001:db8::1'}))
        with mock.patch.object(faas, 'new_keys', return_value=(KEYS[0], KEYS[1])), \
                mock.patch.object(faas, 'need_programs'):
            code, out, err = self.faas('vpn', 'create', 'phone')
        self.assertEqual(code, 0)
        self.assertEqual(out, f'''[Interface]
PrivateKey = {KEYS[0]}
Address = fd00:faa5:0:100::b/64
DNS = fd00:faa5:0:100::1

[Peer]
PublicKey = {KEYS[2]}
Endpoint = [2001:db8::1]:51820
AllowedIPs = fd00:faa5::/32
PersistentKeepalive = 25
''')
        self.assertIn('vpn remove phone', err)
        self.assertNotIn(KEYS[0], err)

    def test_create_that_cannot_be_written_takes_the_peer_back(self):
        made = (200, {'ipv6': 'fd00:faa5:0:100::b', 'server_public_key': KEYS[2], 'endpoint': 'h'})
        for answer, error, raised in ((made, OSError(28, 'No space left on device'), faas.Failure),
                                      (made, BrokenPipeError(32, 'Broken pipe'), BrokenPipeError),
                                      (made, faas.Stopped(signal.SIGTERM), faas.Stopped),
                                      ((200, {'ipv6': '::1'}), None, faas.Failure)):
            server = self.serve(answer)
            args, stdout = mock.Mock(), mock.Mock(**{'write.side_effect': error, 'fileno.return_value': 1})
            args.name, args.qr = 'phone', False
            with mock.patch.object(faas, 'new_keys', return_value=(KEYS[0], KEYS[1])), \
                    mock.patch.object(faas, 'need_programs'), mock.patch.object(sys, 'stdout', stdout), \
                    self.assertRaises(raised) as caught:
                faas.cmd_vpn_create(args, None)
            self.assertRegex(str(caught.exception), 'No space left|Broken pipe|^$|no .server_public_key')
            self.assertEqual([seen[:2] for seen in server.seen],
                             [('POST', '/api/vpn/create'), ('DELETE', '/api/vpn/remove/phone')])

    def test_a_server_cannot_put_lines_into_the_configuration(self):
        good = {'ipv6': 'fd00:faa5:0:100::b', 'server_public_key': KEYS[2], 'endpoint': 'h'}
        for change in ({'ipv6': 'fd00:faa5:0:100::b%\nPostUp = x'}, {'endpoint': 'fe80::1%\nPostUp = x'}):
            self.serve((200, {**good, **change}))
            with mock.patch.object(faas, 'new_keys', return_value=(KEYS[0], KEYS[1])), \
                    mock.patch.object(faas, 'need_programs'):
                self.fails('vpn', 'create', 'phone', says='cannot be used')

    def test_remove_of_another_machines_peer_asks_the_server(self):
        server = self.serve((200, b''))
        self.assertEqual(self.faas('vpn', 'remove', 'phone'), (0, 'Removed VPN peer: phone\n', ''))
        self.assertEqual(server.seen[0][:2], ('DELETE', '/api/vpn/remove/phone'))
        self.serve((404, {'error': 'no such peer'}))
        self.fails('vpn', 'remove', 'phone', says='neither a saved config')


class TestRegistration(ApiCase):
    """Redeeming an invite, at servers that are right, wrong, in between, or forgetful."""

    def answer(self, handler, body, secret=b'S' * 32, peer='laptop', **changes):
        fields = {'ipv6': 'fd00:faa5:0:100::a', 'server_public_key': KEYS[2], 'endpoint': 'x.example', **changes}
        content = json.dumps(fields).encode()
        invite, nonce = handler.headers['Faas-Invite'], handler.headers['Faas-Nonce']
        right = faas.proof(b'S' * 32, 'faas1 request', invite, nonce, body)
        self.assertEqual(handler.headers['Faas-Proof'], right)
        proof = faas.proof(secret, 'faas1 answer', invite, nonce, peer, content)
        handler.send(200, content, Faas_Peer=peer, Faas_Proof=proof)

    def redeem(self, answer):
        server = self.serve(answer, tcp=True)
        self.seen = server.seen
        return faas.redeem(faas.Invite(token(a=f'127.0.0.1:{server.server_address[1]}')), KEYS[1])

    def test_a_right_answer_becomes_a_config(self):
        got = self.redeem(self.answer)
        self.assertEqual(got, {'client_ipv6': 'fd00:faa5:0:100::a', 'server_public_key': KEYS[2],
                               'server_endpoint': 'faas.example.com', 'peer': 'laptop'})
        method, path, headers, body = self.seen[0]
        self.assertEqual((method, path), ('POST', '/api/vpn/create'))
        self.assertEqual(json.loads(body), {'name': faas.host_label(), 'public_key': KEYS[1]})
        sent = str(self.seen)
        self.assertNotIn('S' * 32, sent)
        self.assertNotIn(base64url(b'S' * 32), sent)

    def test_a_stranger_is_not_believed(self):
        for answer, says in (
                (lambda h, b: self.answer(h, b, secret=b'T' * 32), 'the proof is wrong'),
                (lambda h, b: self.answer(h, b, server_public_key=KEYS[0]), 'key is not the one in the invite'),
                (lambda h, b: h.send(200, {'ipv6': 'fd00:faa5:0:100::a'}), 'the proof is wrong'),
                (lambda h, b: h.send(200, b'<html>', Faas_Proof='\xe4'), 'the proof is wrong'),
                (lambda h, b: h.send(403, {'error': 'x'}), 'used up, expired or withdrawn'),
                (lambda h, b: h.send(409, {'error': 'that key is taken'}), 'that key is taken'),
                (lambda h, b: h.send(200, b'x' * 70000), 'longer than 64 KiB'),
                (lambda h, b: self.answer(h, b, ipv6='::1'), 'cannot be used'),
                (lambda h, b: self.answer(h, b, ipv6='fd00:faa5:0:100::1'), 'cannot be used'),
                (lambda h, b: self.answer(h, b, ipv6='fd00:faa5:0:100::a\nPostUp = x'), 'cannot be used'),
                (lambda h, b: self.answer(h, b, ipv6='fd00:faa5:0:100::a%\nPostUp = x'), 'cannot be used'),
                (lambda h, b: self.answer(h, b, peer='..%2Fx'), 'cannot be used'),
                (lambda h, b: self.answer(h, b, ipv6=7), "no 'ipv6'")):
            self.assertIn(says, self.failure(self.redeem, answer).message)

    def test_a_lost_answer_is_asked_for_again_with_the_same_key_and_a_fresh_nonce(self):
        def lossy(handler, body):
            if len(handler.server.seen) < 3:
                handler.close_connection = True
            else:
                self.answer(handler, body)

        self.assertEqual(self.redeem(lossy)['peer'], 'laptop')
        self.assertEqual(len({headers['Faas-Nonce'] for _, _, headers, _ in self.seen}), 3)
        self.assertEqual(len({body for _, _, _, body in self.seen}), 1)
        self.assertIn('did not answer', self.failure(self.redeem, lambda handler, body: setattr(
            handler, 'close_connection', True)).message)

    def test_nobody_there(self):
        with socket.create_server(('127.0.0.1', 0)) as unused:
            port = unused.getsockname()[1]
        failure = self.failure(faas.redeem, faas.Invite(token(a=f'127.0.0.1:{port}')), KEYS[1])
        self.assertIn('Connection refused', failure.message)
        self.assertIn('only while an invite is open', failure.hint)

    def open_server(self, taken_names, taken_keys=()):
        """Where one listens that takes everybody, but for these names and keys; its errors are those of registry.py."""
        def answer(handler, body):
            wanted = json.loads(body)
            if taken_names is True or wanted['name'] in taken_names:
                return handler.send(409, {'error': f"a peer or an open invite '{wanted['name']}' exists already",
                                          'hint': 'choose another name'})
            if wanted['public_key'] in taken_keys:
                return handler.send(409, {'error': 'another peer has this public key', 'hint': None})
            handler.send(200, {'ipv6': 'fd00:faa5:0:100::a', 'server_public_key': KEYS[2], 'endpoint': 'h:7'},
                         Faas_Peer=wanted['name'])

        server = self.serve(answer, tcp=True)
        self.seen = server.seen
        return '127.0.0.1', server.server_address[1]

    def test_an_open_server_gives_the_next_free_name(self):
        where = self.open_server(('laptop', 'laptop-2'))
        self.assertEqual(faas.register_openly(where, 'laptop', KEYS[1], False)['peer'], 'laptop-3')
        del self.seen[:]
        self.assertIn('exists already', self.failure(faas.register_openly, where, 'laptop', KEYS[1], True).message)
        self.assertEqual(len(self.seen), 1)

    def test_the_servers_words_for_what_is_taken_are_these(self):
        words = (REPO / 'registry.py').read_text()
        self.assertIn("a peer or an open invite '{name}' exists already", words)
        self.assertIn("KeyTaken('another peer has this public key')", words)

    def test_tries_for_a_name_end(self):
        where = self.open_server(taken_names=True)
        self.assertIn("'x-20' exists already", self.failure(faas.register_openly, where, 'x', KEYS[1], False).message)
        self.assertEqual(len(self.seen), 20)
        names = {json.loads(body)['name'] for _, _, _, body in self.seen}
        self.assertEqual(len(names), 20)
        del self.seen[:]
        self.failure(faas.register_openly, where, 'x' * 63, KEYS[1], False)
        self.assertTrue(all(faas.is_label(json.loads(body)['name']) for _, _, _, body in self.seen))

    def test_a_key_that_is_taken_is_not_tried_under_other_names_and_not_again(self):
        where = self.open_server(('laptop',), (KEYS[1],))        # an earlier answer was lost
        store = faas.Store()
        store.make_folder()
        with mock.patch.object(faas, 'host_label', return_value='laptop'), \
                mock.patch.object(faas, 'new_keys', side_effect=[(KEYS[0], KEYS[1]), (KEYS[0], KEYS[2])]), \
                mock.patch.object(faas, 'build', return_value=(None, [])):
            failure = self.failure(faas.connect_first, faas.Silent(), store, 'default', False, None, where)
            self.assertEqual((failure.message, failure.hint), ('another peer has this public key',
                                                               'run the same command again: it makes a new key'))
            self.assertEqual([json.loads(body)['name'] for _, _, _, body in self.seen], ['laptop', 'laptop-2'])
            self.assertEqual(os.listdir(store.folder), [])
            self.assertEqual(faas.connect_first(faas.Silent(), store, 'default', False, None, where), 0)
        self.assertEqual(store.load('default')['peer'], 'laptop-2')


class TestConnectRefusals(Case):
    """What connect says no to before anything is touched."""

    def setUp(self):
        super().setUp()
        for name in ('is_this_the_server', 'interface_exists'):
            setattr(self, name, self.enterContext(mock.patch.object(faas, name, return_value=False)))
        for name in ('need_programs', 'need_root', 'need_ipv6', 'tunnel_lock'):
            self.enterContext(mock.patch.object(faas, name))
        faas.tunnel_lock.side_effect = contextlib.nullcontext
        self.record = self.enterContext(mock.patch.object(faas, 'read_record', return_value=None))

    def test_a_kernel_without_ipv6_is_told_first_of_all(self):
        faas.need_ipv6.side_effect = NEED_IPV6
        with mock.patch.object(faas.socket, 'socket', side_effect=OSError(97, 'Address family not supported')), \
                mock.patch.object(faas, 'open', create=True, side_effect=FileNotFoundError):    # no /proc/sys/net/ipv6
            self.fails('vpn', 'connect', '--invite', token(), says='no IPv6 (Address family not supported)',
                       hints='ipv6.disable=1')
        self.assertEqual((faas.need_root.called, faas.need_programs.called), (False, False))
        self.assertEqual(os.listdir(self.home), [])

    def test_no_config_and_no_invite(self):
        self.fails('vpn', 'connect', says="no saved config 'default'", hints='sudo faas vpn invite')

    def test_on_the_server(self):
        self.is_this_the_server.return_value = True
        self.fails('vpn', 'connect', says='the FaaS server itself', hints='curl')

    def test_a_name_that_is_taken(self):
        faas.Store().save('default', {**CONFIG, 'invite': 'f' * 16})
        err = self.fails('vpn', 'connect', '--invite', token(), says='is taken', hints='./faas vpn connect default-2')
        self.assertIn('./faas vpn remove default (add --local if the server has removed this machine), then paste', err)
        self.fails('vpn', 'connect', '--server', 'h', says='is taken', hints='to use that')
        with mock.patch.object(faas, 'connect_again', return_value=0) as again, \
                mock.patch.dict(os.environ, FAAS_INVITE=token()):
            self.assertEqual(self.faas('vpn', 'connect')[0], 0)     # the saved one wins over the environment
            faas.Store().save('default', {**CONFIG, 'invite': '0123456789abcdef'})
            self.assertEqual(self.faas('vpn', 'connect', '--invite', token())[0], 0)        # pasted once more
        self.assertEqual(again.call_count, 2)

    def test_where_an_invite_comes_from(self):
        with mock.patch.object(faas, 'connect_first', return_value=0) as first:
            with mock.patch.dict(os.environ, FAAS_INVITE=token()):
                self.faas('vpn', 'connect')
            self.faas('vpn', 'connect', '--invite', '-', stdin=token())
            with mock.patch.dict(os.environ, FAAS_SERVER='[2001:db8::1]:7'):
                self.faas('vpn', 'connect', 'laptop')
        invites = [call[0][4] for call in first.call_args_list]
        self.assertEqual([invite and invite.id for invite in invites], ['0123456789abcdef'] * 2 + [None])
        self.assertEqual(first.call_args[0][2:4] + first.call_args[0][5:], ('laptop', True, ('2001:db8::1', 7)))
        with mock.patch.object(faas, 'connect_first', return_value=0) as first:
            for words in ([token()], ['laptop', token()], [token(), 'laptop'], ['--mtu', '1400', token()],
                          ['--invite', token()], ['laptop', f'--invite={token()}']):
                code, _, err = self.faas('vpn', 'connect', *words)
                self.assertEqual((0, '0123456789abcdef'), (code, first.call_args[0][4].id))
                self.assertEqual('laptop' if 'laptop' in words else 'default', first.call_args[0][2])
                self.assertRegex(err, r'\Awarning: other users .* can see .*--invite - .*FAAS_INVITE\n\Z')
            self.assertEqual('', self.faas('up', '--invite', '-', stdin=token())[2])
        self.fails('vpn', 'connect', '--server', 'a b', code=2, says='is not HOST[:PORT]')
        self.fails('vpn', 'connect', '--server', 'h', '--invite', token(), code=2, says='exclude each other')

    def test_an_interface_of_somebody_else(self):
        self.interface_exists.return_value = True
        for words in (['vpn', 'connect', '--invite', token()], ['vpn', 'disconnect']):
            self.fails(*words, says='did not make', hints='sudo ip link delete wg-faas')
        self.record.return_value = {'name': 'laptop', 'config': '/elsewhere/laptop.json', 'state': 'connected'}
        self.fails('vpn', 'connect', '--invite', token(), says='another config: laptop', hints='vpn disconnect')

    def test_a_registration_that_fails_keeps_the_keys_for_the_next_try(self):
        with mock.patch.object(faas, 'new_keys', return_value=(KEYS[0], KEYS[1])):
            self.fails('vpn', 'connect', '--invite', token(a='127.0.0.1:1'), says='cannot be reached')
        self.assertEqual(sorted(os.listdir(faas.Store().folder)), ['.lock', 'default.pending'])


@lab.needs_root
class TestTunnelLock(Case):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(faas.RUN_FOLDER)
        self.folder.mkdir(0o755)
        self.lock = self.folder / 'lock'

    def test_one_at_a_time_and_no_descriptor_stays(self):
        before = os.listdir('/proc/self/fd')
        for _ in range(2):
            with faas.tunnel_lock(), mock.patch.object(faas, 'LOCK_WAIT_S', 0):
                self.assertIn('still running', self.failure(faas.tunnel_lock().__enter__).message)
        self.assertEqual(os.listdir('/proc/self/fd'), before)

    def test_what_somebody_else_put_there_is_not_used(self):
        for change in (lambda: self.folder.chmod(0o777), lambda: self.folder.chmod(0o775),
                       lambda: (self.folder.chmod(0o755), os.chown(self.folder, 4711, 0)),
                       lambda: (self.folder.rename(f'{self.home}/x'), self.folder.symlink_to(f'{self.home}/x'))):
            change()
            self.assertIn('not a folder that root alone', self.failure(faas.tunnel_lock).message)
        self.folder.unlink()
        self.folder.mkdir(0o755)
        self.lock.symlink_to(f'{self.home}/mine')
        with faas.tunnel_lock():                    # a link is not followed: root has made it, if anybody
            self.assertTrue(self.lock.is_file() and not self.lock.is_symlink())
        self.assertFalse(os.path.exists(f'{self.home}/mine'))

    def test_one_that_others_may_open_is_replaced(self):
        self.lock.touch(0o644)
        with open(self.lock) as theirs:
            fcntl.flock(theirs, fcntl.LOCK_EX)
            with mock.patch.object(faas, 'LOCK_WAIT_S', 0), faas.tunnel_lock():
                self.assertEqual(0o600, self.lock.stat().st_mode & 0o777)


class TestFolder(Case):
    def packed(self, folder):
        file = io.BytesIO()
        left_out = faas.pack(os.path.realpath(folder), file)
        return file.getvalue(), left_out

    def test_order_owner_and_modes_are_fixed_and_rubbish_stays_home(self):
        folder = self.folder({'handler.py': 'h', 'b/z.py': '1', 'b/a.py': '2', '__pycache__/x.pyc': '', '.git/HEAD': '',
                              'b/__pycache__/y.pyc': '', 'old.pyc': '', 'a b': '3'})
        (folder / 'handler.py').chmod(0o600)
        (folder / 'b/a.py').chmod(0o700)
        (folder / 'link').symlink_to('b/a.py')
        first, left_out = self.packed(folder)
        self.assertEqual((self.packed(folder)[0], left_out), (first, ([], ['.git', '__pycache__', '*.pyc'])))
        members = tarfile.open(fileobj=io.BytesIO(first)).getmembers()
        self.assertEqual([member.name for member in members],
                         ['a b', 'b', 'b/a.py', 'b/z.py', 'handler.py', 'link'])
        self.assertEqual({(member.uid, member.gid, member.uname) for member in members}, {(0, 0, '')})
        self.assertEqual([member.mode for member in members], [0o644, 0o755, 0o755, 0o644, 0o644, 0o777])
        self.assertEqual(members[5].linkname, 'b/a.py')

    def test_defaults_are_left_out_and_a_faasignore_decides_otherwise(self):
        files = ('handler.py', '.env', 'b/.env', '.env.example', '.venv/bin/x', '.git/HEAD', 'old.pyc',
                 'node_modules/a/x.js', 'node_modules/.cache/big', 'b/node_modules/.cache/big', '.cache/mine')
        folder = self.folder(dict.fromkeys(files, ''))

        def sent():
            data, left_out = self.packed(folder)
            return {m.name for m in tarfile.open(fileobj=io.BytesIO(data)) if m.isfile()}, left_out[1]

        self.assertEqual(({'handler.py', '.env.example', 'node_modules/a/x.js', '.cache/mine'},
                          ['.git', '.env', '.venv', '*.pyc', 'node_modules/.cache']), sent())
        content = b'\xef\xbb\xbf# what to send\r\n!/.env\r\n\r\n!.venv/\nnode_modules\n.faas*\n'
        (folder / '.faasignore').write_bytes(content)
        self.assertEqual(({'handler.py', '.env', '.env.example', '.venv/bin/x', '.cache/mine'},
                          ['.git', '.env', '*.pyc']), sent())

    def test_links_that_lead_out_are_refused_and_pipes_left_out(self):
        for target in ('/etc/passwd', '../secret', 'sub/../../secret'):
            folder = self.folder({'handler.py': '', 'sub/x': ''})
            (folder / 'l').unlink(missing_ok=True)
            (folder / 'l').symlink_to(target)
            self.assertIn('leads out of the folder', self.failure(self.packed, folder).message)
        (folder / 'l').unlink()
        os.mkfifo(folder / 'pipe')
        self.assertEqual(self.packed(folder)[1], (['pipe'], []))

    def test_a_file_that_shrinks_is_one_error(self):
        folder = self.folder({'handler.py': 'x' * 1000})
        with mock.patch.object(faas.os, 'fstat', return_value=mock.Mock(st_size=5000)):
            self.assertIn('changed while', self.failure(self.packed, folder).message)

    def test_where_a_function_is_looked_for(self):
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(self.home)
        with mock.patch.multiple(faas, __file__=f'{self.home}/lib/faas', INSTALLED='installed'):
            err = self.fails('new', 'fib', says='./fib')
            self.assertIn('lib/handlers/fib', err)
            self.assertIn('installed/handlers/fib', err)
            for place in ('installed/handlers/fib', 'lib/handlers/fib', 'fib'):
                self.folder({'handler.py': ''}, place)
                self.assertEqual(faas.find_function('fib', None), (
                    os.path.realpath(place), './fib' if place == 'fib' else "the example 'fib'"))
            os.unlink('fib/handler.py')
            self.fails('new', 'fib', says='has no handler.py')
            self.fails('new', 'fib', 'lib/faas', says='no file or folder')
            said = self.fails('new', 'fib', 'a\n\x1bb').splitlines()[0]
            self.assertEqual('error: there is no file or folder a ?b', said)
            pathlib.Path('image.tar').write_bytes(b'x' * 600)
            self.fails('new', 'fib', 'image.tar', says='image.tar is not the archive of an image')
            self.folder({'faas.toml': 'command = ["node"]'}, 'other')
            self.assertEqual(faas.find_function('other', None), (os.path.realpath('other'), './other'))
            self.fails('new', 'other', '--image', 'x', says='this is a folder', code=2)

    def test_what_looks_like_an_archive(self):
        tar = images.layer(('a', b'x'))
        for start in (tar, gzip.compress(tar), b'\x28\xb5\x2f\xfd' + b'x' * 600):
            self.assertTrue(faas.is_archive(start))
        for start in (b'', b'x' * 512, bytes(512), tar[:511], tar[:148] + b'00000000' + tar[156:]):
            self.assertFalse(faas.is_archive(start), start[:9])


class TestIgnore(unittest.TestCase):
    PATTERNS = (
        '*.log', '!keep.log', '/top', 'top/', 'a/b', 'a/**', '**/b', 'a/**/d', '**', '*', '!*', 'a?c', 'a[bx]c',
                'a[!b]c',
        'a[^b]c', 'a[a-c]c', 'a[c-a]c', 'a[]]c', 'a[!]]c', 'a[bc', '[', 'a[\\]]c', '\\#x', '#x', '\\!x', '!x',
                'blank\\ ',
        'blank ', 'end\\', 'a//b', '/', '//', 'a/', 'a**c', '**c', 'a/*/d', 'd', '*/d', '/*/d', 'a/**/', '**/', '/**',
        '**/a/**', 'a\\*c', 'b.*', '.*', 'a.c', 'a+c', '(x)', '[[:digit:]]', '[[:alpha:]x]*', 'ä*', 'a[b-]c', 'a[/]b',
        'a[*]c', '{a,b}', '*/', '!a/', 'a/b/', 'x2/**/y', 'x2/**y', 'a[\\--/]c', '[[:punct:]]*', '!!x', ' x', 'top\\/x',
    )
    FILES = (
        'one.log', 'keep.log', 'a/keep.log', 'top/x', 'b/top/y', 'a/b/c/d', 'a/d', 'a/x/d', 'b/d/e', 'd', 'abc', 'axc',
             'aac',
        'a]c', 'a[bc', '#x', '!x', 'x', 'blank ', 'blank', 'end\\', 'a*c', 'a\\c', 'a.c', 'a+c', '(x)', '7', 'äb',
             'a-c',
        '{a,b}', '.hidden', 'b.x', 'a^c', '[', 'x2/x/y', 'x2/y', 'q', ' x', '!!x',
    )

    @lab.not_in_check
    def test_a_faasignore_is_read_as_git_reads_a_gitignore(self):
        """git itself is the judge: by each pattern, alone and with others, the same files are left out."""
        if shutil.which('git') is None:
            self.skipTest('git is not installed')
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        for path in self.FILES:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
        (folder / 'link').symlink_to('a')
        git = ['git', '-C', folder, '-c', 'core.excludesFile=']
        subprocess.run([*git, 'init', '-q', '--template='], check=True)
        self.enterContext(mock.patch.object(faas, 'LEFT_OUT', ('/.git',)))
        pairs = [f'{one}\n{other}' for one in ('*', '*.log', 'a/*', '/*', 'a') for other in self.PATTERNS]
        for content in [*self.PATTERNS, *pairs, '\n'.join(self.PATTERNS)]:
            (folder / '.faasignore').write_text(content + '\n')
            judged = subprocess.run([*git, 'ls-files', '-zo', '-X', folder / '.faasignore'],
                                    check=True, capture_output=True).stdout.decode()
            file = io.BytesIO()
            faas.pack(os.path.realpath(folder), file)
            members = tarfile.open(fileobj=io.BytesIO(file.getvalue())).getmembers()
            ours = {member.name for member in members if not member.isdir() and not member.name.startswith('.git/')}
            self.assertEqual(set(judged.split('\0')) - {'', '.faasignore'}, ours - {'.faasignore'}, content)

    def enterContext(self, manager):            # unittest has it from 3.11 on
        value = manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)
        return value


class TestUpload(Case):
    """What is sent of an archive, and what is shown of it."""

    def setUp(self):
        super().setUp()
        self.ours, self.theirs = socket.socketpair()
        for end in (self.ours, self.theirs):
            self.addCleanup(end.close)

    def pipe(self):
        """(the end to read from, the end to write to)"""
        reader, writer = os.pipe()
        return [self.enterContext(open(fd, mode, buffering=0)) for fd, mode in ((reader, 'rb'), (writer, 'wb'))]

    def sent(self, stream, length, first=b''):
        return b''.join(faas.blocks(stream, length, first, self.ours))

    def test_a_file_is_sent_as_long_as_it_was_said_to_be(self):
        data = os.urandom(3 * faas.BLOCK + 5)
        for length in (0, 1, faas.BLOCK, len(data) - 1, len(data)):
            self.assertEqual(data[:length], self.sent(io.BytesIO(data), length))
            self.assertEqual(data[:length], self.sent(io.BytesIO(data[512:]), length, data[:512]))
        self.assertIn('became shorter', self.failure(self.sent, io.BytesIO(data), len(data) + 1).message)

    def test_a_pipe_is_sent_to_its_end(self):
        reader, writer = self.pipe()
        writer.write(b'and more')
        writer.close()
        self.assertEqual(b'first and more', self.sent(reader, None, b'first '))

    def test_an_answer_ends_it_also_while_the_pipe_brings_nothing(self):
        reader, _ = self.pipe()
        got = faas.blocks(reader, None, b'first', self.ours)
        self.assertEqual(b'first', next(got))
        self.theirs.sendall(b'HTTP/1.1 413 ')
        self.assertEqual([], list(got))
        self.assertEqual(b'', self.sent(io.BytesIO(b'x'), 1))

    def test_what_cannot_be_read_is_no_fault_of_the_server(self):
        stream = mock.Mock(read=mock.Mock(side_effect=OSError(5, 'Input/output error')))
        self.assertIn('the archive cannot be read: Input', self.failure(self.sent, stream, 5).message)

    def progress(self, total, *steps):
        """The lines that it shows for steps of (seconds, bytes)."""
        with mock.patch.object(faas.time, 'monotonic', return_value=1000.0) as clock, \
                mock.patch.object(faas.Progress, 'line') as line:
            progress = faas.Progress(total)
            for seconds, count in steps:
                clock.return_value += seconds
                progress.add(count)
        return [call[0][0] for call in line.call_args_list]

    def test_progress_tells_the_rate_of_the_last_seconds(self):
        mib = 1 << 20
        self.assertEqual(['Uploading  20 MiB of 500 MiB   4 %   20 MiB/s   24 seconds left',
                          'Uploading  40 MiB of 500 MiB   8 %   20 MiB/s   23 seconds left'],
                         self.progress(500 * mib, *[(1, 20 * mib)] * 2))
        self.assertEqual(['Uploading  20 MiB   20 MiB/s'], self.progress(None, (1, 20 * mib)))
        self.assertIn('   50 MiB/s', self.progress(None, *[(1, 5 * mib)] * 9, *[(1, 50 * mib)] * 4)[-1])
        self.assertEqual(1, len(self.progress(None, *[(0.01, mib)] * 14)))

    def test_progress_after_a_pause_is_no_nonsense(self):
        mib = 1 << 20
        shown = self.progress(500 * mib, (1, 20 * mib), (1, 20 * mib), (10, 20 * mib))
        self.assertEqual('Uploading  60 MiB of 500 MiB   12 %   2 MiB/s   3 minutes left', shown[-1])

    def test_progress_fits_the_terminal_and_is_nowhere_else(self):
        err = mock.Mock(encoding='utf-8', isatty=lambda: True)
        with mock.patch.object(sys, 'stderr', err), \
                mock.patch.object(faas.os, 'get_terminal_size', return_value=os.terminal_size((20, 5))):
            faas.Progress(None).line('x' * 70)
        self.assertEqual('\r\x1b[K' + 'x' * 19, err.write.call_args_list[0][0][0])
        err = io.StringIO()
        with mock.patch.object(sys, 'stderr', err), faas.Progress(None) as progress:
            progress.line('x')
        self.assertEqual('', err.getvalue())


class TestMain(Case):
    def test_usage_errors_are_one_line_and_exit_2(self):
        for words in ([], ['x'], ['vpn'], ['vpn', 'x'], ['new'], ['new', 'a', 'b', 'c'], ['list', '--yaml'], ['ip'],
                      ['vpn', 'connect', '--invite'], ['vpn', 'create'], ['list', '--js'], ['\x1b[31m']):
            err = self.fails(*words, code=2, hints='--help')
            self.assertEqual(len(err.splitlines()), 2, err)
            self.assertNotIn('\x1b', err)

    def test_what_other_tools_call_it(self):
        functions = {verb: function for verb, function, *_ in faas.VERBS}
        for words, verb, given in (('deploy a', 'new', {'name': 'a'}), ('ls', 'list', {}),
                                   ('ps --json', 'list', {'json': True}),
                                   ('delete a', 'rm', {'name': 'a'}), ('remove a', 'rm', {'name': 'a'}),
                                   ('up', 'vpn connect', {'name': None}), ('up b', 'vpn connect', {'name': 'b'}),
                                   ('down', 'vpn disconnect', {}),
                                   ('qr phone', 'vpn create', {'name': 'phone', 'qr': True}),
                                   ('vpn qr phone', 'vpn create', {'qr': True}),
                                   ('vpn up b', 'vpn connect', {'name': 'b'}),
                                   ('vpn down', 'vpn disconnect', {}), ('vpn ls', 'vpn list', {'peers': False}),
                                   ('vpn rm b', 'vpn remove', {'name': 'b', 'local': False}),
                                   ('status', 'vpn status', {}),
                                   ('peers', 'vpn list', {'peers': True}), ('log a', 'logs', {'name': 'a'})):
            function, args = faas.parse(words.split())
            self.assertIs(function, functions[verb], words)
            self.assertEqual(given, {key: getattr(args, key) for key in given}, words)
        for alias, meant in faas.ALIASES.items():
            self.assertNotIn(alias, functions)
            self.assertEqual(1, sum(f'{meant} '.startswith(f'{verb} ') for verb in functions), alias)

    def test_near_misses(self):
        for words, meant in (('dploy', 'new'), ('lst', 'list'), ('nwe', 'new'), ('removee', 'rm'),
                             ('create', 'vpn create'),
                             ('conect', 'vpn connect'), ('vpn conect', 'vpn connect'), ('vpn stauts', 'vpn status'),
                             ('vpn invit', 'vpn invite'), ('help dploy', 'new'), ('vpn help lst', 'vpn list')):
            self.fails(*words.split(), code=2, says='there is no verb',
                       hints=f"hint: did you mean '{meant}'? see: faas --help")
        for words in 'x', 'vpn x', 'zzz', '':
            self.assertNotIn('did you mean', self.fails(*(words.split() or ['']), code=2))

    def test_version_and_help(self):
        for word in '--version', '-V', 'version':
            self.assertEqual((0, f'faas {faas.VERSION}\n', ''), self.faas(word))
        for words, like in (('help', '--help'), ('help help', '--help'), ('--help --help', '--help'),
                            ('help vpn', 'vpn --help'),
                            ('help new', 'new --help'), ('help vpn connect', 'vpn connect --help'),
                            ('vpn help connect', 'vpn connect --help'), ('help deploy', 'new --help'),
                            ('vpn --help connect', 'vpn connect --help'), ('help up', 'vpn connect --help')):
            self.assertEqual(self.faas(*like.split()), self.faas(*words.split()), words)
        self.assertIn('\nThe same: deploy\n', self.faas('help', 'new')[1])
        self.assertIn('\nThe same: qr (vpn create --qr), vpn qr (vpn create --qr)\n',
                      self.faas('vpn', 'create', '--help')[1])

    def test_every_end_is_quiet(self):
        for error, code, says in ((KeyboardInterrupt(), 130, 'interrupted'), (faas.Stopped(15), 143, 'stopped'),
                                  (OSError(28, 'No space left on device', '/x'), 1, '/x: No space left'),
                                  (RuntimeError('odd\nthing'), 1, 'RuntimeError in line'),
                                  (RecursionError(), 1, 'RecursionError'), (faas.CommandError('ip: no'), 1, 'ip: no'),
                                  (TimeoutError('timed out'), 1, 'in time')):
            with mock.patch.object(faas, 'usage', side_effect=error):
                err = self.fails('--help', code=code, says=says)
                self.assertLessEqual(len(err.splitlines()), 2)

    def test_an_interrupt_stays_one_when_sudo_may_not_be_killed(self):
        def interrupted(*_, **__):
            try:
                raise faas.Stopped(signal.SIGTERM)
            except KeyboardInterrupt:
                os.stat('/nonexistent')         # subprocess.run kills its child here, and may not

        with mock.patch.object(faas.subprocess, 'run', interrupted), self.assertRaises(faas.Stopped):
            faas.run(['true'])

    def test_undo_runs_on_every_way_out_and_signals_wait_for_it(self):
        for error in (KeyboardInterrupt, faas.Failure('x'), None):
            seen = []
            with contextlib.suppress(KeyboardInterrupt, faas.Failure), faas.undo_stack() as undo:
                undo.callback(lambda: seen.append(signal.getsignal(signal.SIGINT)))     # noqa: B023
                if error:
                    raise error
            self.assertEqual(seen, [signal.SIG_IGN])
        self.assertNotEqual(signal.getsignal(signal.SIGINT), signal.SIG_IGN)
        with faas.undo_stack() as undo:
            undo.callback(self.fail)
            undo.pop_all()


class TestDocs(Case):
    def test_every_verb_has_help_and_stands_in_the_docs(self):
        docs = (REPO / 'docs/CLI.md').read_text()
        listing = self.faas('--help')[1]
        for verb, function, text, options in faas.VERBS:
            self.assertEqual(function.__name__, 'cmd_' + verb.replace(' ', '_'))
            code, shown, _ = self.faas(*verb.split(), '--help')
            self.assertEqual(code, 0)
            synopsis = f'faas {faas.synopsis(verb, options)}'
            self.assertIn(f'usage: {synopsis}\n', shown)
            self.assertIn(f'  {synopsis}\n      {text}\n', listing)
            self.assertIn(f'\n### `{synopsis}`\n', docs)
            section = docs.split(f'\n### `{synopsis}`\n')[1].split('\n### ')[0]
            for flags, settings in options:
                self.assertIn(settings['help'], shown)
                if flags[0].startswith('-'):
                    self.assertIn(f'`{flags[-1]}', section, verb)
        documented = re.findall(r'^### `(.*)`$', docs, re.MULTILINE)
        self.assertEqual(documented, [f'faas {faas.synopsis(verb, options)}' for verb, _, _, options in faas.VERBS])
        self.assertEqual(self.faas('vpn', '--help')[1].count('  faas vpn '), 7)

    def test_every_alias_stands_in_the_docs(self):
        docs = (REPO / 'docs/CLI.md').read_text()
        table = dict(re.findall(r'^\| ((?:`[^`]+`(?:, )?)+) \| `([^`]+)` \|$', docs, re.MULTILINE))
        found = {alias: meant for aliases, meant in table.items() for alias in re.findall('`([^`]+)`', aliases)}
        self.assertEqual(faas.ALIASES, found)

    @unittest.skipIf(sys.version_info < (3, 11), 'the server\'s modules are of Python 3.11')
    def test_the_errors_in_the_docs_are_those_of_the_programs(self):
        said = [(REPO / 'install.sh').read_text()]
        modules = [path for top in ('control', 'handlers', 'host') for path in (REPO / top).rglob('*.py')]
        for path in [FAAS, *REPO.glob('*.py'), *modules]:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):             # f'there is no {thing}' is 'there is no …'
                    said.append('…'.join(part.value for part in node.values if isinstance(part, ast.Constant)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    said.append(node.value)
        said = '\n'.join(said)
        tables = (REPO / 'docs/TROUBLESHOOTING.md').read_text().replace('wg-faas', '…').replace('wg0', '…').replace(
            'inet faas', 'inet …').replace('fd00:faa5::/32', '…')
        for row in re.findall(r'^\| (.*?) \|', tables, re.MULTILINE):
            if '(from `' not in row:                            # another program's words
                for quoted in re.findall('`([^`]+)`', row):
                    for part in re.split(r'…|\(/run/faasd.*|\(TCP\).*|\(HTTP.*', quoted):
                        if part.strip('() ,;:') not in said:
                            self.fail(f'no program says {quoted!r}')       # without all that they do say

    def test_every_setting_and_exit_code_stands_in_the_docs(self):
        docs = (REPO / 'docs/CLI.md').read_text()
        used = set(re.findall(r"environ(?:\.get\(|\[)'([A-Z_]+)'", FAAS.read_text()))
        for setting in used - {'HOME', 'TERM', 'SUDO_UID'}:
            self.assertIn(f'`{setting}`', docs)
        for code in (faas.OK, faas.FAILED, faas.USAGE, faas.NOT_CONNECTED, faas.INTERRUPTED):
            self.assertRegex(docs, rf'\| {code} \|')


class TestProcess(unittest.TestCase):
    """The file as people start it."""

    def run_it(self, *words, **options):
        environment = {**os.environ, 'HOME': '/nonexistent', 'FAAS_SOCKET': '/nonexistent/s'}
        return subprocess.run([sys.executable, FAAS, *words], capture_output=True, text=True, env=environment,
                              timeout=30, **options)

    def test_it_is_executable_and_helps(self):
        self.assertTrue(os.access(FAAS, os.X_OK))
        self.assertEqual(self.run_it('--help').stdout.splitlines()[0], 'usage: faas VERB [ARGUMENTS]')

    def test_hints_say_how_it_was_started(self):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(FAAS, f'{folder}/faas')
            os.mkdir(f'{folder}/links')
            os.symlink('../faas', f'{folder}/links/faas')
            environment = {'HOME': '/nonexistent', 'FAAS_SOCKET': '/nonexistent/s', 'PATH': os.environ['PATH']}
            python = os.path.dirname(sys.executable)       # for #!/usr/bin/env python3
            for command, path, said in (('./faas', python, './faas'), ('faas', f'{folder}:{python}', 'faas'),
                                        ('faas', f'{folder}/links:{python}', 'faas'),
                                        ('./faas', f'{folder}:{python}', './faas'),
                                        (f'{folder}/faas', f'{folder}:{python}', 'faas'),
                                        (f'{folder}/faas', python, './faas'), ('python3 faas', python, './faas')):
                done = subprocess.run(['/bin/sh', '-c', f'{command} vpn status'], cwd=folder, capture_output=True,
                                      text=True,
                                      env={**environment, 'PATH': f'{path}:{environment["PATH"]}'}, timeout=30)
                self.assertEqual(f'Status: Not connected\n\nTo connect: {said} vpn connect\n', done.stdout, command)
            done = subprocess.run(['/bin/sh', '-c', 'faas list'], cwd=folder, capture_output=True, text=True,
                                  env={**environment, 'PATH': f'{folder}:{environment["PATH"]}'}, timeout=30)
            self.assertRegex(done.stderr, r'\nhint: .*elsewhere: faas vpn connect')

    def test_a_table_fits_the_terminal_that_it_is_on(self):
        with tempfile.TemporaryDirectory() as home:
            store = pathlib.Path(home, '.config/faas/vpn')
            store.mkdir(parents=True)
            for name in 'default', 'x' * 63:
                (store / f'{name}.json').write_text(json.dumps({**CONFIG, 'name': name}))
                (store / f'{name}.json').chmod(0o600)
            for columns in 200, 80, 50, 45, 30:
                ours, theirs = pty.openpty()
                fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('4H', 24, columns, 0, 0))
                environment = {'HOME': home, 'PATH': os.environ['PATH'], 'TERM': 'xterm', 'PYTHONUTF8': '1'}
                subprocess.run([sys.executable, FAAS, 'vpn', 'list'], stdout=theirs, stderr=theirs, env=environment,
                               timeout=30, check=True)
                lines = os.read(ours, 65536).decode().splitlines()
                os.close(ours)
                os.close(theirs)
                self.assertLessEqual(max(map(len, lines)), columns, lines)
                self.assertEqual(columns > 45, '┌' in ''.join(lines), lines)
                self.assertEqual(columns == 200, any('x' * 63 in line for line in lines), lines)

    @lab.not_in_check
    def test_closed_streams_and_a_reader_that_goes(self):
        def run(case):
            unbuffered, (words, _), redirect = case
            environment = {**os.environ, 'HOME': '/nonexistent', 'FAAS_SOCKET': '/nonexistent/s',
                           'PYTHONUNBUFFERED': unbuffered}
            return subprocess.run(['sh', '-c', f'{sys.executable} {FAAS} {words} {redirect}'],
                                  capture_output=True, text=True, timeout=30, env=environment)

        redirects = '>&-', '2>&-', '<&-', '>&- 2>&- <&-', '>/dev/full', '2>/dev/full', '| true'
        cases = [*itertools.product(('', '1'), (('--help', 0), ('list', 1), ('vpn status', 3)), redirects)]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            results = [*pool.map(run, cases)]
        for (_, (words, code), redirect), done in zip(cases, results):     # noqa: B905, Python 3.9 has no strict
            about = f'{words} {redirect}: {done.stderr}'
            self.assertNotRegex(done.stderr, 'Traceback|Exception', about)
            if redirect == '>/dev/full' and code != 1:
                self.assertEqual(done.returncode, 1, about)
                self.assertRegex(done.stderr, r'\Aerror: stdout cannot be written: No space .*\nhint: .*\n\Z')
            elif redirect != '| true':
                self.assertEqual(done.returncode, code, about)
            elif code != 1:
                self.assertEqual(done.stderr, '', about)

    def test_an_interrupt_is_one_line_however_often_it_comes(self):
        with socket.socket(socket.AF_UNIX) as server, tempfile.TemporaryDirectory() as folder:
            server.bind(f'{folder}/s')
            server.listen()
            for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
                former = signal.signal(signal.SIGHUP, signal.SIG_DFL)   # nohup leaves it ignored
                process = subprocess.Popen([sys.executable, FAAS, 'list'], stderr=subprocess.PIPE, text=True,
                                           env={**os.environ, 'FAAS_SOCKET': f'{folder}/s'})
                signal.signal(signal.SIGHUP, former)
                with server.accept()[0]:
                    for _ in range(50):
                        process.send_signal(number)
                    err = process.communicate(timeout=30)[1]
                self.assertEqual(process.returncode, code, err)
                self.assertRegex(err, r'\Aerror: \w+.*\n\Z')

    def test_other_locales(self):
        done = self.run_it('vpn', 'connect', '--help', encoding='latin-1')
        self.assertEqual(done.returncode, 0)
        ascii_only = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
        done = subprocess.run([sys.executable, FAAS, 'new', 'grün'], capture_output=True, timeout=30,
                              env={**os.environ, **ascii_only})
        self.assertEqual(done.returncode, 2)
        self.assertNotIn(b'Traceback', done.stderr)


# The server's side of the tunnel for the tests below: real WireGuard, and just enough of an API and a DNS server for
# the client's own steps. The whole story, with the real faasd, is told by test_story.py.
STAND_IN = r'''
import http.server, itertools, json, socket, subprocess, threading
GATEWAY, ZONE_SERVER, ENDPOINT = 'fd00:faa5:0:100::1', 'fd00:faa5:0:100::2', '203.0.113.10'
PEERS, HOSTS = {}, itertools.count(10)

def do(*argv, stdin=None):
    return subprocess.run(argv, input=stdin, check=True, capture_output=True, text=True).stdout.strip()

try:
    do('ip', 'link', 'add', 'wg0', 'type', 'wireguard')
except subprocess.CalledProcessError:
    do('wireguard-go', 'wg0')
key = do('wg', 'genkey')
public = do('wg', 'pubkey', stdin=key)
do('wg', 'set', 'wg0', 'listen-port', '51820', 'private-key', '/dev/stdin', stdin=key)
do('ip', '-6', 'address', 'add', GATEWAY + '/64', 'dev', 'wg0', 'nodad')
do('ip', '-6', 'address', 'add', ZONE_SERVER + '/128', 'dev', 'wg0', 'nodad')
do('ip', 'link', 'set', 'wg0', 'mtu', '1420', 'up')

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, value, **headers):
        self.send_response(200)
        for name, text in headers.items():
            self.send_header(name.replace('_', '-'), text)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def do_GET(self):
        self.send({'status': 'ok', 'problems': []} if self.path == '/api/health' else
                  [{'name': 'fibonacci', 'ipv6': 'fd00:faa5:1:0::a'}])

    def do_POST(self):
        wanted = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        address = 'fd00:faa5:0:100::%x' % next(HOSTS)
        PEERS[wanted['name']] = wanted['public_key']
        do('wg', 'set', 'wg0', 'peer', wanted['public_key'], 'allowed-ips', address + '/128')
        self.send({'ipv6': address, 'server_public_key': public, 'endpoint': ENDPOINT}, Faas_Peer=wanted['name'])

    def do_DELETE(self):
        self.send(None)
        name = self.path.split('/')[-1]
        threading.Timer(0.05, lambda: do('wg', 'set', 'wg0', 'peer', PEERS[name], 'remove')).start()

def dns(address):
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.bind((address, 53))
    known = {b'\2ns\4faas': GATEWAY, b'\x09fibonacci\4faas': 'fd00:faa5:1::a'}
    while True:
        query, whom = sock.recvfrom(4096)
        end = query.index(b'\0', 12)
        address, question = known.get(query[12:end]), query[12:end + 5]
        if address is None:
            sock.sendto(query[:2] + b'\x81\x83\0\1\0\0\0\0\0\0' + question, whom)
        elif question[-4:] != b'\0\x1c\0\1':
            sock.sendto(query[:2] + b'\x81\x80\0\1\0\0\0\0\0\0' + question, whom)
        else:
            record = b'\xc0\x0c\0\x1c\0\1\0\0\0\2\0\x10' + socket.inet_pton(socket.AF_INET6, address)
            sock.sendto(query[:2] + b'\x81\x80\0\1\0\1\0\0\0\0' + question + record, whom)

class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6

for each in (lambda: dns(GATEWAY)), (lambda: dns(ZONE_SERVER)), Server((GATEWAY, 8080), Handler).serve_forever, \
        Server(('::', 51820), Handler).serve_forever:
    threading.Thread(target=each, daemon=True).start()
print('ready', flush=True)
threading.Event().wait()
'''

# A program in front of another: the N-th call of all such programs ends badly. $FAIL_MODE: fail or kill.
TRAP = r'''#!/bin/sh
n=$(($(cat /tmp/calls 2>/dev/null || echo 0) + 1))
echo $n >/tmp/calls
. /tmp/fail 2>/dev/null
if [ $n = "$FAIL_AT" ]; then
    if [ "$FAIL_MODE" = kill ]; then kill -9 $PPID; fi
    echo "no luck with call $n" >&2
    exit 1
fi
exec /real/%s "$@"
'''




@lab.needs_root
@unittest.skipIf(sys.version_info < (3, 11), 'faasd does not run on it')
class TestUploads(unittest.TestCase):
    """`faas new` of images by every way in, to a real faasd: the program of the image is busybox."""

    @classmethod
    def setUpClass(cls):
        cls.host = cls.enterClassContext(lab.Host('server'))
        cls.server = cls.enterClassContext(serving.standalone(cls.host, FAAS_MAX_UPLOAD='400M'))
        base = images.layer(('bin/busybox', programs.static_busybox().read_bytes(), {'mode': 0o755}), ('www/', None))
        cls.config = {'Cmd': ['/bin/busybox', 'httpd', '-f', '-p', '[::]:80', '-h', '/www']}
        cls.layers = [base, images.layer(('www/index.html', b'from an image\n'))]
        cls.small = images.image(cls.layers, cls.config)
        cls.folder = cls.host.path('/root/uploads')
        cls.folder.mkdir()
        (cls.folder / 'small.tar').write_bytes(cls.small)

    def sh(self, command, ok=(0,)):
        return self.host.run(['sh', '-c', f'cd /root/uploads; {command}'], ok=ok, timeout_s=120)

    def faas(self, words, ok=(0,)):
        return self.sh(f'{words}'.replace('faas ', f'{lab.REPO}/faas ', 1), ok)

    def serves(self, name, text='from an image\n'):
        self.assertEqual(text, self.server.get(self.server.api('GET', f'/api/ip/{name}').json['ipv6']))

    def big(self, size):
        path = self.folder / 'big.tar'
        images.image([*self.layers, images.big(size, 200)], self.config, path=str(path))
        self.addCleanup(path.unlink)

    def test_a_file_a_pipe_and_standard_input(self):
        for number, command in enumerate((
            'faas new NAME small.tar', 'cat small.tar | faas new NAME', 'faas new NAME <small.tar',
            'cat small.tar | faas new NAME -', 'gzip <small.tar | faas new NAME', 'zstd <small.tar | faas new NAME -',
            '(sleep 1.2; cat small.tar) | faas new NAME', 'mkfifo pipe; cat small.tar >pipe & faas new NAME pipe',
        )):
            with self.subTest(command):
                before, call = command.split('faas ') if not command.startswith('faas') else ('', '')
                call = call or command.removeprefix('faas ')
                said = self.sh(f'{before}{lab.REPO}/faas {call}'.replace('NAME', f'way{number}'))
                self.assertRegex(said.stdout, f'Deployed way{number} at fd00:')
                what = f'archive {re.search("small.tar$|pipe$", call)[0]}' if re.search('NAME [a-z]', call) else \
                    'archive on standard input'
                self.assertEqual(f'Deploying way{number} from the {what}\n', said.stderr)
                self.serves(f'way{number}')

    def test_a_pipe_that_brings_nothing_is_no_folder(self):
        done = self.sh(f'false | {lab.REPO}/faas new hello', ok=(1,))
        self.assertRegex(done.stderr, r'\Aerror: standard input is empty.*\nhint: .*</dev/null')
        self.sh(f': >empty.tar; {lab.REPO}/faas new hello empty.tar', ok=(1,))

    def test_interrupted_while_it_starts_nothing_has_changed(self):
        (self.folder / 'slow').mkdir()
        (self.folder / 'slow/faas.toml').write_text('command = ["sleep", "25"]\n')
        self.faas('faas new slow small.tar')
        process = self.host.popen(['sh', '-c', f'cd /root/uploads; exec {lab.REPO}/faas new slow slow'],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        instances = self.host.path('/run/faasd/instances')
        before = set(os.listdir(instances))
        lab.wait_until(lambda: set(os.listdir(instances)) > before, 20, 'the instance that is tried')
        process.send_signal(signal.SIGINT)
        self.assertEqual(130, process.wait(20))
        lab.wait_until(lambda: set(os.listdir(instances)) == before, 20, 'its end')
        self.serves('slow')
        lab.wait_until(lambda: self.server.status_of('slow')['revision'] == 1, 5, 'the old revision')
        self.faas('faas new slow small.tar')               # and nothing is under way

    def test_a_program_that_the_server_lacks_is_no_fault_of_the_function(self):
        (self.folder / 'lacks').mkdir()
        (self.folder / 'lacks/faas.toml').write_text('command = ["node-of-nobody", "server.js"]\n')
        done = self.faas('faas new lacks', ok=(1,))
        self.assertRegex(done.stderr, "\nerror: the function does not start: the program 'node-of-nobody' is not "
                         r'installed on the server\n(  \| .*\n)*hint: install it there, .* \./node-of-nobody\n\Z')
        with open(self.folder / 'lacks.tar', 'wb') as file:
            file.write(images.image(self.layers, {'Cmd': ['node-of-nobody']}))
        done = self.faas('faas new lacks lacks.tar', ok=(1,))
        self.assertRegex(done.stderr,
                         r"there is no program 'node-of-nobody' in the image\n(  \| .*\n)*hint: build the program")

    def test_a_folder_that_is_sent_without_the_client_is_told_what_it_lacks_too(self):
        for name, hint in (('Dockerfile', 'docker save IMAGE'), ('package.json', '"node", "server.js"'),
                           ('requirements.txt', 'add a handler.py'), ('notes', 'put a handler.py')):
            reply = self.server.deploy('almost', images.layer((name, b'')))
            self.assertIn(hint, reply.json['hint'])

    def test_what_is_no_archive_is_said(self):
        done = self.sh(f'echo hello | {lab.REPO}/faas new hello', ok=(1,))
        self.assertRegex(done.stderr, r'\Aerror: standard input is not the archive of an image.*\nhint: docker save')

    def test_several_images_and_which_one(self):
        page = images.layer(('www/index.html', b'the other\n'))
        other = images.files_of([self.layers[0], page], self.config, ref='b:2')
        both = images.joined(images.files_of(self.layers, self.config, ref='a:1'), other)
        with open(self.folder / 'both.tar', 'wb') as file:
            images.write(both, file)
        done = self.faas('faas new both both.tar', ok=(1,))
        self.assertRegex(done.stderr, r'\ADeploying .*\nerror: .*2 images.*a:1.*b:2.*\nhint: .*--image')
        self.faas('faas new both both.tar --image b:2')
        self.serves('both', 'the other\n')

    def resident(self, kind='VmHWM'):
        """MiB of memory that the daemon has (VmRSS), or had at its most."""
        daemon = self.host.run(['pgrep', '-o', '-f', '^[^ ]*python3? .*faasd.py']).stdout.strip()
        status = self.host.path(f'/proc/{daemon}/status').read_text()
        return int(re.search(rf'{kind}:\s*(\d+) kB', status)[1]) >> 10

    def test_memory_stays_flat_on_both_sides(self):
        self.big(300 << 20)
        self.faas('faas new flat small.tar')
        before = self.resident()
        measure = 'import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2); '
        measure += 'print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)'
        client = f"/usr/bin/python3 -c '{measure}' /usr/bin/python3 {lab.REPO}/faas new flat"
        for way in (f'{client} big.tar', f'cat big.tar | {client}'):
            self.assertLess(int(self.sh(way).stdout), 64, way)
        self.assertLess(self.resident() - before, 32)

    def test_an_interrupted_upload_leaves_nothing(self):
        functions = self.host.path('/var/lib/faasd/functions')
        self.faas('faas new whole small.tar')
        names, layers = set(os.listdir(functions)), set(os.listdir(functions.parent / 'layers'))
        memory = self.resident('VmRSS')
        reader, writer = os.pipe()
        process = self.host.popen([f'{lab.REPO}/faas', 'new', 'cut'], stdin=reader, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True)
        os.close(reader)
        with open(writer, 'wb', buffering=0) as pipe:
            pipe.write(self.small)
            for _ in range(150):                   # nobody takes the last of it before the others
                pipe.write(bytes(1 << 20))
            self.assertTrue([name for name in set(os.listdir(functions)) - names if name.startswith('.incoming-')])
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=20)
        self.assertEqual((130, '', 'Deploying cut from the archive on standard input\nerror: interrupted\n'),
                         (process.returncode, *said))
        lab.wait_until(lambda: set(os.listdir(functions)) == names, 20, 'the end of it')
        self.assertEqual(layers, set(os.listdir(functions.parent / 'layers')))
        self.assertNotIn('cut', [each['name'] for each in self.server.api('GET', '/api/list').json])
        self.assertLess(self.resident('VmRSS') - memory, 8)
        self.faas('faas new cut small.tar')        # the name is free

    def test_a_refusal_is_heard_while_the_pipe_is_silent(self):
        reader, writer = os.pipe()
        process = self.host.popen([f'{lab.REPO}/faas', 'new', 'ns'], stdin=reader, stderr=subprocess.PIPE, text=True)
        os.close(reader)
        with open(writer, 'wb', buffering=0) as pipe:
            pipe.write(self.small[:20000])
            said = process.communicate(timeout=10)[1]
        self.assertRegex(said, r"\ADeploying .*\nerror: 'ns' is reserved\nhint: ")
        self.assertEqual(1, process.returncode)

    def test_a_path_may_be_a_pipe(self):
        self.sh(f"bash -c '{lab.REPO}/faas new named <(cat small.tar)'")
        self.serves('named')

    def test_a_refusal_in_the_middle_of_an_upload_is_heard(self):
        for command in (
            'cat small.tar - </dev/zero | {} new huge',
            'cp small.tar huge.tar; truncate -s 500M huge.tar; {} new huge huge.tar',
        ):
            done = self.sh(command.format(f'{lab.REPO}/faas'), ok=(1,))
            self.assertRegex(done.stderr,
                             r'\ADeploying .*\nerror: .* more than FAAS_MAX_UPLOAD, 419430400\nhint: leave')
        (self.folder / 'huge.tar').unlink()

    def test_progress_is_shown_on_a_terminal(self):
        self.big(60 << 20)
        ours, theirs = pty.openpty()
        slowly = '(head -c 30M big.tar; sleep 0.4; tail -c +31457281 big.tar)'
        for words, pattern in (
            (f'{slowly} | {lab.REPO}/faas new shown', 'Uploading  .* MiB   .* MiB/s'),
            (f'{lab.REPO}/faas new shown big.tar', 'Unpacking and starting'),
        ):
            process = self.host.popen(['sh', '-c', f'cd /root/uploads; {words}'], stdin=subprocess.DEVNULL,
                                      stdout=subprocess.DEVNULL, stderr=theirs)
            self.assertEqual(0, process.wait(60))
            said = os.read(ours, 65536).decode()
            self.assertRegex(said, pattern)
            self.assertTrue(said.endswith('\r\x1b[K'), said[-40:])
        os.close(ours)
        os.close(theirs)


@lab.needs_root
@unittest.skipIf(sys.version_info < (3, 11), 'faasd does not run on it')
class TestUploadsThroughTheTunnel(unittest.TestCase):
    """What an admin peer uploads by TCP, where a server that closes early can reset its own answer."""

    @classmethod
    def setUpClass(cls):
        cls.host, cls.laptop = cls.enterClassContext(lab.pair())
        cls.server = cls.enterClassContext(serving.standalone(cls.host, FAAS_MAX_UPLOAD='8M'))
        cls.laptop.run(['sh'], input=cls.host.run([FAAS, 'vpn', 'invite', 'laptop', '--admin']).stdout
                       .replace('./faas', str(FAAS)))
        cls.addClassCleanup(cls.laptop.run, [FAAS, 'vpn', 'disconnect'], ok=None)
        cls.laptop.path('/root/function.tar').write_bytes(
            serving.archive({'handler.py': serving.HELLO % serving.answer('by tunnel'), 'x': 'x' * (6 << 20)}))

    def sh(self, command, ok=(0,)):
        return self.laptop.run(['bash', '-c', f'cd /root; faas={FAAS}; {command}'], ok=ok, timeout_s=100)

    def test_files_and_pipes(self):
        for command in ('$faas new tunnel function.tar', 'cat function.tar | $faas new tunnel'):
            self.assertIn('Deployed tunnel', self.sh(command).stdout)
        self.assertEqual('by tunnel', self.server.get(self.server.api('GET', '/api/ip/tunnel').json['ipv6']))

    def refusals(self):
        for command in ('cp function.tar long; truncate -s 3G long; $faas new long long',
                        'cat function.tar - </dev/zero | $faas new long'):
            with self.subTest(command):
                said = self.sh(command, ok=(1,)).stderr
                self.assertRegex(said, r'\ADeploying .*\nerror: .* more than FAAS_MAX_UPLOAD, 8388608\nhint: leave out')

    def test_a_refusal_is_heard(self):
        self.refusals()

    def test_a_refusal_is_heard_on_a_slow_link(self):
        self.laptop.sh('tc qdisc add dev eth0 root tbf rate 16mbit burst 32k latency 300ms')
        self.addCleanup(self.laptop.sh, 'tc qdisc del dev eth0 root')
        self.refusals()


@lab.needs_root
class TestTunnel(unittest.TestCase):
    """connect, disconnect, status and remove with real tunnels between two hosts."""

    @classmethod
    def setUpClass(cls):
        cls.stack = contextlib.ExitStack()
        cls.addClassCleanup(cls.stack.close)
        cls.server, cls.laptop = cls.stack.enter_context(lab.pair())
        stand_in = cls.server.popen([sys.executable, '-c', STAND_IN], stdout=subprocess.PIPE, text=True)
        cls.stack.callback(stand_in.stdout.close)
        if stand_in.stdout.readline() != 'ready\n':
            raise RuntimeError('the stand-in for the server did not start')
        cls.laptop.run(['sh', '-c', 'mkdir /real /opt/trap; for p in ip wg wireguard-go sh ping; do '
                        'path=$(command -v $p) && ln -s "$path" /real/$p; done'], ok=None)
        cls.trapped = os.listdir(cls.laptop.path('/real'))
        for program in cls.trapped:
            trap = cls.laptop.path(f'/opt/trap/{program}')
            trap.write_text((TRAP % program).replace('#!/bin/sh', '#!/real/sh'))
            trap.chmod(0o755)

    def setUp(self):
        done = self.faas('vpn', 'connect', '--server', '203.0.113.10')
        self.assertEqual(done.returncode, 0, done.stderr)
        self.faas('vpn', 'disconnect')
        self.before = self.state()
        self.addCleanup(self.forget)

    def forget(self):
        self.faas('vpn', 'disconnect', ok=None)
        self.faas('vpn', 'remove', '--local', ok=None)

    def faas(self, *words, ok=(0,), **options):
        return self.laptop.run([sys.executable, FAAS, *words], ok=ok, **options)

    def on_a_terminal(self, *words):
        command = ' '.join([sys.executable, str(FAAS), *words])
        done = self.laptop.run(['script', '-qec', command, '/dev/null'], ok=None, env={'TERM': 'xterm'})
        return done.returncode, done.stdout.replace('\r\n', '\n')

    def state(self):
        """What a connection may change on the laptop, and what must be as before when it is gone."""
        say = ('ip -o link | grep -v eth0; ip -6 route | grep -v fe80 | sort; ls -A /run; cat /etc/resolv.conf; '
               'ls -l /etc/resolv.conf | cut -c1-10; ls -A /etc | grep resolv; '
               'for p in /proc/[0-9]*; do readlink $p/exe | grep wireguard; done; ls -A ~/.config/faas/vpn')
        return self.laptop.run(['sh', '-c', say]).stdout

    def assert_as_before(self):
        lab.wait_until(lambda: self.state() == self.before, 3, f'the state {self.before!r}, not {self.state()!r}')

    def assert_works(self):
        """Connect, whatever happened before; then nothing of it is left."""
        self.assertEqual(self.faas('vpn', 'connect').returncode, 0)
        self.assertEqual(self.faas('vpn', 'status').returncode, 0)
        self.faas('vpn', 'disconnect')
        self.assert_as_before()

    def test_addresses_in_use_on_this_machine(self):
        for address in 'fd00:faa5::1/32', 'fd00:faa5:0:100::55/64':            # wg-quick's route; a network's
            self.laptop.run(['ip', 'address', 'add', address, 'dev', 'eth0', 'nodad'])
            done = self.faas('vpn', 'connect', ok=(1,))
            self.laptop.run(['ip', 'address', 'del', address, 'dev', 'eth0'])
            self.assertIn('error: fd00:faa5::/32 is in use on this machine: eth0 has fd00:faa5', done.stderr)
            self.assertEqual('', done.stdout)
        self.assert_works()

    def test_a_server_whose_ipv6_address_leads_nowhere(self):
        hosts = self.laptop.path('/etc/hosts')
        self.addCleanup(hosts.write_text, hosts.read_text())
        hosts.write_text(hosts.read_text() + '2001:db8::dead both.example.com\n203.0.113.10 both.example.com\n')
        config = self.laptop.path('/root/.config/faas/vpn/default.json')
        config.write_text(json.dumps({**json.loads(config.read_text()), 'server_endpoint': 'both.example.com'}))
        done = self.faas('vpn', 'connect')
        self.assertIn('[ok] Server at 203.0.113.10:51820 (no answer from the other address)', done.stdout)
        self.assertIn('203.0.113.10', self.laptop.sh('wg show wg-faas endpoints'))
        self.faas('vpn', 'disconnect')
        self.assert_as_before()

    def test_the_outputs_are_the_documents(self):
        self.forget()
        code, out = self.on_a_terminal('vpn', 'connect', '--server', '203.0.113.10')
        address = re.search(r'Allocated IPv6: (\S+)', out)[1]
        self.assertEqual(code, 0)
        self.assertEqual(re.sub(r'\d+\.\dms', '2.3ms', out), f'''
╭─────────────────────────────────────────────╮
│  FaaS VPN Connection                        │
╰─────────────────────────────────────────────╯

⚙  Checking existing configuration...
   No config found, creating new one...

🔑 Generating WireGuard keypair...
📡 Registering with server...
   Allocated IPv6: {address}

🔧 Configuring WireGuard interface...
   [✓] Created interface wg-faas
   [✓] Assigned IPv6: {address}/64
   [✓] Added peer: server
   [✓] Set MTU: 1420

🌐 Configuring routing...
   [✓] Added route: fd00:faa5::/32 via wg-faas

🔍 Configuring DNS...
   [✓] DNS server: fd00:faa5:0:100::2 (resolv.conf)

🧪 Testing connectivity...
   [✓] Ping VPN server: 2.3ms
   [✓] DNS resolution: fibonacci.faas → fd00:faa5:1:0::a
   [✓] HTTP test: server is reachable

✅ Connected! Your FaaS VPN is active.

Configuration saved as: default
VPN Interface: wg-faas
Your IPv6: {address}

Try it:
  curl 'http://fibonacci.faas/?n=10'

To disconnect:
  ./faas vpn disconnect
''')
        code, out = self.on_a_terminal('vpn', 'status')
        out = re.sub(r'\d+ seconds? ago', '23 seconds ago', out)
        out = re.sub(r'Transfer: [\d.]+ \w+ received, [\d.]+ \w+ sent', 'Transfer: 1.2 MiB received, 384 KiB sent', out)
        self.assertEqual((code, out), (0, f'''
╭─────────────────────────────────────────────╮
│  FaaS VPN Status                            │
╰─────────────────────────────────────────────╯

Status: ✅ Connected

Your IPv6: {address}

Interface: wg-faas
Server: 203.0.113.10:51820
Last handshake: 23 seconds ago
Transfer: 1.2 MiB received, 384 KiB sent

Connectivity: ✅ Active

To disconnect: ./faas vpn disconnect
'''))
        self.assertEqual(self.on_a_terminal('vpn', 'list'), (0, f'''
Saved VPN Configurations:
┌──────────────┬────────────────────────┬──────────┐
│ Name         │ IPv6                   │ Status   │
├──────────────┼────────────────────────┼──────────┤
│ default      │ {address:<22} │ active   │
└──────────────┴────────────────────────┴──────────┘
'''))
        self.assertEqual(self.on_a_terminal('vpn', 'disconnect'),
                         (0, '\nDisconnecting FaaS VPN...\n\n✅ Disconnected.\n'))
        self.assertEqual(self.on_a_terminal('vpn', 'status'),
                         (3, '\nStatus: Not connected\n\nTo connect: ./faas vpn connect\n'))
        code, out = self.on_a_terminal('vpn', 'connect')
        self.assertEqual(code, 0)
        self.assertTrue(out.startswith('\n⚙  Found existing config: default\n🔧 Activating WireGuard interface...\n'
                                       '   [✓] Created interface wg-faas\n'), out)
        self.assertTrue(out.endswith('\n✅ Connected!\n'), out)
        self.assertEqual(self.on_a_terminal('vpn', 'remove'),
                         (0, '\nDisconnecting default...\n\n✅ Removed VPN configuration: default\n'))

    def test_what_stands_while_connected(self):
        self.faas('vpn', 'connect')
        self.assertEqual(self.faas('vpn', 'connect').stdout, 'Already connected: default\n')
        modes = self.laptop.run(['sh', '-c', 'cd; stat -c "%a %n" .config/faas .config/faas/vpn '
                                 '.config/faas/vpn/*.json /run/faas /run/faas/*']).stdout.splitlines()
        self.assertEqual(modes, ['700 .config/faas', '700 .config/faas/vpn', '600 .config/faas/vpn/default.json',
                                 '755 /run/faas', '600 /run/faas/lock', '600 /run/faas/resolv.conf.before',
                                 '600 /run/faas/resolv.conf.ours', '644 /run/faas/wg-faas.json'])
        config = json.loads(self.laptop.path('/root/.config/faas/vpn/default.json').read_text())
        self.assertNotIn(config['private_key'], self.laptop.path('/run/faas/wg-faas.json').read_text())
        peer = self.laptop.run(['wg', 'show', 'wg-faas', 'dump']).stdout.splitlines()[1].split('\t')
        self.assertEqual((peer[2], peer[3], peer[7]), ('203.0.113.10:51820', 'fd00:faa5::/32', '25'))
        self.assertIn('fd00:faa5::/32 dev wg-faas', self.laptop.run(['ip', '-6', 'route']).stdout)
        status = json.loads(self.faas('vpn', 'status', '--json').stdout)
        self.assertEqual((status['connectivity'], status['dns'], status['name']), ('active', 'resolv.conf', 'default'))
        self.assertEqual(json.loads(self.faas('vpn', 'list', '--json').stdout)[0]['status'], 'active')
        self.faas('vpn', 'disconnect')
        self.assert_as_before()
        self.assertEqual(self.faas('vpn', 'disconnect').stdout, 'Not connected: nothing to do.\n')

    def test_no_key_is_ever_in_an_argument(self):
        spy = '#!/real/sh\necho "$0 $@" >>/tmp/spied\nexec /real/{} "$@"\n'
        self.laptop.run(['sh', '-c', 'rm -f /tmp/spied; mkdir -p /opt/spy'])
        for program in self.trapped:
            file = self.laptop.path(f'/opt/spy/{program}')
            file.write_text(spy.format(program))
            file.chmod(0o755)
        self.forget()
        path = {'PATH': '/opt/spy:' + os.environ['PATH']}
        self.faas('vpn', 'connect', '--server', '203.0.113.10', env=path)
        config = json.loads(self.laptop.path('/root/.config/faas/vpn/default.json').read_text())
        spied = self.laptop.path('/tmp/spied').read_text()
        self.assertIn('setconf', spied)
        self.assertIn('genkey', spied)
        self.assertNotIn(config['private_key'], spied)

    def calls(self, mode, at=None):
        """Connect with each program trapped; returns the run, and how many programs were run."""
        self.laptop.run(['rm', '-f', '/tmp/calls'])
        self.laptop.path('/tmp/fail').write_text(f'FAIL_AT={at} FAIL_MODE={mode}\n')
        done = self.faas('vpn', 'connect', ok=None, env={'PATH': '/opt/trap:' + os.environ['PATH']})
        return done, int(self.laptop.path('/tmp/calls').read_text())

    def test_a_step_that_fails_undoes_those_before_it(self):
        done, count = self.calls('none')
        self.assertEqual(done.returncode, 0)
        self.faas('vpn', 'disconnect')
        self.assertGreater(count, 10)
        for step in range(1, count + 1):
            with self.subTest(step=step):
                done, _ = self.calls('fail', step)
                self.assertNotIn('Traceback', done.stderr)
                if done.returncode == 1:
                    self.assertRegex(done.stderr, '(?m)^error: .*no luck with call')
                    self.assert_as_before()
                else:                                   # DNS or one ping: said, and lived with
                    self.assertIn(done.returncode, (0, 3))
                    self.faas('vpn', 'disconnect')
                    self.assert_as_before()

    def test_a_registration_outlives_a_connection_that_fails(self):
        self.forget()
        setconf = '7' if lab.add_wireguard(self.laptop, 'wg-try') else '8'       # wireguard-go is one call more
        self.laptop.run(['ip', 'link', 'delete', 'wg-try'])
        self.laptop.run(['rm', '-f', '/tmp/calls'])
        self.laptop.path('/tmp/fail').write_text(f'FAIL_AT={setconf} FAIL_MODE=fail\n')
        done = self.faas('vpn', 'connect', '--server', '203.0.113.10', ok=(1,),
                         env={'PATH': '/opt/trap:' + os.environ['PATH']})
        self.assertRegex(done.stderr, f'error: Added peer: server: failed: .*no luck with call {setconf}')
        self.assertIn('the config is saved: ./faas vpn connect default', done.stderr)
        self.assert_as_before()
        self.assert_works()

    def test_connect_mends_what_a_killed_connect_left(self):
        _, count = self.calls('none')
        self.faas('vpn', 'disconnect')
        for step in range(1, count + 1):
            with self.subTest(step=step):
                done, _ = self.calls('kill', step)
                self.assertEqual(done.returncode, -9)
                self.assert_works()

    def test_disconnect_cleans_what_a_killed_connect_left(self):
        self.calls('kill', 12)
        self.assertEqual(self.faas('vpn', 'status', ok=(3,)).returncode, 3)
        self.faas('vpn', 'disconnect')
        self.assert_as_before()

    def test_signals_undo(self):
        self.laptop.path('/opt/slow').mkdir(exist_ok=True)
        slow = self.laptop.path('/opt/slow/ping')
        slow.write_text('#!/bin/sh\nexec sleep 60\n')
        slow.chmod(0o755)
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            process = self.laptop.popen([sys.executable, FAAS, 'vpn', 'connect'], text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, env={'PATH': '/opt/slow:' + os.environ['PATH']})
            while 'DNS server' not in process.stdout.readline():
                pass
            process.send_signal(number)
            _, err = process.communicate(timeout=30)
            self.assertEqual(process.returncode, code)
            self.assertRegex(err, r'\Aerror: \w+')
            self.assert_as_before()

    def test_wireguard_go_that_died_is_mended(self):
        self.faas('vpn', 'connect')
        self.laptop.run(['sh', '-c', 'for p in /proc/[0-9]*; do case $(readlink $p/exe) in *wireguard-go) '
                         'kill -9 ${p#/proc/};; esac; done; ip link delete wg-faas 2>/dev/null; true'])
        self.assertEqual(self.faas('vpn', 'status', ok=(3,)).stdout.splitlines()[0], 'Status: Not connected')
        self.assert_works()

    def test_a_resolv_conf_that_others_touch(self):
        resolv = self.laptop.path('/etc/resolv.conf')
        original = resolv.read_bytes()
        try:
            self.faas('vpn', 'connect')
            self.assertEqual(resolv.read_bytes(), OURS + original)
            resolv.write_bytes(b'search x\n' + OURS + b'nameserver 192.0.2.7\n')
            self.faas('vpn', 'disconnect')
            self.assertEqual(resolv.read_bytes(), b'search x\nnameserver 192.0.2.7\n')
            self.faas('vpn', 'connect')
            resolv.write_bytes(b'nameserver 192.0.2.8\n')           # DHCP wrote it anew
            self.assertIn('building it up again', self.faas('vpn', 'connect').stderr)
            self.assertEqual(resolv.read_bytes(), OURS + b'nameserver 192.0.2.8\n')
            self.faas('vpn', 'disconnect')
            self.assertEqual(resolv.read_bytes(), b'nameserver 192.0.2.8\n')
            resolv.write_bytes(OURS + original)           # a power cut: our lines, and no record
            self.faas('vpn', 'disconnect')
            self.assertEqual(resolv.read_bytes(), original)
            resolv.write_bytes(OURS + original)
            self.faas('vpn', 'connect')
            self.faas('vpn', 'disconnect')
            self.assertEqual(resolv.read_bytes(), original)
        finally:
            resolv.write_bytes(original)

    def test_kinds_of_resolv_conf(self):
        save = 'cp -a /etc/resolv.conf /tmp/resolv.saved; '
        restore = ('umount /etc/resolv.conf 2>/dev/null; rm -f /etc/resolv.conf; '
                   'cp -a /tmp/resolv.saved /etc/resolv.conf')
        for make, code in (('rm /etc/resolv.conf', 0),
                           ('mkdir -p /run/x; mv /etc/resolv.conf /run/x/r; ln -s ../run/x/r /etc/resolv.conf', 0),
                           ('cp /etc/resolv.conf /tmp/other; mount --bind /tmp/other /etc/resolv.conf', 0),
                           ('chmod 600 /etc/resolv.conf; printf "# x\\nnameserver 192.0.2.9" >/etc/resolv.conf', 0),
                           ('rm /etc/resolv.conf; ln -s /nowhere/r /etc/resolv.conf', 3),
                           ('cp /etc/resolv.conf /tmp/other; mount --bind -r /tmp/other /etc/resolv.conf; '
                            'mount -o remount,bind,ro /etc/resolv.conf', 3)):
            with self.subTest(make):
                self.laptop.run(['sh', '-c', save + make])
                try:
                    show = ['sh', '-c', 'cd /etc; stat -c "%A %N" resolv.conf; cat resolv.conf; ls -A /run']
                    before = self.laptop.run(show, ok=None).stdout
                    done = self.faas('vpn', 'connect', ok=None)
                    self.assertEqual(done.returncode, code, done.stdout + done.stderr)
                    if code == 3:
                        self.assertIn('Connected, but degraded', done.stdout)
                        self.assertIn('hint: ', done.stderr)
                        self.assertEqual(self.faas('vpn', 'status', ok=None).returncode, 3)
                    self.faas('vpn', 'disconnect')
                    self.assertEqual(self.laptop.run(show, ok=None).stdout, before)
                finally:
                    self.laptop.run(['sh', '-c', restore + '; rm -rf /run/x'])

    def ann(self):
        """(command, environment) of faas for a plain user; a setuid perl stands in for sudo, which may be missing."""
        self.laptop.run(['sh', '-c', r"""
            rm -rf /home/ann; mkdir -p /opt/sudo /home/ann; chown 4711:4711 /home/ann
            grep -q ^ann: /etc/passwd || echo 'ann:x:4711:4711::/home/ann:/bin/sh' >>/etc/passwd
            cp -f /usr/bin/perl /opt/sudo/p && chmod 4755 /opt/sudo/p
            printf '%s\n' '#!/bin/sh' 'echo "$@" >>/tmp/sudone' \
                "exec /opt/sudo/p -Ue '\$< = \$> = 0; exec @ARGV' -- \"\$@\"" >/opt/sudo/sudo
            chmod 755 /opt/sudo/sudo; : >/tmp/sudone; chmod 666 /tmp/sudone"""])
        self.laptop.path('/opt/sudo/faas').write_bytes(FAAS.read_bytes())
        command = ['setpriv', '--reuid=4711', '--regid=4711', '--clear-groups', '/usr/bin/python3', '-I',
                   '/opt/sudo/faas']
        return command, {'HOME': '/home/ann', 'PATH': '/opt/sudo:/usr/sbin:/usr/bin:/sbin:/bin'}

    def at_once(self, *commands):
        """Start all of (argv, environment) on the laptop together: [(exit code, stdout, stderr)]."""
        def end(process):
            out, err = process.communicate(timeout=90)
            return process.returncode, out, err

        return [end(process) for process in [
            self.laptop.popen(argv, env=env, cwd='/', text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for argv, env in commands]]

    def test_two_at_once_take_turns(self):
        def mine(*words):
            return [sys.executable, FAAS, *words], {}

        def anns(*words):
            return [*ann, *words], env

        ann, env = self.ann()
        self.laptop.run([*ann, 'vpn', 'connect', 'ann', '--server', '203.0.113.10'], env=env, cwd='/')
        self.laptop.run([*ann, 'vpn', 'disconnect'], env=env, cwd='/')
        for _ in range(3):
            done = sorted(self.at_once(mine('vpn', 'connect'), anns('vpn', 'connect', 'ann')))
            self.assertEqual([code for code, _, _ in done], [0, 1], done)
            self.assertIn('connected already, with another config', done[1][2])
            self.assertEqual(self.faas('vpn', 'status').returncode, 0)
            done = sorted(self.at_once(mine('vpn', 'disconnect'), anns('vpn', 'disconnect')))
            self.assertEqual([(code, out.splitlines()[0]) for code, out, _ in done],
                             [(0, 'Disconnecting FaaS VPN...'), (0, 'Not connected: nothing to do.')], done)
            self.assert_as_before()
        for _ in range(3):                              # one person in two terminals
            done = sorted(self.at_once(mine('vpn', 'connect'), mine('vpn', 'connect')))
            self.assertEqual([(code, out.splitlines()[0]) for code, out, _ in done],
                             [(0, 'Already connected: default'), (0, 'Found existing config: default')], done)
            done = self.at_once(mine('vpn', 'disconnect'), mine('vpn', 'connect'))
            self.assertEqual([code for code, _, _ in done], [0, 0], done)
            if self.faas('vpn', 'status', ok=(0, 3)).returncode == 0:
                self.faas('vpn', 'disconnect')
            self.assert_as_before()

    def test_one_who_waits_says_so(self):
        self.faas('vpn', 'connect')
        holder = self.laptop.popen(['flock', '/run/faas/lock', 'sh', '-c', 'echo held; exec sleep 1'],
                                   stdout=subprocess.PIPE, text=True)
        with holder:
            self.assertEqual(holder.stdout.readline(), 'held\n')
            done = self.faas('vpn', 'disconnect')
        self.assertEqual((done.stdout.splitlines()[-1], done.stderr),
                         ('Disconnected.', 'Waiting for another faas vpn command to end …\n'))
        self.assert_as_before()

    def test_no_other_user_can_hold_the_lock(self):
        ann, env = self.ann()
        self.faas('vpn', 'connect')
        held = self.laptop.run([*ann[:ann.index('/usr/bin/python3')], 'flock', '-n', '/run/faas/lock', 'echo', 'held'],
                               ok=None, env=env)
        self.assertEqual('', held.stdout)
        self.assertIn('Permission denied', held.stderr)
        waits = self.laptop.popen(['sh', '-c', 'exec 9>/run/faas/lock; flock 9; echo held; exec sleep 60'],
                                  stdout=subprocess.PIPE, text=True)
        with waits:
            self.assertEqual(waits.stdout.readline(), 'held\n')
            taken = self.laptop.popen([*ann, 'vpn', 'disconnect'], env=env, cwd='/', text=True, stderr=subprocess.PIPE)
            self.assertRegex(taken.stderr.readline(), '^Waiting for another faas vpn command to end')
            taken.kill()                                # what waits for it as root ends as well
            taken.communicate()
            waits.kill()
        self.faas('vpn', 'disconnect')
        self.assert_as_before()

    def test_a_person_with_sudo_owns_the_config_and_root_the_rest(self):
        ann, env = self.ann()

        def owners():
            return self.laptop.run(['sh', '-c', 'find /home/ann/.config ! -user 4711']).stdout

        if not shutil.which('sudo'):
            done = self.laptop.run([*ann, 'vpn', 'connect', '--server', '203.0.113.10'], ok=(1,), cwd='/',
                                   env={**env, 'PATH': '/usr/bin:/bin'})
            self.assertIn('needs root, and there is no sudo', done.stderr)
        self.laptop.run([*ann, 'vpn', 'connect', 'ann', '--server', '203.0.113.10'], env=env, cwd='/')
        self.assertEqual(owners(), '')
        self.assertEqual(self.laptop.run([*ann, 'vpn', 'status'], env=env, cwd='/').returncode, 0)
        self.assertIn('active', self.laptop.run([*ann, 'vpn', 'list'], env=env, cwd='/').stdout)
        sudone = self.laptop.path('/tmp/sudone').read_text().splitlines()
        self.assertLessEqual({line.split()[0].rpartition('/')[2] for line in sudone}, {'ip', 'wg', 'sh', 'setsid'})
        self.laptop.run([*ann, 'vpn', 'disconnect'], env=env, cwd='/')
        self.assert_as_before()
        root = {**env, 'HOME': '/root', 'SUDO_UID': '4711', 'SUDO_GID': '4711'}
        self.laptop.run(['/usr/bin/python3', '-I', '/opt/sudo/faas', 'vpn', 'connect', 'ann2',
                         '--server', '203.0.113.10'], env=root, cwd='/')
        self.assertEqual(owners(), '')
        self.assertEqual(self.laptop.path('/home/ann/.config/faas/vpn/ann2.json').stat().st_mode & 0o777, 0o600)
        self.laptop.run(['/usr/bin/python3', '-I', '/opt/sudo/faas', 'vpn', 'remove', 'ann2'], env=root, cwd='/')
        self.assert_as_before()

    def test_removed_on_the_server(self):
        self.faas('vpn', 'connect')
        config = json.loads(self.laptop.path('/root/.config/faas/vpn/default.json').read_text())
        self.server.run(['wg', 'set', 'wg0', 'peer', config['public_key'], 'remove'])
        done = self.faas('vpn', 'status', ok=(3,))
        self.assertIn('the server does not answer', done.stdout)
        self.assertIn('Status: The server does not answer\n', done.stdout)
        self.assertNotIn('Connected', done.stdout)
        self.assertRegex(done.stderr, r'\Ahint: .*removed.*\./faas vpn remove default --local; .*new invite.*\n\Z')
        self.faas('vpn', 'disconnect')
        done = self.faas('vpn', 'connect', ok=(1,))
        self.assertIn('no WireGuard handshake', done.stderr)
        self.assertIn('was this machine removed', done.stderr)
        self.assertIn('vpn remove default --local', done.stderr)
        self.assert_as_before()
        done = self.faas('vpn', 'remove', ok=(1,))
        self.assertIn('nothing is deleted', done.stderr)
        self.assertIn('vpn remove default --local', done.stderr)
        self.assert_as_before()
        self.faas('vpn', 'remove', '--local')
        self.assertEqual(self.faas('vpn', 'list', '--json').stdout, '[]\n')

    def test_remove_while_not_connected_asks_through_a_tunnel_of_its_own(self):
        config = json.loads(self.laptop.path('/root/.config/faas/vpn/default.json').read_text())
        self.assertIn(config['public_key'], self.server.run(['wg', 'show', 'wg0', 'peers']).stdout)
        self.assertEqual(self.faas('vpn', 'remove').stdout, 'Removed VPN configuration: default\n')
        lab.wait_until(lambda: config['public_key'] not in self.server.run(['wg', 'show', 'wg0', 'peers']).stdout,
                       5, 'the end of the peer')
        self.assertEqual(self.state().replace('default.json\n', ''), self.before.replace('default.json\n', ''))

    def test_two_configs(self):
        self.faas('vpn', 'connect', 'other', '--server', '203.0.113.10')
        done = self.faas('vpn', 'connect', ok=(1,))
        self.assertIn('another config: other', done.stderr)
        self.assertIn('another config is connected', self.faas('vpn', 'remove', ok=(1,)).stderr)
        self.assertEqual(self.faas('vpn', 'disconnect', 'default').stdout,
                         'Not connected: default (connected is other).\n')
        self.faas('vpn', 'remove', 'other')
        self.assert_as_before()

    # Bad input and bad machines: one error, and nothing of it stays

    def refused(self, *words, code=1, says='', **options):
        """The command fails with this one error and leaves all as it was."""
        done = self.faas(*words, ok=(code,), **options)
        self.assertRegex(done.stderr, r'\Aerror: .*\nhint: .*\n\Z')
        self.assertIn(says, done.stderr)
        self.assert_as_before()
        return done

    def test_ipv6_switched_off(self):
        ann, env = self.ann()
        connect = [*ann, 'vpn', 'connect', '--server', '203.0.113.10']
        for which in 'all', 'default':
            self.laptop.run(['sysctl', '-qw', f'net.ipv6.conf.{which}.disable_ipv6=1'])
            self.before = self.state()
            try:
                self.refused('vpn', 'connect', says='IPv6 is disabled on this machine')
                self.refused('vpn', 'remove', says='IPv6 is disabled on this machine')
                done = self.laptop.run(connect, env=env, cwd='/', ok=(1,))
                self.assertIn('IPv6 is disabled on this machine', done.stderr)
                hint = re.search('sudo (sysctl -w .*=0)', done.stderr)[1]
                self.laptop.run(hint.split())
                self.assert_works()
            finally:
                self.laptop.run(['sysctl', '-qw', 'net.ipv6.conf.all.disable_ipv6=0'])
        self.assertEqual(self.laptop.path('/tmp/sudone').read_text(), '')           # nobody was asked for a password
        self.assertEqual(self.laptop.run(['ls', '-A', '/home/ann']).stdout, '')

    def test_an_interface_of_that_name_that_is_not_ours(self):
        self.laptop.run(['ip', 'tuntap', 'add', 'wg-faas', 'mode', 'tun'])
        before, self.before = self.before, self.state()
        try:
            for words in ('connect',), ('connect', '--switch'), ('connect', 'new', '--server', '203.0.113.10'), \
                    ('disconnect',), ('remove',):
                self.refused('vpn', *words, says='an interface wg-faas that this program did not make')
            self.assertIn('did not make', self.faas('vpn', 'status', ok=(3,)).stderr)
        finally:
            self.laptop.run(['ip', 'link', 'delete', 'wg-faas'])
        self.before = before
        self.assert_works()

    def test_a_config_that_is_cut_off_or_newer_or_not_private(self):
        path = self.laptop.path('/root/.config/faas/vpn/default.json')
        whole = path.read_text()
        for content, says in ((whole[:100], 'cannot be used: not JSON'), ('', 'cannot be used: not JSON'),
                              (whole.replace('{', '{"version": 2,'), 'is of version 2, this faas knows 1')):
            path.write_text(content)
            for verb in 'connect', 'remove':
                self.refused('vpn', verb, says=says)
            self.assertEqual(path.read_text(), content)
        path.write_text(whole)
        path.chmod(0o644)
        self.assertIn('others could read /root/.config', self.faas('vpn', 'connect').stderr)
        self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o600)
        self.assertEqual(self.faas('vpn', 'connect').stderr, '')

    def test_a_server_that_answers_otherwise_or_not_at_all(self):
        self.forget()
        self.before = self.state()
        pages = self.laptop.popen([sys.executable, '-c', """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers['Content-Length']))
        self.send_response(int(self.headers['Host'].rpartition('.')[2].split(':')[0]) * 100)
        self.send_header('Content-Type', 'text/html')
        self.end_headers()
        self.wfile.write(b'<html><title>Welcome to our hotel</title>')
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(('', 8099), Handler).serve_forever()"""])
        lab.wait_until(lambda: ':8099' in self.laptop.run(['ss', '-ltn']).stdout, 10, 'the web server')
        try:
            for server, says in (('127.0.0.2:8099', 'makes no sense (HTTP 200, text/html): <html><title>Welcome'),
                                 ('127.0.0.4:8099', 'the server answered HTTP 400:'),
                                 ('127.0.0.5:8099', 'the server answered HTTP 500: Welcome to our hotel'),
                                 ('127.0.0.1:8098', 'cannot be reached at 127.0.0.1:8098 (TCP): Connection refused'),
                                 ('203.0.113.99', 'cannot be reached at 203.0.113.99:51820 (TCP): '),
                                 ('nowhere.invalid', 'reached at nowhere.invalid:51820 (TCP): the name does not')):
                done = self.faas('vpn', 'connect', '--server', server, ok=(1,))
                self.assertRegex(done.stderr, r'\Aerror: .*\nhint: .*\n\Z')
                self.assertIn(says, done.stderr)
                self.assertEqual(self.state().replace('default.pending\n', ''), self.before)
        finally:
            pages.terminate()

    def test_a_server_with_another_key(self):
        path = self.laptop.path('/root/.config/faas/vpn/default.json')
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, 'server_public_key': KEYS[2]}))
        self.refused('vpn', 'connect', says='no WireGuard handshake')

    def test_a_laptop_without_the_programs(self):
        for program, package in ('wg', 'wireguard-tools'), ('ip', 'iproute2'):
            path = self.laptop.run(['sh', '-c', f'readlink -f "$(command -v {program})"']).stdout.strip()
            self.laptop.run(['mv', path, path + '.away'])
            try:
                done = self.faas('vpn', 'connect', ok=(1,))
                self.assertEqual(done.stderr, f"error: the program '{program}' is not installed\n"
                                 f'hint: install it: sudo apt install {package}\n')
            finally:
                self.laptop.run(['mv', path + '.away', path])
            self.assert_as_before()

    def test_on_the_server(self):
        done = self.server.run([sys.executable, FAAS, 'vpn', 'connect', '--server', '203.0.113.10'], ok=(1,))
        self.assertIn('the FaaS server itself', done.stderr)


if __name__ == '__main__':
    unittest.main()
