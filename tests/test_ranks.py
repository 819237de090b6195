"""Several ranks on the CPU: the same logits and tokens as one process, and an end that says why when a rank is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from safetensors.torch import load_file

from tests import ranks_worker
from tests.test_run import wanted
from zbench import ranks, run
from zbench.cli import main
from zbench.errors import UserError
from zbench.models.team import ALONE
from zbench.ranks import Member, Watch, World, merged
from zbench.records import RankRecord, RequestRecord, TrialRecord, read_manifest, read_roof_samples, read_trials
from zbench.scenario import ParallelSpec

SHAPE = (
    "{family: llama, layers: 4, width: 64, ffn: 96, heads: 6, kv_heads: 3, head_dim: 16, vocab: 301, max_positions: 99}"
)
SCENARIO = f"""
name: spread
model: {{config: {SHAPE}, weights: random}}
dtype: float32
device: cpu
threads: 1
engines:
  - autoregressive
  - {{name: eagle3, drafter: {{random: true}}, depth: 3, top_k: 2}}
  - {{name: dflash, drafter: {{random: true, layers: 1}}, block: 4}}
  - {{name: diffusion, adapter: {{random: true}}, block_size: 4, proposals: 2}}
prompts: {{set: quickstart, limit: 6}}
context: 24
output_tokens: 12
ignore_eos: true
repeats: 1
warmup: {{prompts: 1, output_tokens: 2}}
"""


def started(size: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """`python -m ...` on each of so many ranks, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ends_clean", *arguments],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


@pytest.fixture
def roofs_on_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured roofs take longer than these runs: the ranks find some in the cache, where there is one."""
    made_up = {"value": 1e12, "low": 1e12, "high": 1e12, "n": 1, "unit": "B/s"}
    read = {**made_up, "bytes": 2**22, "implementation": "torch sum"}
    content = {"bandwidth": {"read": read}, "flops": {"float32": made_up}, "ridge": {"float32": 1.0}}
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'zbench.run':\n"
        "            import zbench.hardware.roofs as roofs\n"
        f"            roofs.load_or_measure = lambda *a, **k: {content!r}\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hook), str(Path(__file__).parents[1])]))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_logits_are_those_of_one_process(tmp_path: Path, size: int) -> None:
    processes = started(size, "tests.ranks_worker", str(tmp_path))
    for process in processes:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
    found = [load_file(tmp_path / f"rank{rank}-of-{size}.safetensors") for rank in range(size)]
    for family, kv in ranks_worker.CASES:
        name = f"{family}-{kv}"
        assert all(torch.equal(found[0][name], other[name]) for other in found), "ranks must not differ in a bit"
        want = ranks_worker.logits(family, kv, ALONE)
        assert ((found[0][name] - want).abs().max() / want.abs().max()).item() < 1e-5, name


@pytest.mark.slow
def test_all_engines_emit_the_tokens_of_one_process(tmp_path: Path, roofs_on_file: None) -> None:
    path = tmp_path / "spread.yaml"
    points = "matrix: {parallel.tensor: [1, 2, 3]}\ninclude: [{parallel.data: 3}]\n"
    text = SCENARIO.replace("limit: 6", "limit: 3").replace("output_tokens: 12", "output_tokens: 8")
    text = text.replace("top_k: 2}", "top_k: 2, lookup: 1}").replace(
        "autoregressive\n", "autoregressive\n  - prompt_lookup\n"
    )
    path.write_text(text + points)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    module = ["-m", "tests.ends_clean", "zbench", "run", str(path), "--out", str(tmp_path), "--no-report"]
    command = [sys.executable, "-m", *torchrun, *module]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    [folder] = tmp_path.glob("spread-*")
    manifest, (trials, warnings) = read_manifest(folder), read_trials(folder)
    assert not warnings
    assert len(trials) == 5 * 4 * 3
    assert any(any(step.looked_up) for trial in trials for step in trial.steps)
    assert [trial.error for trial in trials if trial.error] == []
    cells = {cell.id: cell for cell in manifest.cells}
    by_prompt: dict[str, set[str]] = {}
    for trial in trials:
        cell = cells[trial.cell]
        for request in trial.requests:
            by_prompt.setdefault(request.prompt_id, set()).add(request.output_hash)
        first = cell.tensor * (trial.group % cell.replicas)
        assert [row.rank for row in trial.ranks] == list(range(first, first + cell.tensor))
        target = [f for f in trial.forwards if f.model == "target"]
        assert all((f.collective_bytes or 0) > 0 for f in target) == (cell.tensor > 1)
        shares = [(f.collective_seconds or 0) / f.seconds for f in target]
        assert all(0 < share < 1 for share in shares) == (cell.tensor > 1)
    assert len(by_prompt) == 3
    assert all(len(hashes) == 1 for hashes in by_prompt.values())
    assert list(manifest.environment["ranks"]) == ["rank 0", "rank 1", "rank 2"]
    samples, torn = read_roof_samples(folder)
    assert len(samples) >= 2 and all(sample.value for sample in samples) and not torn
    one, two = (next(t for t in trials if t.cell == f"autoregressive/parallel.tensor={n}") for n in (1, 2))
    assert one.forwards[1].flops / 2 < two.forwards[1].flops < one.forwards[1].flops  # 2 of 3 key heads are rank 0's


def underway(tmp_path: Path) -> tuple[list[subprocess.Popen[str]], Path, Path]:
    """A run of two ranks in the middle of its trials."""
    path = tmp_path / "long.yaml"
    text = SCENARIO.replace("output_tokens: 12", "output_tokens: 60").replace("name: spread", "name: long")
    alone = "".join(line for line in text.splitlines(True) if "- {" not in line)  # autoregressive is enough
    path.write_text(alone + "parallel: {tensor: 2, timeout_seconds: 8}\n")
    processes = started(2, "zbench", "run", str(path), "--out", str(tmp_path), "--no-report")
    deadline = time.monotonic() + 240  # a busy machine starts slowly
    while time.monotonic() < deadline:
        for folder in tmp_path.glob("long-*"):
            lines = folder / "trials.jsonl"
            if lines.exists() and lines.read_text().count("\n") >= 2:
                return processes, folder, path
        time.sleep(0.05)
    for process in processes:
        process.kill()
    raise AssertionError(processes[0].communicate()[1])


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit code and what zbench said."""
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    return process.returncode, [line for line in errors.splitlines() if line.startswith("zbench: ")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        (signal.SIGKILL, "zbench: rank 1 died, so the run ended; what was finished is kept, continue with --resume"),
        (signal.SIGSTOP, "zbench: rank 1 was not heard of for 8 s, so the run ended;"),
    ],
)
def test_a_lost_rank_ends_the_run_in_one_line(
    tmp_path: Path, roofs_on_file: None, how: signal.Signals, said: str
) -> None:
    (first, second), folder, path = underway(tmp_path)
    second.send_signal(how)
    code, lines = ended(first)
    second.kill()
    second.communicate()
    assert code == ranks.LOST
    assert len(lines) == 1
    assert lines[0].startswith(said)
    trials, warnings = read_trials(folder)
    assert len(trials) >= 2
    assert all(trial.status == "ok" for trial in trials)
    assert not warnings
    if how == signal.SIGKILL:
        resumed = started(2, "zbench", "run", str(path), "--resume", str(folder), "--no-report")
        assert [ended(process) for process in resumed] == [(0, []), (0, [])]
        assert len(read_trials(folder)[0]) == 6


@pytest.mark.slow
def test_bad_input_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(SCENARIO + "parallel: {tensor: 2}\n")
    override = ("-o", "output_tokens=2000")
    processes = started(2, "zbench", "run", str(path), "--out", str(tmp_path), *override)
    (code, lines), (other, silence) = (ended(process) for process in processes)
    assert (code, other, silence) == (2, 2, [])
    assert len(lines) == 1
    assert "prompt and output need" in lines[0]
    assert not list(tmp_path.glob("spread-*"))


# --- Without other processes ---


def test_one_process_cannot_be_two(tmp_path: Path) -> None:
    path = tmp_path / "spread.yaml"
    path.write_text(SCENARIO + "parallel: {tensor: 2}\n")
    result = CliRunner().invoke(main, ["run", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "needs 2 ranks, this is one process; run: torchrun --nproc-per-node 2 -m zbench run" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("parallel: {tensor: 0}", "parallel.tensor"),
        ("parallel: {tensors: 2}", "did you mean 'tensor'?"),
        ("parallel: {timeout_seconds: 0}", "parallel.timeout_seconds"),
    ],
)
def test_a_wrong_parallel_key_is_named(tmp_path: Path, extra: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        wanted(tmp_path, text=SCENARIO + extra + "\n")


def test_engines_of_one_process_are_refused_across_ranks(tmp_path: Path) -> None:
    text = SCENARIO.replace("  - autoregressive\n", "  - autoregressive\n  - reference\n")
    with pytest.raises(UserError, match="reference decodes on one rank only"):
        wanted(tmp_path, text=text + "parallel: {tensor: 2}\n")
    assert wanted(tmp_path, text=text + "parallel: {data: 2}\n").parallel.ranks == 2
    for other in ("{name: endpoint, url: 'http://127.0.0.1:1'}", "vllm"):
        with pytest.raises(UserError, match="is spread by options of its own"):
            wanted(tmp_path, text=text.replace("- reference", f"- {other}") + "parallel: {data: 2}\n")
    native = text.replace("  - autoregressive\n", "  - {name: autoregressive, execution: native}\n")
    with pytest.raises(UserError, match="execution: native runs on one rank only"):
        wanted(tmp_path, text=native.replace("  - reference\n", "") + "matrix: {parallel.tensor: [1, 2]}\n")


def test_a_key_that_changes_nothing_does_not_change_the_hash(tmp_path: Path) -> None:
    plain, said = wanted(tmp_path, text=SCENARIO), wanted(tmp_path, text=SCENARIO + "parallel: {tensor: 1}\n")
    spread = wanted(tmp_path, text=SCENARIO + "parallel: {tensor: 2}\n")
    hashes = [run.scenario.content_hash(each) for each in (plain, said, spread)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_replicas_decode_different_prompts_side_by_side(tmp_path: Path) -> None:
    [point] = run.prepare(wanted(tmp_path, text=SCENARIO), lambda _: None)
    parallel = ParallelSpec(data=3)
    shared = replace(point, scenario=point.scenario.model_copy(update={"parallel": parallel}))
    [(_, trials)] = run.plan([shared])
    rounds = [trials[i : i + 3] for i in range(0, len(trials), 3)]
    assert all(len({(t.cell.id, t.repeat) for t in side}) == 1 for side in rounds)
    assert all({t.group % 3 for t in side} == {0, 1, 2} for side in rounds)
    assert len({t.key for t in trials}) == len(trials) == 4 * 6


def test_batches_that_replicas_cannot_share_are_refused(tmp_path: Path) -> None:
    world = World(0, 4, _teams={(1, 4): Member()})
    with pytest.raises(UserError, match=r"6 batches of prompts cannot be shared evenly by parallel.data 4"):
        run.prepare(wanted(tmp_path, text=SCENARIO + "parallel: {data: 4}\n"), lambda _: None, world=world)


def trial(tokens: tuple[int, ...], error: str | None = None) -> TrialRecord:
    request = RequestRecord("p", "code", 3, tokens, "", "", "length", 0.1, 1.0, 0)
    return TrialRecord("c", 0, 0, 0, "error" if error else "ok", "", 1.0, (request,), error=error)


def row(rank: int) -> RankRecord:
    return RankRecord(rank, 0, "cpu", 1.0, 0.9, 0.0, 1.0, 1.0)


def test_ranks_that_emit_different_tokens_have_failed() -> None:
    same = merged([(trial((1, 2)), row(0)), (trial((1, 2)), row(1))])
    assert (same.status, [r.rank for r in same.ranks]) == ("ok", [0, 1])
    differ = merged([(trial((1, 2)), row(0)), (trial((1, 3)), row(1))])
    assert (differ.status, differ.error) == ("error", "RanksDiffer: rank 1 emitted other tokens than rank 0")
    failed = merged([(trial((1, 2)), row(0)), (trial((), "OutOfMemoryError: no"), row(1))])
    assert failed.error == "rank 1: OutOfMemoryError: no"
    alike = merged([(trial((), "OutOfMemoryError: no"), row(r)) for r in (0, 1)])
    assert alike.error == "OutOfMemoryError: no"
    assert TrialRecord.from_json(same.to_json()) == same


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[Watch, Clock, Any]:
    """Rank 0 of 3 watching, with a clock to turn and a way to speak for the others."""
    clock = Clock()
    monkeypatch.setattr(ranks.time, "monotonic", clock.monotonic)
    store = dist.HashStore()
    watch = Watch(store, 0, 3, "kept")
    watch.limit = 10.0
    beats = {1: 0, 2: 0}

    def say(rank: int, moved: int, state: str = "working", alive: bool = True, **more: Any) -> None:
        beats[rank] += alive
        said = {"beat": beats[rank], "moved": [moved, 0], "state": state, "failed": "", "replica": 0}
        content = {**said, "pid": os.getpid(), "host": "elsewhere", **more}
        dist.PrefixStore("zbench", store).set(f"rank{rank}", json.dumps(content))

    return watch, clock, say


def looked(watch: Watch, waiting: bool = False) -> str:
    watch.waiting = waiting
    watch._publish("")
    found = watch._lost()
    return found["text"] if found else ""


def test_a_rank_that_has_left_says_nothing_more(watched: tuple[Watch, Clock, Any]) -> None:
    """The thread may wait for its turn just then; in the store's code when Python ends, it would abort the process."""
    watch, _, _ = watched
    with watch._lock:
        watch.start()
        time.sleep(0.2)  # it waits for the lock
        watch._over = True
        watch._publish("done")
    watch.join(5)
    assert not watch.is_alive()
    assert json.loads(watch._store.get("rank0"))["state"] == "done"


def test_a_rank_that_waits_is_not_stuck_and_one_that_does_not_move_is(watched: tuple[Watch, Clock, Any]) -> None:
    watch, clock, say = watched
    for second in range(40):  # rank 2 takes its time, but moves
        clock.now = float(second)
        say(1, 5, "waiting")
        say(2, second // 8)
        assert looked(watch, waiting=True) == ""
    for second in range(40, 60):
        clock.now = float(second)
        say(1, 5, "waiting")
        say(2, 4)
        if found := looked(watch, waiting=True):
            assert found == "rank 2 made no progress for 10 s"
            return
    raise AssertionError("rank 2 stood still for 20 s")


def test_of_ranks_that_stand_still_the_one_behind_is_named(watched: tuple[Watch, Clock, Any]) -> None:
    watch, clock, say = watched
    for _ in range(9):
        watch.moved()
    found = ""
    for second in range(12):
        clock.now = float(second)
        say(1, 9)
        say(2, 7)
        found = found or looked(watch)
    assert found == "rank 2 made no progress for 10 s"


def test_silence_and_death_are_told_apart(watched: tuple[Watch, Clock, Any]) -> None:
    watch, clock, say = watched
    say(1, 1)
    say(2, 1, "done")
    assert looked(watch) == ""
    clock.now = 11.0
    say(1, 1, alive=False)
    watch.moved()
    assert looked(watch) == "rank 1 was not heard of for 10 s"  # rank 2 had said that it leaves
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    say(1, 2, pid=gone.pid, host=socket.gethostname())
    assert looked(watch) == "rank 1 died"


def test_a_rank_that_failed_while_its_team_is_stuck_failed_alone(watched: tuple[Watch, Clock, Any]) -> None:
    watch, clock, say = watched
    watch.limit = 1000.0
    say(1, 3, "waiting", failed="OutOfMemoryError: no")
    say(2, 8, replica=1)
    assert looked(watch) == ""
    clock.now = ranks.GRACE + 1
    say(1, 3, "waiting", failed="OutOfMemoryError: no")
    say(2, 8, replica=1)
    watch.moved()
    assert looked(watch) == "", "the other replica is slow, and has nothing to do with it"
    clock.now = 2 * ranks.GRACE + 2
    say(2, 9, replica=1)
    say(1, 3, "waiting", failed="OutOfMemoryError: no")
    assert looked(watch) == "rank 1 failed alone (OutOfMemoryError: no)"


def test_each_rank_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [ranks.Device("cuda", "rocm", i, "MI300X") for i in range(2)]
    monkeypatch.setattr(ranks.devices, "_gpus", lambda: gpus)
    assert World(1, 2, 1).device("auto") == gpus[1]
    assert World(2, 4, 0).device("rocm") == gpus[0], "the first of the second host"
    with pytest.raises(UserError, match="rank 2 has no GPU of its own"):
        World(2, 3, 2).device("auto")
    with pytest.raises(UserError, match="every rank takes its own"):
        World(1, 2, 1).device("rocm:0")
    assert World(1, 2, 1).device("cpu").type == "cpu"
