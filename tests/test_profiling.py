"""Profiles on a tiny model: what operators add up to, and what is written."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tests.test_run import SHAPE
from zbench import profiling, scenario
from zbench.cli import main
from zbench.engines import Shared
from zbench.errors import UserError
from zbench.hardware import counters as hardware
from zbench.hardware import roofs
from zbench.hardware.device import Device
from zbench.kernels import cpu
from zbench.models.cost import forward_cost
from zbench.records import ForwardRecord
from zbench.trace import Operator

ENGINES = """
engines:
  - {name: autoregressive, label: ours}
  - {name: autoregressive, label: on torch, execution: eager}
  - {name: eagle3, drafter: {random: true}, depth: 2}
  - {name: dflash, drafter: {random: true, layers: 2}, block: 4}
  - {name: diffusion, block_size: 4, synthetic: {length: 2}}
  - reference
"""
SCENARIO = f"""
name: tiny
model: {{config: {SHAPE.replace("300", "304").replace("256", "1024")}, weights: random}}
dtype: float32
device: cpu
prompts: {{set: quickstart, limit: 2}}
context: 20
batch: 2
threads: 1
{ENGINES}
"""


@pytest.fixture(autouse=True)
def _made_up_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = {"value": 1e10, "low": 1e10, "high": 1e10, "n": 1, "unit": "B/s"}
    made_up = {"bandwidth": {"read": rate}, "flops": {"float32": {**rate, "unit": "FLOP/s"}}}
    monkeypatch.setattr(roofs, "load_or_measure", lambda *_, **__: made_up)


def profiled(tmp_path: Path, engine: str | None, steps: int = 3) -> dict[str, Any]:
    path = tmp_path / "tiny.yaml"
    path.write_text(SCENARIO)
    found = profiling.profile(scenario.load(path, ()), engine, steps, tmp_path, lambda _: None)
    assert json.loads((tmp_path / profiling.PROFILE).read_text()) == json.loads(json.dumps(found))
    assert "of roof" in profiling.table(found)
    return found


def flops(found: dict[str, Any]) -> float:
    return sum(operator["flops"] or 0 for operator in found["operators"])


@pytest.mark.skipif(not cpu.available(), reason="no native decoder here")
def test_native_sections_add_up_to_the_counted_forward(tmp_path: Path) -> None:
    found = profiled(tmp_path, "ours")
    native = {operator["name"]: operator for operator in found["operators"] if operator["kind"] == "native"}
    assert set(native) == {*cpu.BEFORE, *cpu.LAYER, *cpu.AFTER}
    assert native["gate_up"]["calls"] == 2 and native["head"]["calls"] == 1
    (counted, moved) = found["counts"]
    assert counted["analytic"] == counted["counted"]  # two other steps than those that were profiled, at other contexts
    per_token = 2 * 2 * 4 * 64 * 2  # batch, layers, scores and values of a width of 64, on a mean two steps later
    assert flops(found) == pytest.approx(counted["analytic"], abs=4 * per_token)
    assert not moved["flagged"] or moved["disagreement"] < 0.5  # a tiny model's activations are not small
    assert 0 < found["explained"] <= 1.001
    assert set(found["phases_seconds_per_step"]) == {"decode", "accept", "commit", "host gap"}


@pytest.mark.skipif(not cpu.available(), reason="no native decoder here")
def test_section_flops_and_bytes_are_those_of_the_cost_model() -> None:
    from zbench.models.config import ModelConfig

    config = ModelConfig(
        family="llama", layers=3, width=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=304, rms_eps=1e-5,
        rope_theta=1e4, max_positions=256, tied=True,
    )  # fmt: skip
    names = cpu.BEFORE + cpu.LAYER * 3 + cpu.AFTER
    contexts, rows, wanted = (5, 9), 4, 3
    pairs = 2 * rows * (rows + 1) / 2
    call = cpu.Timed(names, tuple(range(len(names) + 1)), 2 * rows, contexts, pairs, wanted, config, 4)
    found = profiling.sections(call)
    cost = forward_cost(config, rows, contexts, wanted, 4)
    assert sum(o.flops or 0 for o in found) == cost.flops
    norms = 4 * (3 * 2 * 64 + 64)  # read from cache, so left out of sections
    assert sum(o.bytes or 0 for o in found) == cost.bytes_read + cost.bytes_written - norms


@pytest.mark.skipif(not cpu.available(), reason="no native decoder here")
def test_the_sections_of_a_draft_have_the_flops_and_bytes_of_its_levels() -> None:
    from zbench.models.config import ModelConfig
    from zbench.models.eagle3 import Eagle3Drafter, random_drafter

    target = ModelConfig(
        family="llama", layers=8, width=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=300, max_positions=256
    )
    stored, batch, rows, depth = random_drafter(target, 0, 48), 2, 3, 3
    drafter = Eagle3Drafter(stored.config, stored.tensors, torch.randn(300, 64), torch.float32)
    cache = drafter.new_cache(batch, 32, depth)
    taps, ids = [torch.randn(batch, rows, 64)] * 3, torch.ones(batch, rows, dtype=torch.int64)
    with cpu.recording() as calls:
        drafter.extend(taps, ids, cache)
        cache.extend([rows] * batch)
        start = time.perf_counter_ns()
        _, _, ends = drafter.chain(
            taps, ids, torch.tensor([rows - 1] * batch), [rows] * batch, cache, depth, lambda: None
        )
        stop = time.perf_counter_ns()
    costs = [
        drafter.cost(rows, [0, 0], 0, rows * (rows + 1) // 2, True),
        drafter.cost(rows, [rows, rows], batch, rows * (rows + 1) // 2, True),
        *(drafter.cost(1, [2 * rows, 2 * rows], batch, level, False) for level in range(1, depth)),
    ]
    assert len(calls) == len(costs)
    for index, (call, cost) in enumerate(zip(calls, costs, strict=True)):
        found = profiling.sections(call)
        assert sum(o.flops or 0 for o in found) == cost.flops
        norms = 4 * (3 * 64 + (64 if call.wanted else 0))  # read from cache, so left out of sections
        # The cost counts the nodes drafted so far as new rows, the sections as keys to read.
        nodes = 4 * batch * 2 * 2 * 16 * max(index - 2, 0)
        assert sum(o.bytes or 0 for o in found) == cost.bytes_read + cost.bytes_written - norms + nodes
    assert [call.times[-1] for call in calls[1:]] == ends
    assert start <= calls[1].times[0] and ends == sorted(ends) and ends[-1] <= stop


@pytest.mark.skipif(not cpu.available(), reason="no native decoder here")
@pytest.mark.parametrize("own_head", [False, True])
def test_the_sections_of_a_block_have_the_flops_and_bytes_of_reading_and_drafting_it(own_head: bool) -> None:
    from zbench.models import dflash
    from zbench.models.config import ModelConfig
    from zbench.models.loading import random_tensors
    from zbench.models.transformer import Transformer

    config = ModelConfig(
        family="llama", layers=8, width=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=300, max_positions=256
    )
    target = Transformer(config, random_tensors(config, 0, torch.float32), torch.float32)
    stored, batch, rows, block = dflash.random_drafter(config, 0, layers=3), 2, 3, 5
    shape, tensors = stored.config, dict(stored.tensors)
    if own_head:
        shape = replace(shape, body=replace(shape.body, vocab=48), own_head=True)
        tensors["lm_head.weight"] = torch.randn(48, 64)
    drafter = dflash.DFlashDrafter(shape, tensors, target)
    cache, features = drafter.new_cache(batch, 32), [torch.randn(batch, rows, 64)] * len(shape.taps)
    with cpu.recording() as calls:
        start = time.perf_counter_ns()
        drafter.read(features, cache, [rows, rows - 1])
        drafter.draft(torch.tensor([5, 6]), cache, block)
        drafter.draft(torch.tensor([5, 6]), cache, block, features, [1, rows])
        stop = time.perf_counter_ns()
    costs = [
        drafter.cost(rows, 0, [0, 0]),
        drafter.cost(0, block, [rows, rows - 1]),
        drafter.cost(rows, block, [rows + 1, 2 * rows - 1]),
    ]
    # Norms are read from cache, so left out of sections.
    of_context, of_block = 64 + 3 * 16, 3 * (2 * 64 + 2 * 16) + 64
    norms = [of_context, of_block, of_context + of_block]
    assert len(calls) == len(costs)
    for call, cost, left_out in zip(calls, costs, norms, strict=True):
        found = profiling.sections(call)
        assert sum(o.flops or 0 for o in found) == cost.flops
        assert sum(o.bytes or 0 for o in found) == cost.bytes_read + cost.bytes_written - 4 * left_out
    times = [time for call in calls for time in call.times]
    assert start <= times[0] and times == sorted(times) and times[-1] <= stop


def test_what_is_profiled_by_default_is_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plainly, allowed = Shared.target, list[bool]()

    def asked(shared: Shared, execution: str) -> Any:
        allowed.append(not shared.why_no_graphs)
        return plainly(shared, execution)

    monkeypatch.setattr(Shared, "target", asked)
    profiled(tmp_path, "ours")
    assert allowed[0] is False


def test_torch_operators_are_counted_from_their_shapes(tmp_path: Path) -> None:
    found = profiled(tmp_path, "on torch")
    assert {operator["kind"] for operator in found["operators"]} == {"torch"}
    assert flops(found) == pytest.approx(found["counts"][0]["analytic"], rel=0.02)
    assert found["explained"] < 1.001
    mm = next(operator for operator in found["operators"] if operator["name"] == "aten::mm")
    assert mm["calls"] == 4 * 2 + 1
    assert mm["of_roof"] > 0 and mm["roof"] in ("memory", "compute")


@pytest.mark.parametrize("engine", ["eagle3", "dflash", "diffusion"])
def test_drafting_engines_have_their_phases_and_equal_counts(tmp_path: Path, engine: str) -> None:
    found = profiled(tmp_path, engine)
    assert found["counts"][0]["disagreement"] < profiling.DISAGREEMENT
    assert {"diffusion": "draft+verify"}.get(engine, "verify") in found["phases_seconds_per_step"]


def test_the_trace_has_steps_forwards_and_native_sections(tmp_path: Path) -> None:
    profiled(tmp_path, "ours", steps=2)
    events = json.loads((tmp_path / profiling.TRACE).read_text())["traceEvents"]
    steps = [e for e in events if e.get("name") == profiling.STEP]
    assert len(steps) == 2
    assert sum(e.get("name") == "decode, 1 rows" for e in events) >= 2
    native = [e for e in events if e.get("cat") == "native"]
    if cpu.available():
        assert len(native) == 2 * len(cpu.BEFORE + cpu.LAYER * 2 + cpu.AFTER)
        inside = [any(s["ts"] <= e["ts"] and e["ts"] + e["dur"] <= s["ts"] + s["dur"] for s in steps) for e in native]
        assert all(inside)


def test_a_count_that_is_off_by_more_than_a_tenth_is_flagged() -> None:
    alike, apart = (profiling.Count("FLOPs", "FLOP", 100, counted, None, {}) for counted in (109.0, 111.0))
    assert not alike.flagged and apart.flagged and apart.disagreement == pytest.approx(0.11)
    assert profiling.Count("bytes", "B", 100, None, None, {}).disagreement is None


def test_kernels_without_times_are_unknown_in_the_table_and_never_0_s(tmp_path: Path) -> None:
    kernels = [Operator("void at::native::reduce<4>", "kernel", 3, 0.0, 5.0, 7.0)]
    assert profiling._untimed(kernels)
    assert not profiling._untimed([*kernels, replace(kernels[0], seconds=1.0)])
    assert not profiling._untimed([replace(kernels[0], kind="torch")])
    roofs = {"bandwidth": {"read": {"value": 1.0}}, "flops": {"float32": {"value": 1.0}}}
    found = profiled(tmp_path, "ours")
    found |= {"explained": None, "operators": [profiling._row(kernels[0], 3, roofs, "float32")]}
    (row,) = (line for line in profiling.table(found).splitlines() if line.startswith("reduce<4>"))
    assert "no times of kernels" in profiling.table(found)
    assert " 0 s" not in row and row.count("unknown") == 5  # time, share, both rates, of the roof


def test_an_operator_above_the_roof_is_marked_and_the_mark_explained(tmp_path: Path) -> None:
    found = profiled(tmp_path, "ours")
    known = {"of_roof": 1.78, "roof": "memory", "seconds": 1e-3, "flops": 1.0, "bytes": 1.0}
    found |= {
        "operators": [
            found["operators"][0] | known | {"name": "above"},
            found["operators"][0] | known | {"name": "below", "of_roof": 0.9},
        ]
    }
    lines = profiling.table(found).splitlines()
    assert [line.split()[-2:] for line in lines if line.startswith(("above ", "below "))] == [
        ["178%", "memory*"],
        ["90%", "memory"],
    ]
    assert any(line.startswith("* above the measured roof") for line in lines)
    assert "* above" not in profiling.table(found | {"operators": found["operators"][1:]})


def test_kernels_that_were_timed_beside_counters_stand_in_for_those_of_the_trace() -> None:
    timed = hardware.Timed("gemv", 4, 2e-6, 8e6)
    (found,) = profiling._operators({"traceEvents": []}, (), [timed])
    assert found == Operator("gemv", "kernel", 4, 2e-6, None, 8e6)
    gpu = Device("cuda", "cuda", 0, "x")
    (said,) = profiling._notes((), gpu, [found], counted=True)
    assert said.startswith("Kernels have the times and bytes that were counted, in steps of their own")


def test_what_was_timed_in_other_steps_explains_nothing_of_these(tmp_path: Path) -> None:
    found = profiled(tmp_path, "ours")
    seconds = found["profiled_step_seconds"]["mean"]
    found |= {"explained": None, "operators": [found["operators"][0] | {"name": "gemv", "seconds": 3 * seconds}]}
    (row,) = (line for line in profiling.table(found).splitlines() if line.startswith("gemv"))
    assert "300" not in row and "unknown" in row


def test_what_cannot_be_profiled_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no engine 'other' in the scenario; it has ours"):
        profiled(tmp_path, "other")
    with pytest.raises(UserError, match="cannot be taken step by step"):
        profiled(tmp_path, "reference")
    with pytest.raises(UserError, match="fewer --steps"):
        profiled(tmp_path, "eagle3", steps=500)


def test_the_command_leaves_no_folder_where_nothing_came_of_it(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(SCENARIO)
    out = tmp_path / "out"
    command = ["profile", str(tmp_path / "tiny.yaml"), "--out", str(out), "--engine", "nobody"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2 and not list(out.iterdir())


def test_a_trace_that_torch_does_not_write_is_one_line_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_full_disk(_: Any, path: str) -> None:
        Path(f"{path}.tmp").write_text("{")

    monkeypatch.setattr(profiling.torch_profiler, "export_chrome_trace", on_a_full_disk)
    (tmp_path / "tiny.yaml").write_text(SCENARIO)
    done = CliRunner().invoke(main, ["profile", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].endswith(": torch could not write its trace; is the disk full?")
    assert not list((tmp_path / "out").iterdir())


def test_what_the_hardware_counted_stands_beside_the_other_counts_and_is_flagged() -> None:
    count = profiling.Count("bytes", "B/step", 100.0, 101.0, None, {"measured": "none"})
    forward = ForwardRecord(1, "target", "decode", 1, 1, 5.0, 7.0, 180.0, 20.0, 0.1, 1)
    # Its own steps moved 200 bytes each by the analytic count, where those that were counted moved 100.
    found = hardware.Measured("ncu", 2 * 230.0, None, {"flops": "no counter"})
    beside = profiling._with_measured(count, found, 2, [forward, forward])
    assert beside.measured == 115.0 and beside.flagged and beside.why_not == {}
    flops = profiling._with_measured(replace(count, what="FLOPs"), found, 2, [forward, forward])
    assert flops.measured is None and flops.why_not == {"measured": "ncu: no counter"} and not flops.flagged


def test_hardware_counters_are_named_with_why_they_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: None)
    for device in (Device("cpu", "cpu", None, "x"), Device("cuda", "rocm", 0, "x"), Device("cuda", "cuda", 0, "x")):
        for counter in profiling.counters(device, profiling._gpm(device)):
            assert counter["status"].startswith(("unavailable: ", "here, but not read"))
    given = hardware.Measured("rocprofv3", 1.0, 1.0, {}, kernels=7)
    named = profiling.counters(Device("cuda", "rocm", 0, "x"), "none", given)
    assert named[0] == {"name": "rocprofv3 (FETCH_SIZE, WRITE_SIZE)", "status": "read: 7 kernels"}


def test_counter_files_that_do_not_fit_are_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(SCENARIO)
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    done = CliRunner().invoke(
        main,
        ["profile", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"), "--counters", str(tmp_path / "x.csv")],
    )
    assert done.exit_code == 2 and "neither CSV of ncu" in done.output
