"""Files are replaced whole, what a killed write left is swept, and a reserve holds room on a disk."""

import os
import pathlib
import signal
import stat
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

from host import files
from tests import inside, lab


class InFolder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)


class Files(InFolder):
    def test_a_file_is_replaced_whole_with_its_mode_and_nothing_else_remains(self):
        path = self.folder / 'file'
        files.write_file(path, 'old', mode=0o600)
        held = open(path)
        files.write_file(path, b'new', mode=0o600)
        with held:
            self.assertEqual('old', held.read())
        self.assertEqual('new', path.read_text())
        self.assertEqual(0o600, stat.S_IMODE(path.stat().st_mode))
        self.assertEqual(['file'], os.listdir(self.folder))

    def test_when_any_step_fails_the_old_one_stays_and_nothing_else(self):
        path = self.folder / 'file'
        files.write_file(path, 'old')
        for step in ('fsync', 'fchmod', 'replace'):
            with mock.patch.object(files.os, step, side_effect=OSError(28, 'No space left')), self.subTest(step):
                self.assertRaises(OSError, files.write_file, path, 'new')
                self.assertEqual(('old', ['file']), (path.read_text(), os.listdir(self.folder)))

    def test_the_folder_is_synced_after_the_new_name_stands(self):
        steps = []
        real_replace, real_fsync = os.replace, os.fsync

        def fsync(fd):
            steps.append('folder' if os.path.isdir(f'/proc/self/fd/{fd}') else 'file')
            real_fsync(fd)

        def replace(*both):
            steps.append('replace')
            real_replace(*both)

        with mock.patch.object(files.os, 'fsync', fsync), mock.patch.object(files.os, 'replace', replace):
            files.write_file(self.folder / 'file', 'text')
        self.assertEqual(['file', 'replace', 'folder'], steps)

    def test_what_another_program_wrote_is_synced_and_private_too(self):
        path, synced = self.folder / 'file', []

        def fsync(fd):
            synced.append(os.readlink(f'/proc/self/fd/{fd}'))

        with mock.patch.object(files.os, 'fsync', fsync), files.replacing(path, 0o600) as temporary:
            subprocess.run(['sh', '-c', f'echo new >{temporary}'], check=True)
        self.assertEqual('new\n', path.read_text())
        self.assertEqual(0o600, stat.S_IMODE(path.stat().st_mode))
        self.assertEqual([temporary, str(self.folder)], synced)

    def test_a_file_that_is_gone_can_be_removed(self):
        path = self.folder / 'file'
        path.touch()
        files.remove_file(path)
        files.remove_file(path)
        self.assertEqual([], os.listdir(self.folder))


class Sweep(InFolder):
    def test_what_a_killed_write_left_is_removed_and_nothing_else(self):
        code = (
            'import os, signal, sys\nfrom host import files\n'
            'files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n'
            'files.write_file(sys.argv[1], "secret")\n'
        )
        for name in ('faas.db', 'p.conf'):
            done = subprocess.run([sys.executable, '-c', code, self.folder / name], cwd=lab.REPO)
            self.assertEqual(-signal.SIGKILL, done.returncode)
        self.assertEqual(2, len(os.listdir(self.folder)))
        kept = ['p.conf', '.p.conf.swp', '.bashrc', 'x.abcdefgh.tmp', '.hidden.ABCDEFGH.tmp', '.other.abcdefgh']
        for name in kept:
            (self.folder / name).touch()
        (self.folder / '.folder.abcdefgh.tmp').mkdir()
        (self.folder / '.link.abcdefgh.tmp').symlink_to('p.conf')
        swept = files.sweep(self.folder)
        self.assertEqual(['.faas.db', '.p.conf'], [name[: -len('.abcdefgh.tmp')] for name in swept])
        self.assertEqual({*kept, '.folder.abcdefgh.tmp', '.link.abcdefgh.tmp'}, set(os.listdir(self.folder)))

    def test_those_of_faasd_0_1_are_removed_by_their_names(self):
        old = ['.faas.db.abcdefgh', '.laptop.conf.a_0b1c2d', '.Corefile.abcdefgh']
        for name in [*old, '.other.abcdefgh', '.faas.db.swp']:
            (self.folder / name).touch()
        self.assertEqual(sorted(old), files.sweep(self.folder, ('faas.db', '*.conf', 'Corefile')))
        self.assertEqual({'.other.abcdefgh', '.faas.db.swp'}, set(os.listdir(self.folder)))

    def test_a_copy_of_a_database_goes_with_its_companions(self):
        for end in ('', '-journal', '-wal', '-shm'):
            (self.folder / f'.registry.db.daily.abcdefgh.tmp{end}').touch()
        self.assertEqual(4, len(files.sweep(self.folder)))
        self.assertEqual([], os.listdir(self.folder))

    def test_a_folder_that_is_not_there_has_nothing_to_sweep(self):
        self.assertEqual([], files.sweep(self.folder / 'none'))


class Reserve(inside.OnDisk):
    SIZE = 1 << 20

    @inside.inside
    def test_it_holds_blocks_and_gives_them_back(self):
        folder = self.disk()
        reserve = files.Reserve(f'{folder}/reserve', self.SIZE)
        self.assertTrue(reserve.make())
        status = os.stat(reserve.path)
        self.assertEqual((self.SIZE, 0o600), (status.st_blocks * 512, stat.S_IMODE(status.st_mode)))
        self.fill(folder)
        with self.assertRaisesRegex(OSError, 'No space'):
            files.write_file(folder / 'file', bytes(8192))
        self.assertTrue(reserve.release())
        files.write_file(folder / 'file', bytes(self.SIZE // 2))
        self.assertFalse(reserve.release())

    @inside.inside
    def test_it_is_made_again_only_with_as_much_room_left(self):
        folder = self.disk()
        reserve = files.Reserve(f'{folder}/reserve', self.SIZE)
        (folder / 'large').write_bytes(bytes((5 << 20) // 2))
        self.assertFalse(reserve.make())
        self.assertEqual(['large'], os.listdir(folder))
        (folder / 'large').unlink()
        (folder / 'reserve').write_bytes(b'cut by a crash')
        self.assertTrue(reserve.make())
        self.assertEqual(self.SIZE, os.stat(reserve.path).st_blocks * 512)

    @inside.inside
    def test_one_that_is_there_is_left_alone(self):
        folder = self.disk()
        reserve = files.Reserve(f'{folder}/reserve', self.SIZE)
        reserve.make()
        before = os.stat(reserve.path)
        self.assertTrue(reserve.make())
        self.assertEqual(before, os.stat(reserve.path))

    @inside.inside
    def test_a_read_only_disk_has_none(self):
        reserve = files.Reserve(f'{self.disk("ro")}/reserve', self.SIZE)
        self.assertEqual((False, False), (reserve.make(), reserve.release()))


if __name__ == '__main__':
    unittest.main()
