"""What is wrong with a scenario is said before anything is loaded, alike by validate, --dry-run and run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from zbench import checks, engines, run, scenario
from zbench.cli import main
from zbench.errors import UserError
from zbench.models import eagle3, loading, zoo

SCENARIO = """
name: tiny
model: zbench-tiny
dtype: float32
device: cpu
engines: [autoregressive]
prompts: {set: quickstart, limit: 2}
output_tokens: 8
"""


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SCENARIO)
    return path


def zbench(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def eagle(**options: Any) -> str:
    return f"engines=[{json.dumps({'name': 'eagle3', 'drafter': {'zoo': 'zbench-tiny-eagle3'}, **options})}]"


WRONG = [
    ("model=nope", "unknown model 'nope'"),
    ("model={path: /nope}", "model folder /nope does not exist"),
    ("prompts={file: /nope.jsonl}", "/nope.jsonl: cannot be read"),
    ("prompts={set: nope}", "unknown prompt set 'nope'"),
    ("warmup={prompts: 1000}", "warm-up prompts"),
    ("context=100000", "prompt and output need 100008 tokens, zbench-tiny takes 1024"),
    ("output_tokens=100000", "prompt and output need at least 100001 tokens, zbench-tiny takes 1024"),
    (eagle(drafter={"zoo": "smollm2-135m-eagle3"}), "made for a target with 49152 tokens, but this one has 2048"),
    (eagle(drafter={"path": "/nope"}), "eagle3: drafter folder /nope does not exist"),
    (eagle(drafter={"zoo": "nope"}), "zoo drafter 'nope' is unknown"),
    (eagle(depth=4, top_k=4, tokens=1), "drafts 4 to 52 tokens, not 1"),
    (eagle(depth=4, tokens=100000), "drafts 4 to 4 tokens, not 100000"),
    (eagle(top_k=1, tokens=16), "drafts 4 to 4 tokens, not 16"),
    (eagle(top_k=2, beam=8), "a beam of 8 does not fit"),
    (eagle(top_k=99999), "top_k within the draft vocabulary"),
    (eagle(depth=2, synthetic={"length": 7.0}), "synthetic length"),
    ("engines=[{name: dflash, drafter: {zoo: smollm2-135m-dflash}}]", "made for a target with 49152 tokens"),
    ("engines=[{name: dflash, drafter: {zoo: zbench-tiny-dflash}, draft_vocab: 100000}]", "draft_vocab 100000"),
    (
        "engines=[{name: dflash, drafter: {zoo: zbench-tiny-dflash}, block: 4, tokens: 2, synthetic: {rate: 0.5}}]",
        "tree",
    ),
    (
        "engines=[{name: diffusion, adapter: {zoo: smollm2-135m-tidar}}]",
        "made for a model of 30 layers, 576 wide, but this one has 4 and is 128 wide",
    ),
    (
        "engines=[{name: diffusion, adapter: {zoo: zbench-tiny-tidar}, sampler: denoise}]",
        "denoise needs masks that predict their own place",
    ),
    ("engines=[{name: diffusion}]", "no mask token"),
]


@pytest.mark.parametrize(("override", "message"), WRONG)
def test_what_a_run_refuses_is_refused_without_loading(
    yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    for command in (("validate", yaml), ("run", yaml, "--dry-run"), ("run", yaml, "--out", tmp_path / "out")):
        result = zbench(*command, "-o", override)
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.output
        assert message in result.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_a_model_that_is_only_not_here_yet_is_no_mistake(
    yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "_folder", lambda name: tmp_path / name)
    name = ("-o", "model=smollm2-135m", "-o", eagle(drafter={"zoo": "smollm2-135m-eagle3"}))
    not_yet = "the shape of smollm2-135m, which is not on this machine yet (zbench models fetch smollm2-135m)"
    checked, planned = zbench("validate", yaml, *name), zbench("run", yaml, "--dry-run", *name)
    assert (checked.exit_code, planned.exit_code) == (0, 0)
    assert f"not known yet: {not_yet}" in checked.stdout
    assert f"unknown: {not_yet}" in planned.stdout
    hub = zbench("validate", yaml, "-o", "model={hub: some/model}")
    assert "some/model, which is not on this machine yet" in hub.stdout
    # What does not depend on the shape is wrong all the same.
    assert "not 1" in zbench("validate", yaml, *name[:2], "-o", eagle(depth=4, tokens=1)).stderr


def test_drafters_of_the_hub_are_seen_by_the_run_that_may_download_them(
    monkeypatch: pytest.MonkeyPatch, yaml: Path, tmp_path: Path
) -> None:
    asked = []

    def snapshot(hub: str, revision: str) -> Path:
        asked.append(hub)
        return zoo.shipped("smollm2-135m-eagle3")

    monkeypatch.setattr(loading, "snapshot", snapshot)
    wanted = scenario.load(yaml, (eagle(drafter={"hub": "some/drafter"}),))
    assert checks.check(wanted) == () and not asked
    with pytest.raises(UserError, match="made for a target with 49152 tokens"):
        run.prepare(wanted, lambda _: None)
    assert asked == ["some/drafter"]


def test_a_drafter_of_pickles_is_left_for_the_run_that_may_read_them(tmp_path: Path) -> None:
    config = checks.model_config("zbench-tiny")
    assert config is not None
    eagle3.save_drafter(tmp_path, eagle3.random_drafter(config))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    options = scenario.Eagle3Spec(name="eagle3", drafter={"path": str(tmp_path)}).options  # type: ignore[arg-type]
    engines.check("eagle3", options, config, allow_pickle=True)
    with pytest.raises(UserError, match="only pickle weights"):
        engines.check("eagle3", options, config)


@pytest.mark.parametrize("overrides", [(), ("model=smollm2-135m",)])
def test_validate_needs_torch_only_to_look_into_a_drafter(yaml: Path, overrides: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom zbench import checks, scenario\n"
        f"checks.check(scenario.load({str(yaml)!r}, {overrides!r}))\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_packaged_scenario_is_valid() -> None:
    done = zbench("validate", *sorted((Path(__file__).parent.parent / "scenarios").glob("*.yaml")))
    assert done.exit_code == 0, done.output


def test_an_engine_whose_package_is_missing_is_left_out_and_its_drafter_left_alone(
    yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "missing", lambda name: "not installed" if name == "dflash_reference" else "")
    engine = {"name": "dflash_reference", "drafter": {"path": "/nope"}}
    checks.check(scenario.load(yaml, [f"engines=[autoregressive, {json.dumps(engine)}]"]))
    with pytest.raises(UserError, match="/nope does not exist"):
        checks.check(scenario.load(yaml, [f"engines=[{json.dumps(engine | {'name': 'dflash'})}]"]))
