"""The seccomp filters of containers (linux.seccomp of the OCI runtime specification, 1.0.2)."""

import platform
from collections.abc import Iterator

EPERM, ENOSYS, EPROTONOSUPPORT, EAFNOSUPPORT = 1, 38, 93, 97
# System calls that Docker's default profile refuses a container without capabilities: they fail with EPERM. One that
# stands in no list fails with ENOSYS, as on a kernel that does not have it, so programs and libraries use an older one.
# fmt: off
REFUSED_SYSCALLS = (
    '_sysctl', 'acct', 'add_key', 'bpf', 'clock_adjtime', 'clock_settime', 'create_module', 'delete_module',
    'fanotify_init', 'finit_module', 'fsconfig', 'fsmount', 'fsopen', 'fspick', 'get_mempolicy', 'init_module',
    'io_uring_enter', 'io_uring_register', 'io_uring_setup', 'ioperm', 'iopl', 'kcmp', 'kexec_file_load', 'kexec_load',
    'keyctl', 'lookup_dcookie', 'mbind', 'migrate_pages', 'mount', 'mount_setattr', 'move_mount', 'move_pages',
    'nfsservctl', 'open_by_handle_at', 'open_tree', 'perf_event_open', 'pivot_root', 'process_madvise', 'query_module',
    'quotactl', 'quotactl_fd', 'reboot', 'request_key', 'set_mempolicy', 'set_mempolicy_home_node', 'setdomainname',
    'sethostname', 'setns', 'settimeofday', 'swapoff', 'swapon', 'syslog', 'sysfs', 'umount2', 'unshare', 'uselib',
    'userfaultfd', 'ustat', 'vhangup',
)
# fmt: on
# A folder has one user, and nothing to trace. The `ptrace` of images is checked below.
REFUSED_TO_FOLDERS = ('name_to_handle_at', 'process_vm_readv', 'process_vm_writev', 'ptrace')
CLONE_NEW = 0x7E020000  # CLONE_NEWNS NEWCGROUP NEWUTS NEWIPC NEWUSER NEWPID NEWNET
# A network namespace does not confine every address family (AF_VSOCK reaches the hypervisor). socketpair() can make
# sockets of other families than AF_UNIX, too (AF_TIPC). The kernel looks only at the lower 32 bits of these arguments.
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
FAMILIES = {'socket': (AF_UNIX, AF_INET, AF_INET6), 'socketpair': (AF_UNIX,)}
NETLINK_ROUTE = 0  # lists interfaces. Other protocols reach more of the kernel
# A passed socket belongs to the host's network namespace: its ioctl requests 0x8900 to 0x89ff list and change the
# interfaces there.
SOCKET_IOCTLS = 0x8900
# A program shares its listener with the daemon, which steers connections between the instances of a function. Instances
# must not steer (SO_ATTACH_REUSEPORT_CBPF, SO_ATTACH_REUSEPORT_EBPF, SO_DETACH_REUSEPORT_BPF) or lock that
# (SO_LOCK_FILTER). A listener that is bound to an interface of the host gets connections before all others
# (SO_BINDTODEVICE, SO_BINDTOIFINDEX).
SOL_SOCKET, REFUSED_OPTIONS = 1, (25, 44, 51, 52, 62, 68)


def refuse(*names: str, errno: int = EPERM, args: list = (), **argument: object) -> dict:
    """A rule that makes system calls fail, if the conditions `args` or the one in `argument` hold."""
    return _rule(names, args, argument) | {'action': 'SCMP_ACT_ERRNO', 'errnoRet': errno}


# What Docker's default profile allows a container without capabilities (moby, profiles/seccomp). Not in the list are
# `clone`, `ioctl`, `personality`, `ptrace`, `setsockopt`, `socket` and `socketpair`, whose arguments are checked below,
# and `listen`. System calls that only 32-bit machines have are left out: the filters are for 64-bit programs.
ALLOWED_SYSCALLS = """
    accept accept4 access adjtimex alarm arch_prctl bind brk cachestat capget capset chdir chmod chown chroot
    clock_getres clock_gettime clock_nanosleep close close_range connect copy_file_range creat dup dup2 dup3
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd
    eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fallocate fanotify_mark fchdir fchmod
    fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat
    fstatfs fsync ftruncate futex futex_waitv futimesat get_robust_list get_thread_area getcpu getcwd getdents
    getdents64 getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid getpriority
    getrandom getresgid getresuid getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid getxattr
    inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents
    io_setup io_submit ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset landlock_restrict_self
    lchown lgetxattr link linkat listxattr llistxattr lremovexattr lseek lsetxattr lstat madvise membarrier memfd_create
    memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap modify_ldt mprotect mq_getsetattr
    mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink mremap msgctl msgget msgrcv msgsnd msync munlock munlockall
    munmap name_to_handle_at nanosleep newfstatat open openat openat2 pause pidfd_getfd pidfd_open pidfd_send_signal
    pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll prctl pread64 preadv preadv2 prlimit64 process_mrelease
    process_vm_readv process_vm_writev pselect6 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv
    recvfrom recvmmsg recvmsg remap_file_pages removexattr rename renameat renameat2 restart_syscall rmdir rseq
    rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
    rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam
    sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam sched_setscheduler
    sched_yield seccomp select semctl semget semop semtimedop sendfile sendmmsg sendmsg sendto set_robust_list
    set_thread_area set_tid_address setfsgid setfsuid setgid setgroups setitimer setpgid setpriority setregid setresgid
    setresuid setreuid setrlimit setsid setuid setxattr shmat shmctl shmdt shmget shutdown sigaltstack signalfd
    signalfd4 splice stat statfs statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time
    timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime
    timerfd_settime times tkill truncate umask uname unlink unlinkat utime utimensat utimes vfork vmsplice wait4 waitid
    write writev
""".split()  # noqa: SIM905
PERSONALITIES = (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)


def allow(*names: str, args: list = (), **argument: object) -> dict:
    """A rule that allows system calls, if the conditions `args` or the one in `argument` hold."""
    return _rule(names, args, argument) | {'action': 'SCMP_ACT_ALLOW'}


def _rule(names, args, argument):
    """A rule with one condition, `argument`, or with several that must all hold."""
    args = [argument] if argument else list(args)
    return {'names': names} | ({'args': args} if args else {})


def masked(index: int, mask: int, value: int) -> dict:
    """The condition that argument `index` of the system call has `value` in the bits of `mask`."""
    return {'index': index, 'value': mask, 'valueTwo': value, 'op': 'SCMP_CMP_MASKED_EQ'}


def all_but(index: int, numbers: list[int], bits: int = 32, prefix: int = 0) -> Iterator[dict]:
    """Conditions. One of them holds if the low 32 bits of argument `index` are not one of the numbers."""
    if not any(number >> bits == prefix for number in numbers):
        yield masked(index, 0xFFFFFFFF >> bits << bits, prefix << bits)
    elif bits:
        yield from all_but(index, numbers, bits - 1, prefix << 1)
        yield from all_but(index, numbers, bits - 1, prefix << 1 | 1)


def _filter(action, rules, errno=None):
    architecture = {'x86_64': 'SCMP_ARCH_X86_64', 'aarch64': 'SCMP_ARCH_AARCH64'}
    return {
        'defaultAction': action,
        **({'defaultErrnoRet': errno} if errno else {}),
        'architectures': [architecture.get(platform.machine(), 'SCMP_ARCH_NATIVE')],
        'syscalls': rules,
    }


def notifying(profile: dict, path: str) -> dict:
    """The filter, but `listen` asks whoever listens at the unix socket `path`."""
    asked = {'names': ['listen'], 'action': 'SCMP_ACT_NOTIFY'}
    return profile | {'syscalls': [*profile['syscalls'], asked], 'listenerPath': path}


def _sandbox(refused):
    """Only what is allowed. What is refused with another error than ENOSYS is said, too, not only left out."""
    families = [
        rule
        for name, allowed in FAMILIES.items()
        for rule in (
            *(allow(name, **masked(0, 0xFFFFFFFF, family)) for family in allowed),
            *(refuse(name, errno=EAFNOSUPPORT, **other) for other in all_but(0, [*allowed, AF_NETLINK])),
        )
    ]
    netlink = masked(0, 0xFFFFFFFF, AF_NETLINK)
    families += [
        allow('socket', args=[netlink, masked(2, 0xFFFFFFFF, NETLINK_ROUTE)]),
        *(refuse('socket', errno=EPROTONOSUPPORT, args=[netlink, other]) for other in all_but(2, [NETLINK_ROUTE])),
        refuse('socketpair', errno=EAFNOSUPPORT, **netlink),
    ]
    socket_level = masked(1, 0xFFFFFFFF, SOL_SOCKET)
    return _filter(
        'SCMP_ACT_ERRNO',
        [
            allow(*(name for name in ALLOWED_SYSCALLS if name not in refused)),
            refuse(*refused),
            # Not clone3, since a filter cannot see its flags. libc uses clone after ENOSYS.
            allow('clone', **masked(0, CLONE_NEW, 0)),
            *(refuse('clone', **masked(0, 1 << bit, 1 << bit)) for bit in range(32) if CLONE_NEW >> bit & 1),
            # A request of another range differs from it in one of the bits 8 to 31: one rule for each bit.
            *(allow('ioctl', **masked(1, 1 << bit, ~SOCKET_IOCTLS & 1 << bit)) for bit in range(8, 32)),
            refuse('ioctl', **masked(1, 0xFFFFFF00, SOCKET_IOCTLS)),
            *families,
            *(allow('setsockopt', **level) for level in all_but(1, [SOL_SOCKET])),
            *(allow('setsockopt', args=[socket_level, option]) for option in all_but(2, REFUSED_OPTIONS)),
            *(
                refuse('setsockopt', args=[socket_level, masked(2, 0xFFFFFFFF, option)])
                for option in REFUSED_OPTIONS
            ),
            *(allow('personality', **masked(0, 0xFFFFFFFF, value)) for value in PERSONALITIES),
            *(_TRACING if 'ptrace' not in refused else ()),
        ],
        ENOSYS,
    )


# Not PTRACE_TRACEME: the daemon, as the parent of the first process, would become the tracer.
_TRACING = (
    allow('ptrace', index=0, value=0, op='SCMP_CMP_NE'),
    refuse('ptrace', index=0, value=0, op='SCMP_CMP_EQ'),
)
IMAGE = _sandbox(REFUSED_SYSCALLS)
FOLDER = _sandbox(REFUSED_SYSCALLS + REFUSED_TO_FOLDERS)
