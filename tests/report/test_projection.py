"""The page of a projection: everything on it says predicted, everything in it is text, and a browser can show it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.report.test_browser import TEXT_BOXES, browser, show  # noqa: F401
from tests.report.test_figures import assert_readable
from tests.test_projection import RATES, load
from zbench import projection, report
from zbench.cache import atomic_write
from zbench.errors import UserError
from zbench.hardware.peaks import on_paper
from zbench.records import PROJECTION
from zbench.report import figures
from zbench.report import projection as pages

HOSTILE = "<script>alert(1)</script> & <b>"
TEXT = f"""
name: tiny
description: "{HOSTILE}"
model:
  config: {{family: zaya, layers: 40, width: 2048, ffn: 2048, heads: 8, kv_heads: 2, head_dim: 128, vocab: 262272,
    max_positions: 131072, experts: 16}}
engines:
  - autoregressive
  - {{name: eagle3, label: "{HOSTILE} chain", drafter: {{random: true}}, depth: 4, synthetic: {{length: 2.6}}}}
  - {{name: eagle3, label: tree, drafter: {{random: true}}, depth: 4, top_k: 4, tokens: 16}}
  - {{name: dflash, drafter: {{random: true}}, block: 16, synthetic: {{length: 6}}}}
prompts: {{set: quickstart, limit: 3}}
context: 4096
matrix: {{batch: [1, 64]}}
"""


def write(folder: Path, *overrides: str, synthetic: Any = RATES, device: str = "MI300X") -> Path:
    """A projection's folder, not rendered."""
    content = yaml.safe_load(TEXT)
    tidar = {"name": "diffusion", "label": "tidar", "block_size": 16, "proposals": 3, "synthetic": synthetic}
    content["engines"].append(tidar)
    wanted = load(folder, *overrides, text=yaml.safe_dump(content))
    found = projection.project(wanted, on_paper(device))
    atomic_write(folder / PROJECTION, json.dumps(found.to_dict()))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write(tmp_path_factory.mktemp("projection"))
    report.render(made)
    return made


def test_every_table_and_figure_says_predicted(folder: Path) -> None:
    page = (folder / pages.PAGE).read_text()
    captions = re.findall(r"<table class=\"results\">\s*<caption>(.*?)</caption>", page)
    assert len(captions) == 1 + 2 * 3
    assert all("redicted" in caption for caption in captions)
    titles = re.findall(r"<figure>\s*<h3>(.*?)</h3>", page)
    assert len(titles) == 1 + 2 * 3
    assert all("(predicted)" in title for title in titles)
    assert "nothing was measured" in page
    assert "Acceptance is synthetic" in page


def test_what_the_scenario_says_is_text_not_markup(folder: Path) -> None:
    page = (folder / pages.PAGE).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt; chain" in page


def test_an_engine_without_acceptance_has_a_cost_and_a_reason(folder: Path) -> None:
    page = (folder / pages.PAGE).read_text()
    row = re.search(r'<th scope="row">tree.*?</tr>', page, re.DOTALL)
    assert row is not None
    assert "n/a" in row[0] and "ms" in row[0]
    assert "<li>no synthetic acceptance given</li>" in page


def test_the_page_needs_nothing_else_and_is_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    page = (folder / pages.PAGE).read_bytes()
    assert not re.findall(rb'(?:src|href|srcset)="(?!data:)', page)
    atomic_write(tmp_path / PROJECTION, (folder / PROJECTION).read_bytes())
    assert report.render(tmp_path).read_bytes() == page
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert files == {path.name for path in (folder / "figures").iterdir()}
    for kind in ("overview", "rows-batch_1", "steps-batch_64", "blocks-tidar__batch_64"):
        assert {f"{kind}.svg", f"{kind}-dark.png"} <= files


@pytest.mark.parametrize(("most", "said"), [(0, "Not even one proposal stays"), (3, "Up to 3 proposals stay")])
def test_the_blocks_that_fit_are_said(folder: Path, tmp_path: Path, most: int, said: str) -> None:
    content = json.loads((folder / PROJECTION).read_text())
    for point in content["points"]:
        point["blocks"][0]["predicted_most_within_slack"] = most
    atomic_write(tmp_path / PROJECTION, json.dumps(content))
    page = report.render(tmp_path).read_text()
    assert page.count(f"{said} within 1.1 autoregressive steps (predicted).") == 2 * 2  # the text, and of the figure


def test_a_mean_length_leaves_the_speeds_by_proposals_out(tmp_path: Path) -> None:
    page = report.render(write(tmp_path, synthetic={"length": 4.5})).read_text()
    assert "<li>tokens/s by proposals need a synthetic rate, rates or a histogram</li>" in page
    assert "Most tokens/s are predicted" not in page


def test_measured_roofs_are_called_so(tmp_path: Path) -> None:
    made = write(tmp_path)
    content = json.loads((made / PROJECTION).read_text())
    assert any("predicted from the spec sheet of MI300X and" in line for line in pages.headline(made))
    content["hardware"] |= {"kind": "measured", "device": "Invented CPU"}
    (made / PROJECTION).write_text(json.dumps(content))
    assert any("predicted from the measured roofs of Invented CPU and" in line for line in pages.headline(made))


def test_a_model_too_large_is_warned_of(tmp_path: Path) -> None:
    assert not [line for line in pages.headline(write(tmp_path)) if "more than one" in line]
    lines = pages.headline(write(tmp_path, "matrix.batch=[1, 4096]"))
    # 17.7 GB of weights and 40 KiB for each of 4096 x (4096 + 64) tokens, and the convolutions' state.
    assert [line for line in lines if "batch 4096 needs 716 GB, more than one MI300X has" in line]


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 99}'])
def test_a_damaged_projection_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / PROJECTION).write_text(text)
    with pytest.raises(UserError, match="project"):
        report.render(tmp_path)


def test_no_text_in_a_figure_lies_upon_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    painted = figures.painted

    def spy(*arguments: Any) -> Any:
        drawn.append(painted(*arguments))  # one of its own: saving leaves texts measured for the last file
        return painted(*arguments)

    monkeypatch.setattr(figures, "painted", spy)
    content = json.loads((folder / PROJECTION).read_text())
    pages._overview(content)
    for point in content["points"]:
        pages._figures(content, point)
    assert len(drawn) == 2 * (1 + 2 * 3)
    for figure in drawn:
        assert_readable(figure)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")])
def test_a_browser_shows_it_without_overlap_or_complaint(folder: Path, browser: Any, width: int, scheme: str) -> None:  # noqa: F811
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    show(browser, folder / pages.PAGE)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    images = browser.execute_script("return [...document.images].map(i => [i.naturalWidth, i.currentSrc === i.src])")
    assert len(images) == 7
    assert all(natural > 0 and light == (scheme == "light") for natural, light in images)
    boxes = sorted(browser.execute_script(TEXT_BOXES), key=lambda box: box[2])
    assert len(boxes) > 200
    for index, (text, left, top, right, bottom) in enumerate(boxes):
        for other, l2, t2, r2, b2 in boxes[index + 1 :]:
            if t2 >= bottom - 1:
                break
            overlap = min(right, r2) - max(left, l2), min(bottom, b2) - max(top, t2)
            assert overlap[0] <= 1 or overlap[1] <= 5, (text, other)
