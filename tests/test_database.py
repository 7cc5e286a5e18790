"""A database file: its schemas, its copies, and one clear error for each thing that can happen to it."""

import contextlib
import errno
import os
import pathlib
import sqlite3
import stat
import subprocess
import tempfile
import threading
import time
import unittest
from unittest import mock

from host import database, disk, files
from tests import inside

FIRST = (1, "CREATE TABLE notes (text TEXT NOT NULL UNIQUE);\nINSERT INTO notes VALUES ('first')")
SECOND = (2, 'ALTER TABLE notes ADD COLUMN length INTEGER')
THIRD = (3, lambda db: db.execute('UPDATE notes SET length = length(text)'))


class Notes(database.Database):
    """The smallest database that there is a use for."""

    def __init__(self, path, migrations=(FIRST,), reserve=None):
        super().__init__(path, migrations, reserve)

    def add(self, text):
        with self._change() as db:
            db.execute('INSERT INTO notes (text) VALUES (?)', (text,))

    @database.removal
    def remove(self, text):
        with self._change() as db:
            db.execute('DELETE FROM notes WHERE text = ?', (text,))

    def texts(self):
        return [text for (text,) in self._rows('SELECT text FROM notes ORDER BY rowid')]


def read(path, sql='SELECT * FROM notes'):
    """The rows that a second program sees."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        return db.execute(sql).fetchall()


class InFolder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.path = self.folder / 'notes.db'

    def open(self, *args):
        notes = Notes(self.path, *args)
        self.addCleanup(notes.close)
        return notes

    def raises(self, error, text, function, *args):
        """The error, after a check that it is one line with a hint."""
        with self.assertRaisesRegex(error, text) as caught:
            function(*args)
        self.assertNotIn('\n', f'{caught.exception}{caught.exception.hint}')
        self.assertTrue(caught.exception.hint)
        return caught.exception


class Migrations(InFolder):
    def test_each_runs_once_after_a_private_copy_of_what_was(self):
        notes = self.open()
        notes.add('second')
        notes.close()
        notes = self.open((FIRST, SECOND, THIRD))
        self.assertEqual([('first', 5), ('second', 6)], read(self.path))
        self.assertEqual([(3,)], read(self.path, 'PRAGMA user_version'))
        for number, columns in ((2, 1), (3, 2)):
            copy = self.folder / f'notes.db.before-{number}'
            self.assertEqual(columns, len(read(copy)[0]))
            self.assertEqual([(number - 1,)], read(copy, 'PRAGMA user_version'))
            self.assertEqual(0o600, stat.S_IMODE(copy.stat().st_mode))
        notes.close()
        self.assertEqual(['first', 'second'], self.open((FIRST, SECOND, THIRD)).texts())
        copies = {'notes.db.before-2', 'notes.db.before-3'}
        self.assertEqual({'notes.db', 'notes.db-shm', 'notes.db-wal', *copies}, set(os.listdir(self.folder)))

    def test_one_that_fails_leaves_the_file_as_it_was(self):
        self.open().close()

        def broken(db):
            db.execute('ALTER TABLE notes ADD COLUMN length INTEGER')
            db.execute('UPDATE notes SET no_such_column = 1')

        before = os.listdir('/proc/self/fd')
        self.raises(database.DatabaseError, 'no such column', Notes, self.path, (FIRST, (2, broken)))
        self.assertEqual(before, os.listdir('/proc/self/fd'))
        self.assertEqual([('first',)], read(self.path))
        self.assertEqual([(1,)], read(self.path, 'PRAGMA user_version'))
        self.assertEqual(['first'], self.open((FIRST, SECOND)).texts())

    def test_without_a_copy_there_is_no_migration(self):
        self.open().close()
        with mock.patch.object(Notes, '_copy', side_effect=disk.DiskFull('full')):
            self.assertRaises(disk.DiskFull, Notes, self.path, (FIRST, SECOND))
        self.assertEqual([(1,)], read(self.path, 'PRAGMA user_version'))

    def test_a_new_file_needs_no_copies(self):
        self.open((FIRST, SECOND, THIRD))
        self.assertEqual(['notes.db', 'notes.db-shm', 'notes.db-wal'], sorted(os.listdir(self.folder)))
        self.assertEqual([('first', 5)], read(self.path))

    def test_a_newer_schema_is_refused_and_left_alone(self):
        self.open((FIRST, SECOND)).close()
        error = self.raises(database.DatabaseError, 'has schema 2, this faasd knows 1', Notes, self.path)
        self.assertEqual('install the newer faasd', error.hint)
        self.assertEqual([('first', None)], read(self.path))


class Starts(InFolder):
    def test_one_that_changes_nothing_writes_nothing(self):
        notes = self.open()
        notes.copy_daily()
        notes.close()
        before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in self.folder.iterdir()}
        notes = self.open()
        notes.copy_daily()
        notes.check_file()
        self.assertEqual(['first'], notes.texts())
        self.assertEqual(0, (self.folder / 'notes.db-wal').stat().st_size)
        notes.close()
        after = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in self.folder.iterdir()}
        self.assertEqual(before, after)


class Copies(InFolder):
    def setUp(self):
        super().setUp()
        self.copy = self.folder / 'notes.db.daily'

    def test_one_is_made_a_day(self):
        notes = self.open()
        self.assertTrue(notes.copy_daily())
        self.assertEqual(0o600, stat.S_IMODE(self.copy.stat().st_mode))
        notes.add('second')
        self.assertFalse(notes.copy_daily())
        self.assertEqual([('first',)], read(self.copy))
        for age_s in (database.DAY_S, -60):  # the second: the clock was set back
            os.utime(self.copy, (time.time() - age_s,) * 2)
            self.assertTrue(notes.copy_daily())
        self.assertEqual([('first',), ('second',)], read(self.copy))
        self.assertEqual(
            ['notes.db', 'notes.db-shm', 'notes.db-wal', 'notes.db.daily'], sorted(os.listdir(self.folder))
        )

    def test_it_is_on_the_disk_before_it_has_its_name(self):
        notes, steps = self.open(), []
        real_replace, real_fsync = os.replace, os.fsync

        def fsync(fd):
            steps.append('folder' if os.path.isdir(f'/proc/self/fd/{fd}') else 'file')
            real_fsync(fd)

        def replace(*both):
            steps.append('replace')
            real_replace(*both)

        with mock.patch.object(files.os, 'fsync', fsync), mock.patch.object(files.os, 'replace', replace):
            notes.copy_daily()
        self.assertEqual(['file', 'replace', 'folder'], steps)

    def test_changes_go_on_while_it_is_made(self):
        notes = self.open()
        going, go_on = threading.Event(), threading.Event()
        check = notes._check

        def slow_check(*args):
            going.set()
            go_on.wait(10)
            check(*args)

        with mock.patch.object(notes, '_check', slow_check):
            thread = threading.Thread(target=notes.copy_daily)
            thread.start()
            self.assertTrue(going.wait(10))
            notes.add('meanwhile')
            self.assertEqual(['first', 'meanwhile'], notes.texts())
            go_on.set()
            thread.join()
        self.assertEqual([('first',)], read(self.copy))

    def test_one_that_cannot_be_made_leaves_the_old(self):
        notes = self.open()
        notes.copy_daily()
        os.utime(self.copy, (0, 0))
        damaged = notes._damaged('row 1 missing from index')
        with mock.patch.object(notes, '_check', side_effect=damaged):
            self.raises(database.Damaged, 'row 1 missing', notes.copy_daily)
        self.assertEqual([('first',)], read(self.copy))
        self.assertEqual([], [name for name in os.listdir(self.folder) if name.startswith('.')])

    def test_it_never_takes_another_files_content(self):
        notes = self.open()
        notes.copy_daily()
        os.utime(self.copy, (0, 0))
        os.rename(self.path, self.folder / 'moved')
        self.path.touch()
        self.raises(database.Replaced, 'replaced by another file', notes.copy_daily)
        self.assertEqual([('first',)], read(self.copy))


class Damage(InFolder):
    def test_a_file_that_is_none_is_told_with_its_newest_copy(self):
        self.path.write_bytes(b'no database at all, but as long as the head of one would be' * 20)
        for age_s, name in ((100, 'notes.db.before-2'), (50, 'notes.db.daily'), (200, 'notes.db.before-3')):
            (self.folder / name).touch()
            os.utime(self.folder / name, (time.time() - age_s,) * 2)
        error = self.raises(database.Damaged, 'is damaged: file is not a database', self.open)
        self.assertEqual(503, error.status)
        self.assertIn(f'rm -f {self.path}-wal {self.path}-shm; cp {self.path}.daily {self.path}', error.hint)
        for path in self.folder.glob('*.*.*'):
            path.unlink()
        error = self.raises(database.Damaged, 'is damaged', self.open)
        self.assertIn('there is no copy', error.hint)

    def test_the_command_of_the_hint_restores_the_copy(self):
        notes = self.open()
        texts = [f'{number} ' * 50 for number in range(100)]
        for text in texts:
            notes.add(text)
        notes.copy_daily()
        notes._db.execute('PRAGMA wal_checkpoint(TRUNCATE)')  # else the log alone has all
        notes.add('lost')
        (self.folder / 'wal').write_bytes((self.folder / 'notes.db-wal').read_bytes())
        notes.close()
        (self.folder / 'wal').rename(self.folder / 'notes.db-wal')  # as kill -9 leaves it
        self.path.write_bytes(b'x' * 8192)
        error = self.raises(database.Damaged, 'is damaged', self.open)
        command = error.hint.partition('then: ')[2].partition('; or')[0]
        subprocess.run(['sh', '-ec', command], check=True)
        self.assertEqual(['first', *texts], self.open().texts())

    def test_damage_in_the_middle_is_found_at_the_start(self):
        notes = self.open()
        for number in range(200):
            notes.add(f'{number} ' * 50)
        notes.close()
        with open(self.path, 'r+b') as file:
            file.seek(5 * 4096)
            file.write(b'\xff' * 4096)
        self.raises(database.Damaged, 'is damaged', self.open)

    def test_a_disk_that_became_read_only_is_told_from_one_with_errors(self):
        notes, error = self.open(), sqlite3.OperationalError('disk I/O error')
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
        read_only = disk.refusal(errno.EROFS, self.folder)
        with mock.patch.object(disk, 'try_write', side_effect=read_only):
            self.assertIs(read_only, notes._named(error))
        told = notes._named(error)
        self.assertEqual((503, f'{self.path} cannot be used: disk I/O error'), (told.status, str(told)))
        self.assertIn('dmesg', told.hint)

    def test_a_change_that_fails_leaves_no_transaction_open(self):
        notes = self.open()
        self.raises(database.DatabaseError, 'UNIQUE', notes.add, 'first')
        notes.add('second')
        self.assertEqual(['first', 'second'], notes.texts())

    def test_a_commit_that_fails_is_undone(self):
        notes = self.open()

        def broken(self):
            with self._change() as db:
                db.execute("INSERT INTO notes VALUES ('half')")
                db.execute('INSERT INTO child VALUES (1)')

        with notes._change() as db:
            db.execute('CREATE TABLE parent (id INTEGER PRIMARY KEY)')
            db.execute('CREATE TABLE child (parent INTEGER REFERENCES parent DEFERRABLE INITIALLY DEFERRED)')
        self.raises(database.DatabaseError, 'FOREIGN KEY', broken, notes)
        notes.add('second')
        self.assertEqual(['first', 'second'], notes.texts())

    def test_a_lock_that_another_program_holds_and_a_closed_database_are_told(self):
        notes = self.open()
        notes._db.execute('PRAGMA busy_timeout = 0')
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute('BEGIN IMMEDIATE')
            self.raises(database.DatabaseError, 'in use by another program', notes.add, 'second')
        notes.close()
        self.raises(database.DatabaseError, 'cannot be used: Cannot operate on a closed', notes.texts)


class Replacement(InFolder):
    def setUp(self):
        super().setUp()
        self.notes = self.open()

    def test_the_same_file_is_fine_while_it_grows(self):
        for number in range(3000):
            self.notes.add(f'{number}')
        self.notes.check_file()
        self.assertLess((self.folder / 'notes.db-wal').stat().st_size, 3 << 19, 'the log must fit into a reserve')

    def test_a_deleted_one_is_noticed(self):
        self.path.unlink()
        error = self.raises(database.Replaced, 'was deleted while faasd runs', self.notes.check_file)
        self.assertIn('restart faasd', error.hint)

    def test_one_in_its_place_is_noticed(self):
        self.notes.copy_daily()
        os.replace(self.folder / 'notes.db.daily', self.path)
        self.raises(database.Replaced, 'was replaced by another file', self.notes.check_file)

    def test_one_that_was_cut_is_noticed(self):
        os.truncate(self.path, 0)
        self.raises(database.Replaced, 'was cut', self.notes.check_file)


class FullDisk(inside.OnDisk):
    @inside.inside
    def test_a_change_is_refused_and_a_removal_takes_the_reserve(self):
        folder = self.disk('size=8m')
        reserve = files.Reserve(f'{folder}/reserve', 1 << 20)
        self.assertTrue(reserve.make())
        notes = Notes(folder / 'notes.db', reserve=reserve)
        self.stack.callback(notes.close)
        for number in range(500):
            notes.add(f'{number} ' * 20)
        notes._db.execute('PRAGMA wal_checkpoint(TRUNCATE)')  # what the log holds is room, too
        self.fill(folder)
        with self.assertRaises(disk.DiskFull) as caught:
            notes.add('no room')
        self.assertEqual((507, f'the disk of {folder} is full'), (caught.exception.status, str(caught.exception)))
        self.assertTrue(os.path.exists(reserve.path))
        notes.remove('first')
        self.assertFalse(os.path.exists(reserve.path))
        self.assertNotIn('first', notes.texts())
        self.assertFalse(reserve.make())
        (folder / 'filler').unlink()
        self.assertTrue(reserve.make())
        notes.add('room')

    @inside.inside
    def test_without_a_reserve_a_removal_is_refused_in_one_line(self):
        folder = self.disk()
        notes = Notes(folder / 'notes.db', reserve=files.Reserve(f'{folder}/none', 1 << 20))
        self.stack.callback(notes.close)
        notes._db.execute('PRAGMA wal_checkpoint(TRUNCATE)')
        self.fill(folder)
        with self.assertRaises(disk.DiskFull):
            notes.remove('first')
        self.assertEqual(['first'], notes.texts())

    @inside.inside
    def test_a_start_needs_no_more_than_the_reserve(self):
        folder = self.disk()
        Notes(folder / 'notes.db').close()
        reserve = files.Reserve(f'{folder}/reserve', 1 << 20)
        reserve.make()
        self.fill(folder)
        with self.assertRaises(disk.DiskFull):
            Notes(folder / 'notes.db')
        notes = Notes(folder / 'notes.db', reserve=reserve)
        self.stack.callback(notes.close)
        self.assertEqual(['first'], notes.texts())

    @inside.inside
    def test_a_copy_that_has_no_room_leaves_nothing(self):
        folder = self.disk()
        notes = Notes(folder / 'notes.db')
        self.stack.callback(notes.close)
        for number in range(100):
            notes.add(f'{number} ' * 100)
        self.fill(folder, left=8192)
        with self.assertRaises(disk.DiskFull):
            notes.copy_daily()
        self.assertEqual({'notes.db', 'notes.db-shm', 'notes.db-wal', 'filler'}, set(os.listdir(folder)))

    @inside.inside
    def test_a_read_only_disk_is_named(self):
        folder = self.disk()
        Notes(folder / 'notes.db').close()
        inside.process.run(['mount', '-o', 'remount,ro', folder])
        before = os.listdir('/proc/self/fd')
        with self.assertRaises(disk.DiskReadOnly) as caught:
            Notes(folder / 'notes.db')
        self.assertEqual(f'the disk of {folder} is read-only', str(caught.exception))
        self.assertEqual(before, os.listdir('/proc/self/fd'))


if __name__ == '__main__':
    unittest.main()
