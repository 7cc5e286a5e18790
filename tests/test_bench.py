"""Every benchmark once, tiny, so that none of them rots. How fast anything is, is no test's business."""

import contextlib
import io
import json
import pathlib
import shutil
import tempfile
import unittest

from tests import bench, lab


class Table(unittest.TestCase):
    SAMPLES = {'ours': [1.0, 3.0, 2.0], 'it': [2.0, 2.0, 2.0], 'other': [4.0, 6.0, 4.0]}

    def test_the_ratio_is_the_median_of_those_of_each_round(self):
        row = bench.compared('r', 'a row', self.SAMPLES, unit='s', better='less', bound=1.0)
        self.assertEqual((2.0, 2.0, 'it', 1.0, True), (row.ours, row.peer, row.peer_is, row.ratio, row.met))
        self.assertEqual({'other': {'median': 4.0, 'ratio': 0.5}}, row.others)
        row = bench.compared('r', 'a row', self.SAMPLES, unit='requests/s', better='more', bound=1.1)
        self.assertEqual((1.0, False), (row.ratio, row.met))
        self.assertEqual({'other': {'median': 4.0, 'ratio': 2.0}}, row.others)
        self.assertIn('missed', '\n'.join(bench.table([row])))

    def test_json_is_written_whole_or_not_at_all(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, 'rows.json')
            bench.write_json(path, {'rows': []})
            with self.assertRaises(TypeError):
                bench.write_json(path, {'rows': [object()]})
            self.assertEqual({'rows': []}, json.loads(path.read_text()))
            self.assertEqual([path], list(pathlib.Path(folder).iterdir()))


@lab.needs_root
class Rows(unittest.TestCase):
    SERVING, DEPLOYING = ('injected', 'direct', 'nginx'), ('faasd', 'tar -x', 'tar -x and sync -f')
    BUILDS = 'with requirements', 'without any'

    def test_each_row_once(self):
        if not shutil.which('go', path=bench.PATH):
            self.skipTest('there is no go to build the server with')
        before, said = set(pathlib.Path(bench.DISK).glob('faasd-bench-*')), io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said):
            path = pathlib.Path(folder, 'rows.json')
            with contextlib.redirect_stderr(said):
                status = bench.main(['--size', 'tiny', '--json', str(path)])
            self.assertEqual(0, status, said.getvalue())
            result = json.loads(path.read_text())
        self.assertEqual(before, set(pathlib.Path(bench.DISK).glob('faasd-bench-*')))
        self.assertLess({'cores', 'kernel', 'wireguard'}, set(result['machine']))
        rows = {row['row']: row for row in result['rows']}
        with_them = {each for each in bench.ROWS.values() if each}
        self.assertEqual({*bench.ROWS, *with_them}, set(rows))
        for name, row in rows.items():
            with self.subTest(name):
                serves = name.startswith('go-')
                names = {'go': self.SERVING, 'redeploy-requirements': self.BUILDS}
                of_egress = row['samples'] if name.startswith(('egress-', 'sqlite-')) else self.DEPLOYING
                names = names.get('go' if serves else name, of_egress)
                for what in names:
                    self.assertEqual(2 if names is self.BUILDS else 1, len(row['samples'][what]))
                    self.assertGreater(row['samples'][what][0], 0)
                    if serves:
                        self.assertGreater(row['samples']['requests'][what], 0)
                self.assertGreater(row['ratio'], 0)
                self.assertIn(row['met'], (True, False))
                self.assertIn(name, said.getvalue())
