"""What a decode step of each engine feeds, as plain numbers: nothing is loaded, and no torch here.

A projection times these forwards by their cost; a test holds them to what the engines record. A new engine adds one
function (options as in `scenario.ENGINES`, the target's shape) -> Plan, and its entry in `_PLANS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from zbench.engines.synthetic import Synthetic
from zbench.errors import UserError
from zbench.models.cost import Cost, forward_cost
from zbench.models.drafters import DFlashConfig, Eagle3Config
from zbench.models.families import AnyConfig
from zbench.records import Role


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward of a step; rows, pairs and logits are counted per sequence."""

    role: Role
    rows: int
    pairs: int  # (row, visible new row): what attention computes beside the committed prefix
    logits: int  # rows that ask for logits
    cost: Callable[[Sequence[int], int], Cost]  # (committed tokens of each sequence, bytes per element)
    model: Literal["target", "drafter"] = "target"


@dataclass(frozen=True, slots=True)
class Plan:
    """One decode step after the prefill."""

    forwards: tuple[Forward, ...]
    drafts: int = 0  # the most drafts a step can accept
    outcomes: tuple[int, ...] | None = None  # acceptance lengths for which the next drafts are prepared; None: all
    notes: tuple[str, ...] = ()  # what was assumed


def plan(engine: str, options: Mapping[str, Any], target: AnyConfig) -> Plan:
    """The decode step of an engine. Raises UserError for settings that the engine refuses, or an unknown shape."""
    return _PLANS[engine](options, target)


def on_target(target: AnyConfig, role: Role, rows: int, pairs: int, logits: int, heads: int = 1) -> Forward:
    """A forward of the target; its output head is read `heads` times, once for each time that logits are asked."""

    def cost(contexts: Sequence[int], itemsize: int) -> Cost:
        once = forward_cost(target, rows, contexts, logits * len(contexts), itemsize, pairs)
        again = (heads - 1) * target.vocab * target.width * itemsize
        return Cost(once.flops, once.weight_bytes + again, once.kv_bytes, once.bytes_written)

    return Forward(role, rows, pairs, logits, cost)


def causal_pairs(rows: int) -> int:
    return rows * (rows + 1) // 2


def autoregressive(options: Mapping[str, Any], target: AnyConfig) -> Plan:
    return Plan((on_target(target, "decode", 1, 1, 1),))


def reference(options: Mapping[str, Any], target: AnyConfig) -> Plan:
    """`generate` of transformers: what it computes, at the roofs; prompt lookup drafts without a model."""
    if options["assisted"] is None:
        return autoregressive(options, target)
    rows = 1 + options["prompt_lookup_tokens"]
    verify = on_target(target, "verify", rows, causal_pairs(rows), rows)
    return Plan((verify,), rows - 1, notes=("prompt lookup is taken to find as many tokens as it may draft",))


def eagle3(options: Mapping[str, Any], target: AnyConfig) -> Plan:
    """`depth` drafter forwards one after another, then one verify of a chain or a tree."""
    drafter = _eagle3_drafter(options["drafter"], target)
    depth, k = options["depth"], options["top_k"]
    tokens = eagle3_tokens(depth, k, options["tokens"], drafter.draft_vocab)

    def level(index: int) -> Forward:
        # Level 0 reads what was committed, padded to the longest path; each later one the beam of the level before.
        rows, pairs, wanted = (depth + 1, causal_pairs(depth + 1), 1) if index == 0 else (k, k * index, k)

        def cost(contexts: Sequence[int], itemsize: int) -> Cost:
            return drafter.cost(rows, contexts, wanted * len(contexts), pairs, index == 0, itemsize)

        return Forward("draft", rows, pairs, wanted, cost, "drafter")

    rows = 1 + tokens
    # A node sees its ancestors and itself. Where the nodes of a tree stand depends on the text.
    pairs = causal_pairs(rows) if k == 1 else 1 + tokens + round(tokens * (depth + 1) / 2)
    notes = () if k == 1 else ("the nodes of a tree are taken to be spread evenly over its levels",)
    verify = on_target(target, "verify", rows, pairs, rows)
    return Plan((*(level(index) for index in range(depth)), verify), depth, notes=notes)


def eagle3_tokens(depth: int, top_k: int, tokens: int | None, draft_vocab: int) -> int:
    """Tokens that EAGLE-3 drafts per step; None is a whole chain, or the best 4 x depth nodes of a tree.

    Raises UserError for a setting that cannot be.
    """
    candidates = top_k + (depth - 1) * top_k**2
    tokens = min(candidates, depth * (4 if top_k > 1 else 1)) if tokens is None else tokens
    if depth < 1 or not 1 <= top_k <= draft_vocab:
        raise UserError(f"eagle3: depth {depth} and top_k {top_k} must be positive, top_k within the draft vocabulary")
    if not depth <= tokens <= candidates:
        raise UserError(f"eagle3: depth {depth} with top_k {top_k} drafts {depth} to {candidates} tokens, not {tokens}")
    return tokens


def dflash(options: Mapping[str, Any], target: AnyConfig) -> Plan:
    """One drafter forward over a block of masks, then one verify of the block as a chain."""
    drafter = _dflash_drafter(options["drafter"], target)
    block = options["block"] or drafter.block

    def cost(contexts: Sequence[int], itemsize: int) -> Cost:
        # It also reads the target's features of the rows verified last, as many as the block has.
        return drafter.cost(block, block, contexts, itemsize)

    draft = Forward("draft", block, block * block, block - 1, cost, "drafter")
    return Plan((draft, on_target(target, "verify", block, causal_pairs(block), block)), block - 1)


def diffusion(options: Mapping[str, Any], target: AnyConfig) -> Plan:
    """TiDAR (arXiv 2511.08923): verify a block and draft the next ones in one forward of one model.

    Rows: `block_size` = B draft rows, causal, the first of which is the token that the step before chose; then a block
    of B masks for each prepared outcome r = 1.. ("r draft rows are kept"), which sees the prefix, the first r draft
    rows and itself. `proposals` outcomes are prepared, "all" of them or the first few. Logits of the draft rows say
    which r it is; then those of the block for r are asked for.
    """
    block = options["block_size"]
    outcomes = prepared(block, options["proposals"])
    forward = diffusion_forward(target, block, outcomes)
    return Plan((forward,), block - 1, None if len(outcomes) == block else outcomes)


def prepared(block: int, proposals: int | Literal["all"]) -> tuple[int, ...]:
    """The outcomes that have a block: the first ones. Raises UserError for more than there are."""
    count = block if proposals == "all" else proposals
    if not 0 <= count <= block:
        raise UserError(f"diffusion: a block of {block} has {block} outcomes to prepare, not {count}")
    return tuple(range(1, count + 1))


def diffusion_forward(target: AnyConfig, block: int, outcomes: Sequence[int]) -> Forward:
    """The forward of `diffusion` with a block of masks for each of `outcomes`."""
    pairs = causal_pairs(block) + sum(block * (kept + block) for kept in outcomes)
    heads = 2 if outcomes else 1
    return on_target(target, "draft+verify", block * (1 + len(outcomes)), pairs, heads * block, heads)


def tokens_per_step(found: Synthetic, outcomes: Sequence[int] | None = None) -> float:
    """Mean tokens per step, where only some outcomes have the next drafts prepared (None: all have).

    A step without drafts gains the one token that is already chosen, and prepares drafts again. With c the chance
    that an outcome is prepared, 1 / (2 - c) of the steps have drafts, and gain `found.length` on average.
    """
    if outcomes is None:
        return found.length
    if not outcomes:
        return 1.0
    covered = coverage(found, outcomes)
    return (found.length + 1 - covered) / (2 - covered)


def coverage(found: Synthetic, outcomes: Sequence[int]) -> float:
    """Chance that a step with drafts ends in one of `outcomes`: r tokens kept are r - 1 accepted drafts."""
    return sum(found.chances[kept - 1] for kept in outcomes)


def likeliest(found: Synthetic, count: int) -> tuple[int, ...]:
    """The `count` outcomes of the greatest chance, ascending; of equal chances the shorter goes first."""
    ranked = sorted(range(len(found.chances)), key=lambda accepted: -found.chances[accepted])
    return tuple(sorted(accepted + 1 for accepted in ranked[:count]))


def _eagle3_drafter(chosen: Mapping[str, Any], target: AnyConfig) -> Eagle3Config:
    if chosen.get("random"):
        return Eagle3Config.of_target(target, **_given(draft_vocab=chosen.get("vocab")))
    from zbench.models import eagle3

    return eagle3.read_config(_folder(chosen), target)


def _dflash_drafter(chosen: Mapping[str, Any], target: AnyConfig) -> DFlashConfig:
    if chosen.get("random"):
        return DFlashConfig.of_target(target, **_given(layers=chosen.get("layers")))
    from zbench.models import dflash

    return dflash.read_config(_folder(chosen), target)


def _folder(chosen: Mapping[str, Any]) -> str:
    if "path" not in chosen:
        raise UserError(
            f"the shape of drafter {chosen['hub']} is not known here; give {{path: FOLDER}}, {{random: true}}"
        )
    return chosen["path"]


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


_PLANS: dict[str, Callable[[Mapping[str, Any], AnyConfig], Plan]] = {
    "autoregressive": autoregressive,
    "reference": reference,
    "eagle3": eagle3,
    "dflash": dflash,
    "diffusion": diffusion,
}
