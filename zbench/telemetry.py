"""What a run's sensors said: the file that sampling writes, and what may be concluded from it.

`telemetry.jsonl` holds one segment per start of the run. A segment begins with an object that describes the device,
the period and every sensor (or why it is unavailable); then come samples, one array per line in the order of `SENSORS`
after the seconds since the segment began; an object with "window" for each trial, in the same seconds; and at the end
what sampling itself cost. Energy is believed by rules, see `trial_energy`: a wrong joule is worse than none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from zbench.errors import UserError

TELEMETRY = "telemetry.jsonl"
SCHEMA_VERSION = 1
# Name -> unit, in the order in which a sample lists them. Energy counts up; `throttle` names reasons, "" for none.
SENSORS = {
    "power": "W",
    "energy": "J",
    "core_clock": "Hz",
    "memory_clock": "Hz",
    "temperature": "°C",
    "memory": "B",
    "activity": "1",
    "memory_activity": "1",
    "throttle": "",
}
MIN_SECONDS = 10.0  # of an engine's trials together, from which its energy is reported
COUNTER_ERROR = 0.05  # what the counter's own update interval may add to the energy of all trials together
AGREEMENT = 0.05  # between the counter and the integral of power, over the whole run
GAPS = 3  # periods without a sample, beyond which an integral of power is not believed
POINTS = 10  # samples of power that each trial needs where power is all there is
# What was before a trial is in its first readings: activity and averaged power are of up to a second (NVML's manual),
# any power is renewed only every 20 to 100 ms (Yang, Adamek and Armour 2023, arXiv 2312.02741).
AVERAGED, RENEWED = 1.0, 0.1

Key = tuple[str, int, int]  # a trial: cell, group, repeat


class NoEnergy(Exception):
    """Energy cannot be told. The message completes "unavailable: "."""


@dataclass(frozen=True)
class Segment:
    """One start of the run. `sensors` maps each name to what is known of it, or to "unavailable: <why>"."""

    began: str  # ISO 8601, UTC
    device: str
    source: str  # what was asked: "NVML", "amdsmi", "RAPL", ...
    period: float  # seconds between samples, as asked for
    sensors: dict[str, dict[str, Any] | str]
    times: np.ndarray  # [n] seconds since the segment began
    values: dict[str, np.ndarray]  # name -> [n] floats, NaN where a reading failed; `throttle`: [n] strings or None
    windows: dict[Key, tuple[float, float]]
    cost: dict[str, Any] = field(default_factory=dict)  # of the sampling thread; empty where the run was killed

    def has(self, name: str) -> bool:
        return name in self.values and not isinstance(self.sensors.get(name), str)

    def why_not(self, name: str) -> str:
        """What completes "unavailable: " for a sensor that is not there."""
        known = self.sensors.get(name)
        return known.removeprefix("unavailable: ") if isinstance(known, str) else "not recorded"

    def within(self, key: Key, sensor: str = "") -> np.ndarray:
        """[n] whether a sample lies in the trial, and what it says of `sensor` too: the sample that begins a trial is
        of what was before."""
        start, end = self.windows[key]
        return (self.times > start + self.lag(sensor)) & (self.times <= end)

    def lag(self, sensor: str) -> float:
        """Seconds before a reading that it may be of."""
        known = self.sensors.get(sensor)
        averaged = isinstance(known, dict) and known.get("averaged")
        return AVERAGED if averaged or sensor in ("activity", "memory_activity") else RENEWED * (sensor == "power")

    @cached_property
    def problem(self) -> str:
        """Why the segment's energy is not believed; "" where it is."""
        if not self.has("energy"):
            return ""
        known = ~np.isnan(self.values["energy"])
        times, energy = self.times[known], self.values["energy"][known]
        if len(energy) < 2:
            return "the energy counter was read less than twice"
        steps = np.diff(energy)
        if (steps < 0).any():
            return f"the energy counter went backwards by {-steps.min():.4g} J"
        if energy[-1] == energy[0]:
            return f"the energy counter stood still for {times[-1] - times[0]:.1f} s"
        if not self.has("power"):
            return ""
        integral = _integral(self.times, self.values["power"], times[0], times[-1])
        if integral is None or times[-1] - times[0] < MIN_SECONDS:
            return ""  # nothing long enough to compare with
        counted = float(energy[-1] - energy[0])
        if abs(integral / counted - 1) > AGREEMENT:
            return (
                f"the energy counter says {counted:.4g} J over the run, the integral of power {integral:.4g} J: "
                f"they differ by more than {AGREEMENT:.0%}"
            )
        return ""


@dataclass(frozen=True)
class Telemetry:
    """All segments of a run."""

    segments: tuple[Segment, ...]
    warnings: tuple[str, ...] = ()

    def segment(self, key: Key) -> Segment | None:
        """The latest that holds the trial: a trial that was measured again counts as measured last."""
        return next((s for s in reversed(self.segments) if key in s.windows), None)

    @property
    def last(self) -> Segment:
        return self.segments[-1]

    def samples(self, key: Key, sensor: str) -> np.ndarray:
        """Known values during a trial; empty where there are none."""
        segment = self.segment(key)
        if segment is None or not segment.has(sensor):
            return np.array([])
        values = segment.values[sensor][segment.within(key, sensor)]
        return values[np.array([v is not None and v == v for v in values], dtype=bool)]  # NaN is unequal to itself

    def why_not(self, sensor: str) -> str:
        """What completes "unavailable: " where no trial has a sample."""
        if not self.last.has(sensor):
            return self.last.why_not(sensor)
        if lag := self.last.lag(sensor):
            return f"a reading may be of the {lag:g} s before it, and no trial was sampled after so long"
        return "no sample fell into its trials"


def read(folder: Path) -> Telemetry | None:
    """The telemetry of a run folder; None where none was recorded. A torn last line is left out.

    Raises UserError where the file is damaged or another schema version's.
    """
    path = folder / TELEMETRY
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    segments: list[dict[str, Any]] = []
    warnings = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if isinstance(entry, dict) and "schema" in entry:
                if entry["schema"] != SCHEMA_VERSION:
                    raise ValueError(f"schema {entry['schema']}, this zbench reads {SCHEMA_VERSION}")
                segments.append({"head": entry, "rows": [], "windows": {}, "cost": {}})
            elif isinstance(entry, list):
                if len(entry) != 1 + len(SENSORS):
                    raise ValueError(f"{len(entry)} values in a sample")
                segments[-1]["rows"].append(entry)
            elif "window" in entry:
                segments[-1]["windows"][tuple(entry["window"])] = (entry["start"], entry["end"])
            else:
                segments[-1]["cost"] = entry["cost"]
        except json.JSONDecodeError:
            if number < len(lines):
                raise UserError(f"{path}:{number}: not JSON; the file is damaged, remove the line") from None
            warnings.append(f"the last line of {TELEMETRY} is torn (a crash?) and was left out")
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise UserError(f"{path}:{number}: not telemetry ({error}); remove the file to report without it") from None
    return Telemetry(tuple(_segment(s) for s in segments), tuple(warnings)) if segments else None


def _segment(raw: Mapping[str, Any]) -> Segment:
    head, columns = raw["head"], list(zip(*raw["rows"], strict=True)) or [()] * (1 + len(SENSORS))
    numbers = {
        name: np.array([np.nan if v is None else v for v in column], dtype=float)
        for (name, unit), column in zip(SENSORS.items(), columns[1:], strict=True)
        if unit
    }
    return Segment(
        began=head["began"],
        device=head["device"],
        source=head["source"],
        period=head["period"],
        sensors=head["sensors"],
        times=np.array(columns[0], dtype=float),
        values={**numbers, "throttle": np.array(columns[-1], dtype=object)},
        windows=raw["windows"],
        cost=raw["cost"],
    )


def trial_energy(telemetry: Telemetry, keys: list[Key]) -> tuple[np.ndarray, np.ndarray, str]:
    """(joules [n], seconds [n], how) of an engine's trials, the device's idle power included.

    By the energy counter where there is one, else by the integral of sampled power. Raises NoEnergy:

    - the trials together last less than `MIN_SECONDS`;
    - the counter went backwards, stood still, or differs by more than `AGREEMENT` from the integral of power over the
      whole run (where both exist and the run is long enough);
    - what its update interval u can do to n trials of mean length w, u / (w sqrt(n)) as each is off by up to u either
      way, exceeds `COUNTER_ERROR`;
    - without a counter: a trial has less than `POINTS` samples or a gap of more than `GAPS` periods, or the driver
      averages power over about a second and a trial is shorter than `MIN_SECONDS`.
    """
    found = [(key, segment) for key in keys if (segment := telemetry.segment(key)) is not None]
    if len(found) < len(keys):
        raise NoEnergy(f"{len(keys) - len(found)} of {len(keys)} trials have no telemetry")
    if not found:
        raise NoEnergy("no trial has telemetry")
    counted = all(segment.has("energy") for _, segment in found)
    if not counted and not all(segment.has("power") for _, segment in found):
        lacking = next(segment for _, segment in found if not segment.has("power") and not segment.has("energy"))
        raise NoEnergy(lacking.why_not("energy"))
    seconds = np.array([np.subtract(*segment.windows[key][::-1]) for key, segment in found])
    if (total := seconds.sum()) < MIN_SECONDS:
        raise NoEnergy(
            f"its trials last {total:.1f} s together, energy takes {MIN_SECONDS:.0f} s (raise repeats or output_tokens)"
        )
    if problem := next((segment.problem for _, segment in found if segment.problem), ""):
        raise NoEnergy(problem)
    if counted:
        joules = [_counted(segment, key) for key, segment in found]
        worst = max(_update_interval(segment) for _, segment in found) / (seconds.mean() * np.sqrt(len(seconds)))
        if worst > COUNTER_ERROR:
            raise NoEnergy(
                f"the energy counter moves too rarely for trials of {seconds.mean():.2g} s: it may be off by"
                f" {worst:.0%} (raise output_tokens, batch or repeats)"
            )
        return np.array(joules), seconds, "energy counter"
    joules = [_integrated(segment, key) for key, segment in found]
    return np.array(joules), seconds, "integral of sampled power"


def _counted(segment: Segment, key: Key) -> float:
    known = ~np.isnan(segment.values["energy"])
    start, end = segment.windows[key]
    # Each trial begins and ends with a sample of its own; should that reading have failed, its neighbours serve.
    before, after = np.interp((start, end), segment.times[known], segment.values["energy"][known])
    return float(after - before)


def _update_interval(segment: Segment) -> float:
    """Seconds between changes of the counter: as measured before the run, else as the samples show."""
    sensor = segment.sensors["energy"]
    measured = sensor.get("update_seconds") if isinstance(sensor, dict) else None
    if measured is not None:
        return float(measured)
    known = ~np.isnan(segment.values["energy"])
    changes = segment.times[known][1:][np.diff(segment.values["energy"][known]) > 0]
    return float(np.median(np.diff(changes))) if len(changes) > 1 else float("inf")


def _integrated(segment: Segment, key: Key) -> float:
    start, end = segment.windows[key]
    sensor = segment.sensors["power"]
    if isinstance(sensor, dict) and sensor.get("averaged") and end - start < MIN_SECONDS:
        raise NoEnergy(
            "there is no energy counter, and the driver averages power over about a second:"
            f" too slow for trials of {end - start:.2g} s"
        )
    inside = segment.within(key) & ~np.isnan(segment.values["power"])
    times = segment.times[inside]
    if len(times) < POINTS:
        raise NoEnergy(f"there is no energy counter, and a trial has {len(times)} samples of power, of {POINTS} needed")
    if (gap := float(np.diff([start, *times, end]).max())) > GAPS * segment.period:
        raise NoEnergy(f"there is no energy counter, and power was not sampled for {gap:.2g} s of a trial")
    integral = _integral(segment.times, segment.values["power"], start, end)
    assert integral is not None
    return integral


def _integral(times: np.ndarray, power: np.ndarray, start: float, end: float) -> float | None:
    """Joules between two times, by trapezoids; None without two readings."""
    known = ~np.isnan(power)
    if known.sum() < 2:
        return None
    inside = known & (times > start) & (times < end)
    at = np.concatenate([[start], times[inside], [end]])
    from scipy.integrate import trapezoid

    return float(trapezoid(np.interp(at, times[known], power[known]), at))


def power(segment: Segment) -> np.ndarray | None:
    """[n] W as sampled, or the slope of the energy counter where power is no sensor; None where neither is known."""
    if segment.has("power"):
        return segment.values["power"]
    if not segment.has("energy") or len(segment.times) < 2:
        return None
    known = ~np.isnan(segment.values["energy"])
    times, energy = segment.times[known], segment.values["energy"][known]
    if len(times) < 2:
        return None
    # Over a period at least: the samples that begin and end a trial can lie a few microseconds beside others.
    before = times - max(segment.period, 1e-3)
    slope = (energy - np.interp(before, times, energy)) / np.maximum(times - np.maximum(before, times[0]), 1e-9)
    slope[times - times[0] < segment.period / 2] = np.nan
    filled = np.full(len(segment.times), np.nan)
    filled[known] = slope
    return filled
