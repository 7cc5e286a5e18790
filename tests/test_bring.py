"""What people bring, as they bring it: folders and images that say little, or say it as other platforms take it."""

import unittest

from tests import images, lab, programs, serving

SEES = """
import os, socket, subprocess

def app(environ, start_response):
    start_response('200 OK', [])
    lines = [
        socket.gethostbyname(socket.gethostname()),
        str(os.path.exists('/etc/alternatives/awk')),
        str(len(os.listdir('/etc/ssl/certs')) > 10),
        subprocess.run(['awk', 'BEGIN { print "awk" }'], capture_output=True, text=True).stdout.strip(),
        str(os.path.exists('/etc/shadow') or os.path.exists('/etc/ssl/private')),
        more.WHAT,
    ]
    with open('/tmp/run', 'w') as file:
        file.write('#!/bin/sh\\necho ran\\n')
    os.chmod('/tmp/run', 0o755)
    try:
        lines.append(subprocess.run(['/tmp/run'], capture_output=True, text=True).stdout.strip())
    except PermissionError:
        lines.append('refused')
    return [' '.join(lines).encode()]

import more
"""
SERVER = """
import http.server, signal, socket, sys
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(sys.argv[1].encode())
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
Server(('::', int(sys.argv[1])), Page).serve_forever()
"""

OLD = """
import os, socket
listener = socket.create_server(('0.0.0.0', 80))
while True:
    connection, _ = listener.accept()
    with connection, socket.socket(fileno=os.dup(connection.fileno())) as same:
        print(same.getpeername()[0])
        connection.recv(65536)
        connection.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\n')
"""


@lab.needs_root
class Brought(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.host = cls.enterClassContext(lab.Host('server'))
        cls.server = cls.enterClassContext(serving.standalone(cls.host))

    def test_a_folder_sees_what_packages_need_and_no_secret(self):
        toml = '[env]\nPYTHONPATH = "/function/lib"\n'
        files = {'handler.py': SEES, 'lib/more.py': 'WHAT = "more"', 'faas.toml': toml}
        ipv6 = self.server.deploy('sees', files).json['ipv6']
        self.assertEqual('127.0.0.1 True True awk False more refused', self.server.get(ipv6))
        files['faas.toml'] = f'exec-tmp = true\n{toml}'
        self.server.deploy('sees', files)
        self.assertEqual('127.0.0.1 True True awk False more ran', self.server.get(ipv6))

    def test_a_procfile_as_heroku_takes_it(self):
        files = {'server.py': SERVER, 'Procfile': 'web: python3 server.py ${PORT}\nworker: python3 work.py\n'}
        reply = self.server.deploy('heroku', files)
        self.assertEqual("the Procfile: left out 'worker'", reply.json['warning'])
        self.assertEqual('80', self.server.get(reply.json['ipv6']))

    def test_an_image_that_names_several_ports_and_a_volume(self):
        busybox = 'busybox', programs.static_busybox().read_bytes(), {'mode': 0o755}
        layer = images.layer(busybox, ('bin/sh', '/busybox'), ('www/index.html', b'page'))
        config = {
            'Entrypoint': ['/busybox', 'sh', '-c', 'exec /busybox httpd -f -p [::]:$PORT -h /www'],
            'ExposedPorts': {'8025/tcp': {}, '1025': {}, '1110/TCP': {}},
            'Volumes': {'/data': {}},
        }
        reply = self.server.deploy('ports', images.image([layer], config))
        self.assertEqual('port 80 → 1025 (of 1025, 1110, 8025)', reply.json['serves'])
        self.assertEqual('/data goes with the instance (--volume ports:/data keeps it)', reply.json['warning'])
        self.assertEqual('page', self.server.get(reply.json['ipv6']))
        reply = self.server.api('POST', '/api/config/ports', {'set': {'port': '8025', 'idle': '1'}})
        self.assertEqual('port 8025', reply.json['serves'])
        self.assertEqual('page', self.server.get(reply.json['ipv6']))
        said = '[faasd] idle for 1 s, stopped'
        lab.wait_until(lambda: said in self.server.api('GET', '/api/logs/ports').body.decode(), 15, said)
        self.assertEqual('page', self.server.get(reply.json['ipv6']))

    def test_a_server_for_ipv4_alone_that_sees_the_right_address_has_no_warning(self):
        files = {'server.py': OLD, 'faas.toml': 'command = "python3 -u server.py"'}
        self.assertIsNone(self.server.deploy('right', files).json['warning'])
        silent = 'command = "sh -c \\"python3 -m http.server 80 --bind 0.0.0.0 2>/dev/null\\""'
        reply = self.server.deploy('silent', {'faas.toml': silent}).json
        self.assertIn('it works, but may see wrong client addresses', reply['warning'])
        self.assertIn('as --bind :: does', reply['hint'])


if __name__ == '__main__':
    unittest.main()
