"""What a decode step of each engine feeds, as plain numbers: nothing is loaded, and no torch here.

A projection times these forwards by their cost; a test holds them to what the engines record. A new engine adds one
function (options as in `scenario.ENGINES`, the target's shape, the batch) -> Plan, and its entry in `_PLANS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from zbench.engines.synthetic import Synthetic, parse
from zbench.errors import UserError
from zbench.models import zoo
from zbench.models.cost import Cost, forward_cost, head_cost
from zbench.models.drafters import DFlashConfig, Eagle3Config
from zbench.models.families import AnyConfig
from zbench.models.shard import WHOLE, Shard
from zbench.records import Role

# Up to so many rows of all sequences the head of a diffusion engine runs on all of them at once: else it reads its
# weights twice to save arithmetic. On 2 CPU cores a step of 8 rows gains 15% by it, one of 20 rows 4%, one of 32 none.
ONE_HEAD_ROWS = 16
PREFILL_ROWS = 512  # of one prefill forward: bounds the size of the visibility matrix and the activations
LONGEST_LOOKUP = 32  # tokens of a match that are compared, and that are drafted at most; options ask for no more


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward of a step; rows, pairs and logits are counted per sequence."""

    role: Role
    rows: int
    pairs: int  # (row, visible new row): what attention computes beside the committed prefix
    logits: int  # rows that ask for logits
    cost: Callable[..., Cost]  # (committed tokens of each sequence, bytes per element, shard=WHOLE): one rank's
    model: Literal["target", "drafter", "head"] = "target"


@dataclass(frozen=True, slots=True)
class Plan:
    """One decode step after the prefill."""

    forwards: tuple[Forward, ...]
    drafts: int = 0  # the most drafts a step can accept
    outcomes: tuple[int, ...] | None = None  # of diffusion: the rows kept for which the next drafts are prepared
    notes: tuple[str, ...] = ()  # what was assumed


def plan(engine: str, options: Mapping[str, Any], target: AnyConfig, batch: int = 1) -> Plan:
    """The decode step of an engine on `batch` sequences.

    Raises UserError for settings that the engine refuses, or an unknown shape.
    """
    if engine not in _PLANS:
        raise UserError(f"{engine}: what it feeds its model is not known, so it cannot be projected")
    found = _PLANS[engine](options, target, batch)
    return replace(found, notes=(*found.notes, _UNSEEN)) if options.get("lookup") else found


def on_target(
    target: AnyConfig, role: Role, rows: int, pairs: int, logits: int, places: Sequence[int] | None = None
) -> Forward:
    """A forward of the target; `places` of the rows as in `cost.forward_cost`."""

    def cost(contexts: Sequence[int], itemsize: int, shard: Shard = WHOLE) -> Cost:
        each = None if places is None else [places] * len(contexts)
        wanted = logits * len(contexts)
        return forward_cost(target, rows, contexts, wanted, itemsize, pairs, shard=shard, places=each)

    return Forward(role, rows, pairs, logits, cost)


def causal_pairs(rows: int) -> int:
    return rows * (rows + 1) // 2


def autoregressive(options: Mapping[str, Any], target: AnyConfig, batch: int = 1) -> Plan:
    return Plan((on_target(target, "decode", 1, 1, 1),))


def forward(options: Mapping[str, Any], target: AnyConfig, batch: int = 1) -> Plan:
    """One forward for each number of rows, logits for all of them; they are timed one by one and make no step."""
    return Plan(tuple(on_target(target, "decode", rows, causal_pairs(rows), rows) for rows in options["rows"]))


def reference(options: Mapping[str, Any], target: AnyConfig, batch: int = 1) -> Plan:
    """`generate` of transformers: what it computes, at the roofs; prompt lookup drafts without a model."""
    if options["assisted"] is None:
        return autoregressive(options, target)
    rows = 1 + options["prompt_lookup_tokens"]
    verify = on_target(target, "verify", rows, causal_pairs(rows), rows)
    return Plan((verify,), rows - 1, notes=("prompt lookup is taken to find as many tokens as it may draft",))


def prompt_lookup(options: Mapping[str, Any], target: AnyConfig, batch: int = 1) -> Plan:
    """One verify of the target: what it drafts costs no forward."""
    rows = 1 + options["tokens"]
    verify = on_target(target, "verify", rows, causal_pairs(rows), rows)
    return Plan((verify,), rows - 1, notes=("every step is taken to find as many tokens as it may draft",))


def looked_up(engine: str, options: Mapping[str, Any], target: AnyConfig) -> Plan | None:
    """No more than what an engine's step feeds that finds in the text all that it may, without what a drafter reads or
    masks besides; None where it does not look there."""
    if not options.get("lookup"):
        return None
    if engine == "diffusion":
        tokens = options["tokens"] or options["block_size"] - 1
    else:
        tokens = plan(engine, options, target).forwards[-1].rows - 1
    return prompt_lookup({"tokens": min(tokens, LONGEST_LOOKUP)}, target)


def eagle3(options: Mapping[str, Any], target: AnyConfig, batch: int = 1) -> Plan:
    """`depth` drafter forwards one after another, then one verify of a chain or a tree."""
    drafter = eagle3_drafter(options["drafter"], target)
    depth, k = options["depth"], options["top_k"]
    beam = options.get("beam") or k
    tokens = eagle3_tokens(depth, k, options["tokens"], drafter.draft_vocab, beam)

    def level(index: int) -> Forward:
        # Level 0 reads what was committed, at most a whole path, as here; each later one the beam of the level before.
        rows, pairs, wanted = (depth + 1, causal_pairs(depth + 1), 1) if index == 0 else (beam, beam * index, beam)

        def cost(contexts: Sequence[int], itemsize: int, shard: Shard = WHOLE) -> Cost:  # every rank has it whole
            return drafter.cost(rows, contexts, wanted * len(contexts), pairs, index == 0, itemsize)

        return Forward("draft", rows, pairs, wanted, cost, "drafter")

    rows = 1 + tokens
    pairs = causal_pairs(rows) if k == 1 else _tree_pairs(tokens, depth)
    notes: tuple[str, ...] = () if k == 1 else (_SPREAD,)
    if options.get("confidence"):
        notes += ("drafts are taken to have all their levels, though a confidence ends some sooner",)
    verify = on_target(target, "verify", rows, pairs, rows)
    return Plan((*(level(index) for index in range(depth)), verify), depth, notes=notes)


_UNSEEN = "no step is taken to find its drafts in the text, which is cheaper"
_SPREAD = "the nodes of a tree are taken to be spread evenly over its levels"


def _tree_pairs(tokens: int, depth: int) -> int:
    """A node sees its ancestors, the root and itself. Where the nodes stand depends on the text."""
    return 1 + tokens + round(tokens * (depth + 1) / 2)


def eagle3_tokens(depth: int, top_k: int, tokens: int | None, draft_vocab: int, beam: int | None = None) -> int:
    """Tokens that EAGLE-3 drafts per step; None is a whole chain, or the best 4 x depth nodes of a tree.

    Raises UserError for a setting that cannot be.
    """
    beam = top_k if beam is None else beam
    candidates = top_k + (depth - 1) * beam * top_k
    tokens = min(candidates, depth * (4 if top_k > 1 else 1)) if tokens is None else tokens
    if depth < 1 or not 1 <= top_k <= draft_vocab:
        raise UserError(f"eagle3: depth {depth} and top_k {top_k} must be positive, top_k within the draft vocabulary")
    if not 1 <= beam <= top_k:
        raise UserError(f"eagle3: a beam of {beam} does not fit the {top_k} tokens that top_k finds after each node")
    if not depth <= tokens <= candidates:
        raise UserError(f"eagle3: depth {depth} with top_k {top_k} drafts {depth} to {candidates} tokens, not {tokens}")
    return tokens


def dflash(options: Mapping[str, Any], target: AnyConfig, batch: int = 1) -> Plan:
    """One drafter forward over a block of masks, then one verify of the block as a chain or of a tree out of it."""
    drafter = dflash_drafter(options["drafter"], target)
    drafter = drafter.reduced(options["draft_vocab"]) if options.get("draft_vocab") else drafter
    block, tokens = options["block"] or drafter.block, options.get("tokens")
    rows, pairs = block, causal_pairs(block)
    if tokens is not None:
        drawn = options["synthetic"] is not None
        check_dflash_tree(tokens, block, drafter.body.vocab, options["draft_sampling"], drawn)
        rows, pairs = 1 + tokens, _tree_pairs(tokens, block - 1)
    read = min(rows, block)  # the target's features of an accepted path, at most

    def cost(contexts: Sequence[int], itemsize: int, shard: Shard = WHOLE) -> Cost:
        return drafter.cost(read, block, contexts, itemsize, shard)

    draft = Forward("draft", block, block * block, block - 1, cost, "drafter")
    verify = on_target(target, "verify", rows, pairs, rows)
    return Plan((draft, verify), read - 1, notes=() if tokens is None else (_SPREAD,))


def check_dflash_tree(tokens: int, block: int, vocab: int, draft_sampling: bool, synthetic: bool) -> None:
    """Raises UserError where no tree of `tokens` drafts can be made of a block over `vocab` tokens."""
    _check_tree("dflash", tokens, block, vocab, synthetic)
    if draft_sampling:
        raise UserError("dflash: draft_sampling draws one draft for a place; the tree that tokens asks for has several")


def diffusion(options: Mapping[str, Any], target: AnyConfig, batch: int = 1) -> Plan:
    """TiDAR (arXiv 2511.08923): verify a block and draft the next ones in one forward of one model.

    Rows: `block_size` = B draft rows, causal, the first of which is the last committed token; then a block of B masks
    for each prepared outcome r ("r draft rows are kept"), which sees the prefix, the first r draft rows and itself.
    Which r it is follows from the logits of the draft rows; then the head runs again, on the masks behind the first of
    block r, unless it ran on all of few rows. A step is taken to have a whole block of drafts. An adapter whose masks
    predict the token after their place saves one mask of each block.
    """
    if options["sampler"] == "denoise":
        raise UserError("diffusion: denoise takes as many forwards for a block as its confidence asks for")
    if options.get("tokens") is not None:
        return _diffusion_tree(options, target, batch)
    block = options["block_size"]
    proposals = block if options["proposals"] == "all" else min(options["proposals"], block)
    shift = mask_shift(options["adapter"], target)
    if not proposals or block == shift:
        return autoregressive(options, target)
    asked, notes = options["synthetic"], []
    chances = parse(asked, max(block - 1, 1)).chances if asked else ()
    outcomes = prepared(block, proposals, options["outcomes"], chances)
    if asked and "length" in asked and proposals < block:
        notes.append("a mean length is drawn with the least variance, so few outcomes cover every step")
    if options["adapter"]:
        notes.append("the mask adapter's own parameters are left out")
    forwards = [diffusion_forward(target, block, outcomes, batch, shift)]
    again = forwards[0].logits < forwards[0].rows
    if again and options["sampler"] == "logit_mix":
        forwards.append(head(target, len(outcomes)))
    if again and block > 1:
        forwards.append(head(target, block - 1))
    return Plan(tuple(forwards), block - 1, outcomes, tuple(notes))


def _diffusion_tree(options: Mapping[str, Any], target: AnyConfig, batch: int) -> Plan:
    """A tree instead of a chain: rows 1 + tokens + P (B - shift), of a block that is drafted in full."""
    block, tokens, shift = options["block_size"], options["tokens"], mask_shift(options["adapter"], target)
    check_diffusion_tree(tokens, block, shift, target.vocab, options["synthetic"] is not None)
    proposals = tokens + 1 if options["proposals"] == "all" else min(options["proposals"], tokens + 1)
    masks, nodes = block - shift, 1 + tokens
    pairs = _tree_pairs(tokens, block - 1) + round(proposals * masks * ((block + 1) / 2 + masks))
    rows = nodes + proposals * masks
    at_once = batch * rows <= ONE_HEAD_ROWS
    forwards = [on_target(target, "draft+verify", rows, pairs, rows if at_once else nodes)]
    if not at_once:
        forwards.append(head(target, block - 1))
    notes = [
        _SPREAD,
        "and so are those that a block of masks stands behind, one of which every step is taken to end at",
    ]
    if options["adapter"]:
        notes.append("the mask adapter's own parameters are left out")
    return Plan(tuple(forwards), min(block - 1, tokens), notes=tuple(notes))


def check_diffusion_shift(sampler: str, shift: int) -> None:
    """Raises UserError where a sampler needs masks that predict their own place, and an adapter's do not."""
    if shift and sampler in ("denoise", "logit_mix"):
        raise UserError(f"diffusion: {sampler} needs masks that predict their own place; this adapter's do not")


def check_diffusion_tree(tokens: int, block: int, shift: int, vocab: int, synthetic: bool) -> None:
    """Raises UserError where no tree of `tokens` drafts can be made of a block."""
    if block < 2 or block == shift:
        raise UserError(f"diffusion: blocks of {block} draft nothing that a tree could be made of")
    _check_tree("diffusion", tokens, block, vocab, synthetic)


def _check_tree(engine: str, tokens: int, block: int, vocab: int, synthetic: bool) -> None:
    if not 1 <= tokens <= vocab:
        raise UserError(f"{engine}: a tree of {tokens} tokens out of blocks of {block}; 1 to {vocab} can be")
    if synthetic and tokens < block - 1:
        raise UserError(f"{engine}: synthetic acceptance of {block - 1} drafts needs a tree of as many, not {tokens}")


def prepared(drafts: int, proposals: int, choose: str = "prefix", likelihood: Sequence[float] = ()) -> tuple[int, ...]:
    """The outcomes of a chain of `drafts` rows, 1 to `drafts`, that get one of `proposals` blocks of masks, ascending.

    `likelihood` of each in any unit, for most_likely; without it they are the shortest, and so they are among equals.
    """
    proposals = min(proposals, drafts)
    if choose == "uniform":
        return tuple(sorted({1 + (2 * i + 1) * drafts // (2 * proposals) for i in range(proposals)}))
    known = likelihood if choose == "most_likely" else ()
    ranked = sorted(range(1, drafts + 1), key=lambda kept: (-known[kept - 1] if known else 0, kept))
    return tuple(sorted(ranked[:proposals]))


def diffusion_forward(
    target: AnyConfig, block: int, outcomes: Sequence[int], batch: int = 1, shift: int = 0
) -> Forward:
    """A whole block of drafts, and a block of block - shift masks for each of `outcomes`."""
    masks = block - shift
    pairs = causal_pairs(block) + sum(masks * (kept + masks) for kept in outcomes)
    places = [*range(block), *(kept + mask for kept in outcomes for mask in range(masks))]
    rows = len(places)
    return on_target(target, "draft+verify", rows, pairs, rows if batch * rows <= ONE_HEAD_ROWS else block, places)


def head(target: AnyConfig, rows: int) -> Forward:
    """The output head alone, on rows of a forward that was just made."""

    def cost(contexts: Sequence[int], itemsize: int, shard: Shard = WHOLE) -> Cost:
        return head_cost(target, rows * len(contexts), itemsize, shard)

    return Forward("draft", rows, 0, rows, cost, "head")


def diffusion_tokens(found: Synthetic, outcomes: Sequence[int], fallback: str) -> float:
    """Mean tokens per step of a decode in which only `outcomes` have the next drafts prepared.

    A chain over the drafts a step is offered, from a whole block on. Acceptance is cut at what is offered. After an
    outcome without a block `nearest` has what the block of the next shorter one predicted further on, `redraft`
    nothing; a step without drafts gains one token and prepares for that.
    """
    whole = len(found.chances) - 1  # drafts of a block
    chain, gains = np.zeros((whole + 1, whole + 1)), np.zeros(whole + 1)
    for offered in range(whole + 1):
        for accepted, chance in enumerate(found.chances):
            kept = min(accepted, offered) + 1
            shorter = [r for r in outcomes if r == kept or (fallback == "nearest" and r < kept)]
            following = whole - (kept - max(shorter)) if shorter else 0
            chain[offered, whole if offered == 0 else max(following, 0)] += chance
            gains[offered] += chance * kept
    # Half a step at a time, so that a chain that alternates settles too.
    settled = np.linalg.matrix_power((chain + np.eye(whole + 1)) / 2, 4096)[whole]
    return float(settled @ gains)


def coverage(found: Synthetic, outcomes: Sequence[int]) -> float:
    """Chance that a step with a whole block of drafts ends in one of `outcomes`: r rows kept are r - 1 accepted."""
    return sum(found.chances[kept - 1] for kept in outcomes)


def eagle3_drafter(chosen: Mapping[str, Any], target: AnyConfig) -> Eagle3Config:
    """The shape of the drafter that a scenario chose. Raises UserError where it does not fit, or is not known here."""
    if chosen.get("random"):
        return Eagle3Config.of_target(target, **_given(draft_vocab=chosen.get("vocab")))
    from zbench.models import eagle3

    return eagle3.read_config(_folder(chosen, "eagle3"), target)


def dflash_drafter(chosen: Mapping[str, Any], target: AnyConfig) -> DFlashConfig:
    """As `eagle3_drafter`."""
    if chosen.get("random"):
        return DFlashConfig.of_target(target, **_given(layers=chosen.get("layers")))
    from zbench.models import dflash

    return dflash.read_config(_folder(chosen, "dflash"), target)


def mask_shift(chosen: Mapping[str, Any] | None, target: AnyConfig) -> int:
    """How far from its own place the token is that a mask predicts. Raises UserError as `eagle3_drafter` does."""
    if not chosen or chosen.get("random"):
        return 0
    from zbench.models import adapter

    return adapter.read_config(_folder(chosen, "adapter"), target).shift


def _folder(chosen: Mapping[str, Any], kind: zoo.Kind) -> str | Path:
    if "zoo" in chosen:
        return zoo.drafter(chosen["zoo"], kind)
    if "path" not in chosen:
        raise UserError(
            f"the shape of drafter {chosen['hub']} is not known here; give {{path: FOLDER}} or {{random: true}}"
        )
    return chosen["path"]


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


_PLANS: dict[str, Callable[[Mapping[str, Any], AnyConfig, int], Plan]] = {
    "autoregressive": autoregressive,
    "prompt_lookup": prompt_lookup,
    "forward": forward,
    "reference": reference,
    "eagle3": eagle3,
    "dflash": dflash,
    "diffusion": diffusion,
}
