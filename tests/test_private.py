"""What an instance alone gets: its secrets, and folders of the server. Who gets them, and what he can do with them."""

import json
import os
import subprocess
import tempfile
import unittest

from handlers.containers import private
from handlers.images.spec import Spec
from tests import images, lab, packages, programs, serving
from tests.test_docs import HANDLERS, examples

SERVICE = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind('/run/service/socket')
import os; os.chmod('/run/service/socket', 0o777)
listener.listen()
while True:
    connection, _ = listener.accept()
    connection.sendall(b'the service')
    connection.close()
"""
LOOKS = """
import json, os, socket

def tried(function):
    try:
        return function()
    except OSError as error:
        return type(error).__name__

def ask(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        return sock.recv(99).decode()

def write(path):
    with open(path, 'w') as file:
        return file.write('x')

def app(environ, start_response):
    start_response('200 OK', [('Content-Type', 'application/json')])
    with open('/proc/self/mountinfo') as file:
        mounts = {line.split()[4]: line.split()[5] for line in file}
    return [json.dumps({
        'service': tried(lambda: ask('/run/service/socket')),
        'in /var/run': tried(lambda: ask('/var/run/service/socket')),
        'read': tried(lambda: open('/run/service/root').read()),
        'write': tried(lambda: write('/run/service/new')),
        'remove': tried(lambda: os.unlink('/run/service/socket')),
        'shared': tried(lambda: write('/srv/shared/new')),
        'deep': tried(lambda: os.listdir('/srv/deep')),
        'mounted below': tried(lambda: os.listdir('/srv/deep/below')),
        'root': tried(lambda: write('/new')),
        'srv': sorted(os.listdir('/srv')) if os.path.exists('/srv') else None,
        'mounts': {where: mounts.get(where) for where in ('/run/service', '/srv/shared')},
    }).encode()]
"""


class Places(unittest.TestCase):
    def test_the_setting(self):
        self.assertEqual({}, private.read_places(''))
        said = '/run/postgresql /srv/shared:rw\t/mnt/a:ro'
        places = {'/run/postgresql': 'ro', '/srv/shared': 'rw', '/mnt/a': 'ro'}
        self.assertEqual(places, private.read_places(said))
        for text in ('run', '/', '/run', '/run/faasd', '/var/lib', '/etc/ssl', '/proc/1', '/srv/../etc'):
            with self.subTest(text), self.assertRaises(ValueError):
                private.read_places(text)
        for text in ('/srv/', '//srv', '/srv:', '/srv:rx', '/srv/./a', '/srv/a\0b', ':rw', '/usr/share/x', '/x' * 600):
            with self.subTest(text), self.assertRaises(ValueError):
                private.read_places(text)

    @lab.needs_root
    def test_what_is_refused(self):
        place = os.path.realpath(self.enterContext(tempfile.TemporaryDirectory()))
        os.mkdir(f'{place}/open')
        os.mkdir(f'{place}/open/below')
        os.symlink('/etc', f'{place}/open/link')
        open(f'{place}/open/file', 'w').close()
        given = private.Private('', None, {f'{place}/open': 'ro'})
        for path, how, text in (
            ('open', 'ro', None),
            ('open/below', 'ro', None),
            ('open', 'rw', 'gives no function'),
            ('opened', 'ro', 'gives no function'),
            ('', 'ro', 'gives no function'),
            ('open/link', 'ro', 'is a link'),
            ('open/link/ssl', 'ro', 'is a link'),
            ('open/file', 'ro', 'there is no folder'),
            ('open/none', 'ro', 'there is no folder'),
        ):
            spec = Spec('handler', settings={'mounts': {os.path.normpath(f'{place}/{path}'): how}})
            with self.subTest(path, how=how):
                if text is None:
                    given.check(spec)
                else:
                    with self.assertRaisesRegex(private.MountRefused, text):
                        given.check(spec)


@lab.needs_root
class Mounts(unittest.TestCase):
    """On a real server."""

    @classmethod
    def setUpClass(cls):
        cls.host = cls.enterClassContext(lab.Host('server'))
        cls.host.sh(
            'mkdir /run/service /srv/shared /srv/deep /srv/deep/below; chmod 777 /srv/shared;'
            'echo secret >/run/service/root; chmod 600 /run/service/root; ln -s /run/service /run/link;'
            'mount -t tmpfs x /srv/deep/below; touch /srv/deep/below/hidden'
        )
        cls.service = cls.host.popen(['/usr/bin/python3', '-c', SERVICE])
        cls.addClassCleanup(cls.service.wait)
        cls.addClassCleanup(cls.service.kill)
        settings = {'FAAS_MOUNTS': '/run/service /srv/shared:rw /srv/deep /srv/anew /run/link'}
        cls.server = cls.enterClassContext(serving.standalone(cls.host, **settings))
        lab.wait_until(lambda: cls.host.path('/run/service/socket').exists(), 10, 'the service')

    def as_other(self, method, path, data=b''):
        """What a member of the group that may use the socket gets, who is not root: (status, JSON)."""
        self.host.sh('chmod 666 /run/faasd/faasd.sock')
        curl = ['curl', '-s', '--unix-socket', '/run/faasd/faasd.sock', '-X', method, '-w', '\n%{http_code}']
        with tempfile.NamedTemporaryFile(dir=self.host.path('/tmp')) as file:
            file.write(data)
            file.flush()
            os.chmod(file.name, 0o644)
            body = f'@/tmp/{os.path.basename(file.name)}'
            setpriv = ['setpriv', '--reuid=4321', '--regid=4321', '--clear-groups']
            said = self.host.run([*setpriv, *curl, '--data-binary', body, f'http://faasd{path}']).stdout
        text, _, status = said.rpartition('\n')
        return int(status), json.loads(text)

    def test_a_folder_reaches_a_service_by_its_socket(self):
        wanted = '[mounts]\n"/run/service" = "ro"\n"/srv/shared" = "rw"\n"/srv/deep" = "ro"\n'
        reply = self.server.deploy('looks', {'handler.py': LOOKS, 'faas.toml': wanted})
        self.assertEqual(200, reply.status, reply.body)
        found = json.loads(self.server.get(reply.json['ipv6']))
        self.assertEqual('the service', found['service'])
        self.assertEqual('the service', found['in /var/run'])
        self.assertEqual('PermissionError', found['read'])
        self.assertEqual(('OSError', 'OSError', 'OSError'), (found['write'], found['remove'], found['root']))
        self.assertEqual(1, found['shared'])
        self.assertEqual('x', self.host.sh('cat /srv/shared/new'))
        self.assertEqual([['below'], [], ['deep', 'shared']], [found[key] for key in ('deep', 'mounted below', 'srv')])
        for where, how in (('/run/service', 'ro'), ('/srv/shared', 'rw')):
            self.assertLessEqual({how, 'nosuid', 'nodev', 'noexec'}, set(found['mounts'][where].split(',')))
        self.assertEqual('', self.host.sh('grep -c faasd/private /proc/self/mountinfo; true').strip('0\n'))

        # Another has none of it.
        other = self.server.deploy('other', {'handler.py': LOOKS}).json['ipv6']
        found = json.loads(self.server.get(other))
        self.assertEqual(('FileNotFoundError', None), (found['service'], found['srv']))

    def test_an_image_reaches_it_and_a_restart_changes_nothing(self):
        asks = 'cat /run/service/name >/tmp/page; ls /run/secrets >>/tmp/page; exec /busybox httpd -fp [::]:80 -h /tmp'
        self.host.sh('echo here >/run/service/name')
        busybox = 'busybox', programs.static_busybox().read_bytes(), {'mode': 0o755}
        links = [(f'bin/{name}', '/busybox') for name in ('sh', 'cat', 'ls')]
        layer = images.layer(busybox, *links, ('tmp/', None, {'mode': 0o1777}), ('run/', None))
        labels = {'faas.mounts./run/service': 'ro', 'faas.secrets': 'KEY'}
        config = {'Entrypoint': ['/bin/sh', '-c', asks], 'User': '33', 'Labels': labels}
        self.assertEqual(200, self.server.api('POST', '/api/secret/KEY', b'x').status)
        reply = self.server.deploy('image', images.image([layer], config))
        self.assertEqual(200, reply.status, reply.body)
        self.assertEqual('here\nKEY\n', self.server.get(reply.json['ipv6'], '/page'))
        self.server.restart()
        self.assertEqual('here\nKEY\n', self.server.get(reply.json['ipv6'], '/page'))

    def test_a_folder_that_was_made_anew(self):
        """What systemd does with a RuntimeDirectory= when the service is restarted."""
        names = 'import os\ndef app(e, s):\n s("200 OK", [])\n return [" ".join(os.listdir("/srv/anew")).encode()]\n'
        self.host.sh('mkdir /srv/anew; touch /srv/anew/first')
        wanted = {'handler.py': names, 'faas.toml': '[mounts]\n"/srv/anew" = "ro"\n'}
        ipv6 = self.server.deploy('anew', wanted).json['ipv6']
        self.assertEqual('first', self.server.get(ipv6))
        self.host.sh('rm -r /srv/anew')
        self.assertEqual('', self.server.get(ipv6))
        self.host.sh('mkdir /srv/anew; touch /srv/anew/second')
        lab.wait_until(lambda: self.server.get(ipv6) == 'second', 20, 'the folder that is there now')
        self.assertTrue(self.server.printed('Redeployed anew'))
        self.assertTrue(self.server.printed('since /srv/anew was made anew'))
        self.assertEqual(2, self.server.status_of('anew')['revision'])

    def test_only_root_gives_it_and_only_what_is_allowed(self):
        files = {'handler.py': LOOKS, 'faas.toml': '[mounts]\n"/run/service" = "ro"\n'}
        status, answer = self.as_other('POST', '/api/new?name=sly', serving.archive(files))
        self.assertEqual((403, 'only root deploys'), (status, answer['error'][:17]))
        self.assertEqual(404, self.server.api('GET', '/api/ip/sly').status)
        # What others may deploy, they may not extend; what root has given, they may not fill with other code.
        self.assertEqual(200, self.as_other('POST', '/api/new?name=sly', serving.archive({'handler.py': LOOKS}))[0])
        change = {'set': {'mounts./run/service': 'ro'}}
        self.assertEqual(403, self.as_other('POST', '/api/config/sly', json.dumps(change).encode())[0])
        self.assertEqual(200, self.server.api('POST', '/api/config/sly', change).status)
        self.assertEqual(403, self.as_other('POST', '/api/new?name=sly', serving.archive({'handler.py': LOOKS}))[0])
        memory = json.dumps({'set': {'memory': '100M'}}).encode()
        self.assertEqual(403, self.as_other('POST', '/api/config/sly', memory)[0])
        for path, how, error in (
            ('/srv/shared', 'rw', None),
            ('/run/service', 'rw', 'the server gives no function /run/service (rw)'),
            ('/run/faasd', 'ro', 'the server gives no function /run/faasd (ro)'),
            ('/run/link', 'ro', '/run/link is a link, or goes through one'),
            ('/srv/deep/none', 'ro', 'there is no folder /srv/deep/none on the server'),
        ):
            with self.subTest(path, how=how):
                reply = self.server.deploy('asks', {**files, 'faas.toml': f'[mounts]\n"{path}" = "{how}"\n'})
                self.assertEqual((200 if error is None else 403, error), (reply.status, reply.json.get('error')))


@lab.needs_root
@lab.not_in_check
class Database(unittest.TestCase):
    """A real PostgreSQL of the host, by its unix socket."""

    def test_the_example_of_the_docs(self):
        host = self.enterContext(lab.Host('server'))
        try:
            packages.put(host, 'postgresql-15', 'python3-psycopg2')
        except RuntimeError as error:
            self.skipTest(str(error))
        password, data = os.urandom(12).hex(), '/var/lib/pg/data'
        host.run(['useradd', '--system', '--no-create-home', 'postgres'], ok=(0, 9))
        host.run(['install', '-d', '-o', 'postgres', '/run/postgresql', '/var/lib/pg'])
        host.path('/tmp/password').write_text(password)
        host.run(['chown', 'postgres', '/tmp/password'])

        def command(program, *arguments):
            as_it = ['setpriv', '--reuid=postgres', '--regid=postgres', '--clear-groups']
            return [*as_it, 'env', f'PGPASSWORD={password}', f'/usr/lib/postgresql/15/bin/{program}', *arguments]

        init = ['--no-sync', '-A', 'scram-sha-256', '-U', 'app', '--pwfile=/tmp/password', '-D', data]
        host.run(command('initdb', *init))
        serve = command('postgres', '-D', data, '-k', '/run/postgresql', '-c', 'listen_addresses=')
        service = host.popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(service.wait)
        self.addCleanup(service.terminate)
        create = command('createdb', '-h', '/run/postgresql', '-U', 'app', 'app')
        lab.wait_until(lambda: host.run(create, ok=None).returncode == 0, 20, 'the database')

        server = self.enterContext(serving.standalone(host, FAAS_MOUNTS='/run/postgresql'))
        server.api('POST', '/api/secret/db-password', password.encode())
        reply = server.deploy('guests', examples(HANDLERS.read_text())['database'])
        self.assertEqual(200, reply.status, reply.body)
        self.assertEqual('You are guest 1.\n', server.get(reply.json['ipv6']))
        self.assertEqual('You are guest 2.\n', server.get(reply.json['ipv6']))


if __name__ == '__main__':
    unittest.main()
