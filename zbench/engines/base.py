"""What every engine shares: the decode loop, the meter that times it, and prefill.

An engine chooses rows, runs a forward, accepts, commits:

    start(prompts)  ->  state and each sequence's first token
    step(state)     ->  the tokens each sequence gained

`generate` below is the loop around the two; it alone decides when a sequence ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from zbench.engines.plans import PREFILL_ROWS
from zbench.engines.sampling import Sampler, Sampling
from zbench.hardware.device import Device, Mark
from zbench.models.adapter import MaskAdapter
from zbench.models.cache import Cache
from zbench.models.cost import Cost
from zbench.models.model import Model, Output, routing
from zbench.models.rows import Rows
from zbench.models.team import ALONE, Spans, Team
from zbench.records import ForwardRecord, Role, ServedRecord, ServerRecord, StepRecord

Finish = Literal["eos", "length"]


@dataclass(frozen=True, slots=True)
class Request:
    """How a batch of prompts is to be continued. `seeds` has one entry per prompt."""

    limit: int  # output tokens per prompt
    sampling: Sampling
    seeds: tuple[int, ...]
    eos_ids: frozenset[int] = frozenset()  # empty: run to the limit


@dataclass(slots=True)
class State:
    """What a decode carries from step to step. Engines extend it."""

    cache: Cache
    sampler: Sampler
    last: Tensor  # [B] the last committed token of each sequence, not in the cache yet
    outputs: list[list[int]]  # committed tokens so far
    active: list[bool]


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens gained per sequence, in order; `drafted` and `accepted` count draft tokens where an engine drafts, and
    `looked_up` says whether each sequence's were copied from its text, where an engine looks there.
    `prepared` lists the outcomes (rows kept) that the next drafts were prepared for, and `covered` says whether each
    sequence's was among them, where an engine prepares any."""

    tokens: list[list[int]]
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    covered: tuple[bool, ...] = ()
    prepared: tuple[int, ...] = ()
    looked_up: tuple[bool, ...] = ()


class Engine(Protocol):
    """One decoder. `kernels` names the implementation behind each operator, for the record.

    `exact` says what is promised of the emitted tokens. True: they are those the target would pick on its own, and a
    run where they are not has failed. False: a peer in another arithmetic, checked and reported where it is greedy.
    None: comparing tokens means nothing (synthetic acceptance, sampled drafts, lossy samplers).
    """

    kernels: dict[str, str]

    @property
    def exact(self) -> bool | None: ...

    def generate(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated: ...


S = TypeVar("S", bound=State)


class Stepper(Protocol[S]):
    """An engine that decodes on our own runtime, step by step."""

    def start(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> S: ...

    def step(self, state: S, meter: Meter) -> Step: ...


@dataclass(frozen=True, slots=True)
class Generated:
    """What came of a batch. A server also says what it was sent, when each request was answered, and how long all took:
    it has no steps that a meter could time."""

    outputs: list[list[int]]
    finish: list[Finish]
    prompts: Sequence[Sequence[int]] | None = None  # as sent, where that differs from what was asked for
    served: Sequence[ServedRecord] = ()
    wall_seconds: float | None = None
    server: ServerRecord | None = None


def generate(engine: Stepper[S], prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated:
    """Decode a batch until every sequence has met EOS or its limit. The EOS token counts as output."""
    finish: list[Finish] = ["length"] * len(prompts)
    with meter.step():
        state = engine.start(prompts, request, meter)
        first = [[token] for token in state.last.tolist()]
        meter.gained(commit(first, state.outputs, state.active, request, finish))
    while any(state.active):
        with meter.step():
            step = engine.step(state, meter)
            counts = commit(step.tokens, state.outputs, state.active, request, finish)
            # Drafts beyond EOS or the limit do not count as accepted; the token that ends the output counts as the
            # bonus, so that accepted + 1 is what a step gained, always.
            accepted = tuple(max(min(a, count - 1), 0) for a, count in zip(step.accepted, counts, strict=False))
            meter.gained(counts, step.drafted, accepted, step.covered, step.prepared, step.looked_up)
    return Generated(state.outputs, finish)


def commit(
    gained: list[list[int]], outputs: list[list[int]], active: list[bool], request: Request, finish: list[Finish]
) -> tuple[int, ...]:
    """Append what each active sequence gained, cut at EOS and at the limit; returns how many tokens counted."""
    counts = []
    for index, output in enumerate(outputs):
        before = len(output)
        for token in gained[index] if active[index] else ():
            output.append(token)
            if token in request.eos_ids:
                finish[index] = "eos"
            if token in request.eos_ids or len(output) == request.limit:
                active[index] = False
                break
        counts.append(len(output) - before)
    return tuple(counts)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one prefill forward feeds of every prompt."""

    ids: Tensor  # [B, R]
    counts: list[int]  # how many of the R are the prompt's, per sequence
    ends: list[bool]  # whether the prompt's last token is among them

    @property
    def last(self) -> Tensor:
        """[B, 1] the row of each prompt's last token here."""
        return torch.tensor([[max(count - 1, 0)] for count in self.counts], device=self.ids.device)


def chunks(prompts: Sequence[Sequence[int]], model: Model, room: int) -> Iterator[Chunk]:
    """Ragged prompts, PREFILL_ROWS at a time. Where forwards are recorded the last one has rows behind the longest
    prompt too, as far as there is room for so many tokens: its sizes are few, whatever the prompts' are."""
    sizes = [len(prompt) for prompt in prompts]
    longest = max(sizes)
    width = longest if model.graphs is None else max(longest, min(prefill_width(longest), room))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    ids = ids.to(model.device)
    for start in range(0, longest, PREFILL_ROWS):
        part = ids[:, start : start + PREFILL_ROWS]
        rows = part.shape[1]
        yield Chunk(
            part,
            [max(0, min(size - start, rows)) for size in sizes],
            [0 < size - start <= rows for size in sizes],
        )


def prefill_width(tokens: int) -> int:
    """So many tokens and what makes the last forward one of 16 sizes: four per doubling, none below 16 rows."""
    whole = (tokens - 1) // PREFILL_ROWS * PREFILL_ROWS
    rest = tokens - whole
    step = max(1 << max((rest - 1).bit_length() - 3, 0), 16)
    return whole + -(-rest // step) * step


def prefill(
    model: Model, cache: Cache, prompts: Sequence[Sequence[int]], meter: Meter, capture: Sequence[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """Fill the cache with ragged prompts, PREFILL_ROWS at a time.

    Returns the logits [B, V] after each prompt's last token, and captured hidden states [B, longest, D].
    """
    final = torch.empty(len(prompts), model.config.vocab, device=model.device)
    captured: list[dict[int, Tensor]] = []
    for chunk in chunks(prompts, model, cache.capacity):
        # Only the sequences that end in this chunk need logits; the others ask for none if nobody ends here.
        wanted = chunk.last if any(chunk.ends) else chunk.last[:, :0]
        rows = Rows.chain(chunk.ids, cache.lengths)
        out = meter.forward(model, "prefill", rows, cache, logits=wanted, capture=capture)
        cache.extend(chunk.counts)
        for row in (row for row, ends in enumerate(chunk.ends) if ends):
            final[row] = out.logits[row, 0]
        captured.append(out.hidden)
    longest = max(len(prompt) for prompt in prompts)
    return final, {index: torch.cat([part[index] for part in captured], 1)[:, :longest] for index in capture}


Launches = Mapping[tuple[str, str, int], int]  # model, role and rows of a forward -> what it starts


@dataclass(frozen=True, slots=True)
class _Forward:
    step: int
    name: str
    role: Role
    rows: int
    contexts: list[int]
    cost: Callable[[], Cost]
    start: Mark
    end: Mark
    collectives: Spans | None
    passes: int


@dataclass(slots=True)
class _Step:
    start: Mark
    end: Mark = None
    phases: dict[str, list[tuple[Mark, Mark]]] = field(default_factory=dict)
    committed: tuple[int, ...] = ()
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    covered: tuple[bool, ...] = ()
    prepared: tuple[int, ...] = ()
    looked_up: tuple[bool, ...] = ()


class Meter:
    """Times one trial. Marks are taken while decoding and turned into seconds and bytes afterwards: no added sync."""

    def __init__(self, device: Device, team: Team = ALONE, launches: Launches = {}) -> None:  # noqa: B006  (read only)
        """`launches` are what was counted elsewhere, see `engines/launches.py`."""
        self.device, self.team, self._launches = device, team, launches
        team.taken()  # what ran since the last trial (the lossless check does) is none of this one's
        self._steps: list[_Step] = []
        self._forwards: list[_Forward] = []

    def begin_step(self) -> None:
        self.team.alive += 1
        self._steps.append(_Step(self.device.mark()))

    def end_step(self) -> None:
        self._steps[-1].end = self.device.mark()

    @contextmanager
    def step(self) -> Iterator[None]:
        self.begin_step()
        yield
        self.end_step()

    @contextmanager
    def phase(self, name: Literal["accept", "commit"]) -> Iterator[None]:
        start = self.device.mark()
        yield
        self._steps[-1].phases.setdefault(name, []).append((start, self.device.mark()))

    def gained(
        self,
        committed: tuple[int, ...],
        drafted: tuple[int, ...] = (),
        accepted: tuple[int, ...] = (),
        covered: tuple[bool, ...] = (),
        prepared: tuple[int, ...] = (),
        looked_up: tuple[bool, ...] = (),
    ) -> None:
        step = self._steps[-1]
        step.committed, step.drafted, step.accepted = committed, drafted, accepted
        step.covered, step.prepared, step.looked_up = covered, prepared, looked_up

    def forward(
        self,
        model: Model,
        role: Role,
        rows: Rows,
        cache: Cache,
        *,
        logits: Tensor | None = None,
        capture: Sequence[int] = (),
        adapter: MaskAdapter | None = None,
        name: str = "target",
    ) -> Output:
        """`model.forward`, timed and counted."""
        contexts = cache.sizes
        start = self.device.mark()
        out = model.forward(rows, cache, logits=logits, capture=capture, adapter=adapter)
        end = self.device.mark()

        # Kept until the trial is over, so without the logits.
        wanted, routed = out.logits.shape[0] * out.logits.shape[1], out.routed

        def cost() -> Cost:
            pairs = None if rows.causal else int(rows.visible.sum()) / len(rows.ids)
            seen = None if routed is None else routing(routed)
            places = None
            if model.config.windows and not rows.causal:
                places = (rows.positions.cpu() - torch.tensor(contexts)[:, None]).tolist()
            bare = model.cost(rows.ids.shape[1], contexts, wanted, pairs, seen, places)
            if adapter is None or rows.masks is None:
                return bare
            return adapter.added(bare, int((rows.masks >= 0).sum()))

        self.add_forward(role, rows.ids.shape[1], contexts, cost, start, end, name)
        return out

    def add_forward(
        self,
        role: Role,
        rows: int,
        contexts: list[int],
        cost: Callable[[], Cost],
        start: Mark,
        end: Mark,
        name: str = "target",
        passes: int = 1,
    ) -> None:
        """A forward that ran elsewhere between two marks, or `passes` of them as one."""
        collectives, step = self.team.taken(), len(self._steps) - 1
        self._forwards.append(_Forward(step, name, role, rows, contexts, cost, start, end, collectives, passes))

    def records(self) -> tuple[tuple[StepRecord, ...], tuple[ForwardRecord, ...]]:
        """Resolve all marks. Call after the decode; steps that gained nothing at the very end are dropped."""
        self.device.synchronize()
        seconds = self.device.seconds
        while self._steps and not self._steps[-1].committed:
            self._steps.pop()
        steps = tuple(
            StepRecord(
                seconds=seconds(s.start, s.end),
                accept_seconds=sum(seconds(*pair) for pair in s.phases.get("accept", ())),
                commit_seconds=sum(seconds(*pair) for pair in s.phases.get("commit", ())),
                committed=s.committed,
                drafted=s.drafted,
                accepted=s.accepted,
                covered=s.covered,
                prepared=s.prepared,
                looked_up=s.looked_up,
            )
            for s in self._steps
        )
        # A step's tokens are credited to its last target forward, the one whose logits decided them.
        credit = {f.step: index for index, f in enumerate(self._forwards) if f.name == "target"}
        forwards = []
        for index, f in enumerate(self._forwards):
            cost = f.cost()
            decided = credit.get(f.step) == index and f.step < len(steps)
            forwards.append(
                ForwardRecord(
                    step=f.step,
                    model=f.name,
                    role=f.role,
                    rows=f.rows,
                    batch=len(f.contexts),
                    context=sum(f.contexts) / len(f.contexts),
                    flops=cost.flops,
                    bytes_read=cost.bytes_read,
                    bytes_written=cost.bytes_written,
                    seconds=seconds(f.start, f.end),
                    committed=sum(steps[f.step].committed) if decided else 0,
                    experts=cost.experts,
                    collective_bytes=cost.collective_bytes if self.team.size > 1 else None,
                    collective_seconds=None if f.collectives is None else sum(seconds(*span) for span in f.collectives),
                    launches=self._launches.get((f.name, f.role, f.rows)),
                    passes=f.passes,
                )
            )
        return steps, tuple(forwards)

    def step_ends(self) -> list[float]:
        """Seconds from the start of the first step to the end of each."""
        return [self.device.seconds(self._steps[0].start, step.end) for step in self._steps]


def new_state(model: Model, prompts: Sequence[Sequence[int]], request: Request, headroom: int = 0) -> State:
    """An empty decode state whose cache holds the longest prompt, the output, and `headroom` uncommitted rows."""
    capacity = max(len(prompt) for prompt in prompts) + request.limit + headroom
    batch = len(prompts)
    return State(
        cache=model.new_cache(batch, capacity),
        sampler=Sampler(request.sampling, request.seeds, request.limit, model.device),
        last=torch.zeros(batch, dtype=torch.int64, device=model.device),
        outputs=[[] for _ in prompts],
        active=[True] * batch,
    )
