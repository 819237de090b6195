"""Measured roofs: past the caches, best of several implementations, kept by what they depend on."""

import json
import weakref
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zbench.errors import UserError
from zbench.hardware import roofs
from zbench.hardware.device import Device, resolve
from zbench.hardware.roofs import load_or_measure, measure
from zbench.records import RoofSample

MIB, GIB = 2**20, 2**30
CPU = resolve("cpu")


@pytest.fixture
def small_and_quick(monkeypatch, tmp_path):
    """Real measurements of a size that says nothing about the machine but takes no time."""
    monkeypatch.setenv("ZBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(roofs, "_SIZES", {"cpu": (32, 64)})
    monkeypatch.setattr(roofs, "_SMALLEST_BUFFER_BYTES", {"cpu": 4 * MIB})
    monkeypatch.setattr(roofs, "_last_level_cache_bytes", lambda device: MIB)
    monkeypatch.setattr(roofs, "_native", lambda device: None)
    monkeypatch.setattr(roofs, "_READ_AGAIN_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(roofs, "_SWEEP_SECONDS", 0.001)


@pytest.fixture
def counted_measurements(monkeypatch, small_and_quick):
    """`measure` replaced by one that only notes for which dtypes it ran."""
    calls = []

    def fake(device, dtypes, progress=None):
        calls.append(tuple(dtypes))
        return {"run": len(calls), "flops": {dtype: {"value": 1.0} for dtype in dtypes}, "caches": {"sweep": []}}

    monkeypatch.setattr(roofs, "measure", fake)
    return calls


def test_roofs_survive_json_and_carry_their_unit_spread_and_count(small_and_quick):
    result = measure(CPU, ("float32",), budget_seconds=0.2)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    figures = [*result["bandwidth"].values(), *result["flops"].values()]
    assert len(figures) == 4
    for figure in figures:
        assert 0 < figure["low"] <= figure["value"] <= figure["high"]
        assert figure["n"] >= 5
        assert figure["implementation"]
    assert {f["unit"] for f in result["bandwidth"].values()} == {"B/s"}
    assert result["flops"]["float32"]["unit"] == "FLOP/s"


def test_bytes_follow_the_convention_that_is_stated_beside_them(small_and_quick):
    bandwidth = measure(CPU, (), budget_seconds=0.1)["bandwidth"]
    assert [bandwidth[kind]["bytes"] for kind in ("read", "copy", "triad")] == [4 * MIB, 8 * MIB, 12 * MIB]
    assert all(bandwidth[kind]["convention"] for kind in bandwidth)


def test_the_ridge_is_the_product_rate_over_the_read_bandwidth(small_and_quick):
    result = measure(CPU, ("float32",), budget_seconds=0.1)
    expected = result["flops"]["float32"]["value"] / result["bandwidth"]["read"]["value"]
    assert result["ridge"] == {"float32": expected}


def test_progress_names_what_is_measured(small_and_quick):
    lines = []
    measure(CPU, ("float32",), progress=lines.append, budget_seconds=0.1)
    for what in ("read", "copy", "triad", "float32"):
        assert any(what in line for line in lines)


def test_a_busy_machine_is_noted_in_the_result(small_and_quick, monkeypatch):
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 60.0)
    assert "60% busy" in measure(CPU, (), budget_seconds=0.1)["warning"]
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 1.0)
    assert measure(CPU, (), budget_seconds=0.1)["warning"] is None


def test_an_unknown_dtype_is_refused_with_those_that_are_known():
    with pytest.raises(UserError, match="dtype int3; choose from bfloat16"):
        measure(CPU, ("float32", "int3"))


def test_the_best_implementation_is_the_roof_and_a_hopeless_one_is_dropped_early(small_and_quick, monkeypatch):
    tried = []

    def candidates(device, dtype, size):
        return [("slow", size), ("fast", size)]

    def rates(device, offered, work, seconds):
        tried.append([name for name, _ in offered])
        values = {"slow": 1e9, "fast": 1e12}
        return {name: roofs._Rate(values[name], values[name], values[name], 5) for name, _ in offered}

    monkeypatch.setattr(roofs, "_product_candidates", candidates)
    monkeypatch.setattr(roofs, "_rates", rates)
    result = measure_products(share=1.0)
    assert (result["implementation"], result["value"]) == ("fast", 1e12)
    assert tried == [["slow", "fast"], ["fast"]]


def test_a_size_that_would_not_fit_into_the_time_is_not_tried(small_and_quick, monkeypatch):
    monkeypatch.setattr(roofs, "_SIZES", {"cpu": (256, 65536)})
    slow = roofs._Rate(1e9, 1e9, 1e9, 5)
    monkeypatch.setattr(roofs, "_product_candidates", lambda device, dtype, size: [("only", None)])
    monkeypatch.setattr(roofs, "_rates", lambda device, offered, work, seconds: {"only": slow})
    assert measure_products(share=1.0)["shape"] == [256, 256, 256]


def measure_products(share):
    return roofs._product_rate(CPU, "float32", share)


@given(st.lists(st.floats(1e-6, 1e3), min_size=5, max_size=50), st.floats(1, 1e15))
def test_a_rate_lies_between_its_quartiles_and_within_its_samples(times, work):
    rate = roofs._rate(times, work)
    assert rate.low <= rate.value <= rate.high
    assert work / max(times) <= rate.low * (1 + 1e-9)
    assert rate.high <= work / min(times) * (1 + 1e-9)


@given(st.one_of(st.none(), st.integers(1, 2 * GIB)), st.integers(0, 256 * GIB), st.sampled_from(["cpu", "cuda"]))
def test_three_buffers_get_past_the_cache_and_leave_half_of_the_memory_or_are_refused(cache, free, kind):
    device = Device(kind, kind, None, "any")
    least = 4 * cache if cache else GIB
    try:
        size = roofs._buffer_bytes(device, cache, free)
    except UserError:
        assert 6 * (least + 4 * MIB) > free
    else:
        assert size >= least
        assert 6 * size <= free
        assert size % (4 * MIB) == 0


def test_roofs_are_measured_once_and_then_read(counted_measurements):
    first = load_or_measure(CPU, ("float32",))
    assert load_or_measure(CPU, ("float32",)) == first
    assert counted_measurements == [("float32",)]


def test_a_refresh_measures_again(counted_measurements):
    load_or_measure(CPU, ("float32",))
    assert load_or_measure(CPU, ("float32",), refresh=True)["run"] == 2


def test_another_dtype_is_added_to_those_that_are_kept(counted_measurements):
    load_or_measure(CPU, ("float32",))
    assert load_or_measure(CPU, ("bfloat16",))["flops"].keys() == {"bfloat16", "float32"}
    load_or_measure(CPU, ("float32",))
    assert counted_measurements == [("float32",), ("bfloat16", "float32")]


@pytest.mark.parametrize("change", [{"driver": "2"}, {"power_cap_watts": 300}, {"uuid": "other"}, {"name": "other"}])
def test_roofs_of_another_condition_are_not_used(counted_measurements, monkeypatch, change):
    load_or_measure(CPU, ("float32",))
    facts = roofs.device_facts(CPU)
    monkeypatch.setattr(roofs, "device_facts", lambda device: facts | change)
    load_or_measure(CPU, ("float32",))
    assert len(counted_measurements) == 2


def test_roofs_of_another_thread_count_are_not_used(counted_measurements, monkeypatch):
    load_or_measure(CPU, ("float32",))
    monkeypatch.setattr("torch.get_num_threads", lambda: 999)
    load_or_measure(CPU, ("float32",))
    assert len(counted_measurements) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}"])
def test_a_damaged_file_is_measured_again(counted_measurements, tmp_path, damage):
    load_or_measure(CPU, ("float32",))
    (kept,) = (tmp_path / "roofs").glob("*.json")
    kept.write_text(damage)
    assert load_or_measure(CPU, ("float32",))["run"] == 2


def test_a_cache_folder_that_cannot_be_written_is_one_line_with_the_way_out(small_and_quick, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZBENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set ZBENCH_CACHE"):
        load_or_measure(CPU, ("float32",))


@pytest.mark.parametrize(("busy", "again"), [("the CPU is 50% busy", False), (None, True)])
def test_roofs_of_a_busy_moment_are_measured_again_in_an_idle_one(counted_measurements, monkeypatch, busy, again):
    def beside_work(device, dtypes, progress=None):
        return counted_measure(device, dtypes, progress) | {"warning": "the CPU is 90% busy"}

    counted_measure = roofs.measure
    monkeypatch.setattr(roofs, "measure", beside_work)
    load_or_measure(CPU, ("float32", "bfloat16"))
    monkeypatch.setattr(roofs, "measure", counted_measure)
    monkeypatch.setattr(roofs, "_disturbance", lambda device: busy)
    for _ in range(2):
        load_or_measure(CPU, ("float32",))
    assert len(counted_measurements) == 1 + again
    assert {frozenset(dtypes) for dtypes in counted_measurements} == {frozenset(("float32", "bfloat16"))}


@pytest.mark.parametrize(("then", "now", "again"), [("a", "a", False), ("a", "b", True), ("a", None, True)])
def test_roofs_of_other_native_kernels_are_measured_again(counted_measurements, monkeypatch, then, now, again):
    for version in (then, now):
        native = version and SimpleNamespace(source=lambda version=version: version)
        monkeypatch.setattr(roofs, "_native", lambda device, native=native: native)
        load_or_measure(CPU, ("float32",))
    assert len(counted_measurements) == 1 + again


# Caches --------------------------------------------------------------------------------------------------------------


def test_roofs_kept_before_caches_were_measured_stay_and_get_them(counted_measurements, tmp_path, monkeypatch):
    load_or_measure(CPU, ("float32",))
    (kept,) = (tmp_path / "roofs").glob("*.json")
    old = json.loads(kept.read_text())
    del old["caches"]
    kept.write_text(json.dumps(old))
    swept = []
    monkeypatch.setattr(roofs, "measure_caches", lambda device: swept.append(device) or {"unavailable": "a test"})
    for _ in range(2):
        assert load_or_measure(CPU, ("float32",)) == old | {"caches": {"unavailable": "a test"}}
    assert swept == [CPU]
    assert counted_measurements == [("float32",)]


def test_without_native_kernels_the_caches_of_a_cpu_are_unavailable_and_the_table_says_why(small_and_quick):
    result = measure(CPU, ("float32",), budget_seconds=0.1)
    assert result["caches"].keys() == {"unavailable"}
    assert "caches: unavailable: the native kernels cannot be built here" in roofs.table(result)


@pytest.fixture
def known_caches(small_and_quick, monkeypatch):
    """A CPU of known caches whose native kernel takes as long as the smallest cache that holds the set says."""
    monkeypatch.setattr(roofs, "cache_bytes", lambda: {"L2": 2 * MIB, "L1i": 3 * 2**15, "L1d": 2**16, "L3": 8 * MIB})
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    held = {2**15: 100e9, MIB: 50e9, 4 * MIB: 20e9}

    class Native:
        @staticmethod
        def read_sum(x, passes):
            return x, passes

    def times(device, call, seconds):
        x, passes = call()
        return [passes * x.nbytes / next((rate for size, rate in held.items() if x.nbytes <= size), 10e9)] * 5

    monkeypatch.setattr(roofs, "_native", lambda device: Native)
    monkeypatch.setattr(roofs, "_times", times)


def test_each_level_has_the_bandwidth_of_a_set_that_fits_into_it_and_into_no_smaller_one(known_caches):
    caches = roofs.measure_caches(CPU)
    assert json.loads(json.dumps(caches)) == caches
    levels = {name: (level["capacity"], level["bytes"], level["value"]) for name, level in caches["levels"].items()}
    half = 2 / 4  # of the machine's threads
    assert levels == {
        "L1d": (2**16 * half, 2**14, pytest.approx(100e9)),
        "L2": (2 * MIB * half, MIB // 2, pytest.approx(50e9)),
        "L3": (8 * MIB * half, 2 * MIB, pytest.approx(20e9)),
    }
    sizes = [rate["bytes"] for rate in caches["sweep"]]
    assert sizes == [2**k for k in range(14, 24)]
    assert caches["sweep"][-1]["value"] == pytest.approx(10e9)  # past the caches


def test_a_level_that_no_size_tells_from_a_smaller_one_is_left_out(known_caches, monkeypatch):
    monkeypatch.setattr(roofs, "cache_bytes", lambda: {"L1d": 2**16, "L2": 2**17, "L3": 2 * MIB})
    assert list(roofs.measure_caches(CPU)["levels"]) == ["L1d", "L3"]


def test_the_table_has_a_line_for_each_level(known_caches):
    kept = {"device": "one", "measured": "now", "bandwidth": {}, "flops": {}, "ridge": {}}
    lines = roofs.table(kept | {"caches": roofs.measure_caches(CPU)}).splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["L1d", "100.0", "GB/s"], ["L2", "50.0", "GB/s"], ["L3", "20.0", "GB/s"],
    ]  # fmt: skip
    assert lines[2].endswith("512 KiB read again and again, of 1 MiB")
    assert len(roofs.table(kept).splitlines()) == 1


def test_a_cpu_has_no_roof_for_float8_and_says_so():
    with pytest.raises(UserError, match="does not multiply it"):
        measure(CPU, ("float8",))
    assert roofs.usual_dtypes(CPU) == ("bfloat16", "float32")


@pytest.mark.slow
def test_the_smallest_cache_of_this_machine_is_faster_than_its_memory():
    if roofs._native(CPU) is None:
        pytest.skip("the native kernels cannot be built here")
    sweep = roofs.measure_caches(CPU)["sweep"]
    assert sweep[0]["value"] > 1.5 * sweep[-1]["value"]


@pytest.mark.slow
@pytest.mark.alone
def test_on_this_machine_a_product_must_reuse_what_it_reads_to_be_bound_by_arithmetic():
    result = measure(CPU, ("bfloat16", "float32"), budget_seconds=5)
    assert result["bandwidth"]["read"]["value"] > 1e9
    assert all(ridge > 1 for ridge in result["ridge"].values())


@pytest.mark.parametrize("implementation", ["torch sum", "torch mv"])
def test_a_sample_reads_as_many_bytes_as_its_roof_and_by_the_same_implementation(
    small_and_quick, monkeypatch, implementation
):
    read, buffers = [], []

    def candidates(device, buffer):
        buffers.append(weakref.ref(buffer))
        return [(name, lambda name=name: read.append((name, buffer.nbytes))) for name in ("torch sum", "torch mv")]

    monkeypatch.setattr(roofs, "_read_candidates", candidates)
    sample = roofs.sample_read(CPU, {"bytes": 8 * MIB, "implementation": implementation}, seconds=0.001)
    assert not sample.unavailable
    assert len(read) == sample.n + 2
    assert set(read) == {(implementation, 8 * MIB)}
    assert [buffer() for buffer in buffers] == [None]


def test_a_sample_agrees_with_the_times_of_its_reads_and_survives_json(small_and_quick, monkeypatch):
    monkeypatch.setattr(roofs, "_times", lambda device, call, seconds: [0.01, 0.02, 0.04])
    sample = roofs.sample_read(CPU, {"bytes": 4 * MIB, "implementation": "torch sum"})
    assert (sample.value, sample.n) == (4 * MIB / 0.02, 3)
    assert sample.low < sample.value < sample.high
    assert RoofSample.from_json(sample.to_json()) == sample


def test_what_was_measured_as_a_roof_can_be_sampled(small_and_quick):
    roof = measure(CPU, (), budget_seconds=0.1)["bandwidth"]["read"]
    sample = roofs.sample_read(CPU, roof, seconds=0.01)
    assert sample.n >= 5
    assert sample.seconds * sample.value > sample.n * roof["bytes"] / 2  # what it read, it read within that time


@pytest.mark.parametrize(
    ("roof", "why"),
    [
        ({"value": 1e9}, "does not say how it was read"),
        ({"bytes": 4 * MIB, "implementation": "triton read"}, "triton read cannot be used here"),
        ({"bytes": 2**60, "implementation": "torch sum"}, "GiB would take more than half of the"),
    ],
)
def test_what_stands_in_the_way_of_a_sample_is_said_in_it(small_and_quick, roof, why):
    sample = roofs.sample_read(CPU, roof)
    assert sample.value is None
    assert why in sample.unavailable


def test_a_device_that_fails_in_a_sample_is_no_error_of_the_run(small_and_quick, monkeypatch):
    def fails(device, size):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(roofs, "_buffer", fails)
    sample = roofs.sample_read(CPU, {"bytes": 4 * MIB, "implementation": "torch sum"})
    assert (sample.value, sample.unavailable) == (None, "out of memory")
