"""A history loses no run, tells what it cannot read, and joins only what may be compared."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.test_gate import ENVIRONMENT, GOOD, changed, slower
from tests.test_metrics import CHAIN, trial, verifying, write
from zbench import gate, history
from zbench.changes import SEGMENT
from zbench.cli import main
from zbench.errors import UserError
from zbench.history import Line, Number, Series
from zbench.metrics import load_run
from zbench.records import TrialRecord
from zbench.report import trend

LESS = changed(GOOD, 9, **{key: getattr(verifying([1, 1], group=3), key) for key in ("steps", "forwards", "requests")})


def run(root: Path, day: int, trials: Sequence[TrialRecord] = GOOD, **changes: Any) -> Path:
    """A run of November's `day`, in a folder called after it."""
    usual = {"environment": ENVIRONMENT, "scenario_hash": "s", "prompts_hash": "p", "models": {"m": {"hash": "w"}}}
    return write(
        root / f"n-{day:02}", trials, CHAIN, created=f"2026-11-{day:02}T08:00:00+00:00", **{**usual, **changes}
    )


def of(file: Path, metric: str, cell: str = "spec") -> Series:
    return history.series(history.read(file)[0], [metric], cell)[0]


def zbench(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["history", *map(str, arguments)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "history.jsonl"


# --- The file ---


def test_an_entry_carries_each_number_with_its_evidence_and_what_it_is_of(tmp_path: Path, file: Path) -> None:
    folder = run(tmp_path / "runs", 3)
    assert history.add(folder, file, note="first", commit="c0ffee") == "added"
    (entry,), said = history.read(file)
    row = next(r for r in gate.snapshot(load_run(folder)).cells["spec"].timed.items() if r[0] == "decode_tps")[1]
    number = entry.cells["spec"].metrics["decode_tps"][""]
    assert said == ()
    assert number.value == row.value
    assert number.low is not None and number.high is not None and number.low <= number.value <= number.high
    assert number.n == 6
    meaning = entry.metrics["decode_tps"]
    assert (meaning.unit, meaning.better) == ("tokens/s", "higher")
    assert meaning.definition == gate.snapshot(load_run(folder)).definitions["decode_tps"]
    assert (entry.note, entry.commit, entry.folder) == ("first", "c0ffee", "runs/n-03")
    assert entry.identity["device.name"] == "Invented CPU"


def test_without_a_commit_the_one_that_the_run_recorded_is_kept_and_none_is_made_up(tmp_path: Path, file: Path) -> None:
    history.add(run(tmp_path, 1, environment={**ENVIRONMENT, "zbench": {"commit": "abc"}}), file)
    history.add(run(tmp_path, 2, environment={**ENVIRONMENT, "zbench": {"commit": "unavailable: no git"}}), file)
    assert [entry.commit for entry in history.read(file)[0]] == ["abc", None]


def test_a_run_is_added_once_and_again_when_it_was_finished_since(tmp_path: Path, file: Path) -> None:
    history.add(run(tmp_path, 1, GOOD[:-1]), file)
    assert history.add(tmp_path / "n-01", file) == "there already"
    assert len(file.read_text().splitlines()) == 1
    run(tmp_path, 1)
    assert history.add(tmp_path / "n-01", file).startswith("replaces")
    (entry,), _ = history.read(file)
    assert entry.cells["spec"].trials == entry.cells["ar"].trials


def test_a_less_complete_copy_of_a_run_does_not_replace_it(tmp_path: Path, file: Path) -> None:
    whole = run(tmp_path, 1)
    history.add(whole, file)
    before = file.read_bytes()
    fewer = run(tmp_path / "copy", 1, GOOD[:-1])
    said = "not added: what is there already has as many trials or more"
    assert history.add(fewer, file) == said
    other = [*GOOD[:-1], trial("ar", group=9)]
    assert history.add(run(tmp_path / "copy", 1, other), file) == said
    assert file.read_bytes() == before
    failed = [*GOOD[:-1], replace(GOOD[-1], status="error", error="boom", requests=(), steps=(), forwards=())]
    assert history.add(run(tmp_path / "copy", 1, failed), file) == said


def test_runs_come_by_time_whatever_the_order_they_were_added_in(tmp_path: Path, file: Path) -> None:
    for day in (5, 2, 9):
        history.add(run(tmp_path, day), file)
    assert [entry.created[8:10] for entry in history.read(file)[0]] == ["02", "05", "09"]


@pytest.mark.parametrize("kept", [1, 20, 400, -2, -1])
def test_a_line_cut_off_by_a_crash_is_left_out_reported_and_survived(tmp_path: Path, file: Path, kept: int) -> None:
    for day in (1, 2):
        history.add(run(tmp_path, day), file)
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    file.write_bytes(whole[:first] + whole[first:][:kept])
    torn = kept != -1  # only the end of the line is missing then, and nothing of the run
    entries, said = history.read(file)
    assert (len(entries), len(said)) == ((1, 1) if torn else (2, 0))
    assert not torn or "history.jsonl:2: the line is torn" in said[0]
    assert history.add(run(tmp_path, 3), file) == "added"
    entries, said = history.read(file)
    assert [entry.created[8:10] for entry in entries] == (["01", "03"] if torn else ["01", "02", "03"])
    assert len(said) == torn


def test_a_line_that_cannot_be_written_leaves_the_file_as_it_was(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history.add(run(tmp_path, 1), file)
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(history.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        history.add(run(tmp_path, 2), file)
    assert file.read_bytes() == before


def test_a_line_of_another_schema_is_left_out_and_reported(tmp_path: Path, file: Path) -> None:
    history.add(run(tmp_path, 1), file)
    file.write_text(file.read_text().replace('"schema_version":1', '"schema_version":2'))
    entries, said = history.read(file)
    assert entries == ()
    assert "schema 2, this zbench reads 1" in said[0]


@pytest.mark.parametrize("torn", [b'{"torn', b"\x00\x00\x00", b"zbench: 2026", b"\xff\xfe"])
def test_a_torn_last_line_is_left_out_whatever_it_is(tmp_path: Path, file: Path, torn: bytes) -> None:
    history.add(run(tmp_path, 1), file)
    with file.open("ab") as opened:
        opened.write(torn)
    for days in (["01"], ["01", "02"]):
        entries, said = history.read(file)
        assert [entry.created[8:10] for entry in entries] == days
        assert [line for line in said if "history.jsonl:2: the line is torn (a crash?), and was left out" in line]
        history.add(run(tmp_path, 2), file)


@pytest.mark.parametrize("content", ["{}\n", "hello\n", '{\n "kind": "zbench baseline"\n}\n', "[1, 2]\n", "\x00\xff\n"])
def test_a_file_that_is_no_history_is_refused_and_never_written_to(tmp_path: Path, file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(UserError, match="not a line of a history"):
        history.add(run(tmp_path, 1), file)
    assert file.read_text() == content


@pytest.mark.parametrize("wrong", ["NaN", "Infinity", '"fast"', "null"])
def test_a_damaged_number_is_refused_with_its_place(tmp_path: Path, file: Path, wrong: str) -> None:
    history.add(run(tmp_path, 1), file)
    file.write_text(re.sub(r'"value":[^,]+', f'"value":{wrong}', file.read_text(), count=1))
    with pytest.raises(UserError, match=r"history.jsonl:1: cells\..*\.value"):
        history.read(file)


def test_a_run_without_a_successful_trial_is_refused(tmp_path: Path, file: Path) -> None:
    failed = trial("spec", status="error", error="boom", requests=(), steps=(), forwards=())
    with pytest.raises(UserError, match="nothing to keep"):
        history.add(run(tmp_path, 1, [failed]), file)
    assert not file.exists()


def test_processes_that_add_at_once_lose_nothing(tmp_path: Path, file: Path) -> None:
    """Each process adds its own runs, and one that both have."""
    code = (
        "import sys; from pathlib import Path; from zbench import history\n"
        "for run in sys.argv[2:]: history.add(Path(run), Path(sys.argv[1]))"
    )
    days = [[1, 2, 3, 7], [4, 5, 6, 7]]
    folders = [[str(run(tmp_path, day)) for day in mine] for mine in days]
    processes = [subprocess.Popen([sys.executable, "-c", code, str(file), *mine]) for mine in folders]
    assert [process.wait(120) for process in processes] == [0, 0]
    entries, said = history.read(file)
    assert [int(entry.created[8:10]) for entry in entries] == [1, 2, 3, 4, 5, 6, 7]
    assert (len(file.read_text().splitlines()), said) == (7, ())


# --- Lines and changes ---


def test_runs_that_may_be_compared_are_one_line(tmp_path: Path, file: Path) -> None:
    for day in (1, 2, 3):
        history.add(run(tmp_path, day, environment={**ENVIRONMENT, "zbench": {"commit": str(day)}}), file)
    (line,) = of(file, "decode_tps").lines
    assert (len(line.points), line.changes) == (3, ())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scenario_hash": "t"}, "another scenario"),
        ({"prompts_hash": "q"}, "another prompts"),
        ({"models": {"m": {"hash": "v"}}}, "other weights of model m"),
        (
            {"environment": {**ENVIRONMENT, "device": {"backend": "cpu", "name": "Other"}}},
            "device.name Other, not Invented CPU",
        ),
        ({"environment": {**ENVIRONMENT, "torch": {"threads": 1}}}, "torch.threads 1, not 2"),
        ({"trials": GOOD[:-1]}, "other trials succeeded"),
    ],
)
def test_runs_that_may_not_be_compared_are_never_joined(
    tmp_path: Path, file: Path, changes: dict[str, Any], said: str
) -> None:
    history.add(run(tmp_path, 1), file)
    history.add(run(tmp_path, 2, **changes), file)
    history.add(run(tmp_path, 3), file)
    apart, usual = of(file, "decode_tps").lines
    assert [entry.created[8:10] for entry, _ in usual.points] == ["01", "03"]
    assert (usual.differs, apart.differs) == ((), (said,))


def test_a_metric_that_was_defined_otherwise_is_another_line_and_the_others_are_not(tmp_path: Path, file: Path) -> None:
    for day in (1, 2):
        history.add(run(tmp_path, day), file)
    first, second = file.read_text().splitlines()
    entry = json.loads(second)
    entry["metrics"]["decode_tps"]["definition"] = "another"
    file.write_text(first + "\n" + json.dumps(entry, separators=(",", ":")) + "\n")
    assert [line.differs for line in of(file, "decode_tps").lines] == [(), ("defined otherwise",)]
    assert len(of(file, "ttft").lines) == 1


def test_a_count_changes_where_it_moves_and_says_by_how_much(tmp_path: Path, file: Path) -> None:
    for day in (1, 2, 3, 4):
        history.add(run(tmp_path, day, LESS if day == 3 else GOOD), file)
    (line,) = of(file, "acceptance_length").lines
    first, second = line.changes
    values = [number.value for _, number in line.points]
    assert ([change.index for change in line.changes], first.p) == ([2, 3], None)
    assert (first.before, first.after) == (values[0], values[2])
    assert first.relative == pytest.approx(values[2] / values[0] - 1)
    assert (second.after, line.level) == (values[3], values[3])


def test_memory_moves_within_its_tolerance_without_a_change(tmp_path: Path, file: Path) -> None:
    for day, peak in enumerate((1000, 1049, 1000, 1060), start=1):
        history.add(run(tmp_path, day, [replace(t, peak_bytes=peak) for t in GOOD]), file)
    assert [change.index for change in of(file, "peak_bytes").lines[0].changes] == [3]


def test_memory_that_grows_a_little_every_time_is_seen(tmp_path: Path, file: Path) -> None:
    for day, peak in enumerate((1000, 1040, 1080, 1120, 1160), start=1):
        history.add(run(tmp_path, day, [replace(t, peak_bytes=peak) for t in GOOD]), file)
    assert [change.index for change in of(file, "peak_bytes").lines[0].changes] == [2, 4]


def slower_from(root: Path, file: Path, step: int, runs: int = 14) -> None:
    """One run a day; from `step` on its clock is slower by a fifth."""
    rng = np.random.default_rng(step)
    for day in range(1, runs + 1):
        pace = np.exp(rng.normal(0, 0.02)) * (1.2 if day > step else 1)
        trials = slower(GOOD, [pace * np.exp(rng.normal(0, 0.01)) for _ in GOOD])
        history.add(run(root, day, trials), file, commit=f"{day:040x}")


def test_a_time_changes_where_it_became_slower(tmp_path: Path, file: Path) -> None:
    slower_from(tmp_path, file, 7)
    for metric, by in (("ttft", 0.2), ("decode_tps", 1 / 1.2 - 1)):
        (change,) = of(file, metric).lines[0].changes
        assert change.index == 7
        assert change.p is not None and change.p <= 0.01
        assert change.relative == pytest.approx(by, abs=0.04)
    assert of(file, "acceptance_length").lines[0].changes == ()


def test_counts_that_do_not_repeat_are_judged_like_times(tmp_path: Path, file: Path) -> None:
    """A greedy decoder whose repeats differ: each move of a count may be chance."""
    unstable = [*GOOD, replace(verifying([1, 1], group=5), repeat=1)]
    for day in (1, 2, 3):
        history.add(run(tmp_path, day, unstable if day == 2 else [*GOOD, replace(GOOD[11], repeat=1)]), file)
    assert {entry.cells["spec"].stable for entry in history.read(file)[0]} == {True, False}
    (line,) = of(file, "acceptance_length").lines
    assert len({number.value for _, number in line.points}) == 2
    assert line.changes == ()


# --- What people see ---


def test_the_commands_add_show_and_refuse(tmp_path: Path, file: Path) -> None:
    folder = run(tmp_path, 1)
    assert zbench("show", "--file", file).exit_code == 2
    assert "added" in zbench("add", folder, run(tmp_path, 2), "--file", file).stdout
    assert "there already" in zbench("add", folder, "--file", file).stdout
    shown = zbench("show", "decode_tps", "--file", file)
    assert shown.exit_code == 0
    assert "n: 2 runs, 2026-11-01 to 2026-11-02" in shown.stdout
    assert zbench("show", "--file", file).stdout.count("\n") < shown.stdout.count("\n") + 2  # nothing moved
    for wrong, said in (
        (("show", "speed", "--file", file), "no run of this history has speed"),
        (("show", "--cell", "none", "--file", file), "has a cell named like"),
        (("add", tmp_path / "absent", "--file", file), "give the folder"),
        (("add", folder, "--file", file, "--url", "javascript:alert(1)"), "not a web address"),
        (("add", folder, "--file", tmp_path), "Is a directory"),
        (("show", "--file", file, "--html", tmp_path), "cannot write"),
    ):
        refused = zbench(*wrong)
        assert (refused.exit_code, said in refused.stderr) == (2, True), refused.stderr


def test_a_torn_line_is_said_and_the_rest_is_shown(tmp_path: Path, file: Path) -> None:
    history.add(run(tmp_path, 1), file)
    with file.open("a") as opened:
        opened.write('{"kind":"zbench history","sch')
    shown = zbench("show", "--file", file, "--json")
    assert "history.jsonl:2: the line is torn" in shown.stderr
    told = json.loads(shown.stdout)
    assert len(told["warnings"]) == 1
    assert {"unit", "better", "lines"} <= told["series"][0].keys()
    assert {"value", "low", "high", "n", "commit", "created", "definition"} <= told["series"][0]["lines"][0]["points"][
        0
    ].keys()


def test_too_few_runs_are_said_to_tell_nothing(tmp_path: Path, file: Path) -> None:
    slower_from(tmp_path, file, 2, runs=4)
    assert f"too few runs to tell (4 of {2 * SEGMENT})" in zbench("show", "ttft", "--file", file).stdout


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(out: Path) -> _Page:
    parser = _Page()
    parser.feed(out.read_text())
    return parser


def test_the_page_draws_what_moved_marks_the_change_and_links_the_runs(tmp_path: Path, file: Path) -> None:
    slower_from(tmp_path / "my runs", file, 7)
    (tmp_path / "my runs/n-02/report.html").write_text("")
    (tmp_path / "pages").mkdir()
    assert zbench("show", "ttft", "--cell", "spec", "--file", file, "--html", tmp_path / "pages/t.html").exit_code == 0
    seen = page(tmp_path / "pages/t.html")
    assert (len(seen.of("svg")), len(seen.of("circle"))) == (1, 14)
    marks = [line for line in seen.of("line") if "change" in (line["class"] or "")]
    assert [mark["class"] for mark in marks] == ["change worse"]
    x = [float(circle["cx"] or 0) for circle in seen.of("circle")]
    assert x == sorted(x)
    assert x[6] < float(marks[0]["x1"] or 0) < x[7]
    assert {link["href"] for link in seen.of("a")} == {"../my%20runs/n-02/report.html"}
    hover = next(text for text in seen.text if text.startswith("n-02\n"))
    assert "commit 0000000000" in hover and "2026-11-02T08:00:00" in hover
    assert any("got worse" in text for text in seen.text)


def test_what_never_moved_is_listed_and_not_drawn(tmp_path: Path, file: Path) -> None:
    for day in (1, 2):
        history.add(run(tmp_path, day), file)
    assert zbench("show", "--file", file, "--html", tmp_path / "t.html").exit_code == 0
    seen = page(tmp_path / "t.html")
    assert seen.of("svg") == []
    assert any("series have one value in all their runs" in text for text in seen.text)


def test_lines_that_may_not_be_compared_are_not_connected(tmp_path: Path, file: Path) -> None:
    for day in range(1, 5):
        device = {"backend": "cpu", "name": "A" if day % 2 else "B"}
        history.add(
            run(tmp_path, day, slower(GOOD, [1 + day / 10] * 12), environment={**ENVIRONMENT, "device": device}), file
        )
    zbench("show", "ttft", "--cell", "ar", "--file", file, "--html", tmp_path / "t.html")
    seen = page(tmp_path / "t.html")
    circles = [(c["cx"], c["cy"], (c["style"] or "").split(";")[0]) for c in seen.of("circle")]
    paths = [{tuple(point.split(",")) for point in (p["points"] or "").split()} for p in seen.of("polyline")]
    assert sorted(map(len, paths)) == [2, 2]
    for path in paths:
        assert len({style for x, y, style in circles if (f"{float(x or 0):g}", f"{float(y or 0):g}") in path}) == 1
    assert any("device.name B, not A" in text for text in seen.text)


def test_the_page_escapes_what_it_is_given_and_loads_nothing(tmp_path: Path, file: Path) -> None:
    evil = '<script>alert("x")</script>'
    environment = {**ENVIRONMENT, "device": {"backend": "cpu", "name": evil}}
    for day in (1, 2):
        folder = run(tmp_path, day, slower(GOOD, [day] * 12), name=evil, environment=environment)
        history.add(folder, file, note=evil, commit=evil, url="https://example.org/?a=1&b=2")
    zbench("show", "--file", file, "--html", tmp_path / "t.html")
    seen = page(tmp_path / "t.html")
    assert seen.of("script") == []
    assert "default-src 'none'" in (tmp_path / "t.html").read_text()
    assert {link["href"] for link in seen.of("a")} == {"https://example.org/?a=1&b=2"}
    assert not any("src" in attributes for _, attributes in seen.tags)


def test_the_same_history_makes_the_same_page(tmp_path: Path, file: Path) -> None:
    slower_from(tmp_path, file, 6, runs=12)
    for name in ("a.html", "b.html"):
        zbench("show", "--file", file, "--html", tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_only_the_newest_runs_are_shown_when_asked(tmp_path: Path, file: Path) -> None:
    for day in (1, 2, 3):
        history.add(run(tmp_path, day), file)
    assert "n: 2 runs, 2026-11-02 to 2026-11-03" in zbench("show", "ttft", "--last", 2, "--file", file).stdout


def test_the_ends_of_an_axis_read_differently_where_they_differ() -> None:
    assert trend._edges(1.0004, 0.9996, "tokens") == ("1.000 tokens", "0.9996 tokens")
    assert trend._edges(2.0, 1.0, "tokens") == ("2.00 tokens", "1.00 tokens")
    assert trend._edges(1.0, 1.0, "tokens") == ("1.00 tokens", "")


@pytest.mark.parametrize(("other", "moves"), [(1 - 1e-14, False), (0.9996, True)])
def test_what_differs_by_rounding_only_has_not_moved(other: float, moves: bool) -> None:
    points: Any = tuple(
        (SimpleNamespace(created=f"2026-11-0{day}"), Number(value=value, low=None, high=None, n=1))
        for day, value in enumerate((1.0, other), start=1)
    )
    line = Line(points)
    assert trend._moves(Series("s", "c", "tokens_per_forward", "", "tokens", "higher", "", (line,))) == moves
