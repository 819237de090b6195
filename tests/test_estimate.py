"""What `--dry-run` says is the least that the same scenario takes at the same roofs, by what its forwards record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zbench import estimate, run, scenario
from zbench.hardware.peaks import Peaks
from zbench.records import TrialRecord

PEAKS = Peaks("toy", "spec sheet", 1e9, {"float32": 2e10}, {})
TEXT = """\
name: tiny
model:
  config: {family: FAMILY, layers: 4, width: 64, ffn: 96, heads: 4, kv_heads: 2, vocab: 260, max_positions: 4096}
  weights: random
dtype: float32
device: cpu
engines:
  - autoregressive
  - {name: forward, rows: [1, 8]}
  - reference
  - {name: prompt_lookup, tokens: 3}
  - {name: eagle3, drafter: {random: true}, depth: 2, synthetic: {length: 2}}
  - {name: diffusion, block_size: 4, synthetic: {length: 2.5}}
prompts: {file: PROMPTS}
output_tokens: 8
ignore_eos: true
repeats: 1
threads: 1
"""


@pytest.fixture(autouse=True)
def _toy_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "basis", lambda wanted: estimate.Basis("toy", PEAKS, None))


def asked(folder: Path, words: list[int], *overrides: str, family: str = "llama") -> scenario.Scenario:
    """A scenario whose prompts have so many words each."""
    lines = [json.dumps({"id": f"p{i}", "category": "c", "turns": ["ab " * n]}) for i, n in enumerate(words)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    path = folder / "tiny.yaml"
    path.write_text(TEXT.replace("PROMPTS", str(folder / "prompts.jsonl")).replace("FAMILY", family))
    return scenario.load(path, overrides)


def least(trials: list[TrialRecord]) -> float:
    """Seconds that the forwards of these trials need at the roofs."""
    forwards = [forward for trial in trials for forward in trial.forwards]
    rate = PEAKS.flops["float32"]
    return sum(max((f.bytes_read + f.bytes_written) / PEAKS.bandwidth, f.flops / rate) for f in forwards)


@pytest.mark.parametrize(
    ("words", "overrides", "family"),
    [
        ([5, 5, 5, 300, 5], ["batch=2"], "llama"),  # one long prompt, and a last batch that is not full
        ([5, 40, 12], ["batch=3"], "llama"),
        ([3, 3], ["context=520"], "llama"),  # two forwards of prefill
        ([30, 20], ["output_tokens=24", "model.config.windows=[8, 8, 8, 8]"], "mistral"),
    ],
)
def test_no_cell_takes_less_than_is_said(tmp_path: Path, words: list[int], overrides: list[str], family: str) -> None:
    wanted = asked(tmp_path, words, *overrides, family=family)
    said = {cell.cell: cell for cell in estimate.estimate(wanted)}
    _, trials = run.in_memory(wanted)
    for name, cell in said.items():
        mine = [trial for trial in trials if trial.cell == name]
        assert len(mine) == cell.trials
        assert cell.seconds is not None
        assert 0.1 * least(mine) < cell.seconds <= least(mine) * (1 + 1e-9), name


def test_what_is_said_is_near_where_the_context_is_given(tmp_path: Path) -> None:
    wanted = asked(tmp_path, [3, 3, 3], "context=100", "batch=2", "engines=[autoregressive]")
    [cell] = estimate.estimate(wanted)
    _, trials = run.in_memory(wanted)
    assert cell.seconds == pytest.approx(least(trials), rel=0.01)


def test_what_is_said_is_exact_where_the_tokens_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = asked(tmp_path, [200, 5, 5], "batch=2", "engines=[autoregressive]", "output_tokens=2")
    _, trials = run.in_memory(wanted)
    tokens = {request.prompt_id: request.prompt_tokens for trial in trials for request in trial.requests}
    monkeypatch.setattr(estimate, "_fewest_tokens", lambda prompt: tokens[prompt.id])
    [cell] = estimate.estimate(wanted)
    assert max(tokens.values()) > 512  # two forwards of prefill, the second for one of the prompts
    assert cell.seconds == pytest.approx(least(trials))


def test_a_long_prompt_is_counted_in_its_own_batch_alone(tmp_path: Path) -> None:
    def said(words: list[int]) -> float:
        [cell] = estimate.estimate(asked(tmp_path, words, "batch=2", "engines=[autoregressive]"))
        return cell.seconds or 0.0

    short, long = said([5, 5]), said([300, 5])
    assert said([5, 5, 300, 5, 5, 5]) == pytest.approx(2 * short + long)
    assert said([5, 300, 5, 5]) == pytest.approx(short + long)
    assert long > 0.8 * said([300, 300])  # a batch is padded to its longest prompt
