"""Started by `codejudge` as a program of its own: confines itself, then runs a model's code against its tests.

Two processes: this one keeps the tests and the nonce that makes a verdict; its child has the code and two pipes.
Standard library only; every import that confinement would make impossible stands here or in what the code imports,
which is read from disk.
"""

import ast
import builtins
import cmath
import ctypes
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, NoReturn

REPLY_BYTES = 1 << 20
# What goes through a pipe, those before others that they are kinds of.
KINDS = (type(None), bool, int, float, complex, str, bytes, list, tuple, set, dict)
DEPTH = 100  # the parser's own limit is 200
BRACKETS = {list: "[]", tuple: "()", set: "{}"}
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


def literal(value: Any, exact: bool, depth: int = DEPTH) -> str:
    """A value as Python writes it; one of a subclass as what it is equal to, so that a Counter is a dict, unless
    `exact`. Raises TypeError where there is no such literal."""
    kind: Any = set if isinstance(value, frozenset) else next((k for k in KINDS if isinstance(value, k)), None)
    if kind is None or not depth or (exact and type(value) is not kind):
        raise TypeError
    if kind in BRACKETS:
        inner = "".join(f"{literal(each, exact, depth - 1)}, " for each in value)
        return "set()" if kind is set and not inner else inner.join(BRACKETS[kind])
    if kind is dict:
        pairs = ((literal(key, exact, depth - 1), literal(inner, exact, depth - 1)) for key, inner in value.items())
        return "".join(f"{key}: {inner}, " for key, inner in pairs).join("{}")
    if kind is int and value.bit_length() > 64:
        return hex(value)  # Python reads and writes only so many decimal digits
    if kind is float and not math.isfinite(value):
        return "..." if math.isnan(value) else "1e999" if value > 0 else "-1e999"  # `read` makes a NaN of an ellipsis
    if kind is complex and not cmath.isfinite(value):
        raise TypeError
    return kind.__repr__(value)


def line_of(value: object, exact: bool = False) -> bytes | None:
    """A value as a line that the other side reads; None where it is none, or too long."""
    try:
        line = literal(value, exact).encode() + b"\n"
    except Exception:  # of the value's own methods too
        return None
    return line if len(line) <= REPLY_BYTES else None


def read(line: bytes) -> Any:
    tree = ast.parse(line.decode(), mode="eval")
    for node in ast.walk(tree) if b"..." in line else ():
        if isinstance(node, ast.Constant) and node.value is ...:
            node.value = math.nan
    return ast.literal_eval(tree)


def send(writer: int, line: bytes) -> None:
    while line:
        line = line[os.write(writer, line) :]


def raised(error: BaseException) -> bytes:
    """Its class, or the nearest base that the other side has too."""
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
    return line_of(("raised", name)) or b""


def serve(job: dict, reader: int, writer: int) -> None:
    """The child: the model's code, called as the other side asks."""
    names: dict = {"__name__": "candidate"}
    try:
        exec(compile(job["program"], "<answer>", "exec"), names)
        function = names[job["entry_point"]]
    except BaseException as error:
        send(writer, raised(error))
        return
    for line in lines_from(reader):
        arguments, keywords = read(line)
        try:
            found = function(*arguments, **keywords)
        except BaseException as error:
            send(writer, raised(error))
        else:
            send(writer, line_of(("returned", found)) or b"('kept', None)\n")


def candidate(reader: int, writer: int, tell: Callable[[str], NoReturn]):
    """The function that the tests call: it asks the other process. Where that cannot be, it tells the verdict itself:
    tests may catch whatever it raises."""
    replies = lines_from(reader)

    def call(*arguments, **keywords):
        if (line := line_of((arguments, keywords), exact=True)) is None:
            tell("unjudged an argument is no plain value")
        try:
            send(writer, line)
            how, value = read(next(replies))
        except (StopIteration, OSError):
            tell("failed its process ended")
        except Exception:
            tell("failed its process answered something else")
        if how == "kept":
            tell("failed it returned no plain value")
        if how == "returned":
            return value
        kind = getattr(builtins, str(value), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind.__new__(kind)  # some demand arguments of those who call them
        raise RuntimeError(str(value)[:40])

    return call


def verdict(job: dict, reader: int, writer: int, tell: Callable[[str], NoReturn]) -> str | None:
    """Why the tests do not pass; None where they do."""
    names: dict = {"__name__": "tests"}
    try:
        exec(compile(job["helpers"], "<prompt>", "exec"), names)
        exec(compile(job["test"], "<tests>", "exec"), names)
        check = names["check"]
    except BaseException as error:
        tell(f"unjudged its tests do not load: {type(error).__name__}")
    try:
        check(candidate(reader, writer, tell))
    except BaseException as error:
        return type(error).__name__
    return None


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

    def tell(said: str) -> NoReturn:
        os.write(out, said.encode())
        os._exit(0)

    why = verdict(job, answers, ask, tell)
    tell(f"passed-{nonce}" if why is None else f"failed {why}")


if __name__ == "__main__":
    main()
