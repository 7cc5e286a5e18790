"""deps.sh in a host of its own, against stand-ins for apt-get, sudo, go and curl."""
import hashlib
import re
import subprocess
import unittest

from tests import lab

RECORD = '#!/bin/sh\necho "$0 $*" >>/tmp/calls\n'
# Puts down, for each package it is told to install, the program that deps.sh looks for.
APT_GET = RECORD + '''
case "$*" in *--simulate*) [ -e /tmp/lists ]; exit ;; *update*) : >/tmp/lists; exit ;; esac
[ -e /tmp/lists ] || exit 100
for package; do
    case $package in
        wireguard-tools) program=/usr/bin/wg ;; runc) program=/usr/sbin/runc ;; nftables) program=/usr/sbin/nft ;;
        iputils-ping) program=/usr/bin/ping ;; *) continue ;;
    esac
    printf '#!/bin/sh\\n' >$program; chmod +x $program
done
'''
COREDNS = '#!/bin/sh\necho CoreDNS-{}; echo linux/amd64, go1.26\n'
GO = RECORD + '''
case "$*" in
    "env GOVERSION") echo go{version} ;;
    "env GOTOOLCHAIN") echo {toolchain} ;;
    install*) printf '#!/bin/sh\\necho CoreDNS-1.15.0\\n' >$GOBIN/coredns; chmod +x $GOBIN/coredns ;;
esac
'''


@lab.needs_root
class Deps(unittest.TestCase):
    """The stand-ins lie in the host's overlay over /usr, so the script is run as it is."""

    @classmethod
    def setUpClass(cls):
        # Without what the user of this machine put on PATH: a coredns, a go.
        cls.path = {'PATH': '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'}

    def setUp(self):
        self.host = self.enterContext(lab.Host('fresh'))
        self.host.run(['rm', '-rf', '/usr/local/go'])
        self.put('/usr/local/bin/coredns', COREDNS.format('1.12.0'))
        for program in ('wg', 'runc', 'nft', 'ping', 'curl', 'wireguard-go', 'ip', 'zstd'):
            self.put(f'/usr/local/sbin/{program}', '#!/bin/sh\n')
        self.put('/usr/bin/apt-get', APT_GET)

    def put(self, path, text):
        file = self.host.path(path)
        file.unlink(missing_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    def take(self, *programs):
        self.host.run(['rm', '-f', *(f'{folder}/{each}' for each in programs
                                     for folder in ('/usr/local/sbin', '/usr/local/bin', '/usr/sbin', '/usr/bin'))])

    def deps(self, ok=(0,), argv=('./deps.sh',)):
        return self.host.run(argv, env=self.path, ok=ok)

    def calls(self):
        try:
            return self.host.path('/tmp/calls').read_text().splitlines()
        except FileNotFoundError:
            return []

    def test_silent_when_nothing_is_missing(self):
        done = self.deps()
        self.assertEqual(('', '', []), (done.stdout, done.stderr, self.calls()))

    def test_says_what_it_installs_and_leaves_recommended_packages_out(self):
        self.take('wg', 'runc', 'nft', 'ping')
        self.host.path('/tmp/lists').touch()
        first, *_ = self.deps().stdout.splitlines()
        self.assertEqual('deps: installing the packages wireguard-tools runc nftables iputils-ping', first)
        for call in self.calls():
            self.assertIn('--no-install-recommends', call)
        self.assertFalse(any('update' in call for call in self.calls()), 'the lists were there')
        self.assertEqual('', self.deps().stdout)

    def test_what_only_the_tests_need(self):
        self.take('java', 'dig', 'go')
        self.host.path('/tmp/lists').touch()
        self.assertEqual('', self.deps().stdout)
        first, *_ = self.deps(argv=('./deps.sh', 'test')).stdout.splitlines()
        self.assertEqual('deps: installing the packages bind9-dnsutils default-jdk-headless golang-go', first)

    def test_what_only_lint_needs(self):
        self.take('runc', 'coredns', 'shellcheck')
        self.put('/usr/local/sbin/python3', '#!/bin/sh\nexit 1\n')
        self.host.path('/tmp/lists').touch()
        done = self.deps(argv=('./deps.sh', 'lint'))
        self.assertEqual('deps: installing the packages shellcheck python3-venv\n', done.stdout)

    def test_updates_the_lists_when_they_do_not_have_it(self):
        self.take('runc')
        self.deps()
        self.assertEqual(1, sum(call.endswith(' update') for call in self.calls()))

    def test_a_user_needs_sudo(self):
        self.take('runc', 'sudo')
        user = ('setpriv', '--reuid=65534', '--clear-groups', './deps.sh')
        done = self.deps(ok=(1,), argv=user)
        self.assertIn('run it as root, or install sudo', done.stderr)
        self.put('/usr/bin/sudo', RECORD)           # notes what it was asked, and does nothing
        self.host.run(['chmod', '777', '/tmp'])
        self.deps(ok=None, argv=user)
        self.assertTrue(all(call.startswith('/usr/bin/sudo env ') for call in self.calls() if '--simulate' not in call))

    def test_coredns_is_built_where_go_is_new_enough_or_can_become_so(self):
        for version, toolchain, built in (('1.26.8', 'local', True), ('1.22.2', 'auto', True),
                                          ('1.22.2', 'local', False), ('1.19.8', 'auto', False)):
            with self.subTest(version=version, toolchain=toolchain):
                self.take('coredns')
                self.put('/usr/local/bin/go', GO.format(version=version, toolchain=toolchain))
                self.put('/usr/local/sbin/curl', RECORD + 'exit 22\n')
                self.host.path('/tmp/calls').unlink(missing_ok=True)
                self.deps(ok=(0,) if built else (1,))
                self.assertEqual(built, any('go install github.com/coredns/coredns@v1.15.0' in call
                                            for call in self.calls()))
                self.assertEqual(not built, any('curl' in call for call in self.calls()))

    def test_an_old_coredns_is_not_enough(self):
        self.put('/usr/local/bin/coredns', COREDNS.format('1.8.6'))
        self.put('/usr/local/bin/go', GO.format(version='1.26', toolchain='local'))
        self.assertIn('CoreDNS 1.15.0 is /usr/local/bin/coredns', self.deps().stdout)
        self.assertEqual('', self.deps().stdout)

    def test_one_that_others_could_write_is_copied(self):
        self.take('coredns')
        self.put('/root/coredns', COREDNS.format('1.12.0'))
        self.host.run(['./deps.sh'], env={'PATH': f'/root:{self.path["PATH"]}'})
        self.assertEqual(0o755, self.host.path('/usr/local/bin/coredns').stat().st_mode & 0o7777)
        self.assertEqual('', self.deps().stdout)

    def test_a_fetched_archive_must_have_its_digest(self):
        self.take('coredns', 'go')
        curl = RECORD + 'while [ $# -gt 1 ]; do [ "$1" != -o ] || cp /tmp/archive.tgz "$2"; shift; done\n'
        self.put('/usr/local/sbin/curl', curl)
        self.put('/tmp/coredns', COREDNS.format('1.14.6'))
        self.host.run(['tar', '-czf', '/tmp/archive.tgz', '-C', '/tmp', 'coredns'])
        self.assertIn('is not what was published: not used', self.deps(ok=(1,)).stderr)
        self.assertFalse(self.host.path('/usr/local/bin/coredns').exists())

        digest = hashlib.sha256(self.host.path('/tmp/archive.tgz').read_bytes()).hexdigest()
        script = (lab.REPO / 'deps.sh').read_text()
        self.put('/tmp/deps.sh', re.sub(r'(COREDNS_SHA256_\w+=)\w+', rf'\g<1>{digest}', script))
        self.deps(argv=('/tmp/deps.sh',))
        self.assertIn('CoreDNS-1.14.6', self.host.run(['/usr/local/bin/coredns', '-version']).stdout)
        self.assertEqual([], list(self.host.path('/var/tmp').glob('faasd-deps*')))

    def test_it_is_a_posix_script(self):
        subprocess.run(['sh', '-n', lab.REPO / 'deps.sh'], check=True)
