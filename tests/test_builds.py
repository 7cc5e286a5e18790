"""What a folder needs is built on the server: real pip, npm and go in real containers, with an index of our own."""

import base64
import contextlib
import hashlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import unittest

from control.builds import place
from handlers.containers.building import BuildFailed, collect
from handlers.images import builders
from handlers.images.spec import Spec
from tests import lab, serving
from tests.wheels import fetched, npm_package, put_in_index, wheel

GREETS = 'def greet():\n    return "hello from a package"\n'
ASKS = """
import greets

def app(environ, start_response):
    start_response('200 OK', [])
    return [greets.greet().encode()]
"""
SERVES = """
import http.server, socket, greets
class Server(http.server.HTTPServer):
    address_family = socket.AF_INET6
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(greets.greet().encode())
Server(('::', 80), Page).serve_forever()
"""
NODE = """
const {greet} = require('greets')
require('node:http').createServer((request, response) => response.end(greet())).listen(80, '::')
"""
GO = """package main

import "syscall"

func main() {
	for {
		control, _ := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
		if syscall.Connect(control, &syscall.SockaddrUnix{Name: "/control.sock"}) != nil {
			return
		}
		data, rights := make([]byte, 16), make([]byte, 64)
		_, count, _, _, _ := syscall.Recvmsg(control, data, rights, 0)
		messages, _ := syscall.ParseSocketControlMessage(rights[:count])
		fds, _ := syscall.ParseUnixRights(&messages[0])
		syscall.Read(fds[0], make([]byte, 4096))
		syscall.Write(fds[0], []byte("HTTP/1.0 200 OK\\r\\n\\r\\nhello from go"))
		syscall.Close(fds[0])
		syscall.Close(control)
	}
}
"""  # of the least packages: each is compiled
REACHES = """
import socket, sys
for place, port in [%s]:
    try:
        socket.create_connection((place, port), 2).close()
        print('reached', place, port)
    except OSError as error:
        print('refused', place, port)
"""


HANDLER = Spec('handler')


@lab.not_in_check
class Plans(unittest.TestCase):
    def setUp(self):
        self.tree = self.enterContext(tempfile.TemporaryDirectory())

    def plan(self, files, spec=HANDLER):
        shutil.rmtree(self.tree)
        os.mkdir(self.tree)
        for name, text in files.items():
            os.makedirs(os.path.dirname(f'{self.tree}/{name}'), exist_ok=True)
            with open(f'{self.tree}/{name}', 'w') as file:
                file.write(text)
        return builders.plan(self.tree, spec)

    def test_what_needs_no_build(self):
        for files in (
            {'handler.py': ''},
            {'requirements.txt': '# nothing\n\n'},
            {'pyproject.toml': '[tool.ruff]\n'},
            {'package.json': '{"scripts": {}}'},
            {'package.json': '{"dependencies": {"x": "1"}}', 'node_modules/x/index.js': ''},
        ):
            with self.subTest(files=files):
                self.assertIsNone(self.plan(files))
        none = Spec('handler', settings={'build': 'none'})
        self.assertIsNone(self.plan({'requirements.txt': 'flask\n'}, none))
        brought = Spec('command', ('./server',))
        self.assertIsNone(self.plan({'go.mod': 'module x\n', 'server': ''}, brought))

    def test_the_same_input_is_known_and_another_is_another(self):
        plain = self.plan({'requirements.txt': 'flask==3.0\n', 'handler.py': '1'})
        self.assertEqual(('.faas/python',), plain.results)
        self.assertEqual(plain.key, self.plan({'requirements.txt': 'flask==3.0\n', 'handler.py': '2'}).key)
        self.assertNotEqual(plain.key, self.plan({'requirements.txt': 'flask==3.1\n', 'handler.py': '1'}).key)
        env = Spec('handler', settings={'env': {'PIP_INDEX_URL': 'http://x/'}})
        self.assertNotEqual(plain.key, self.plan({'requirements.txt': 'flask==3.0\n'}, env).key)
        for line in ('-r more.txt', './x.whl', '-e .', 'x @ file:///function/x', 'git+https://x/y', '-c c.txt'):
            with self.subTest(line=line):  # it reads other files
                keys = {self.plan({'requirements.txt': f'{line}\n', 'more.txt': text}).key for text in 'ab'}
                self.assertEqual(2, len(keys))

    def test_a_command_of_its_own_comes_last_and_may_change_everything(self):
        spec = Spec('command', ('node', 'x.js'), settings={'build': 'npm run build'})
        plan = self.plan({'package.json': '{"dependencies": {"x": "1"}}', 'package-lock.json': '{}'}, spec)
        self.assertIsNone(plan.results)
        self.assertRegex(plan.lines[0], '^npm ci --no-audit')
        self.assertEqual('npm run build', plan.lines[1])
        self.assertIn('/function/node_modules/.bin:', plan.spec.env['PATH'])

    def test_what_is_wrong_is_said(self):
        for files, text in (
            ({'pyproject.toml': '['}, 'pyproject.toml is not TOML'),
            ({'package.json': '['}, 'package.json is not JSON'),
            ({'package.json': '[]'}, 'package.json is not an object'),
        ):
            with self.subTest(files=files), self.assertRaisesRegex(builders.CannotBuild, text):
                self.plan(files)
        os.symlink('/etc/passwd', f'{self.tree}/requirements.txt')
        with self.assertRaisesRegex(builders.CannotBuild, 'requirements.txt is a link'):
            builders.plan(self.tree, Spec('handler'))

    def test_own_variables_stay(self):
        own = {'PYTHONPATH': '/function/lib', 'PATH': '/usr/bin', 'S': {'secret': 'X'}}
        spec = self.plan({'requirements.txt': 'x\n'}, Spec('handler', settings={'env': own})).spec
        self.assertEqual('/function/lib:/function/.faas/python', spec.effective({}).env['PYTHONPATH'])
        self.assertEqual('/function/.faas/python/bin:/usr/bin', spec.effective({}).env['PATH'])


@lab.not_in_check
class Results(unittest.TestCase):
    def setUp(self):
        self.top = self.enterContext(tempfile.TemporaryDirectory())
        os.makedirs(f'{self.top}/work/.faas')

    def test_links_of_a_build_lead_nowhere(self):
        os.symlink('/etc', f'{self.top}/work/.faas/python')
        with self.assertRaisesRegex(BuildFailed, 'has made no .faas/python'):
            collect(f'{self.top}/work', ('.faas/python',), f'{self.top}/into')

    def test_pipes_are_refused_and_modes_are_made_plain(self):
        os.mkdir(f'{self.top}/work/.faas/python')
        with open(f'{self.top}/work/.faas/python/x', 'w') as file:
            os.fchmod(file.fileno(), 0o4700)
        collect(f'{self.top}/work', ('.faas/python',), f'{self.top}/into')
        self.assertEqual(0o100755, os.stat(f'{self.top}/into/.faas/python/x').st_mode)
        os.mkfifo(f'{self.top}/work/.faas/python/pipe')
        with self.assertRaisesRegex(BuildFailed, 'or one that is none'):
            collect(f'{self.top}/work', None, f'{self.top}/other')

    def test_a_link_in_the_folder_is_no_place_for_a_result(self):
        os.makedirs(f'{self.top}/result/.faas/python')
        os.mkdir(f'{self.top}/tree')
        os.symlink('../work', f'{self.top}/tree/.faas')
        with self.assertRaisesRegex(builders.CannotBuild, '.faas is a link'):
            place(f'{self.top}/result', ('.faas/python',), f'{self.top}/tree')


@lab.needs_root
class Built(unittest.TestCase):
    """A server 192.168.1.1; beyond a router, 203.0.113.5 is an index of Python packages and of npm's."""

    @classmethod
    def setUpClass(cls):
        cls.host, cls.net = (cls.enterClassContext(lab.Host(name)) for name in ('server', 'net'))
        lab.join(cls.host, cls.net, ['192.168.1.1/24', '2001:db8:1::1/64'], ['192.168.1.2/24', '2001:db8:1::2/64'])
        cls.host.sh('ip route add default via 192.168.1.2')
        for address in ('203.0.113.5/32', '169.254.169.254/32'):
            cls.net.sh(f'ip address add {address} dev lo')
        cls.make_index(cls.net.path('/tmp/index'))
        serve = ['python3', '-m', 'http.server', '--directory', '/tmp/index', '--bind', '::', '80']
        cls.net.popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        cls.server = cls.enterClassContext(serving.standalone(cls.host, FAAS_BUILD_DISK='256M'))

    @classmethod
    def make_index(cls, top):
        name, content = wheel('greets', '1.0', {'greets.py': GREETS})
        (top / 'simple/greets').mkdir(parents=True)
        (top / f'simple/greets/{name}').write_bytes(content)
        (top / 'simple/greets/index.html').write_text(f'<a href="{name}">{name}</a>')
        package = npm_package('greets', '1.0.0', 'exports.greet = () => "hello from npm"\n')
        (top / 'greets.tgz').write_bytes(package)
        integrity = 'sha512-' + base64.b64encode(hashlib.sha512(package).digest()).decode()
        dist = {'tarball': 'http://203.0.113.5/greets.tgz', 'integrity': integrity}
        version = {'name': 'greets', 'version': '1.0.0', 'dist': dist}
        about = {'name': 'greets', 'dist-tags': {'latest': '1.0.0'}, 'versions': {'1.0.0': version}}
        (top / 'greets').write_text(json.dumps(about))

    INDEX = '[env]\nPIP_INDEX_URL = "http://203.0.113.5/simple/"\nPIP_TRUSTED_HOST = "203.0.113.5"\n'

    def faas_new(self, name, files, ok=(0,)):
        folder = self.host.path(f'/tmp/{name}')
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path, text in files.items():
            (folder / path).write_text(text)
        return self.host.run([str(lab.REPO / 'faas'), 'new', name, f'/tmp/{name}'], ok=ok, timeout_s=90)

    def ask(self, name):
        return self.server.get(self.server.api('GET', f'/api/ip/{name}').json['ipv6'])

    def left(self):
        """What a build must not leave behind: containers, mounts, loop devices, unfinished folders."""
        builds = self.host.path('/var/lib/faasd/builds')
        return [each.name for each in builds.glob('*/*') if each.name.startswith('.') or each.name == 'disk.busy'] + [
            line for line in self.host.sh('losetup --list --noheadings --output BACK-FILE').splitlines()
            if 'faasd/builds' in line
        ]  # fmt: skip

    def test_packages_of_python_for_a_handler_and_a_program_and_not_twice(self):
        files = {'requirements.txt': 'greets==1.0\n', 'handler.py': ASKS, 'faas.toml': self.INDEX}
        done = self.faas_new('py', files)
        self.assertIn('$ /usr/bin/python3 -I -m pip install', done.stderr)
        self.assertIn('Successfully installed greets-1.0', done.stderr)
        self.assertEqual('hello from a package', self.ask('py'))
        again = self.faas_new('py', files | {'handler.py': ASKS.replace('greets.greet()', '(greets.greet() + "!")')})
        self.assertNotIn('pip', again.stderr)
        self.assertEqual('hello from a package!', self.ask('py'))
        toml = 'command = ["python3", "-u", "server.py"]\n' + self.INDEX
        self.faas_new('py', {'requirements.txt': 'greets\n', 'server.py': SERVES, 'faas.toml': toml})
        self.assertEqual('hello from a package', self.ask('py'))
        self.assertEqual([], self.left())
        self.host.run([str(lab.REPO / 'faas'), 'rm', 'py', '--yes'])
        self.assertFalse(self.host.path('/var/lib/faasd/builds/py').exists())

    def test_a_project_of_python_is_installed(self):
        project = '[project]\nname = "mine"\nversion = "1"\ndependencies = ["greets"]\n'
        project += '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        name, content = wheel('mine', '1', {'mine.py': 'from greets import greet\n'}, 'Requires-Dist: greets\n')
        backend = f'import base64\nNAME, WHEEL = {name!r}, {base64.b64encode(content)!r}\n'
        backend += 'def build_wheel(folder, *_):\n    open(folder + "/" + NAME, "wb").write(base64.b64decode(WHEEL))\n'
        backend += '    return NAME\n'
        handler = ASKS.replace('greets', 'mine')
        files = {'pyproject.toml': project, 'backend.py': backend, 'handler.py': handler, 'faas.toml': self.INDEX}
        self.faas_new('project', files)
        self.assertEqual('hello from a package', self.ask('project'))

    def faas_new_example(self, name, **more):
        folder = serving.EXAMPLES / name
        return self.faas_new(name, {each: (folder / each).read_text() for each in os.listdir(folder)} | more)

    def test_the_example_notes_keeps_notes_and_asks_another_function(self):
        example = serving.EXAMPLES / 'notes'
        download = ['/usr/bin/python3', '-m', 'pip', 'download', '--quiet', '--only-binary=:all:', '--requirement']
        put_in_index(fetched('wheels', [*download, str(example / 'requirements.txt')]), self.net.path('/tmp/index'))
        self.server.deploy('hello', serving.example('hello'))
        settings = (example / 'faas.toml').read_text() + self.INDEX.removeprefix('[env]\n')
        self.faas_new_example('notes', **{'faas.toml': settings})
        ipv6 = self.server.api('GET', '/api/ip/notes').json['ipv6']
        self.assertEqual('kept\n', self.host.sh(f'curl -sg -d text=milk http://[{ipv6}]/'))
        self.assertIn('hello says: Hello, fd00:faa5:0:200:', self.server.get(ipv6, '/greeting'))
        self.faas_new_example('notes', **{'faas.toml': settings + '# again\n'})
        self.assertEqual('["milk"]', self.ask('notes').strip())

    def test_the_example_markdown_has_its_lock_file(self):
        packed = fetched('npm', ['npm', 'pack', '--silent', 'marked@4.3.0']) / 'marked-4.3.0.tgz'
        place = self.net.path('/tmp/index/marked/-')
        place.mkdir(parents=True)
        (place / packed.name).write_bytes(packed.read_bytes())
        done = self.faas_new_example('markdown', **{'.npmrc': 'registry=http://203.0.113.5/\n'})
        self.assertIn('$ npm ci --omit=dev', done.stderr)
        self.assertIn('<strong>Markdown</strong>', self.ask('markdown'))

    def test_packages_of_npm_and_a_start_script(self):
        package = {'dependencies': {'greets': '^1.0.0'}, 'scripts': {'start': 'node server.js'}}
        files = {'package.json': json.dumps(package), 'server.js': NODE, '.npmrc': 'registry=http://203.0.113.5/\n'}
        done = self.faas_new('node', files)
        self.assertIn('$ npm install', done.stderr)
        self.assertEqual('hello from npm', self.ask('node'))
        self.assertNotIn('npm', self.faas_new('node', files).stderr)

    @unittest.skipUnless(shutil.which('go', path=builders.PATH), 'needs go in /usr')
    def test_a_program_of_go_becomes_the_command(self):
        self.faas_new('gone', {'go.mod': 'module gone\n\ngo 1.19\n', 'main.go': GO})
        self.assertEqual('hello from go', self.ask('gone'))

    def test_a_command_of_its_own(self):
        files = {'handler.py': ASKS, 'greets.py': GREETS, 'faas.toml': 'build = "sed -i s/package/build/ greets.py"\n'}
        self.faas_new('own', files)
        self.assertEqual('hello from a build', self.ask('own'))

    def test_a_build_reaches_what_a_function_does_and_no_more(self):
        places = [('203.0.113.5', 80), ('192.168.1.2', 80), ('169.254.169.254', 80), ('fd00:faa5:0:100::1', 8080)]
        places += [('198.18.0.1', 8080), ('127.0.0.1', 8080), ('192.168.1.1', 22)]
        code = REACHES % ', '.join(map(str, places))
        files = {'handler.py': ASKS, 'greets.py': GREETS, 'reaches.py': code}
        lines = ['python3 reaches.py', 'ls -A / /run', 'touch /usr/x || echo read-only', 'id']
        toml = f'build = {json.dumps("; ".join(lines))}\n'
        said = self.faas_new('reaches', files | {'faas.toml': toml})
        self.assertEqual(['reached 203.0.113.5 80'], [x for x in said.stderr.splitlines() if x.startswith('reached')])
        self.assertEqual(len(places) - 1, said.stderr.count('refused '))
        self.assertIn('read-only', said.stderr)

    def test_what_fails_says_why_and_changes_nothing(self):
        files = {'handler.py': ASKS, 'greets.py': GREETS}
        self.faas_new('fails', files)
        for command, text in (
            ('echo something; exit 3', 'the build ended with exit code 3'),
            ('head -c 300M /dev/zero >big', 'FAAS_BUILD_DISK'),
            ('mkfifo pipe', 'a pipe'),
        ):
            with self.subTest(command=command):
                done = self.faas_new('fails', files | {'faas.toml': f'build = "{command}"\n'}, ok=(1,))
                self.assertIn(text, done.stderr)
                self.assertEqual(1, done.stderr.count('something\n') if 'something' in command else 1)
        self.assertEqual('hello from a package', self.ask('fails'))
        reply = self.server.deploy('fails', files | {'faas.toml': 'build = "echo something; exit 3"\n'})
        self.assertEqual(422, reply.status)
        self.assertEqual('something', reply.json['log'][-1])
        self.assertEqual([], self.left())

    def test_who_goes_away_ends_the_build(self):
        folder = self.host.path('/tmp/slow')
        folder.mkdir()
        (folder / 'handler.py').write_text(ASKS)
        (folder / 'faas.toml').write_text('build = "echo begun; sleep 600"\n')
        client = self.host.popen(
            [str(lab.REPO / 'faas'), 'new', 'slow', '/tmp/slow'], stderr=subprocess.PIPE, text=True
        )
        with client, contextlib.closing(client.stderr):
            lab.wait_until(lambda: client.stderr.readline() == 'begun\n', 30, 'the build')
            client.send_signal(signal.SIGINT)
            self.assertEqual(130, client.wait(10))
        lab.wait_until(lambda: not self.left(), 10, 'the end of the build')
        self.assertEqual(404, self.server.api('GET', '/api/ip/slow').status)

    def test_what_the_server_lacks_is_said_before_the_upload(self):
        self.host.sh('mv /usr/bin/npm /usr/bin/npm.away')  # of this host alone
        self.addCleanup(self.host.sh, 'mv /usr/bin/npm.away /usr/bin/npm')
        files = {'package.json': '{"dependencies": {"greets": "1"}}', 'server.js': NODE}
        done = self.faas_new('lacks', files, ok=(1,))
        self.assertIn('the server has no npm, which package.json needs', done.stderr)
        self.assertIn('apt install npm', done.stderr)
        reply = self.server.api('POST', '/api/new?name=lacks&needs=npm', b'not looked at')
        self.assertEqual(422, reply.status)
        self.assertEqual(422, self.server.deploy('lacks', files).status)  # without being asked before
        self.faas_new('lacks', {'handler.py': ASKS, 'greets.py': GREETS, **files, 'faas.toml': 'build = "none"\n'})
        self.assertEqual('hello from a package', self.ask('lacks'))


@lab.needs_root
class Lives(unittest.TestCase):
    def test_a_killed_faasd_leaves_nothing_and_a_build_has_a_time_limit(self):
        with lab.Host('server') as host, serving.standalone(host, FAAS_BUILD_EGRESS='') as server:
            files = {'handler.py': ASKS, 'greets.py': GREETS}
            self.assertEqual(200, server.deploy('slow', files).status)
            slow = {**files, 'faas.toml': 'build = "echo begun; sleep 600"\n'}
            client = threading.Thread(target=deploy, args=(server, slow))
            client.start()
            builds = host.path('/var/lib/faasd/builds/slow')
            lab.wait_until(lambda: (builds / 'disk.busy').exists() and pids(host), 20, 'the build')
            server.stop(signal.SIGKILL)
            client.join(20)
            server.lines.clear()
            server.settings['FAAS_BUILD_TIMEOUT'] = '2'
            server.start()
            lab.wait_until(lambda: not pids(host), 10, 'the end of the container')
            self.assertEqual([], list(builds.iterdir()))
            reply = server.deploy('slow', slow)
            self.assertEqual('the build had no end after 2 s', reply.json['error'])
            self.assertEqual('raise FAAS_BUILD_TIMEOUT on the server', reply.json['hint'])
            self.assertEqual([], pids(host))


def deploy(server, files):
    with contextlib.suppress(OSError, http.client.HTTPException):
        server.deploy('slow', files)


def pids(host):
    return host.run(['pgrep', '-x', 'sleep'], ok=(0, 1)).stdout.split()


if __name__ == '__main__':
    unittest.main()
