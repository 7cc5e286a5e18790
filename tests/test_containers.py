"""What a function can see and do in its real container, what its limits do, and that nothing of it remains."""

import glob
import json
import os
import pathlib
import select
import signal
import unittest
import unittest.mock

from handlers.containers import bundle, containers
from host import process
from tests import inside, lab

# Numbers of x86_64 and, where they differ, of arm64; both are tried by their own kernel's table.
SYSCALLS = {
    'x86_64': {'mount': 165, 'unshare': 272, 'ptrace': 101, 'setns': 308, 'bpf': 321, 'keyctl': 250, 'open_tree': 428}
    | {'io_uring_setup': 425, 'clone3': 435, 'userfaultfd': 323, 'perf_event_open': 298, 'umount2': 166, 'clone': 56},
    'aarch64': {'mount': 40, 'unshare': 97, 'ptrace': 117, 'setns': 268, 'bpf': 280, 'keyctl': 219, 'open_tree': 428}
    | {'io_uring_setup': 425, 'clone3': 435, 'userfaultfd': 282, 'perf_event_open': 241, 'umount2': 39, 'clone': 220},
}[os.uname().machine]

SOCKET = {'x86_64': 41, 'aarch64': 198}[os.uname().machine]
SOCKETPAIR = {'x86_64': 53, 'aarch64': 199}[os.uname().machine]
OPEN_TREE_ATTR = 467  # Linux 6.15: open_tree and mount_setattr in one

STATUS = 'dict(line.rstrip("\\n").split(":\\t", 1) for line in open("/proc/self/status"))'


class Sees(inside.InHost):
    """One instance answers all of these."""

    def run_in(self, *expressions):
        with inside.prepared() as them, inside.Expressions(them, 'hello') as instance:
            instance.wait_up()
            return [instance.eval(each) for each in expressions]

    def values(self, *expressions):
        answers = self.run_in(*expressions)
        for expression, (how, value) in zip(expressions, answers, strict=True):
            self.assertEqual('ok', how, f'{expression}: {value}')
        return [value for _, value in answers]

    @inside.inside
    def test_its_own_small_world(self):
        pathlib.Path('/run/secret').write_text('x')
        pathlib.Path('/var/lib/secret').write_text('x')
        root, run, var, function, host, pids, me, links, mounts = self.values(
            'sorted(os.listdir("/"))',
            'os.listdir("/run")',
            'os.listdir("/var")',
            'os.listdir("/function")',
            'socket.gethostname()',
            'sorted(int(name) for name in os.listdir("/proc") if name.isdigit())',
            'os.getpid()',
            'os.listdir("/sys")',
            'open("/proc/self/mountinfo").read().splitlines()',
        )
        self.assertLessEqual(
            set(root),
            {'bin', 'sbin', 'lib', 'lib32', 'lib64', 'libx32', 'control.sock', 'dev', 'etc', 'function', 'opt'}
            | {'proc', 'run', 'sys', 'tmp', 'usr', 'var'},
        )
        self.assertEqual(([], ['run', 'tmp'], []), (run, sorted(var), links))
        self.assertEqual(['handler.py'], function)
        self.assertEqual('hello', host)
        self.assertEqual((pids[-1], 1), (me, pids[0]))
        self.assertLessEqual(len(pids), 2)
        writable = {line.split()[4] for line in mounts if line.split()[5].startswith('rw')}
        self.assertLessEqual(writable, {'/proc', '/dev', '/dev/shm', '/run', '/tmp'} | hidden(mounts))

    @inside.inside
    def test_nothing_of_the_host(self):
        before = pathlib.Path('/etc/shadow').read_text()
        self.assertIn('root', before)
        answers = self.run_in(
            'open("/etc/shadow").read()',
            'open("/root/.profile").read()',
            'os.listdir("/var/lib/faasd")',
            'os.listdir("/home")',
            'open("/proc/1/environ").read()',
            'open("/proc/kcore", "rb").read(1)',
            'open("/usr/x", "w")',
            'open("/function/x", "w")',
            'open("/x", "w")',
            'open("/etc/passwd", "a")',
            'open("/opt/faas/runtime.py", "a")',
            'open("/proc/sys/kernel/hostname", "w").write("x")',
            'open("/proc/sysrq-trigger", "w").write("h")',
            'os.mknod("/tmp/null", 0o020666, os.makedev(1, 3)) or open("/tmp/null")',
        )
        for answer in answers[:4]:
            self.assertEqual(['OSError', 'ENOENT'], answer)
        self.assertNotIn('secret', str(answers[4]))
        self.assertIn(answers[5], (['ok', "b''"], ['OSError', 'EACCES'], ['OSError', 'ENOENT']))
        for answer in answers[6:]:
            self.assertEqual('OSError', answer[0], answers)

    @inside.inside
    def test_no_network_but_what_it_was_handed(self):
        links, routes, connect, local = self.run_in(
            'open("/proc/net/dev").read().splitlines()[2:]',
            'open("/proc/net/ipv6_route").read().splitlines()',
            'socket.create_connection(("203.0.113.20", 80), timeout=1)',
            'socket.create_connection(("::1", 8080), timeout=1)',
        )
        self.assertEqual(['lo'], [line.split(':')[0].strip() for line in links[1]])
        self.assertEqual('OSError', connect[0])
        self.assertEqual('OSError', local[0])
        self.assertEqual('ok', routes[0])

    @inside.inside
    def test_no_capability_no_new_privileges_and_a_filter(self):
        status, uid_map, gid_map, uid, groups, limit, core = self.values(
            STATUS,
            'open("/proc/self/uid_map").read().split()',
            'open("/proc/self/gid_map").read().split()',
            '(os.getuid(), os.getgid())',
            'os.getgroups()',
            '__import__("resource").getrlimit(7)',
            '__import__("resource").getrlimit(4)',
        )
        for kind in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb'):
            self.assertEqual(0, int(status[kind], 16), kind)
        self.assertEqual(('1', '2'), (status['NoNewPrivs'], status['Seccomp']))
        for ids in (uid_map, gid_map):
            self.assertEqual(('0', '1'), (ids[0], ids[2]))
            self.assertGreaterEqual(int(ids[1]), 0x70000000)
        self.assertEqual([0, 0], uid)
        self.assertEqual([], [group for group in groups if group != 65534])
        self.assertEqual([0, 0], core)
        self.assertLessEqual(limit[1], 8192)

    @inside.inside
    def test_ways_to_more_kernel_are_refused(self):
        new = {'mnt': 0x20000, 'user': 0x10000000, 'net': 0x40000000, 'pid': 0x20000000, 'cgroup': 0x2000000}
        answers = self.run_in(
            *(
                f'syscall({number}, 0, 0, 0, 0, 0)'
                for name, number in SYSCALLS.items()
                if name not in ('clone', 'clone3')
            ),
            *(f'syscall({SYSCALLS["clone"]}, {flag | 17}, 0, 0, 0, 0)' for flag in new.values()),
            f'syscall({SYSCALLS["unshare"]}, {new["user"]})',
            'os.setuid(1)',
            'os.chroot("/tmp")',
            'os.sethostname("x") if hasattr(os, "sethostname") else socket.sethostname("x")',
        )
        self.assertEqual([['OSError', 'EPERM']] * (len(answers) - 3), answers[:-3])
        self.assertEqual({'OSError'}, {how for how, _ in answers[-3:]})
        self.assertEqual([['OSError', 'ENOSYS']], self.run_in(f'syscall({SYSCALLS["clone3"]}, 0, 0)'))

    @inside.inside
    def test_no_family_of_sockets_but_those_that_namespaces_confine(self):
        with inside.prepared() as them, inside.Expressions(them) as instance:
            instance.wait_up()
            for family in range(48):
                for upper_half in (0, 1 << 32):
                    argument = f'ctypes.c_ulong({family | upper_half})'
                    made = instance.eval(f'os.close(syscall({SOCKET}, {argument}, socket.SOCK_DGRAM, 0))')
                    if family in (1, 2, 10, 16):
                        self.assertNotEqual(['OSError', 'EAFNOSUPPORT'], made, family)
                    else:
                        self.assertEqual(['OSError', 'EAFNOSUPPORT'], made, family)

    @inside.inside
    def test_of_netlink_only_what_lists_interfaces(self):
        others = 1, 2, 4, 9, 16, 21
        answers = self.run_in(*(f'syscall({SOCKET}, 16, socket.SOCK_RAW, {protocol})' for protocol in others))
        self.assertEqual([['OSError', 'EPROTONOSUPPORT']] * len(others), answers)
        self.assertEqual([['lo']], self.values('[name for _, name in socket.if_nameindex()]'))

    @inside.inside
    def test_no_pair_but_of_unix_sockets_and_nothing_newer_than_the_filter(self):
        pair = 'ctypes.create_string_buffer(8)'
        answers = self.run_in(
            *(f'syscall({SOCKETPAIR}, {family}, {kind}, 0, {pair})' for family in (2, 30, 40) for kind in (1, 5)),
            f'syscall({OPEN_TREE_ATTR}, -1, {pair}, 0, {pair}, 0)',
            'syscall(2000)',
        )
        self.assertEqual([['OSError', 'EAFNOSUPPORT']] * 6 + [['OSError', 'ENOSYS']] * 2, answers)
        self.assertEqual([True], self.values('len(socket.socketpair()) == 2'))

    @inside.inside
    def test_a_passed_sockets_ioctls_are_refused_whatever_their_upper_half_is(self):
        ioctl = {'x86_64': 16, 'aarch64': 29}[os.uname().machine]
        buffer = 'ctypes.create_string_buffer(4096)'
        answers = self.run_in(
            f'__import__("fcntl").ioctl(connection, 0x8912, {buffer})',  # SIOCGIFCONF
            f'__import__("fcntl").ioctl(connection, 0x8927, {buffer})',
            f'syscall({ioctl}, connection.fileno(), ctypes.c_ulong(0x100008912), {buffer})',
            f'syscall({ioctl}, connection.fileno(), ctypes.c_ulong(0x89ff), {buffer})',
            f'syscall({ioctl}, connection.fileno(), ctypes.c_ulong(0x8900), {buffer})',
        )
        self.assertEqual([['OSError', 'EPERM']] * 5, answers)
        (unread,) = self.values('__import__("fcntl").ioctl(connection, 0x541B, bytes(4))[0]')  # FIONREAD passes
        self.assertEqual(0, unread)

    @inside.inside
    def test_it_can_write_to_tmp_start_programs_and_use_threads(self):
        tmp, out, thread, shm, null, home = self.values(
            'open("/tmp/x", "w").write("text") and open("/var/tmp/x").read()',
            'subprocess.run(["sh", "-c", "echo $0 $HOME; id -u"], capture_output=True, text=True).stdout',
            '__import__("concurrent.futures").futures.ThreadPoolExecutor().submit(os.getpid).result() == os.getpid()',
            '__import__("multiprocessing").Lock().acquire()',
            'open("/dev/null", "w").write("x") and len(open("/dev/urandom", "rb").read(5))',
            'os.path.expanduser("~")',
        )
        self.assertEqual(('text', 'sh /tmp\n0\n', True, True, 5, '/tmp'), (tmp, out, thread, shm, null, home))

    @inside.inside
    def test_tmp_is_bounded_and_not_executable(self):
        answers = self.run_in(
            'open("/tmp/big", "wb").write(bytes(80 << 20))',
            'open("/tmp/run", "w").write("#!/bin/sh\\n") and os.chmod("/tmp/run", 0o755)',
            'subprocess.run(["/tmp/run"])',
        )
        self.assertEqual([['OSError', 'ENOSPC'], ['ok', None], ['OSError', 'EACCES']], answers)

    @inside.inside
    def test_no_descriptor_of_the_daemon_is_in_it(self):
        (fds,) = self.values(
            '{fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")'
            ' if os.path.lexists(f"/proc/self/fd/{fd}")}'
        )
        kinds = sorted(target.partition(':')[0] for target in fds.values())
        self.assertEqual(
            {'/dev/null', 'anon_inode', 'pipe', 'socket'}, {each for each in kinds if not each.startswith('/proc')}
        )
        self.assertEqual(2, kinds.count('socket'))  # the channel and this connection


class Life(inside.InHost):
    @staticmethod
    def cgroups(them):
        return glob.glob(f'/sys/fs/cgroup/{them.prefix}') + glob.glob(f'/sys/fs/cgroup/*/{them.prefix}')

    def check_nothing_remains(self, them, ids=()):
        self.assertEqual([], self.cgroups(them))
        for ident in ids:
            self.assertEqual([], glob.glob(f'/sys/fs/cgroup/**/{ident}', recursive=True))
        self.assertEqual([], os.listdir('/run/faasd'))
        self.assertNotIn('/run/faasd', pathlib.Path('/proc/self/mountinfo').read_text())

    @inside.inside
    def test_two_instances_have_different_ids_and_slots_are_used_again(self):
        with inside.prepared() as them:
            seen = set()
            for _ in range(2):
                with inside.Expressions(them) as one, inside.Expressions(them) as two:
                    for each in (one, two):
                        uid = int(each.wait_up().value('open("/proc/self/uid_map").read().split()[1]'))
                        self.assertEqual(uid, os.stat(f'/proc/{each.pid}').st_uid)
                        seen.add(uid)
            self.assertEqual({0x70000000 + bundle.ID_RANGE, 0x70000000 + 2 * bundle.ID_RANGE}, seen)
            self.assertEqual(set(), them._slots)

    @inside.inside
    def test_nothing_remains_after_close(self):
        inside.injector()  # it stays
        before = sorted(os.listdir('/proc/self/fd'))
        with inside.prepared() as them:
            self.assertEqual({'image', 'instances', 'private', 'rootfs'}, set(os.listdir('/run/faasd')))
            with inside.Expressions(them) as instance:
                instance.wait_up()
                ident = instance.container.ident
                self.assertTrue(self.cgroups(them))
                record = json.loads(pathlib.Path(f'/run/faasd/instances/{ident}/record.json').read_text())
                self.assertEqual(('test', 1, instance.pid), (record['function'], record['revision'], record['pid']))
                self.assertEqual(process.start_time(instance.pid), record['start_time'])
        self.check_nothing_remains(them, [ident])
        self.assertEqual(before, sorted(os.listdir('/proc/self/fd')))

    @inside.inside
    def test_what_a_killed_run_left_is_removed_by_the_next(self):
        with inside.prepared() as them:
            instances = [self.stack.enter_context(inside.Expressions(them)).wait_up() for _ in range(2)]
            again = containers.Containers(them.prefix, inside.LIMITS)  # as a new daemon on the same records
            again.prepare()
            # They have ended, and what is left of them is removed after functions are served.
            for instance in instances:
                self.assertTrue(select.select([instance.container.pidfd], [], [], 0)[0])
            self.assertEqual(2, len(os.listdir('/run/faasd/instances')))
            self.assertEqual(2, len(again._slots))  # nobody gets their ids before
            again.remove_leftovers()
            lab.wait_until(lambda: not again._leftovers, 10, 'their folders to go')
            self.assertEqual([], os.listdir('/run/faasd/instances'))
            self.assertEqual(set(), again._slots)
            for instance in instances:
                self.assertEqual('ended by SIGKILL', instance.wait_end())
            with inside.Expressions(again) as instance:
                self.assertEqual(3, instance.wait_up().value('1 + 2'))
        self.check_nothing_remains(them)

    @inside.inside
    def test_another_servers_containers_are_left_alone(self):
        with inside.prepared(run_dir='/run/other', name='-other') as other, inside.Expressions(other) as instance:
            instance.wait_up()
            with inside.prepared():
                pass
            self.assertEqual(3, instance.value('1 + 2'))

    @inside.inside
    def test_a_container_that_cannot_start_leaves_nothing(self):
        with inside.prepared() as them:
            for attempt in range(3):
                with open('/dev/null', 'w') as null, self.assertRaises(containers.ContainerError) as caught:
                    them.start('test', 1, inside.SPEC, '/no/such/folder', null.fileno(), null.fileno())
                if attempt == 0:  # the user namespace of that range of ids is kept
                    before = sorted(os.listdir('/proc/self/fd'))
                self.assertIn('/no/such/folder', str(caught.exception))
                self.assertNotIn('\n', str(caught.exception))
            self.assertEqual(([], set()), (os.listdir('/run/faasd/instances'), them._slots))
            self.assertEqual(before, sorted(os.listdir('/proc/self/fd')))
            os.environ['PATH'] = '/nowhere'
            with open('/dev/null', 'w') as null, self.assertRaisesRegex(containers.ContainerError, 'not installed'):
                them.start('test', 1, inside.SPEC, '/tmp', null.fileno(), null.fileno())
            os.environ['PATH'] = lab.environment()['PATH']
        self.check_nothing_remains(them)

    @inside.inside
    def test_everything_in_it_dies_with_its_first_process(self):
        with inside.prepared() as them, inside.Expressions(them) as instance:
            instance.wait_up().value('subprocess.Popen(["setsid", "sleep", "12345"]).pid')
            lab.wait_until(lambda: b'12345' in self.processes(), 5, 'its child')
            instance.container.kill()
            instance.wait_end()
            self.assertNotIn(b'12345', self.processes())

    @staticmethod
    def processes():
        return process.run(['ps', '-eo', 'args']).stdout.encode()

    @inside.inside
    def test_why_it_ended_is_told(self):
        with inside.prepared() as them:
            for source, reason in (
                ('import sys; sys.exit(3)', 'ended with exit code 1'),
                ('import os; os._exit(7)', 'ended with exit code 7'),
                ('import os; os.kill(os.getpid(), 11)', f'ended by {signal.Signals(11).name}'),
            ):
                with inside.Instance(them, source) as instance:
                    self.assertEqual(reason, instance.wait_end())


def hidden(mounts):
    """What runc mounts over single files: device nodes where it may not make them, and masks."""
    return {line.split()[4] for line in mounts if line.split()[4].startswith(('/dev/', '/proc/'))}


if __name__ == '__main__':
    unittest.main()
