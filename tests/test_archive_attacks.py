"""Archives that attack: they claim a layer of another, cost more than their size says, or go on without an uploader."""

import gzip
import io
import json
import os
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
import time
import unittest
import unittest.mock

from handlers.images import archive, folder, streams, tar
from handlers.images.streams import ImageError
from tests import images, inside
from tests.staged import BASE, RUN, StagedImages, written

SECRET = images.layer(('secret', b'of another function', {'mode': 0o600}))


class Content(StagedImages):
    """A layer is what its bytes hash to. Knowing its digest is not having it."""

    def claim(self, *blobs, form, absent=False):
        """The archive of an image whose layers are `blobs` (images.Layer), of which each says that it is SECRET."""
        for blob in blobs:
            blob.diff_id = images.sha256(SECRET)
        files = images.files_of(blobs, RUN, form=form)
        if absent:
            files = {name: each for name, each in files.items() if not isinstance(each, images.Layer)}
        return written(files)

    def refuse_claim(self, data, pattern):
        with self.assertRaisesRegex(ImageError, pattern), self.staging() as staging:
            staging.receive(io.BytesIO(data).read, None)
        self.assertEqual(['1'], os.listdir(self.functions), 'something remains')
        self.assertEqual({images.sha256(SECRET)}, self.layers.present())

    @inside.inside
    def test_a_digest_gives_no_layer_of_another(self):
        self.image(SECRET)
        for form in ('docker', 'oci'):
            for pack in (None, 'gzip', 'zstd'):
                decoys = [images.Layer(images.layer((name, b'x')), pack) for name in ('a', 'b')]
                with self.subTest((form, pack)):
                    self.refuse_claim(self.claim(decoys[0], form=form), 'layer 1: the content has another digest')
                    self.refuse_claim(self.claim(*decoys, form=form), 'layer .: the content has another digest')
                    self.refuse_claim(self.claim(decoys[0], decoys[0], form=form), 'the content has another digest')
                    self.refuse_claim(self.claim(decoys[0], form=form, absent=True), 'is not in the archive')
                    genuine = images.Layer(SECRET, pack)  # the one shows that it has the layer, the other does not
                    self.refuse_claim(self.claim(genuine, decoys[0], form=form), 'layer 2: the content has another')
                    self.refuse_claim(self.claim(decoys[0], genuine, form=form), 'layer 1: the content has another')

    @inside.inside
    def test_a_blob_is_believed_for_the_layer_alone_that_it_was_found_to_hold(self):
        """Its bytes are hashed all the same, and it needs a stored layer."""
        few = pathlib.Path('/tmp/few')
        few.mkdir()
        (few / 'rm').symlink_to(shutil.which('rm'))
        for form in ('docker', 'oci'):
            for pack in ('gzip', 'zstd'):
                with self.subTest((form, pack)):
                    self.image(SECRET, form=form, pack=pack)
                    blob = images.sha256(images.packed(SECRET, pack))
                    self.assertEqual([blob], self.layers.blobs(images.sha256(SECRET)))
                    good = images.image([SECRET], RUN, form=form, pack=pack)
                    with unittest.mock.patch.dict(os.environ, PATH=str(few)):  # nothing needs zstd: it is not unpacked
                        self.receive(good)
                    genuine, bad = images.Layer(SECRET, pack), images.Layer(SECRET, pack)
                    bad.data = bad.data[:-1] + bytes([bad.data[-1] ^ 1])
                    self.refuse_claim(written(images.files_of([bad], RUN, form=form)), 'another digest|damaged')
                    genuine.diff_id = images.sha256(BASE)
                    self.refuse_claim(written(images.files_of([genuine], RUN, form=form)), 'another digest')
                    self.refuse_claim(self.claim(images.Layer(BASE, pack), form=form), 'another digest')
                    self.clean()
                    self.assertEqual([], os.listdir(self.layers.folder))
                    self.image(SECRET, form=form, pack=pack)
                    self.clean()

    def receive(self, data):
        with self.staging() as staging:
            staging.receive(io.BytesIO(data).read, None)
            self.assertEqual([], os.listdir(f'{staging._folder}/work'), 'it was unpacked again')


if __name__ == '__main__':
    unittest.main()
