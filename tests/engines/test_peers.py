"""Other people's decoders as engines: the same tokens as ours in float32, and what is missing is said."""

from __future__ import annotations

import importlib.util
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import FAMILIES, oracle, runtime
from zbench import engines, scenario
from zbench.engines.autoregressive import Autoregressive
from zbench.engines.base import Meter, Request
from zbench.engines.dflash import DFlash
from zbench.engines.sampling import Sampling
from zbench.engines.vllm_offline import VllmOffline
from zbench.errors import UserError
from zbench.hardware import device
from zbench.models import dflash, families, gguf, loading, zoo
from zbench.models.loading import LoadedModel

CPU = device.resolve("cpu")
PROMPT = [5, 9, 17, 200, 33, 61, 7]
LIMIT = 24


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def shared(family: str) -> Any:
    model = oracle(family)
    config = families.from_hf(model.config.to_dict())
    loaded = LoadedModel(f"tiny-{family}", None, config, model.state_dict(), f"{family:0>64}", None, "made for a test")
    return SimpleNamespace(model=loaded, dtype=torch.float32, device=CPU, transformers=model)


def options(engine: str, **given: Any) -> dict[str, Any]:
    return scenario.ENGINES[engine](name=engine, **given).options


def request(limit: int = LIMIT, eos: frozenset[int] = frozenset()) -> Request:
    return Request(limit, Sampling(), (0,), eos)


def ours(family: str, asked: Request) -> list[list[int]]:
    return Autoregressive(runtime(family, "torch")).generate([PROMPT], asked, Meter(CPU)).outputs


# llama.cpp -----------------------------------------------------------------------------------------------------------


@needs("llama_cpp")
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("mistral", "zaya")])
def test_llama_cpp_runs_the_same_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZBENCH_CACHE", str(tmp_path))
    engine = engines.create("llama_cpp", options("llama_cpp", flash_attention=False), shared(family))
    stop = ours(family, request())[0][LIMIT // 2]
    for asked in (request(), request(eos=frozenset({stop}))):
        meter = Meter(CPU)
        found = engine.generate([PROMPT], asked, meter)
        assert found.outputs == ours(family, asked)
        steps, forwards = meter.records()
        assert [step.committed for step in steps] == [(1,)] * len(found.outputs[0]) and not forwards
        assert found.finish == ["eos" if asked.eos_ids else "length"]
    with pytest.raises(UserError, match="set batch to 1"):
        engine.generate([PROMPT] * 2, request(), Meter(CPU))
    with pytest.raises(UserError, match="need 5007 tokens"):
        engine.generate([PROMPT], request(5000), Meter(CPU))
    engine.close()  # type: ignore[attr-defined]


def test_a_gguf_is_written_once_and_again_when_it_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZBENCH_CACHE", str(tmp_path))
    model = shared("qwen3").model
    file = gguf.gguf_file(model, torch.bfloat16)
    content = file.read_bytes()
    monkeypatch.setattr(gguf, "write", lambda *_: pytest.fail("it was there"))
    assert gguf.gguf_file(model, torch.bfloat16) == file
    monkeypatch.undo()
    monkeypatch.setenv("ZBENCH_CACHE", str(tmp_path))
    file.write_bytes(content[:-100])
    assert gguf.gguf_file(model, torch.bfloat16).read_bytes() == content
    assert gguf.gguf_file(model, torch.float32) != file
    assert not [other for other in file.parent.iterdir() if other.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.skipif(zoo.path("smollm2-135m") is None, reason="smollm2-135m is not on this machine")
def test_a_gguf_read_back_is_the_model_to_the_byte(tmp_path: Path) -> None:
    model = loading.load("smollm2-135m")
    gguf.write(model, torch.bfloat16, tmp_path / "model.gguf")
    zoo.convert_gguf(tmp_path / "model.gguf", tmp_path, lambda *_: None)
    assert zoo.file_sha256(tmp_path / "model.safetensors") == model.weights_hash
    for name in ("tokenizer.json", "config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (model.path / name).read_text()  # type: ignore[operator]


@pytest.mark.parametrize("family", ["mistral", "zaya"])
def test_a_model_that_llama_cpp_would_run_differently_is_refused(family: str) -> None:
    with pytest.raises(UserError, match=r"llama.cpp: "):
        gguf.gguf_file(shared(family).model, torch.float32)


# The DFlash package --------------------------------------------------------------------------------------------------


@needs("dflash")
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("block", [2, 5])
def test_the_dflash_package_takes_the_steps_that_our_dflash_takes(block: int, tmp_path: Path) -> None:
    model = runtime("smollm", "torch")
    drafter = dflash.random_drafter(model.config, seed=3, layers=1)
    dflash.save_drafter(tmp_path, drafter, model.config)
    chosen = options("dflash_reference", drafter={"path": str(tmp_path)}, block=block)
    theirs = engines.create("dflash_reference", chosen, shared("smollm"))
    own = DFlash(model, dflash.DFlashDrafter(drafter.config, drafter.tensors, model), block)
    for asked in (request(), request(1), request(2), request(eos=frozenset(ours("smollm", request())[0][9:10]))):
        meters = Meter(CPU), Meter(CPU)
        found, wanted = (e.generate([PROMPT], asked, m) for e, m in zip((theirs, own), meters, strict=True))
        assert (found.outputs, found.finish) == (wanted.outputs, wanted.finish)
        (their_steps, their_forwards), (our_steps, our_forwards) = (meter.records() for meter in meters)
        assert [(s.committed, s.accepted) for s in their_steps] == [(s.committed, s.accepted) for s in our_steps]
        assert [f.role for f in their_forwards if f.step == 0] == ["prefill"]
        whole = len(our_steps) - block  # after these theirs drafts no more than may be kept
        between = [
            [(f.step, f.model, f.role, f.rows) for f in forwards if 0 < f.step <= whole]
            for forwards in (their_forwards, our_forwards)
        ]
        assert between[0] == between[1]
        assert sum(f.committed for f in their_forwards) == len(found.outputs[0])


# vLLM ----------------------------------------------------------------------------------------------------------------


class Iterations:
    """Stands in for vLLM's LLMEngine: hands out what it was given, an iteration at a time."""

    def __init__(self, *iterations: dict[int, list[int]]) -> None:
        self.left, self.sent = deque(iterations), list[str]()

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def abort_request(self, names: list[str]) -> None:
        self.aborted = list(names)

    def step(self) -> list[Any]:
        return [
            SimpleNamespace(request_id=f"{row}-1-a1b2", outputs=[SimpleNamespace(token_ids=tokens)])
            for row, tokens in self.left.popleft().items()
        ]


def stepped(*iterations: dict[int, list[int]]) -> VllmOffline:
    engine = VllmOffline.__new__(VllmOffline)
    engine.engine, engine._send = Iterations(*iterations), lambda *_: None  # type: ignore[method-assign]
    return engine


def test_iterations_of_vllm_become_steps_and_the_first_ends_with_everybodys_first_token() -> None:
    engine = stepped({}, {0: [4]}, {0: [5], 1: [6]}, {}, {0: [7, 8], 1: [9]}, {1: [10]})
    meter = Meter(CPU)
    found = engine.generate([[1], [2]], Request(4, Sampling(), (0, 0), frozenset({10})), meter)
    assert found.outputs == [[4, 5, 7, 8], [6, 9, 10]] and found.finish == ["length", "eos"]
    assert [step.committed for step in meter.records()[0]] == [(2, 1), (2, 1), (0, 1)]


@needs("vllm")
@pytest.mark.slow
def test_vllm_emits_our_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; left alone it asks for nearly all memory
    target = engines.Shared(loading.load("zbench-tiny", "float32"), torch.float32, CPU)
    prompts, asked = [PROMPT, PROMPT[::-1] * 3], Request(LIMIT, Sampling(), (0, 0))
    want = Autoregressive(target.target("auto")).generate(prompts, asked, Meter(CPU)).outputs
    engine = engines.create("vllm", options("vllm", context=256, settings={"enforce_eager": True}), target)
    meter = Meter(CPU)
    assert engine.generate(prompts, asked, meter).outputs == want
    steps, _ = meter.records()
    assert [sum(row) for row in zip(*(step.committed for step in steps), strict=True)] == [LIMIT, LIMIT]


def test_vllm_that_ends_too_early_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="short of what was asked for"):
        stepped({0: [4]}).generate([[1]], request(2), Meter(CPU))


def test_what_a_failed_trial_left_with_vllm_is_not_decoded_beside_the_next_one() -> None:
    engine = stepped({0: [4]}, {0: [5]})
    sent: list[str] = []

    def send(row: int, ids: Any, request: Any) -> None:
        if len(ids) > 2:
            raise ValueError("the prompt is longer than the maximum length")
        engine.names.append(f"{row}-{len(sent)}")
        sent.append(engine.names[-1])

    engine._send = send  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="longer"):
        engine.generate([[1], [2, 2, 2]], request(2), Meter(CPU))
    assert engine.engine.aborted == ["0-0"]
    assert engine.generate([[1]], request(2), Meter(CPU)).outputs == [[4, 5]] and sent == ["0-0", "0-1"]


# What is missing -----------------------------------------------------------------------------------------------------


def test_an_engine_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert engines.missing("autoregressive") == engines.missing("reference") == ""
    for name in ("llama_cpp", "vllm", "dflash_reference"):
        assert "pip install" in engines.missing(name)
    with pytest.raises(UserError, match="llama_cpp is not installed: pip install llama-cpp-python"):
        engines.create("llama_cpp", {}, shared("smollm"))
