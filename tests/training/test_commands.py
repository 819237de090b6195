"""`zbench train` as a user meets it: a corpus, three drafters that load again, and one line on bad input."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from tests.test_cli import refused, zbench
from tests.tiny import oracle
from zbench.models import adapter, dflash, eagle3, families, loading
from zbench.models.tokenizer import byte_tokenizer
from zbench.training import data
from zbench.training.corpus import INDEX, VERSION, Conversation, Role, write_shard
from zbench.training.trainer import PROGRESS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    oracle("smollm").save_pretrained(made)
    byte_tokenizer(families.from_hf(oracle("smollm").config.to_dict())).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of a few random conversations."""
    made = tmp_path_factory.mktemp("corpus")
    generator, roles = torch.Generator().manual_seed(0), torch.tensor([Role.PROMPT] * 6 + [Role.ANSWER] * 18)
    conversations = [
        Conversation(torch.randint(3, 290, (24,), generator=generator), roles, number, held_out=number == 0)
        for number in range(5)
    ]
    index = {"version": VERSION, "model": "tiny", "weights": loading.load({"path": str(folder)}).weights_hash}
    shards = [write_shard(made, 0, conversations)]
    settings = asdict(data.Settings())
    (made / INDEX).write_text(json.dumps({**index, "settings": settings, "counts": {}, "shards": shards}))
    return made


def training(folder: Path, written: Path, *arguments: object) -> Result:
    shared = ["--model", folder, "--data", written, "--batch", 2, "--device", "cpu"]
    usual = [] if "--dtype" in arguments else ["--dtype", "float32"]
    return zbench("train", *arguments, *shared, *usual)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_every_step_and_says_so(
    folder: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = torch.optim.AdamW.step, 0

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(signal.SIGINT)
        step(*arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    asked = ["tidar", "--rank", 2, "--steps", 50, "--out", tmp_path / "out"]
    stopped = training(folder, written, *asked)
    assert stopped.exit_code == 130
    said = f"zbench: interrupted; {tmp_path / 'out'} has all 3 steps, continue with --resume"
    assert [line for line in stopped.stderr.splitlines() if line.startswith("zbench: ")] == [said]
    asked[asked.index(50)] = 4
    resumed = training(folder, written, *asked, "--resume")
    assert resumed.exit_code == 0 and json.loads(resumed.stdout)["step"] == 4
    again = training(folder, written, *asked, "--resume")
    assert again.exit_code == 0 and again.stdout == resumed.stdout


def test_a_draft_vocabulary_larger_than_the_models_is_refused(folder: Path, written: Path, tmp_path: Path) -> None:
    asked = ["eagle3", "--steps", 1, "--depth", 1, "--out", tmp_path / "out"]
    refused(training(folder, written, *asked, "--draft-vocab", 301), "--draft-vocab 301", "300 tokens")
    assert training(folder, written, *asked, "--draft-vocab", 300).exit_code == 0


@pytest.mark.parametrize("cost, chosen", [(3.0, "float32"), (1.2, "bfloat16")])
def test_training_multiplies_in_what_the_device_is_faster_at(
    cost: float, chosen: str, folder: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zbench.hardware.device.bfloat16_cost", lambda: cost)
    asked = ["full", "--steps", 1, "--block", 4, "--out", tmp_path / "out", "--dtype", "auto"]
    made = training(folder, written, *asked)
    assert made.exit_code == 0, made.output
    said = "in float32: torch takes 3.0 times as long over products in bfloat16 on this CPU"
    assert (said in made.stderr) == (chosen == "float32")
    trained = loading.load({"path": str(tmp_path / "out")})
    assert {tensor.dtype for tensor in trained.tensors.values()} == {torch.float32}  # as the original
    monkeypatch.setattr("zbench.hardware.device.bfloat16_cost", lambda: 4.2 - cost)
    asked[asked.index("--steps") + 1] = 2
    resumed = training(folder, written, *asked, "--resume")
    assert (
        resumed.exit_code == 0 and json.loads((tmp_path / "out" / PROGRESS).read_text())["settings"]["dtype"] == chosen
    )


def test_runs_of_before_there_was_a_choice_go_on(folder: Path, written: Path, tmp_path: Path) -> None:
    asked = ["eagle3", "--depth", 2, "--draft-vocab", 64, "--reach", 0, "--dtype", "bfloat16", "--out", tmp_path]
    assert training(folder, written, *asked, "--steps", 1).exit_code == 0
    stored = json.loads((tmp_path / PROGRESS).read_text())
    del stored["settings"]["dtype"], stored["recipe"]["reach"]
    (tmp_path / PROGRESS).write_text(json.dumps(stored))
    assert training(folder, written, *asked, "--steps", 2, "--resume").exit_code == 0


def test_what_differs_from_the_run_that_is_resumed_is_named(folder: Path, written: Path, tmp_path: Path) -> None:
    asked = ["--steps", 1, "--out", tmp_path / "out"]
    assert training(folder, written, "eagle3", *asked, "--depth", 2, "--draft-vocab", 64).exit_code == 0

    def again(*options: object) -> str:
        resumed = training(folder, written, *options, *asked, "--resume")
        refused(resumed)
        return resumed.stderr.splitlines()[-1].removeprefix(f"zbench: {tmp_path / 'out'} was trained ")

    same = ("eagle3", "--draft-vocab", 64)
    rest = "; resume it as it was, or choose another folder with --out"
    assert again(*same, "--depth", 3) == "with --depth 2, not 3" + rest
    assert again(*same, "--depth", 2, "--reach", 0) == "with --reach 2, not 0" + rest
    assert again(*same, "--depth", 2, "--seed", 4, "--ffn", 8) == "with --seed 0, not 4; with --ffn none, not 8" + rest
    assert again(*same, "--depth", 2, "--dtype", "bfloat16") == "with --dtype float32, not bfloat16" + rest
    assert again("tidar") == "as eagle3, not as tidar" + rest


def test_what_differs_from_the_corpus_that_goes_on_is_named(folder: Path, written: Path) -> None:
    made = zbench("train", "data", "--model", folder, "--out", written, "--seed", 3, "--opened", 0.5, "--device", "cpu")
    refused(made, f"{written} was made with --seed 0, not 3; with --opened 0.45, not 0.5; choose another folder")
    model = zbench("train", "data", "--model", "zbench-tiny", "--out", written, "--device", "cpu")
    refused(model, f"{written} was written by another model (tiny); choose another folder with --out")


@pytest.mark.slow
def test_data_then_each_drafter(folder: Path, tmp_path: Path) -> None:
    corpus, config = tmp_path / "corpus", families.from_hf(json.loads((folder / "config.json").read_text()))
    made = zbench("train", "data", "--model", folder, "--out", corpus, "--tokens", 3000, "--device", "cpu")
    assert made.exit_code == 0, made.output
    shared = [
        "--model",
        folder,
        "--data",
        corpus,
        "--data",
        corpus,
        "--steps",
        2,
        "--batch",
        2,
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    loaders = {
        "tidar": adapter.load_adapter,
        "eagle3": eagle3.load_drafter,
        "dflash": dflash.load_drafter,
        "full": lambda folder, config: loading.load({"path": str(folder)}),
    }
    own = {
        "tidar": ["--rank", 2],
        "eagle3": ["--draft-vocab", 64, "--depth", 2, "--ffn", 48],
        "dflash": ["--layers", 1],
        "full": ["--block", 4],
    }
    for name, load in loaders.items():
        trained = zbench("train", name, *shared, *own[name], "--out", tmp_path / name)
        assert trained.exit_code == 0, trained.output
        last = json.loads(trained.stdout.splitlines()[-1])
        assert last["step"] == 2 and last["accepted"] >= 1.0
        loaded = load(tmp_path / name, config)
        if name == "eagle3":
            assert loaded.config.layer.ffn == 48
    again = zbench(
        "train", "eagle3", *shared, "--depth", 2, "--start", tmp_path / "eagle3", "--out", tmp_path / "again"
    )
    assert again.exit_code == 0, again.output
    begun = eagle3.load_drafter(tmp_path / "again", config).config
    assert (begun.draft_vocab, begun.layer.ffn) == (64, 48)
    missing = ["--data", tmp_path / "none", "--out", tmp_path / "x"]
    refused(zbench("train", "tidar", *shared, *missing), "none holds no training data")
    log = (tmp_path / "tidar" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [0, 1, 2]
    converted = json.loads((tmp_path / "full" / "config.json").read_text())
    assert 0 <= converted.pop("mask_token_id") < 300
    original = json.loads((folder / "config.json").read_text())
    assert converted == original and (tmp_path / "full" / "tokenizer.json").is_file()
    refused(zbench("train", "full", *shared, "--out", folder), "--out is the model's own folder")


def test_bad_input_is_one_line(folder: Path, tmp_path: Path) -> None:
    asked = ["train", "tidar", "--model", folder, "--data", tmp_path, "--out", tmp_path / "out"]
    refused(zbench(*asked), "--minutes or --steps")
    refused(zbench(*asked, "--minutes", 1, "--steps", 3), "--minutes and --steps are both given", "one of them")
    refused(zbench(*asked, "--steps", 1, "--block", 4, "--short-block", 8), "--short-block 8", "--block 4")
    refused(zbench(*asked, "--minutes", 1), "no training data", "zbench train data")
    refused(zbench("train", "data", "--model", "nobody", "--out", tmp_path / "x"), "unknown model 'nobody'")
    here = ["train", "data", "--model", folder, "--out", tmp_path / "x", "--device", "cpu"]
    refused(zbench(*here, "--execution", "graph"), "graph needs a GPU", "choose --execution eager")
