"""The settings, from where they come, and what is refused."""

import contextlib
import re
import tempfile
import unittest

from control import settings
from host.errors import StartError
from tests import lab


class Settings(unittest.TestCase):
    def test_environment_before_file_before_default(self):
        with tempfile.NamedTemporaryFile('w', suffix='.env') as file:
            file.write('# a comment\nFAAS_MEMORY="64M"\nFAAS_CPUS=2\n\n')
            file.flush()
            found = settings.read_settings({'FAAS_CPUS': '0.5'}, file.name)
        self.assertEqual((64 << 20, 0.5, 'wg0'), (found['memory'], found['cpus'], found['wg_interface']))

    def test_the_docs_have_each_setting_with_its_default(self):
        rows = re.findall(r'^\| `(FAAS_\w+)` \| (?:`(.*?)`)? *\|', (lab.REPO / 'docs/API.md').read_text(), re.M)
        self.assertEqual({name: default for name, (default, _) in settings.SETTINGS.items()}, dict(rows))

    def test_a_bad_value_is_named(self):
        for name, values in (
            ('FAAS_MEMORY', ('lots', '', '-1G', '5')),
            ('FAAS_ENROLL', ('maybe', 'open\n')),
            ('FAAS_WG_PORT', ('x', '0', '65536', '51820\n[Peer]')),
            ('FAAS_WG_INTERFACE', ('-x', 'wg 0', 'wg0"', 'x' * 16, '../wg0', '')),
            ('FAAS_NFT_TABLE', ('faas }', '1', '')),
            ('FAAS_CPUS', ('nan', 'inf', '0', '-1')),
            ('FAAS_STOP_TIMEOUT', ('-1', '1h')),
            ('FAAS_DNS_FORWARD', ('8.8.8.8 }', 'dns.example.com')),
            ('FAAS_VPN_ENDPOINT', ('a b', 'http://x/', '[::1', 'x:99999')),
            ('FAAS_ENROLL_BIND', ('[::]:x', ':::51820:')),
            ('FAAS_MOUNTS', ('/', 'run/x', '/run/faasd', '/srv/../etc', '/srv:x')),
            ('FAAS_ID_BASE', ('0', '2147483647')),
        ):
            for value in values:
                with self.subTest(f'{name}={value}'), self.assertRaisesRegex(StartError, name):
                    settings.read_settings({name: value}, '/nonexistent')

    def test_a_setting_that_is_none_is_named(self):
        with tempfile.NamedTemporaryFile('w', suffix='.env') as file:
            file.write('FAAS_MEMROY=64M\n')
            file.flush()
            with self.assertRaisesRegex(StartError, 'FAAS_MEMROY'):
                settings.read_settings({}, file.name)

    def test_a_file_of_another_encoding(self):
        with tempfile.NamedTemporaryFile('wb') as file:
            for text, said in (('\ufeff# = ü\r\nFAAS_PIDS=64'.encode(), None), ('# ü'.encode('latin-1'), 'UTF-8')):
                file.seek(0)
                file.write(text)
                file.flush()
                with contextlib.nullcontext() if said is None else self.assertRaisesRegex(StartError, said):
                    self.assertEqual(64, settings.read_settings({}, file.name)['pids'])
                file.truncate(0)


if __name__ == '__main__':
    unittest.main()
