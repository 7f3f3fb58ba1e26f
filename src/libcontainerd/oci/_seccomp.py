"""The default seccomp profile, as data.

Which calls are allowed, and under which capabilities, are facts taken from the default profile of Docker
(`seccomp/default.json` of the `moby/profiles` repository, as of 2025, Apache-2.0). The ways around a
container that it closes: the kernel's keyrings, loading code into the kernel, new user namespaces, io_uring,
userfaultfd, socket families that few use and many bugs lived in.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable

from libcontainerd.errors import InvalidParameterError
from libcontainerd.oci._model_linux import LinuxSeccomp, LinuxSeccompArg, LinuxSyscall

_ALWAYS = """
accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown chown32 clock_adjtime
clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep
clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3 epoll_create
epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2
execve execveat exit exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir
fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork
fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex
futex_requeue futex_time64 futex_wait futex_waitv futex_wake futimesat get_robust_list get_thread_area getcpu
getcwd getdents getdents64 getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer
getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32
getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid getuid32 getxattr getxattrat
inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents
io_pgetevents_time64 io_setup io_submit ioctl ioprio_get ioprio_set ipc kill landlock_add_rule
landlock_create_ruleset landlock_restrict_self lchown lchown32 lgetxattr link linkat listen listmount
listxattr listxattrat llistxattr _llseek lremovexattr lseek lsetxattr lstat lstat64 madvise map_shadow_stack
membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mmap2
mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend
mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap
name_to_handle_at nanosleep newfstatat _newselect open openat openat2 pause pidfd_open pidfd_send_signal pipe
pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64
process_mrelease process_vm_readv process_vm_writev pselect6 pselect6_time64 ptrace pwrite64 pwritev pwritev2
read readahead readlink readlinkat readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages
removexattr removexattrat rename renameat renameat2 restart_syscall riscv_hwprobe rmdir rseq rt_sigaction
rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64
rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam
sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr
sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop semtimedop_time64
send sendfile sendfile64 sendmmsg sendmsg sendto set_robust_list set_thread_area set_tid_address setfsgid
setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setitimer setpgid setpriority setregid
setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit setsid setsockopt setuid
setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 sigprocmask
sigreturn socketcall socketpair splice stat stat64 statfs statfs64 statmount statx symlink symlinkat sync
sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime
timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime
timerfd_settime64 times tkill truncate truncate64 ugetrlimit umask uname unlink unlinkat uretprobe utime
utimensat utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid write writev
"""

_BY_CAPABILITY = {
    "CAP_BPF": "bpf",
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_PERFMON": "perf_event_open",
    "CAP_SYSLOG": "syslog",
    "CAP_SYS_ADMIN": """
        bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_get_self_attr
        lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount open_tree perf_event_open quotactl
        quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare
        """,
    "CAP_SYS_BOOT": "reboot",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "delete_module finit_module init_module",
    "CAP_SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace",
    "CAP_SYS_RAWIO": "ioperm iopl",
    "CAP_SYS_TIME": "clock_settime clock_settime64 settimeofday stime",
    "CAP_SYS_TTY_CONFIG": "vhangup",
}

# The machine's name as uname(2) gives it: the architectures that its kernel also runs, and calls of its own.
_X86_64 = ("SCMP_ARCH_X86_64 SCMP_ARCH_X86 SCMP_ARCH_X32", "arch_prctl modify_ldt")
_ARM = "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2"
_BY_MACHINE = {
    "x86_64": _X86_64,
    "amd64": _X86_64,
    "i386": ("SCMP_ARCH_X86", "modify_ldt"),
    "i686": ("SCMP_ARCH_X86", "modify_ldt"),
    "aarch64": ("SCMP_ARCH_AARCH64 SCMP_ARCH_ARM", _ARM),
    "arm64": ("SCMP_ARCH_AARCH64 SCMP_ARCH_ARM", _ARM),
    "armv7l": ("SCMP_ARCH_ARM", _ARM),
    "ppc64le": ("SCMP_ARCH_PPC64LE", "swapcontext sync_file_range2"),
    "s390x": (
        "SCMP_ARCH_S390X SCMP_ARCH_S390",
        "s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr",
    ),
    "riscv64": ("SCMP_ARCH_RISCV64", "riscv_flush_icache"),
    "loongarch64": ("SCMP_ARCH_LOONGARCH64", ""),
}

# Families of socket(2) from 12 up; all below are allowed. Left out are DECnet, Econet, ATM's signalling,
# IrDA, wanpipe, ISDN and CAIF, which are gone or nearly so, the kernel's cryptography, and vsock, which
# reaches the virtual machine's host.
_SOCKET_FAMILIES = (13, 14, 15, 16, 17, 18, 21, 22, 24, *range(26, 34), 35, 36, 39, *range(41, 46))

# personality(2): Linux, Linux with UNAME26, 32-bit emulation, both, and asking what it is.
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)

# clone(2) flags for namespaces: cgroup, uts, ipc, user, pid, net and mount.
_NEW_NAMESPACES = 0x7E020000
_EPERM, _ENOSYS = 1, 38


def default_seccomp_profile(capabilities: Iterable[str] = (), *, machine: str | None = None) -> LinuxSeccomp:
    """Give the default seccomp profile: a list of what is allowed; the rest fails with EPERM.

    The facts are those of Docker's default profile (`moby/profiles`, 2025). Runtimes skip calls that their
    seccomp library does not know.

    >>> from libcontainerd import oci
    >>> profile = oci.default_seccomp_profile(["CAP_SYS_TIME"], machine="x86_64")
    >>> profile.architectures
    ['SCMP_ARCH_X86_64', 'SCMP_ARCH_X86', 'SCMP_ARCH_X32']

    Args:
        capabilities: The bounding set of the process: more calls are allowed under some of them.
        machine: What the container runs on, as uname(2) names it; this machine if None.

    Returns:
        A new profile each time.

    Raises:
        InvalidParameterError: if nothing is known of the machine: a filter for the wrong one would stop
            everything.
    """
    held = set(capabilities)
    name = platform.machine() if machine is None else machine
    if name not in _BY_MACHINE:
        raise InvalidParameterError(
            f"no default seccomp profile for the machine {name!r}; known are {', '.join(_BY_MACHINE)}"
        )
    architectures, own_calls = _BY_MACHINE[name]
    allowed = {*_ALWAYS.split(), *own_calls.split()}
    for capability, calls in _BY_CAPABILITY.items():
        if capability in held:
            allowed.update(calls.split())
    syscalls = [
        _rule(sorted(allowed)),
        _rule(["socket"], LinuxSeccompArg(index=0, value=12, op="SCMP_CMP_LT")),
        *(_rule(["socket"], _equals(family)) for family in _SOCKET_FAMILIES),
        *(_rule(["personality"], _equals(value)) for value in _PERSONALITIES),
    ]
    if "CAP_SYS_ADMIN" not in held:
        # The flags are the second argument on s390 alone.
        flags = LinuxSeccompArg(
            index=1 if name == "s390x" else 0, value=_NEW_NAMESPACES, value_two=0, op="SCMP_CMP_MASKED_EQ"
        )
        syscalls.append(_rule(["clone"], flags))
        # A filter cannot look at clone3's flags; told that there is no such call, C libraries use clone.
        syscalls.append(LinuxSyscall(names=["clone3"], action="SCMP_ACT_ERRNO", errno_ret=_ENOSYS))
    return LinuxSeccomp(
        default_action="SCMP_ACT_ERRNO",
        default_errno_ret=_EPERM,
        architectures=architectures.split(),
        syscalls=syscalls,
    )


def _equals(value: int) -> LinuxSeccompArg:
    return LinuxSeccompArg(index=0, value=value, op="SCMP_CMP_EQ")


def _rule(names: list[str], *conditions: LinuxSeccompArg) -> LinuxSyscall:
    rule = LinuxSyscall(names=names, action="SCMP_ACT_ALLOW")
    if conditions:
        rule.args = list(conditions)
    return rule
