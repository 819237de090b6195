"""The files of a report: complete, self-contained, the same every time, and honest about what is missing."""

import csv
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report.synthetic import CATEGORIES, DEFAULT_ENGINES, ENGINES, SPECS, write_run
from zbench import metrics
from zbench.errors import UserError
from zbench.records import read_trials
from zbench.report import POINTS_DRAWN, headline, render
from zbench.report.html import _category_table, _engine_table
from zbench.results import Results

FIGURES = (
    "roofline", "steps", "phases", "speedup", "split", "forwards", "acceptance", "conditional", "histogram",
)  # fmt: skip


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    write_run(
        folder, engines=tuple(ENGINES), specs=SPECS, divergent=("transformers generate",), name="a <b> & c", prompts=6,
        repeats=1,
    )  # fmt: skip
    return render(folder).parent


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_rendering_twice_gives_identical_bytes(full: Path) -> None:
    before = digests(full)
    render(full)
    assert digests(full) == before


def test_every_figure_comes_as_svg_and_png_for_light_and_dark_paper(full: Path) -> None:
    names = {path.name for path in (full / "figures").iterdir()}
    for figure in FIGURES:
        assert {f"{figure}{mode}.{kind}" for mode in ("", "-dark") for kind in ("svg", "png")} <= names
    assert len(names) == 4 * len(FIGURES)


class _Addresses(HTMLParser):
    """Collects everything a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in {"src", "srcset", "href", "data", "action"}]


def test_the_page_loads_nothing_from_outside_and_stays_small(full: Path) -> None:
    html = (full / "report.html").read_text()
    page = _Addresses()
    page.feed(html)
    assert len(page.found) == 2 * len(FIGURES) + 1
    assert all(address.startswith("data:") for address in page.found)
    assert "script" not in page.tags
    assert "@import" not in html and "url(" not in html
    assert len(html) < 3_200_000


def test_names_and_errors_are_escaped(full: Path, tmp_path: Path) -> None:
    html = (full / "report.html").read_text()
    assert "a &lt;b&gt; &amp; c" in html
    failed = render(
        write_run(tmp_path, failing=("transformers generate",), description="<script>x</script>")
    ).read_text()
    assert "out of &lt;memory&gt;" in failed
    assert "<script>" not in failed and "<memory>" not in failed


def test_every_figure_has_a_text_that_states_its_finding(full: Path) -> None:
    alts = re.findall(r'alt="([^"]+)"', (full / "report.html").read_text())
    assert len(alts) == len(FIGURES)
    assert all(re.search(r"\d", alt) for alt in alts)


def test_csv_and_json_hold_the_same_metrics(full: Path) -> None:
    rows = list(csv.DictReader((full / "metrics.csv").open()))
    content = json.loads((full / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert content["definitions_version"] == metrics.DEFINITIONS_VERSION
    assert content["definitions_hash"] == metrics.definitions_hash()
    assert [d["name"] for d in content["definitions"]] == list(metrics.METRICS)
    assert len(rows) == len(content["metrics"])
    for row, entry in zip(rows, content["metrics"], strict=True):
        assert {name: "" if value is None else str(value) for name, value in entry.items()} == row
    assert {"cell", "metric", "unit", "formula", "better", "estimator", "n", "value", "low", "high", "note"} <= set(
        rows[0]
    )


def test_what_is_not_known_is_empty_with_a_reason_and_never_zero(full: Path) -> None:
    for row in json.loads((full / "metrics.json").read_text())["metrics"]:
        if row["status"] == "unavailable":
            assert row["value"] is row["low"] is row["high"] is None
            assert row["note"].startswith("unavailable: ")
        else:
            assert row["value"] is not None


def test_the_page_holds_the_table_the_environment_and_the_way_to_reproduce(full: Path) -> None:
    html = (full / "report.html").read_text()
    for label in ENGINES:
        assert f'<th scope="row">{label}<' in html
    for words in ("zbench run scenarios/synthetic.yaml", "5cenar10", "avx512_bf16", "unavailable: not installed"):
        assert words in html
    for definition in metrics.METRICS.values():
        assert f">{definition.name}" in html


SYNTHETIC = "eagle3 tree of 16"  # the one engine of the full run whose acceptance is drawn


def test_every_row_picture_and_sentence_of_a_synthetic_engines_speed_or_acceptance_says_so(full: Path) -> None:
    html, content = (full / "report.html").read_text(), json.loads((full / "metrics.json").read_text())
    mine = [row for row in content["metrics"] if row["cell"] == SYNTHETIC.replace(" ", "-")]
    assert mine and all(row["caveat"].startswith("synthetic acceptance") for row in mine)
    heads = re.findall(rf'<th scope="row">{SYNTHETIC}(?!: (?:verify|draft|prefill))[^<]*(.*?)</th>', html)
    assert len(heads) == 2 + 4  # engines, speculation, and four categories
    said = r"(<small>[a-z+]+, \d+ rows?</small>)?<small>synthetic acceptance, random drafter</small>"
    assert all(re.fullmatch(said, head) for head in heads)
    alts = {alt.partition(":")[0]: alt for alt in re.findall(r'alt="([^"]+)"', html)}
    for title, alt in alts.items():
        if title not in {"Where each forward stands", "How long a decode step takes"}:
            assert f"{SYNTHETIC} with synthetic acceptance" in alt, title
    told = " ".join(sentence for answer in content["answers"] for sentence in answer["sentences"])
    for place in (told, re.sub(r"<[^>]*>", " ", html.partition("Speculation</h3>")[2].partition("<table")[0])):
        assert SYNTHETIC in place
        assert place.count(SYNTHETIC) == place.count(f"{SYNTHETIC} with synthetic acceptance")


def test_drafting_engines_have_a_section_of_their_own_and_others_have_none(full: Path, tmp_path: Path) -> None:
    assert "Speculation</h3>" in (full / "report.html").read_text()
    assert "Speculation</h3>" not in render(write_run(tmp_path, prompts=2, repeats=1, tokens=8)).read_text()


def test_a_category_without_drafts_keeps_its_row_and_its_speedup(tmp_path: Path) -> None:
    write_run(tmp_path, engines=("autoregressive", "transformers generate", "eagle3 chain of 4"), repeats=1, tokens=12)
    trials = read_trials(tmp_path)[0]
    for at, t in enumerate(trials):
        if t.cell == "eagle3-chain-of-4" and t.requests[0].category == "math":
            trials[at] = replace(t, steps=tuple(replace(step, drafted=(), accepted=()) for step in t.steps))
    (tmp_path / "trials.jsonl").write_text("".join(t.to_json() + "\n" for t in trials))
    results = Results.of(metrics.load_run(tmp_path))
    table = _category_table(results, results.points[0])
    assert table is not None
    lines = {line.name: [entry.text for entry in line.entries] for line in table.rows}
    assert list(lines) == [f"eagle3 chain of 4: {category}" for category in sorted(CATEGORIES)]
    assert [name for name, (accepted, _) in lines.items() if accepted == "n/a"] == ["eagle3 chain of 4: math"]
    assert all(speedup.endswith("×") for _, speedup in lines.values())


def test_a_share_of_a_roof_stands_beside_the_forward_that_it_is_of(tmp_path: Path) -> None:
    """The drafter takes 4 ms of a step and the target's forward 10 ms, until the drafter is made slower."""
    write_run(tmp_path, engines=("autoregressive", "transformers generate", "eagle3 chain of 4"), repeats=1, tokens=12)
    slower = [
        replace(
            t, forwards=tuple(replace(f, seconds=(9 if f.model == "drafter" else 1) * f.seconds) for f in t.forwards)
        )
        for t in read_trials(tmp_path)[0]
    ]
    found = []
    for trials in (None, slower):
        if trials:
            (tmp_path / "trials.jsonl").write_text("".join(t.to_json() + "\n" for t in trials))
        results = Results.of(metrics.load_run(tmp_path))
        table = _engine_table(results, results.points[0])
        assert {"Of bandwidth roof", "Of compute roof", "Bound by"} < set(table.headings)
        found.append([line.kind for line in table.rows])
    assert found == [["decode, 1 row", "", "verify, 5 rows"], ["decode, 1 row", "", "draft, 1 row"]]


def test_peers_have_a_table_on_the_page_and_as_markdown(full: Path, tmp_path: Path) -> None:
    assert "Against peers</h3>" in (full / "report.html").read_text()
    lines = (full / "peers.md").read_text().splitlines()
    head = next(line for line in lines if line.startswith("| Engine"))
    assert head.split(" | ")[1:4] == ["Version", "Tokens/s", "autoregressive is so many times as fast"]
    peer = next(line for line in lines if line.startswith("| transformers generate")).split(" | ")
    assert 2.3 < float(peer[3].partition("×")[0]) < 2.9, "it was made 2.6 times as slow"
    assert peer[1] == "not recorded" and peer[6].partition(" ")[0] == "25", "the token in the middle of 48 was swapped"
    assert any(line.startswith("- Processor: ") for line in lines)
    assert {line.count("|") for line in lines if line.startswith("|")} == {head.count("|")}
    alone = write_run(tmp_path, engines=("autoregressive", "chain drafter"), prompts=2, repeats=1, tokens=8)
    assert "Against peers" not in render(alone).read_text() and not (alone / "peers.md").exists()


def test_a_run_in_which_everything_failed_still_makes_a_report(tmp_path: Path) -> None:
    html = render(write_run(tmp_path, failing=DEFAULT_ENGINES)).read_text()
    assert "Nothing was measured: all 48 trials failed." in html
    assert "<img" not in html


def test_a_run_without_any_trial_still_makes_a_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "trials.jsonl").unlink()
    assert "Nothing was measured: no trial has ended yet." in render(folder).read_text()


def test_a_run_that_was_interrupted_still_makes_a_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path, engines=("autoregressive", "eagle3 chain of 4"), prompts=5, repeats=1, tokens=12)
    trials = (folder / "trials.jsonl").read_text().splitlines(keepends=True)
    (folder / "trials.jsonl").write_text("".join(line for i, line in enumerate(trials) if i not in (4, 6, 8)))
    html = render(folder).read_text()
    assert "2 prompts for autoregressive: too few for an interval" in html


@pytest.mark.slow
def test_a_large_matrix_has_tables_for_all_points_and_figures_for_the_first(tmp_path: Path) -> None:
    points = [{"context": 100 * i} for i in range(POINTS_DRAWN + 2)]
    html = render(write_run(tmp_path, points=points, prompts=5, repeats=1, tokens=12)).read_text()
    for point in points:
        assert f"Results at context {point['context']}" in html
    over_all = 3  # the answer, the context sweep, predictions
    assert html.count("<img") == over_all + 4 * POINTS_DRAWN
    assert "2 further points have tables only" in html
    assert len(html) < 3_200_000


def test_the_headline_is_the_answer_and_the_warnings_of_the_page(full: Path) -> None:
    lines, content = headline(full), json.loads((full / "metrics.json").read_text())
    assert lines[0].startswith("autoregressive decodes ")
    assert [line for line in lines if line.startswith("warning: ")] == [f"warning: {w}" for w in content["warnings"]]
    assert any("same tokens as autoregressive on 50%" in line for line in lines)


def test_a_headline_before_the_report_gives_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `zbench report"):
        headline(write_run(tmp_path))


def test_a_folder_that_is_not_a_run_gives_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the folder that `zbench run` wrote"):
        render(tmp_path)


def test_a_folder_that_cannot_be_written_gives_one_clear_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path, failing=DEFAULT_ENGINES)
    (folder / "report.html").mkdir()
    (folder / "report.html" / "occupied").touch()
    with pytest.raises(UserError, match=r"cannot write .*report\.html"):
        render(folder)


@pytest.mark.parametrize(
    ("samples", "row"),
    [
        ((30e9, 33e9, 34e9), ("33.0 GB/s", "30.0 GB/s to 34.0 GB/s, samples: 3; shares and floors")),
        ((30e9, "no memory"), ("30.0 GB/s", "samples: 1; shares and floors on this page are of it; 1 more could not")),
        (("no memory",), ("unavailable", "no memory")),
    ],
)
def test_the_read_roof_of_the_run_stands_above_that_measured_before(
    tmp_path: Path, samples: Sequence[float | str], row: tuple[str, str]
) -> None:
    page = render(write_run(tmp_path, engines=("autoregressive",), samples=samples)).read_text()
    table = page.partition("<caption>Roofs, measured on 2025-01-01</caption>")[2].partition("</table>")[0]
    first, second = table.split("</tr>")[:2]
    assert "read, beside this run" in first and all(part in first for part in row)
    assert "read, measured" in second and "38.0 GB/s" in second
    read = json.loads((tmp_path / "metrics.json").read_text())["run"]["read_roof"]
    assert read["value"] == (38e9 if samples == ("no memory",) else float(row[0].split()[0]) * 1e9)


def test_the_checked_in_sample_means_what_numbers_mean_today() -> None:
    sample = Path(__file__).parents[2] / "reports" / "sample"
    assert json.loads((sample / "metrics.json").read_text())["definitions_hash"] == metrics.definitions_hash()
    assert metrics.load_run(sample).cells
