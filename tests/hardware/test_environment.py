"""The environment snapshot: complete, honest about gaps, free of secrets; and the identity that guards a resume."""

import json
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from zbench.hardware import environment
from zbench.hardware.device import Device, resolve
from zbench.hardware.environment import device_facts, differences, identity, identity_hash, snapshot


@pytest.fixture(scope="module")
def taken():
    return snapshot(resolve("cpu"))


def leaves(value):
    if isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, list):
        yield from value
    else:
        yield value


def test_a_snapshot_survives_json_and_has_no_silent_gap(taken):
    assert json.loads(json.dumps(taken, allow_nan=False)) == taken
    assert all(value not in (None, "") for value in leaves(taken))


def test_what_cannot_be_read_says_why(taken):
    gaps = [value for value in leaves(taken) if isinstance(value, str) and value.startswith("unavailable")]
    assert taken["device"]["uuid"] in gaps
    assert all(len(gap) > len("unavailable: ") for gap in gaps)


def test_a_snapshot_names_the_torch_and_the_threads_of_the_run(taken):
    assert taken["torch"]["version"] == torch.__version__
    assert taken["packages"]["torch"] == torch.__version__
    assert taken["torch"]["threads"] == torch.get_num_threads()
    assert snapshot(resolve("cpu"), threads=7)["torch"]["threads"] == 7


def test_environment_variables_and_the_hosts_name_are_not_stored(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_store_me")
    monkeypatch.setattr(socket, "gethostname", lambda: "a-name-of-a-host")
    text = json.dumps(snapshot(resolve("cpu")))
    assert "hf_do_not_store_me" not in text
    assert "a-name-of-a-host" not in text


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["/bin/zbench", "run", "a b.yaml"], "zbench run 'a b.yaml'"),
        (["zbench", "--api-key", "sk-1", "x"], "zbench --api-key '***' x"),
        (["zbench", "--hf-token=sk-1"], "zbench '--hf-token=***'"),
        (["zbench", "-o", "endpoint.api_key=sk-1"], "zbench -o 'endpoint.api_key=***'"),
        (["zbench", "-o", "url=https://me:sk-1@host/v1"], "zbench -o 'url=https://***@host/v1'"),
        (["zbench", "-o", "output_tokens=64"], "zbench -o output_tokens=64"),
        (["zbench", "--monkey", "banana"], "zbench --monkey banana"),
    ],
)
def test_the_command_line_is_kept_without_its_credentials(arguments, shown):
    assert environment._command(arguments) == shown


def test_two_snapshots_of_one_process_have_one_identity(taken):
    again = snapshot(resolve("cpu"))
    assert identity(again) == identity(taken)
    assert identity_hash(again) == identity_hash(taken)
    assert differences(taken, again) == []


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("torch", "version", "1.0"),
        ("torch", "threads", 99),
        ("device", "name", "NVIDIA B200"),
        ("device", "driver", "1.2.3"),
        ("device", "power_cap_watts", 300.0),
        ("cpu", "model", "another"),
        ("zbench", "commit", "0" * 40),
        ("zbench", "dirty", "yes"),
        ("zbench", "source", "0" * 16),
        ("packages", "transformers", "1.0"),
    ],
)
def test_a_change_that_could_move_a_result_changes_the_identity_and_is_named(taken, section, key, value):
    changed = taken | {section: taken[section] | {key: value}}
    assert identity_hash(changed) != identity_hash(taken)
    assert differences(taken, changed) == [f"{section}.{key}: was {taken[section][key]}, is {value}"]


def test_what_changes_by_itself_is_not_part_of_the_identity(taken):
    later = taken | {"command": "zbench run --resume", "memory": {"available_bytes": 1}}
    later["cpu"] = taken["cpu"] | {"load_average": [9.0, 9.0, 9.0], "mhz": 1.0}
    assert identity_hash(later) == identity_hash(taken)


def test_an_identity_from_another_version_differs_by_what_it_did_not_record(taken):
    older = {section: dict(values) if isinstance(values, dict) else values for section, values in taken.items()}
    del older["zbench"]["source"]
    assert differences(older, taken) == [f"zbench.source: was not recorded, is {taken['zbench']['source']}"]


def test_a_changed_source_file_changes_the_source_hash(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    before = environment._source_hash(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert environment._source_hash(tmp_path) != before


def test_a_package_outside_any_checkout_has_no_commit(monkeypatch, tmp_path):
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(environment.zbench, "__file__", str(tmp_path / "__init__.py"))
    facts = environment._zbench()
    assert facts["commit"].startswith("unavailable: ")
    assert facts["dirty"].startswith("unavailable: ")


def test_caches_are_summed_over_the_machine_and_counted_once_each(monkeypatch, tmp_path):
    for cpu in range(4):
        for index, (level, kind, size, sharers) in enumerate(
            [
                ("1", "Data", "32K", f"{cpu}"),
                ("1", "Instruction", "64K", f"{cpu}"),
                ("3", "Unified", "16M", f"{cpu // 2}"),
            ]
        ):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_map", sharers)):
                (folder / name).write_text(text + "\n")
    monkeypatch.setattr(environment, "_SYSFS_CPU", tmp_path)
    assert environment.cache_bytes() == {"L1d": 4 * 2**15, "L1i": 4 * 2**16, "L3": 2 * 2**24}


@pytest.fixture
def amd_gpu(monkeypatch):
    properties = SimpleNamespace(
        total_memory=192 * 2**30, multi_processor_count=304, gcnArchName="gfx942",
        pci_domain_id=0, pci_bus_id=0xC5, pci_device_id=0,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    environment._amdsmi_handle.cache_clear()
    yield Device("cuda", "rocm", 0, "AMD Instinct MI300X")
    environment._amdsmi_handle.cache_clear()


def test_an_amd_gpu_is_described_by_amdsmi_found_through_its_pci_address(monkeypatch, amd_gpu):
    clocks = {"GFX": {"clk": 1300, "max_clk": 2100}, "MEM": {"clk": 1300, "max_clk": 1300}}
    fake = SimpleNamespace(
        AmdSmiClkType=SimpleNamespace(GFX="GFX", MEM="MEM"),
        amdsmi_init=lambda: None,
        amdsmi_get_processor_handle_from_bdf=lambda bdf: {"0000:c5:00.0": "the gpu"}[bdf],
        amdsmi_get_gpu_device_uuid=lambda gpu: "uuid of " + gpu,
        amdsmi_get_gpu_driver_info=lambda gpu: {"driver_name": "amdgpu", "driver_version": "6.16"},
        amdsmi_get_power_cap_info=lambda gpu: {"power_cap": 750_000_000},
        amdsmi_get_clock_info=lambda gpu, kind: clocks[kind],
        amdsmi_get_gpu_compute_partition=lambda gpu: "SPX",
        amdsmi_get_gpu_memory_partition=lambda gpu: "N/A",
    )
    monkeypatch.setitem(sys.modules, "amdsmi", fake)
    facts = device_facts(amd_gpu)
    assert facts["uuid"] == "uuid of the gpu"
    assert facts["power_cap_watts"] == 750
    assert (facts["driver"], facts["gfx_mhz"], facts["max_gfx_mhz"]) == ("6.16", 1300, 2100)
    assert (facts["compute_partition"], facts["memory_partition"]) == ("SPX", "unavailable: not reported")


def test_an_amdsmi_that_prints_and_raises_at_import_leaves_reasons_and_a_clean_stdout(
    monkeypatch, amd_gpu, tmp_path, capsys
):
    (tmp_path / "amdsmi.py").write_text("print('Unable to find libamd_smi.so')\nraise KeyError('ROCM_PATH')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "amdsmi", raising=False)
    facts = device_facts(amd_gpu)
    assert facts["power_cap_watts"] == "unavailable: 'ROCM_PATH'"
    assert capsys.readouterr().out == ""


def test_an_nvidia_gpu_is_described_by_nvml_found_through_its_uuid(monkeypatch):
    properties = SimpleNamespace(total_memory=141 * 2**30, multi_processor_count=132, uuid="1-2-3")
    fake = SimpleNamespace(
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-1-2-3": "gpu"}[uuid],
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetPowerManagementLimit=lambda gpu: 700_000,
        nvmlDeviceGetClockInfo=lambda gpu, kind: {1: 1980, 2: 3201}[kind],
        nvmlDeviceGetMaxClockInfo=lambda gpu, kind: {1: 1980, 2: 3201}[kind],
        nvmlDeviceGetMigMode=lambda gpu: [0, 0],
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    facts = device_facts(Device("cuda", "cuda", 0, "NVIDIA H200"))
    assert (facts["uuid"], facts["driver"], facts["power_cap_watts"]) == ("GPU-1-2-3", "580.1", 700)
    assert (facts["sm_mhz"], facts["memory_mhz"], facts["mig"]) == (1980, 3201, False)


def test_the_clock_of_others_counts_what_another_process_takes_of_the_cores() -> None:
    before = environment.others_seconds()
    if before is None:
        pytest.skip("this system does not tell")
    spin = "import time\nwhile time.process_time() < 1: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)
    after = environment.others_seconds()
    assert after is not None and after - before > 0.9
