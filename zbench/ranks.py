"""The processes of a run that spans several devices: who is who, what they tell each other, and when one is lost.

`torchrun` starts them (docs/parallel.md). Rank 0 alone owns the run folder; all others measure with it and hand over
their records after each trial. Between trials ranks talk over gloo on the CPU; within a forward a team's collectives go
over NCCL (RCCL on AMD), or gloo where there is no GPU.

A collective that waits for a dead rank never comes back, so each rank has a thread that watches the others through the
store that torchrun runs. It ends the process with one line: all finished trials are on the disk by then.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from zbench.errors import UserError
from zbench.hardware import device as devices
from zbench.hardware.device import Device
from zbench.models.shard import Shard
from zbench.models.team import ALONE, RankLost, Team
from zbench.records import RankRecord, TrialRecord
from zbench.scenario import ParallelSpec

LOST = 5  # exit code of a run that a lost rank ended
SETUP = timedelta(hours=1)  # one rank may load a large model, or measure roofs, while the others wait
LOADING = 10  # times the timeout, for loading and warming up
GRACE = 10.0  # seconds in which others may fail as a rank did, before it counts as failing alone
BEAT = 0.25
# Of so many forwards one has its collectives timed on a GPU. A prime: engines alternate two or more kinds of forwards.
TIMED_EVERY = 7
T = TypeVar("T")


@dataclass
class World:
    """This process among all of the run. One process alone needs none of it, and pays for none."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    watch: Watch | None = None
    _teams: dict[tuple[int, int], Member | None] = field(default_factory=dict)

    def device(self, name: str) -> Device:
        """The device of this rank: with several, each rank takes the GPU of its number on its host.

        Raises UserError where the scenario names one GPU for all, or there are fewer than ranks."""
        if self.size == 1:
            return devices.resolve(name)
        if ":" in name:
            raise UserError(f"device {name} is one GPU, but every rank takes its own: write auto, cpu, cuda or rocm")
        first = devices.resolve(name)
        if first.type == "cpu":
            return first
        try:
            return devices.resolve(f"{first.backend}:{self.local_rank}")
        except UserError as error:
            raise UserError(f"rank {self.rank} has no GPU of its own: {error}") from error

    def meet(self, wanted: Sequence[ParallelSpec], name: str) -> None:
        """Form the teams of all points. Making a group waits for its ranks, so first all must be fit for it.

        Raises UserError, on every rank, where there are too few ranks, too many, or one has no device."""
        if self.size == 1:
            return
        error, device = None, None
        try:
            device = self.device(name)
            for each in wanted:
                self._check(each)
            if (most := max(each.ranks for each in wanted)) < self.size:
                error = f"torchrun started {self.size} ranks, but there is work for {most}: see the key parallel"
        except UserError as reason:
            error = str(reason)
        self.agreed(error)
        assert device is not None
        for each in wanted:
            if (key := (each.tensor, each.data)) not in self._teams:
                self._teams[key] = self._joined(each, device)

    def member(self, wanted: ParallelSpec) -> Member | None:
        """This rank's place at a point; None: it has none and waits. Raises UserError where ranks are missing."""
        self._check(wanted)
        return self._teams[wanted.tensor, wanted.data] if self.size > 1 else Member()

    def _check(self, wanted: ParallelSpec) -> None:
        if wanted.ranks > self.size:
            started = f"torchrun started {self.size}" if self.size > 1 else "this is one process"
            raise UserError(
                f"parallel: tensor {wanted.tensor} x data {wanted.data} needs {wanted.ranks} ranks, {started}; run:"
                f" torchrun --nproc-per-node {wanted.ranks} -m zbench run ..."
            )

    def _joined(self, wanted: ParallelSpec, device: Device) -> Member | None:
        mine = None
        for replica in range(wanted.data):
            ranks = list(range(replica * wanted.tensor, (replica + 1) * wanted.tensor))
            group = None
            if wanted.tensor > 1:
                backend = "gloo" if device.type == "cpu" else "nccl"
                group = dist.new_group(ranks, timeout=SETUP, backend=backend)
            if self.rank in ranks:
                shard = Shard(ranks.index(self.rank), wanted.tensor)
                team = Team(shard, group, device.mark, 1 if device.type == "cpu" else TIMED_EVERY)
                mine = Member(team, replica, wanted.data)
        return mine

    def parted(self) -> None:
        """Let go of the teams. A group's threads must end before the interpreter does: one that still has a tensor to
        let go of then is aborted, and the rank with it."""
        self._teams.clear()
        self.follow(None)
        gc.collect()  # engines, which have teams too

    def told(self, value: T) -> T:
        """What rank 0 has."""
        if self.size == 1:
            return value
        box = [value]
        with self.waiting():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def all(self, value: T) -> list[T]:
        """What every rank has, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self.waiting():
            dist.all_gather_object(found, value)
        return found

    def agreed(self, error: str | None) -> None:
        """Ends the preparation of all ranks where it failed on one. Raises UserError, which rank 0 prints."""
        found = self.all(error)
        if said := [one for one in found if one]:
            if len(set(found)) == 1:
                raise Agreed(said[0])
            raise Agreed("\n".join(f"rank {rank}: {one}" for rank, one in enumerate(found) if one))

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives on this rank, once it has ended on all. Raises UserError on all where it did on one."""
        if self.size == 1:
            return work()
        done: list[T] = []
        wrong = None
        try:
            done.append(work())
        except UserError as error:
            wrong = str(error)
        self.agreed(wrong)
        return done[0]

    def collected(self, record: TrialRecord | None, member: Member | None, device: Device) -> list[TrialRecord]:
        """Each replica's record of the trial that just ended, on rank 0; none elsewhere."""
        if self.size == 1:
            return [record] if record else []
        failed = record.error if record else None
        row = rank_row(self.rank, member.replica, device, record) if record and member else None
        if self.watch:
            self.watch.failed = failed or ""
        parts: list[tuple[int, TrialRecord | None, RankRecord | None]] = self.all(
            (member.replica if member else -1, record, row)
        )
        if self.watch:
            self.watch.failed = ""
        if self.rank:
            return []
        replicas = sorted({replica for replica, part, _ in parts if part})
        return [merged([(part, row) for at, part, row in parts if at == r and part and row]) for r in replicas]

    @contextmanager
    def measuring(self, limit: float) -> Iterator[None]:
        """While it lasts, a rank without progress for `limit` seconds ends the run."""
        if self.watch is None:
            yield
            return
        self.watch.limit, before = limit, self.watch.limit
        self.watch.moved()
        try:
            yield
        finally:
            self.watch.limit = before

    def follow(self, member: Member | None) -> None:
        """Whose progress is this rank's from now on."""
        if self.watch:
            self.watch.member = member or Member(replica=-1)

    def interrupted(self) -> None:
        """On KeyboardInterrupt: does not return where torchrun sent it because another rank died."""
        if self.watch:
            self.watch.decide(None)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around collectives of the caller's own. Raises RankLost where one fails."""
        if self.watch:
            self.watch.waiting = True
        try:
            yield
        except RuntimeError as error:
            raise RankLost(str(error).splitlines()[0]) from error
        finally:
            if self.watch:
                self.watch.waiting = False
                self.watch.moved()


@dataclass(frozen=True)
class Member:
    """A rank's place at a point: its team, and which of the replicas that is."""

    team: Team = ALONE
    replica: int = 0
    replicas: int = 1


class Agreed(UserError):
    """What every rank raises at the same place."""


def launched() -> bool:
    """Whether torchrun (or what sets its variables) started this process beside others."""
    known = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return known and int(os.environ["WORLD_SIZE"]) > 1


def is_first() -> bool:
    """Whether this process speaks for the run: rank 0, or the only one."""
    return not launched() or os.environ["RANK"] == "0"


@contextmanager
def joined(kept: str = "what was finished is kept, continue with --resume") -> Iterator[World]:
    """Meet the other ranks. A rank that is lost within ends this process with exit code `LOST` and one line."""
    if not launched():
        yield World()
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", rank))
    if torch.cuda.is_available() and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    # Imported later, as training does, its functions have the group for a default, which then outlives its end.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("gloo", timeout=SETUP)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=30)
    )
    watch = Watch(store, rank, size, kept)
    watch.start()
    world = World(rank, size, local, watch)
    try:
        yield world
    except RankLost as error:
        watch.decide(error)
    except Agreed:
        world.parted()
        watch.leave()  # all leave here, and so they can in their order
        raise
    except BaseException:
        watch.abandon()  # it is said here, and nowhere else
        raise
    world.parted()
    watch.leave()


class Watch(threading.Thread):
    """Tells the others that this rank lives and how far it is, and looks for one that does not.

    A rank is *lost* when its process is gone (same host), when it has not been heard of, or neither moved nor waited,
    for `limit` seconds, or when it failed in a trial and the others are stuck there for it.
    """

    def __init__(self, store: Any, rank: int, size: int, kept: str) -> None:
        super().__init__(daemon=True)
        self.rank, self.size, self.limit, self.kept = rank, size, float("inf"), kept
        self.member = Member()
        self.waiting, self.failed = False, ""
        self._store, self._turn, self._beat = dist.PrefixStore("zbench", store), 0, 0
        self._lock = threading.Lock()
        self._host = socket.gethostname()
        self._seen: dict[int, tuple[str, float, Any, float]] = {}  # rank -> beat and its time, progress and its time
        self._over = self._interrupted = False

    def moved(self) -> None:
        self._turn += 1

    def run(self) -> None:
        while True:
            try:
                with self._lock:
                    if self._over:  # this rank has said that it is done, and may be about to end
                        return
                    self._publish("")
                    found = self._lost()
            except Exception:  # the store is gone, and with it the rank or the agent that ran it
                if not self._over:
                    self._end({"ranks": [], "text": "the connection to the other ranks was lost"})
                return
            if found:
                self._end(found)
            time.sleep(BEAT)

    def leave(self) -> None:
        """This rank is done, and its end is nothing to worry about."""
        if self._over:
            return
        with suppress(Exception):
            dist.barrier()  # all records are with rank 0
        self._finish()
        others = [f"left {rank}" for rank in range(1, self.size)]
        if self.rank == 0:  # last: a rank whose peer closes its sockets while it still talks to it is aborted by gloo
            with suppress(Exception):
                self._store.wait(others, timedelta(seconds=5))
        dist.destroy_process_group()
        if self.rank:
            with suppress(Exception):
                self._store.set(others[self.rank - 1], "")

    def decide(self, error: RankLost | None) -> None:
        """Wait for the evidence of a lost rank, upon which the thread ends the process. Without any, say that a
        collective failed and end it, or that this rank was interrupted (None) and go on to the end."""
        self._interrupted = error is None
        time.sleep(12 * BEAT)
        self._finish()
        if error is not None:
            self._end({"ranks": [], "text": f"a collective failed ({error})"})
        self._tell({"ranks": [], "text": f"rank {self.rank} was interrupted", "interrupted": True})

    def abandon(self) -> None:
        """This rank fails with an error of its own, which ends the others without a word."""
        self._finish()
        self._tell({"ranks": [self.rank], "text": ""})

    def _finish(self) -> None:
        with self._lock:
            self._over = True
            with suppress(Exception):
                self._publish("done")

    def _tell(self, found: dict[str, Any]) -> dict[str, Any]:
        """What ended the run, as the first rank to find out sees it."""
        with suppress(Exception):
            return json.loads(self._store.compare_set("lost", "", json.dumps(found)))
        return found

    def _publish(self, state: str) -> None:
        self._beat += 1
        state = state or ("waiting" if self.waiting else "working")
        said = {
            "beat": self._beat, "moved": [self._turn, self.member.team.alive], "state": state, "failed": self.failed,
            "replica": self.member.replica, "pid": os.getpid(), "host": self._host,
        }  # fmt: skip
        self._store.set(f"rank{self.rank}", json.dumps(said))

    def _lost(self) -> dict[str, Any] | None:
        if self._store.check(["lost"]):
            found = json.loads(self._store.get("lost"))
            return None if self._interrupted and found.get("interrupted") else found
        now, stuck = time.monotonic(), []
        waits: set[int] = set()
        failed: dict[int, tuple[int, str]] = {}
        for rank in range(self.size):
            if not self._store.check([f"rank{rank}"]):
                continue
            said = json.loads(self._store.get(f"rank{rank}"))
            if said["state"] == "done":
                self._seen.pop(rank, None)
                continue
            if rank != self.rank and said["host"] == self._host and not _lives(said["pid"]):
                return {"ranks": [rank], "text": f"rank {rank} died"}
            beat, heard, moved, since = self._seen.get(rank, (None, now, None, now))
            heard = now if said["beat"] != beat else heard
            since = now if said["moved"] != moved or said["state"] == "waiting" else since
            self._seen[rank] = (said["beat"], heard, said["moved"], since)
            if now - heard > self.limit:
                return {"ranks": [rank], "text": f"rank {rank} was not heard of for {self.limit:g} s"}
            if now - since > self.limit:
                stuck.append((said["moved"], rank))
            behind = now - since > min(GRACE, self.limit)
            if behind:
                waits.add(said["replica"])
            if said["failed"]:
                failed[said["replica"]] = (rank, said["failed"])
        for replica in waits & failed.keys():  # its other ranks wait for one that has given up
            rank, error = failed[replica]
            return {"ranks": [rank], "text": f"rank {rank} failed alone ({error})"}
        if stuck:
            last = [rank for moved, rank in stuck if moved == min(stuck)[0]]
            names = f"rank {last[0]}" if len(last) == 1 else f"ranks {', '.join(map(str, last))}"
            return {"ranks": last, "text": f"{names} made no progress for {self.limit:g} s"}
        return None

    def _end(self, found: dict[str, Any]) -> None:
        """The first to find out tells the others; the lowest rank that is not lost tells the user."""
        found = self._tell(found)
        if found["text"] and self.rank == next((r for r in range(self.size) if r not in found["ranks"]), 0):
            sys.stderr.write(f"\nzbench: {found['text']}, so the run ended; {self.kept}\n")
            sys.stderr.flush()
        time.sleep(2 * BEAT)  # the others read it too, before torchrun ends them
        os._exit(LOST)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def rank_row(rank: int, replica: int, device: Device, record: TrialRecord) -> RankRecord:
    forwards = record.forwards
    timed = [f for f in forwards if f.collective_seconds is not None]
    return RankRecord(
        rank=rank,
        replica=replica,
        device=f"{device.name} ({device})",
        wall_seconds=record.wall_seconds,
        forward_seconds=sum(f.seconds for f in forwards),
        collective_seconds=sum(f.collective_seconds or 0.0 for f in timed) if timed else None,
        timed_seconds=sum(f.seconds for f in timed) if timed else None,
        collective_bytes=sum(f.collective_bytes or 0.0 for f in forwards),
        flops=sum(f.flops for f in forwards),
        bytes=sum(f.bytes_read + f.bytes_written for f in forwards),
        peak_bytes=record.peak_bytes,
    )


def merged(parts: Sequence[tuple[TrialRecord, RankRecord]]) -> TrialRecord:
    """A replica's trial: its first rank's record, with a row of each rank. Ranks that differ in what they emitted
    have not decoded one and the same thing, whatever each says."""
    first = parts[0][0]
    whole = replace(first, ranks=tuple(row for _, row in parts))
    for part, row in parts:
        if part.status == "error":
            said = part.error if len(parts) == 1 or part.error == first.error else f"rank {row.rank}: {part.error}"
            return replace(whole, status="error", error=said)
        if [r.output_ids for r in part.requests] != [r.output_ids for r in first.requests]:
            said = f"RanksDiffer: rank {row.rank} emitted other tokens than rank {parts[0][1].rank}"
            return replace(whole, status="error", error=said)
    return whole
