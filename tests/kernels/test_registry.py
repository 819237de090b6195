"""A kernel is used where it gives what its reference gives, and nowhere else."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from zbench.kernels import registry
from zbench.kernels.registry import Kernel, Work

CPU = torch.device("cpu")


def double(x: Tensor, out: Tensor) -> Tensor:
    out.copy_(x * 2)
    return x.sum(0)


def as_kernel(launch: Callable[..., Any], tolerance: float = 1e-3) -> Kernel:
    def example(device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).to(device)
        return x, torch.full_like(x, torch.nan)

    return Kernel("double", double, launch, lambda x, out: Work(x.numel(), x.nbytes, out.nbytes), example, tolerance)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Kernel], None]]:
    """Makes a kernel the operator "double" of a device that can run Triton."""

    def register(kernel: Kernel) -> None:
        module = types.ModuleType("zbench.kernels.of_this_test")
        module.KERNEL = kernel  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(registry.MODULES, "double", "of_this_test")
        monkeypatch.setattr(registry, "unavailable", lambda device: None)
        registry.checked.cache_clear()

    yield register
    registry.checked.cache_clear()


def test_references_alone_run_where_that_is_asked_for(registered: Callable[[Kernel], None]) -> None:
    kernel = as_kernel(lambda x, out: double(x, out))
    registered(kernel)
    with registry.references():
        assert registry.choose("double", CPU) == (double, "torch (asked for)")
    assert registry.choose("double", CPU) == (kernel.launch, "triton")


def test_a_kernel_that_agrees_is_used_and_says_nothing(registered: Callable[[Kernel], None]) -> None:
    def launch(x: Tensor, out: Tensor) -> Tensor:
        return double(x, out) * (1 + 1e-5)

    registered(as_kernel(launch))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = registry.choose("double", CPU)
    assert chosen.call is launch and chosen.label == "triton"


def wrong_result(x: Tensor, out: Tensor) -> Tensor:
    return double(x, out) * 1.01


def wrong_argument(x: Tensor, out: Tensor) -> Tensor:
    result = double(x, out)
    out[0, 0] += 1
    return result


def unwritten(x: Tensor, out: Tensor) -> Tensor:
    return x.sum(0)


def other_dtype(x: Tensor, out: Tensor) -> Tensor:
    return double(x, out).double()


def touches_its_input(x: Tensor, out: Tensor) -> Tensor:
    result = double(x, out)
    x.add_(1)
    return result


@pytest.mark.parametrize("launch", [wrong_result, wrong_argument, unwritten, other_dtype, touches_its_input])
def test_a_kernel_that_disagrees_warns_and_is_not_used(
    registered: Callable[[Kernel], None], launch: Callable[..., Any]
) -> None:
    registered(as_kernel(launch))
    with pytest.warns(RuntimeWarning, match="double on cpu: the Triton kernel disagrees"):
        chosen = registry.choose("double", CPU)
    assert chosen.call is double
    assert chosen.label.startswith("torch (the Triton kernel disagrees: relative error ")


@pytest.mark.parametrize(
    "message, said", [("no such instruction\nat line 3", "no such instruction"), ("", "no message")]
)
def test_a_kernel_that_fails_warns_and_is_not_used(
    registered: Callable[[Kernel], None], message: str, said: str
) -> None:
    def launch(x: Tensor, out: Tensor) -> Tensor:
        raise RuntimeError(message)

    registered(as_kernel(launch))
    with pytest.warns(RuntimeWarning, match="double on cpu"):
        chosen = registry.choose("double", CPU)
    assert chosen == (double, f"torch (the Triton kernel failed: RuntimeError: {said})")


def test_a_kernel_is_checked_once_per_device(registered: Callable[[Kernel], None]) -> None:
    calls = []

    def launch(x: Tensor, out: Tensor) -> Tensor:
        calls.append(x)
        return double(x, out)

    registered(as_kernel(launch))
    assert registry.choose("double", CPU) is registry.choose("double", CPU)
    assert len(calls) == 1


def test_without_a_gpu_the_reference_runs_and_says_why() -> None:
    assert registry.unavailable(CPU) == "device is cpu"


def test_without_triton_the_reference_runs_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    assert registry.unavailable(torch.device("cuda")) == "triton is not installed"


def test_an_unknown_operator_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="no_such"):
        registry.get("no_such")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "found, wanted, error",
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([0.0, 1.0], [0.0, 0.0], 1.0),
        ([NAN, 1.0], [0.0, 1.0], INF),
        ([0.5, 1.0], [NAN, 1.0], INF),
        ([3.4028234663852886e38, 1.0], [INF, 1.0], INF),
        ([NAN, -INF, 1.0], [NAN, -INF, 1.0], 0.0),
        ([INF, 1.0], [-INF, 1.0], INF),
        ([1.0], [1.0, 1.0], INF),
    ],
)
def test_errors_are_relative_by_norm_and_what_is_not_finite_must_be_equal(
    found: list[float], wanted: list[float], error: float
) -> None:
    assert registry.worst_error(torch.tensor(found), torch.tensor(wanted)) == pytest.approx(error)


def test_what_is_large_is_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    found, wanted = torch.zeros(3, 5).T, torch.zeros(3, 5).T
    found[0, 0], wanted[0, 0], wanted[4, 2] = 3.0, 3.0, 4.0
    assert registry.worst_error(found, wanted) == pytest.approx(0.8)
    monkeypatch.setattr(registry, "_PIECE", 2)
    assert registry.worst_error(found, wanted) == pytest.approx(0.8)
    found[2, 1] = NAN
    assert registry.worst_error(found, wanted) == INF
    assert registry.worst_error(found[:0], wanted[:0]) == 0


def test_integers_must_be_equal_and_the_worst_of_all_counts() -> None:
    good, off = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.01])
    ids = torch.tensor([1, 2])
    assert registry.worst_error((off, [ids, 3], None), (good, [ids, 3], None)) == pytest.approx(0.01)
    assert registry.worst_error((good, [ids + 1]), (good, [ids])) == INF
    assert registry.worst_error((good,), (good, good)) == INF
    assert registry.worst_error(good, (good,)) == INF


def test_every_registered_operator_has_a_module_of_its_name() -> None:
    for name in registry.MODULES:
        assert registry.get(name).name == name
