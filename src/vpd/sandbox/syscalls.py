"""The seccomp filter: which system calls a program may not make.

Its format is in the kernel's Documentation/userspace-api/seccomp_filter.rst.  Numbers are from Linux's ``unistd.h``;
from 424 on they are the same on every processor.  A refused call returns EPERM, as without the privilege; a call newer
than this table returns ENOSYS, as on an older kernel.
"""

import os
import struct

from vpd.errors import SandboxError

# name: x86-64, and the table that arm64 and riscv64 share (None: not there)
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "kcmp": (312, 272), "pidfd_getfd": (438, 438),
    # the network, and memory that no limit counts
    "socket": (41, 198), "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "vmsplice": (278, 75),  # a pipe that holds one page of a huge one keeps all of it, unmapped
    # with an idle priority it would take long to die
    "setpriority": (141, 140), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    # what the whole machine, or all of the user's programs, share a stock of
    "io_setup": (206, 0), "inotify_init": (253, None), "inotify_init1": (294, 26), "sync": (162, 81),
    "syncfs": (306, 267),
    # namespaces, mounts, devices, the machine
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443), "syslog": (103, 116),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58), "iopl": (172, None),
    "ioperm": (173, None), "modify_ldt": (154, None),
    # large, and rich in faults
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "mbind": (237, 235), "migrate_pages": (256, 238),
    "move_pages": (279, 239),
}  # fmt: skip
# Besides, where the program lives among the caller's own processes and files (no namespaces):
SHARED_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "socketpair": (53, 199),  # a datagram socket of a pair can still be sent elsewhere from
    "fork": (57, None), "vfork": (58, None), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "sched_setaffinity": (203, 122), "ioprio_set": (251, 30),
    "shmat": (30, 196), "shmctl": (31, 195), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "semop": (65, 193), "semtimedop": (220, 192), "semctl": (66, 191), "mq_unlink": (241, 181),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None),
    "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "truncate": (76, 45),
}  # fmt: skip
CLONE, CLONE3, FCNTL, IOCTL, PRLIMIT, PRCTL = (56, 220), (435, 435), (72, 25), (16, 29), (302, 261), (157, 167)
PIVOT_ROOT = NUMBERS["pivot_root"]
NEWEST = 451  # cachestat, Linux 6.5
NEWER = (454, 455, 456)  # futex_wake, futex_wait, futex_requeue
PROCESSORS = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7), "riscv64": (1, 0xC00000F3)}  # column, AUDIT_ARCH

ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # SECCOMP_RET_*
LOAD, EQUAL, ABOVE, ANY_BIT, RETURN = 0x20, 0x15, 0x25, 0x45, 0x06  # BPF_LD|ABS, JEQ, JGT, JSET, RET
NUMBER, ARCH, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
NEW_NAMESPACE = 0x7E020000  # CLONE_NEW{CGROUP,UTS,IPC,USER,PID,NET,NS}
CLONE_THREAD = 0x00010000
SIGNAL_OWNER = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: would let the kernel signal any process of the user
SET_DEATH_SIGNAL = (1,)  # PR_SET_PDEATHSIG: would let it outlive its keeper
TERMINAL = (0x5412, 0x8901, 0x8902)  # TIOCSTI, FIOSETOWN, SIOCSPGRP


def column() -> int:
    return _processor()[0]


def seccomp_filter(*, shared: bool) -> bytes:
    """The filter as ``struct sock_filter[]``; ``shared`` also refuses what a program without namespaces must not do."""
    side, arch = _processor()
    code = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    if arch == PROCESSORS["x86_64"][1]:
        code += [(ABOVE, 0, 1, 0x3FFFFFFF), (RETURN, 0, 0, KILL)]  # the x32 numbers
    for number in NEWER:
        code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    code += [(ABOVE, 0, 1, NEWEST), (RETURN, 0, 0, ENOSYS), (EQUAL, 0, 1, CLONE3[side]), (RETURN, 0, 0, ENOSYS)]
    for numbers in [*NUMBERS.values(), *(SHARED_NUMBERS.values() if shared else ())]:
        number = numbers[side]
        if number is not None:
            code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, EPERM)]
    code += _when(PRLIMIT[side], 0, [(EQUAL, 1, 0, 0), (RETURN, 0, 0, EPERM)])  # of itself alone
    code += _when(IOCTL[side], 1, _refuse(TERMINAL))
    code += _when(CLONE[side], 0, [(ANY_BIT, 0, 1, NEW_NAMESPACE), (RETURN, 0, 0, EPERM)])
    if shared:
        code += _when(CLONE[side], 0, [(ANY_BIT, 1, 0, CLONE_THREAD), (RETURN, 0, 0, EPERM)])  # threads, no processes
        code += _when(FCNTL[side], 1, _refuse(SIGNAL_OWNER))
        code += _when(PRCTL[side], 0, _refuse(SET_DEATH_SIGNAL))
    code.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("HBBI", *line) for line in code)


def _refuse(values: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    return [line for value in values for line in ((EQUAL, 0, 1, value), (RETURN, 0, 0, EPERM))]


def _when(number: int, argument: int, then: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Apply ``then`` to the low half of an argument of one call, then load the call's number again."""
    load = (LOAD, 0, 0, ARGUMENTS + 8 * argument)
    return [(EQUAL, 0, len(then) + 2, number), load, *then, (LOAD, 0, 0, NUMBER)]


def _processor() -> tuple[int, int]:
    machine = os.uname().machine
    if machine not in PROCESSORS:
        raise SandboxError("no system-call table for this processor", got=machine, expected=", ".join(PROCESSORS))
    return PROCESSORS[machine]
