"""`zbench train` as a user meets it: a corpus, three drafters that load again, and one line on bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_cli import refused, zbench
from tests.tiny import oracle
from zbench.models import adapter, dflash, eagle3, families, loading
from zbench.models.tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    oracle("smollm").save_pretrained(made)
    byte_tokenizer(families.from_hf(oracle("smollm").config.to_dict())).save_pretrained(made)
    return made


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
    assert [json.loads(line)["step"] for line in log] == [1, 2]
    converted = json.loads((tmp_path / "full" / "config.json").read_text())
    assert 0 <= converted.pop("mask_token_id") < 300
    original = json.loads((folder / "config.json").read_text())
    assert converted == original and (tmp_path / "full" / "tokenizer.json").is_file()
    refused(zbench("train", "full", *shared, "--out", folder), "--out is the model's own folder")


def test_bad_input_is_one_line(folder: Path, tmp_path: Path) -> None:
    asked = ["train", "tidar", "--model", folder, "--data", tmp_path, "--out", tmp_path / "out"]
    refused(zbench(*asked), "--minutes or --steps")
    refused(zbench(*asked, "--minutes", 1), "no training data", "zbench train data")
    refused(zbench("train", "data", "--model", "nobody", "--out", tmp_path / "x"), "unknown model 'nobody'")
    here = ["train", "data", "--model", folder, "--out", tmp_path / "x", "--device", "cpu"]
    refused(zbench(*here, "--execution", "graph"), "graph needs a GPU", "leave --execution out")
