"""Graphs over static rows, without a GPU: what they replay depends on nothing but buffers and lengths on the device."""

from __future__ import annotations

import gc
import time
import weakref
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import runtime
from zbench import run, scenario
from zbench.engines import Shared, create, launches, lossless
from zbench.engines.autoregressive import Autoregressive
from zbench.engines.base import PREFILL_ROWS, Meter, Request, prefill, prefill_width
from zbench.engines.dflash import DFlash
from zbench.engines.diffusion import prefill_and_draft
from zbench.engines.eagle3 import Eagle3
from zbench.engines.sampling import Sampling
from zbench.engines.synthetic import parse
from zbench.hardware.device import resolve
from zbench.kernels import cpu
from zbench.models import dflash, eagle3, execution, loading
from zbench.models.adapter import MaskAdapter, random_adapter
from zbench.models.execution import SMALL, SMALLEST_SPAN, ExecutionUnavailable, Graphs, Run, roomy, rounded
from zbench.models.rows import Rows
from zbench.models.shard import Shard
from zbench.models.team import ALONE, Team
from zbench.ranks import Member, World


class Recording(TorchDispatchMode):
    """Refuses what waits for the device or comes from the host, as a GPU does while it records."""

    REFUSED = ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            t.dtype == torch.bool for given in args if isinstance(given, list) for t in given if t is not None
        )
        if by_mask or name.startswith(self.REFUSED):
            raise RuntimeError(f"{name} not permitted when stream is capturing")
        return func(*args, **(kwargs or {}))


def again(run: Run) -> Run:
    """In place of a GPU's graph: the same operators on the same buffers. `run` sees the arena's own cache, whose sizes
    on the host stay 0, so that a forward that looked at them would be wrong."""
    with Recording():
        run()
    return run


def ids_of(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 290, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["smollm", "mistral", "qwen3", "zaya"])
def test_graphs_on_static_rows_give_what_fresh_rows_give_bit_by_bit(family: str) -> None:
    eager, recorded = runtime(family, "eager"), runtime(family, "eager")
    recorded.graphs = Graphs(recorded, again)
    adapter = None
    if family == "qwen3":
        adapter = MaskAdapter(random_adapter(eager.config, block=4), eager.config, eager.dtype, eager.device)
    cache = recorded.new_cache(2, 60)
    plain = eager.empty_cache(2, cache.capacity)

    def both(rows: Rows, logits: torch.Tensor | None = None, capture: tuple[int, ...] = ()) -> None:
        span = min(rounded(max(plain.sizes) + rows.ids.shape[1]), plain.capacity)
        used = adapter if rows.masks is not None else None
        got = recorded.forward(rows, cache, logits=logits, capture=capture, adapter=used)
        with torch.inference_mode():
            exact = eager.body(rows, plain, logits, capture, used, max(plain.sizes) + rows.ids.shape[1])
            want = eager.body(rows, plain, logits, capture, used, span)
        assert torch.equal(got.logits, want.logits)
        assert all(torch.equal(got.hidden[index], want.hidden[index]) for index in capture)
        torch.testing.assert_close(got.logits, exact.logits, rtol=1e-4, atol=1e-4)

    def extended(counts: list[int]) -> None:
        cache.extend(counts), plain.extend(counts)
        assert torch.equal(cache.lengths, plain.lengths)

    both(Rows.chain(ids_of(2, 9, seed=0), cache.lengths), torch.tensor([[8], [3]]), capture=(0, 2, 3))
    extended([9, 4])
    for step in range(3):  # the same graph at three contexts
        both(Rows.chain(ids_of(2, 1, seed=step), cache.lengths))
        extended([1, 1 - step % 2])
    for seed in (1, 2):
        parents = torch.tensor([[-1, 0, 0, 1, 2], [-1, 0, 1, 1, 0]] if seed == 1 else [[-1, 0, 1, 2, 0]] * 2)
        both(Rows.tree(ids_of(2, 5, seed=seed), cache.lengths, parents), capture=(1,))
        kept, counts = torch.tensor([[0, 2, 4], [0, 4, -1]] if seed == 1 else [[0, 1, -1], [0, -1, -1]]), [3, 2]
        counts = counts if seed == 1 else [2, 1]
        cache.commit(kept, counts), plain.commit(kept, counts)
    for seed, outcomes in ((5, (1, 3)), (6, (1, 3)), (7, (2, 3))):
        rows = Rows.draft_and_verify(ids_of(2, 3, seed=seed), cache.lengths, 4, outcomes, mask=299)
        both(rows, torch.tensor([[0, 1, 2]] * 2) if seed < 7 else None)
        extended([2, 1])
    assert torch.equal(cache.keys, plain.keys) and torch.equal(cache.values, plain.values)
    kinds = [record.what for record in recorded.prepared]
    assert len(kinds) == len(set(kinds)) == 5  # prefill, step, tree, and two of masks

    # Its memory goes to the next cache of the size, empty, and so do the graphs; one that is in use keeps its own.
    address = cache.keys.data_ptr()
    other = recorded.new_cache(2, 60)
    assert other.keys.data_ptr() != address
    del cache
    cache = recorded.new_cache(2, 50)
    plain = eager.empty_cache(2, cache.capacity)
    assert cache.keys.data_ptr() == address and cache.sizes == [0, 0] and not cache.lengths.any()
    both(Rows.chain(ids_of(2, 1, seed=11), cache.lengths))
    assert len(recorded.prepared) == 5


@given(st.integers(1, 200_000))
def test_spans_waste_an_eighth_at_most_and_are_few(tokens: int) -> None:
    span = rounded(tokens)
    assert tokens <= span <= max(execution.SMALLEST_SPAN, tokens * 9 / 8 + 1)
    assert rounded(span) == span and rounded(tokens + 1) >= span


def test_there_are_eight_spans_for_each_doubling() -> None:
    assert len({rounded(tokens) for tokens in range(1025, 4097)}) == 16


def test_what_cannot_be_recorded_or_compiled_says_so() -> None:
    eager = runtime("smollm", "eager")
    with pytest.raises(ExecutionUnavailable, match="needs a GPU with CUDA or HIP, the device is cpu"):
        eager.executed("graph")
    with pytest.raises(ExecutionUnavailable, match="compiled is for dense transformers"):
        runtime("zaya", "compiled")

    def failing(run: Run) -> Run:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    eager.graphs = Graphs(eager, failing)
    cache = eager.new_cache(1, 8)
    with pytest.raises(ExecutionUnavailable, match=r"no graph of 1 x 2 rows.*not permitted when stream is capturing$"):
        eager.forward(Rows.chain(torch.tensor([[1, 2]]), cache.lengths), cache)


# --- Drafters ---


class Seeing(Meter):
    """Keeps what was drafted."""

    def __init__(self) -> None:
        super().__init__(resolve("cpu"))
        self.drafts: list[Any] = []

    def forward(self, model: Any, role: Any, rows: Rows, *arguments: Any, **options: Any) -> Any:
        if role == "verify":
            tree = None if rows.causal else (rows.positions.tolist(), rows.visible.tolist())
            self.drafts.append((rows.ids.tolist(), rows.parents.tolist(), tree))
        return super().forward(model, role, rows, *arguments, **options)


def wide(stored: Any) -> dict[str, torch.Tensor]:
    """Ten times the weights, so that drafts differ from one context to the next."""
    return {n: t if t.dim() == 1 or not t.is_floating_point() else 10 * t for n, t in stored.tensors.items()}


def engine_on(execution: str, name: str, options: dict[str, Any]) -> Any:
    model = runtime("smollm", "eager")
    if execution == "graph":
        model.execution, model.graphs = "graph", Graphs(model, again)
    if name == "dflash":
        stored = dflash.random_drafter(model.config, layers=2, block=options["block"])
        return DFlash(model, dflash.DFlashDrafter(stored.config, wide(stored), model), **options)
    drafter = eagle3.random_drafter(model.config, 0, 64)
    beside = model.graphs.beside() if model.graphs else None
    args = (drafter.config, wide(drafter), model.embedding, model.dtype)
    return Eagle3(model, eagle3.Eagle3Drafter(*args, native=False, graphs=beside), **options)


DRAFTS: list[tuple[str, dict[str, Any], int]] = [
    ("dflash", {"block": 5}, 2),  # with a block to read, and without at first
    ("dflash", {"block": 4, "draft_sampling": True}, 2),
    ("dflash", {"block": 4, "tokens": 7}, 2),
    ("eagle3", {"depth": 1}, 1),
    ("eagle3", {"depth": 4}, 1),
    ("eagle3", {"depth": 3, "top_k": 3, "beam": 1, "tokens": 5}, 1),
    ("eagle3", {"depth": 3, "top_k": 3, "tokens": 8}, 1),
    ("eagle3", {"depth": 3, "top_k": 4, "beam": 2, "tokens": 9}, 1),
]
LENGTH = {"length": 2.5}  # accepted by chance, so that steps differ in what they leave to be read


@pytest.mark.parametrize(("name", "options", "graphs"), DRAFTS, ids=str)
@pytest.mark.parametrize("mode", ["greedy", "sampled", "synthetic"])
def test_recorded_drafts_are_those_of_fresh_operators(
    name: str, options: dict[str, Any], graphs: int, mode: str
) -> None:
    depth = options["block"] - 1 if "block" in options else options["depth"]
    if mode == "synthetic" and depth > 1:
        options = {**options, "synthetic": parse(LENGTH, depth)}
    eager, recorded = (engine_on(execution, name, options) for execution in ("eager", "graph"))
    assert recorded.kernels["drafter"] == "torch, graph"
    prompts = [ids_of(size, seed=size).tolist() for size in (9, 4, 17, 2)]
    for batch in (1, 2):
        recorded.model.prepared.clear()
        for first in (0, 2, 1):  # one request after another
            request = Request(24, Sampling(0.8 if mode == "sampled" else 0.0), (3, 4)[:batch])
            found = []
            for engine in (eager, recorded):
                meter = Seeing()
                generated = engine.generate(prompts[first : first + batch], request, meter)
                found.append((generated.outputs, meter.drafts))
            assert found[0] == found[1]
            assert len(found[0][1]) > 5
            if "synthetic" in options:
                assert len({count for step in meter.records()[0][1:] for count in step.committed}) > 1
        drafts = [record.what for record in recorded.model.prepared if "draft" in record.what]
        assert len(drafts) == graphs and all(f"{batch} x" in what for what in drafts)


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "eagle3": [{"depth": 1}, {"depth": 4}, {"depth": 3, "top_k": 3, "beam": 1, "tokens": 5}, {"depth": 3, "top_k": 3}],
    "dflash": [{"block": 5}, {"block": 3}, {"block": 5, "tokens": 7}, {"block": 4, "lookup": 1}],
    "diffusion": [{"block_size": 4}, {"block_size": 4, "proposals": 2}, {"block_size": 3, "tokens": 5}],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_share_a_recorded_drafter_draft_what_each_drafts_with_its_own(name: str) -> None:
    kind = "adapter" if name == "diffusion" else "drafter"
    source = {kind: {"zoo": f"zbench-tiny-{'tidar' if name == 'diffusion' else name}"}, "execution": "eager"}

    def recording() -> Shared:
        shared = Shared(loading.load("zbench-tiny", "float32"), torch.float32, resolve("cpu"))
        target = shared.target("eager")
        target.execution, target.graphs = "graph", Graphs(target, again)  # type: ignore[misc,arg-type]
        return shared

    def engine(options: dict[str, Any], by: Shared) -> Any:
        return create(name, scenario.ENGINES[name](name=name, **source, **options).options, by)

    shared = recording()
    alone = [engine(options, recording()) for options in SETTINGS[name]]
    together = [engine(options, shared) for options in SETTINGS[name]]
    assert len({id(getattr(each, kind)) for each in together}) == 1
    prompts = [ids_of(size, seed=size).tolist() for size in (9, 4, 17, 2)]
    pairs = list(zip(alone, together, strict=True))
    for batch, first in ((1, 0), (2, 1), (1, 2)):
        for pair in (*pairs, *reversed(pairs)):
            found = []
            for each in pair:
                meter, request = Seeing(), Request(20, Sampling(), (3, 4)[:batch])
                found.append((each.generate(prompts[first : first + batch], request, meter).outputs, meter.drafts))
            assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "options", "graphs"),
    [
        ("eagle3", {"depth": 3, "lookup": 1}, 1),
        ("eagle3", {"depth": 2, "top_k": 3, "tokens": 8, "lookup": 1}, 1),
        ("dflash", {"block": 4, "lookup": 1}, 2),
        ("dflash", {"block": 3, "tokens": 7, "lookup": 1}, 2),
    ],
    ids=str,
)
def test_lookups_beside_recorded_drafts_are_those_beside_fresh_operators(
    name: str, options: dict[str, Any], graphs: int
) -> None:
    eager, recorded = (engine_on(execution, name, options) for execution in ("eager", "graph"))
    phrase = ids_of(6, seed=1).tolist()
    prompts = [phrase + ids_of(size, seed=size).tolist() + phrase[:3] for size in (9, 4, 17)]
    for batch in (1, 3):
        recorded.model.prepared.clear()
        found = []
        for engine in (eager, recorded):
            meter = Seeing()
            generated = engine.generate(prompts[:batch], Request(40, Sampling(), (3,) * batch), meter)
            found.append((generated.outputs, meter.drafts, [step.looked_up for step in meter.records()[0]]))
        assert found[0] == found[1]
        copied = [any(looked_up) for looked_up in found[0][2][1:]]
        assert any(copied)
        drafts = [record.what for record in recorded.model.prepared if "draft" in record.what]
        assert len(drafts) <= graphs  # whatever lengths were looked up


@pytest.mark.parametrize(("options", "rows"), [({"depth": 3}, 4 + 2), ({"depth": 3, "top_k": 2, "tokens": 6}, 4 + 4)])
def test_a_recorded_draft_is_one_forward_that_costs_what_its_levels_cost(options: dict[str, Any], rows: int) -> None:
    engine, meter = engine_on("graph", "eagle3", options), Meter(resolve("cpu"))
    engine.generate([[5, 6, 7, 8, 9]], Request(2, Sampling(), (0,)), meter)
    drafts = [f for f in meter.records()[1] if f.role == "draft"]
    assert [(f.rows, f.context, f.passes) for f in drafts] == [(4, 0, 1), (rows, 4, 3)]
    beam = 1 if rows == 6 else 2
    first = engine.drafter.cost(4, [4], 1, 10, True)
    more = [engine.drafter.cost(beam, [5], beam, beam * level, False) for level in (1, 2)]
    assert drafts[1].flops == first.flops + sum(each.flops for each in more)
    assert drafts[1].bytes_read == first.bytes_read + sum(each.bytes_read for each in more)


SCENARIO = """
name: modes
model: {config: {family: llama, layers: 2, width: 64, ffn: 96, heads: 4, kv_heads: 2, vocab: 304, max_positions: 256},
  weights: random}
dtype: float32
device: cpu
engines:
  - {name: autoregressive, execution: MODE, label: MODE}
  - {name: autoregressive, execution: eager, label: eager}
  - {name: eagle3, drafter: {random: true}, depth: 2, top_k: 2, execution: MODE}
  - {name: dflash, drafter: {random: true, layers: 1}, block: 3, execution: MODE}
  - {name: dflash, drafter: {random: true, layers: 1}, block: 3, tokens: 4, execution: MODE}
  - {name: diffusion, block_size: 3, proposals: 2, adapter: {random: true}, execution: MODE}
  - {name: diffusion, block_size: 3, tokens: 3, proposals: 2, adapter: {random: true}, execution: MODE}
prompts: {set: quickstart, limit: 2}
context: 12
output_tokens: 8
repeats: 1
threads: 1
telemetry: off
warmup: {prompts: 0}
"""


def measured(mode: str, tmp_path: Any) -> tuple[Any, list[Any]]:
    path = tmp_path / "modes.yaml"
    path.write_text(SCENARIO.replace("MODE", mode))
    return run.in_memory(scenario.load(path, ()))


def every_engine_emits_the_same(records: list[Any]) -> None:
    assert [record.error for record in records if record.error] == []
    for group in (0, 1):
        outputs = {record.requests[0].output_ids for record in records if record.group == group}
        assert len(outputs) == 1
    assert all(request.check.verdict == "exact" for record in records for request in record.requests)


def test_all_engines_decode_on_graphs_and_no_capture_is_in_a_measured_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(execution, "record_on", lambda device: again)
    decodes: list[int] = []
    monkeypatch.setattr(launches, "count", lambda *_: {})  # so that the trials themselves meet what is not captured yet
    plain = run.Meter
    monkeypatch.setattr(run, "Meter", lambda *given: decodes.append(1) or plain(*given))
    _, records = measured("graph", tmp_path)
    every_engine_emits_the_same(records)
    first = [record for record in records if record.prepared]
    assert {p.kind for record in first for p in record.prepared} == {"capture"}
    assert len(decodes) == len(records) + len(first)  # each of these was decoded twice
    assert not any(record.prepared for record in records if record.cell == "eager")


def test_what_is_recorded_while_engines_warm_up_counts_for_the_engine_that_needed_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(execution, "record_on", lambda device: again)
    path = tmp_path / "modes.yaml"
    path.write_text(SCENARIO.replace("execution: MODE, label: MODE", "execution: eager").replace("MODE", "graph"))
    _, records = run.in_memory(scenario.load(path, ()))
    assert not any(record.error for record in records)
    recorded = {
        record.cell.partition("-")[0]: [p.what for p in record.prepared] for record in records if record.prepared
    }
    assert set(recorded) == {"eagle3", "dflash", "diffusion"}
    assert any("DFlash" in what for what in recorded["dflash"])
    assert not any("DFlash" in what for what in recorded["eagle3"] + recorded["diffusion"])


# --- What auto is on a GPU, played by the CPU ---


def on_gpu() -> Shared:
    shared = Shared(loading.load("zbench-tiny", "float32"), torch.float32, resolve("cpu"))
    shared.device = SimpleNamespace(type="cuda", torch=torch.device("cpu"))  # type: ignore[assignment]
    return shared


def test_auto_on_a_gpu_is_graphs_on_the_weights_of_what_reads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "record_on", lambda device: again)
    shared = on_gpu()
    target = shared.target("auto")
    assert target is shared.target("graph") and target.execution == "graph"
    assert [record.what for record in shared.prepared()] == ["1 x 1 rows, all logits, 256 slots"]
    assert shared.reader is shared.target("eager") and shared.reader.execution == "eager"
    assert shared.reader.embedding.data_ptr() == target.embedding.data_ptr()
    assert create("autoregressive", {"execution": "auto"}, shared).kernels["forward"] == "torch, graph"
    gone = weakref.ref(target)
    del target
    shared.release()
    assert gone() is None  # before the next model is loaded beside it
    assert shared.target("auto").execution == "graph"


def test_where_no_graph_can_be_recorded_auto_is_eager_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(run: Run) -> Run:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(execution, "record_on", lambda device: refused)
    shared, said = on_gpu(), list[str]()
    shared.say = said.append
    for released in (False, False, True):
        if released:
            shared.release()
        engine = create("autoregressive", {"execution": "auto"}, shared)
        assert (engine.kernels["forward"], shared.target("auto").execution) == ("torch", "eager")
        assert "not permitted when stream is capturing" in engine.kernels["why_no_graphs"]
    assert len(said) == 2 and said[0].startswith("launching operators one by one: no graph of 1 x 1 rows")
    with pytest.raises(ExecutionUnavailable):  # asked for, it is what was asked for or nothing
        execution.probe(shared.target("graph"))


def test_what_must_not_be_graphs_is_eager_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(execution, "record_on", lambda device: again)
    shared = on_gpu()
    shared.why_no_graphs = "they are not wanted"
    assert shared.target("auto").execution == "eager"
    assert shared.target("auto").kernels["why_no_graphs"] == "they are not wanted"
    shared = on_gpu()
    shared.team = Team(Shard(0, 2), group=object())
    monkeypatch.setattr(Team, "kernels", {})
    assert shared.target("auto").execution == "eager"
    assert shared.target("auto").kernels["why_no_graphs"] == "graph runs on one rank only"


@pytest.mark.parametrize(("spread", "alike"), [("tensor", True), ("data", False)])
def test_points_of_a_run_with_sharded_ones_are_run_alike(spread: str, alike: bool, tmp_path: Any) -> None:
    path = tmp_path / "modes.yaml"
    path.write_text(
        SCENARIO.replace("execution: MODE", "execution: eager") + f"matrix: {{parallel.{spread}: [1, 2]}}\n"
    )
    world = World(0, 2, _teams={(1, 1): Member(), (2, 1): Member(), (1, 2): Member()})
    points = run.prepare(scenario.load(path, ()), lambda _: None, world=world)
    assert [bool(point.shared.why_no_graphs) for point in points] == [alike, alike]


@pytest.mark.parametrize("family", ["smollm", "mistral", "qwen3", "zaya"])
def test_prompts_of_many_lengths_are_read_in_forwards_of_few_sizes(family: str) -> None:
    eager, recorded = runtime(family, "eager"), runtime(family, "eager")
    recorded.graphs = Graphs(recorded, again)
    for sizes in [(size,) for size in range(2, 40)] + [(9, 40, 3), (17, 2, 31)]:
        prompts = [ids_of(size, seed=size).tolist() for size in sizes]
        request = Request(4, Sampling(), (0,) * len(sizes))
        found = []
        for model in (eager, recorded):
            meter = Meter(resolve("cpu"))
            found.append(Autoregressive(model).generate(prompts, request, meter).outputs)
        assert found[0] == found[1]
        assert meter.records()[1][0].rows == -(-max(sizes) // 16) * 16
    assert len(recorded.prepared) == 3 + 1 + (2 + 1)  # 16, 32 and 48 rows and a decode; of three 48, 32 and one


def test_the_check_of_what_was_emitted_is_read_by_operators(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(execution, "record_on", lambda device: again)
    shared = on_gpu()
    request, prompt = Request(6, Sampling(), (0,)), [5, 6, 7]
    [output] = create("autoregressive", {"execution": "auto"}, shared).generate([prompt], request, Seeing()).outputs
    assert shared.prepared()
    assert lossless.check(shared.reader, prompt, output, request, 0).verdict == "exact"
    assert not shared.prepared()
    readers: list[Any] = []
    monkeypatch.setattr(Shared, "reader", property(lambda of: readers.append(of) or of.target("eager")))
    _, records = measured("graph", tmp_path)
    every_engine_emits_the_same(records)
    assert len(readers) == 2  # outputs of other engines are the same: one check of each prompt


@pytest.mark.parametrize("size", [250, 240, 256])
def test_rows_behind_a_prompt_are_as_many_as_the_cache_has_room_for(size: int) -> None:
    model = runtime("smollm", "eager")
    model.graphs = Graphs(model, again)
    prompt, meter = ids_of(size, seed=1).tolist(), Meter(resolve("cpu"))
    with meter.step():
        _, hidden = prefill(model, model.new_cache(1, size), [prompt], meter, (2,))
        if size <= 252:
            prefill_and_draft(model, model.new_cache(1, size + 4), [prompt], 4, 299, meter)
        meter.gained((1,))
    assert hidden[2].shape[1] == size
    assert [forward.rows for forward in meter.records()[1]] == [256, min(256, size + 16)][: 1 + (size <= 252)]


def test_short_memory_is_no_reason_to_call_graphs_unavailable() -> None:
    def short(run: Run) -> Run:
        raise torch.OutOfMemoryError("short")

    model = runtime("smollm", "eager")
    model.graphs = Graphs(model, short)
    with pytest.raises(torch.OutOfMemoryError):
        execution.probe(model)


@given(st.integers(1, 40_000))
def test_the_last_forward_of_a_prompt_has_one_of_sixteen_sizes(tokens: int) -> None:
    width = prefill_width(tokens)
    whole = (tokens - 1) // PREFILL_ROWS * PREFILL_ROWS
    sizes = {prefill_width(size) for size in range(1, PREFILL_ROWS + 1)}
    assert len(sizes) == 16
    assert tokens <= width and width - whole in sizes
    assert width - tokens < max(16, (tokens - whole) / 4)


@given(st.integers(1, 64), st.integers(1, 40_000))
def test_small_caches_have_few_capacities_and_large_ones_waste_an_eighth(batch: int, tokens: int) -> None:
    capacity = roomy(batch, tokens)
    assert capacity >= tokens
    if batch * capacity > 2 * SMALL:
        assert capacity == rounded(tokens)
    elif batch * tokens <= SMALL // 2 and tokens >= SMALLEST_SPAN:
        assert capacity.bit_count() == 1


def test_short_memory_is_spared_what_recorded_graphs_hold_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "record_on", lambda device: again)
    shared = on_gpu()
    graphs = shared.target("auto").graphs
    assert graphs is not None
    used = graphs.new_cache(1, 600)
    tried: list[int] = []

    def hungry(wanted: int) -> str:
        tried.append(len(graphs._arenas))
        cache = graphs.new_cache(1, 300)
        if len(tried) <= wanted:
            raise torch.OutOfMemoryError(f"no {cache.capacity} left")
        return "done"

    assert shared.sparing(lambda: hungry(1)) == "done"
    assert tried == [2, 1]  # that of the probe is gone, that in use is not, nor was the failure's own kept alive
    assert used.keys.data_ptr() in graphs._arenas
    del tried[:], used
    with pytest.raises(torch.OutOfMemoryError, match="no 512 left"):
        shared.sparing(lambda: hungry(9))
    assert tried == [2, 0]  # once more and not for ever, though each leaves memory behind that nobody has


def test_a_recorded_cache_is_handed_on_as_new_as_a_fresh_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in (engine_on("graph", "eagle3", {"depth": 2, "top_k": 2}), engine_on("graph", "dflash", {"block": 3})):
        cache = engine.model.new_cache(1, 40)
        drafts = engine.drafter.new_cache(1, 40, 2) if isinstance(engine, Eagle3) else engine.drafter.new_cache(1, 40)
        places = [(each.keys.data_ptr(), each.values) for each in (cache, drafts)]
        for each in (cache, drafts):
            each.keys.fill_(float("nan")), each.values.fill_(float("nan"))
        del cache, drafts, each
        [output] = engine.generate([[5, 6, 7]], Request(8, Sampling(), (0,)), Seeing()).outputs
        assert any(output) and all(values.isfinite().all() for _, values in places)


def test_where_a_cache_does_not_fit_the_one_unused_for_longest_makes_room() -> None:
    model = runtime("smollm", "eager")
    graphs = model.graphs = Graphs(model, again)
    for size in (256, 512, 1024, 256):  # each is idle at once, the first is handed out once more
        graphs.new_cache(1, size)
    kept = graphs.new_cache(1, 2048)

    def make() -> Any:
        if len(graphs._arenas) > 3:
            raise torch.OutOfMemoryError("short")
        return model.empty_cache(1, 300)

    made = graphs.cache((1, 300), make)
    assert sorted(size for _, size in (arena.size for arena in graphs._arenas.values())) == [256, 300, 1024, 2048]  # type: ignore[misc]
    with pytest.raises(torch.OutOfMemoryError):
        graphs.cache((1, 301), lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("never")))
    assert {id(arena.user()) for arena in graphs._arenas.values()} == {id(kept), id(made)}


def test_memory_that_graphs_hold_for_others_is_no_ones_peak() -> None:
    model = runtime("smollm", "eager")
    graphs = model.graphs = Graphs(model, again)
    others = graphs.new_cache(1, 256)
    size = sum(t.nbytes for t in (others.keys, others.values, others.lengths))
    del others
    beside = graphs.beside()
    beside.cache("drafts", lambda: model.empty_cache(1, 256))
    since = time.perf_counter()
    assert graphs.unused(since) == 2 * size
    graphs.new_cache(1, 512)
    assert graphs.unused(since) == 2 * size
    graphs.new_cache(1, 256)
    assert graphs.unused(since) == size


def test_where_an_engine_cannot_be_recorded_all_run_operators(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def picky(run: Run) -> Run:
        out = run()
        if isinstance(out, tuple) and out[0].logits.shape[1] == 5:  # of a tree of 4 tokens
            raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")
        return run

    monkeypatch.setattr(execution, "record_on", lambda device: picky)
    wanted = tmp_path / "modes.yaml"
    wanted.write_text(SCENARIO.replace("prompts: 0}", "prompts: 1, output_tokens: 4}").replace("MODE", "auto"))
    [point] = run.prepare(scenario.load(wanted, ()), lambda _: None)
    said: list[str] = []
    point.shared.device, point.shared.say = SimpleNamespace(type="cuda", torch=torch.device("cpu")), said.append  # type: ignore[assignment]
    cells = [cell for cell in point.cells if cell.label in ("auto", "eagle3")]
    assert {engine.kernels["forward"] for engine in run._ready(point, cells).values()} == {"torch, graph"}  # type: ignore[union-attr]
    built = run._ready(point, point.cells)
    assert not [engine for engine in built.values() if isinstance(engine, Exception)]
    assert {engine.kernels["forward"] for engine in built.values()} == {"torch"}  # type: ignore[union-attr]
    assert len(said) == 1 and "Cannot copy between CPU and CUDA" in said[0]


class Streams:
    """In place of `torch.cuda`: which stream and device are current, and what is recorded on which."""

    def __init__(self) -> None:
        self.current, self.device_now, self.recorded, self.pools = "usual", "0", list[Any](), 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Replayed)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", self._pool)
        monkeypatch.setattr(torch.cuda, "stream", lambda other: self._within("current", "ahead"))
        monkeypatch.setattr(torch.cuda, "device", lambda device: self._within("device_now", str(device.index)))
        monkeypatch.setattr(torch.cuda, "graph", self._graph)

    def _pool(self) -> int:
        self.pools += 1
        return self.pools

    @contextmanager
    def _within(self, name: str, value: str) -> Any:
        before = getattr(self, name)
        setattr(self, name, value)
        try:
            yield
        finally:
            setattr(self, name, before)

    @contextmanager
    def _graph(self, graph: Any, pool: int, stream: Any) -> Any:
        """As torch's: where the capture cannot be ended, its stream stays the current one."""
        self.recorded.append((self.device_now, self.current, pool))
        self.current = "capture"
        try:
            yield
        except Exception:
            raise ValueError("operation failed due to a previous error during capture")  # noqa: B904
        self.current = "ahead"


class Replayed:
    def replay(self) -> None:
        pass


def test_recording_is_on_the_stream_and_device_of_the_model_and_leaves_torch_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = Streams()
    streams.install(monkeypatch)
    record = execution.record_on(torch.device("cuda:1"))
    seen: list[tuple[str, str]] = []

    def run() -> int:
        seen.append((streams.device_now, streams.current))
        return len(seen)

    first = record(run)
    assert seen == [("1", "ahead"), ("1", "capture")] and streams.recorded == [("1", "ahead", 1)]
    assert first() == 2 and len(seen) == 2  # a replay gives what was recorded, and runs nothing
    record(run)
    assert streams.recorded[-1][2] == 1, "graphs that are alive share a pool"
    del first
    gc.collect()
    third = record(run)
    assert streams.recorded[-1][2] == 2, "the pool of graphs that are all gone is not used again"
    assert (streams.device_now, streams.current) == ("0", "usual") and third() == len(seen)


@pytest.mark.parametrize("error", [RuntimeError("this is why"), torch.OutOfMemoryError("this is why")])
@pytest.mark.parametrize("ahead", [True, False])
def test_a_recording_that_fails_says_why_and_leaves_torch_as_it_was(
    monkeypatch: pytest.MonkeyPatch, error: Exception, ahead: bool
) -> None:
    streams = Streams()
    streams.install(monkeypatch)

    def run() -> None:
        if ahead or streams.current == "capture":
            raise error

    with pytest.raises(type(error), match="this is why"):
        execution.record_on(torch.device("cuda:1"))(run)
    assert (streams.device_now, streams.current) == ("0", "usual")


@pytest.mark.parametrize(("error", "tries"), [(torch.OutOfMemoryError, 2), (ExecutionUnavailable, 1)])
def test_an_engine_that_failed_holds_no_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, error: type[Exception], tries: int
) -> None:
    monkeypatch.setattr(execution, "record_on", lambda device: again)

    def failing(engine: Any, prompts: Any, request: Request, meter: Meter) -> Any:
        with (own := Seeing()).step():
            state = engine.start(prompts, request, own)  # in this frame, while it is known
        kept.append(weakref.ref(state.cache))
        try:
            raise RuntimeError("not now")
        except RuntimeError as cause:
            raise error("failed") from cause

    kept: list[Any] = []
    monkeypatch.setattr(DFlash, "generate", failing)
    path = tmp_path / "modes.yaml"
    path.write_text(SCENARIO.replace("prompts: 0}", "prompts: 1, output_tokens: 4}").replace("MODE", "graph"))
    [point] = run.prepare(scenario.load(path, ()), lambda _: None)
    built = run._ready(point, point.cells)
    assert sum(isinstance(engine, Exception) for engine in built.values()) == 2
    assert len(kept) == 2 * tries and not any(cache() for cache in kept)


@pytest.mark.parametrize("where", ["warm-up", "decode", "check"])
def test_an_engine_short_of_memory_is_measured_without_what_others_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, where: str
) -> None:
    monkeypatch.setattr(execution, "record_on", lambda device: again)
    monkeypatch.setattr(launches, "count", lambda *_: {})
    plain, failed = DFlash.generate, list[int]()

    def failing(engine: Any, prompts: Any, request: Request, meter: Meter) -> Any:
        if not failed and (request.limit == 8) == (where == "decode"):
            failed.append(len(engine.model.graphs._arenas))
            raise torch.OutOfMemoryError("short")
        return plain(engine, prompts, request, meter)

    plainly = lossless.check

    def checking(*given: Any) -> Any:
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("short")
        return plainly(*given)

    if where == "check":
        monkeypatch.setattr(lossless, "check", checking)
    else:
        monkeypatch.setattr(DFlash, "generate", failing)
    path = tmp_path / "modes.yaml"
    path.write_text(SCENARIO.replace("prompts: 0}", "prompts: 1, output_tokens: 4}").replace("MODE", "graph"))
    _, records = run.in_memory(scenario.load(path, ()))
    assert failed
    every_engine_emits_the_same(records)


class Dispatched(TorchDispatchMode):
    """Operators below autograd that make or change a tensor: another count of what torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or "empty" in str(func) or "_unsafe_view" in str(func))
        return func(*args, **(kwargs or {}))


def launched(of: Any) -> int:
    request = Request(3, Sampling(), (0,))
    found = launches.count(Autoregressive(of), [[5, 6, 7]], request, resolve("cpu"), ALONE)
    read = 3 if of.graphs is None else 16
    assert set(found) == {("target", "prefill", read), ("target", "decode", 1)}
    return found["target", "decode", 1]


def test_launches_are_those_that_torch_dispatches_and_a_graph_has_few() -> None:
    eager, recorded = runtime("smollm", "eager"), runtime("smollm", "eager")
    recorded.graphs = Graphs(recorded, again)
    cache, dispatched = eager.new_cache(1, 8), Dispatched()
    with dispatched:
        eager.forward(Rows.chain(torch.tensor([[5]]), cache.lengths), cache)
    found = launched(eager)
    assert 0.8 < found / dispatched.count < 1.3
    assert 60 < found < 200
    if cpu.available():
        assert launched(runtime("smollm", "native")) <= 12  # one call, and the indices of the rows that want logits


def test_launches_are_counted_on_a_graph_that_is_there_and_not_while_it_is_recorded() -> None:
    fresh, ready = runtime("smollm", "eager"), runtime("smollm", "eager")
    for model in (fresh, ready):
        model.graphs = Graphs(model, again)
    launched(ready)
    assert launched(fresh) == launched(ready)


def test_what_the_first_forward_of_a_kind_does_once_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = runtime("smollm", "eager")
    usual, forward, calls = launched(model), model.forward, 0

    def prepares(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        for _ in range(9 if calls <= 2 else 0):  # the prompt's, and the first that decodes
            torch.ones(4).add_(1)
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", prepares)
    assert launched(model) == usual


def test_one_graph_serves_every_context_where_attention_needs_no_span() -> None:
    model = runtime("smollm", "eager")
    for spans, graphs in ((True, 2), (False, 1)):
        model.prepared.clear()
        model.graphs = Graphs(model, again, spans)
        cache = model.new_cache(1, 600)
        for _ in range(2):
            model.forward(Rows.chain(ids_of(1, 250, seed=0), cache.lengths), cache)
            cache.extend([250])
        assert len(model.prepared) == graphs


@pytest.mark.slow
def test_all_engines_decode_with_compiled_layers_and_their_tokens_are_the_targets(tmp_path: Any) -> None:
    """About a minute of one core, nearly all of it torch's compiler."""
    _, records = measured("compiled", tmp_path)
    every_engine_emits_the_same(records)
    compiled = [p for record in records for p in record.prepared]
    assert {p.kind for p in compiled} == {"compile"} and sum(p.seconds for p in compiled) > 1
    eager = runtime("smollm", "eager")
    fast = eager.executed("compiled")
    caches = [each.new_cache(2, 40) for each in (eager, fast)]
    for count in (9, 1, 4):
        ids = ids_of(2, count, seed=count)
        outs = [m.forward(Rows.chain(ids, c.lengths), c).logits for m, c in zip((eager, fast), caches, strict=True)]
        assert (outs[1] - outs[0]).abs().max() <= 1e-5 * outs[0].abs().max()
        for cache in caches:
            cache.extend([count, count - 1])
    assert 0 < len(fast.prepared) <= 3
