"""Which chip a device is, from what its driver says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from zbench.kernels import chips


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ({"gcnArchName": "NVIDIA H200", "major": 9, "minor": 0}, "sm90"),  # as torch 2.11 for CUDA 13 says
        ({"major": 10, "minor": 0}, "sm100"),
        ({"gcnArchName": "gfx942:sramecc+:xnack-", "major": 9, "minor": 4}, "gfx942"),
    ],
)
def test_a_chip_has_its_own_row_and_shared_memory(
    told: dict[str, object], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = SimpleNamespace(multi_processor_count=132, **told)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: given)
    assert chips.of.__wrapped__(torch.device("cuda")) == chips.Chip(name, 132, *chips.KNOWN[name])
