"""The native CPU decoder (`cpu.cpp`): compiled once with the system's C++ compiler, called through ctypes.

Why native: at one row a 135M model is bound by memory bandwidth only if the ~300 operators of a forward cost
nothing in between; eager torch spends more time between the projections than in them. `available()` says whether
the library could be built here; every caller has a plain torch path for when it could not.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from zbench.cache import cache_dir

PANEL = 16
TALL = 16  # rows that the tallest tile of a projection may have
_SOURCE = Path(__file__).with_name("cpu.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC", "-fopenmp")


class NativeUnavailable(Exception):
    """The native library cannot be used here; the message says why."""


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("qkv_bias", "out_bias", "gate_up_bias", "down_bias")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        ("window", ctypes.c_int64),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("layers", "width", "ffn", "heads", "kv_heads", "head_dim", "vocab", "bf16_weights")
        ),
        ("eps", ctypes.c_double),
        ("layer", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in ("embedding", "head", "norm", "inv_freq")),
    ]


class _LowRank(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "source")),
        *((name, ctypes.c_int64) for name in ("rank", "columns")),
    ]


class _Adapter(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.POINTER(_LowRank)) for name in ("qkv", "out", "gate_up", "down")),
        ("mask_embedding", ctypes.c_void_p),
        ("masks", ctypes.c_int64),
    ]


class _Context(ctypes.Structure):
    _fields_ = [
        ("taps", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("fc", "kv", "norm", "key_norms")),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "rows", "capacity", "wanted", "captures", "threads")),
        *((name, ctypes.c_void_p) for name in ("ids", "positions", "lengths", "visible", "masks")),
        ("adapter", ctypes.POINTER(_Adapter)),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_void_p) for name in ("logit_rows", "capture_layers", "logits", "captured", "likeliest")),
        ("context", ctypes.POINTER(_Context)),
        ("taps", ctypes.POINTER(ctypes.c_void_p)),
        ("counts", ctypes.POINTER(ctypes.c_int64)),
        ("unread", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("times", ctypes.c_void_p),
    ]


class _Drafter(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("width", "ffn", "heads", "kv_heads", "head_dim", "vocab", "taps", "tap_width", "bf16_weights")
        ),
        *((name, ctypes.c_int64) for name in ("norm_before_residual", "norm_output")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("fc", "qkv", "out", "gate_up", "down", "head", "embedding")),
        *((name, ctypes.c_void_p) for name in ("tap_norms", "joined_norm", "embedding_norm", "feature_norm")),
        *((name, ctypes.c_void_p) for name in ("mlp_norm", "norm", "inv_freq", "target_ids")),
    ]


class _Draft(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "rows", "capacity", "before", "chain", "threads")),
        *((name, ctypes.c_void_p) for name in ("ids", "lengths")),
        ("taps", ctypes.POINTER(ctypes.c_void_p)),
        *((name, ctypes.c_void_p) for name in ("visible", "keys", "values", "features", "last", "tokens", "scores")),
        ("top_k", ctypes.c_int64),
        ("confidence", ctypes.c_double),
        ("active", ctypes.c_void_p),
        ("levels", ctypes.POINTER(ctypes.c_int64)),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("times", ctypes.c_void_p),
    ]


# What a forward of the native decoder does, in order: once, then for each layer, then once.
BEFORE, LAYER, AFTER = (
    ("embed",),
    ("attention norm", "qkv", "rotate and store", "attention", "out", "mlp norm", "gate_up", "down"),
    ("final norm", "head"),
)
# A level of EAGLE-3's draft; some have no `fuse`, some no head.
LEVEL = tuple(f"draft {name}" for name in ("embed", "fuse", *LAYER, *AFTER, "argmax"))
# What DFlash reads, for all layers together, before its block.
CONTEXT = tuple(f"draft {name}" for name in ("fuse", "context norm", "context kv", "context rotate and store"))


@dataclass(frozen=True, slots=True)
class Timed:
    """One native call while `recording`: `times` are ns of `time.perf_counter_ns` at its start and after each section.

    `shape` is (outputs, inputs) of a lone projection over `rows` rows, and None for a forward.
    """

    sections: tuple[str, ...]
    times: tuple[int, ...]
    rows: int  # of the whole batch
    contexts: tuple[int, ...] = ()
    pairs: float = 0.0  # (row, visible new row) pairs, of the whole batch
    wanted: int = 0
    config: Any = None  # of a forward: a ModelConfig; of a draft: an Eagle3Config or a DFlashConfig
    itemsize: int = 0
    shape: tuple[int, int] | None = None
    read: int = 0  # tokens whose hidden states alone are read, of the whole batch

    def spans(self) -> Iterator[tuple[str, int, int]]:
        """(section, start, end), ns."""
        for name, (start, end) in zip(self.sections, pairwise(self.times), strict=True):
            yield name, start, end


_recorded: list[Timed] | None = None


@contextmanager
def recording() -> Iterator[list[Timed]]:
    """Within it every native call is timed section by section, at the cost of a clock reading for each."""
    global _recorded
    found: list[Timed] = []
    _recorded = found
    try:
        yield found
    finally:
        _recorded = None


def available() -> bool:
    return unavailable_reason() is None


def unavailable_reason() -> str | None:
    """None when the library works here, else one line that says why not."""
    try:
        _library()
    except NativeUnavailable as error:
        return str(error)
    return None


def instruction_set() -> str:
    """The instruction set the library was compiled for: avx512-bf16, avx512, avx2 or generic."""
    return _library().zb_instruction_set().decode()


@functools.lru_cache(maxsize=1)
def _outcome() -> ctypes.CDLL | NativeUnavailable:
    try:
        library = ctypes.CDLL(str(_build()))
        library.zb_forward.restype = ctypes.c_int64
        library.zb_read.restype = ctypes.c_int64
        library.zb_draft_levels.restype = ctypes.c_int64
        library.zb_linear.restype = None
        library.zb_commit.restype = None
        library.zb_argmax.restype = None
        library.zb_verify_chain.restype = None
        library.zb_verify_tree.restype = None
        library.zb_tree_rows.restype = None
        library.zb_block_tree.restype = None
        library.zb_tree_and_blocks.restype = None
        library.zb_last_block.restype = None
        library.zb_read_sum.restype = ctypes.c_float
        library.zb_instruction_set.restype = ctypes.c_char_p
        library.zb_key_unit.restype = ctypes.c_int64
        _check(library)
        return library
    except (NativeUnavailable, OSError, RuntimeError) as error:  # the last: no home folder, or one that knows no locks
        return NativeUnavailable(str(error))


def _library() -> ctypes.CDLL:
    outcome = _outcome()
    if isinstance(outcome, NativeUnavailable):
        raise outcome
    return outcome


@functools.cache
def source() -> str:
    """What tells one version of the native kernels from another."""
    return hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]


def _build() -> Path:
    if os.environ.get("ZBENCH_NATIVE") == "0":
        raise NativeUnavailable("switched off by ZBENCH_NATIVE=0")
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "c++", "clang++") if c and shutil.which(c)), None)
    if compiler is None:
        raise NativeUnavailable("no C++ compiler found (install g++, or set CXX)")
    # One OpenMP runtime in the process: torch's own, so that its threads and ours are the same team.
    bundled = next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), None)
    link = [str(bundled), f"-Wl,-rpath,{bundled.parent}"] if bundled else []
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = "\0".join([_SOURCE.read_text(), version, *_FLAGS, *link, platform.machine(), _cpu_flags()])
    target = cache_dir() / "native" / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            command = [compiler, *_FLAGS, str(_SOURCE), *link, "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                first = next(iter(done.stderr.strip().splitlines()), "no message")
                raise NativeUnavailable(f"{compiler} failed: {first}")
            built.replace(target)
    return target


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _check(library: ctypes.CDLL) -> None:
    """A kernel that disagrees with its definition is never used: compare projections with float64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(80, 64, generator=generator)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
        for rows in (1, 2, 5, 7, 13):
            x = torch.randn(rows, 64, generator=generator).to(dtype)
            got = _linear(library, x.float(), pack(weight.to(dtype)), 80)
            want = x.double() @ weight.to(dtype).double().T
            error = (got.double() - want).norm() / want.norm()
            if not error < tolerance:
                raise NativeUnavailable(f"self-check failed: {dtype} projection of {rows} rows is off by {error:.1e}")


def pack(weight: Tensor) -> Tensor:
    """Weight [N, K] -> panels of 16 outputs, N padded with zeros: bf16 [N/16, K/2, 16, 2], float32 [N/16, K, 16]."""
    n, k = weight.shape
    padded = -n % PANEL
    if padded:
        weight = torch.cat([weight, weight.new_zeros(padded, k)])
    panels = weight.view(-1, PANEL, k)
    if weight.dtype == torch.bfloat16:
        return panels.view(-1, PANEL, k // 2, 2).transpose(1, 2).contiguous()
    return panels.transpose(1, 2).contiguous()


def pack_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """Two weights [F, K] -> packed panels that alternate gate, up, so that one tile holds both."""
    packed_gate, packed_up = pack(gate), pack(up)
    return torch.stack([packed_gate, packed_up], 1).flatten(0, 1).contiguous()


def pack_low_rank(b: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """B [N, r] of fused projections, r even -> its packed panels and the column where each begins [N/16] int32.

    B is block diagonal: a panel's outputs belong to one projection and read that one's columns only. So each panel
    keeps as many columns as the widest needs; -1 says that it is nothing but zeros. `interleaved`: as `pack_gate_up`.
    """
    panels = torch.nn.functional.pad(b, (0, 0, 0, -len(b) % PANEL)).view(-1, PANEL, b.shape[1])
    if interleaved:
        panels = panels.view(2, -1, *panels.shape[1:]).transpose(0, 1).flatten(0, 1)
    used = (panels != 0).any(1)  # [N/16, r]
    columns = torch.arange(b.shape[1])
    first = columns.where(used, b.shape[1]).amin(1) // 2 * 2
    rank = max(int((columns.where(used, -1).amax(1) + 1 - first).max()), 2)
    rank += rank % 2  # the dot product takes pairs
    first = first.clamp(max=b.shape[1] - rank)
    index = (first[:, None, None] + columns[:rank]).expand(-1, PANEL, -1)
    kept = panels.gather(2, index).flatten(0, 1)
    return pack(kept), first.where(used.any(1), -1).int()


def linear(x: Tensor, packed: Tensor, outputs: int) -> Tensor:
    """x [M, K] float32 times a packed weight -> [M, outputs] float32, on the threads torch uses."""
    return _linear(_library(), x, packed, outputs)


def _linear(library: ctypes.CDLL, x: Tensor, packed: Tensor, outputs: int) -> Tensor:
    m, k = x.shape
    x = x.contiguous()
    y, scratch = torch.empty(m, outputs), torch.empty((m + TALL) * k)
    start = time.perf_counter_ns()
    library.zb_linear(
        ctypes.c_void_p(packed.data_ptr()),
        ctypes.c_int64(packed.dtype == torch.bfloat16),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(scratch.data_ptr()),
        ctypes.c_void_p(y.data_ptr()),
        *(ctypes.c_int64(v) for v in (m, outputs, k, torch.get_num_threads())),
    )
    if _recorded is not None:
        times = (start, time.perf_counter_ns())
        _recorded.append(Timed(("projection",), times, m, itemsize=packed.element_size(), shape=(outputs, k)))
    return y


def argmax(x: Tensor) -> Tensor:
    """x [..., n] -> the index [...] of each row's first largest value, int64, which a NaN never is.

    Torch's takes 46 µs for a row of 49152 logits, this one 3 to 7."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous() or not x.numel() or not available():
        return x.argmax(-1)
    best = torch.empty(x.shape[:-1], dtype=torch.int64)
    _library().zb_argmax(
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(best.numel()),
        ctypes.c_int64(x.shape[-1]),
        ctypes.c_void_p(best.data_ptr()),
    )
    return best


def can_verify(logits: Tensor) -> bool:
    """Whether `verify_chain` and `verify_tree` take these logits [B, R, V]."""
    whole = (
        logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.stride()[1:] == (logits.shape[2], 1)
    )
    return whole and available()


def verify_chain(
    logits: Tensor, drafts: Tensor, offered: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Greedy `engines.verify.verify_chain`, logits [B, 1 + k, V], drafts [B, k], offered [B], in one call: a step has
    just swept the caches, so that the thirty small operators of torch come from memory each."""
    batch, count, vocab = logits.shape
    drafts = drafts if drafts.stride(1) == 1 else drafts.contiguous()
    offered = None if offered is None else offered.contiguous()  # held until the call is over
    found = torch.empty(batch, 2 * count + 2, dtype=torch.int64)
    _library().zb_verify_chain(
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_int64(logits.stride(0)),
        ctypes.c_void_p(drafts.data_ptr()),
        ctypes.c_int64(drafts.stride(0)),
        None if offered is None else ctypes.c_void_p(offered.data_ptr()),
        *(ctypes.c_int64(n) for n in (batch, count - 1, vocab)),
        ctypes.c_void_p(found.data_ptr()),
    )
    return found[:, :count], found[:, -2], found[:, count:-2], found[:, -1]


def verify_tree(logits: Tensor, ids: Tensor, parents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Greedy `engines.verify.verify_tree`, logits [B, R, V], ids and parents [B, R], in one call."""
    batch, count, vocab = logits.shape
    ids, parents = ids.contiguous(), parents.contiguous()
    found = torch.empty(batch, 2 * count + 2, dtype=torch.int64)
    _library().zb_verify_tree(
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_int64(logits.stride(0)),
        *(ctypes.c_void_p(x.data_ptr()) for x in (ids, parents)),
        *(ctypes.c_int64(n) for n in (batch, count, vocab)),
        ctypes.c_void_p(found.data_ptr()),
    )
    return found[:, :count], found[:, -2], found[:, count:-2], found[:, -1]


def tree_rows(
    last: Tensor, lengths: Tensor, ids: Tensor, scores: Tensor, parents: Tensor, tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`models.trees.rerank` and `tree_rows` in one call: ids, scores (float32) and parents [B, N] of candidates, last
    and lengths [B] -> ids, positions, parents [B, 1 + tokens] and visible [B, 1 + tokens, 1 + tokens]."""
    batch, count = ids.shape
    rows = 1 + tokens
    given = [x.contiguous() for x in (last, lengths, ids, scores, parents)]
    out = torch.empty(3, batch, rows, dtype=torch.int64)
    visible = torch.empty(batch, rows, rows, dtype=torch.bool)
    _library().zb_tree_rows(
        *(ctypes.c_void_p(x.data_ptr()) for x in given),
        *(ctypes.c_int64(n) for n in (batch, count, tokens)),
        *(ctypes.c_void_p(x.data_ptr()) for x in (*out, visible)),
    )
    return out[0], out[1], out[2], visible


NEVER = -1e9  # the log of the chance of what was not predicted at all


def block_tree(
    last: Tensor,
    lengths: Tensor,
    logits: Tensor,
    target_ids: Tensor | None,
    usable: Tensor | None,
    tokens: int,
    whole: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`models.trees.BlockTree.grow` in one call, for logits [B, K, V] that `can_verify` takes: as `tree_rows`, and the
    worth [B, 1 + tokens] of the rows."""
    batch, places, vocab = logits.shape
    rows = 1 + tokens
    last, lengths = last.contiguous(), lengths.contiguous()
    usable = None if usable is None else usable.contiguous()
    out = torch.empty(3, batch, rows, dtype=torch.int64)
    visible, worth = torch.empty(batch, rows, rows, dtype=torch.bool), torch.empty(batch, rows)
    _library().zb_block_tree(
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_int64(logits.stride(0)),
        *(ctypes.c_void_p(x.data_ptr()) for x in (last, lengths)),
        *(None if x is None else ctypes.c_void_p(x.data_ptr()) for x in (target_ids, usable)),
        *(ctypes.c_int64(n) for n in (batch, places, vocab, tokens, whole, torch.get_num_threads())),
        ctypes.c_float(NEVER),
        *(ctypes.c_void_p(x.data_ptr()) for x in (*out, visible, worth)),
    )
    return out[0], out[1], out[2], visible, worth


def tree_and_blocks(tree: Sequence[Tensor], worth: Tensor, proposals: int, block: int, mask: int) -> tuple[Tensor, ...]:
    """`models.trees.tree_and_blocks` in one call: ids, positions, parents [B, N] and visible [B, N, N] of a tree, worth
    [B, N] -> the ends [B, proposals]; ids, positions, parents, masks [B, R] and visible [B, R, R]."""
    batch, count = worth.shape
    rows = count + proposals * block
    given = [x.contiguous() for x in (*tree, worth)]
    ends, out = torch.empty(batch, proposals, dtype=torch.int64), torch.empty(4, batch, rows, dtype=torch.int64)
    visible = torch.empty(batch, rows, rows, dtype=torch.bool)
    _library().zb_tree_and_blocks(
        *(ctypes.c_void_p(x.data_ptr()) for x in given),
        *(ctypes.c_int64(n) for n in (batch, count, proposals, block, mask)),
        *(ctypes.c_void_p(x.data_ptr()) for x in (ends, *out, visible)),
    )
    return ends, *out, visible


def last_block(kept: Tensor, counts: Tensor, ends: Tensor, none: int) -> tuple[Tensor, Tensor]:
    """For accepted paths, rows kept [B, N] of which counts [B] are real, and rows `ends` [B, P] that blocks stand
    behind: which block is the last on the path, and how many rows of the path come after it; 0 and `none` where there
    is none."""
    given, found = [x.contiguous() for x in (kept, counts, ends)], torch.empty(2, len(kept), dtype=torch.int64)
    _library().zb_last_block(
        *(ctypes.c_void_p(x.data_ptr()) for x in given),
        *(ctypes.c_int64(n) for n in (len(kept), kept.shape[1], ends.shape[1], none)),
        *(ctypes.c_void_p(x.data_ptr()) for x in found),
    )
    return found[0], found[1]


def read_sum(x: Tensor, passes: int = 1, streams: int = 8) -> float:
    """Streams a float32 tensor `passes` times with every thread, each along 8 streams or 1; the sum keeps the loads
    alive. Each thread reads the same part in every pass."""
    numbers = (x.numel(), passes, streams, torch.get_num_threads())
    return _library().zb_read_sum(ctypes.c_void_p(x.data_ptr()), *(ctypes.c_int64(v) for v in numbers))


class Pages:
    """Memory for weights and caches in huge pages, where the system gives some: a forward streams all of it, and with
    pages of 4 KiB every panel waits for its translation and stops the prefetcher at its end."""

    HUGE = 1 << 21  # bytes

    def __init__(self, chunk: int = HUGE) -> None:
        """Taken from the system `chunk` bytes at a time."""
        self._chunk, self._left = chunk, torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values, contiguous, at the next cache line."""
        return self.zeros(tensor.shape, tensor.dtype).copy_(tensor)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What the system gives is zero."""
        size = math.prod(shape) * dtype.itemsize
        if self._left.numel() < size:
            length = -(-max(size, self._chunk) // self.HUGE) * self.HUGE + self.HUGE
            # Private: of what could be shared with other processes most systems make no huge pages.
            memory = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel built without them
                    memory.madvise(mmap.MADV_HUGEPAGE)
            whole = torch.frombuffer(memory, dtype=torch.uint8)
            self._left = whole[-whole.data_ptr() % self.HUGE :]
        taken, self._left = self._left[:size], self._left[-(-size // 64) * 64 :]
        return taken.view(dtype).view(*shape)


class Recycled:
    """Memory for a result of every forward, given out again once no tensor lies in it any more. From the system it is
    new pages each time, and to be given those costs 5 % of a forward of seven rows."""

    MOST = 1 << 25  # bytes that are worth keeping

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._unused = sys.getrefcount(self._memory)

    def floats(self, *shape: int) -> Tensor:
        """An uninitialised float32 tensor."""
        count = math.prod(shape)
        if not 0 < 4 * count <= self.MOST:
            return torch.empty(shape)
        if len(self._memory) < 4 * count or sys.getrefcount(self._memory) > self._unused:
            self._memory = mmap.mmap(-1, max(4 * count, len(self._memory)))
        return torch.frombuffer(self._memory, dtype=torch.float32, count=count).view(shape)


class Adapter:
    """Packed low-rank matrices and mask embeddings (a `models.adapter.MaskAdapter`), for mask rows of a `Decoder`."""

    def __init__(self, adapter, dtype: torch.dtype) -> None:
        self._keep: list[Tensor] = []
        self._pages = Pages(1 << 25)
        self.columns = 0  # the most that A has in one place
        self.argument = _Adapter()
        for name in ("qkv", "out", "gate_up", "down"):
            pairs = [getattr(layer, name) for layer in adapter.layers]
            low = (_LowRank * len(pairs))()
            for entry, pair in zip(low, pairs, strict=True):
                if pair is not None:
                    self._pack(entry, pair[0].to(dtype), pair[1].to(dtype), name == "gate_up")
            setattr(self.argument, name, low)
        embedding = adapter.mask_embedding.float().contiguous()
        self._keep.append(embedding)
        self.argument.mask_embedding, self.argument.masks = embedding.data_ptr(), len(embedding)

    def _pack(self, entry: _LowRank, a: Tensor, b: Tensor, interleaved: bool) -> None:
        """A [r, K] and B [N, r] of fused projections."""
        padded = -len(a) % PANEL
        a, b = torch.nn.functional.pad(a, (0, 0, 0, padded)), torch.nn.functional.pad(b, (0, padded))
        packed, source = pack_low_rank(b, interleaved)
        self._keep += [self._pages.copy(pack(a)), self._pages.copy(packed), source]
        entry.a, entry.b, entry.source = (tensor.data_ptr() for tensor in self._keep[-3:])
        entry.rank, entry.columns = packed.numel() // (source.numel() * PANEL), len(a)
        self.columns = max(self.columns, len(a))


# In the order of `zb_drafter`.
_DRAFT_NORMS = ("input_layernorm", "hidden_norm", "post_attention_layernorm")


class _Packed:
    """Weights that a native call reads, kept alive."""

    def __init__(self, dtype: torch.dtype, **sizes: int) -> None:
        """Raises NativeUnavailable for a dtype or sizes that no kernel here takes."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise NativeUnavailable(f"{dtype} is not supported by the native CPU decoder")
        if any(size % PANEL for size in sizes.values()):
            *names, last = sizes
            raise NativeUnavailable(f"{', '.join(names)} and {last} must be multiples of 16 for the native CPU decoder")
        self._library = _library()
        self.dtype = dtype
        self._keep: list[Tensor] = []
        self._pages = Pages(1 << 26)
        self._workspace = torch.empty(0, dtype=torch.uint8)

    def _pack(self, packed: Tensor) -> int:
        return self._hold(self._pages.copy(packed))

    def _hold(self, tensor: Tensor) -> int:
        self._keep.append(tensor.contiguous())
        return self._keep[-1].data_ptr()

    def _float(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else self._hold(tensor.float())

    def _run(self, function: Any, model: ctypes.Structure, arguments: Any) -> None:
        """Call `function`, which says what workspace it needs where what there is does not do."""
        for _ in range(2):
            arguments.workspace, arguments.workspace_bytes = self._workspace.data_ptr(), self._workspace.numel()
            needed = function(ctypes.byref(model), ctypes.byref(arguments))
            if not needed:
                return
            self._workspace = torch.empty(needed, dtype=torch.uint8)
        raise RuntimeError(f"native call: a workspace of {needed} bytes is too small")


class Decoder(_Packed):
    """Packed weights of one model and the forward over them. Tensors in Hugging Face layout, on the CPU."""

    def __init__(self, config, weights, inv_freq: Tensor, dtype: torch.dtype) -> None:
        """`config` is a ModelConfig, `weights` a `transformer.Weights`. Raises NativeUnavailable."""
        super().__init__(dtype, width=config.width, ffn=config.ffn, head_dim=config.head_dim)
        self.config = config
        layers = (_Layer * config.layers)()
        for index, (layer, source) in enumerate(zip(layers, weights.layers, strict=True)):
            layer.qkv = self._pack(pack(source.qkv))
            layer.out = self._pack(pack(source.out))
            gate, up = source.gate_up.chunk(2)
            layer.gate_up = self._pack(pack_gate_up(gate, up))
            layer.down = self._pack(pack(source.down))
            layer.qkv_bias = self._float(source.qkv_bias)
            layer.out_bias = self._float(source.out_bias)
            layer.down_bias = self._float(source.down_bias)
            if source.gate_up_bias is not None:
                pair = source.gate_up_bias.view(2, -1, PANEL).transpose(0, 1).reshape(-1)
                layer.gate_up_bias = self._float(pair)
            layer.attention_norm = self._float(source.attention_norm)
            layer.mlp_norm = self._float(source.mlp_norm)
            layer.q_norm, layer.k_norm = self._float(source.q_norm), self._float(source.k_norm)
            layer.window = (config.windows[index] if config.windows else None) or 0
        self._layers = layers
        self.packed_head = None if weights.head is None else self._pages.copy(pack(weights.head))
        self._model = _Model(
            config.layers,
            config.width,
            config.ffn,
            config.heads,
            config.kv_heads,
            config.head_dim,
            config.vocab,
            dtype == torch.bfloat16,
            config.rms_eps,
            layers,
            self._hold(weights.embedding),
            None if self.packed_head is None else self.packed_head.data_ptr(),
            self._float(weights.norm),
            self._float(inv_freq),
        )
        self._logits = Recycled()

    def with_head(self, packed: Tensor, vocab: int) -> _Model:
        """The same model, for as long as this decoder lives, with a packed head [vocab, D] in place of its own."""
        model = _Model.from_buffer_copy(self._model)
        model.head, model.vocab = packed.data_ptr(), vocab
        return model

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] after the final norm -> float32 logits [..., V]."""
        assert self.packed_head is not None
        flat, vocab = hidden.reshape(-1, self.config.width).float(), self.config.vocab
        return _linear(self._library, flat, self.packed_head, vocab).view(*hidden.shape[:-1], vocab)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        visible: Tensor,
        lengths: Tensor,
        keys: Tensor,
        values: Tensor,
        capacity: int,
        logit_rows: Tensor,
        capture: Sequence[int],
        masks: Tensor | None = None,
        adapter: Adapter | None = None,
    ) -> tuple[Tensor, Tensor]:
        """ids, positions, masks [B, R] int64; visible [B, R, R] bool; logit_rows [n] flat row indices.

        Returns float32 logits [n, V] and captured hidden states [len(capture), B, R, D].
        """
        batch, rows = ids.shape
        logits = self._logits.floats(logit_rows.numel(), self.config.vocab)
        captured = torch.empty(len(capture), batch, rows, self.config.width)
        layers = (ctypes.c_int64 * len(capture))(*capture)
        sections = BEFORE + LAYER * self.config.layers + AFTER
        times = None if _recorded is None else torch.zeros(1 + len(sections), dtype=torch.int64)
        arguments = _Batch(
            batch,
            rows,
            capacity,
            logit_rows.numel(),
            len(capture),
            torch.get_num_threads(),
            *(t.data_ptr() for t in (ids, positions, lengths, visible)),
            None if masks is None else masks.data_ptr(),
            ctypes.pointer(adapter.argument) if adapter else None,
            keys.data_ptr(),
            values.data_ptr(),
            logit_rows.data_ptr(),
            ctypes.addressof(layers),
            logits.data_ptr(),
            captured.data_ptr(),
            times=None if times is None else times.data_ptr(),
        )
        self._run(self._library.zb_forward, self._model, arguments)
        if times is not None and _recorded is not None:
            _recorded.append(
                Timed(
                    sections,
                    tuple(times.tolist()),
                    batch * rows,
                    tuple(lengths.tolist()),
                    float(visible.sum()),
                    logit_rows.numel(),
                    self.config,
                    self.dtype.itemsize,
                )
            )
        return logits, captured


class Drafter(_Packed):
    """Packed weights of an EAGLE-3 drafter and the levels of a draft over them; its cache is laid out as a decoder's.

    `keys` and `values` [B, kv_heads, S, d], S a multiple of 16, hold the committed pairs `lengths` [B], then what is
    under way. Token ids, `lengths` and `last` are int64, hidden states and features float32.
    """

    def __init__(
        self,
        config,
        weights: Mapping[str, Tensor],
        embedding: Tensor,
        inv_freq: Tensor,
        target_ids: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """`config` is an Eagle3Config, `weights` have the names of the original layout. Raises NativeUnavailable."""
        layer = config.layer
        sizes = {
            "width": layer.width,
            "ffn": layer.ffn,
            "head_dim": layer.head_dim,
            "target width": config.target_width,
        }
        super().__init__(dtype, **sizes)
        self.config = config
        attention, mlp = "midlayer.self_attn.", "midlayer.mlp."
        self._head = self._pages.copy(pack(weights["lm_head.weight"]))
        tap_norms = [weights[f"fc_norm.{tap}.weight"] for tap in range(len(config.taps))] if config.fc_norm else None
        self._model = _Drafter(
            *(layer.width, layer.ffn, layer.heads, layer.kv_heads, layer.head_dim, config.draft_vocab),
            *(len(config.taps), config.target_width, dtype == torch.bfloat16),
            config.norm_before_residual,
            config.norm_output,
            layer.rms_eps,
            self._pack(pack(weights["fc.weight"])),
            self._pack(pack(torch.cat([weights[f"{attention}{x}_proj.weight"] for x in "qkv"]))),
            self._pack(pack(weights[f"{attention}o_proj.weight"])),
            self._pack(pack_gate_up(weights[f"{mlp}gate_proj.weight"], weights[f"{mlp}up_proj.weight"])),
            self._pack(pack(weights[f"{mlp}down_proj.weight"])),
            self._head.data_ptr(),
            self._hold(embedding.to(dtype)),
            None if tap_norms is None else self._float(torch.stack(tap_norms)),
            self._float(weights["input_norm.weight"] if config.norm_before_fc else None),
            *(self._float(weights[f"midlayer.{name}.weight"]) for name in _DRAFT_NORMS),
            self._float(weights["norm.weight"]),
            self._float(inv_freq),
            None if target_ids is None else self._hold(target_ids),
        )

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [..., h] after the final norm -> float32 logits [..., draft vocab]."""
        flat = hidden.reshape(-1, self.config.layer.width)
        vocab = self.config.draft_vocab
        return _linear(self._library, flat, self._head, vocab).view(*hidden.shape[:-1], vocab)

    def read_pairs(self, taps: Sequence[Tensor], ids: Tensor, lengths: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Taps, each [B, R, target width], and ids [B, R] of pairs behind the committed ones -> features [B, R, h]."""
        features = torch.empty(*ids.shape, self.config.layer.width)
        self._call(ids, lengths, keys, values, features, taps=taps)
        return features

    def read_nodes(
        self, ids: Tensor, features: Tensor, before: int, visible: Tensor, lengths: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """ids [B, k] and the features [B, k, h] they follow, `before` nodes having been read -> features [B, k, h].

        `visible` [B, k, before + k] says which nodes a node sees, itself included."""
        features = features.clone(memory_format=torch.contiguous_format)
        self._call(ids, lengths, keys, values, features, before=before, visible=visible.contiguous())
        return features

    def draft(
        self,
        taps: Sequence[Tensor],
        ids: Tensor,
        last: Tensor,
        lengths: Tensor,
        keys: Tensor,
        values: Tensor,
        depth: int,
        top_k: int = 1,
        confidence: float = 0.0,
        active: Sequence[bool] = (),
    ) -> tuple[Tensor, Tensor | None, list[int]]:
        """Read pairs, of which last[b] is sequence b's last one, and draft a chain from there: `depth` levels, or fewer
        where the drafts so far of no sequence, or of no `active` one, have at least the chance `confidence` by the
        drafter.

        Returns the target's ids [B, levels, top_k] of the likeliest tokens, of which the first goes on; with top_k > 1
        the logs of the chances of the chain up to there and of each, alike; and when each level was done, ns of
        `time.perf_counter_ns`."""
        tokens = torch.empty(len(ids), depth, top_k, dtype=torch.int64)
        scores = torch.empty(tokens.shape) if top_k > 1 else None
        features = torch.empty(*ids.shape, self.config.layer.width)
        say = torch.tensor(active, dtype=torch.uint8) if active else None
        place = (lengths, keys, values, features)
        ends = self._call(
            ids, *place, taps=taps, last=last, tokens=tokens, scores=scores, confidence=confidence, active=say
        )
        return tokens[:, : len(ends)], None if scores is None else scores[:, : len(ends)], ends

    def _call(
        self,
        ids: Tensor,
        lengths: Tensor,
        keys: Tensor,
        values: Tensor,
        features: Tensor,
        taps: Sequence[Tensor] = (),
        before: int = 0,
        visible: Tensor | None = None,
        last: Tensor | None = None,
        tokens: Tensor | None = None,
        scores: Tensor | None = None,
        confidence: float = 0.0,
        active: Tensor | None = None,
    ) -> list[int]:
        """Returns when each level was done."""
        batch, rows = ids.shape
        chain = 0 if tokens is None else tokens.shape[1]
        given = [ids.contiguous(), *(tap.contiguous() for tap in taps)]  # kept alive
        pointers = (ctypes.c_void_p * len(taps))(*(tap.data_ptr() for tap in given[1:]))
        times = torch.empty(max(chain, 1), 1 + len(LEVEL), dtype=torch.int64)
        levels = ctypes.c_int64()
        arguments = _Draft(
            *(batch, rows, keys.shape[2], before, chain, torch.get_num_threads()),
            given[0].data_ptr(),
            lengths.data_ptr(),
            pointers if taps else None,
            None if visible is None else visible.data_ptr(),
            *(t.data_ptr() for t in (keys, values, features)),
            *(None if t is None else t.data_ptr() for t in (last, tokens, scores)),
            1 if tokens is None else tokens.shape[2],
            confidence,
            None if active is None else active.data_ptr(),
            ctypes.pointer(levels),
            times=times.data_ptr(),
        )
        self._run(self._library.zb_draft_levels, self._model, arguments)
        times = times[: levels.value]
        if _recorded is not None:
            _recorded.extend(self._timed(times.tolist(), rows, lengths, bool(taps), visible, last))
        return times[:, -1].tolist()

    def _timed(
        self,
        times: list[list[int]],
        rows: int,
        lengths: Tensor,
        pairs: bool,
        visible: Tensor | None,
        last: Tensor | None,
    ) -> Iterator[Timed]:
        batch = len(lengths)
        seen = batch * rows * (rows + 1) // 2 if visible is None else int(visible.sum())
        for level, clock in enumerate(times):
            contexts = lengths if level == 0 or last is None else lengths + last + level
            names = LEVEL if last is not None else LEVEL[:-3]
            ran = [i for i, name in enumerate(names) if name != "draft fuse" or (pairs and level == 0)]
            yield Timed(
                tuple(LEVEL[index] for index in ran),
                (*(clock[index] for index in ran), clock[ran[-1] + 1]),
                batch * (1 if level else rows),
                tuple(contexts.tolist()),
                float(batch if level else seen),
                0 if last is None else batch,
                self.config,
                self.dtype.itemsize,
            )


class BlockDrafter(_Packed):
    """A DFlash drafter over the `Decoder` of its layers: what it reads, its block and its choice are one call.

    Its cache is the decoder's, `keys` and `values` [L, B, kv_heads, S, d] with `lengths` [B] tokens; hidden states and
    logits are float32, ids int64.
    """

    def __init__(self, config, layers: Decoder, fc: Tensor, kv: Tensor, norm: Tensor, key_norms: Tensor, head: Tensor):
        """`config` is a DFlashConfig. Packed: `fc` [D, taps D], `kv` [L 2 kv_heads d, D], of each layer keys, then
        values, and the head [V, D]. `norm` [D] and `key_norms` [L, .., d] are any floats."""
        super().__init__(layers.dtype)
        self.config, self._layers, self._logits = config, layers, Recycled()
        self._keep += [fc, kv, head]
        self._model = layers.with_head(head, config.body.vocab)
        self._ids = torch.empty(0, 0, dtype=torch.int64)
        self._context = _Context(
            len(config.taps), fc.data_ptr(), kv.data_ptr(), self._float(norm), self._float(key_norms)
        )

    def read(
        self, taps: Sequence[Tensor], counts: Sequence[int], lengths: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Store what the first counts[b] rows of the taps, each [B, R, D], become: the last tokens of `lengths`."""
        given = [tap.contiguous() for tap in taps]
        arguments = self._arguments(given, counts, lengths, keys, values)
        self._call(self._library.zb_read, arguments, CONTEXT, lengths)

    def draft(
        self,
        anchor: Tensor,
        rows: int,
        lengths: Tensor,
        keys: Tensor,
        values: Tensor,
        taps: Sequence[Tensor] = (),
        counts: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """Read as `read` does, where there are taps, then draft a block of so many rows, the first the anchors [B].

        Returns the logits [B, rows - 1, V] of the others, and where each is largest."""
        batch = len(anchor)
        if self._ids.shape != (batch, rows):
            self._ids = torch.full((batch, rows), self.config.mask_id)
        self._ids[:, 0] = anchor
        given, wanted = [tap.contiguous() for tap in taps], _behind_anchors(batch, rows)
        logits = self._logits.floats(batch, rows - 1, self.config.body.vocab)
        likeliest = torch.empty(batch, rows - 1, dtype=torch.int64)
        arguments = self._arguments(given, counts, lengths, keys, values)
        arguments.rows, arguments.ids = rows, self._ids.data_ptr()
        arguments.wanted, arguments.logit_rows = wanted.numel(), wanted.data_ptr()
        arguments.logits, arguments.likeliest = logits.data_ptr(), likeliest.data_ptr()
        block = (*BEFORE, *LAYER * self.config.body.layers, *AFTER, "argmax")
        sections = (CONTEXT if taps else ()) + tuple(f"draft {name}" for name in block)
        self._call(self._library.zb_forward, arguments, sections, lengths)
        return logits, likeliest

    def _arguments(
        self, taps: Sequence[Tensor], counts: Sequence[int], lengths: Tensor, keys: Tensor, values: Tensor
    ) -> _Batch:
        """Of what is to be read. The caller keeps the taps alive."""
        arguments = _Batch(
            batch=len(lengths),
            capacity=keys.shape[3],
            threads=torch.get_num_threads(),
            lengths=lengths.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
        )
        if taps:
            arguments.context = ctypes.pointer(self._context)
            arguments.taps = (ctypes.c_void_p * len(taps))(*(tap.data_ptr() for tap in taps))
            arguments.counts = (ctypes.c_int64 * len(counts))(*counts)
            arguments.unread = taps[0].shape[1]
        return arguments

    def _call(self, function: Any, arguments: _Batch, sections: tuple[str, ...], lengths: Tensor) -> None:
        times = None if _recorded is None else torch.zeros(1 + len(sections), dtype=torch.int64)
        arguments.times = None if times is None else times.data_ptr()
        self._run(function, self._model, arguments)
        if times is not None and _recorded is not None:
            _recorded.append(
                Timed(
                    sections,
                    tuple(times.tolist()),
                    arguments.batch * arguments.rows,
                    tuple(lengths.tolist()),
                    float(arguments.batch * arguments.rows**2),
                    arguments.wanted,
                    self.config,
                    self.dtype.itemsize,
                    read=arguments.batch * arguments.unread,
                )
            )


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _behind_anchors(batch: int, rows: int) -> Tensor:
    """[B (R - 1)] flat indices of all rows of blocks but their anchors."""
    return torch.arange(batch * rows).view(batch, rows)[:, 1:].flatten().contiguous()


def key_panels(keys: Tensor) -> Tensor:
    """Cached keys [.., S, d] as they lie: [.., S/16, d/U, 16, U]."""
    unit = _library().zb_key_unit(ctypes.c_int64(keys.element_size()))
    return keys.view(*keys.shape[:-2], -1, keys.shape[-1] // unit, PANEL, unit)


def commit(keys: Tensor, values: Tensor, capacity: int, lengths: Tensor, slots: Tensor) -> None:
    """Move cached rows: slots [B, K] absolute, ascending, -1 padded -> directly after each sequence's prefix."""
    layers, batch, heads, _, dim = values.shape
    numbers = (values.element_size(), layers, batch, heads, capacity, dim)
    start = time.perf_counter_ns()
    _library().zb_commit(
        ctypes.c_void_p(keys.data_ptr()),
        ctypes.c_void_p(values.data_ptr()),
        *(ctypes.c_int64(n) for n in numbers),
        ctypes.c_void_p(lengths.data_ptr()),
        ctypes.c_void_p(slots.data_ptr()),
        ctypes.c_int64(slots.shape[1]),
    )
    if _recorded is not None:
        _recorded.append(Timed(("cache commit",), (start, time.perf_counter_ns()), slots.numel()))


if __name__ == "__main__":
    print(unavailable_reason() or instruction_set(), file=sys.stdout)
