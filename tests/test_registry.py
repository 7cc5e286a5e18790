"""What exists: names, addresses, deployments, peers, invites and serials, across crashes and reopened files."""

import base64
import contextlib
import hashlib
import hmac
import json
import os
import pathlib
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

import registry
from host import disk, files
from tests import inside, lab

KEYS = [base64.b64encode(bytes((number,)) * 32).decode() for number in range(1, 40)]
FUNCTIONS = 'fd00:faa5:1:0'


class RegistryTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = os.path.join(folder.name, 'registry.db')
        self.registry = registry.Registry(self.path)
        self.addCleanup(self.close)

    def close(self):
        self.registry.close()  # the one that was opened last

    def reopen(self):
        self.registry.close()
        self.registry = registry.Registry(self.path)
        return self.registry

    def deploy(self, *names):
        for name in names:
            function, number = self.registry.begin_revision(name)
            self.registry.commit_revision(function, number)
        return function.ipv6

    def sql(self, statement, *values):
        """Straight to the file, as a second program would."""
        with contextlib.closing(sqlite3.connect(self.path)) as db, db:
            return db.execute(statement, values).fetchall()

    def fill(self, network):
        """Every address of the network that has no row is in use from now on."""
        with contextlib.closing(sqlite3.connect(self.path)) as db, db:
            db.executemany(
                'INSERT OR IGNORE INTO addresses VALUES (?, ?, NULL)',
                ((network, host) for host in range(registry.FIRST_HOST, registry.LAST_HOST + 1)),
            )


class Names(unittest.TestCase):
    GOOD = 'a', '0', 'a1', 'hello', 'api-2', 'a--b', '7up', 'a' * 63
    BAD = [
        '',
        '../x',
        'a/b',
        'a' * 64,
        'café',
        'ａ',
        'A',
        'Hello',
        '-a',
        'a-',
        '-',
        'a.b',
        'a_b',
        'a b',
        ' a',
        'a\n',
        'a\0',
    ] + ['*', '.', '..', '1.', 'ß', '٣', None, 7, b'a', ['a']]

    def test_labels_are_names(self):
        for name in self.GOOD:
            self.assertEqual(name, registry.check_name(name))

    def test_what_is_no_label_is_refused_in_one_line_with_a_hint(self):
        for name in self.BAD:
            with self.subTest(name), self.assertRaises(registry.BadName) as caught:
                registry.check_name(name)
            self.assertNotIn('\n', str(caught.exception))
            self.assertTrue(caught.exception.hint)

    def test_reserved_names_are_refused_for_functions_alone(self):
        self.assertEqual('ns', registry.check_name('ns'))
        for name in ('ns', 'dashboard', 'metrics', 'peers'):
            with self.assertRaisesRegex(registry.BadName, f"'{name}' is reserved"):
                registry.check_name(name, registry.RESERVED)


class Addresses(RegistryTest):
    def test_the_first_is_a_as_the_document_writes_it(self):
        self.assertEqual('fd00:faa5:1:0::a', self.deploy('fibonacci'))
        self.assertEqual('fd00:faa5:1:0::b', self.deploy('hello'))
        self.assertEqual('fd00:faa5:0:100::a', self.registry.add_peer('laptop', KEYS[0]).ipv6)

    def test_a_freed_one_waits_until_every_other_was_used(self):
        self.deploy('a', 'b', 'c')
        self.registry.remove_function('b')
        self.registry.remove_function('a')
        self.assertEqual('fd00:faa5:1:0::d', self.deploy('d'))
        self.fill(FUNCTIONS)
        self.assertEqual('fd00:faa5:1:0::b', self.deploy('e'))
        self.reopen()
        self.assertEqual('fd00:faa5:1:0::a', self.deploy('f'))
        with self.assertRaises(registry.RangeFull):
            self.deploy('g')

    def test_the_last_is_ffff(self):
        self.fill(FUNCTIONS)
        self.sql('DELETE FROM addresses WHERE host = 65535')
        self.assertEqual('fd00:faa5:1:0::ffff', self.deploy('last'))

    def test_a_full_range_refuses_and_leaves_nothing(self):
        self.fill(FUNCTIONS)
        self.fill(registry.PEERS)
        with self.assertRaisesRegex(registry.RangeFull, '::a to ::ffff are in use'):
            self.registry.begin_revision('hello')
        with self.assertRaises(registry.RangeFull):
            self.registry.add_peer('laptop', KEYS[0])
        invite = self.registry.add_invite()
        with self.assertRaises(registry.RangeFull):
            self.registry.redeem(invite.id, 'laptop', KEYS[0])
        self.assertEqual(
            ([], [], []), (self.registry.functions(), self.registry.peers(), self.sql('SELECT * FROM revisions'))
        )
        self.sql('DELETE FROM addresses WHERE host = 10')
        self.assertEqual('fd00:faa5:1:0::a', self.deploy('hello'))
        self.assertEqual('fd00:faa5:0:100::a', self.registry.redeem(invite.id, 'laptop', KEYS[0]).ipv6)

    def test_a_failed_first_deploy_gives_its_own_back_as_never_used(self):
        function, number = self.registry.begin_revision('broken')
        self.deploy('hello')
        self.assertEqual(['fd00:faa5:1:0::a', 'fd00:faa5:1:0::b'], sorted(self.registry.function_addresses()))
        self.registry.abandon_revision(function, number)
        self.assertEqual(['fd00:faa5:1:0::b'], self.registry.function_addresses())
        self.assertEqual('fd00:faa5:1:0::a', self.deploy('next'))


class Functions(RegistryTest):
    def test_nothing_is_there_before_its_first_revision_is_live(self):
        function, number = self.registry.begin_revision('hello')
        self.assertEqual((None, 1), (function.revision, number))
        self.assertEqual([], self.registry.functions())
        with self.assertRaisesRegex(registry.NotFound, "no function 'hello'"):
            self.registry.function('hello')
        self.registry.commit_revision(function, number)
        self.assertEqual(1, self.registry.function('hello').revision)

    def test_a_redeploy_keeps_id_address_and_birthday_and_only_the_last_revision(self):
        self.deploy('hello')
        before = self.registry.function('hello')
        function, number = self.registry.begin_revision('hello')
        self.assertEqual((before, 2), (function, number))
        self.assertEqual(1, self.registry.function('hello').revision)
        self.registry.commit_revision(function, number)
        self.assertEqual(before._replace(revision=2), self.registry.function('hello'))
        self.assertEqual([(2, 'live')], self.sql('SELECT number, state FROM revisions'))

    def test_a_failed_redeploy_leaves_what_was_live(self):
        self.deploy('hello')
        before = self.registry.function('hello')
        self.registry.abandon_revision(*self.registry.begin_revision('hello'))
        self.assertEqual(before, self.registry.function('hello'))
        self.assertEqual((before, 2), self.registry.begin_revision('hello'))

    def test_what_a_deploy_took_is_told_of_what_is_live(self):
        function, number = self.registry.begin_revision('hello', './hello')
        self.assertIsNone(function.source)
        self.registry.commit_revision(function, number)
        self.assertEqual('./hello', self.registry.function('hello').source)
        function, number = self.registry.begin_revision('hello', "the example 'hello'")
        self.assertEqual('./hello', function.source)
        self.assertEqual('./hello', self.reopen().functions()[0].source)
        function, number = self.registry.begin_revision('hello', "the example 'hello'")
        self.registry.commit_revision(function, number)
        self.assertEqual("the example 'hello'", self.registry.function('hello').source)
        self.deploy('hello')
        self.assertIsNone(self.registry.function('hello').source)

    def test_two_deploys_of_one_name_at_once_are_one(self):
        started, outcomes = threading.Barrier(8), []

        def begin():
            started.wait()
            try:
                outcomes.append(self.registry.begin_revision('hello')[1])
            except registry.NameTaken as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=begin) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([1], [each for each in outcomes if isinstance(each, int)])
        self.assertEqual({"another deploy of 'hello' is under way"}, {each for each in outcomes if each != 1})

    def test_a_deploy_that_a_full_disk_ended_does_not_block_the_next(self):
        function, number = self.registry.begin_revision('hello')
        full = mock.patch.object(self.registry, '_change', side_effect=disk.DiskFull('the disk is full'))
        with full, self.assertRaises(disk.DiskFull):
            self.registry.abandon_revision(function, number)
        again, number = self.registry.begin_revision('hello')
        self.assertEqual((function.ipv6, 1), (again.ipv6, number))
        self.registry.abandon_stale()  # not one that is under way
        self.registry.commit_revision(again, number)
        self.assertEqual(1, self.registry.function('hello').revision)
        self.registry.begin_revision('hello')
        self.registry._deploying.clear()
        self.registry.abandon_stale()
        self.registry.remove_function('hello')

    def test_removal_while_deploying_is_refused(self):
        with self.assertRaises(registry.NotFound):
            self.registry.remove_function('hello')
        self.deploy('hello')
        function, number = self.registry.begin_revision('hello')
        with self.assertRaisesRegex(registry.NameTaken, 'under way'):
            self.registry.remove_function('hello')
        self.registry.abandon_revision(function, number)
        self.assertEqual('fd00:faa5:1:0::a', self.registry.remove_function('hello').ipv6)
        self.assertEqual([], self.registry.functions())
        self.assertEqual([], self.sql('SELECT * FROM revisions'))

    def test_a_bad_or_reserved_name_gets_no_row_and_no_address(self):
        for name in ('ns', '../x', ''):
            with self.assertRaises(registry.BadName):
                self.registry.begin_revision(name)
        self.assertEqual([], self.sql('SELECT * FROM addresses'))

    def test_the_id_of_a_removed_function_is_not_used_again(self):
        self.deploy('hello')
        first = self.registry.remove_function('hello').id
        self.deploy('hello')
        self.assertGreater(self.registry.function('hello').id, first)


class TheFile(RegistryTest):
    def test_state_is_the_same_after_reopening_at_each_step(self):
        function, number = self.registry.begin_revision('hello')
        self.assertEqual([], self.reopen().functions())
        self.assertEqual([function.ipv6], self.registry.function_addresses())
        self.registry.commit_revision(function, number)
        self.assertEqual([function._replace(revision=1)], self.reopen().functions())
        self.registry.begin_revision('hello')
        self.assertEqual(1, self.reopen().function('hello').revision)
        self.registry.begin_revision('other')
        self.reopen().abandon_stale()
        self.assertEqual([function._replace(revision=1)], self.reopen().functions())
        self.assertEqual([function.ipv6], self.registry.function_addresses())
        self.assertEqual('fd00:faa5:1:0::b', self.deploy('other'))
        peer = self.registry.add_peer('laptop', KEYS[0], 'admin', preshared_key=KEYS[1])
        self.assertEqual([peer], self.reopen().peers())
        self.registry.begin_peer_removal('laptop')
        self.assertEqual(([], [('laptop', KEYS[0])]), (self.reopen().peers(), self.registry.removed_peers()))
        self.registry.end_peer_removal('laptop')
        self.assertEqual(([], []), (self.reopen().peers(), self.registry.removed_peers()))
        invite = self.registry.add_invite('phone')
        self.assertEqual(invite, self.reopen().invite(invite.id))

    def test_what_tells_this_server_from_another_stays(self):
        before = self.registry.instance
        self.assertRegex(before, '^[0-9a-f]{6}$')
        self.assertEqual(before, self.reopen().instance)

    def test_it_is_private_as_are_its_companions(self):
        self.deploy('hello')
        folder = pathlib.Path(self.path).parent
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in folder.iterdir()}
        self.assertEqual({'registry.db': 0o600, 'registry.db-wal': 0o600, 'registry.db-shm': 0o600}, modes)

    def test_it_survives_power_cuts_by_its_settings(self):
        self.assertEqual([('wal',)], self.sql('PRAGMA journal_mode'))
        self.assertEqual([(2,)], self.registry._rows('PRAGMA synchronous'))

    def test_kill_9_in_the_middle_of_many_changes_leaves_it_consistent(self):
        code = (
            'import itertools, sys, registry\nthe = registry.Registry(sys.argv[1])\n'
            'for turn in itertools.count():\n'
            '    name = f"f{turn % 5}"\n    begun = the.begin_revision(name)\n    print(flush=True)\n'
            '    (the.abandon_revision if turn % 3 == 2 else the.commit_revision)(*begun)\n'
            '    if turn % 7 == 6 and begun[0].revision: the.remove_function(name)\n'
            '    the.next_serial()\n'
        )
        serial = 0
        for lines in (1, 14, 37):
            argv = [sys.executable, '-c', code, self.path]
            with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=lab.REPO) as process:
                for _ in range(lines):
                    self.assertEqual(b'\n', process.stdout.readline())
                process.send_signal(signal.SIGKILL)
            self.reopen().abandon_stale()
            self.assertEqual([('ok',)], self.sql('PRAGMA integrity_check'))
            self.assertEqual([], self.sql('PRAGMA foreign_key_check'))
            live = self.sql('SELECT id, revision FROM functions')
            self.assertEqual(
                sorted(live), sorted(self.sql("SELECT function, number FROM revisions WHERE state = 'live'"))
            )
            self.assertEqual(len(live), self.sql('SELECT count(*) FROM revisions')[0][0])
            used = self.sql('SELECT host FROM addresses WHERE freed IS NULL')
            self.assertEqual(
                sorted(f'{FUNCTIONS}::{host:x}' for (host,) in used), sorted(self.registry.function_addresses())
            )
            before, serial = serial, self.registry.next_serial()
            self.assertGreater(serial, before)


class Schemas(unittest.TestCase):
    """tests/schemas/N.sql is a registry of schema N, as faasd of that time left it."""

    def test_a_registry_of_each_older_schema_is_brought_to_the_newest(self):
        older = [number for number, _ in registry.MIGRATIONS][:-1]
        texts = {int(path.stem): path.read_text() for path in (lab.REPO / 'tests/schemas').glob('*.sql')}
        self.assertEqual(older, sorted(texts), 'a new schema needs a registry of the one before in tests/schemas')
        for number, text in texts.items():
            with self.subTest(number), tempfile.TemporaryDirectory() as folder:
                path = f'{folder}/registry.db'
                with contextlib.closing(sqlite3.connect(path)) as db:
                    db.executescript(text)
                    before = {table: db.execute(f'SELECT * FROM {table}').fetchall() for table in self.tables(db)}
                with contextlib.closing(registry.Registry(path)) as opened:
                    self.check(opened)
                with contextlib.closing(sqlite3.connect(path)) as db:
                    self.assertEqual([('ok',)], db.execute('PRAGMA integrity_check').fetchall())
                    with contextlib.closing(registry.Registry(f'{folder}/new.db')) as new:
                        for table in self.tables(db):
                            columns = f'PRAGMA table_info({table})'
                            self.assertEqual(new._rows(columns), db.execute(columns).fetchall())
                with contextlib.closing(sqlite3.connect(f'{path}.before-{number + 1}')) as db:
                    self.assertEqual(
                        before, {table: db.execute(f'SELECT * FROM {table}').fetchall() for table in self.tables(db)}
                    )

    def tables(self, db):
        return [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")]

    def check(self, opened):
        self.assertEqual('fc0361', opened.instance)
        self.assertFalse(opened.is_new)
        functions = [(f.id, f.name, f.ipv6, f.revision, f.source) for f in opened.functions()]
        self.assertEqual(
            [(2, 'api', 'fd00:faa5:1:0::b', 1, None), (1, 'hello', 'fd00:faa5:1:0::a', 2, None)], functions
        )
        peers = [(peer.name, peer.public_key, peer.preshared_key, peer.ipv6, peer.role) for peer in opened.peers()]
        self.assertEqual(
            [
                ('laptop', KEYS[0], KEYS[1], 'fd00:faa5:0:100::a', 'admin'),
                ('tablet', KEYS[3], None, 'fd00:faa5:0:100::c', 'peer'),
            ],
            peers,
        )
        self.assertEqual([('lost', KEYS[2])], opened.removed_peers())
        self.assertEqual('phone', opened.redeem('1d39a7bf653580cc', 'other', KEYS[4]).name)
        opened.abandon_stale()
        function, number = opened.begin_revision('hello', './hello')
        self.assertEqual((1, 3), (function.id, number))
        opened.commit_revision(function, number)
        self.assertEqual('./hello', opened.function('hello').source)
        self.assertEqual(5, opened.begin_revision('next')[0].id)
        self.assertEqual(2025004, opened.next_serial())


class LostAndRestored(RegistryTest):
    def setUp(self):
        super().setUp()
        self.functions = os.path.join(os.path.dirname(self.path), 'functions')

    def put(self, *revisions):
        for revision in revisions:
            os.makedirs(os.path.join(self.functions, revision, 'tree'))

    def on_disk(self):
        return sorted(str(path.relative_to(self.functions)) for path in pathlib.Path(self.functions).glob('*/*'))

    def check_files(self):
        return registry.check_files(self.registry, self.functions)

    def lose(self):
        """The registry that a start finds after the file was deleted."""
        self.registry.close()
        os.unlink(self.path)
        self.registry = registry.Registry(self.path)

    def test_a_new_one_is_new_until_something_was_in_it(self):
        self.assertTrue(self.registry.is_new)
        self.assertTrue(self.reopen().is_new)
        self.assertEqual([], self.check_files())  # there is no such folder
        self.registry.add_peer('laptop', KEYS[0])
        self.assertFalse(self.registry.is_new)
        self.registry.begin_peer_removal('laptop')
        self.registry.end_peer_removal('laptop')
        self.assertFalse(self.reopen().is_new)

    def test_a_missing_or_empty_file_beside_functions_is_refused_at_every_start(self):
        self.deploy('hello', 'api')
        self.registry.copy_daily()
        self.put('1/1', '2/1')
        for lose in (self.lose, self.reopen, lambda: os.truncate(self.path, 0) or self.reopen()):
            self.registry.close()
            lose()
            with self.assertRaisesRegex(registry.RegistryError, 'is empty or was lost.* code of 2 functions') as caught:
                self.check_files()
            self.assertIn(f'cp {self.path}.daily {self.path}', caught.exception.hint)
            self.assertIn(f'mv {self.functions} {self.functions}.old', caught.exception.hint)
            self.assertNotIn('\n', str(caught.exception) + caught.exception.hint)
        self.assertEqual(['1/1', '2/1'], self.on_disk())
        command = caught.exception.hint.partition('then: ')[2].partition('; or')[0]
        self.registry.close()
        subprocess.run(['sh', '-ec', command], check=True)
        self.registry = registry.Registry(self.path)
        self.assertEqual([], self.check_files())
        self.assertEqual(['api', 'hello'], [function.name for function in self.registry.functions()])

    def test_an_empty_one_does_not_replace_the_copy_of_the_lost(self):
        self.deploy('hello')
        self.registry.copy_daily()
        self.lose()
        os.utime(f'{self.path}.daily', (0, 0))
        self.assertFalse(self.registry.copy_daily())
        with contextlib.closing(sqlite3.connect(f'{self.path}.daily')) as db:
            self.assertEqual([('hello',)], db.execute('SELECT name FROM functions').fetchall())

    def test_with_its_functions_moved_away_a_new_one_starts(self):
        self.put('1/1')
        os.rename(self.functions, self.functions + '.old')
        self.assertEqual([], self.check_files())

    def test_what_an_older_copy_knows_nothing_of_is_moved_aside(self):
        self.deploy('hello', 'api')
        self.registry.copy_daily()
        self.deploy('hello', 'hello', 'later')
        self.put('1/3', '2/1', '3/1')
        self.assertEqual([], self.check_files())
        self.registry.close()
        os.replace(f'{self.path}.daily', self.path)
        self.registry = registry.Registry(self.path)
        moved = self.check_files()
        self.assertEqual(['2/1'], self.on_disk())
        names = [path.removeprefix(f'{self.functions}.unknown/').partition('.')[0] for path in moved]
        self.assertEqual(['1/3', '3/1'], names)
        for path in moved:
            self.assertEqual(['tree'], os.listdir(path))
        self.assertEqual([], self.check_files())

    def test_what_a_killed_deploy_or_removal_left_is_known(self):
        self.deploy('hello', 'gone')
        self.registry.remove_function('gone')
        self.registry.begin_revision('hello')
        self.registry.begin_revision('half')
        self.put('1/1', '1/2', '2/1', '3/1')
        self.assertEqual([], self.check_files())
        self.reopen().abandon_stale()
        self.assertEqual([], self.check_files())
        self.put('.incoming-abc/work')
        self.assertEqual([], self.check_files())


class FullDisk(inside.OnDisk):
    @inside.inside
    def test_functions_and_peers_are_removed_and_nothing_is_added(self):
        folder = self.disk('size=8m')
        functions, peers = [f'f{number}' for number in range(50)], [f'p{number}' for number in range(30)]
        reserve = files.Reserve(f'{folder}/reserve', 2 << 20)
        reserve.make()
        path = f'{folder}/registry.db'
        the = registry.Registry(path, reserve)
        for name in functions:
            the.commit_revision(*the.begin_revision(name))
        for name, key in zip(peers, KEYS, strict=False):
            the.add_peer(name, key)
        invite, deploying = the.add_invite(), the.begin_revision('half')
        the.close()  # nothing of the log is left to write to
        the = registry.Registry(path, reserve)
        self.stack.callback(the.close)
        self.fill(folder)
        for change in (
            lambda: the.begin_revision('more'),
            lambda: the.add_peer('more', KEYS[-1]),
            lambda: the.redeem(invite.id, 'more', KEYS[-1]),
            the.add_invite,
            the.next_serial,
        ):
            with self.assertRaises(disk.DiskFull) as caught:
                change()
            self.assertIn('faas rm', caught.exception.hint)
        self.assertTrue(os.path.exists(reserve.path))
        the.begin_peer_removal(peers[0])
        self.assertFalse(os.path.exists(reserve.path))
        the.abandon_revision(*deploying)
        for name in peers:
            the.begin_peer_removal(name)
            the.end_peer_removal(name)
        for name in functions:
            the.remove_function(name)
        self.assertEqual(([], [], []), (the.peers(), the.removed_peers(), the.functions()))

    @inside.inside
    def test_each_removal_alone_takes_the_reserve(self):
        for remove in (
            lambda the: the.begin_peer_removal('one'),
            lambda the: the.end_peer_removal('two'),
            lambda the: the.remove_function('hello'),
            lambda the: the.abandon_stale(),
        ):
            folder = self.disk()
            reserve = files.Reserve(f'{folder}/reserve', 1 << 20)
            reserve.make()
            with contextlib.closing(registry.Registry(f'{folder}/registry.db')) as the:
                the.commit_revision(*the.begin_revision('hello'))
                the.begin_revision('half')
                the.add_peer('one', KEYS[0])
                the.add_peer('two', KEYS[1])
                the.begin_peer_removal('two')
            with contextlib.closing(registry.Registry(f'{folder}/registry.db', reserve)) as the:
                self.fill(folder)
                remove(the)
                self.assertFalse(os.path.exists(reserve.path))


class Peers(RegistryTest):
    def test_a_taken_name_and_a_taken_key_are_refused(self):
        self.registry.add_peer('laptop', KEYS[0])
        with self.assertRaisesRegex(registry.NameTaken, "'laptop' exists already"):
            self.registry.add_peer('laptop', KEYS[1])
        with self.assertRaises(registry.KeyTaken) as caught:
            self.registry.add_peer('phone', KEYS[0])
        self.assertTrue(caught.exception.hint)
        with self.assertRaises(registry.BadName):
            self.registry.add_peer('../x', KEYS[1])
        self.assertEqual('fd00:faa5:0:100::b', self.registry.add_peer('phone', KEYS[1]).ipv6)

    def test_one_is_known_by_its_address(self):
        laptop = self.registry.add_peer('laptop', KEYS[0])
        self.assertEqual(laptop, self.registry.peer_at('fd00:faa5:0:100::a'))
        self.assertIsNone(self.registry.peer_at('fd00:faa5:0:100::b'))
        self.registry.begin_peer_removal('laptop')
        self.assertIsNone(self.registry.peer_at('fd00:faa5:0:100::a'))

    def test_an_adopted_address_is_its_own_and_given_to_nobody_else(self):
        self.assertEqual('fd00:faa5:0:100::a', self.registry.add_peer('one', KEYS[0], ipv6='fd00:faa5:0:100::a').ipv6)
        self.registry.add_peer('two', KEYS[1], ipv6='fd00:faa5:0:100::c')
        with self.assertRaisesRegex(registry.AddressTaken, 'belongs to another peer'):
            self.registry.add_peer('three', KEYS[2], ipv6='fd00:faa5:0:100::c')
        given = [self.registry.add_peer(f'p{number}', KEYS[number]).ipv6 for number in (3, 4)]
        self.assertEqual(['fd00:faa5:0:100::b', 'fd00:faa5:0:100::d'], given)

    def test_an_adopted_address_outside_the_range_is_refused(self):
        for ipv6 in (
            'fd00:faa5:0:100::1',
            'fd00:faa5:0:100::9',
            'fd00:faa5:0:100::',
            'fd00:faa5:0:100::1:a',
            'fd00:faa5:0:100:1:2:3:4',
            'fd00:faa5:1::a',
            '2001:db8::a',
            '::1',
            '1:2:3:4:5:6:7:8',
        ):
            with self.subTest(ipv6), self.assertRaises(registry.AddressTaken):
                self.registry.add_peer('laptop', KEYS[0], ipv6=ipv6)
        self.assertEqual([], self.registry.peers())

    def test_removal_is_two_steps_and_the_name_the_key_and_the_address_are_free_after_the_second(self):
        with self.assertRaisesRegex(registry.NotFound, "no peer 'laptop'"):
            self.registry.begin_peer_removal('laptop')
        self.registry.add_peer('laptop', KEYS[0])
        self.registry.begin_peer_removal('laptop')
        self.registry.begin_peer_removal('laptop')
        self.assertEqual([], self.registry.peers())
        with self.assertRaises(registry.NameTaken):
            self.registry.add_peer('laptop', KEYS[1])
        self.registry.end_peer_removal('laptop')
        self.assertEqual('fd00:faa5:0:100::b', self.registry.add_peer('laptop', KEYS[0]).ipv6)
        self.registry.end_peer_removal('laptop')
        self.assertEqual(['laptop'], [peer.name for peer in self.registry.peers()])


class Invites(RegistryTest):
    def redeem(self, invite, name='laptop', key=KEYS[0]):
        return self.registry.redeem(invite.id, name, key)

    def test_one_makes_one_peer_of_its_role(self):
        peer = self.redeem(self.registry.add_invite(role='admin'))
        self.assertEqual(('laptop', KEYS[0], 'admin'), (peer.name, peer.public_key, peer.role))
        self.assertEqual([peer], self.registry.peers())

    def test_the_same_key_is_answered_the_same_again_and_another_is_refused(self):
        invite = self.registry.add_invite()
        peer = self.redeem(invite)
        self.reopen()
        self.assertEqual(peer, self.redeem(invite))
        self.assertEqual(peer, self.redeem(invite, name='other'))
        with self.assertRaises(registry.BadInvite):
            self.redeem(invite, key=KEYS[1])
        self.assertEqual([peer], self.registry.peers())

    def test_two_at_once_make_one_peer(self):
        invite, outcomes = self.registry.add_invite(), []

        def redeem(key):
            try:
                outcomes.append(self.redeem(invite, key=key))
            except registry.BadInvite:
                outcomes.append(None)

        threads = [threading.Thread(target=redeem, args=(key,)) for key in KEYS[:8]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(self.registry.peers(), [each for each in outcomes if each])

    def test_the_answer_is_repeated_for_two_minutes(self):
        invite = self.registry.add_invite()
        self.redeem(invite)
        for later_s, good in ((registry.INVITE_REPEAT_S - 5, True), (registry.INVITE_REPEAT_S + 5, False)):
            with mock.patch.object(registry.time, 'time', return_value=time.time() + later_s):
                self.assertEqual(good, self.registry.invites_open_for_s() > 0)
                if good:
                    self.redeem(invite)
                else:
                    self.assertRaises(registry.BadInvite, self.redeem, invite)

    def test_an_expired_an_unknown_and_a_used_one_are_told_the_same(self):
        told = set()
        used, expired = self.registry.add_invite(), self.registry.add_invite(lifetime_s=0)
        self.redeem(used)
        for invite in (expired, used._replace(id='0' * 16), used):
            with self.assertRaises(registry.BadInvite) as caught:
                self.redeem(invite, key=KEYS[1])
            told.add((str(caught.exception), caught.exception.hint))
        self.assertEqual(1, len(told))

    def test_a_removed_peers_is_dead_for_the_same_key_too(self):
        invite = self.registry.add_invite()
        self.redeem(invite)
        self.registry.begin_peer_removal('laptop')
        self.assertRaises(registry.BadInvite, self.redeem, invite)
        self.registry.end_peer_removal('laptop')
        self.assertRaises(registry.BadInvite, self.redeem, invite)
        self.assertEqual([], self.registry.peers())

    def test_without_a_name_of_its_own_it_makes_the_hosts_unique(self):
        names = [self.redeem(self.registry.add_invite(), key=key).name for key in KEYS[:3]]
        self.assertEqual(['laptop', 'laptop-2', 'laptop-3'], names)
        long = [self.redeem(self.registry.add_invite(), 'a' * 63, key).name for key in KEYS[3:5]]
        self.assertEqual(['a' * 63, 'a' * 61 + '-2'], long)
        with self.assertRaises(registry.BadName):
            self.redeem(self.registry.add_invite(), '../x', KEYS[9])

    def test_with_a_name_it_keeps_that_for_its_peer(self):
        invite = self.registry.add_invite('laptop')
        with self.assertRaisesRegex(registry.NameTaken, 'open invite'):
            self.registry.add_invite('laptop')
        with self.assertRaisesRegex(registry.NameTaken, 'open invite'):
            self.registry.add_peer('laptop', KEYS[2])
        self.assertEqual('laptop-2', self.redeem(self.registry.add_invite(), key=KEYS[1]).name)
        self.assertEqual('laptop', self.redeem(invite, name='whatever').name)
        with self.assertRaises(registry.NameTaken):
            self.registry.add_invite('laptop')
        with self.assertRaises(registry.BadName):
            self.registry.add_invite('../x')

    def test_a_name_is_free_again_when_its_invite_is_over(self):
        self.registry.add_invite('old', lifetime_s=0)
        self.assertEqual('old', self.registry.add_peer('old', KEYS[0]).name)
        invite = self.registry.add_invite('gone')
        self.redeem(invite, key=KEYS[1])
        self.registry.begin_peer_removal('gone')
        self.registry.end_peer_removal('gone')
        self.assertEqual('gone', self.redeem(self.registry.add_invite(), 'gone', KEYS[2]).name)

    def test_an_invite_is_withdrawn_by_its_name(self):
        invite = self.registry.add_invite('laptop')
        self.registry.begin_peer_removal('laptop')
        with self.assertRaises(registry.BadInvite):
            self.registry.redeem(invite.id, 'laptop', KEYS[0])
        self.registry.add_invite('laptop')
        with self.assertRaises(registry.NotFound):
            self.registry.begin_peer_removal('phone')

    def test_a_taken_key_leaves_the_invite_good(self):
        self.registry.add_peer('other', KEYS[0])
        invite = self.registry.add_invite()
        self.assertRaises(registry.KeyTaken, self.redeem, invite)
        self.assertEqual('laptop', self.redeem(invite, key=KEYS[1]).name)

    def test_it_is_open_from_its_making_to_its_end(self):
        self.assertEqual(0, self.registry.invites_open_for_s())
        self.registry.add_invite(lifetime_s=500)
        self.assertAlmostEqual(500, self.registry.invites_open_for_s(), delta=5)
        with mock.patch.object(registry.time, 'time', return_value=time.time() + 501):
            self.assertEqual(0, self.registry.invites_open_for_s())

    def test_its_token_is_the_words_of_the_contract_and_a_check_against_cut_ends(self):
        invite = self.registry.add_invite('laptop')
        token = invite.token('203.0.113.10:51820', 'faas.example.com', KEYS[0])
        text, _, check = token.removeprefix('faas1_').partition('.')
        self.assertEqual(hashlib.sha256(text.encode()).hexdigest()[:8], check)
        fields = json.loads(base64.urlsafe_b64decode(text + '=' * (-len(text) % 4)))
        secret = base64.urlsafe_b64encode(invite.secret).decode().rstrip('=')
        self.assertEqual(
            {
                'i': invite.id,
                's': secret,
                'a': '203.0.113.10:51820',
                'e': 'faas.example.com',
                'k': KEYS[0],
                'n': 'laptop',
            },
            fields,
        )
        self.assertEqual((16, 32), (len(invite.id), len(invite.secret)))

    def test_its_proof_is_over_fields_that_cannot_pose_as_others(self):
        invite = self.registry.add_invite()
        expected = hmac.new(invite.secret, b'\0\0\0\2ab\0\0\0\3\xc3\xa4c', 'sha256').hexdigest()
        self.assertEqual(expected, invite.proof('ab', 'äc'))
        self.assertEqual(expected, invite.proof(b'ab', 'äc'.encode()))
        self.assertNotEqual(invite.proof('ab', 'c'), invite.proof('a', 'bc'))


class Serials(RegistryTest):
    def test_the_first_is_the_documents(self):
        self.assertEqual(2025001, self.registry.next_serial())

    def test_it_rises_across_reopening_and_above_what_was_seen(self):
        given = [self.registry.next_serial() for _ in range(3)]
        given.append(self.reopen().next_serial())
        given.append(self.registry.next_serial(seen=3000000))
        given.append(self.registry.next_serial(seen=5))
        self.assertEqual([2025001, 2025002, 2025003, 2025004, 3000001, 3000002], given)

    def test_it_wraps_as_rfc_1982_says_and_is_never_0(self):
        after = registry.serial_after
        self.assertEqual(1, after(0xFFFFFFFF))
        self.assertEqual(0xFFFFFFFF, after(0xFFFFFFFE))
        self.assertEqual(3, after(0xFFFFFFF0, 2))
        self.assertEqual(3, after(2, 0xFFFFFFF0))
        self.assertEqual(0x80000000, after(1, 0x7FFFFFFF))
        self.assertEqual(8, after(7, None))
        self.assertEqual(
            0xFFFFFFFF, self.registry.next_serial(seen=0x80000000) and self.registry.next_serial(0xFFFFFFFE)
        )
        self.assertEqual([1, 2], [self.reopen().next_serial(), self.reopen().next_serial()])


if __name__ == '__main__':
    unittest.main()
