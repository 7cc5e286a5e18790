"""What a full and a read-only disk say, on real ones; and what shows that a file has changed."""

import errno
import os
import pathlib
import tempfile
import unittest
from unittest import mock

from host import disk, process
from tests import inside


class TryWrite(inside.InHost):
    def mounted(self, options):
        folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        process.run(['mount', '-t', 'tmpfs', '-o', options, 'test', folder])
        self.stack.callback(process.run, ['umount', folder])
        return pathlib.Path(folder)

    @inside.inside
    def test_a_disk_with_room_is_well_and_nothing_remains(self):
        folder = self.mounted('size=1m')
        before = os.listdir('/proc/self/fd')
        disk.try_write(folder)
        self.assertEqual([], os.listdir(folder))
        self.assertEqual(before, os.listdir('/proc/self/fd'))

    @inside.inside
    def test_a_full_one_is_named_and_is_well_again_with_room(self):
        folder = self.mounted('size=256k')
        (folder / 'large').write_bytes(bytes(252 << 10))
        with self.assertRaises(disk.DiskRefuses) as caught:
            disk.try_write(folder)
        self.assertEqual(f'the disk of {folder} is full', str(caught.exception))
        self.assertEqual(507, caught.exception.status)
        self.assertIn('faas rm', caught.exception.hint)
        self.assertEqual(['large'], os.listdir(folder))
        (folder / 'large').unlink()
        disk.try_write(folder)

    @inside.inside
    def test_one_without_an_inode_left_is_full(self):
        folder = self.mounted('nr_inodes=2')
        (folder / 'last').touch()
        with self.assertRaisesRegex(disk.DiskRefuses, 'is full'):
            disk.try_write(folder)

    @inside.inside
    def test_a_read_only_one_is_named(self):
        folder = self.mounted('ro')
        with self.assertRaises(disk.DiskRefuses) as caught:
            disk.try_write(folder)
        self.assertEqual(f'the disk of {folder} is read-only', str(caught.exception))
        self.assertIn('remount', caught.exception.hint)

    @inside.inside
    def test_another_reason_is_none_of_the_disks(self):
        with self.assertRaises(FileNotFoundError):
            disk.try_write('/no/such/folder')
        folder = self.mounted('size=1m')
        broken = OSError(errno.EIO, 'Input/output error')
        with mock.patch.object(disk.os, 'fsync', side_effect=broken), self.assertRaises(OSError) as caught:
            disk.try_write(folder)
        self.assertIs(broken, caught.exception)
        self.assertEqual([], os.listdir(folder))


class Signatures(unittest.TestCase):
    def test_each_way_to_change_a_file_changes_it(self):
        with tempfile.TemporaryDirectory() as folder:
            path, other = pathlib.Path(folder, 'file'), pathlib.Path(folder, 'other')
            self.assertIsNone(disk.signature(path))
            path.write_text('text')
            seen = [disk.signature(path)]
            self.assertEqual(seen[0], disk.signature(path))

            def same_length_and_time():
                found = path.stat()
                path.write_text('next')
                os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))

            for change in (
                lambda: path.write_text('texts'),
                lambda: os.truncate(path, 1),
                lambda: (other.write_text('t'), os.replace(other, path)),
                same_length_and_time,
                path.unlink,
            ):
                change()
                seen.append(disk.signature(path))
        self.assertEqual(len(seen), len(set(seen)))

    def test_what_cannot_be_told_is_an_error(self):
        with self.assertRaises(NotADirectoryError):
            disk.signature('/dev/null/file')


if __name__ == '__main__':
    unittest.main()
