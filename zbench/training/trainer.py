"""One trainer for every objective: the same batches in the same order, AdamW, warm-up and cosine.

All randomness follows from the seed and the number of the step, so that a run that was interrupted goes on as if it
had not been: bit by bit where its length was given in steps. Where it was given in minutes, the learning rate follows
the clock. Evaluations and checkpoints draw from no random numbers of training's, so it does not matter when they come.

Several ranks (`zbench.ranks`, started by torchrun) take the batches of one order in turn, and step on the mean gradient
of what they learn from: what one process does with their batches joined. Rank 0 alone evaluates, writes and speaks.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from zbench.cache import atomic_write, check_writable
from zbench.errors import UserError
from zbench.models.checkpoint import Trained, save_whole
from zbench.models.config import parameter_count
from zbench.models.loading import some
from zbench.ranks import World
from zbench.training.corpus import Conversation, Corpus
from zbench.training.options import differences
from zbench.training.target import TOP, Batch, Read, Target

STATE, PROGRESS, LOG = "training.safetensors", "training.json", "log.jsonl"
READS = "reads"  # in the corpus's folder: what the target said about it
STALLED = 1800.0  # seconds without progress after which a rank counts as lost; an evaluation is shorter
_TIMED = 3  # steps that say how long the others will take
_FIRST = 10  # the step after which a run measured in minutes is evaluated first: a broken one shows soon
_CONTEXT = 256  # tokens, for the estimate of memory
_READ = ".read.safetensors"
_BY_HEART = 1.25  # as many drafts accepted of text that is learnt from as of other text: not for lack of steps
_POOL = 16  # batches that are formed together, so that conversations of like length meet


@dataclass(frozen=True, slots=True)
class Scores:
    """What one forward of an objective says."""

    loss: Tensor
    right: Tensor  # [n, drafts] bool: whether the draft at each place is the conversation's token; of evaluations only
    tokens: int  # drafted
    weight: Tensor  # of these in all: the loss is a sum divided by it
    parts: dict[str, Tensor] = field(default_factory=dict)  # what the loss is made of, for evaluations


class Objective(Protocol):
    """`parameters` are float32 leaves that require gradients. `asks` says whether it asks the frozen target; without
    that a read is the batch alone. `capture` names the hidden states it reads, `context` says whether it reads the
    target's keys and values."""

    name: str
    target: Target
    parameters: dict[str, Tensor]
    asks: bool
    capture: tuple[int, ...]
    context: bool

    @property
    def settings(self) -> Any: ...

    @property
    def rows(self) -> tuple[int, int]:
        """Rows per conversation and step that gradients pass, and through how many layers."""
        ...

    def score(self, read: Read, generator: torch.Generator, evaluate: bool = False) -> Scores: ...

    def save(self, folder: Path) -> None: ...

    def resume(self, folder: Path) -> None:
        """Take over what a run that was saved there had of its corpus, which may have grown since."""
        ...


@dataclass(frozen=True, slots=True)
class Settings:
    seed: int = 0
    batch: int = 4  # conversations per step
    rate: float = 2e-3
    warm_up: float = 0.04  # of the whole run
    floor: float = 0.05  # of the rate, at the end
    clip: float = 1.0
    steps: int | None = None
    minutes: float | None = None
    longest: int = 640  # tokens of a conversation that are used
    keep: float = 6.0  # gigabytes of disk for what the target said about batches
    evaluate_every: float = 300.0  # seconds, or a tenth of the run if that is less
    held_out: int = 32  # conversations to evaluate on
    known: int = 16  # conversations that are learnt from, to tell what is learnt by heart


@dataclass(slots=True)
class State:
    """How far a run is."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0  # drafted in training
    best: float = 0.0  # tokens per step on held-out text; 0: nothing was evaluated
    best_step: int = 0


def train(
    objective: Objective,
    target: Target,
    corpus: Corpus,
    out: Path,
    settings: Settings,
    resume: bool = False,
    advance: Callable[[float, str], None] = lambda done, what: None,
    say: Callable[[str], None] = lambda line: None,
    world: World | None = None,
) -> dict[str, Any]:
    """Train into `out`; returns the last evaluation, on rank 0.

    After every evaluation `out` holds the drafter that did best on held-out text so far, since one that learns its text
    by heart gets worse; of a model that changes, which its drafts alone do not judge, the last.

    Raises UserError where there is nothing to resume, or what is there is of another run. On KeyboardInterrupt one
    process writes what it has and raises it again with the words for it; several ranks have their last checkpoint.
    """
    world = world or World()
    if world.rank:
        advance, say = (lambda done, what: None), (lambda line: None)
    if (settings.steps is None) == (settings.minutes is None):
        raise UserError("say how long to train: a number of steps or of minutes")
    batches, tests, known = _batches(corpus, settings, world.size)
    optimizer = torch.optim.AdamW(list(objective.parameters.values()), settings.rate, (0.9, 0.95), weight_decay=0.0)
    checkpoint = _Checkpoint(objective, optimizer, settings, out, world.size)
    # A rank that does not see the folder must not leave the others waiting.
    state = world.together(lambda: checkpoint.restore() if resume else checkpoint.begin(world.rank == 0))
    before = replace(state)
    learners = Learners(world, target.device)
    reads = (corpus.folder or out) / READS
    reader = Reader(target, objective, batches, reads, settings.keep)
    test_reader, known_reader = (Reader(target, objective, each, reads, settings.keep) for each in (tests, known))
    order = batch_order(len(batches), settings.seed, state.step * world.size)
    evaluated, saved = state.seconds, state.step
    last: dict[str, Any] = {}
    lines: list[dict[str, Any]] = []  # for the log, with the next checkpoint

    def evaluation(loss: float | None = None) -> dict[str, Any]:
        found = evaluate(objective, test_reader, settings.seed)
        if objective.asks and state.step:
            found["accepted_known"] = evaluate(objective, known_reader, settings.seed)["accepted"]
        if found["accepted"] >= state.best or not objective.asks:
            state.best, state.best_step = found["accepted"], state.step
        told = {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 1), "loss": loss}
        return found | told | {"best_step": state.best_step}

    def keep(*evaluations: dict[str, Any]) -> None:
        nonlocal saved
        with _whole():
            checkpoint.save(state, [*lines, *evaluations])
            saved = state.step
        lines.clear()
        for each in evaluations:
            say(f"step {state.step}, {state.tokens} tokens: held out {_said(each)}")

    def clock() -> float:
        """Rank 0's, that all go through the same schedule."""
        return world.told(time.monotonic() - began)

    try:
        if _share(state, settings) >= 1.0:
            say(f"this run is over after {state.step} steps; to go on, give it more --steps or --minutes")
            if world.rank == 0 and not (last := _logged(out, state.step)):  # interrupted before its last evaluation
                last = evaluation()
                keep(last)
            return last
        reading = min((settings.steps or math.inf) * world.size / len(batches), 1.0)  # share of the batches
        disk = min(reading * reader.to_keep() + test_reader.to_keep(), 1e9 * settings.keep)
        say(estimate(objective, target, settings, disk, world.size))
        if world.rank == 0 and state.step == 0:
            lines.append(evaluation())
            say(f"step 0, before training: held out {_said(lines[0])}")
            if objective.asks:
                checkpoint.save_drafter()
        began = time.monotonic() - before.seconds
        while _share(state, settings) < 1.0:
            read = reader.read([next(order) for _ in range(world.size)][world.rank])
            loss, tokens = _learn(objective, optimizer, read, settings, state, learners)
            with _whole():
                optimizer.step()
                state.step, state.tokens = state.step + 1, state.tokens + tokens
            state.seconds = clock()
            share = _share(state, settings)
            if state.step == before.step + _TIMED and share < 1.0:
                say(forecast(state.seconds - before.seconds, state, settings, objective.asks))
            if share >= 1.0 or _due(state, evaluated, settings):
                if world.rank == 0:
                    last = evaluation(loss)
                evaluated = state.seconds = clock()
                if world.rank == 0:
                    keep(last)
                if share >= 1.0 and world.rank == 0 and objective.asks:
                    for line in _judged(last, state, out):
                        say(line)
            rate = (state.tokens - before.tokens) / max(state.seconds - before.seconds, 1e-9)
            advance(share, f"step {state.step}, loss {loss:.3f}, {rate:.0f} tokens/s")
    except KeyboardInterrupt as stopped:
        # Another rank may be anywhere, and the first to be interrupted ends them all.
        if world.size > 1 or not state.step:
            raise
        if state.step > saved:
            keep()
        raise KeyboardInterrupt(f"{out} has all {state.step} steps, continue with --resume") from stopped
    return last


class Learners:
    """The ranks of a run as one learner."""

    def __init__(self, world: World, device: torch.device) -> None:
        self.world = world
        on_gpus = world.size > 1 and device.type == "cuda"
        self._group = dist.new_group(backend="nccl") if on_gpus else None  # None: gloo, which all ranks have joined

    def mean(self, parameters: Sequence[Tensor], scores: Scores) -> tuple[float, int]:
        """Every gradient becomes the ranks' mean, each counting for as much as its loss is a mean of; returns loss and
        tokens of all. One collective per parameter, all under way at once: no copy of the gradients."""
        if self.world.size == 1:
            return scores.loss.item(), scores.tokens
        weight = scores.weight.item()
        said = self.world.all((weight, weight * scores.loss.item(), scores.tokens))
        whole = max(sum(one[0] for one in said), 1e-9)
        with self.world.waiting():
            under_way = []
            for parameter in parameters:
                parameter.grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                parameter.grad *= weight / whole
                under_way.append(dist.all_reduce(parameter.grad, group=self._group, async_op=True))
            for work in under_way:
                work.wait()
        return sum(one[1] for one in said) / whole, sum(one[2] for one in said)


@contextmanager
def _whole() -> Iterator[None]:
    """What happens within is not cut short: a Ctrl-C or SIGTERM comes when it is done."""
    if threading.current_thread() is not threading.main_thread():  # no signal comes here, and handlers cannot be set
        yield
        return
    came: list[int] = []
    usual = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def _learn(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    read: Read,
    settings: Settings,
    state: State,
    learners: Learners,
) -> tuple[float, int]:
    """Rate and gradients of the next step, over all ranks; returns loss and tokens."""
    for group in optimizer.param_groups:
        group["lr"] = settings.rate * schedule(_share(state, settings), settings)
    # The same on all ranks, so that they do the same amount of work.
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + state.step)
    scores = objective.score(read, generator)
    optimizer.zero_grad()
    scores.loss.backward()
    loss, tokens = learners.mean(list(objective.parameters.values()), scores)
    torch.nn.utils.clip_grad_norm_(list(objective.parameters.values()), settings.clip)
    return loss, tokens


@torch.no_grad()
def evaluate(objective: Objective, reader: Reader, seed: int) -> dict[str, Any]:
    """Of drafts at places of held-out answers that the objective chooses: how often each is right and reached, and
    `accepted`, one token for the target's own plus the mean run of right drafts (nearly a decode's tokens per step)."""
    right, losses = [], []
    parts: dict[str, list[float]] = {}
    for index in range(len(reader.batches)):
        scores = objective.score(reader.read(index), torch.Generator().manual_seed(seed + index), evaluate=True)
        right.append(scores.right)
        losses.append(scores.loss.item())
        for name, part in scores.parts.items():
            parts.setdefault(f"held_out_loss_{name}", []).append(part.item())
    joined = torch.cat(right).float()
    reached = joined.cumprod(1).mean(0)
    return {
        "held_out_loss": sum(losses) / len(losses),
        **{name: sum(values) / len(values) for name, values in parts.items()},
        "accepted": 1.0 + float(reached.sum()),
        "right": [round(x, 4) for x in joined.mean(0).tolist()],
        "reached": [round(x, 4) for x in reached.tolist()],
    }


def schedule(share: float, settings: Settings) -> float:
    """Of the peak rate, when `share` of the run is over: linear warm-up, then a cosine to the floor."""
    if share < settings.warm_up:
        return (share + 0.1 * settings.warm_up) / (1.1 * settings.warm_up)
    along = (share - settings.warm_up) / max(1 - settings.warm_up, 1e-9)
    return settings.floor + (1 - settings.floor) * 0.5 * (1 + math.cos(math.pi * min(along, 1.0)))


def adopt(parameters: Mapping[str, Tensor], config: Any, start: Trained[Any], free: Collection[str] = ()) -> None:
    """Begin with what was trained before. UserError, naming its source, where it is of another size than `config` or
    computes something else; what is `free` may differ."""

    def told(config: Any) -> dict[str, Any]:
        given = asdict(config)
        layers = given.pop("layer", None) or given.pop("body", None) or {}
        return {name: value for name, value in {**layers, **given}.items() if name not in free}

    before, now = told(start.config), told(config)
    if differ := [f"{name} is {before[name]}, not {now[name]}" for name in now if before[name] != now[name]]:
        raise UserError(f"{start.source} cannot be the start: its {'; '.join(differ)}")
    if unknown := sorted(start.tensors.keys() - {*parameters, "d2t"}):
        raise UserError(f"{start.source} cannot be the start: {some(unknown)} is nothing that is trained here")
    for name, parameter in parameters.items():
        parameter.data.copy_(start.tensors[name])


def _batches(corpus: Corpus, settings: Settings, ranks: int) -> tuple[list[Batch], list[Batch], list[Batch]]:
    """To train on; to evaluate on, held-out ones and some of those that are trained on. Raises UserError where the
    corpus has too few."""
    training = [_cut(c, settings.longest) for c in corpus.part(held_out=False)]
    held_out = [_cut(c, settings.longest) for c in corpus.part(held_out=True)][: settings.held_out]
    batches = form_batches(training, settings.batch, settings.seed)
    if len(batches) < ranks or not held_out:
        raise UserError("the corpus has too few conversations to train on; make more with zbench train data")
    known = training[:: max(len(training) // settings.known, 1)][: settings.known]
    sorts = (sorted(each, key=lambda c: len(c.ids)) for each in (held_out, known))
    tests, seen = ([Batch.of(part) for part in _parts(each, settings.batch)] for each in sorts)
    return batches, tests, seen


def form_batches(conversations: Sequence[Conversation], size: int, seed: int) -> list[Batch]:
    """Batches of `size` conversations of like length, the same in every epoch, so that what was read can be kept; of
    one corpus each, so that it still holds where another one is added."""
    batches = []
    for number in sorted({c.corpus for c in conversations}):
        order = [c for c in conversations if c.corpus == number]
        random.Random(f"{seed}/batches").shuffle(order)
        for pool in _parts(order, size * _POOL):
            parts = _parts(sorted(pool, key=lambda c: len(c.ids)), size)
            batches += [Batch.of(part) for part in parts if len(part) == size]
    return batches


def batch_order(count: int, seed: int, skip: int) -> Iterator[int]:
    """Numbers of batches for ever, from the step `skip` on: every epoch in another order."""
    epoch, first = divmod(skip, count)
    while True:
        order = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        yield from order[first:]
        epoch, first = epoch + 1, 0


class Reader:
    """Reads batches by number, and keeps what was read in `folder` for later epochs, stages and runs, as long as
    `gigabytes` hold it: it follows from the target and the batch. A GPU keeps nothing: it is asked again sooner than a
    disk."""

    def __init__(
        self, target: Target, objective: Objective, batches: Sequence[Batch], folder: Path, gigabytes: float
    ) -> None:
        self.target, self.objective, self.batches, self.folder = target, objective, batches, folder
        self._keeps = target.device.type == "cpu"
        kept = folder.glob(f"*{_READ}") if folder.is_dir() else ()
        self._room = gigabytes * 1e9 - sum(file.stat().st_size for file in kept)
        of = target.loaded.weights_hash, target.dtype, target.device.type, TOP, objective.capture, objective.context
        self._of = repr(of).encode()

    def read(self, number: int) -> Read:
        batch, objective, device = self.batches[number], self.objective, self.target.device
        if not objective.asks:
            return Read.of_text(batch.to(device))
        if not self._keeps:
            return self.target.read(batch.to(device), objective.capture, objective.context)
        file = self.folder / f"{self._name(batch)}{_READ}"
        if file.exists():
            with suppress(SafetensorError):  # cut short as the machine went down: it is read and kept anew
                return Read.of_tensors(batch.to(device), load_file(file, device=str(device)))
        read = self.target.read(batch.to(device), objective.capture, objective.context)
        tensors = read.tensors()
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size <= self._room:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_whole(file, {name: tensor.cpu() for name, tensor in tensors.items()})
                self._room -= size
            except OSError:  # a corpus that cannot be written to keeps nothing
                self._room = 0.0
        return read

    def to_keep(self) -> int:
        """Bytes of disk that would hold all that is read."""
        objective, c, itemsize = self.objective, self.target.config, self.target.dtype.itemsize
        if not objective.asks or not self._keeps:
            return 0
        each = len(objective.capture) * c.width * itemsize + 8 * min(TOP, c.vocab)
        each += 2 * c.layers * c.kv_heads * c.head_dim * itemsize if objective.context else 0
        return each * sum(batch.ids.numel() for batch in self.batches)

    def _name(self, batch: Batch) -> str:
        told = self._of + repr(tuple(batch.ids.shape)).encode()
        text = (batch.ids.numpy().tobytes(), batch.answer.numpy().tobytes())
        return hashlib.sha256(told + b"".join(text)).hexdigest()[:32]


def size(count: float) -> str:
    """Bytes, for people."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def estimate(objective: Objective, target: Target, settings: Settings, disk: float, ranks: int = 1) -> str:
    """What training will need (each rank of several), before it starts. How long a step takes, the first ones tell."""
    c, itemsize = target.config, target.dtype.itemsize
    learned = sum(p.numel() for p in objective.parameters.values())
    # Value, gradient and two moments in float32; the target, or what learns as a forward reads it.
    state = 16 * learned + itemsize * parameter_count(c)
    # Per row and layer that gradients pass: residual and norms, SwiGLU, attention over a context of usual length.
    per_row = 10 * c.width + 6 * c.ffn + 3 * c.heads * _CONTEXT
    rows, layers = objective.rows
    activations = settings.batch * rows * layers * per_row * itemsize
    number, unit = (settings.steps, "step") if settings.steps else (settings.minutes, "minute")
    length = f"{number:g} {unit}{'' if number == 1 else 's'}"
    kept = f", about {size(disk)} of disk for what the target says" if disk else ""
    several = f" on {ranks} ranks, each with" if ranks > 1 else ";"
    return (
        f"{objective.name}: {learned / 1e6:.1f} M parameters learn for {length}{several} {size(state)} of "
        f"weights and optimiser, about {size(activations)} of activations{kept}"
    )


def _due(state: State, evaluated: float, settings: Settings) -> bool:
    """Whether to evaluate after this step; `evaluated` is when that was done last, in seconds of training."""
    late = state.seconds - evaluated >= settings.evaluate_every
    if settings.steps:
        return late or state.step % max(settings.steps // 10, 1) == 0
    assert settings.minutes is not None
    return late or state.step == _FIRST or state.seconds - evaluated >= 6 * settings.minutes


def forecast(seconds: float, state: State, settings: Settings, asks: bool = True) -> str:
    """Of the steps to come, from what the first ones took."""
    each = seconds / _TIMED
    said = f"{duration(each)} per step{' while all is new to the target' if asks else ''}: "
    if settings.steps:
        left = settings.steps - state.step
        return said + f"{left} more take {duration(left * each)}{' at most' if asks else ''}"
    time_left = 60 * (settings.minutes or 0) - state.seconds
    return said + f"{'at least' if asks else 'about'} {time_left / each:.0f} more in the {duration(time_left)} left"


def _share(state: State, settings: Settings) -> float:
    """How much of the run is over."""
    if settings.steps is not None:
        return state.step / settings.steps
    assert settings.minutes is not None
    return state.seconds / (60 * settings.minutes)


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """All that a run needs to go on, in its folder."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    settings: Settings
    out: Path
    ranks: int

    def begin(self, writes: bool) -> State:
        """Raises UserError where there is a run, or, if this process writes, the folder cannot be written."""
        if (self.out / PROGRESS).exists():
            raise UserError(f"{self.out} holds a run already; continue it with --resume, or choose another folder")
        if writes:
            check_writable(self.out)
        return State()

    def save_drafter(self) -> None:
        with self._writing():
            self.objective.save(self.out)

    def save(self, state: State, evaluations: Sequence[dict[str, Any]]) -> None:
        """With the drafter, where this step's is the best."""
        if state.best_step == state.step or not self.objective.asks:
            self.save_drafter()
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.objective.parameters.items():
            moments = self.optimizer.state[parameter]
            tensors |= {
                f"value/{name}": parameter.detach().cpu(),
                f"average/{name}": moments["exp_avg"].cpu(),
                f"square/{name}": moments["exp_avg_sq"].cpu(),
            }
        out = self.out
        with self._writing():
            with (out / LOG).open("a", encoding="utf-8") as log:
                log.writelines(json.dumps(evaluation) + "\n" for evaluation in evaluations)
            save_whole(out / STATE, tensors)
            stored = {**self._identity(), "state": asdict(state)}
            atomic_write(out / PROGRESS, json.dumps(stored, indent=1))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write to {self.out}: {error.strerror}; choose another folder with --out"
            ) from error

    def restore(self) -> State:
        """Raises UserError where there is none, or it is of another run."""
        objective, optimizer, out = self.objective, self.optimizer, self.out
        try:
            stored = {"ranks": 1, **json.loads((out / PROGRESS).read_text(encoding="utf-8"))}
            tensors = load_file(out / STATE)
        except (OSError, ValueError) as error:
            raise UserError(f"{out} has no run to resume; leave --resume out to begin one") from error
        except SafetensorError as error:
            told = f"{out / STATE} is damaged: this run cannot go on; choose another folder with --out"
            raise UserError(told) from error
        if differ := self._differences(stored):
            told = "; ".join(differ)
            raise UserError(f"{out} was trained {told}; resume it as it was, or choose another folder with --out")
        state = State(**stored["state"])
        objective.resume(out)
        for name, parameter in objective.parameters.items():
            parameter.data.copy_(tensors[f"value/{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": tensors[f"average/{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"square/{name}"].to(parameter.device),
            }
        return state

    def _differences(self, stored: dict[str, Any]) -> list[str]:
        """What keeps a stored run from going on as this one."""
        name, now = self.objective.name, self._identity()
        if stored.get("objective") != name:
            return [f"as {stored.get('objective')}, not as {name}"]
        # What runs had before they could be told otherwise.
        settings = {"dtype": "bfloat16", **stored["settings"]}
        recipe = {"reach": 0, **stored["recipe"]} if "reach" in now["recipe"] else stored["recipe"]
        runs = (stored | {"settings": settings, "recipe": recipe}, now)
        return differences(*({"ranks": run["ranks"], **run["settings"], **run["recipe"]} for run in runs))

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on; how long it is may change."""
        given = asdict(self.settings)
        kept = {key: given[key] for key in ("seed", "batch", "rate", "warm_up", "floor", "clip", "longest")}
        kept["dtype"] = str(self.objective.target.dtype).removeprefix("torch.")
        recipe = asdict(self.objective.settings)
        return {"objective": self.objective.name, "recipe": recipe, "settings": kept, "ranks": self.ranks}


def _logged(out: Path, step: int) -> dict[str, Any]:
    """The evaluation after that step, if it is the last that was written; else nothing."""
    try:
        last = json.loads((out / LOG).read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return {}
    return last if last["step"] == step else {}


def dtype_of(out: Path) -> str | None:
    """Of the run in a folder, None where there is none."""
    try:
        return str(json.loads((out / PROGRESS).read_text(encoding="utf-8"))["settings"].get("dtype", "bfloat16"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _said(evaluation: dict[str, Any]) -> str:
    places = " ".join(f"{x:.2f}" for x in evaluation["reached"])
    known = evaluation.get("accepted_known")
    learnt = "" if known is None else f"; {known:.2f} on text that it learns from"
    start = "held_out_loss_"
    parts = [f"{name.removeprefix(start)} {x:.3f}" for name, x in evaluation.items() if name.startswith(start)]
    loss = f"loss {evaluation['held_out_loss']:.3f}" + (f" ({', '.join(parts)})" if parts else "")
    return f"{loss}, {evaluation['accepted']:.2f} tokens per step (reached: {places}){learnt}" if places else loss


def _judged(last: dict[str, Any], state: State, out: Path) -> Iterator[str]:
    """What the end of a drafter's training says of it."""
    if state.best_step < state.step:
        best = f"the best on held-out text: {state.best:.2f} tokens per step"
        yield f"{out} has the drafter of step {state.best_step}, {best}"
    known, other = last["accepted_known"], last["accepted"]
    if known - 1 > _BY_HEART * (other - 1):
        yield (
            f"{known:.2f} tokens per step on text that it learns from and {other:.2f} on other text: it knows the one"
            " by heart; more text would help it, more steps would not"
        )


def _cut(conversation: Conversation, longest: int) -> Conversation:
    c = conversation
    return replace(c, ids=c.ids[:longest], roles=c.roles[:longest])


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
