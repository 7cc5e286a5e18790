"""Layers that images share: stored once, kept while somebody needs them, with the ids that they have."""

import hashlib
import io
import os
import threading
import unittest

from handlers.images import layers
from host.errors import FaasError
from tests import images, inside
from tests.staged import BASE, RUN, StagedImages


class IdBase(inside.OnDisk):
    @inside.inside
    def test_it_is_written_only_when_it_changes(self):
        folder = self.disk()
        stored = layers.Layers(f'{folder}/layers')
        stored.prepare()
        self.assertEqual(3_000_000, stored.id_base(3_000_000))
        before = os.stat(f'{folder}/layers/id_base')
        self.fill(folder)
        self.assertEqual(3_000_000, stored.id_base(3_000_000))
        self.assertEqual(before, os.stat(f'{folder}/layers/id_base'))
        with self.assertRaisesRegex(OSError, 'No space'):
            stored.id_base(4_000_000)
        os.mkdir(f'{folder}/layers/{"a" * 64}')
        self.assertEqual(3_000_000, stored.id_base(4_000_000), 'stored layers keep theirs')
        os.unlink(f'{folder}/layers/id_base')
        with self.assertRaisesRegex(FaasError, 'does not say which ids'):
            stored.id_base(4_000_000)
        os.mknod(f'{folder}/layers/id_base')
        with self.assertRaisesRegex(FaasError, 'does not say which ids'):
            stored.id_base(4_000_000)
        self.assertEqual(['a' * 64, 'id_base'], sorted(os.listdir(stored.folder)))


class Stored(StagedImages):
    @inside.inside
    def test_layers_keep_the_ids_that_they_were_unpacked_with(self):
        stored = layers.Layers('/var/lib/some-layers')
        stored.prepare()
        self.assertEqual(1000000, stored.id_base(1000000))
        self.assertEqual(2000000, stored.id_base(2000000))
        os.mkdir(stored.path('0' * 64))
        self.assertEqual(2000000, stored.id_base(1000000))

    @inside.inside
    def test_shared_layers_are_stored_once_and_go_with_the_last(self):
        top = images.layer(('top', b'x'))
        base, _ = self.image(BASE, top)
        first = os.stat(base).st_ino
        with self.staging() as staging:
            staging.receive(io.BytesIO(images.image([BASE], RUN, form='oci', pack='gzip')).read, None)
            self.assertEqual([], os.listdir(f'{staging._folder}/work'), 'it was unpacked again')
            self.layers.collect(set)
            self.assertEqual({base.name}, self.layers.present(), 'the staging needs it')
            staging.keep(f'{self.functions}/2/1')
        self.assertEqual(first, os.stat(base).st_ino)
        self.layers.collect(lambda: {base.name})
        self.assertEqual({base.name}, self.layers.present())
        self.layers.collect(set)
        self.assertEqual([], os.listdir(self.layers.folder))

    @inside.inside
    def test_two_who_bring_the_same_layer(self):
        self.disk()
        data = images.image([BASE], RUN)
        with self.staging() as one, self.staging() as other:
            threads = [
                threading.Thread(target=each.receive, args=(io.BytesIO(data).read, None)) for each in (one, other)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            one.keep(f'{self.functions}/1/1')
            self.layers.collect(set)
            other.keep(f'{self.functions}/2/1')
        self.assertEqual({hashlib.sha256(BASE).hexdigest()}, self.layers.present())
        self.assertEqual({'1', '2'}, set(os.listdir(self.functions)))

    @inside.inside
    def test_what_a_killed_run_left_is_removed(self):
        self.disk()
        os.makedirs(f'{self.layers.folder}/.{"a" * 64}/x')
        os.makedirs(f'{self.layers.folder}/{"b" * 64}/x')
        os.symlink('/etc', f'{self.layers.folder}/{"b" * 64}/link')
        self.layers.prepare()
        self.assertEqual(['b' * 64], os.listdir(self.layers.folder))
        self.layers.collect(set)
        self.assertEqual([], os.listdir(self.layers.folder))
        self.assertTrue(os.path.exists('/etc/passwd'))


if __name__ == '__main__':
    unittest.main()
