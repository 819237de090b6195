"""Projections against numbers worked out by hand, and what must hold whatever the numbers are."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zbench import checks, projection, scenario
from zbench.errors import UserError
from zbench.hardware import device as devices
from zbench.hardware import peaks, roofs, specs
from zbench.hardware.device import Device
from zbench.hardware.peaks import Peaks, on_paper
from zbench.models.config import ModelConfig
from zbench.models.families import AnyConfig
from zbench.models.zaya_config import ZayaConfig
from zbench.projection import Where
from zbench.records import PROJECTION_VERSION, CellRecord

TINY = ModelConfig("llama", layers=1, width=8, ffn=16, heads=2, kv_heads=1, head_dim=4, vocab=32, max_positions=64)
DENSE = ModelConfig(
    "qwen3", layers=36, width=4096, ffn=12288, heads=32, kv_heads=8, head_dim=128, vocab=151936, max_positions=40960,
    tied=False, qk_norm=True,
)  # fmt: skip
ZAYA = ZayaConfig.from_hf({"model_type": "zaya"})  # the defaults are ZAYA1-8B
SCENARIOS = Path(__file__).parents[1] / "scenarios"
SLOW = Peaks("toy", "spec sheet", 1e6, {"bfloat16": 1e9}, {})
TEXT = """
name: tiny
model:
  config:
    {family: llama, layers: 4, width: 8, ffn: 16, heads: 2, kv_heads: 1, head_dim: 4, vocab: 32, max_positions: 999}
engines:
  - autoregressive
  - {name: eagle3, drafter: {random: true}, depth: 2}
  - {name: dflash, drafter: {random: true, layers: 1}, block: 4, synthetic: {length: 2.5}}
prompts: {set: quickstart, limit: 3}
context: 10
"""


def load(folder: Path, *overrides: str, text: str = TEXT) -> scenario.Scenario:
    path = folder / "tiny.yaml"
    path.write_text(text)
    return scenario.load(path, overrides)


def where(target: AnyConfig, batch: int = 1, context: int = 10, peaks: Peaks = SLOW) -> Where:
    return Where(target, [context] * batch, "bfloat16", peaks)


def cell(engine: str = "diffusion", **options: Any) -> CellRecord:
    return CellRecord(
        engine, engine, engine, options, {}, "m", "bfloat16", "auto", 1, 10, 1, {}, False,
    )  # fmt: skip


def diffusion(proposals: int | str, block: int = 16, synthetic: Any = None, **more: Any) -> CellRecord:
    options = {"block_size": block, "proposals": proposals, "synthetic": synthetic, **more}
    return cell("diffusion", **scenario.ENGINES["diffusion"](name="diffusion", **options).options)


# --- By hand ---


def test_an_autoregressive_step_is_its_bytes_over_the_bandwidth() -> None:
    # Elements: projections 16 x 8 + 8 x 8 + 3 x 8 x 16 = 576, norms 16, head (32 + 1) x 8 = 264, two embedding rows 16;
    # bfloat16. Cache: 2 sequences x 10 tokens x 8 x 2 bytes. Written: 2 x 8 x 2 bytes and 2 x 32 logits of 4 bytes.
    moved = 2 * (576 + 16 + 264 + 16) + 320 + 32 + 256
    step = projection.engine_step(cell("autoregressive"), where(TINY, batch=2), 1.0)
    assert step.predicted_step_seconds == pytest.approx(moved / 1e6)
    assert step.forwards[0].predicted_bound == "memory"
    # 2 rows x 2 x 576, scores and values 4 x 8 x (2 x 10 + 2), head 2 x 2 x 8 x 32.
    assert step.forwards[0].predicted_compute_seconds == pytest.approx((2304 + 704 + 1024) / 1e9)
    assert step.predicted_throughput == pytest.approx(2 / step.predicted_step_seconds)


def test_a_slow_processor_makes_the_same_step_compute_bound() -> None:
    step = projection.engine_step(
        cell("autoregressive"), where(TINY, batch=2, peaks=replace(SLOW, flops={"bfloat16": 1e6})), 1.0
    )
    assert step.predicted_step_seconds == pytest.approx(4032 / 1e6)
    assert step.forwards[0].predicted_bound == "compute"


def test_each_fraction_stretches_its_own_side_of_the_roof() -> None:
    plain, slower = where(TINY), where(TINY, peaks=replace(SLOW, memory_fraction=0.5, compute_fraction=0.25))
    one, two = (projection.engine_step(cell("autoregressive"), at, 1.0).forwards[0] for at in (plain, slower))
    assert two.predicted_memory_seconds == pytest.approx(2 * one.predicted_memory_seconds)
    assert two.predicted_compute_seconds == pytest.approx(4 * one.predicted_compute_seconds)


def test_a_step_is_the_sum_of_its_forwards_and_breaks_even_at_its_ratio() -> None:
    chosen = cell("eagle3", drafter={"random": True}, depth=3, top_k=1, tokens=None, synthetic={"length": 2.5})
    step = projection.engine_step(chosen, where(DENSE, context=1000), 2.0)
    assert step.predicted_step_seconds == pytest.approx(sum(f.predicted_seconds for f in step.forwards))
    assert [forward.role for forward in step.forwards] == ["draft"] * 3 + ["verify"]
    assert step.predicted_ratio == step.predicted_step_seconds / 2.0
    assert step.predicted_tokens_per_second == pytest.approx(2.5 / step.predicted_step_seconds)
    assert step.predicted_speedup == pytest.approx(2.5 / step.predicted_ratio)
    assert step.acceptance == "synthetic (length 2.5)"


def test_without_acceptance_there_is_a_cost_but_no_speed() -> None:
    chosen = cell("dflash", drafter={"random": True}, block=8, synthetic=None)
    step = projection.engine_step(chosen, where(DENSE), 1.0)
    assert step.predicted_ratio is not None and step.predicted_ratio > 0
    assert (step.predicted_tokens_per_second, step.predicted_throughput, step.predicted_speedup) == (None,) * 3
    assert step.unavailable == "unavailable: no synthetic acceptance given"


def test_an_engine_whose_setting_cannot_be_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    found = projection.project(load(tmp_path, "context=20"), on_paper("MI300X"))
    refused = projection.project(
        load(tmp_path, text=TEXT.replace("depth: 2}", "depth: 2, tokens: 9}")), on_paper("MI300X")
    )
    [point] = refused.points
    assert point.engines[1].unavailable == "unavailable: eagle3: depth 2 with top_k 1 drafts 2 to 2 tokens, not 9"
    assert point.engines[1].predicted_step_seconds is None
    assert point.engines[2].predicted_speedup is not None
    assert found.points[0].engines[1].unavailable == projection.NO_ACCEPTANCE


@pytest.mark.parametrize(("device", "rows"), [("MI300X", 1307.4 / 5.3 / 4), ("MI355X", 2500 / 8 / 4)])
def test_attention_alone_leaves_memory_at_the_ridge_over_the_queries_of_a_key(
    tmp_path: Path, device: str, rows: float
) -> None:
    # 4 query heads share a key head: 4 x 2 x 2 d FLOPs for each 4 d bytes of a cached token, 4 FLOP per byte and row.
    wanted = load(tmp_path, text=TEXT.replace("heads: 2, kv_heads: 1", "heads: 4, kv_heads: 1"))
    [point] = projection.project(wanted, on_paper(device)).points
    assert point.predicted_attention_ridge_rows == pytest.approx(rows)


@pytest.mark.parametrize(("tensor", "rows"), [(1, 1307.4 / 5.3 / 4), (2, 1307.4 / 5.3 / 4), (4, 1307.4 / 5.3 / 2)])
def test_ranks_that_outnumber_key_heads_leave_memory_at_more_rows(tmp_path: Path, tensor: int, rows: float) -> None:
    """8 query heads share 2 key heads: of four ranks each has a whole key head, and 2 queries for it."""
    wanted = load(
        tmp_path, f"parallel.tensor={tensor}", text=TEXT.replace("heads: 2, kv_heads: 1", "heads: 8, kv_heads: 2")
    )
    [point] = projection.project(wanted, on_paper("MI300X")).points
    assert point.predicted_attention_ridge_rows == pytest.approx(rows)


def test_replicas_decode_as_many_times_as_much(tmp_path: Path) -> None:
    one, three = (
        projection.project(load(tmp_path, f"parallel.data={n}", "matrix.batch=[4]"), on_paper("MI300X")) for n in (1, 3)
    )
    for alone, together in zip(one.points[0].engines, three.points[0].engines, strict=True):
        assert together.predicted_step_seconds == alone.predicted_step_seconds
        assert together.predicted_tokens_per_second == alone.predicted_tokens_per_second
        if alone.predicted_throughput is not None:
            assert together.predicted_throughput == pytest.approx(3 * alone.predicted_throughput)
    assert one.points[0].engines[0].predicted_throughput


def test_the_memory_of_a_cache_is_whole_though_its_layers_see_a_window(tmp_path: Path) -> None:
    text = TEXT.replace("{family: llama,", "{family: mistral, windows: WINDOWS,").replace("context: 10", "context: 900")
    sizes = [
        projection.project(load(tmp_path, text=text.replace("WINDOWS", windows)), on_paper("MI300X"))
        .points[0]
        .memory_bytes
        for windows in ("[8, 8, 8, 8]", "[null, null, null, null]")
    ]
    assert sizes[0] == sizes[1]


def test_zaya_in_the_limit_of_long_contexts_has_the_free_rows_of_its_attention() -> None:
    peaks = on_paper("MI300X")
    at = where(ZAYA, batch=256, context=20_000_000, peaks=peaks)
    one = at.chain_seconds(1)
    limit = 1.1 * peaks.ridge("bfloat16") / 4
    assert at.chain_seconds(int(limit) - 1) < 1.1 * one < at.chain_seconds(int(limit) + 1)


# --- Whatever the numbers are ---

shapes = st.sampled_from([TINY, DENSE, ZAYA])
papers = st.sampled_from([spec.name for spec in specs.known()])


@given(target=shapes, device=papers, batch=st.integers(1, 64), context=st.integers(0, 10_000), more=st.integers(1, 999))
def test_more_context_more_sequences_and_more_rows_never_take_less_time(
    target: AnyConfig, device: str, batch: int, context: int, more: int
) -> None:
    peaks = on_paper(device)
    before = where(target, batch, context, peaks).chain_seconds(5)
    assert where(target, batch, context + more, peaks).chain_seconds(5) >= before
    assert where(target, batch + more, context, peaks).chain_seconds(5) >= before
    assert where(target, batch, context, peaks).chain_seconds(5 + more) >= before


@given(target=shapes, batch=st.integers(1, 64), factor=st.floats(1, 10))
def test_a_better_device_never_takes_longer(target: AnyConfig, batch: int, factor: float) -> None:
    peaks = on_paper("MI300X")
    wider = replace(peaks, bandwidth=peaks.bandwidth * factor)
    faster = replace(peaks, flops={"bfloat16": peaks.flops["bfloat16"] * factor})
    time = where(target, batch, 500, peaks).chain_seconds(40)
    assert where(target, batch, 500, wider).chain_seconds(40) <= time
    assert where(target, batch, 500, faster).chain_seconds(40) <= time


@given(batch=st.integers(1, 128), context=st.integers(1, 900), device=papers)
def test_free_rows_and_the_ridge_are_where_they_are_said_to_be(batch: int, context: int, device: str) -> None:
    peaks = on_paper(device)
    at = where(TINY, batch, context, peaks)
    wanted = scenario.Scenario.model_validate(
        {
            "name": "s", "model": {"config": {"family": "llama", "layers": 1, "width": 8, "ffn": 16, "heads": 2,
            "kv_heads": 1, "head_dim": 4, "vocab": 32, "max_positions": 999}}, "engines": ["autoregressive"],
            "prompts": {"set": "quickstart"}, "batch": batch, "context": context,
        }
    )  # fmt: skip
    [point] = projection.project(wanted, peaks).points
    one, free, ridge = at.chain_seconds(1), point.predicted_free_token_slots, point.predicted_ridge_rows
    assert at.chain_seconds(free) <= 1.1 * one < at.chain_seconds(free + 1)
    assert ridge is not None
    assert at.is_compute_bound(ridge)
    assert ridge == 1 or not at.is_compute_bound(ridge - 1)
    assert [ratio for _, ratio in point.predicted_row_curve] == sorted(r for _, r in point.predicted_row_curve)


# --- Block counts ---

RATES = {"rates": [0.85] * 15}


def table(chosen: CellRecord, at: Where) -> projection.BlockCount:
    found = projection.block_count(chosen, at, at.chain_seconds(1))
    assert found is not None
    return found


def counts(found: projection.BlockCount) -> list[float]:
    return [count.predicted_ratio for count in found.counts]


def test_a_block_count_has_a_row_for_every_number_of_proposals() -> None:
    at = where(ZAYA, 64, 32768, on_paper("MI300X"))
    one = at.chain_seconds(1)
    found = table(diffusion(3, synthetic=RATES), at)
    assert [count.rows for count in found.counts] == [1, *(16 * (1 + p) for p in range(1, 17))]
    assert counts(found) == sorted(counts(found))
    most = found.predicted_most_within_slack
    assert counts(found)[most] <= 1.1 < counts(found)[most + 1]
    rates = [count.predicted_tokens_per_second or 0 for count in found.counts]
    assert found.predicted_best == rates.index(max(rates))
    assert found.counts[16].predicted_coverage == pytest.approx(1)
    assert rates[0] == pytest.approx(1 / one)  # proposing nothing is decoding autoregressively
    step = projection.engine_step(diffusion(3, synthetic=RATES), at, one)
    assert step.predicted_step_seconds == found.counts[3].predicted_step_seconds
    assert step.predicted_tokens_per_second == pytest.approx(rates[3])


@pytest.mark.parametrize(("device", "most"), [("MI300X", 3), ("MI355X", 4), ("H200 SXM", 2)])
def test_blocks_of_zaya_that_fit_where_the_cache_is_all_that_matters(device: str, most: int) -> None:
    # 1.1 x ridge / 4 rows: 67.8, 85.9 and 56.7, of which the drafts take 16 and every proposal 16 more.
    found = table(diffusion("all"), where(ZAYA, 64, 20_000_000, on_paper(device)))
    assert found.predicted_most_within_slack == most


def test_a_mixture_of_experts_has_no_free_block_at_batch_one() -> None:
    found = table(diffusion(3), where(ZAYA, 1, 1024, on_paper("MI300X")))
    assert found.predicted_most_within_slack == 0
    # 32 rows hit 16 (1 - (15/16)^32) = 14 experts where one row hits one.
    assert counts(found)[1] > 6


def test_denoising_has_no_step_of_known_cost() -> None:
    chosen, at = cell("diffusion", **{**diffusion("all").options, "sampler": "denoise"}), where(ZAYA)
    assert projection.block_count(chosen, at, 1.0) is None
    step = projection.engine_step(chosen, at, 1.0)
    assert step.predicted_step_seconds is None
    assert step.unavailable is not None and "denoise" in step.unavailable


def test_a_mean_length_alone_says_nothing_about_coverage() -> None:
    at = where(ZAYA, 64, 1024, on_paper("MI300X"))
    chosen = diffusion(3, synthetic={"length": 4.5})
    assert "least variance" in projection.engine_step(chosen, at, 1.0).notes[0]
    found = table(chosen, at)
    assert found.predicted_best is None
    assert found.counts[5].predicted_tokens_per_second is None
    assert found.unavailable is not None and "rates or a histogram" in found.unavailable


# --- Scenarios and devices ---


def test_a_projection_is_labelled_and_says_what_it_assumes(tmp_path: Path) -> None:
    wanted = load(tmp_path, "matrix.batch=[1, 4]", "hardware=mi300x")
    content = json.loads(json.dumps(projection.project(wanted, on_paper("mi300x")).to_dict()))
    assert (content["label"], content["schema_version"]) == ("predicted", PROJECTION_VERSION)
    assert content["hardware"]["device"] == "MI300X"
    assert content["hardware"]["sources"]["flops.bfloat16"]
    assert len(content["points"]) == 2
    said = " ".join(content["assumptions"])
    for fragment in ("No overhead", "the roof itself", "synthetic", "overlap"):
        assert fragment in said
    assert "Experts" not in said
    unlabelled = [key for key in keys(content["points"]) if "second" in key or "ratio" in key or "bound" in key]
    assert unlabelled and all(key.startswith("predicted_") for key in unlabelled)


def keys(nested: Any) -> list[str]:
    if isinstance(nested, dict):
        return [*nested, *(key for value in nested.values() for key in keys(value))]
    return [key for value in nested for key in keys(value)] if isinstance(nested, list) else []


def test_an_assumed_fraction_is_printed_as_such(tmp_path: Path) -> None:
    peaks = replace(on_paper("MI300X"), memory_fraction=0.8)
    said = " ".join(projection.project(load(tmp_path), peaks).assumptions)
    assert "0.8 of it is reached" in said
    assert "rate of MI300X (spec sheet, dense): all of it, the roof itself" in said


def test_experts_are_an_assumption_of_their_own(tmp_path: Path) -> None:
    text = TEXT.replace("family: llama, layers: 4", "family: zaya, experts: 4, router_width: 8, layers: 4")
    found = projection.project(load(tmp_path, text=text), on_paper("MI300X"))
    assert any("equally likely" in assumption for assumption in found.assumptions)
    assert found.points[0].engines[2].predicted_speedup is not None


def test_a_context_that_is_not_given_is_estimated_from_the_prompts(tmp_path: Path) -> None:
    given, estimated = load(tmp_path), load(tmp_path, "context=null", text=TEXT)
    peaks = on_paper("MI300X")
    assert projection.project(given, peaks).points[0].context_from == "the scenario"
    point = projection.project(estimated, peaks).points[0]
    assert point.context > 10
    assert point.context_from == "the longest prompt, by its characters"


def test_a_model_too_large_for_the_device_is_projected_and_marked(tmp_path: Path) -> None:
    for memory, fits in ((10, False), (10**9, True)):
        large = replace(on_paper("MI300X"), memory_bytes=memory)
        assert projection.project(load(tmp_path), large).points[0].fits is fits


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("dtype=float32", "no float32 rate of MI300X is known"),
        ("context=990", "need 1054 tokens"),
        ("model={hub: org/model}", "the shape of org/model is not on this machine"),
    ],
)
def test_what_cannot_be_projected_is_refused(tmp_path: Path, override: str, fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        projection.project(load(tmp_path, override), on_paper("MI300X"))


def test_this_machines_roofs_are_taken_where_they_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofs, "cached", lambda device: None)
    with pytest.raises(UserError, match="run: zbench roofs"):
        peaks.measured_here("auto", None)
    kept = {"bandwidth": {"read": {"value": 2e9}}, "flops": {"bfloat16": {"value": 3e9}}, "measured": "today"}
    monkeypatch.setattr(roofs, "cached", lambda device: kept)
    found = peaks.measured_here("auto", None)
    assert (found.kind, found.bandwidth, found.flops) == ("measured", 2e9, {"bfloat16": 3e9})
    assert projection.project(load(tmp_path), found).points[0].fits is None


@pytest.mark.parametrize(
    ("name", "units", "fragment"),
    [
        ("AMD Instinct MI300X", 304, None),
        ("AMD Instinct MI300X", 38, "has a partition of AMD Instinct MI300X"),
        ("NVIDIA H200", 132, "has NVIDIA H200"),
        ("AMD EPYC", 0, "has AMD EPYC"),
    ],
)
def test_a_scenario_is_measured_on_its_own_hardware_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, units: int, fragment: str | None
) -> None:
    import torch

    properties = type("Properties", (), {"multi_processor_count": units})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(devices, "resolve", lambda wanted: Device("cuda", "rocm", 0, name))
    why = checks.elsewhere(load(tmp_path, "hardware=MI300X"))
    assert (why is None) == (fragment is None)
    assert fragment is None or (fragment in str(why) and "about MI300X" in str(why))
    assert checks.elsewhere(load(tmp_path)) is None


def test_a_device_that_is_not_there_does_not_keep_a_scenario_from_being_projected(tmp_path: Path) -> None:
    why = checks.elsewhere(load(tmp_path, "hardware=MI300X", "device=rocm:7"))
    assert why is not None and "has no device rocm:7" in why


def test_projecting_to_a_named_device_needs_no_torch(tmp_path: Path) -> None:
    load(tmp_path)
    code = (
        f"import sys; from zbench.cli import main\n"
        f"try: main(['project', {str(tmp_path / 'tiny.yaml')!r}, '--device', 'MI300X', '--out', {str(tmp_path)!r}])\n"
        "except SystemExit as done: assert not done.code\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("name", "most"), [("mi300x", 3), ("mi355x", 4)])
def test_the_zaya_scenarios_project_the_published_shape_on_their_own_device(name: str, most: int) -> None:
    wanted = scenario.load(SCENARIOS / f"zaya1_8b_{name}.yaml")
    assert checks.model_config(wanted.model_spec) == ZAYA
    found = projection.project(wanted, on_paper(str(wanted.hardware)))
    assert found.hardware.device == name.upper()
    assert len(found.points) == 5
    assert all(point.fits for point in found.points)
    assert all(step.predicted_speedup for point in found.points for step in point.engines)
    long = found.points[-1]
    assert (long.batch, long.context) == (16, 130000)
    assert long.blocks[0].predicted_most_within_slack == most
