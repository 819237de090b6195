"""Timing of kernels: what is timed, what is written down, what the page says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from zbench import operators
from zbench.cli import main
from zbench.errors import UserError
from zbench.hardware import device as devices
from zbench.hardware import roofs
from zbench.kernels import registry
from zbench.kernels.registry import Case, Kernel, Unavailable, Work
from zbench.records import KERNELS
from zbench.report import kernels as pages

RATE = {"value": 1e9, "low": 0.9e9, "high": 1.1e9, "n": 9}
ROOFS: dict[str, Any] = {
    "bandwidth": {"read": {**RATE, "unit": "B/s"}},
    "flops": {"float32": {**RATE, "unit": "FLOP/s"}},
    "warning": None,
}
SCENARIO = "# ?\nname: tiny\nkernels: [scaled]\nseconds: 0.01\n"


def reference(x: Tensor, factor: float) -> Tensor:
    return x * factor


def _gone(x: Tensor, factor: float) -> Any:
    raise Unavailable("not on this device")


def _broken(x: Tensor, factor: float) -> Any:
    raise RuntimeError("no such thing\nat line 3")


SCALED = Kernel(
    "scaled",
    reference,
    reference,
    lambda x, factor: Work(x.numel(), x.nbytes, x.nbytes),
    lambda device, seed: (torch.full((4096,), seed + 1.0, device=device), 2.0),
    tolerance=1e-6,
    rivals={
        "mul": lambda x, factor: lambda: torch.mul(x, factor),
        "wrong": lambda x, factor: lambda: x,
        "gone": _gone,
        "broken": _broken,
    },
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a run of one small kernel."""
    monkeypatch.setattr(registry, "MODULES", {"scaled": "none"})
    monkeypatch.setattr(registry, "get", lambda name: SCALED)
    monkeypatch.setattr(roofs, "load_or_measure", lambda *args, **kwargs: ROOFS)
    monkeypatch.setattr(roofs, "past_cache_bytes", lambda device: 10**6)
    registry.checked.cache_clear()
    path = tmp_path / "tiny.yaml"
    path.write_text(SCENARIO)
    done = CliRunner().invoke(main, ["run", str(path), "--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    registry.checked.cache_clear()
    return next(tmp_path.glob("tiny-*"))


def test_a_run_says_what_ran_how_fast_and_under_which_roof(folder: Path) -> None:
    (row,) = json.loads((folder / KERNELS).read_text())["rows"]
    assert (row["flops"], row["bytes_read"], row["bytes_written"]) == (4096, 16384, 16384)
    assert row["floor_seconds"] == pytest.approx(32768e-9) and row["bound"] == "memory"
    assert row["argument_sets"] == operators.MOST_SETS and not row["past_cache"]
    own, mul = row["times"]
    assert own["name"] == "reference" and own["implementation"] == "torch (device is cpu)"
    assert own["speedup_over_reference"] is None
    assert mul["name"] == "mul" and mul["speedup_over_reference"]["value"] > 0
    for time in row["times"]:
        seconds = time["seconds"]
        assert 0 < seconds["low"] <= seconds["value"] <= seconds["high"] and seconds["n"] >= operators.FEWEST
        assert time["share_of_roof"] == pytest.approx(row["floor_seconds"] / seconds["value"])
    assert row["missing"] == {
        "wrong": "disagrees with the reference: relative error 5.0e-01",
        "gone": "not on this device",
        "broken": "failed: RuntimeError: no such thing",
    }


def test_the_page_shows_it_and_is_rendered_again_the_same(folder: Path) -> None:
    page = folder / pages.PAGE
    before = page.read_bytes()
    assert CliRunner().invoke(main, ["report", str(folder)]).output.strip() == str(page)
    assert page.read_bytes() == before
    text = page.read_text()
    for said in (
        "torch (device is cpu)",
        "disagrees with the reference",
        "of the measured roof",
        "less than four times the last",
    ):
        assert said in text
    assert pages.headline(folder)[0].startswith("scaled runs torch (device is cpu): ")


def test_a_time_above_the_roof_is_marked(folder: Path) -> None:
    run = json.loads((folder / KERNELS).read_text())
    run["rows"][0]["times"][0] |= {"share_of_roof": 1.3, "above_roof": True}
    (folder / KERNELS).write_text(json.dumps(run))
    pages.render(folder)
    assert any("reference is above the measured roof" in line for line in pages.headline(folder))
    assert 'class="wrong"' in (folder / pages.PAGE).read_text()


def test_what_is_no_run_of_kernels_is_refused_in_one_line(folder: Path) -> None:
    run = json.loads((folder / KERNELS).read_text())
    for text in ("{", "[]", json.dumps({**run, "schema_version": 99})):
        (folder / KERNELS).write_text(text)
        with pytest.raises(UserError, match=r"kernels.json: (is not a run of kernels|has schema 99)"):
            pages.render(folder)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["-o", "kernels=[attenton]"], "no kernel is called attenton; known: add_norm, block_attention"),
        (["--resume"], "cannot be resumed"),
        (["-o", "kernels=3"], "kernels"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(SCENARIO)
    done = CliRunner().invoke(main, ["run", str(path), "--out", str(tmp_path), *arguments])
    assert done.exit_code == 2 and said in done.output


def test_a_dry_run_lists_kernels_and_cases(tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "scenarios" / "kernels.yaml"
    done = CliRunner().invoke(main, ["run", str(path), "--dry-run", "--out", str(tmp_path / "out")])
    assert "block_attention: 16 rows, context 512" in done.output or torch.cuda.is_available()
    assert not (tmp_path / "out").exists()


def test_arguments_are_as_many_as_pass_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofs, "past_cache_bytes", lambda device: 10_000)
    case = Case("x", lambda seed: (torch.full((250,), float(seed)), [torch.zeros(250)]))
    sets, past = operators.argument_sets(case, devices.resolve("cpu"), seed=3)
    assert past and [float(x[0]) for x, _ in sets] == [3, 4, 5, 6, 7]


def _writing(x: Tensor, out: Tensor) -> None:
    out.copy_(x)


def _skipping(x: Tensor, out: Tensor) -> None:
    out[1:] = x[1:]


def _failing(x: Tensor, out: Tensor) -> None:
    raise RuntimeError("no such thing")


WRITTEN = Kernel(
    "written", _writing, _writing, lambda x, out: Work(0, x.nbytes, out.nbytes),
    lambda device, seed: (torch.ones(8), torch.zeros(8)), tolerance=1e-6,
)  # fmt: skip


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x, out: _writing(x, out), None),
        (_skipping, "disagrees with the reference: relative error 3.5e-01"),
        (_failing, "failed: RuntimeError: no such thing"),
    ],
)
def test_the_kernel_that_is_used_is_timed_where_it_agrees_on_the_case(
    call: Any, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "choose", lambda name, device: registry.Choice(call, "triton"))
    ready, missing = operators.implementations(WRITTEN, devices.resolve("cpu"), [WRITTEN.example("cpu", 0)])
    assert {name: label for name, (label, _) in ready.items()} == {
        **({} if why else {"kernel": "triton"}),
        "reference": "torch",
    }
    assert next(iter(ready)) == ("reference" if why else "kernel")
    assert missing.get("kernel") == why


def test_a_kernel_that_disagrees_on_a_case_is_said_to(folder: Path) -> None:
    run = json.loads((folder / KERNELS).read_text())
    run["rows"].append({**run["rows"][0], "case": "other", "missing": {"kernel": "disagrees"}})
    (folder / KERNELS).write_text(json.dumps(run))
    said = pages.headline(folder)
    assert said[0].startswith("scaled runs torch (device is cpu): ")
    assert "warning: scaled, other: the kernel that is used disagrees; it is not timed." in said
    run["rows"] = run["rows"][1:]
    (folder / KERNELS).write_text(json.dumps(run))
    assert pages.headline(folder)[0] == "scaled: what runs was timed in no case."


def test_a_kernel_without_cases_is_timed_on_its_example() -> None:
    (case,) = operators.cases(SCALED, devices.resolve("cpu"))
    assert case.make(4)[0][0] == 5
    named = replace(SCALED, cases=lambda device: [Case("a", lambda seed: ()), Case("b", lambda seed: ())])
    assert [case.label for case in operators.cases(named, devices.resolve("cpu"))] == ["a", "b"]
