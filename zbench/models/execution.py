"""How torch runs a forward: operator by operator (eager), with compiled layers, or as recorded graphs.

A forward that reads little is bound by neither memory nor arithmetic but by its hundreds of operators, each of which
the host has to start. Compiled layers have fewer; a graph is started at once. Both cost something before they can run.
That is kept apart (`prepared`) and is part of no step: `run.py` decodes a trial again in which anything was prepared.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from zbench.models.adapter import MaskAdapter
from zbench.models.cache import Cache
from zbench.models.model import Model, Output
from zbench.models.rows import Rows
from zbench.records import PreparationRecord

SMALLEST_SPAN = 256
SMALL = 4096  # slots of a whole batch
GRAPH = "graph replay"  # how a replay is called in a trace


class ExecutionUnavailable(Exception):
    """What was asked to run the model cannot run it here; the message says why."""


def rounded(tokens: int) -> int:
    """The next of eight sizes per doubling, so that graphs over so much of a cache are few and an eighth is wasted."""
    step = max(1 << (max(tokens, SMALLEST_SPAN) - 1).bit_length() - 4, SMALLEST_SPAN // 8)
    return max(-(-tokens // step) * step, SMALLEST_SPAN)


def roomy(batch: int, tokens: int) -> int:
    """The capacity of a cache for so many tokens: a power of two where it is small, as every capacity has graphs of its
    own; else the next of eight per doubling."""
    doubled = 1 << (max(tokens, SMALLEST_SPAN) - 1).bit_length()
    return doubled if batch * doubled <= SMALL else rounded(tokens)


# --- Compiled ---


@contextmanager
def compiling(found: list[PreparationRecord], what: str) -> Iterator[None]:
    """Appends the seconds that torch compiled within. Raises ExecutionUnavailable where that failed."""
    from torch._dynamo.callback import callback_handler

    began: list[float] = []
    seconds: list[float] = []
    start = callback_handler.register_start_callback(lambda _: began.append(time.perf_counter()))
    end = callback_handler.register_end_callback(lambda _: seconds.append(time.perf_counter() - began[-1]))
    try:
        yield
    except Exception as error:
        if not began:
            raise
        line = next((line for line in str(error).splitlines() if line.strip()), "no message")
        raise ExecutionUnavailable(f"torch.compile failed: {type(error).__name__}: {line}") from error
    finally:
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)
        if seconds:
            found.append(PreparationRecord("compile", what, sum(seconds), None))


Layer = Callable[..., tuple[Tensor, Tensor]]


def compiled_layer(layer: Layer, **constants: Any) -> Layer:
    """`layer(x, inner, weights, low, step, keys, values, mask, following, **constants)` under torch.compile.

    All layers share what is compiled, since their weights are arguments. It is compiled for one row and for several,
    with and without masks, for each batch size, and not for each context.
    """
    # Beyond torch's limit it would go on uncompiled; `fullgraph` makes that an error. All models of a process count.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    fast = torch.compile(layer, fullgraph=True, dynamic=False)

    def run(
        x: Tensor, inner: Tensor, weights: Any, low: Any, step: Any, keys: Tensor, values: Tensor, mask: Tensor,
        following: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        any_size(x, 1), any_size(inner, 1), any_size(mask, 2, 3)
        any_size(keys, 2), any_size(values, 2)
        return fast(x, inner, weights, low, step, keys, values, mask, following, **constants)

    return run


def any_size(tensor: Tensor, *dims: int) -> Tensor:
    """Marks dimensions of which every size is to run the same compiled code (a size of 1 is always its own)."""
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor


# --- Graphs ---

# Runs something once on buffers that stay where they are, and gives what runs it again on what these hold by then.
Run = Callable[[], Any]
Record = Callable[[Run], Run]
Given = Sequence[Tensor | None]


class Memory(Protocol):
    """A cache; its keys tell it from others."""

    keys: Tensor

    def emptied(self) -> Self:
        """A cache without a token on the same memory, zeros as a new one: lengths on the device included."""
        ...


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: tuple[Tensor, ...]
    replay: Run
    work: Callable[..., Any]  # held for what it closes over, whose addresses are in the graph


M = TypeVar("M", bound=Memory)


@dataclass(slots=True)
class _Arena(Generic[M]):
    """Memory of a cache, handed to one cache after another: graphs have its addresses in them."""

    memory: M
    size: Hashable
    user: weakref.ref[M]
    handed: float = 0.0  # when, by `time.perf_counter`
    graphs: dict[Hashable, _Graph] = field(default_factory=dict)


class Recorded(Generic[M]):
    """Work on caches as graphs over static buffers: one for each signature, recorded when it is first asked for."""

    def __init__(self, record: Record, prepared: list[PreparationRecord]) -> None:
        """What had to be recorded is appended to `prepared`."""
        self._record, self._prepared = record, prepared
        self._arenas: dict[int, _Arena[M]] = {}
        self._all: list[dict[int, _Arena[Any]]] = [self._arenas]  # of those beside it, too

    def beside(self) -> Recorded[Any]:
        """For caches of another kind. Graphs run one after another, so that all of these share scratch memory; where
        memory is short, what none of them uses is given up."""
        other = Recorded[Any](self._record, self._prepared)
        other._all = self._all
        other._all.append(other._arenas)
        return other

    def cache(self, size: Hashable, make: Callable[[], M]) -> M:
        """An empty cache, on memory whose last user is gone where there is some of that size, else on what is made."""
        arena = next((a for a in self._arenas.values() if a.size == size and a.user() is None), None)
        if arena is None:
            memory = self._made(make)
            arena = self._arenas[memory.keys.data_ptr()] = _Arena(memory, size, weakref.ref(memory))
        cache = arena.memory.emptied()
        arena.user, arena.handed = weakref.ref(cache), time.perf_counter()
        return cache

    def unused(self, since: float) -> int:
        """Bytes of the caches that nobody was handed from a time of `time.perf_counter` on."""
        kept = [arena.memory for arenas in self._all for arena in arenas.values() if arena.handed < since]
        return sum(t.nbytes for memory in kept for t in vars(memory).values() if isinstance(t, Tensor))

    def _made(self, make: Callable[[], M]) -> M:
        while True:
            with suppress(torch.OutOfMemoryError):
                return make()
            if not self.spare():
                return make()

    def spare(self) -> bool:
        """Of the caches that nobody has any more, give up the memory and the graphs of that which was handed out first.
        False where there is none."""
        every = [(arenas, key, arena) for arenas in self._all for key, arena in arenas.items()]
        idle = [(arena.handed, key, arenas) for arenas, key, arena in every if arena.user() is None]
        if not idle:
            return False
        _, key, arenas = min(idle, key=lambda one: one[0])
        del arenas[key]
        torch.cuda.empty_cache()
        return True

    @torch.inference_mode()
    def run(self, cache: M, signature: Hashable, given: Given, work: Callable[[M, Given], Any]) -> Any:
        """What `work` gives for this cache and what is `given`; the next work writes over it.

        `work` gets buffers, and the arena's memory in place of the cache. Beside these it depends on the signature
        only: on no size that the host keeps. It may run more often than asked for, so it only writes to a cache what
        it would write there again: no length. Raises ExecutionUnavailable where it cannot be recorded, OutOfMemoryError
        where memory is short: see `spare`.
        """
        arena = self._arenas[cache.keys.data_ptr()]
        graph = arena.graphs.get(signature)
        if graph is None:
            graph = arena.graphs[signature] = self._recorded(signature, arena.memory, given, work)
        for own, tensor in zip(graph.inputs, (t for t in given if t is not None), strict=True):
            own.copy_(tensor)
        with torch.profiler.record_function(GRAPH):
            return graph.replay()

    def _recorded(self, signature: Hashable, memory: M, given: Given, work: Callable[[M, Given], Any]) -> _Graph:
        own = [None if t is None else t.clone(memory_format=torch.contiguous_format) for t in given]
        start, before = time.perf_counter(), _reserved(memory.keys.device)
        try:
            replay = self._record(lambda: work(memory, own))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            line = next(iter(str(error).splitlines()), "no message")
            raise ExecutionUnavailable(f"no graph of {signature}: {type(error).__name__}: {line}") from error
        after = _reserved(memory.keys.device)
        grown = None if before is None or after is None else after - before
        self._prepared.append(PreparationRecord("capture", str(signature), time.perf_counter() - start, grown))
        return _Graph(tuple(t for t in own if t is not None), replay, work)


def span_of(cache_sizes: Sequence[int], rows: int, capacity: int) -> int:
    """How many slots of a cache a graph reads that is to serve prefixes about as long as these, and `rows` new rows."""
    return min(rounded(max(cache_sizes) + rows), capacity)


def _reserved(device: torch.device) -> int | None:
    """Memory that torch holds on the device and cannot give back, once what runs there has ended."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # recording does so too: less than before would be held after it
    return torch.cuda.memory_reserved(device)


class Graphable(Protocol):
    """A model whose forward depends on nothing of the host but shapes and `span`: on no length, no size of a cache."""

    prepared: list[PreparationRecord]

    def empty_cache(self, batch: int, capacity: int) -> Cache: ...

    def body(
        self,
        rows: Rows,
        cache: Cache,
        logits: Tensor | None,
        capture: Sequence[int],
        adapter: MaskAdapter | None,
        span: int,
    ) -> Output:
        """The forward over the first `span` slots of the cache, which hold the prefixes and the rows at least."""
        ...


@dataclass(frozen=True, slots=True)
class _Signature:
    """What a graph has fixed."""

    batch: int
    rows: int
    wanted: int | None  # rows per sequence that ask for logits; None: all
    capture: tuple[int, ...]
    adapter: MaskAdapter | None
    masks: bool
    causal: bool
    span: int

    def __str__(self) -> str:
        asked = "all" if self.wanted is None else str(self.wanted)
        said = f"{self.batch} x {self.rows} rows, {asked} logits, {self.span} slots"
        said += f", {len(self.capture)} hidden states" * bool(self.capture) + ", masks" * self.masks
        return said + ", adapter" * (self.adapter is not None)


class Graphs(Recorded[Cache]):
    """Forwards of a model as graphs. Rows are copied into buffers, lengths are the cache's own, on the device."""

    def __init__(self, model: Graphable, record: Record, spans: bool = True) -> None:
        """Without `spans` the model's forward is the same for every span, and so is its graph."""
        super().__init__(record, model.prepared)
        self._model, self._spans = model, spans

    def new_cache(self, batch: int, capacity: int) -> Cache:
        capacity = roomy(batch, capacity)
        return self.cache((batch, capacity), lambda: self._model.empty_cache(batch, capacity))

    def forward(
        self, rows: Rows, cache: Cache, logits: Tensor | None, capture: Sequence[int], adapter: MaskAdapter | None
    ) -> Output:
        """See `Model.forward`. Raises ExecutionUnavailable where the graph cannot be recorded."""
        batch, count = rows.ids.shape
        span = span_of(cache.sizes, count, cache.capacity) if self._spans else cache.capacity
        wanted = None if logits is None else logits.shape[1]
        masks, taken = rows.masks is not None, tuple(capture)
        signature = _Signature(batch, count, wanted, taken, adapter, masks, rows.causal, span)

        def work(memory: Cache, given: Given) -> tuple[Output, Any]:
            ids, positions, parents, visible, masks, logits = given
            assert ids is not None and positions is not None and parents is not None and visible is not None
            own = Rows(ids, positions, parents, visible, signature.causal, masks)
            return self._model.body(own, memory, logits, taken, adapter, span), memory.pending

        given = (rows.ids, rows.positions, rows.parents, rows.visible, rows.masks, logits)
        out, cache.pending = self.run(cache, signature, given, work)
        hidden = {index: state.clone() for index, state in out.hidden.items()}
        return Output(out.logits.clone(), hidden, None if out.routed is None else out.routed.clone())


def record_on(device: torch.device) -> Record:
    """Graphs of CUDA or HIP. Raises ExecutionUnavailable where the device has none."""
    if device.type != "cuda":
        raise ExecutionUnavailable(f"graph needs a GPU with CUDA or HIP, the device is {device.type}")
    ahead = torch.cuda.Stream(device)  # one for all: a stream keeps a workspace of cuBLAS, tens of MB, for good
    alive = weakref.WeakSet[torch.cuda.CUDAGraph]()
    pool: Any = None

    def record(run: Run) -> Run:
        nonlocal pool
        if not alive:  # graphs run one after another and share scratch memory; that of none is not to be used again
            pool = torch.cuda.graph_pool_handle()
        graph, failed = torch.cuda.CUDAGraph(), list[Exception]()
        with torch.cuda.device(device):
            ahead.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(ahead):  # also where recording fails, which leaves torch on its stream
                    run()  # handles and workspaces are made at first use, which must not be while recording
                    with torch.cuda.graph(graph, pool=pool, stream=ahead):
                        try:
                            out = run()
                        except Exception as error:
                            failed.append(error)
                            raise
            except Exception:
                if failed:  # that the recording could not be ended well came after
                    raise failed.pop() from None
                raise
            finally:
                torch.cuda.current_stream().wait_stream(ahead)
        alive.add(graph)

        def replay() -> Any:
            graph.replay()
            return out  # held here, so that no other graph takes its memory

        return replay

    return record


def probe(model: Model) -> None:
    """Record the forward of one row. Raises ExecutionUnavailable where the device, its driver or the model refuse."""
    cache = model.new_cache(1, 1)
    model.forward(Rows.chain(torch.zeros(1, 1, dtype=torch.int64, device=model.device), cache.lengths), cache)


def graphs_on(model: Graphable, device: torch.device, spans: bool) -> Graphs:
    """`spans` as in `Graphs`. Raises ExecutionUnavailable where the device has no graphs."""
    return Graphs(model, record_on(device), spans)
