"""Tuning: candidates that disagree are rejected, the fastest of the others is found and printed as a table's row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import tune
from zbench.hardware import device as devices
from zbench.hardware import roofs
from zbench.kernels import chips, jit, registry
from zbench.kernels.registry import Case, Kernel, Work

if TYPE_CHECKING:
    import triton.language as tl


class Launch(NamedTuple):
    programs: int
    block: int


def _double(x, out, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(tl.program_id(0) * BLOCK, COUNT, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(out + at, 2 * tl.load(x + at))


def tiny(table: dict[str, Any], **candidates: tuple[int, ...]) -> Kernel:
    """Doubles 64 numbers; wrong with blocks of 16, of which the last is left out."""

    def reference(x: Tensor, out: Tensor) -> None:
        out.copy_(2 * x)

    def launch(x: Tensor, out: Tensor) -> None:
        row = chips.pick(table, x.device)
        count = 48 if row.block == 16 else 64
        jit.compiled(_double)[(row.programs,)](x, out, COUNT=count, BLOCK=row.block)

    def example(device: torch.device, seed: int) -> tuple[Any, ...]:
        x = torch.arange(64.0, device=device) + seed
        return x, torch.full_like(x, torch.nan)

    return Kernel(
        "double", reference, launch, lambda x, out: Work(64, x.nbytes, x.nbytes), example, 0.0,
        cases=lambda device: [Case("64 numbers", lambda seed: example(device, seed))], table=table,
        candidates=candidates,
    )  # fmt: skip


@pytest.fixture
def here(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> devices.Device:
    monkeypatch.setattr(roofs, "past_cache_bytes", lambda device: 0)
    return devices.resolve()


def test_a_wrong_candidate_is_rejected_and_the_fastest_is_printed_to_paste(here: devices.Device) -> None:
    kernel = tiny({"": Launch(1, 2)}, block=(16, 64))  # 32 steps in turn
    found = tune.search(kernel, here, seconds=0.01)
    assert list(found.rejected) == [Launch(1, 16)] and "disagrees" in found.rejected[Launch(1, 16)]
    assert (found.now, found.best) == (Launch(1, 2), Launch(1, 64))
    assert kernel.table[found.chip] == Launch(1, 64)
    said: list[str] = []
    tune.show(kernel, found, here, said.append)
    assert said[0].startswith("double: rejected Launch(programs=1, block=16): the Triton kernel disagrees")
    assert said[1].startswith("double: 64 numbers: ") and ", now " in said[1]
    assert said[2].startswith(f'double:    "{found.chip}": Launch(1, 64),  # tuned on {here.name}: ')


def test_a_row_that_is_no_faster_when_timed_again_is_not_to_paste(here: devices.Device) -> None:
    now, best = Launch(1, 2), Launch(1, 64)
    said: list[str] = []
    times = {"64 numbers": {now: [1e-6] * 9, best: [2e-6] * 9}}
    tune.show(tiny({"": now}), tune.Found("sm90", now, best, {}, times), here, said.append)
    assert said[-1] == f'double:    "sm90": Launch(1, 2),  # tuned on {here.name}: as before: (1, 64) gave 0.50x of it'


def test_where_nothing_agrees_the_table_stays(here: devices.Device) -> None:
    kernel = tiny({"": Launch(1, 16)})
    found = tune.search(kernel, here, seconds=0.01)
    assert found.best is None and kernel.table[found.chip] == Launch(1, 16)
    said: list[str] = []
    tune.show(kernel, found, here, said.append)
    assert said[-1] == f"double: no candidate agrees with the reference on {here.name}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "nothing can be tuned: device is cpu\n"


def test_an_unknown_kernel_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["attenton"]) == 2
    assert "no kernel is called attenton; known: add_norm" in capsys.readouterr().err


@pytest.mark.parametrize("name", registry.MODULES)
def test_every_table_has_the_four_chips_and_a_default_and_what_to_try(name: str) -> None:
    kernel = registry.get(name)
    assert set(kernel.table) == {"", *chips.KNOWN}
    for row in kernel.table.values():
        assert set(kernel.candidates) <= set(row._fields)
        assert all(getattr(row, field) in values for field, values in kernel.candidates.items())
