"""What comes with the package: every drafter is the one its checksum names, fits its target and its engine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors import safe_open

from zbench import engines, scenario
from zbench.cli import main
from zbench.engines import plans
from zbench.errors import UserError
from zbench.models import loading, zoo
from zbench.models.config import ModelConfig

SMOLLM2 = ModelConfig(
    family="llama", layers=30, width=576, ffn=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, max_positions=8192,
    rope_theta=100000.0, tied=True, eos_ids=(2,), bos_id=1,
)  # fmt: skip
DRAFTERS = sorted(name for name, item in zoo.SHIPPED.items() if item.kind != "model")
MEGABYTES = 16


@pytest.mark.parametrize("name", sorted(zoo.SHIPPED))
def test_the_folder_holds_what_the_table_says(name: str) -> None:
    item, folder = zoo.SHIPPED[name], zoo.SHIPPED_FOLDER / name
    weights = folder / item.weights
    assert zoo.file_sha256(weights) == item.weights_sha256
    assert weights.stat().st_size <= MEGABYTES * 1e6
    card = (folder / "README.md").read_text()
    for said in (item.weights_sha256, "recipe", "budget", "data", "licence", item.licence, "tokens per step"):
        assert said in card
    with safe_open(weights, "pt") as file:
        slices = [file.get_slice(key) for key in file.keys() if key not in ("d2t", "t2d")]  # noqa: SIM118
        assert all(each.get_dtype() == "BF16" for each in slices)
        total = 0
        for each in slices:
            size = 1
            for length in each.get_shape():
                size *= length
            total += size
    assert total == item.parameters


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_loads_for_its_target(name: str) -> None:
    item = zoo.SHIPPED[name]
    folder = zoo.drafter(name, item.kind)
    target = SMOLLM2 if item.target == "smollm2-135m" else loading.load("zbench-tiny").config
    assert isinstance(target, ModelConfig)
    if item.kind == "adapter":
        from zbench.models.adapter import load_adapter

        assert load_adapter(folder, target).config.shift == 1
    elif item.kind == "eagle3":
        from zbench.models.eagle3 import load_drafter

        assert load_drafter(folder, target).hash == item.weights_sha256
    else:
        from zbench.models import dflash

        assert dflash.load_drafter(folder, target).hash == item.weights_sha256


def test_a_drafter_of_another_kind_or_unknown_is_refused() -> None:
    with pytest.raises(UserError, match="is no eagle3 drafter"):
        zoo.drafter("smollm2-135m-tidar", "eagle3")
    with pytest.raises(UserError, match=r"is unknown; adapter: .*smollm2-135m-tidar"):
        zoo.drafter("nothing", "adapter")


def test_a_damaged_drafter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "smollm2-135m-tidar"
    shutil.copytree(zoo.SHIPPED_FOLDER / name, tmp_path / name)
    weights = tmp_path / name / zoo.SHIPPED[name].weights
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    monkeypatch.setattr(zoo, "SHIPPED_FOLDER", tmp_path)
    with pytest.raises(UserError, match="missing or damaged"):
        zoo.drafter(name, "adapter")
    weights.unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        zoo.drafter(name, "adapter")


def test_a_zoo_drafter_is_named_in_a_scenario_and_planned(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "name: x\nmodel: smollm2-135m\nprompts: {set: quickstart}\nengines:\n"
        "  - {name: diffusion, adapter: {zoo: smollm2-135m-tidar}, block_size: 4, proposals: 2}\n"
    )
    (engine,) = scenario.load(file).engines
    options = engine.model_dump()
    assert options["adapter"] == {"zoo": "smollm2-135m-tidar"}
    assert plans.plan("diffusion", options, SMOLLM2).forwards[0].rows == 4 + 2 * 3


@pytest.mark.parametrize("name", ["eagle3", "dflash", "dflash_reference"])
def test_an_engine_takes_drafters_of_its_own_kind_only(name: str) -> None:
    def ask(drafter: str) -> None:
        engines.check(name, scenario.ENGINES[name](name=name, drafter={"zoo": drafter}).options, SMOLLM2)

    own, other = ("eagle3", "dflash") if name == "eagle3" else ("dflash", "eagle3")
    ask(f"smollm2-135m-{own}")
    with pytest.raises(UserError, match=f"is no {own} drafter"):
        ask(f"smollm2-135m-{other}")


def test_what_comes_with_the_package_is_listed_beside_what_is_fetched() -> None:
    rows = {row.name: row for row in zoo.available()}
    assert set(zoo.ZOO) | set(zoo.SHIPPED) == set(rows)
    assert all(rows[name].present and rows[name].target == zoo.SHIPPED[name].target for name in DRAFTERS)
    assert replace(zoo.SHIPPED["smollm2-135m-tidar"], kind="eagle3").weights == "model.safetensors"


def test_the_tiny_model_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZBENCH_CACHE", str(tmp_path))
    model = loading.load("zbench-tiny")
    assert model.weights_hash == zoo.SHIPPED["zbench-tiny"].weights_sha256
    tokenizer = loading.load_tokenizer(model)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert text == "<|im_start|>user\nHello<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    (row,) = [row for row in zoo.available() if row.name == "zbench-tiny"]
    assert row.present and row.kind == "model" and row.target is None


def test_a_drafter_is_no_model() -> None:
    for use in (zoo.path, zoo.fetch, loading.load):
        with pytest.raises(UserError, match="is a drafter for smollm2-135m") as caught:
            use("smollm2-135m-eagle3")
        assert "\n" not in str(caught.value)
    done = CliRunner().invoke(main, ["models", "path", "smollm2-135m-eagle3"])
    assert done.exit_code == 0 and Path(done.output.strip()) == zoo.SHIPPED_FOLDER / "smollm2-135m-eagle3"
