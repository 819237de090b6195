"""The front of ZAYA1's attention: kernel and reference against each other and against float64, token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zbench.kernels import ccgqa, registry
from zbench.kernels.registry import worst_error
from zbench.models.rows import Rows

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("poisoned_outputs")
FLOAT32, BFLOAT16 = 1e-5, 2e-2
few = settings(max_examples=3, deadline=None, derandomize=True)


def both(device: torch.device, dtype: torch.dtype = torch.float32, **shape: Any) -> float:
    """Error of the kernel against the reference, over all that they return and write."""
    wanted, found = (ccgqa.random_call(device, dtype, 3, **shape) for _ in range(2))
    return worst_error([ccgqa.launch(*found), *found], [ccgqa.reference(*wanted), *wanted])


def token_by_token(
    projected: Tensor, mixed: Tensor, delayed: Tensor, parents: Tensor, cos: Tensor, sin: Tensor, front: Any, kv: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, R, H, d], keys and values [B, R, kv, d] as the papers write them, float64, one row at a time.

    `parents` as in `Rows`."""
    heads, width = front.grouped_bias.shape
    z_size, late = heads * width, delayed.shape[-1]
    queries, half = heads - kv, cos.shape[-1]
    depthwise, bias1, grouped, bias2, temp = (part.double() for part in front)
    out: tuple[list[Tensor], ...] = ([], [], [])
    for b, chain in enumerate(parents.tolist()):
        z_of = {-2: mixed[b, 0].double(), -1: mixed[b, 1].double()}
        z_of |= {row: projected[b, row, :z_size].double() for row in range(len(chain))}
        late_of = {-1: delayed[b, 0].double()}
        late_of |= {row: projected[b, row, -late:].double() for row in range(len(chain))}
        for row, parent in enumerate(chain):
            before = -2 if parent == -1 else chain[parent]
            y1 = {
                token: depthwise[0] * z_of[previous] + depthwise[1] * z_of[token] + bias1
                for token, previous in ((row, parent), (parent, before))
            }
            both_taps = torch.cat([y1[parent].view(heads, width), y1[row].view(heads, width)], 1)
            y2 = torch.stack([both_taps[n] @ grouped[n] for n in range(heads)]) + bias2
            raw, group = z_of[row].view(heads, width), queries // kv
            coupled = torch.stack([(raw[n] + raw[queries + n // group]) / 2 for n in range(queries)])
            mean = coupled.view(kv, group, width).mean(1)
            y2 = y2 + torch.cat([coupled, mean])
            unit = y2 / y2.norm(dim=1, keepdim=True) * math.sqrt(width)
            unit[queries:] *= temp[:, None]
            turns = torch.complex(cos[b, row].double(), sin[b, row].double())
            turned = torch.complex(unit[:, :half], unit[:, half : 2 * half]) * turns
            unit = torch.cat([turned.real, turned.imag, unit[:, 2 * half :]], 1)
            current = projected[b, row, z_size : projected.shape[-1] - late].double()
            out[0].append(unit[:queries])
            out[1].append(unit[queries:])
            out[2].append(torch.cat([current, late_of[parent]]).view(kv, width))
    return tuple(torch.stack(part).unflatten(0, parents.shape) for part in out)  # type: ignore[return-value]


def blocks(lengths: tuple[int, ...]) -> Tensor:
    """Parents of two drafts and a block of two masks behind each, as block diffusion verifies and drafts at once."""
    begun = torch.tensor(lengths)
    return Rows.draft_and_verify(torch.zeros(len(lengths), 2).long(), begun, 2, (1, 2), 0).parents.contiguous()


@pytest.mark.parametrize(
    "shape, dtype, tolerance", [("trees", torch.float32, FLOAT32), ("blocks", torch.bfloat16, BFLOAT16)]
)
def test_both_match_the_papers_token_by_token(
    device: torch.device, shape: str, dtype: torch.dtype, tolerance: float
) -> None:
    lengths = (0, 5)
    given_parents = blocks(lengths) if shape == "blocks" else None
    options: dict[str, Any] = {"heads": 4, "kv_heads": 2, "width": 24, "half": 5, "late": 20, "lengths": lengths}
    for run in (ccgqa.reference, ccgqa.launch):
        call = ccgqa.random_call(device, dtype, 1, parents=given_parents, **options)
        projected, mixed, delayed, places, cos, sin, front, keys, values = call
        parents = places.parents - 1
        wanted = token_by_token(projected, mixed, delayed, parents, cos, sin, front, 2)
        queries = run(*call)
        stored = (store[places.sequence, :, places.slots] for store in (keys, values))
        for found, want in zip((queries, *stored), wanted, strict=True):
            assert ((found.double() - want).norm() / want.norm()).item() < tolerance
        assert mixed[:, 2:].equal(projected[..., : mixed.shape[2]])
        assert delayed[:, 1:].equal(projected[..., -20:])


@few
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=2),
    count=st.integers(1, 5),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    width=st.sampled_from([6, 16, 20, 34]),
    half=st.integers(1, 3),
    late=st.integers(1, 5),
)
def test_any_shape_agrees_and_nothing_else_is_written(
    device: torch.device, lengths: list[int], count: int, kv_heads: int, group: int, width: int, half: int, late: int
) -> None:
    shape = {"lengths": tuple(lengths), "count": count, "heads": kv_heads * group, "kv_heads": kv_heads}
    assert both(device, width=width, half=half, late=late, **shape) < FLOAT32


SMALL: dict[str, Any] = {"heads": 1, "kv_heads": 1, "width": 16, "half": 4}


def test_one_row_after_nothing(device: torch.device) -> None:
    assert both(device, lengths=(0,), count=1, **SMALL) < FLOAT32


@pytest.mark.parametrize("tiles", [(16, 16, 4), (64, 32, 8)])
def test_rows_of_several_sequences_share_tiles_and_fill_several(
    device: torch.device, tiles: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ccgqa, "tiles", lambda rows, chosen: tiles)
    assert both(device, lengths=(3, 0, 12), count=7, capacity=20, **SMALL) < FLOAT32


def test_a_cache_with_any_strides_is_written_in_place(device: torch.device) -> None:
    outcomes = []
    for run in (ccgqa.reference, ccgqa.launch):
        call = ccgqa.random_call(device, torch.float32, 5, **SMALL, lengths=(2, 0))[:-2]
        stores = [torch.full((16, 2, 3, 1, 16), torch.nan, device=device) for _ in range(2)]  # [S, B, layer, kv, d]
        views = [store[:, :, 1].permute(1, 2, 0, 3) for store in stores]
        outcomes.append([run(*call, *views), *call, *stores])
    assert worst_error(outcomes[1], outcomes[0]) < FLOAT32


def test_the_example_agrees(device: torch.device) -> None:
    assert registry.disagreement(ccgqa.KERNEL, device) is None


def test_bytes_written_are_those_that_change() -> None:
    call = ccgqa.example(CPU, 0)
    poisoned = [call[index].isnan().sum().item() for index in (1, 2, 7, 8)]
    queries = ccgqa.reference(*call)
    left = [call[index].isnan().sum().item() for index in (1, 2, 7, 8)]
    assert ccgqa.cost(*call).bytes_written == 2 * (sum(poisoned) - sum(left) + queries.numel())


def test_flops_and_bytes_read_are_those_of_the_shapes() -> None:
    """One row of one sequence with one head of each kind, d = 2, one rotated pair, one late channel."""
    call = ccgqa.random_call(CPU, torch.float32, 0, (4,), 1, 1, 1, 2, 1, late=1)
    work = ccgqa.cost(*call)
    depthwise, grouped = 2 * 2 * 4, 2 * 2 * (4 * 2)  # per channel two taps; per head d outputs of 2 d inputs
    assert work.flops == depthwise + grouped
    parameters = 8 + 4 + 2 * 4 * 2 + 4 + 1
    state, projected, angles = 2 * 4 + 1, 4 + 2, 2
    places = 1 + 1 + 2
    assert work.bytes_read == 4 * (parameters + state + projected + angles) + 8 * places
