"""`ready`: clients come when the server says that it is ready, at a deploy, at a redeploy and after an idle stop."""

import concurrent.futures
import unittest

from tests import images, lab, programs, serving

WARMS_UP = """
import http.server, os, signal, socket, sys, time
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    request_queue_size = 100
ready = time.monotonic() + float(os.environ['WARM'])
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        warm = time.monotonic() >= ready
        self.send_response(200 if warm else 503)
        self.end_headers()
        self.wfile.write(f'{os.environ["NAME"] if warm else "cold"}'.encode())
    def log_message(self, *_):
        pass
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
Server(('::', 80), Page).serve_forever()
"""


@lab.needs_root
class Ready(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.host = cls.enterClassContext(lab.Host('server'))
        cls.server = cls.enterClassContext(serving.standalone(cls.host))

    def deploy(self, name, more='ready = "/health"\n', warm='0.7', who='one'):
        toml = f'command = "python3 server.py"\n{more}[env]\nWARM = "{warm}"\nNAME = "{who}"\n'
        return self.server.deploy(name, {'server.py': WARMS_UP, 'faas.toml': toml})

    def test_nobody_sees_it_cold(self):
        ipv6 = self.deploy('warm', 'ready = "/health"\nidle = 1\n').json['ipv6']
        self.assertEqual('one', self.server.get(ipv6))
        for _ in range(2):
            lab.wait_until(lambda: self.server.status_of('warm')['status'] == 'idle', 15, 'the idle stop')
            with concurrent.futures.ThreadPoolExecutor(8) as pool:  # they wait at the listener that it gets in the end
                answers = list(pool.map(lambda _: self.server.get(ipv6), range(16)))
            self.assertEqual({'one'}, set(answers))
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            deploying = pool.submit(self.deploy, 'warm', who='two')
            answers = []
            while not deploying.done():
                answers += pool.map(lambda _: self.server.get(ipv6), range(2))
        self.assertEqual(200, deploying.result().status)
        self.assertLessEqual(set(answers), {'one', 'two'})
        self.assertEqual('two', self.server.get(ipv6))

    def test_one_that_never_becomes_ready_is_refused(self):
        reply = self.deploy('never', 'ready = "/health"\nstart_timeout = 2\n', warm='100')
        self.assertEqual(422, reply.status)
        self.assertIn('it listens, and its readiness (/health) got: status 503', reply.json['error'])
        self.assertEqual(200, self.deploy('accepts', 'ready = "tcp"\nstart_timeout = 5\n', warm='100').status)
        self.assertRegex(self.server.get(self.server.status_of('accepts')['ipv6']), '^cold$')

    def test_a_healthcheck_of_an_image(self):
        busybox = 'busybox', programs.static_busybox().read_bytes(), {'mode': 0o755}
        script = (
            'mkdir -p /www; echo hi >/www/index.html; (sleep 0.7; echo ok >/www/well) & '
            'exec /busybox httpd -f -p [::]:80 -h /www'
        )
        check = {'Test': ['CMD-SHELL', '/busybox test -e /www/well'], 'Interval': 10**9, 'Retries': 2}
        config = {'Cmd': ['/busybox', 'sh', '-c', script], 'Healthcheck': check}
        archive = images.image([images.layer(busybox, ('bin/sh', '/busybox'), ('tmp/', None))], config)
        reply = self.server.deploy('checked', archive)
        self.assertEqual(200, reply.status, reply.body)
        ipv6 = reply.json['ipv6']
        self.assertEqual('ok\n', self.server.get(ipv6, '/well'))
        ident = self.host.sh('grep -l checked /run/faasd/instances/*/record.json').split('/')[4]
        self.host.run(['runc', '--root', '/run/faasd/runc', 'exec', ident, '/busybox', 'rm', '/www/well'])
        told = 'checked: the instance failed its HEALTHCHECK 2 times: exit code 1'
        lab.wait_until(lambda: self.server.printed(told), 20, told)
        self.assertEqual('ok\n', self.server.get(ipv6, '/well'))

    def busybox(self, check, more=''):
        busybox = 'busybox', programs.static_busybox().read_bytes(), {'mode': 0o755}
        script = f'mkdir -p /www; echo hi >/www/index.html; {more} exec /busybox httpd -f -p [::]:80 -h /www'
        labels = {'faas.start_timeout': '3'}
        config = {'Cmd': ['/busybox', 'sh', '-c', script], 'Healthcheck': {'Test': check}, 'Labels': labels}
        return images.image([images.layer(busybox, ('bin/sh', '/busybox'), ('tmp/', None))], config)

    def test_a_healthcheck_that_asks_its_own_port(self):
        """Inside, nothing listens there: faasd asks in its place, or does not look at it."""
        slow = '(sleep 0.7; echo ok >/www/well) &'
        check = ['CMD-SHELL', 'wget -q -O - http://localhost:80/well || exit 1']
        reply = self.server.deploy('wgets', self.busybox(check, slow))
        self.assertEqual((200, None), (reply.status, reply.json.get('warning')), reply.body)
        self.assertEqual('ok\n', self.server.get(reply.json['ipv6'], '/well'))
        reply = self.server.deploy('dials', self.busybox(['CMD', '/busybox', 'nc', '-z', '127.0.0.1', '80']))
        self.assertEqual(200, reply.status, reply.body)
        self.assertIn('its HEALTHCHECK does not pass (exit code 1), and is not looked at', reply.json['warning'])
        self.assertEqual('hi\n', self.server.get(reply.json['ipv6'], '/'))


if __name__ == '__main__':
    unittest.main()
