"""From an upload to a revision on disk: whole, or nothing of it remains."""

import contextlib
import io
import json
import os
import pathlib
import unittest
import unittest.mock

from handlers.images import staging
from handlers.images.spec import Spec, read_spec, tree
from handlers.images.streams import ImageError
from host import disk
from tests import images, inside
from tests.staged import BASE, HANDLER, RUN, Staged, StagedImages, archive, written


class Uploads(Staged):
    @inside.inside
    def test_a_body_that_ends_early_leaves_nothing(self):
        whole = archive(HANDLER)
        self.refuse(whole[:-100], '', error=EOFError, length=len(whole))
        self.refuse(b'', '', error=EOFError, length=5)

    @inside.inside
    def test_no_more_is_read_than_was_announced(self):
        self.disk()
        stream = io.BytesIO(archive(HANDLER) + b'the next request')
        with self.staging() as staging:
            staging.receive(stream.read, len(archive(HANDLER)))
        self.assertEqual(b'the next request', stream.read())
        self.assertEqual([], os.listdir(self.functions))

    @inside.inside
    def test_a_full_disk_is_named_and_nothing_remains(self):
        self.disk('size=1m,nr_inodes=64')
        for data in (
            archive(HANDLER, ('big', bytes(2 << 20))),  # while it arrives
            archive(HANDLER, ('half', bytes(600 << 10))),  # while it is unpacked
            archive(HANDLER, *((f'f{number}', 'x') for number in range(100))),  # no room for one file more
            images.packed(archive(HANDLER, ('big', bytes(2 << 20))), 'gzip'),
            images.image([images.layer(('half', os.urandom(600 << 10)))], RUN),
            images.image([images.layer(('much', bytes(2 << 20)))], RUN, pack='gzip'),
            images.image([images.layer(*((f'f{number}', b'x') for number in range(100)))], RUN),
        ):
            error = self.refuse(data, 'is full', error=disk.DiskFull)
            self.assertTrue(error.hint)
        with contextlib.suppress(OSError):
            for number in range(1000):
                pathlib.Path(self.DISK, f'fill{number}').touch()
        with self.assertRaises(disk.DiskFull):
            self.staging()
        self.assertEqual([], os.listdir(self.functions))

    @inside.inside
    def test_a_kept_revision_takes_the_place_of_a_leftover(self):
        self.disk()
        leftover = pathlib.Path(self.functions, '1', '1', 'old')
        leftover.parent.mkdir(parents=True)
        leftover.touch()
        folder = self.stage(archive(HANDLER))
        self.assertEqual({'tree', 'spec.json'}, set(os.listdir(folder)))

    @inside.inside
    def test_a_revision_of_an_older_version_is_read(self):
        self.disk()
        folder = f'{self.functions}/1/1'
        os.makedirs(folder)
        self.assertEqual((Spec('handler'), folder), (read_spec(folder), tree(folder)))
        with self.assertRaises(FileNotFoundError):
            read_spec(f'{self.functions}/1/2')


class Images(StagedImages):
    @inside.inside
    def test_no_descriptor_leaks(self):
        self.stage(images.image([BASE], RUN))
        before = os.listdir('/proc/self/fd')
        for data in (images.image([BASE], RUN), images.image([BASE], {}), b'x'):
            for _ in range(5):
                with contextlib.suppress(ImageError):
                    self.stage(data)
        self.assertEqual(len(before), len(os.listdir('/proc/self/fd')))

    @inside.inside
    def test_an_interrupted_upload_leaves_nothing(self):
        data = images.image([BASE], RUN)
        self.refuse(data[:-100], '', error=EOFError, length=len(data))
        for cut in (len(data) // 2, 1000, 700):
            self.refuse(data[:cut], '', length=None)

        def read(size):
            raise ConnectionError('gone')

        with self.assertRaises(ConnectionError), self.staging() as staging:
            staging.receive(read, None)
        self.assertEqual([], os.listdir(self.functions))

    @inside.inside
    def test_a_stored_layer_is_still_checked(self):
        self.image(BASE)
        lie = images.files_of([BASE], RUN, form='oci')
        lie = {
            name: images.Layer(BASE.replace(b'#!', b'!#'), None) if isinstance(each, images.Layer) else each
            for name, each in lie.items()
        }
        with self.assertRaisesRegex(ImageError, 'has another digest'), self.staging() as staging:
            staging.receive(io.BytesIO(written(lie)).read, None)

    @inside.inside
    def test_an_unpacker_that_lies_is_not_believed(self):
        self.disk()
        good = {'kind': 'command', 'args': ['x']}
        digits = 'a' * 64
        for answer in (
            '',
            '[]',
            '{}',
            '[' * 100_000,
            json.dumps({'spec': good, 'layers': []}),  # without a tree
            json.dumps({'spec': good, 'layers': ['../../x']}),
            json.dumps({'spec': {'kind': 'image', 'args': ['x'], 'layers': [digits]}, 'layers': []}),
            json.dumps({'spec': {'kind': 'image', 'args': ['x'], 'layers': [digits]}, 'layers': [digits]}),
            json.dumps({'spec': {'kind': 'image', 'args': ['x'], 'layers': [digits]}, 'layers': digits}),
            json.dumps({'error': 'two\nlines', 'hint': 7}),
        ):
            path = pathlib.Path('/tmp/liar.py')
            path.write_text(f'print({answer!r})')
            with self.subTest(answer[:40]), unittest.mock.patch.object(staging, 'WORKER', str(path)):
                self.refuse(b'x', 'cannot be unpacked|two lines')


if __name__ == '__main__':
    unittest.main()
