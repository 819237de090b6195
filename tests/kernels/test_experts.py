"""One expert per row: the kernel against its reference and float64; who else is there changes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import ZayaConfig, ZayaForCausalLM

from tests.tiny import built, relative_error, widened
from zbench.kernels import ccgqa, cpu, experts, registry
from zbench.kernels.registry import worst_error
from zbench.models.rows import Rows

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("poisoned_outputs")
few = settings(max_examples=3, deadline=None, derandomize=True)


def one_by_one(x: Tensor, choice: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The definition in float64, a row at a time."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row, expert in enumerate(choice.tolist()):
        if expert < len(down):
            gate, up = (gate_up[expert].double().cpu() @ x[row].double().cpu()).chunk(2)
            out[row] = down[expert].double().cpu() @ (F.silu(gate) * up)
    return out


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_both_match_float64(device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    call = experts.random_call(device, dtype, 1, [2, 0, 3, 2, 1, 2], experts=3, width=40, inner=24)
    wanted = one_by_one(*call)
    for run in (experts.reference, experts.launch):
        found = run(*call)
        assert found.dtype == dtype
        assert ((found.double().cpu() - wanted).norm() / wanted.norm()).item() < tolerance
        assert (found[2] == 0).all()


@few
@given(
    choice=st.lists(st.integers(0, 2), min_size=1, max_size=20),
    width=st.sampled_from([4, 16, 20, 132]),
    inner=st.sampled_from([4, 12, 24]),
)
def test_any_shape_agrees_and_every_output_is_written(
    device: torch.device, choice: list[int], width: int, inner: int
) -> None:
    call = experts.random_call(device, torch.float32, 2, choice, 2, width, inner)
    assert worst_error(experts.launch(*call), experts.reference(*call)) < 1e-5


def test_what_other_rows_chose_does_not_change_a_result(device: torch.device) -> None:
    mine, others = [1, 0, 3], ([1] * 16, [0, 2, 3, 1] * 4, [3] * 16)  # 3 skips
    found = []
    for choice in others:
        call = experts.random_call(device, torch.bfloat16, 4, [*choice, *mine], experts=3, width=64, inner=16)
        found.append(experts.launch(*call)[-3:])
    assert found[0].equal(found[1]) and found[0].equal(found[2])
    assert (found[0][:2] != 0).all()


@pytest.mark.parametrize("tile", [(16, 32, 32, 4, 2), (32, 16, 64, 4, 2)])
def test_an_expert_with_more_rows_than_a_tile(
    device: torch.device, tile: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "tiles", lambda rows, chosen: tile)
    call = experts.random_call(device, torch.float32, 5, [0, 1, 0, 0, 0] * 8, experts=1, width=40, inner=16)
    assert worst_error(experts.launch(*call), experts.reference(*call)) < 1e-6


def test_many_rows_are_left_to_grouped_products(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    call = experts.random_call(device, torch.float32, 6, [0, 1] * 4, experts=1, width=8, inner=4)
    monkeypatch.setattr(experts, "MOST_ROWS", 7)
    assert experts.launch(*call).equal(experts.reference(*call))


def test_the_example_agrees(device: torch.device) -> None:
    assert registry.disagreement(experts.KERNEL, device) is None


def test_only_the_experts_that_were_hit_are_counted() -> None:
    x, choice, gate_up, down = experts.random_call(CPU, torch.bfloat16, 0, [2, 2, 4, 0, 4], 4, width=6, inner=5)
    work = experts.cost(x, choice, gate_up, down)
    assert work == (6 * 3 * 6 * 5, 2 * (2 * 3 * 6 * 5 + 5 * 6) + 8 * 5, 2 * 5 * 6)


def test_a_model_on_both_kernels_gives_what_it_gives_without(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZAYA1 in small: a ragged prefill, a tree of which a path is kept, and a row behind it."""
    torch.manual_seed(2)
    theirs = widened(
        ZayaForCausalLM(
            ZayaConfig(
                vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                head_dim=16, moe_intermediate_size=16, num_experts=2, router_hidden_size=8, eos_token_id=2,
                attn_implementation="eager",
            )
        )
    )  # fmt: skip
    ids = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    parents = torch.tensor([[-1, 0, 0, 2], [-1, -1, 1, 0]])

    def logits(model: object) -> list[Tensor]:
        cache = model.new_cache(2, 16)  # type: ignore[attr-defined]
        found = []
        for step in range(3):
            if step == 0:
                rows = Rows.chain(ids[:, :5], cache.lengths)
            elif step == 1:
                rows = Rows.tree(ids[:, 5:9], cache.lengths, parents)
            else:
                rows = Rows.chain(ids[:, 9:10], cache.lengths)
            found.append(model.forward(rows, cache).logits)  # type: ignore[attr-defined]
            if step == 0:
                cache.extend([5, 3])
            elif step == 1:
                cache.commit(torch.tensor([[0, 2, 3], [1, 2, -1]]), [3, 2])
        return found

    wanted = logits(built(theirs, "torch"))
    used, usual = [], registry.choose

    def launched(name: str, device: torch.device) -> registry.Choice:
        kernel = registry.get(name)
        if kernel not in (ccgqa.KERNEL, experts.KERNEL):
            return usual(name, device)

        def call(*arguments: object) -> object:
            used.append(name)
            return kernel.launch(*arguments)

        return registry.Choice(call, "triton")

    monkeypatch.setattr(registry, "choose", launched)
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "this test runs Triton's kernels")
    model = built(theirs, "auto")
    assert {model.kernels[name] for name in (ccgqa.KERNEL.name, experts.KERNEL.name)} == {"triton"}
    for found, want in zip(logits(model), wanted, strict=True):
        assert relative_error(found, want) < 1e-5
    assert sorted(set(used)) == ["ccgqa", "experts"] and len(used) == 6
