"""What may be concluded from a run's sensors: when energy is believed, and what it comes to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report.synthetic import write_run
from zbench import metrics, telemetry
from zbench.errors import UserError
from zbench.records import read_manifest, read_trials
from zbench.report import render
from zbench.telemetry import NoEnergy, Segment, Telemetry, trial_energy

Curve = Callable[[np.ndarray], np.ndarray]


def segment(
    watts: Curve | None = None,
    joules: Curve | None = None,
    windows: dict[Any, tuple[float, float]] | None = None,
    seconds: float = 60,
    period: float = 0.1,
    **facts: Any,
) -> Segment:
    """Sensors that follow curves over time; `facts` describe both."""
    times = np.round(np.arange(0, seconds, period), 6)
    none = np.full(len(times), np.nan)
    values = {"power": watts(times) if watts else none, "energy": joules(times) if joules else none}
    sensors: dict[str, Any] = {
        "power": {"unit": "W", **facts} if watts else "unavailable: no power",
        "energy": {"unit": "J", **facts} if joules else "unavailable: no counter",
    }
    return Segment("2025-01-01", "device", "NVML", period, sensors, times, values, windows or {("a", 0, 0): (5, 25)})


def energy_of(*segments: Segment, keys: Any = (("a", 0, 0),)) -> tuple[np.ndarray, np.ndarray, str]:
    return trial_energy(Telemetry(segments), list(keys))


def why_not(*segments: Segment, keys: Any = (("a", 0, 0),)) -> str:
    with pytest.raises(NoEnergy) as reason:
        energy_of(*segments, keys=keys)
    return str(reason.value)


def test_a_counter_is_preferred_to_the_integral_of_power() -> None:
    joules, seconds, how = energy_of(segment(lambda t: 0 * t + 103, lambda t: 100 * t, update_seconds=0.02))
    assert joules == pytest.approx([2000]) and seconds == pytest.approx([20]) and how == "energy counter"


def test_without_a_counter_power_is_integrated() -> None:
    joules, _, how = energy_of(segment(lambda t: 100 + 4 * t))
    assert joules == pytest.approx([100 * 20 + 2 * (25**2 - 5**2)]) and how == "integral of sampled power"


def test_energy_needs_ten_seconds_of_trials() -> None:
    short = segment(None, lambda t: 100 * t, {("a", 0, 0): (5, 9), ("a", 0, 1): (20, 24)}, update_seconds=0.02)
    assert "8.0 s together" in why_not(short, keys=short.windows)
    longer = segment(None, lambda t: 100 * t, {("a", 0, i): (5 * i, 5 * i + 4) for i in range(3)}, update_seconds=0.02)
    joules, _, _ = energy_of(longer, keys=longer.windows)
    assert joules == pytest.approx([400] * 3)


@pytest.mark.parametrize("counted", [66.0, 94.0, 106.0, 150.0])
def test_a_counter_that_disagrees_with_power_is_not_believed(counted: float) -> None:
    assert "differ by more than 5%" in why_not(segment(lambda t: 0 * t + 100, lambda t: counted * t))


def test_a_counter_that_goes_backwards_is_not_believed() -> None:
    """ROCm/amdsmi issue 115: 4750896266 counts, a second later 4736943791, at 15.3 µJ each."""
    recorded = np.array([4750896266, 4736943791]) * 15.3e-6
    back = segment(None, lambda t: np.where(t < 10, recorded[0] + t, recorded[1] + t))
    assert "went backwards by 21" in why_not(back)


def test_a_counter_that_stands_still_is_not_zero_joules() -> None:
    """AMDResearch/hpcfund issue 21: 8152136 counts before and after a training."""
    assert "stood still" in why_not(segment(None, lambda t: 0 * t + 8152136 * 15.3e-6))


def test_a_counter_that_moves_too_rarely_for_the_trials_is_not_believed() -> None:
    windows = {("a", 0, i): (i, i + 0.5) for i in range(25)}
    steps: Curve = lambda t: 100 * np.floor(t)  # noqa: E731
    assert "moves too rarely" in why_not(segment(None, steps, windows, update_seconds=1.0), keys=windows)
    assert "moves too rarely" in why_not(segment(None, steps, windows), keys=windows)  # as the samples themselves show
    assert len(energy_of(segment(None, lambda t: 100 * t, windows, update_seconds=0.1), keys=windows)[0]) == 25


def test_averaged_power_is_too_slow_for_short_trials() -> None:
    windows = {("a", 0, i): (5 * i, 5 * i + 4) for i in range(5)}
    constant: Curve = lambda t: 0 * t + 100  # noqa: E731
    assert "averages power" in why_not(segment(constant, None, windows, averaged=True), keys=windows)
    assert energy_of(segment(constant, None, windows), keys=windows)[0] == pytest.approx([400] * 5)
    assert energy_of(segment(constant, averaged=True))[0] == pytest.approx([2000])  # one trial of 20 s


def test_readings_that_may_be_of_what_was_before_a_trial_are_not_its_own() -> None:
    long, short = ("a", 0, 0), ("a", 0, 1)
    found = segment(lambda t: np.where(t < 5.05, 500.0, 100.0), windows={long: (5, 25), short: (30, 30.9)})
    busy = np.where(found.times < 5.95, 0.1, 0.9)
    told = Telemetry((
        replace(found, values={**found.values, "activity": busy}, sensors={**found.sensors, "activity": {"unit": "1"}}),
    ))  # fmt: skip
    assert set(told.samples(long, "activity")) == {0.9} and set(told.samples(long, "power")) == {100.0}
    assert len(told.samples(short, "activity")) == 0 and len(told.samples(short, "power")) > 0
    assert told.why_not("activity").startswith("a reading may be of the 1 s before it, and no trial")


def test_power_with_a_gap_or_few_samples_is_not_integrated() -> None:
    gap: Curve = lambda t: np.where((t > 10) & (t < 10.5), np.nan, 100)  # noqa: E731
    assert "not sampled for 0.5 s" in why_not(segment(gap))
    assert "of 10 needed" in why_not(segment(lambda t: 0 * t + 100, period=4))


def test_missing_sensors_and_missing_trials_say_why() -> None:
    assert why_not(segment()) == "no counter"
    assert "1 of 2 trials have no telemetry" in why_not(segment(None, lambda t: t), keys=[("a", 0, 0), ("b", 0, 0)])


def test_a_trial_that_was_measured_again_counts_as_measured_last() -> None:
    joules, _, _ = energy_of(
        segment(None, lambda t: 100 * t, update_seconds=0.02), segment(None, lambda t: 70 * t, update_seconds=0.02)
    )
    assert joules == pytest.approx([1400])


def test_power_follows_from_the_counter_where_there_is_no_sensor() -> None:
    found = telemetry.power(segment(None, lambda t: 100 * t))
    assert found is not None and found[10:] == pytest.approx(100)
    assert telemetry.power(segment()) is None


# Run folders --------------------------------------------------------------------------------------------------------


def with_telemetry(folder: Path, watts: float = 150.0, **sensors: Any) -> Path:
    """A run of invented numbers, longer than it says: each trial is given ten times its seconds."""
    write_run(folder, engines=("autoregressive", "transformers generate"))
    head = {
        "schema": telemetry.SCHEMA_VERSION, "began": "2025-01-01T00:00:00.000+00:00", "device": "Invented",
        "source": "invented", "period": 0.1,
        "sensors": {name: {"unit": "x"} for name in telemetry.SENSORS}
        | {"energy": {"unit": "J", "of": "<b>board</b>", "update_seconds": 0.02}} | sensors,
    }  # fmt: skip
    lines: list[Any] = [head]
    at = 0.0
    for trial in sorted(read_trials(folder)[0], key=lambda t: t.order):
        end = at + 10 * trial.wall_seconds
        for t in np.linspace(at, end, 20):
            reason = "power cap" if trial.group == 0 and t > at else ""
            lines.append([t, watts, watts * t, 1.5e9 + 1e6 * t, None, 50 + t / 10, 1e9, 0.9, 0.4, reason])
        lines.append({"window": trial.key, "start": at, "end": end})
        at = end + 0.05
    lines.append({"cost": {"cpu_seconds": 0.4, "seconds": at, "samples": 99, "period": 0.1, "failures": {}}})
    (folder / telemetry.TELEMETRY).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_metrics_of_energy_follow_their_formulas(tmp_path: Path) -> None:
    run = metrics.load_run(with_telemetry(tmp_path))
    cell = run.cells[0]
    rows = {row.metric: row for row in metrics.summarise(run) if row.cell == cell.record.id}
    seconds = np.array([10 * t.wall_seconds for t in cell.trials])
    tokens = np.array([sum(len(r.output_ids) for r in t.requests) for t in cell.trials])
    assert rows["joules_per_token"].value == pytest.approx(150 * seconds.sum() / tokens.sum())
    assert rows["tokens_per_joule"].value == pytest.approx(tokens.sum() / (150 * seconds.sum()))
    assert rows["energy_delay_product"].value == pytest.approx((150 * seconds**2).sum() / (tokens**2).sum())
    assert rows["mean_power"].value == pytest.approx(150)
    assert rows["joules_per_token"].n == 8 and rows["joules_per_token"].low is not None
    assert rows["joules_per_token"].estimator.endswith("energy counter")
    assert rows["throttled"].value == pytest.approx(1 / 8) and rows["throttled"].note == "power cap"
    assert rows["activity"].value == pytest.approx(0.9)
    found = run.telemetry
    assert found is not None
    assert rows["temperature"].value == pytest.approx(
        max(found.samples(t.key, "temperature").max() for t in cell.trials)
    )


@pytest.mark.parametrize(
    ("devices", "why"),
    [
        ({"tensor": 4}, "only rank 0's device is sampled, and 4 hold the model"),
        ({"replicas": 2}, "only rank 0's device is sampled, and 2 replicas share the prompts"),
        (
            {"options": {"url": "http://there:8000"}},
            "only this machine's device is sampled, and the server may be elsewhere",
        ),
        (
            {"options": {"settings": {"tensor_parallel_size": 4}}},
            "only one device is sampled, and the engine may use several (--tensor_parallel_size=4)",
        ),
        (
            {"options": {"url": None, "server": {"command": ["vllm", "serve", "{model}", "-tp", "4"]}}},
            "only one device is sampled, and the engine may use several (-tp 4)",
        ),
    ],
)
def test_energy_of_one_device_is_not_that_of_several(tmp_path: Path, devices: dict[str, Any], why: str) -> None:
    folder = with_telemetry(tmp_path)
    manifest = read_manifest(folder)
    (folder / "run.json").write_text(
        replace(manifest, cells=tuple(replace(cell, **devices) for cell in manifest.cells)).to_json()
    )
    cell = metrics.load_run(folder).cells[0]
    for name in ("joules_per_token", "tokens_per_joule", "energy_delay_product"):
        found = metrics.evaluate(metrics.METRICS[name], cell)[""]
        assert (found.value, found.note) == (None, f"unavailable: {why}")
    told = {name: metrics.evaluate(metrics.METRICS[name], cell)[""] for name in ("mean_power", "activity", "throttled")}
    if cell.record.options.get("url"):  # nothing that is sampled here is that server's
        assert {(found.value, found.note) for found in told.values()} == {(None, f"unavailable: {why}")}
        return
    assert told["mean_power"].value == pytest.approx(150)
    assert "of several rank 0's" in metrics.METRICS["mean_power"].formula
    if "replicas" in devices:  # whose trials have no window on rank 0
        trials = (folder / "trials.jsonl").read_text()
        others = [replace(t, group=t.group + 100) for t in read_trials(folder)[0]]
        (folder / "trials.jsonl").write_text(trials + "".join(t.to_json() + "\n" for t in others))
        assert metrics.mean_power(metrics.load_run(folder).cells[0]).value == pytest.approx(150)


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("serve --data-parallel-size 2", "--data-parallel-size 2"),
        ("serve --tp=1 --pipeline-parallel-size=2", "--pipeline-parallel-size=2"),
        ("serve --dp-size 16", "--dp-size 16"),
        ("trtllm-serve --tp_size 8 {model}", "--tp_size 8"),
        ("serve --tensor-parallel-size 1 --data-parallel-size-local 2 --no-tp 4 --tp 4x", ""),
    ],
)
def test_devices_that_an_engine_spreads_over_share_its_throughput(tmp_path: Path, command: str, given: str) -> None:
    cell = metrics.load_run(write_run(tmp_path)).cells[0]
    cell = replace(cell, record=replace(cell.record, options={"server": {"command": command.split()}}))
    found = metrics.evaluate(metrics.METRICS["throughput_per_device"], cell)[""]
    assert cell.spread == given and (found.value is None) == bool(given)


def test_the_report_shows_sensors_or_says_why_not(tmp_path: Path) -> None:
    folder = with_telemetry(
        tmp_path, memory_clock="unavailable: <i>none</i>", temperature="unavailable: no <b>sensor</b>"
    )
    page = render(folder).read_text()
    assert "Temperature unavailable: no &lt;b&gt;sensor&lt;/b&gt;." in page
    assert "&lt;b&gt;board&lt;/b&gt;" in page and "<b>" not in page
    assert "Energy per token" in page and "Hottest" not in page
    assert re.search(r"autoregressive was throttled in 12\.5% of its samples: power cap\.", page)
    assert "of one CPU core" in page
    assert {"power.svg", "clock.png", "activity-dark.svg"} <= {p.name for p in (folder / "figures").iterdir()}


def test_sampling_is_not_claimed_where_nothing_could_be_sampled(tmp_path: Path) -> None:
    page = render(with_telemetry(tmp_path, **dict.fromkeys(telemetry.SENSORS, "unavailable: no NVML"))).read_text()
    assert "unavailable: no NVML." in page and "Sampled every" not in page


def test_a_run_without_telemetry_says_so(tmp_path: Path) -> None:
    page = render(write_run(tmp_path)).read_text()
    assert "No telemetry was recorded." in page
    assert "Energy per token" not in page


def test_a_torn_last_line_is_left_out_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    path = with_telemetry(tmp_path) / telemetry.TELEMETRY
    whole = path.read_text()
    path.write_text(whole + "[1.0, 2")
    found = telemetry.read(tmp_path)
    assert found is not None and "torn" in found.warnings[0]
    path.write_text(whole.replace("\n", "\n[1,2]\n", 1))
    with pytest.raises(UserError, match=r"telemetry.jsonl:2: not telemetry \(2 values in a sample\)"):
        telemetry.read(tmp_path)
    path.write_text(whole.replace('"schema": 1', '"schema": 99', 1))
    with pytest.raises(UserError, match="schema 99"):
        telemetry.read(tmp_path)
