"""What faasd and CoreDNS may do as services: all that they need, and nothing else. On a machine booted with systemd."""

import ctypes
import json
import re
import unittest

from handlers.containers import seccomp
from tests import boot, images, lab, programs

# An image with what takes privileges to keep and to remove: files of several owners, a sticky folder, and a folder with
# the setgid bit that the container writes to.
PAGE = 'cd /shared; touch new; /busybox stat -c %a . >index.html; exec /busybox httpd -f -p [::]:80'
MEMBERS = (
    ('tmp/', None, {'mode': 0o1777, 'uid': 33}),
    ('tmp/x', b'x', {'mode': 0o600, 'uid': 34}),
    ('locked/', None, {'mode': 0o700, 'uid': 35}),
    ('locked/y', b'x', {'mode': 0, 'uid': 36}),
    ('shared/', None, {'mode': 0o2777, 'gid': 50}),
)
# Each must work under the unit. They run in this order.
STEPS = {
    'start': 'systemctl restart faasd',
    'folder': 'faas new fibonacci && curl -sg --max-time 10 "http://[$(faas ip fibonacci)]/?n=10" | grep 34',
    'image': 'faas new image image.tar && curl -sg --max-time 10 "http://[$(faas ip image)]/" | grep 2777',
    'handover': 'systemctl restart faasd && curl -sg --max-time 10 "http://[$(faas ip image)]/" | grep 2777',
    'removal': 'faas rm fibonacci',
    'removal of the image': 'faas rm image && '
    'timeout 2 sh -c "while ls -A /var/lib/faasd/layers | grep -v id_base; do sleep 0.1; done"',
    'peers': 'faas vpn invite laptop && faas vpn rm laptop',
    'health': 'curl -s --unix-socket /run/faasd/faasd.sock http://faasd/api/health | grep -F \'"problems": []\'',
}
# Without the capability the last of these steps fails, and those before it do not.
NEEDED = {
    'CAP_CHOWN': ['start'],
    'CAP_DAC_OVERRIDE': ['start', 'folder'],
    'CAP_FOWNER': ['start', 'image', 'removal of the image'],
    'CAP_NET_ADMIN': ['start'],
    'CAP_NET_BIND_SERVICE': ['start'],
    'CAP_SETGID': ['start'],
    'CAP_SETUID': ['start'],
    'CAP_SYS_ADMIN': ['start'],
    'CAP_SYS_CHROOT': ['start', 'folder'],
    'CAP_SYS_PTRACE': ['start', 'folder'],
}
# What a service of root's could do to the machine by a system call. The arguments are bad: nothing can happen.
TOO_MUCH = (
    'acct', 'add_key', 'clock_settime', 'delete_module', 'finit_module', 'init_module', 'io_uring_setup', 'ioperm',
    'iopl', 'kexec_load', 'keyctl', 'open_by_handle_at', 'perf_event_open', 'quotactl', 'reboot', 'settimeofday',
    'swapoff', 'swapon', 'syslog', 'userfaultfd',
)  # fmt: skip
ATTACK = """
import ctypes, errno, json, sys
libc = ctypes.CDLL(None, use_errno=True)
answers = {}
for name, number in json.loads(sys.argv[1]).items():
    libc.syscall(number, *[ctypes.c_ulong(-1)] * 5)
    answers[name] = errno.errorcode[ctypes.get_errno()]
open('/run/faasd/attack', 'w').write(json.dumps(answers))
"""
library = ctypes.CDLL('libseccomp.so.2')


def number_of(name):
    return library.seccomp_syscall_resolve_name(name.encode())


class Documented(unittest.TestCase):
    def test_the_table_of_capabilities(self):
        table = (lab.REPO / 'docs/INSTALL.md').read_text().partition('| capability |')[2].partition('\n\n')[0]
        self.assertEqual(list(NEEDED), re.findall(r'^\| `(CAP_\w+)`', table, re.MULTILINE))


@lab.needs_root
class Service(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.machine = boot.Machine(cls.enterClassContext(boot.lan()), 'server', boot.SERVER)
        cls.machine.copy(lab.REPO, 'faasd')
        code, output = cls.machine.type('sudo make install FAAS_VPN_ENDPOINT=faas.example.com', 'faasd')
        assert code == 0, output
        busybox = 'busybox', programs.static_busybox().read_bytes(), {'mode': 0o755}
        sh = 'bin/sh', '/busybox'
        archive = images.image([images.layer(busybox, sh, *MEMBERS)], {'Cmd': ['/bin/sh', '-c', PAGE], 'User': '33'})
        cls.machine.lan.path(f'{cls.machine.root}/root/image.tar').write_bytes(archive)
        # The machine's own file system, an overlay, cannot map ids.
        cls.machine.sh('systemctl stop faasd; mount -t tmpfs -o mode=711 state /var/lib/faasd')

    def with_lines(self, *lines):
        """The unit with these lines, from the next start on."""
        text = '\n'.join(['[Service]', 'Restart=no', *lines, ''])
        self.machine.write('/etc/systemd/system/faasd.service.d/test.conf', text)
        self.machine.sh('systemctl daemon-reload')

    def first_failure(self, steps):
        """(the first of the steps that fails, its output), or (None, '')."""
        for step in steps:
            done = self.machine.run(['sh', '-c', STEPS[step]], ok=None)
            if done.returncode:
                return step, done.stdout + done.stderr
        return None, ''

    def shown(self, unit, name):
        return self.machine.sh(f'systemctl show --property={name} --value {unit}').split()

    def test_each_capability_is_needed_and_no_other(self):
        self.assertEqual(set(NEEDED), {each.upper() for each in self.shown('faasd', 'CapabilityBoundingSet')})
        self.with_lines()
        self.assertEqual((None, ''), self.first_failure(STEPS))
        for capability, steps in NEEDED.items():
            with self.subTest(capability):
                self.with_lines(f'CapabilityBoundingSet=~{capability}')
                failed, output = self.first_failure(steps)
                self.assertEqual(steps[-1], failed, output)

    def test_system_calls_that_change_the_machine_do_not_exist_for_it(self):
        self.machine.write('/root/attack.py', ATTACK)
        numbers = json.dumps({name: number_of(name) for name in TOO_MUCH}).replace('"', '\\"').replace(' ', '')
        attack = f'ExecStartPre=/usr/bin/python3 -c "exec(open(0).read())" {numbers}'
        self.with_lines(attack, 'StandardInput=file:/root/attack.py')
        self.machine.sh('systemctl restart faasd')
        answers = json.loads(self.machine.sh('cat /run/faasd/attack'))
        self.assertEqual(dict.fromkeys(TOO_MUCH, 'ENOSYS'), answers)

    def test_containers_are_refused_nothing_by_the_filter_of_the_service(self):
        allowed = set(self.shown('faasd', 'SystemCallFilter'))
        rules = [rule for rule in seccomp.IMAGE['syscalls'] if rule['action'] == 'SCMP_ACT_ALLOW']
        wanted = {'listen'}.union(*(rule['names'] for rule in rules))
        self.assertEqual(set(), {name for name in wanted if number_of(name) >= 0} - allowed)

    def test_coredns_is_nobody_and_can_only_bind(self):
        pid = self.machine.sh('systemctl show --property=MainPID --value faas-coredns').strip()
        status = dict(re.findall(r'(\w+):[ \t]*(.*)', self.machine.sh(f'cat /proc/{pid}/status')))
        bind = f'{1 << 10:016x}'
        self.assertEqual([bind] * 3, [status[kind] for kind in ('CapBnd', 'CapEff', 'CapPrm')])
        self.assertNotIn('0', status['Uid'].split())
        self.assertEqual(('1', '2'), (status['NoNewPrivs'], status['Seccomp']))


if __name__ == '__main__':
    unittest.main()
