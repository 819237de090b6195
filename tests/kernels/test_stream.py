"""The streams that roofs are measured with: what they read is all there, and what they leave is right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zbench.kernels import cpu, registry, stream
from zbench.kernels.registry import worst_error

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("poisoned_outputs")
few = settings(max_examples=5, deadline=None, derandomize=True)


def vectors(device: torch.device, count: int, size: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(size)
    return [torch.randn(size, generator=g).to(device) for _ in range(count)]


@few
@given(blocks=st.integers(1, 5), programs=st.integers(1, 4), stride=st.integers(0, 7), steps=st.integers(1, 4))
def test_a_read_sums_what_it_says(device: torch.device, blocks: int, programs: int, stride: int, steps: int) -> None:
    [x] = vectors(device, 1, blocks * stream.BLOCK)
    out = torch.empty(programs, device=device)
    stream.read(x, out, stride, steps)
    for program, found in enumerate(out.tolist()):
        taken = [(program + stride * step) % blocks for step in range(steps)]
        wanted = sum(x[i * stream.BLOCK : (i + 1) * stream.BLOCK].double().sum().item() for i in taken)
        assert found == pytest.approx(wanted, abs=1e-2)
    want = torch.empty_like(out)
    stream.read_reference(x, want, stride, steps)
    assert worst_error(out, want) < 1e-4


@pytest.mark.parametrize("blocks, resident", [(1, 8), (6, 4), (8, 8), (5, 2)])
def test_once_reads_every_block_once(
    device: torch.device, blocks: int, resident: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "programs", lambda device: resident)
    [x] = vectors(device, 1, blocks * stream.BLOCK)
    walk = stream.once(x)
    stream.read(x, *walk)
    assert walk[0].double().sum().item() == pytest.approx(x.double().sum().item(), abs=1e-2)
    assert stream.read_cost(x, *walk).bytes_read == x.nbytes
    out, stride, steps = walk
    taken = [i + stride * t for i in range(len(out)) for t in range(steps)]
    assert sorted(taken) == list(range(blocks))


def test_again_walks_every_program_through_the_whole_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "programs", lambda device: 8)
    x = torch.ones(4 * stream.BLOCK)
    out, stride, steps = stream.again(x, 4 * 8 * stream.BLOCK * 4)
    assert (len(out), steps) == (8, 4)
    for program in range(8):
        assert {(program + stride * step) % 4 for step in range(steps)} == {0, 1, 2, 3}


@pytest.mark.parametrize("size", [1, stream.BLOCK, stream.BLOCK + 37])
def test_a_copy_is_equal_and_a_triad_adds(device: torch.device, size: int) -> None:
    b, c = vectors(device, 2, size)
    out = torch.full((size + 1,), torch.nan, device=device)
    stream.copy(b, out[:size])
    assert out[:size].equal(b) and out[size:].isnan().all()
    stream.triad(b, c, 0.5, out[:size])
    assert worst_error(out[:size], b + 0.5 * c) < 1e-6
    assert out[size:].isnan().all()


def test_a_read_of_part_of_a_block_is_refused(device: torch.device) -> None:
    [x] = vectors(device, 1, stream.BLOCK + 1)
    with pytest.raises(ValueError, match="whole blocks of 4096"):
        stream.read(x, x.new_empty(1), 1, 1)


@pytest.mark.parametrize("name", ["stream_read", "stream_copy", "stream_triad"])
def test_the_examples_agree(device: torch.device, name: str) -> None:
    assert registry.disagreement(registry.get(name), device) is None


def test_traffic_is_counted_by_the_conventions_of_the_roofs() -> None:
    b, c, out = (torch.zeros(10) for _ in range(3))
    assert stream.copy_cost(b, out) == (0, 40, 40)
    assert stream.triad_cost(b, c, 0.5, out) == (20, 80, 40)


@pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason() or "")
@pytest.mark.parametrize("size", [5, 4096, 100_003])
def test_the_native_read_takes_everything_in_every_pass(size: int) -> None:
    [x] = vectors(CPU, 1, size)
    for passes in (1, 3):
        wanted = passes * x.double().sum().item()
        assert cpu.read_sum(x, passes) == pytest.approx(wanted, rel=1e-3, abs=1e-2 * passes)
