"""Attacks by peers, newcomers and strangers on a real faasd: keys that clash, and requests that fill its log."""

import base64
import collections
import json
import os
import re
import unittest

from tests import lab, serving
from tests.test_faas import FAAS

API = 'http://[fd00:faa5:0:100::1]:8080/api'
PEERS = '/etc/wireguard/peers'


def key():
    return base64.b64encode(os.urandom(32)).decode()


@lab.needs_root
class Keys(unittest.TestCase):
    """No two peers, nor a peer and the server, have one key."""

    def setUp(self):
        self.host = self.enterContext(lab.Host('server'))
        self.server = serving.Server(self.host, '--standalone')
        self.addCleanup(self.server.stop)

    def create(self, name, public_key):
        reply = self.server.api('POST', '/api/vpn/create', {'name': name, 'public_key': public_key})
        return reply.status, reply.json.get('error')

    def on_wg0(self):
        return set(self.host.run(['wg', 'show', 'wg0', 'peers']).stdout.split())

    def test_a_key_of_the_server_or_of_another_peer_is_refused_with_one_line(self):
        shared, preshared, address = key(), key(), 'fd00:faa5:0:100::f%d/128'
        self.host.path(PEERS).mkdir(parents=True)
        theirs = f'[Peer]\nPublicKey = {key()}\nPresharedKey = {preshared}\nAllowedIPs = {address % 9}\n'
        self.host.path(f'{PEERS}/theirs.conf').write_text(theirs)
        self.server.start()
        own = self.host.path('/etc/wireguard/server_public.key').read_text().strip()
        self.assertEqual((400, "this is the server's own public key"), self.create('server', own))
        self.assertEqual((200, None), self.create('first', shared))
        self.assertEqual((409, 'another peer has this public key'), self.create('second', shared))
        clashes = {
            'own': (f'PublicKey = {own}', "this is the server's own public key"),
            'taken': (f'PublicKey = {shared}', 'another peer has this public key'),
            'secret': (f'PublicKey = {key()}\nPresharedKey = {preshared}', 'another peer has this preshared key'),
        }
        for number, (name, (lines, _)) in enumerate(clashes.items()):
            text = f'[Peer]\n{lines}\nAllowedIPs = {address % number}\n'
            self.host.path(f'{PEERS}/{name}.conf').write_text(text)
        for name, (_, why) in clashes.items():
            lab.wait_until(lambda says=f'{name}.conf: {why}': self.server.printed(says), 10, why)
        peers = {peer['name'] for peer in self.server.api('GET', '/api/vpn/list').json}
        self.assertEqual(({'first', 'theirs'}, 2), (peers, len(self.on_wg0())))

    def test_new_keys_of_the_server_that_a_peer_has_cost_this_peer_alone(self):
        private = self.host.run(['wg', 'genkey']).stdout
        public, other = self.host.run(['wg', 'pubkey'], input=private).stdout.strip(), key()
        self.server.start()
        self.create('clash', public)
        self.create('other', other)
        self.server.stop()
        self.host.path('/etc/wireguard/server_private.key').write_text(private)
        self.host.path('/etc/wireguard/wg0.conf').unlink()
        self.server.lines.clear()
        self.server.start()
        self.assertTrue(self.server.printed(f"Left out {PEERS}/clash.conf: it has the server's own public key"))
        self.assertEqual({other}, self.on_wg0())
        self.assertEqual(['other.conf'], os.listdir(self.host.path(PEERS)))
        self.assertEqual(200, self.server.api('DELETE', '/api/vpn/remove/clash').status)


@lab.needs_root
class Log(unittest.TestCase):
    """Who did what stands in the log, and nobody can fill it."""

    def setUp(self):
        self.host, self.laptop = self.enterContext(lab.pair())
        self.server = self.enterContext(serving.standalone(self.host))

    def lines(self, form):
        return [line for line in self.server.lines if re.fullmatch(form, line)]

    def test_who_deployed_removed_and_invited(self):
        self.server.deploy('hello', serving.saying('hello'))
        self.server.api('DELETE', '/api/remove/hello')
        joe = ['setpriv', '--reuid=1234', '--regid=0', '--clear-groups']
        self.host.run([*joe, 'curl', '-sf', '--unix-socket', '/run/faasd/faasd.sock', 'http://x/api/vpn/create',
                       '-d', json.dumps({'name': 'phone', 'public_key': key()})])
        pasted = self.host.run([FAAS, 'vpn', 'invite', 'laptop', '--admin']).stdout
        self.laptop.run(['sh'], input=pasted.replace('./faas', str(FAAS)))
        self.laptop.run(['curl', '-sgf', f'{API}/vpn/invite', '-d', '{}'])
        self.laptop.run(['curl', '-sgf', '-X', 'DELETE', f'{API}/vpn/remove/phone'])
        for line in (
            r'\[handler\] Deployed hello at fd00:faa5:1:0::a, revision 1 \(.*\), by local \(uid 0\)\n',
            r'\[listener\] Removed hello from fd00:faa5:1:0::a, by local \(uid 0\)\n',
            r'\[vpn\] Created peer: phone → fd00:faa5:0:100::a, by local \(uid 1234\)\n',
            r'\[vpn\] Invited laptop \([0-9a-f]{16}\) as admin, by local \(uid 0\)\n',
            r'\[vpn\] Invited a peer \([0-9a-f]{16}\), by peer laptop\n',
            r'\[vpn\] Removing peer: phone, by peer laptop\n',
        ):
            with self.subTest(line):
                lab.wait_until(lambda line=line: self.lines(line), 5, line)
                self.assertEqual(1, len(self.lines(line)))

    def test_what_is_refused_is_counted_and_fills_no_log(self):
        self.server.api('POST', '/api/vpn/invite', {})
        before = len(self.server.lines)
        for count, words in ((30, ['-d', '{"name": "x"}']), (5, ['http://203.0.113.10:51820/api/list'])):
            self.laptop.run(['curl', '-s', *words, *['http://203.0.113.10:51820/api/vpn/create'] * count])
        self.host.run(['curl', '-sg', *[f'{API}/list'] * 7])
        self.assertEqual(404, self.server.api('DELETE', '/api/remove/nobody').status)
        self.server.stop()
        told = [line for line in self.server.lines[before:] if line.startswith('[api] Refused ')]
        self.assertIn(len(told), (1, 2), self.server.lines[before:])  # 2: a minute ended meanwhile
        counts = collections.Counter()
        kinds = re.sub(r'\[api\] Refused \d+ requests: ', '; ', ''.join(told))
        for kind, count in re.findall(r'; ([^;]*) × (\d+)', kinds):
            counts[kind] += int(count)
        self.assertEqual({'newcomer: a bad invite': 30, 'newcomer: Not Found': 6, 'stranger: Forbidden': 7,
                          'local (uid 0): Not Found': 1}, counts)
        self.assertRegex(told[-1], '; the last from [0-9a-f:.]+\n$')


if __name__ == '__main__':
    unittest.main()
