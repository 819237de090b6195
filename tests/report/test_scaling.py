"""What a report says of several devices, on invented runs whose efficiency and communication are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.synthetic import ROOFS, write_run
from tests.report.test_sweeps import mixing
from tests.test_compare import _paced
from zbench.metrics import Cell, load_run
from zbench.records import TrialRecord, read_manifest, read_trials
from zbench.report import render
from zbench.report.scaling import best_blocks, sections
from zbench.results import Results

ENGINES = ("autoregressive", "tidar 4 by 1", "tidar 4 by 2")
PACE = 0.625  # of two devices: 1 / (2 x 0.625) = 80% efficient


def spread(folder: Path, pace: float = PACE, kernels: tuple[str, str] = ("torch", "torch"), talk: float = 0.25) -> Path:
    """One device, and two that take `pace` of its time, `talk` of which goes into collectives."""
    points = ({"parallel.tensor": 1}, {"parallel.tensor": 2})
    write_run(folder, engines=ENGINES, points=points, prompts=6, repeats=1, tokens=16)
    manifest = read_manifest(folder)
    cells = tuple(replace(cell, tensor=cell.point["parallel.tensor"]) for cell in manifest.cells)
    (folder / "run.json").write_text(replace(manifest, cells=cells).to_json())
    lines = []
    for trial in read_trials(folder)[0]:
        if trial.cell.endswith("=1"):
            two = _talking(_paced(trial, pace), talk)
            lines.append(replace(trial, kernels={"forward": kernels[0]}))
            lines.append(replace(two, cell=trial.cell[:-1] + "2", kernels={"forward": kernels[1]}))
    (folder / "trials.jsonl").write_text("".join(trial.to_json() + "\n" for trial in lines))
    return folder


def _talking(trial: TrialRecord, talk: float) -> TrialRecord:
    forwards = (
        replace(f, collective_bytes=1000.0, collective_seconds=None if i % 3 else talk * f.seconds)
        for i, f in enumerate(trial.forwards)
    )
    return replace(trial, forwards=tuple(forwards))


def cell(results: Results, label: str, tensor: int) -> Cell:
    return next(c for c in results.run.cells if c.record.label == label and c.record.tensor == tensor)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results.of(load_run(spread(tmp_path_factory.mktemp("spread"))))


@pytest.mark.parametrize("label", ENGINES)
def test_efficiency_and_communication_are_what_was_put_in(results: Results, label: str) -> None:
    one, two = (cell(results, label, n) for n in (1, 2))
    row = results.row(two, "parallel_efficiency")
    assert (row.value, row.low, row.high, row.n) == (pytest.approx(0.8), pytest.approx(0.8), pytest.approx(0.8), 6)
    assert results.value(two, "communication_share", "decode") == pytest.approx(0.25)
    assert results.row(two, "collective_bytes", next(iter(two.forwards["kind"]))).value == 1000.0
    whole, each = (results.value(two, metric) for metric in ("throughput", "throughput_per_device"))
    assert each == whole / 2
    assert results.value(one, "throughput_per_device") == results.value(one, "throughput")
    assert results.row(one, "parallel_efficiency").note == "unavailable: this is one device"
    assert results.row(one, "communication_share").note.startswith("unavailable: one device holds the model")


def test_replicas_have_a_speed_and_an_efficiency_of_their_own(tmp_path: Path) -> None:
    """Four devices: two replicas, each held by two."""
    folder = spread(tmp_path)
    manifest = read_manifest(folder)
    cells = tuple(replace(cell, replicas=2) if cell.tensor == 2 else cell for cell in manifest.cells)
    (folder / "run.json").write_text(replace(manifest, cells=cells).to_json())
    found = Results.of(load_run(folder))
    [section] = sections(found)
    assert [figure.name for figure in section.figures] == ["device_roofline"], "of one size there is no curve"
    both = cell(found, "autoregressive", 2)
    assert both.devices == 4
    assert found.value(both, "parallel_efficiency") == pytest.approx(0.8)
    assert found.value(both, "throughput_per_device") == pytest.approx((found.value(both, "throughput") or 0) / 2)


def test_an_efficiency_across_other_kernels_is_not_given(tmp_path: Path) -> None:
    mixed = Results.of(load_run(spread(tmp_path, kernels=("native", "torch"))))
    note = mixed.row(cell(mixed, "autoregressive", 2), "parallel_efficiency").note
    assert note == "unavailable: one device ran other kernels (native) than these (torch)"


@pytest.mark.parametrize(("talk", "bound"), [(0.9, "communication"), (0.05, "overhead")])
def test_what_is_beyond_the_floor_is_named(tmp_path: Path, talk: float, bound: str) -> None:
    slow = Results.of(load_run(spread(tmp_path, pace=5.0, talk=talk)))
    kind = "decode, 1 row"
    assert slow.row(cell(slow, "autoregressive", 2), "bound", kind).value == bound
    assert slow.row(cell(slow, "autoregressive", 1), "bound", kind).value == "memory"
    assert ROOFS["bandwidth"]["read"]["value"] > 0


def test_the_section_has_every_engine_at_every_size(results: Results) -> None:
    [section] = sections(results)
    names = [line.name for line in section.table.rows]
    assert names == [f"{e}: {n}" for e in ENGINES for n in ("1 device", "2 devices")]
    assert (
        section.sentences[0]
        == "autoregressive on 2 devices: 80% efficient (no spread), with 25% of decode in collectives."
    )
    assert [figure.name for figure in section.figures] == ["throughput_per_device", "device_roofline"]
    assert " on 1, " in section.figures[0].alt and " on 2;" in section.figures[0].alt


def test_the_best_number_of_blocks_is_told_for_each_size(results: Results) -> None:
    said = best_blocks(results, results.run.cells)
    assert len(said) == 2
    fastest = max(ENGINES[1:], key=lambda label: results.value(cell(results, label, 1), "decode_tps") or 0)
    count = fastest[-1]
    assert said[0].startswith(f"Blocks of 4 on 1 device: proposing {count} block")
    assert said[1].startswith(f"Blocks of 4 on 2 devices: proposing {count} block")
    assert best_blocks(results, [cell(results, ENGINES[1], 1)]) == [], "of one there is no best"


def test_the_best_number_of_blocks_is_told_for_engines_that_differ_in_nothing_else(tmp_path: Path) -> None:
    found = mixing(tmp_path, sampler="logit_mix")
    said = best_blocks(found, found.run.cells)
    assert len(said) == 2
    assert said[0].startswith("Blocks of 4 with sampler logit_mix on 1 device: proposing 2 blocks is fastest")
    assert said[1].startswith("Blocks of 4 with sampler lossless on 1 device: proposing 1 block is fastest")


def test_the_page_has_it_and_a_page_of_one_device_has_not(results: Results, tmp_path: Path) -> None:
    page = render(results.run.path).read_text()
    assert "Across devices" in page
    assert (results.run.path / "figures/device_roofline.svg").exists()
    alone = write_run(tmp_path, engines=("autoregressive",), prompts=2, repeats=1, tokens=8)
    assert "Across devices" not in render(alone).read_text()
