"""Training on several ranks: what one process does with their batches joined, and an end that says which was lost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from subprocess import Popen

import pytest
import torch
from safetensors.torch import load_file

from tests.test_ranks import started
from tests.training import ranks_worker
from zbench import ranks
from zbench.training.trainer import LOG, PROGRESS, STATE

pytestmark = pytest.mark.slow


def launched(size: int, *arguments: object) -> list[Popen[str]]:
    return started(size, "tests.training.ranks_worker", *map(str, arguments))


def finished(processes: list[Popen[str]]) -> list[str]:
    said = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return [output for output, _ in said]


def test_two_ranks_are_one_process_with_their_batches_joined(tmp_path: Path) -> None:
    ranks_worker.main(tmp_path / "one", 4, 6)
    assert all(process.wait(600) for process in launched(2, tmp_path / "two", 2, 6, 3))  # interrupted after 3 steps
    assert json.loads((tmp_path / "two" / PROGRESS).read_text())["state"]["step"] == 3
    speaking, silent = finished(launched(2, tmp_path / "two", 2, 6))
    assert "on 2 ranks" in speaking and silent == ""
    one, two = (load_file(tmp_path / name / STATE) for name in ("one", "two"))
    assert one.keys() == two.keys()
    rounding = {"value": 2e-5, "average": 1e-6, "square": 1e-9}  # a step is up to 1e-3
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=rounding[name.split("/")[0]])
    records = [json.loads((tmp_path / name / LOG).read_text().splitlines()[-1]) for name in ("one", "two")]
    assert records[0]["tokens"] == records[1]["tokens"] and records[0]["step"] == records[1]["step"] == 6
    for key in ("loss", "held_out_loss"):
        assert records[0][key] == pytest.approx(records[1][key], rel=1e-5)
    assert json.loads((tmp_path / "two" / PROGRESS).read_text())["ranks"] == 2


def test_a_lost_rank_ends_the_run_with_one_line(tmp_path: Path) -> None:
    first, second = launched(2, tmp_path, 2, 1_000_000)
    assert first.stdout is not None and first.stderr is not None
    for line in first.stdout:
        if "s per step" in line:  # training is under way
            break
    second.kill()
    until = time.monotonic() + 300
    while first.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    assert first.returncode == ranks.LOST
    said = [line for line in first.stderr.read().splitlines() if line.startswith("zbench: ")]
    assert said == ["zbench: rank 1 died, so the run ended; the last checkpoint is kept"]
