"""Started by `codejudge` as a program of its own: confines itself, then runs a model's code against its tests.

Two processes: this one keeps the tests and the nonce that makes a verdict; its child has the code and two pipes.
Standard library only; every import that confinement would make impossible stands here or in what the code imports,
which is read from disk.
"""

import ast
import builtins
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

REPLY_BYTES = 1 << 20
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
LINUX_CAPABILITY_VERSION_3 = 0x20080522

# What computing, reading files and ending take; everything else fails with EPERM. By (x86-64, ARM64) number, from the
# kernel's arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
ALLOWED: dict[str, tuple[int, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "access": (21, None), "select": (23, None),
    "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "nanosleep": (35, 101),
    "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160), "getcwd": (79, 17), "readlink": (89, None),
    "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178), "time": (201, None), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "restart_syscall": (219, 128),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94),
    "newfstatat": (262, 79), "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72),
    "ppoll": (271, 73), "set_robust_list": (273, 99), "getrandom": (318, 278), "statx": (332, 291),
    "rseq": (334, 293), "faccessat2": (439, 439),
}  # fmt: skip
OPENAT = (257, 56)
AUDIT_ARCH = (0xC000003E, 0xC00000B7)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def give_up_system_calls() -> None:
    """Raises OSError where the kernel has no such filter."""
    machine = ("x86_64", "aarch64").index(platform.machine())
    numbers = [number for pair in ALLOWED.values() if (number := pair[machine]) is not None]
    load, equal, allow, refuse = 0x20, 0x15, (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)  # EPERM
    code = [  # (operation, to skip if it holds, to skip if not, operand); offsets are those of struct seccomp_data
        (load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[machine]), refuse,
        (load, 0, 0, 0), (equal, 0, 4, OPENAT[machine]),
        (load, 0, 0, 32), (0x45, 0, 1, WRITING), refuse, allow,  # openat: flags, its third argument
    ]  # fmt: skip
    for number in numbers:
        code += [(equal, 0, 1, number), allow]
    code.append(refuse)
    packed = b"".join(struct.pack("HBBI", *one) for one in code)
    program = Filter(len(code), packed)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def limit(seconds: float, memory: int) -> None:
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, int(seconds) + 3),  # the clock ends it before, unless it is held up
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(what, (most, most))


def lines_from(reader: int):
    """What comes through a pipe, line by line. Raises ValueError where a line is too long."""
    kept = b""
    while piece := os.read(reader, 1 << 16):
        kept += piece
        *whole, kept = kept.split(b"\n")
        yield from whole
        if len(kept) > REPLY_BYTES:
            raise ValueError("too long")


def plain(value: object) -> object:
    """A value whose classes are those of literals, so that a Counter is a dict. What is no such thing stays."""
    if isinstance(value, dict):
        return {plain(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        kind = list if isinstance(value, list) else tuple if isinstance(value, tuple) else set
        return kind(map(plain, value))
    for leaf in (bool, int, float, str):
        if isinstance(value, leaf):
            return leaf(value)
    return value


def send(writer: int, value: object) -> None:
    text = repr(value).encode("utf-8", "surrogatepass").replace(b"\n", b"\\n") + b"\n"
    while text:
        text = text[os.write(writer, text) :]


def serve(job: dict, reader: int, writer: int) -> None:
    """The child: the model's code, called as the other side asks."""
    names: dict = {"__name__": "candidate"}
    try:
        exec(compile(job["program"], "<answer>", "exec"), names)
        function = names[job["entry_point"]]
    except BaseException as error:
        send(writer, ("raised", type(error).__name__))
        return
    for line in lines_from(reader):
        arguments, keywords = ast.literal_eval(line.decode("utf-8", "surrogatepass"))
        try:
            send(writer, ("returned", plain(function(*arguments, **keywords))))
        except BaseException as error:
            send(writer, ("raised", type(error).__name__))


class Unjudged(BaseException):
    """The tests ask for something that does not go through a pipe."""


class Wrong(BaseException):
    """The code's process ended, or returned something that is no plain value."""


def candidate(reader: int, writer: int):
    """The function that the tests call: it asks the other process."""
    replies = lines_from(reader)

    def call(*arguments, **keywords):
        try:
            if ast.literal_eval(repr((arguments, keywords))) != (arguments, keywords):
                raise ValueError
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise Unjudged("an argument is no plain value") from None
        try:
            send(writer, (arguments, keywords))
            how, value = ast.literal_eval(next(replies).decode("utf-8", "surrogatepass"))
        except (StopIteration, OSError):
            raise Wrong("its process ended") from None
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise Wrong("it returned no plain value") from None
        if how == "returned":
            return value
        kind = getattr(builtins, str(value), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind
        raise RuntimeError(str(value)[:40])

    return call


def verdict(job: dict, reader: int, writer: int) -> tuple[bool, str]:
    """(whether the tests pass, else why not). Raises Unjudged."""
    names: dict = {"__name__": "tests"}
    try:
        exec(compile(job["helpers"], "<prompt>", "exec"), names)
        exec(compile(job["test"], "<tests>", "exec"), names)
        check = names["check"]
    except BaseException as error:
        raise Unjudged(f"its tests do not load: {type(error).__name__}") from None
    try:
        check(candidate(reader, writer))
    except Unjudged:
        raise
    except Wrong as why:
        return False, str(why)
    except BaseException as error:
        return False, type(error).__name__
    return True, ""


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    out, nonce_from = os.dup(1), int(sys.argv[1])
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    asked, ask = os.pipe()
    answers, answer = os.pipe()
    libc = ctypes.CDLL(None, use_errno=True)
    # The code's process may not look into this one, nor has it a privileged user's rights.
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    judging = os.getpid()
    child = os.fork()
    try:
        if child == 0:
            for descriptor in (out, nonce_from, ask, answers, nothing):
                os.close(descriptor)
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() == judging:
                libc.capset(struct.pack("II", LINUX_CAPABILITY_VERSION_3, 0), bytes(24))
                limit(job["seconds"], job["memory"])
                give_up_system_calls()
                del job["test"]
                serve(job, asked, answer)
            os._exit(0)
        os.close(asked)
        os.close(answer)
        nonce = os.read(nonce_from, 64).decode()
        limit(job["seconds"], job["memory"])
        give_up_system_calls()
    except (OSError, ValueError) as error:
        os.write(out, f"unconfined {error}".encode())
        os._exit(1)
    try:
        passed, why = verdict(job, answers, ask)
        said = f"passed-{nonce}" if passed else f"failed {why}"
    except Unjudged as reason:
        said = f"unjudged {reason}"
    os.write(out, said.encode())
    os._exit(0)


if __name__ == "__main__":
    main()
