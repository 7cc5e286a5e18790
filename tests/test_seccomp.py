"""The seccomp filters, loaded by libseccomp into a process without privileges: what is refused there, and how."""

import ctypes
import errno
import json
import os
import platform
import signal
import socket
import traceback
import unittest

from handlers.containers import seccomp

PR_SET_NO_NEW_PRIVS = 38
ACTIONS = {'SCMP_ACT_ALLOW': 0x7FFF0000, 'SCMP_ACT_ERRNO': 0x00050000}
OPERATORS = {'SCMP_CMP_NE': 1, 'SCMP_CMP_EQ': 4, 'SCMP_CMP_MASKED_EQ': 7}
PROFILES = {'folder': seccomp.FOLDER, 'image': seccomp.IMAGE}
NEWEST = 452  # fchmodat2, of Linux 6.6: the highest number of the list
CHECKED = ('clone', 'ioctl', 'personality', 'ptrace', 'setsockopt', 'socket', 'socketpair')
TIPC, VSOCK = 30, 40
UPROBES = (335, 336)  # x86_64: Linux 6.14 and newer do not filter them, and kill who calls them without a probe

library = ctypes.CDLL('libseccomp.so.2')
library.seccomp_init.restype = ctypes.c_void_p
libc = ctypes.CDLL(None, use_errno=True)


class Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = [('arg', ctypes.c_uint), ('op', ctypes.c_int), ('one', ctypes.c_uint64), ('two', ctypes.c_uint64)]


def number_of(name):
    """The number of a system call; negative when this machine or libseccomp has none of that name."""
    return library.seccomp_syscall_resolve_name(name.encode())


def action_of(rule):
    return ACTIONS[rule['action']] | rule.get('errnoRet', 0)


def load(profile):
    """Put the filter on this process, as the OCI runtime does. It leaves out what libseccomp does not know, too."""
    default = ACTIONS[profile['defaultAction']] | profile['defaultErrnoRet']
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))
    for rule in profile['syscalls']:
        conditions = [
            Comparison(each['index'], OPERATORS[each['op']], each['value'], each.get('valueTwo', 0))
            for each in rule.get('args', ())
        ]
        array = (Comparison * len(conditions))(*conditions)
        for number in map(number_of, rule['names']):
            if number != -1:
                done = library.seccomp_rule_add_array(
                    context, ctypes.c_uint32(action_of(rule)), number, len(conditions), array
                )
                assert done in (0, -errno.EDOM, -errno.EINVAL), (rule, done)
    assert library.seccomp_load(context) == 0


def under(profile, function):
    """What function() returns in a process of nobody's that has the filter."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(30)
            if os.getuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            load(profile)
            answer = function()
        except BaseException:
            answer = traceback.format_exc()
        with open(writer, 'w') as file:
            json.dump(answer, file)
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        answer = json.load(file)
    os.waitpid(child, 0)
    return answer


def call(number, *args):
    """The name of the error with which a system call fails; None if it does not. Without arguments: bad pointers."""
    args = args or (-1,) * 6
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_ulong, args))
    return errno.errorcode[ctypes.get_errno()] if result == -1 else None


class Filters(unittest.TestCase):
    def each(self, function):
        """Both kinds of container, and what function() returns in them."""
        for kind, profile in PROFILES.items():
            with self.subTest(kind):
                yield kind, under(profile, function)

    def test_what_is_refused_says_so_and_what_stands_in_no_list_does_not_exist(self):
        named = {
            'folder': (*seccomp.REFUSED_SYSCALLS, *seccomp.REFUSED_TO_FOLDERS),
            'image': seccomp.REFUSED_SYSCALLS,
        }
        allowed = {number_of(name) for name in (*seccomp.ALLOWED_SYSCALLS, *CHECKED, 'listen')}
        unlisted = [number for number in range(600) if number not in (*allowed, *UPROBES)]
        for kind, answers in self.each(lambda: {number: call(number) for number in unlisted}):
            refused = {number_of(name) for name in named[kind]} - {-1}
            for number, answer in answers.items():
                wanted = 'EPERM' if int(number) in refused else 'ENOSYS'
                self.assertEqual(wanted, answer, f'system call {number}')

    def test_a_system_call_that_is_newer_than_the_list_is_no_way_around_it(self):
        # open_tree_attr (Linux 6.15) does what open_tree and mount_setattr do.
        for _, answers in self.each(lambda: [call(number) for number in (467, NEWEST + 200)]):
            self.assertEqual(['ENOSYS', 'ENOSYS'], answers)

    def test_socketpair_makes_unix_sockets_only(self):
        number = number_of('socketpair')

        def families():
            pair = (ctypes.c_int * 2)()
            kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
            return {
                f'{family} {kind} {upper}': call(number, family | upper, kind, 0, ctypes.addressof(pair))
                for family in range(48) for kind in kinds for upper in (0, 1 << 32)
            }

        for _, answers in self.each(families):
            for what, answer in answers.items():
                self.assertEqual(None if what.startswith('1 ') else 'EAFNOSUPPORT', answer, what)

    def test_arguments_that_are_checked_are_refused_by_the_error_that_fits(self):
        clone, ptrace, personality = map(number_of, ('clone', 'ptrace', 'personality'))

        def attacks():
            return [
                call(clone, seccomp.CLONE_NEW & 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0),
                call(number_of('socket'), VSOCK, socket.SOCK_STREAM, 0),
                call(number_of('socket'), TIPC, socket.SOCK_SEQPACKET, 0),
                call(number_of('ioctl'), 0, 1 << 32 | 0x8912, 0),
                call(number_of('setsockopt'), 0, 1, 51, 0, 0),
                call(personality, 0x0040000),  # ADDR_NO_RANDOMIZE: too many rules would say EPERM
                call(ptrace, 0, 0, 0, 0),
                call(personality, 0xFFFFFFFF),
            ]

        for _, answers in self.each(attacks):
            self.assertEqual(
                ['EPERM', 'EAFNOSUPPORT', 'EAFNOSUPPORT', 'EPERM', 'EPERM', 'ENOSYS', 'EPERM', None], answers
            )

    def test_only_images_trace(self):
        seize = 0x4206, os.getpid(), 0, 0  # the parent, which nobody may trace

        def names():
            return call(number_of('ptrace'), *seize), call(number_of('process_vm_readv'), os.getpid(), 0, 0, 0, 0, 0)

        self.assertEqual(['EPERM', 'EPERM'], under(seccomp.FOLDER, names))
        self.assertEqual([None], [under(seccomp.IMAGE, names)[1]])

    def test_no_name_stands_in_two_lists(self):
        lists = seccomp.ALLOWED_SYSCALLS, seccomp.REFUSED_SYSCALLS, CHECKED
        names = [name for each in lists for name in each]
        self.assertEqual(sorted(set(names)), sorted(names))
        self.assertLessEqual(set(seccomp.REFUSED_TO_FOLDERS), {*seccomp.ALLOWED_SYSCALLS, 'ptrace'})

    @unittest.skipUnless(platform.machine() == 'x86_64', 'the numbers are those of x86_64')
    def test_the_newest_of_the_list(self):
        self.assertLessEqual(max(map(number_of, seccomp.ALLOWED_SYSCALLS)), NEWEST)


if __name__ == '__main__':
    unittest.main()
