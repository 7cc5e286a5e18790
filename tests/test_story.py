"""The story of README and tutorial: commands typed on a server and a laptop, outputs compared with the real ones.

A ```console block below `<!-- on the server -->` or `<!-- on the laptop -->` is typed there: `$ ` begins a command,
`> ` continues it, the rest is its output. Both are machines with systemd as PID 1; see boot.py.
"""

import re
import unittest

from tests import boot, lab

PAGES = lab.REPO / 'README.md', lab.REPO / 'docs' / 'TUTORIAL.md'  # in the order in which they are typed
BLOCK = re.compile(r'^<!-- on the (server|laptop)(: fails)? -->\n```console\n(.*?)^```$', re.DOTALL | re.MULTILINE)
FOLDER = 'faasd'                                    # in joe's home
REBOOT = 'sudo reboot'

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
    """[(host, fails, command, output)] of a page."""
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
    """A server and a laptop, and the token that was invited with. joe types; he may use sudo."""

    def __init__(self, lan):
        self.server = boot.Machine(lan, 'server', boot.SERVER, {'/etc/resolv.conf': f'nameserver {lab.NAMESERVER}\n'})
        self.laptop = boot.Machine(lan, 'laptop', boot.LAPTOP)
        self.server.copy(lab.REPO, FOLDER)
        self.laptop.copy(lab.REPO / 'faas', f'{FOLDER}/faas')
        for machine in self.server, self.laptop:
            machine.write('/home/joe/.curlrc', 'no-progress-meter\n')
        self.token = None

    def type(self, host, command):
        """(exit code, output) of one command."""
        if command == REBOOT:
            getattr(self, host).reboot()
            return 0, ''
        code, output = getattr(self, host).type(re.sub(r'faas1_[\w.…-]*', lambda _: self.token, command), FOLDER)
        token = re.search(r'faas1_\S+', output)
        self.token = token[0] if token else self.token
        return code, output


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
    def test_the_readme_and_the_tutorial(self):
        pages = [steps(page.read_text()) for page in PAGES]
        self.assertTrue(all(pages), 'a page without a command')
        story = [step for page in pages for step in page]
        self.assertGreater(len(story), 15)
        with boot.lan() as lan:
            stage = Stage(lan)
            for host, fails, command, expected in story:
                with self.subTest(command):
                    code, output = stage.type(host, command)
                    self.assertEqual(plain(expected), plain(output))
                    self.assertEqual(fails, code != 0, output)
            self.assertNotIn('Traceback', stage.server.sh('journalctl --no-pager --unit=faasd'))
            self.is_locked_out(stage)

    def is_locked_out(self, stage):
        """The removed peer's key makes no handshake any more, and its name cannot be had by another key."""
        self.assertNotEqual(0, stage.type('laptop', 'ping -c 1 -W 1 fd00:faa5:0:100::1')[0])
        self.assertEqual('', stage.server.sh('wg show wg0 peers'))
        code, output = stage.type('laptop', './faas vpn connect')
        self.assertNotEqual(0, code, output)
        self.assertEqual('', stage.server.sh('wg show wg0 peers'))


if __name__ == '__main__':
    unittest.main()
