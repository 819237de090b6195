"""The device facade: names, marks and memory."""

import subprocess
import sys
import time

import pytest
import torch

from zbench.errors import UserError
from zbench.hardware import device
from zbench.hardware.device import resolve


@pytest.fixture
def two_amd_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"AMD Instinct MI300X #{index}")
    monkeypatch.setattr(torch.version, "hip", "7.2")


@pytest.fixture
def one_nvidia_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_importing_the_hardware_modules_imports_neither_torch_nor_transformers():
    code = (
        "import sys; import zbench.hardware.device, zbench.hardware.specs, zbench.hardware.roofs;"
        "import zbench.hardware.environment; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_auto_is_the_cpu_without_a_gpu(no_gpu):
    assert resolve("auto") == resolve("cpu")
    assert resolve().torch == torch.device("cpu")


def test_auto_is_the_first_gpu_where_there_is_one(one_nvidia_gpu):
    found = resolve("auto")
    assert (found.type, found.backend, found.index, found.name) == ("cuda", "cuda", 0, "NVIDIA H200")


@pytest.mark.parametrize("name", ["rocm:1", "cuda:1"])
def test_a_rocm_device_answers_to_its_own_name_and_to_torchs(two_amd_gpus, name):
    found = resolve(name)
    assert (found.type, found.backend, found.index) == ("cuda", "rocm", 1)
    assert found.torch == torch.device("cuda:1")


def test_the_string_of_a_device_resolves_to_it(two_amd_gpus):
    for name in ("cpu", "rocm:0", "rocm:1"):
        assert str(resolve(name)) == name


@pytest.mark.parametrize("name", ["cuda:7", "rocm", "rocm:0"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(one_nvidia_gpu, name):
    with pytest.raises(UserError, match=f'"{name}" is not there.*sees cpu, cuda:0') as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "gpu", "cpu:0", "cuda:", "cuda:-1", "CUDA", "cuda:0 "])
def test_a_name_that_is_no_device_is_refused_with_the_forms_that_are(name):
    with pytest.raises(UserError, match="use auto, cpu, cuda"):
        resolve(name)


def test_marks_measure_the_time_between_them():
    cpu = resolve("cpu")
    start = cpu.mark()
    time.sleep(0.02)
    end = cpu.mark()
    cpu.synchronize()
    assert 0.02 <= cpu.seconds(start, end) < 1


def test_the_peak_on_a_cpu_follows_an_allocation_and_forgets_it_after_a_reset():
    cpu = resolve("cpu")
    cpu.reset_peak()
    before = cpu.peak_bytes()
    if before is None:
        pytest.skip("this kernel offers no resettable peak")
    size = 256 * 2**20
    torch.ones(size, dtype=torch.uint8)
    assert cpu.peak_bytes() - before > size / 2
    cpu.reset_peak()
    assert cpu.peak_bytes() - before < size / 2


def test_the_peak_on_a_cpu_is_none_where_the_kernel_cannot_reset_it(monkeypatch, tmp_path):
    device._peak_can_be_reset.cache_clear()
    monkeypatch.setattr(device, "_CLEAR_REFS", tmp_path / "no such folder" / "clear_refs")
    try:
        cpu = resolve("cpu")
        cpu.reset_peak()
        assert cpu.peak_bytes() is None
    finally:
        device._peak_can_be_reset.cache_clear()


def test_free_memory_stays_within_the_containers_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "_CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("9000000\n")
    (tmp_path / "memory.stat").write_text("anon 5000000\ninactive_file 2000000\n")
    (tmp_path / "memory.max").write_text("10000000\n")
    assert resolve("cpu").memory_bytes() == 3000000
    (tmp_path / "memory.max").write_text("max\n")
    assert resolve("cpu").memory_bytes() > 3000000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_taken_apart_goes_back_and_what_torch_keeps_stays():
    gpu = resolve("cuda")
    del [torch.empty(2**24, device=gpu.torch)][:]
    before = torch.cuda.memory_reserved(gpu.index)
    with gpu.apart():
        buffer = torch.empty(2**26, device=gpu.torch)
        assert torch.cuda.memory_reserved(gpu.index) >= before + 2**26
        del buffer
    assert torch.cuda.memory_reserved(gpu.index) == before


@pytest.mark.parametrize("slow, lowest, highest", [("bfloat16", 3, 7), ("float32", 1 / 7, 1 / 3)])
def test_the_cost_of_bfloat16_is_how_much_longer_its_products_take(monkeypatch, slow, lowest, highest):
    def linear(rows, weight):
        assert rows.dtype == weight.dtype
        time.sleep(0.01 if str(rows.dtype) == f"torch.{slow}" else 0.002)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    assert lowest < device.bfloat16_cost() < highest
