"""The README's story: its commands typed on a server and a laptop, its outputs compared with the real ones.

A ```console block below `<!-- on the server -->` or `<!-- on the laptop -->` is typed there: `$ ` begins a command,
`> ` continues it, the rest is its output. Files are written in memory: a lab host's are an overlay over this machine's.
"""

import contextlib
import re
import subprocess
import unittest

from tests import lab

README = lab.REPO / 'README.md'
BLOCK = re.compile(r'^<!-- on the (server|laptop)(: fails)? -->\n```console\n(.*?)^```$', re.DOTALL | re.MULTILINE)
ENDPOINT = 'faas.example.com'
STAYS = 'faasd.py'

# What differs from run to run or from machine to machine.
CHANGING = (
    (r'faas1_[\w.…-]+', 'faas1_…'),
    (r'\d{4}-\d\d-\d\d(T[\d:]+Z)?|\[\d\d/\w+/\d{4} [\d:]+\]', 'DATE'),
    (r'after \d+ milliseconds', 'after TIME'),
    (r'\b[\d.]+ ?ms\b', 'TIME'),
    (r'\b\d+ seconds? ago', 'AGO'),
    (r'[\d.]+ (B|KiB) (received|sent)', r'BYTES \2'),
    (r' \(wireguard-go\)', ''),
    (r'other names go to .*', 'other names go to FORWARDERS'),
    (r'^.*?(curl: \(\d+\) Could not resolve host).*', r'\1'),
)


def steps(text):
    """[(host, fails, command, output)] of a README."""
    found = []
    for host, fails, body in BLOCK.findall(text):
        for part in re.split(r'^\$ ', body, flags=re.MULTILINE)[1:]:
            lines = part.rstrip('\n').split('\n')
            count = 1
            while count < len(lines) and lines[count].startswith('> '):
                count += 1
            command = '\n'.join([lines[0], *(line[2:] for line in lines[1:count])])
            found.append((host, bool(fails), command, '\n'.join(lines[count:])))
    return found


def plain(output):
    """The lines of the output, without what changes and blank ones."""
    for pattern, word in CHANGING:
        output = re.sub(pattern, word, output, flags=re.MULTILINE)
    return [line.rstrip() for line in output.splitlines() if line.strip()]


class Stage:
    """The two hosts, the token that was invited with, and the faasd that runs."""

    def __init__(self, server, laptop):
        self.hosts = {'server': server, 'laptop': laptop}
        self.token, self.faasd = None, None
        with open(laptop.path('/etc/hosts'), 'a') as file:
            file.write(f'{lab.SERVER[0].partition("/")[0]} {ENDPOINT}\n')
        for host in self.hosts.values():
            host.path('/root/.curlrc').write_text('no-progress-meter\n')

    def type(self, host, command):
        """(exit code, output) of one command; one that stays has printed that it is ready."""
        script = 'sudo() { env "$@"; }\n' + re.sub(r'faas1_[\w.…-]*', lambda _: self.token, command)
        if STAYS in command:
            return 0, self._start(self.hosts[host], script.replace('sudo() { env', 'sudo() { exec env'))
        on_terminal = ['script', '--quiet', '--return', '--command', script, '/dev/null']
        done = self.hosts[host].run(on_terminal, ok=None, timeout_s=120, env={'SHELL': '/bin/sh', 'TERM': 'xterm'})
        output = re.sub('\r|\033\\[[\\d;]*m', '', done.stdout)
        token = re.search(r'faas1_\S+', output)
        self.token = token[0] if token else self.token
        return done.returncode, output

    def _start(self, host, script):
        self.faasd = host.popen(['sh', '-c', script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output = []
        for line in self.faasd.stdout:
            output.append(line)
            if '[faasd] Ready' in line:
                break
        return ''.join(output)


class Reading(unittest.TestCase):
    def test_blocks_are_taken_apart(self):
        text = '<!-- on the laptop: fails -->\n```console\n$ a\nout\n\nmore\n$ b <<END\n> x\n> END\n```\n'
        self.assertEqual(
            [('laptop', True, 'a', 'out\n\nmore'), ('laptop', True, 'b <<END\nx\nEND', '')], steps(text)
        )

    def test_what_changes_is_left_out(self):
        self.assertEqual(
            ['Ping: TIME', 'at DATE', 'BYTES received, BYTES sent'],
            plain('Ping: 0.5ms\n\nat 2026-11-24T00:07:13Z \n3.6 KiB received, 120 B sent'),
        )


@lab.needs_root
class Story(unittest.TestCase):
    def test_the_readme(self):
        story = steps(README.read_text())
        self.assertGreater(len(story), 12)
        with lab.pair() as hosts, contextlib.ExitStack() as after:
            stage = Stage(*hosts)
            after.callback(lambda: stage.faasd and stage.faasd.kill())
            for host, fails, command, expected in story:
                with self.subTest(command):
                    code, output = stage.type(host, command)
                    self.assertEqual(plain(expected), plain(output))
                    self.assertEqual(fails, code != 0, output)
            stage.faasd.terminate()
            self.assertEqual(0, stage.faasd.wait(30))
            self.assertNotIn('Traceback', stage.faasd.stdout.read())
            stage.faasd.stdout.close()

    def test_the_removed_peer_is_locked_out(self):
        """Its key, kept by hand, makes no handshake any more, and its own name cannot be had by another key."""
        with lab.pair() as hosts, contextlib.ExitStack() as after:
            stage = Stage(*hosts)
            after.callback(lambda: stage.faasd and stage.faasd.kill())
            stage.type('server', f'FAAS_VPN_ENDPOINT={ENDPOINT} exec python3 faasd.py --standalone')
            stage.type('server', './faas vpn invite laptop')
            self.assertEqual(0, stage.type('laptop', './faas vpn connect --invite faas1_')[0])
            ping = 'ping -c 1 -W 1 fd00:faa5:0:100::1'
            self.assertEqual(0, stage.type('laptop', ping)[0])
            self.assertEqual(0, stage.type('server', './faas vpn remove laptop')[0])
            self.assertNotEqual(0, stage.type('laptop', ping)[0])
            self.assertEqual('', stage.type('server', 'wg show wg0 peers')[1])
            code, output = stage.type('laptop', './faas vpn connect')
            self.assertNotEqual(0, code, output)
            self.assertEqual('', stage.type('server', 'wg show wg0 peers')[1])
            stage.faasd.terminate()
            self.assertEqual(0, stage.faasd.wait(30))
            stage.faasd.stdout.close()


if __name__ == '__main__':
    unittest.main()
