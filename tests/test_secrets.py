"""Secrets: who gets a value, and that nobody else can find it."""

import os
import pathlib
import random
import tempfile
import threading
import unittest
import unittest.mock

from control import secrets
from handlers.images import wants
from host.errors import FaasError
from tests import images, lab, programs, serving

READS = """
import os

def app(environ, start_response):
    start_response('200 OK', [('Content-Type', 'text/plain')])
    info = os.stat('/run/secrets/KEY')
    with open('/run/secrets/KEY') as file:
        return [f'{file.read()} {os.environ["TOKEN"]} {info.st_mode & 0o777:o} {info.st_uid}'.encode()]
"""


class Store(unittest.TestCase):
    def setUp(self):
        self.folder = self.enterContext(tempfile.TemporaryDirectory())
        self.store = secrets.Secrets(f'{self.folder}/secrets')

    def without_creds(self):
        return unittest.mock.patch('shutil.which', lambda name: None)

    def test_values_are_kept_in_files_that_root_alone_reads(self):
        with self.without_creds():
            self.assertTrue(self.store.set('KEY', b'\0\xff\n value'))
            self.store.given('KEY')
            self.assertFalse(self.store.set('KEY', b'\0\xff\n value'))
        again = secrets.Secrets(self.store.folder)
        self.assertEqual(b'\0\xff\n value', again.get('KEY'))
        self.assertEqual(['KEY'], list(again.names()))
        self.assertFalse(again.is_encrypted('KEY'))
        self.assertEqual(0o600, os.stat(f'{self.store.folder}/KEY').st_mode & 0o777)
        self.assertEqual(0o700, os.stat(self.store.folder).st_mode & 0o777)
        again.remove('KEY')
        with self.assertRaises(secrets.NoSecret) as caught:
            again.get('KEY')
        self.assertIn('faas secret set KEY', caught.exception.hint)

    def test_names_that_are_paths_or_too_long_are_refused(self):
        for name in ('', '.', '..', '../x', 'a/b', '-x', 'x' * 65, 'a\nb', '.KEY', 'KEY\n', 'ü'):
            with self.subTest(name), self.assertRaises(FaasError):
                self.store.set(name, b'x')
            with self.subTest(name), self.assertRaises(secrets.NoSecret):
                self.store.get(name)
        for value in (b'', bytes(secrets.MOST_VALUE + 1)):
            with self.assertRaises(wants.BadWant):
                self.store.set('KEY', value)
        self.assertEqual([], os.listdir(self.store.folder))

    def test_no_name_leads_out_of_the_folder(self):
        made = random.Random(12)
        with self.without_creds():
            for _ in range(2000):
                name = ''.join(made.choices('aZ9._-/\\\0\n\u00e9\ud800 ~*%$', k=made.randrange(1, 5)))
                try:
                    self.store.set(name, b'x')
                except FaasError:
                    continue
                self.assertRegex(name, r'^[aZ9]([aZ9._-]*[aZ9])?\Z')
                self.assertIn(name, os.listdir(self.store.folder))
        self.assertGreater(len(self.store.names()), 10)
        self.assertEqual(['secrets'], os.listdir(self.folder))

    def test_the_same_value_is_set_again_until_all_functions_have_it(self):
        with self.without_creds():
            self.store.set('KEY', b'x')
            again = secrets.Secrets(self.store.folder)  # faasd was killed before it could redeploy them
            self.assertTrue(again.set('KEY', b'x'))
            again.given('KEY')
            self.assertFalse(again.set('KEY', b'x'))

    def test_without_a_key_it_is_plain(self):
        """With a systemd-creds that fails."""
        with unittest.mock.patch.dict(os.environ, SYSTEMD_CREDENTIAL_SECRET='/proc/none/key'):
            self.store.set('KEY', b'value')
        self.assertFalse(self.store.is_encrypted('KEY'))
        self.assertEqual(b'value', secrets.Secrets(self.store.folder).get('KEY'))

    def test_what_cannot_be_a_variable_is_refused(self):
        with self.without_creds():
            self.store.set('BINARY', b'\xff')
            self.store.set('NUL', b'a\0b')
            self.store.set('TEXT', 'ü'.encode())
        self.store.check({'env': {'A': {'secret': 'TEXT'}, 'B': 'plain'}, 'secrets': ['BINARY']})
        for name in ('BINARY', 'NUL', 'NONE'):
            with self.subTest(name), self.assertRaises(FaasError):
                self.store.check({'env': {'A': {'secret': name}}})

    @lab.needs_root
    def test_it_is_encrypted_with_the_key_of_the_host(self):
        programs.find('systemd-creds')
        with unittest.mock.patch.dict(os.environ, SYSTEMD_CREDENTIAL_SECRET=f'{self.folder}/key'):
            self.store.set('KEY', b'\0\xff value')
            self.assertTrue(self.store.is_encrypted('KEY'))
            self.assertNotIn(b'value', pathlib.Path(self.store.folder, 'KEY').read_bytes())
            again = secrets.Secrets(self.store.folder)
            self.assertEqual(b'\0\xff value', again.get('KEY'))
            os.rename(f'{self.store.folder}/KEY', f'{self.store.folder}/OTHER')
            with self.assertRaisesRegex(FaasError, 'systemd-creds decrypt failed for the secret OTHER'):
                secrets.Secrets(self.store.folder).get('OTHER')


# crun keeps a copy of the configuration beside the state of a container; this is runc, and does so.
CRUN = """#!/bin/sh
root=$2
runc "$@" || exit
bundle=$(echo "$@" | sed -n 's/.*--bundle \\([^ ]*\\) .*/\\1/p')
for ident; do :; done
[ -z "$bundle" ] || cp "$bundle/config.json" "$root/$ident/config.json"
"""


@lab.needs_root
class OtherRuntime(unittest.TestCase):
    def test_what_crun_keeps_has_no_value(self):
        host = self.enterContext(lab.Host('server'))
        host.path('/usr/local/bin/crun').write_text(CRUN)
        host.sh('chmod 755 /usr/local/bin/crun')
        server = self.enterContext(serving.standalone(host, FAAS_RUNTIME='crun'))
        value = os.urandom(12).hex()
        server.api('POST', '/api/secret/KEY', value.encode())
        files = {'handler.py': READS, 'faas.toml': 'secrets = ["KEY"]\n[env]\nTOKEN = { secret = "KEY" }\n'}
        ipv6 = server.deploy('reads', files).json['ipv6']
        self.assertEqual(f'{value} {value} 400 0', server.get(ipv6))
        self.assertEqual('1', host.sh('ls /run/faasd/crun/*/config.json | wc -l').strip())
        itself = f'{value[:-1]}[{value[-1]}]'
        self.assertEqual('', host.sh(f'grep -rlas "{itself}" /run; true'))


@lab.needs_root
class Given(unittest.TestCase):
    """To a function on a real server."""

    @classmethod
    def setUpClass(cls):
        cls.host = cls.enterClassContext(lab.Host('server'))
        key = {'SYSTEMD_CREDENTIAL_SECRET': '/var/lib/faasd/key'}
        cls.server = cls.enterClassContext(serving.standalone(cls.host, **key))

    def faas(self, *words, ok=(0,), **more):
        return self.host.run([str(lab.REPO / 'faas'), *words], ok=ok, **more)

    def test_a_function_reads_it_and_nobody_else_finds_it(self):
        first, second = (os.urandom(12).hex() for _ in range(2))
        files = {'handler.py': READS, 'faas.toml': 'secrets = ["KEY"]\n[env]\nTOKEN = { secret = "KEY" }\n'}
        refused = self.server.deploy('reads', files)
        self.assertEqual((404, 'there is no secret KEY'), (refused.status, refused.json['error']))
        self.assertIn('faas secret set KEY', refused.json['hint'])
        self.assertEqual('Set KEY\n', self.faas('secret', 'set', 'KEY', input=f'{first}\n').stdout)
        ipv6 = self.server.deploy('reads', files).json['ipv6']
        self.assertEqual(f'{first} {first} 400 0', self.server.get(ipv6))
        said = self.faas('secret', 'set', 'KEY', input=second).stdout
        self.assertEqual('Set KEY\nRedeployed: reads\n', said)
        self.assertEqual(f'{second} {second} 400 0', self.server.get(ipv6))
        self.server.restart()
        self.assertEqual(f'{second} {second} 400 0', self.server.get(ipv6))

        said += self.faas('secret', 'list').stdout + self.faas('secret', 'list', '--json').stdout
        self.assertRegex(said, r'KEY +20\d\d-\d\d-\d\d +reads')
        said += self.faas('describe', 'reads').stdout + self.faas('config', 'reads').stdout
        said += self.faas('logs', 'reads').stdout + ''.join(self.server.lines)
        said += self.faas('secret', 'rm', 'KEY', ok=(1,)).stderr
        self.assertIn('the secret KEY is wanted by reads', said)
        for value in (first, second):
            self.assertNotIn(value, said)
            itself = f'{value[:-1]}[{value[-1]}]'  # not found in the arguments of grep
            places = '/var/lib/faasd /var/log /etc /run /tmp /proc/[0-9]*/cmdline'
            self.assertEqual('', self.host.sh(f'grep -rlas "{itself}" {places}; true'))
            for path in self.host.sh(f'grep -las "{itself}" /proc/[0-9]*/environ; true').split():
                self.assertIn('/faas-', self.host.sh(f'cat {path.replace("environ", "cgroup")}'))
        # A secret takes the place of a text, wherever both are from.
        text = self.server.deploy('reads', {**files, 'faas.toml': 'secrets = ["KEY"]\n[env]\nTOKEN = "text"\n'}).json
        self.assertEqual(f'{second} text 400 0', self.server.get(text['ipv6']))
        self.faas('config', 'reads', '--set', 'env.TOKEN.secret=KEY')
        self.assertEqual(f'{second} {second} 400 0', self.server.get(text['ipv6']))
        one = 'tr "\\0" "\\n" <"$each" | grep -c ^TOKEN='
        counts = self.host.sh(f'for each in $(grep -las TOKEN= /proc/[0-9]*/environ); do {one}; done; true').split()
        self.assertEqual({'1'}, set(counts) - {'0'})
        self.faas('rm', 'reads', '--yes')
        self.assertEqual('Removed KEY\n', self.faas('secret', 'rm', 'KEY').stdout)
        self.assertEqual('No secrets yet.', self.faas('secret', 'list').stdout.splitlines()[0])

    def test_a_deploy_beside_a_change_ends_with_the_new_value(self):
        self.server.api('POST', '/api/secret/BESIDE', b'former')
        source = 'import os, time\nprint("begins", flush=True)\ntime.sleep(0.7)\n'
        source += 'def app(e, s):\n    s("200 OK", [])\n    return [os.environ["V"].encode()]\n'
        files = {'handler.py': source, 'faas.toml': '[env]\nV = {secret = "BESIDE"}\n'}
        replies = []
        deploy = threading.Thread(target=lambda: replies.append(self.server.deploy('beside', files)))
        deploy.start()
        try:
            logs = '/var/lib/faasd/functions/*/log'
            lab.wait_until(lambda: 'begins' in self.host.sh(f'cat {logs} 2>/dev/null; true'), 10, 'its start')
            self.assertEqual([], self.server.api('POST', '/api/secret/BESIDE', b'new').json['redeployed'])
        finally:
            deploy.join(30)
        self.assertEqual((200, 2), (replies[0].status, replies[0].json['revision']), replies[0].body)
        self.assertEqual('new', self.server.get(replies[0].json['ipv6']))
        self.faas('rm', 'beside', '--yes')
        self.faas('secret', 'rm', 'BESIDE')

    def test_what_the_api_refuses(self):
        before = self.server.api('GET', '/api/secret').json
        for name in ('..', '%2e%2e', '.KEY', 'a%00', 'a%0a', 'x' * 65, '%c3%bc', '-'):
            with self.subTest(name):
                self.assertEqual(400, self.server.api('POST', f'/api/secret/{name}', b'x').status)
                self.assertEqual(404, self.server.api('DELETE', f'/api/secret/{name}').status)
        for value, status in ((b'', 400), (bytes(secrets.MOST_VALUE + 1), 413)):
            self.assertEqual(status, self.server.api('POST', '/api/secret/NEW', value).status)
        self.assertEqual(before, self.server.api('GET', '/api/secret').json)
        biggest = os.urandom(secrets.MOST_VALUE)
        self.assertEqual(200, self.server.api('POST', '/api/secret/NEW', biggest).status)
        self.assertEqual(405, self.server.api('GET', '/api/secret/NEW').status)
        self.assertEqual(200, self.server.api('DELETE', '/api/secret/NEW').status)

    def test_an_image_and_its_user(self):
        busybox = 'busybox', programs.static_busybox().read_bytes(), {'mode': 0o755}
        page = ('sh', '-c', 'cp /run/secrets/KEY /tmp/page; exec /busybox httpd -f -p [::]:80 -h /tmp')
        layer = images.layer(busybox, ('bin/sh', '/busybox'), ('tmp/', None, {'mode': 0o1777}))
        config = {'Entrypoint': ['/busybox', *page], 'User': '33', 'Labels': {'faas.secrets': 'KEY'}}
        self.faas('secret', 'set', 'KEY', input='for 33')
        reply = self.server.deploy('image', images.image([layer], config))
        self.assertEqual(200, reply.status, reply.body)
        self.assertEqual('for 33', self.server.get(reply.json['ipv6'], '/page'))

    def test_a_function_that_does_not_start_with_the_new_value_goes_on(self):
        picky = "import os\nassert os.environ['V'] == 'good'\ndef app(e, s):\n    s('200 OK', [])\n    return [b'x']\n"
        self.faas('secret', 'set', 'V', input='good')
        ipv6 = self.server.deploy('picky', {'handler.py': picky, 'faas.toml': '[env]\nV = {secret = "V"}'}).json['ipv6']
        done = self.faas('secret', 'set', 'V', input='bad', ok=(1,))
        self.assertIn('Set V\n', done.stdout)
        self.assertIn('with the former value goes on picky: ', done.stderr)
        self.assertEqual('x', self.server.get(ipv6))


if __name__ == '__main__':
    unittest.main()
