"""The revisions on disk: which layers are kept, and what is a stray."""

import os
import pathlib
import tempfile
import unittest

from control.revisions import Revisions
from handlers.images.layers import Layers
from handlers.images.spec import Spec
from registry import Function

FUNCTION = Function(1, 'app', 'fd00:faa5:1:0::a', 2, 0, None)


class OnDisk(unittest.TestCase):
    def setUp(self):
        self.state = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.layers = Layers(str(self.state / 'layers'))
        self.layers.prepare()
        self.events = []
        emit = lambda area, text, **more: self.events.append(text)  # noqa: E731
        self.revisions = Revisions(str(self.state), self.layers, 1 << 20, 1 << 20, [], emit)

    def revision(self, folder, digit):
        """A revision of an image with one layer, whose digest is made of that digit."""
        folder = self.state / folder
        folder.mkdir(parents=True)
        (folder / 'spec.json').write_text(Spec('image', args=('/run',), layers=(digit * 64,)).to_json())
        os.makedirs(self.layers.path(digit * 64), exist_ok=True)

    def test_layers_of_live_and_of_set_aside_revisions_are_kept(self):
        self.revision('functions/1/2', 'a')
        self.revision('functions.unknown/7/1.1764000000', 'b')
        os.mkdir(self.layers.path('c' * 64))
        self.revisions.collect_layers()
        self.assertEqual({'a' * 64, 'b' * 64}, self.layers.present())

    def test_strays_go_and_the_live_revision_stays(self):
        self.revision('functions/1/2', 'a')
        self.revision('functions/1/3', 'b')
        self.revision('functions/9/1', 'c')
        (self.state / 'functions/1/log').write_text('kept')
        self.revisions.remove_strays([FUNCTION])
        self.assertEqual(['1'], os.listdir(self.state / 'functions'))
        self.assertEqual(['2', 'log'], sorted(os.listdir(self.state / 'functions/1')))
        self.assertEqual({'a' * 64}, self.layers.present())

    def test_a_spec_that_cannot_be_read_keeps_all_layers_and_is_told(self):
        self.revision('functions/1/2', 'a')
        (self.state / 'functions/1/2/spec.json').write_text('{')
        os.mkdir(self.layers.path('c' * 64))
        self.revisions.collect_layers()
        self.assertEqual({'a' * 64, 'c' * 64}, self.layers.present())
        self.assertIn('Layers are kept for now', self.events[0])


if __name__ == '__main__':
    unittest.main()
