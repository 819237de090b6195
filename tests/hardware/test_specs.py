"""Spec-sheet peaks: dense, sourced, and only ever those of the very device."""

import re
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from zbench.cli import main
from zbench.errors import UserError
from zbench.hardware import specs
from zbench.hardware.device import Device
from zbench.hardware.specs import known, lookup, named, of_device

# Dense bfloat16 by the silicon: units x FLOP per clock and unit x boost clock in Hz. 2:4 sparsity would double it.
SILICON = {
    "MI300X": 304 * 2048 * 2.1e9,
    "MI325X": 304 * 2048 * 2.1e9,
    "MI350X": 256 * 4096 * 2.2e9,
    "MI355X": 256 * 4096 * 2.4e9,
    "H100 SXM": 132 * 4096 * 1.83e9,
    "H200 SXM": 132 * 4096 * 1.83e9,
    "B200": 148 * 8192 * 1.85e9,
}


def test_every_gpu_of_the_list_is_known():
    assert {spec.name for spec in known()} == SILICON.keys()


@pytest.mark.parametrize(("begun", "name"), [("h100", "H100 SXM"), ("H200", "H200 SXM"), ("mi355", "MI355X")])
def test_as_much_of_a_name_as_tells_it_from_the_others_will_do(begun, name):
    assert named(begun).name == name


@pytest.mark.parametrize(
    ("begun", "message"),
    [
        ("mi3", "'mi3' could be MI300X, MI325X, MI350X, MI355X"),
        ("H", "could be H100 SXM, H200 SXM"),
        ("", "could be MI300X, .*B200"),
        ("H100 PCIe", "unknown hardware 'H100 PCIe'; did you mean 'H100 SXM'"),
    ],
)
def test_a_name_that_could_be_several_lists_them(begun, message):
    with pytest.raises(UserError, match=message):
        named(begun)


def test_the_help_of_project_lists_every_gpu():
    shown = " ".join(CliRunner().invoke(main, ["project", "--help"]).output.split())
    assert all(spec.name in shown for spec in known())


@pytest.mark.parametrize("spec", known(), ids=lambda spec: spec.name)
def test_no_note_on_a_formula_stands_beside_another_number(spec):
    for dtype, value in spec.flops.items():
        for stated in re.findall(r"([\d.]+e12) by formula", spec.sources[f"flops.{dtype}"]):
            assert float(stated) == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize("spec", known(), ids=lambda spec: spec.name)
def test_peaks_are_dense(spec):
    assert spec.flops["bfloat16"] == pytest.approx(SILICON[spec.name], rel=0.01)
    assert spec.flops["float16"] == spec.flops["bfloat16"]
    assert spec.flops["float8"] == pytest.approx(2 * spec.flops["bfloat16"], rel=0.001)


@pytest.mark.parametrize("spec", known(), ids=lambda spec: spec.name)
def test_every_figure_is_a_number_in_base_units_and_names_its_source(spec):
    figures = {"compute_units": spec.compute_units, "memory_bytes": spec.memory_bytes, "bandwidth": spec.bandwidth}
    figures |= {"power_watts": spec.power_watts} | {f"flops.{dtype}": value for dtype, value in spec.flops.items()}
    assert all(isinstance(value, int | float) for value in figures.values())
    assert spec.sources.keys() == figures.keys()
    assert all(spec.sources.values())
    assert 64 * 2**30 < spec.memory_bytes < 512 * 2**30
    assert 1e12 < spec.bandwidth < 1e13
    assert spec.memory_bytes % 2**30 == 0


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI300X VF", "MI300X"),
        ("AMD Instinct MI325X", "MI325X"),
        ("AMD Instinct MI350X", "MI350X"),
        ("AMD Instinct MI355X", "MI355X"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_a_name_that_the_driver_reports_finds_its_spec(reported, name):
    assert lookup(reported).name == name


@pytest.mark.parametrize(
    "reported",
    [
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H100",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H800",
        "AMD Instinct MI300A",
        "AMD Radeon Graphics",
        "AMD EPYC 9575F 64-Core Processor",
        "",
    ],
)
def test_another_device_has_no_spec(reported):
    assert lookup(reported) is None


def test_an_ambiguous_name_has_no_spec(monkeypatch):
    twice = known()[0]
    monkeypatch.setattr(specs, "known", lambda: (twice, twice))
    assert lookup("AMD Instinct MI300X") is None


@pytest.mark.parametrize(("units", "name"), [(304, "MI300X"), (38, None)])
def test_a_partition_of_a_gpu_has_no_spec(monkeypatch, units, name):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=units)
    )
    spec = of_device(Device("cuda", "rocm", 0, "AMD Instinct MI300X"))
    assert (spec.name if spec else None) == name


def test_a_cpu_has_no_spec():
    assert of_device(Device("cpu", "cpu", None, "NVIDIA H200")) is None
