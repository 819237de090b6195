"""What to compare: the YAML scenario, its matrix, and the cells that a run measures.

A scenario goes one way: text -> document (plain data that remembers the line of every key) -> `Scenario` (checked)
-> points of the matrix (each a `Scenario` of its own) -> cells (one engine at one point).
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from zbench import MOST_THREADS
from zbench.engines import synthetic
from zbench.errors import UserError
from zbench.models import families
from zbench.records import PEERS, CellRecord

# --- The YAML, as models. The descriptions are the user's reference: `zbench schema` publishes them. ---


STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Strict(BaseModel):
    model_config = STRICT


# Pydantic reports the branch of a union within an error's location. No YAML key is spelt like this, so it can be told
# from the keys again.
_BRANCH = "\0"

_NAME, _DEVICE = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$", r"^(auto|cpu|(cuda|rocm)(:\d+)?)$"
Count = Annotated[int, Field(ge=1)]
_Threads = Annotated[int, Field(ge=1, le=MOST_THREADS)] | None
Items = Field(strict=False)  # a YAML list for a tuple


def _key_branch(keys: Collection[str]) -> Discriminator:
    """Tells the mappings of a union apart by the one key that each must have."""

    def branch(value: Any) -> str | None:
        if isinstance(value, str):
            return f"{_BRANCH}name"
        given = value if isinstance(value, dict) else dir(value)
        return next((f"{_BRANCH}{key}" for key in keys if key in given), None)

    return Discriminator(branch)


class EngineSpec(_Strict):
    """What all engines have in common. A new engine is a subclass with its options and a line in `ENGINES`."""

    name: str = Field(description="Which engine decodes.")
    label: str | None = Field(
        default=None,
        pattern=r"\w",
        description="What reports call it; unique in the scenario. Default: the name and the options that were set.",
        examples=["transformers generate"],
    )
    sweep: dict[str, Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]] = Field(
        default={},
        exclude=True,  # a file's engines are written out when it is read
        description="Dotted options and the values that each takes: stands for one engine for every combination, whose"
        " label says which.",
        examples=[{"proposals": [1, 2, 4]}],
    )

    @field_validator("sweep")
    @classmethod
    def _varies_options(cls, sweep: dict[str, Any]) -> dict[str, Any]:
        if "label" in sweep:
            raise ValueError("a label is no option: what is swept is added to it")
        if "sweep" in sweep:
            raise ValueError("a sweep is no option: one sweep varies them all")
        return sweep

    @property
    def options(self) -> dict[str, Any]:
        return self.model_dump(exclude={"name", "label"})

    @property
    def title(self) -> str:
        """The label, or else the name with every plain option that differs from its default."""
        fields = type(self).model_fields
        chosen = [
            f"{key}: {value}"
            for key, value in self.options.items()
            if value != fields[key].default and not isinstance(value, dict)
        ]
        return self.label or (f"{self.name} ({', '.join(chosen)})" if chosen else self.name)


_Execution = Annotated[
    Literal["auto", "native", "eager", "compiled", "graph"],
    Field(
        description="What runs the target: native (own CPU kernels), eager (torch's operators one by one), compiled"
        " (each layer by torch.compile) or graph (CUDA or HIP graphs over static rows); auto is native on a CPU if it"
        " can, else eager. Compiling and capturing are no part of any measured time."
    ),
]


class AutoregressiveSpec(EngineSpec):
    """One token per forward on zbench's own runtime: what the other engines are compared with."""

    name: Literal["autoregressive"] = Field(description="Which engine decodes.")
    execution: _Execution = "auto"


class ForwardSpec(EngineSpec):
    """Times forwards of several numbers of rows at every decoded token: how many tokens can ride in one forward."""

    name: Literal["forward"] = Field(description="Which engine decodes.")
    rows: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Items] = Field(
        default=(1, 2, 4, 8, 16, 32, 64),
        description="Rows per sequence of the forwards, ascending from 1; all rows ask for logits, one is committed.",
    )
    execution: _Execution = "auto"

    @field_validator("rows")
    @classmethod
    def _ascend_from_one(cls, rows: tuple[int, ...]) -> tuple[int, ...]:
        if len(rows) < 2 or rows[0] != 1 or any(next_ <= one for one, next_ in itertools.pairwise(rows)):
            raise ValueError("give at least two numbers of rows, ascending from 1")
        return rows


class ReferenceSpec(EngineSpec):
    """`generate` of the transformers library: an oracle for the tokens and a peer for the speed."""

    name: Literal["reference"] = Field(description="Which engine decodes.")
    assisted: Literal["prompt_lookup"] | None = Field(
        default=None,
        description="prompt_lookup drafts by copying from the prompt (batch 1 only); null decodes token by token.",
    )
    prompt_lookup_tokens: Count = Field(
        default=10, description="Tokens drafted per step when assisted is prompt_lookup."
    )

    @model_validator(mode="after")
    def _has_no_idle_option(self) -> ReferenceSpec:
        if self.assisted is None and self.prompt_lookup_tokens != 10:
            raise ValueError("prompt_lookup_tokens does nothing without assisted: prompt_lookup")
        return self


class DrafterFolder(_Strict):
    """A drafter's published checkpoint in a folder."""

    path: str = Field(
        min_length=1,
        description="Folder with config.json and safetensors, relative to where the command runs.",
        examples=["drafters/llama-eagle3"],
    )


class DrafterHub(_Strict):
    """A drafter's published checkpoint on the Hugging Face hub."""

    hub: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="Hub id.", examples=["z-lab/Qwen3-8B-DFlash-b16"])
    revision: str | None = Field(
        None, min_length=1, description="Commit, tag or branch; null takes main, which may change under you."
    )


class DrafterZoo(_Strict):
    """A drafter that comes with zbench, trained for one of its models."""

    zoo: str = Field(description="Its name in `zbench models list`.", examples=["smollm2-135m-eagle3"])


class DrafterRandom(_Strict):
    """A drafter of the published shape with random weights: its speed is real, its drafts are noise."""

    random: Literal[True] = Field(description="Make one that fits the target.")
    seed: int = Field(0, ge=0, description="Seed of the weights.")
    layers: Count | None = Field(None, description="Layers (dflash only); null makes five.")
    vocab: Count | None = Field(None, description="Draft vocabulary (eagle3 only); null makes 8192 or the target's.")


class SyntheticLength(_Strict):
    """Acceptance of a given length."""

    length: float = Field(ge=1, description="Mean tokens gained per step, the bonus token included.", examples=[3.2])


class SyntheticRate(_Strict):
    """Acceptance of one rate."""

    rate: float = Field(
        ge=0, le=1, description="Chance that a draft is accepted once the one before it was.", examples=[0.7]
    )


class SyntheticRates(_Strict):
    """Acceptance of given rates."""

    rates: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(strict=False, min_length=1)] = Field(
        description="Chance that draft i is accepted once draft i - 1 was, one for each.", examples=[[0.8, 0.6, 0.5]]
    )


class SyntheticHistogram(_Strict):
    """A recorded run's acceptance, replayed."""

    histogram: dict[str, int] = Field(
        min_length=1,
        description="Accepted drafts (bonus excluded) -> number of steps.",
        examples=[{"0": 10, "1": 7, "2": 3}],
    )


_DRAFTERS: dict[str, type[_Strict]] = {
    "zoo": DrafterZoo,
    "path": DrafterFolder,
    "hub": DrafterHub,
    "random": DrafterRandom,
}
_SYNTHETICS: dict[str, type[_Strict]] = {
    "length": SyntheticLength,
    "rate": SyntheticRate,
    "rates": SyntheticRates,
    "histogram": SyntheticHistogram,
}
_Drafter = Annotated[
    Annotated[DrafterZoo, Tag(f"{_BRANCH}zoo")]
    | Annotated[DrafterFolder, Tag(f"{_BRANCH}path")]
    | Annotated[DrafterHub, Tag(f"{_BRANCH}hub")]
    | Annotated[DrafterRandom, Tag(f"{_BRANCH}random")],
    _key_branch(_DRAFTERS),
]
_WHENCE = "Where the drafter comes from: {zoo: NAME}, {path: FOLDER}, {hub: ORG/NAME} or {random: true}."
_Acceptance = Annotated[
    Annotated[SyntheticLength, Tag(f"{_BRANCH}length")]
    | Annotated[SyntheticRate, Tag(f"{_BRANCH}rate")]
    | Annotated[SyntheticRates, Tag(f"{_BRANCH}rates")]
    | Annotated[SyntheticHistogram, Tag(f"{_BRANCH}histogram")],
    _key_branch(_SYNTHETICS),
]
_Synthetic = Annotated[
    _Acceptance | None,
    Field(
        description="Draw how many drafts are accepted, by {length: L}, {rate: C}, {rates: [...]} or {histogram:"
        " {...}}, instead of verifying them: the speed is real, the text is not, and every figure says so. null"
        " verifies.",
        examples=[{"length": 3.2}],
    ),
]
_Block = Annotated[
    Annotated[int, Field(ge=2, le=64)] | None,
    Field(description="Tokens per block, the anchor included: block - 1 are drafted. null takes the checkpoint's."),
]
_DraftSampling = Annotated[
    bool,
    Field(description="Draw drafts at the request's temperature and verify by rejection; false takes the likeliest."),
]


class DraftingSpec(EngineSpec):
    """What engines that draft have in common."""

    execution: _Execution = "auto"

    @model_serializer(mode="wrap")
    def _as_before_there_was_a_choice(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `execution: auto`, so that scenarios and cells equal those of runs from before the key."""
        return {key: value for key, value in plain(self).items() if (key, value) != ("execution", "auto")}


class PromptLookupSpec(DraftingSpec):
    """Drafts copied from the text itself, where its last tokens stood before: no drafter, no training."""

    name: Literal["prompt_lookup"] = Field(description="Which engine decodes.")
    match: Annotated[int, Field(ge=1, le=32)] = Field(
        1, description="Tokens that must have stood before, at the least; where they have not, one token is decoded."
    )
    tokens: Annotated[int, Field(ge=1, le=32)] = Field(
        8, description="Tokens drafted per step: twice as many as matched, and so many at most."
    )


_Lookup = Annotated[
    Annotated[int, Field(ge=1, le=32)] | None,
    Field(
        description="Where at least so many last tokens stood before, verify what followed then instead of drafting: up"
        " to as many tokens as this engine verifies else (32 at most), and twice as many as matched. null never looks"
        " there."
    ),
]


class SpeculativeSpec(DraftingSpec):
    """What engines with a drafter have in common."""

    drafter: _Drafter = Field(
        description=_WHENCE,
        examples=[{"zoo": "smollm2-135m-eagle3"}, {"path": "drafters/llama-eagle3"}, {"random": True}],
    )
    synthetic: _Synthetic = None


class Eagle3Spec(SpeculativeSpec):
    """EAGLE-3: a one-layer drafter on the target's hidden states proposes a chain or a tree."""

    name: Literal["eagle3"] = Field(description="Which engine decodes.")
    depth: Count = Field(4, description="Levels drafted per step.")
    top_k: Count = Field(1, description="Tokens tried after each node: 1 drafts a chain, more a dynamic tree.")
    beam: Count | None = Field(
        None, description="Nodes of a level that the next goes on from; null is top_k, 1 a chain with siblings."
    )
    tokens: Count | None = Field(
        None, description="Tokens drafted per step; null is depth for a chain and 4 x depth for a tree."
    )
    confidence: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="End a chain where the drafter gives its drafts so far less than this chance of being right; 0 "
        "drafts depth levels in every step.",
    )
    lookup: _Lookup = None

    @model_validator(mode="after")
    def _has_no_idle_option(self) -> Eagle3Spec:
        if isinstance(self.drafter, DrafterRandom) and self.drafter.layers is not None:
            raise ValueError("drafter.layers is for dflash: an EAGLE-3 drafter has one")
        _without_lookup(self.lookup, synthetic=self.synthetic)
        if self.confidence and (self.beam or self.top_k) > 1:
            raise ValueError("confidence ends chains; with top_k trees are drafted, unless beam is 1")
        if self.confidence and self.synthetic is not None:
            raise ValueError("synthetic acceptance asks no drafter, so it takes no confidence")
        return self


class DFlashSpec(SpeculativeSpec):
    """DFlash: a block-diffusion drafter fills a block of masks in one forward."""

    name: Literal["dflash"] = Field(description="Which engine decodes.")
    block: _Block = None
    draft_vocab: Count | None = Field(
        None,
        description="Draft only tokens with ids below this, in BPE vocabularies the most frequent ones, by as many rows"
        " of the target's head. null drafts any token.",
    )
    tokens: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None,
        description="Verify a tree of so many tokens, the likeliest paths through the block, long and short ones. null"
        " verifies the block's likeliest tokens as a chain.",
    )
    draft_sampling: _DraftSampling = False
    lookup: _Lookup = None

    @model_validator(mode="after")
    def _has_no_idle_option(self) -> DFlashSpec:
        _drafts_any_token(self.drafter)
        _without_lookup(self.lookup, synthetic=self.synthetic, draft_sampling=self.draft_sampling)
        return self


class AdapterRandom(_Strict):
    """An adapter with random weights: its cost is real, its drafts are noise."""

    random: Literal[True] = Field(description="Make one that fits the target.")
    seed: int = Field(0, ge=0, description="Seed of the weights.")
    rank: Count = Field(16, description="Rank of its low-rank matrices.")


class AdapterFolder(DrafterFolder):
    """A mask adapter in a folder, in PEFT's layout."""


class AdapterHub(DrafterHub):
    """A mask adapter on the Hugging Face hub, in PEFT's layout."""


class AdapterZoo(DrafterZoo):
    """A mask adapter that comes with zbench, trained for one of its models."""

    zoo: str = Field(description="Its name in `zbench models list`.", examples=["smollm2-135m-tidar"])


_ADAPTERS: dict[str, type[_Strict]] = {
    "zoo": AdapterZoo,
    "path": AdapterFolder,
    "hub": AdapterHub,
    "random": AdapterRandom,
}
_Adapter = Annotated[
    Annotated[AdapterZoo, Tag(f"{_BRANCH}zoo")]
    | Annotated[AdapterFolder, Tag(f"{_BRANCH}path")]
    | Annotated[AdapterHub, Tag(f"{_BRANCH}hub")]
    | Annotated[AdapterRandom, Tag(f"{_BRANCH}random")],
    _key_branch(_ADAPTERS),
]


def _drafts_any_token(drafter: BaseModel) -> None:
    """Raises ValueError where a vocabulary is asked of a drafter that reads the target's head."""
    if isinstance(drafter, DrafterRandom) and drafter.vocab is not None:
        raise ValueError("drafter.vocab is for eagle3: a DFlash drafter reads the target's own head")


def _proposals(value: int | str) -> int | str:
    if value != "all" and not (isinstance(value, int) and 0 <= value <= 33):
        raise ValueError(f"expected 0 to 33 or all, found {_found(value)}")
    return value


def _acceptance(asked: BaseModel | None, drafts: int) -> None:
    """Raises ValueError unless synthetic acceptance can be drawn for so many drafts."""
    if asked is not None:
        try:
            synthetic.parse(asked.model_dump(), drafts)
        except UserError as error:
            raise ValueError(str(error)) from error


def _without_lookup(lookup: int | None, **others: object) -> None:
    """Raises ValueError where lookups and another option that is set say different things of drafts."""
    given = [name for name, value in others.items() if value]
    if lookup and given:
        raise ValueError(f"lookup copies drafts from the text and verifies them: leave it or {given[0]} out")


class DiffusionSpec(DraftingSpec):
    """Block diffusion: one model drafts and verifies in one forward (TiDAR), or denoises block after block."""

    name: Literal["diffusion"] = Field(description="Which engine decodes.")
    block_size: Annotated[int, Field(ge=1, le=32)] = Field(
        8, description="Tokens per block; the first is known, so block_size - 1 are drafted."
    )
    proposals: Annotated[int | str, AfterValidator(_proposals)] = Field(
        "all",
        description="Masked blocks per forward, each prepared for one number of kept drafts; all or a number of at"
        " least block_size prepares every outcome, 0 decodes autoregressively.",
    )
    outcomes: Literal["most_likely", "prefix", "uniform"] = Field(
        "most_likely",
        description="Which outcomes get a block when not all do: those that this decode met most often so far, the"
        " shortest, or evenly spread ones.",
    )
    tokens: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None,
        description="Verify a tree of so many tokens, the likeliest paths through the block; proposals then counts the"
        " nodes, of which the likeliest to be the last get a block. null verifies the block's likeliest tokens as a"
        " chain.",
    )
    fallback: Literal["nearest", "redraft"] = Field(
        "nearest",
        description="Where no block was prepared: nearest takes what the block of the next shorter outcome predicted"
        " further on, redraft decodes one token and drafts anew.",
    )
    sampler: Literal["lossless", "logit_mix", "trust_diffusion", "denoise"] = Field(
        "lossless",
        description="lossless accepts what the model's own distribution confirms; logit_mix mixes the masks' logits"
        " into it by beta; trust_diffusion also accepts drafts of at least threshold probability; denoise reveals a"
        " block over several forwards, by threshold, and verifies nothing. All but lossless change the output.",
    )
    beta: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="logit_mix: share of the model's own logits wherever a block stands at the same place, 1 elsewhere;"
        " 1 everywhere is lossless. null is 0.5.",
    )
    threshold: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="trust_diffusion, denoise: probability from which a token is taken. null is 0.9."
    )
    draft_sampling: _DraftSampling = False
    lookup: _Lookup = None
    adapter: _Adapter | None = Field(
        None,
        description="Parameters of the mask rows: {zoo: NAME}, {path: FOLDER}, {hub: ORG/NAME} or {random: true}; null"
        " means that the model's own weights serve masks too.",
    )
    mask_id: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Token that stands for a mask; null takes the model's, or with an adapter or synthetic acceptance"
        " the last of the vocabulary.",
    )
    synthetic: _Synthetic = None

    @model_validator(mode="after")
    def _has_no_idle_option(self) -> DiffusionSpec:
        if self.beta is not None and self.sampler != "logit_mix":
            raise ValueError("beta does nothing without sampler: logit_mix")
        if self.threshold is not None and self.sampler not in ("trust_diffusion", "denoise"):
            raise ValueError("threshold does nothing without sampler: trust_diffusion or denoise")
        if self.sampler != "lossless" and self.synthetic is not None:
            raise ValueError("synthetic acceptance verifies nothing, so it takes no sampler")
        choosing = self.model_fields_set & {"outcomes", "fallback"}
        if self.sampler == "denoise" and (self.draft_sampling or choosing or "proposals" in self.model_fields_set):
            raise ValueError(
                "sampler: denoise prepares no outcomes; leave out proposals, outcomes, fallback and draft_sampling"
            )
        if self.proposals == 0 and (self.synthetic or self.sampler != "lossless" or self.draft_sampling or choosing):
            raise ValueError("proposals: 0 decodes autoregressively and takes no option of drafting or verifying")
        if self.tokens is not None and (
            choosing or self.sampler != "lossless" or self.draft_sampling or self.proposals == 0
        ):
            raise ValueError(
                "tokens verifies a tree: leave out proposals: 0, outcomes, fallback, sampler and draft_sampling"
            )
        if choosing and (self.proposals == "all" or int(self.proposals) >= self.block_size):
            raise ValueError(f"{' and '.join(sorted(choosing))} do nothing where every outcome is prepared")
        if self.draft_sampling and self.sampler != "lossless":
            raise ValueError("draft_sampling is for sampler: lossless")
        others = {
            "sampler": self.sampler != "lossless",
            "proposals: 0": self.proposals == 0,
            "block_size: 1": self.block_size == 1,
        }
        _without_lookup(self.lookup, synthetic=self.synthetic, draft_sampling=self.draft_sampling, **others)
        _acceptance(self.synthetic, max(self.block_size - 1, 1))
        return self


class EndpointLoad(_Strict):
    """How the requests of a trial arrive. Closed: so many at a time. Open: at a rate, whatever is still running."""

    concurrency: Count | None = Field(None, description="Requests in flight at most; null does not limit them.")
    rate: float | None = Field(
        None, gt=0, description="Mean arrivals per second; null sends as soon as a place is free."
    )
    arrivals: Literal["poisson", "constant"] = Field("poisson", description="Gaps between arrivals at that rate.")

    @model_validator(mode="after")
    def _has_no_idle_option(self) -> EndpointLoad:
        if self.concurrency is None and self.rate is None:
            raise ValueError("give concurrency, rate or both; without load all prompts of a batch are sent at once")
        if self.rate is None and "arrivals" in self.model_fields_set:
            raise ValueError("arrivals does nothing without rate")
        return self


class EndpointLimits(_Strict):
    """What a request must keep to count as goodput. At least one."""

    ttft: float | None = Field(None, gt=0, description="Seconds to the first token.")
    tpot: float | None = Field(None, gt=0, description="Seconds per token after the first.")
    latency: float | None = Field(None, gt=0, description="Seconds to the last token.")

    @model_validator(mode="after")
    def _limits_something(self) -> EndpointLimits:
        if not any((self.ttft, self.tpot, self.latency)):
            raise ValueError("give ttft, tpot or latency, in seconds")
        return self


_SECRET = re.compile(r"api[-_]?key|token$|secret|password|authorization", re.IGNORECASE)


# What a system takes as an argument, and as a variable's name.
_Word = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
_Variable = Annotated[str, StringConstraints(pattern=r"^[^=\x00]+$")]


class EndpointServer(_Strict):
    """A server that the run starts, watches and stops. In the command, {port} is a free port and {model} the folder of
    the scenario's model."""

    command: Annotated[tuple[_Word, ...], Field(strict=False, min_length=1)] = Field(
        description="Program and arguments, no shell.", examples=[["vllm", "serve", "{model}", "--port", "{port}"]]
    )
    health: str = Field(
        "/health",
        pattern="^/[!-~]*$",
        description="Path that answers 200 once the server can serve; /v1/models if unknown.",
    )
    startup: float = Field(600, gt=0, description="Seconds that it may take to become healthy.")
    environment: dict[_Variable, _Word] = Field(
        {}, description="Variables added to those that zbench runs with.", examples=[{"OMP_NUM_THREADS": "2"}]
    )

    @model_validator(mode="after")
    def _has_no_secret(self) -> EndpointServer:
        for word in (*self.command, *self.environment):
            if (word.startswith("-") or word in self.environment) and _SECRET.search(word.split("=")[0]):
                raise ValueError(
                    f"{word.split('=')[0]} would be written to the run folder; set it in the environment zbench runs in"
                )
        return self


class EndpointSpec(EngineSpec):
    """A server that speaks the OpenAI API: vLLM, SGLang, TensorRT-LLM, llama.cpp, transformers serve, ..."""

    name: Literal["endpoint"] = Field(description="Which engine decodes.")
    url: str | None = Field(
        None,
        pattern=r"^https?://[^/@?#\s]+(/[^?#\s]*)?$",
        description="Base of its API; /v1 is added to a bare host. null is where `server` listens.",
        examples=["http://127.0.0.1:8000/v1"],
    )
    server: EndpointServer | None = Field(None, description="Server to start; null means that it runs already.")
    served_model: str | None = Field(
        None, min_length=1, description="Name of the model there; null takes the first that it lists."
    )
    api: Literal["completions", "chat"] = Field(
        "completions", description="completions continues the very prompt; chat lets the server apply its template."
    )
    send: Literal["tokens", "text"] = Field(
        "tokens", description="completions: prompts as token ids, or as text for servers that take no ids."
    )
    load: EndpointLoad | None = Field(None, description="How requests arrive; null sends a whole batch at once.")
    limits: EndpointLimits | None = Field(None, description="What goodput demands of a request; null reports none.")
    prefix_cache: Literal["auto", "reset", "unique", "keep"] = Field(
        "auto",
        description="What keeps repeats from measuring the server's prefix cache. reset asks the server to empty it"
        " before every trial, unique puts a few tokens of its own before the words of every prompt, keep does nothing;"
        " auto resets where the server can, does nothing where it has no such cache, and else is unique.",
    )
    timeout: float = Field(600, gt=0, description="Seconds that a request may take.")
    retries: int = Field(0, ge=0, le=10, description="Times that a request refused at once is sent again.")
    api_key_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_]\w*$",
        description="Environment variable with the API key; the key itself is never written.",
        examples=["OPENAI_API_KEY"],
    )
    extra: dict[str, Any] = Field(
        {},
        description="More fields of the request's body.",
        examples=[{"chat_template_kwargs": {"enable_thinking": False}}],
    )

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str | None) -> str | None:
        import httpx

        try:
            found = httpx.URL((url or "http://host").replace("{port}", "80"))
            found.host.encode("idna")
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ValueError(f"no server has this address: {error}") from error
        if not 0 < (80 if found.port is None else found.port) < 1 << 16:
            raise ValueError(f"no server has port {found.port}; ports are 1 to 65535")
        return url

    @model_validator(mode="after")
    def _is_possible(self) -> EndpointSpec:
        if self.url is None and self.server is None:
            raise ValueError("give url, or server with the command that starts it")
        if self.url is None and not any("{port}" in word for word in self.server.command):  # type: ignore[union-attr]
            raise ValueError("the server's command has no {port}; say where it listens with url")
        if self.api == "chat" and "send" in self.model_fields_set:
            raise ValueError("send is for api: completions; chat sends messages")
        own = {
            "model",
            "prompt",
            "messages",
            "stream",
            "stream_options",
            "max_tokens",
            "temperature",
            "top_p",
            "seed",
            "n",
        }
        if taken := sorted(own & self.extra.keys()):
            raise ValueError(f"extra.{taken[0]} is set by the scenario itself")
        if secret := next((key for key in self.extra if _SECRET.search(key)), None):
            raise ValueError(f"extra.{secret} would be written to the run folder; use api_key_env")
        return self


class LlamaCppSpec(EngineSpec):
    """llama.cpp in this process, on the same weights written as a GGUF (needs llama-cpp-python)."""

    name: Literal["llama_cpp"] = Field(description="Which engine decodes.")
    context: Count = Field(4096, description="Tokens that its cache holds, prompt and output together.")
    flash_attention: bool = Field(True, description="Fused attention, as llama.cpp's own programs run where they can.")


class VllmSpec(EngineSpec):
    """vLLM in this process, without a server (needs vllm)."""

    name: Literal["vllm"] = Field(description="Which engine decodes.")
    context: Count = Field(4096, description="Tokens of the longest sequence, prompt and output together.")
    settings: dict[str, Any] = Field(
        {},
        description="More arguments of vLLM's EngineArgs.",
        examples=[{"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}}],
    )


class DFlashReferenceSpec(EngineSpec):
    """DFlash as its authors publish it, on the transformers model (needs the package dflash)."""

    name: Literal["dflash_reference"] = Field(description="Which engine decodes.")
    drafter: _Drafter = Field(
        description=_WHENCE,
        examples=[{"hub": "z-lab/Qwen3-8B-DFlash-b16"}],
    )
    block: _Block = None

    @model_validator(mode="after")
    def _has_no_idle_option(self) -> DFlashReferenceSpec:
        _drafts_any_token(self.drafter)
        return self


ENGINES: dict[str, type[EngineSpec]] = {
    "autoregressive": AutoregressiveSpec,
    "eagle3": Eagle3Spec,
    "dflash": DFlashSpec,
    "diffusion": DiffusionSpec,
    "prompt_lookup": PromptLookupSpec,
    "forward": ForwardSpec,
    "reference": ReferenceSpec,
    "endpoint": EndpointSpec,
    "llama_cpp": LlamaCppSpec,
    "vllm": VllmSpec,
    "dflash_reference": DFlashReferenceSpec,
}


class ModelFolder(_Strict):
    """A model in a folder."""

    path: str = Field(
        min_length=1,
        description="Hugging Face model folder with safetensors, relative to where the command runs.",
        examples=["models/my-llama"],
    )


class ModelHub(_Strict):
    """A model of the Hugging Face hub."""

    hub: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="Hub id.", examples=["HuggingFaceTB/SmolLM2-360M"])
    revision: str | None = Field(
        default=None, min_length=1, description="Commit, tag or branch; null takes main, which may change under you."
    )


class ModelShape(_Strict):
    """The shape of a decoder-only transformer."""

    family: Literal["llama", "mistral", "qwen2", "qwen3"] = Field(description="Architecture family.")
    layers: Count = Field(description="Transformer blocks.")
    width: Count = Field(description="Size of the residual stream.")
    ffn: Count = Field(description="Inner size of the gated MLP.")
    heads: Count = Field(description="Query heads.")
    kv_heads: Count | None = Field(default=None, description="Key and value heads; null means as many as query heads.")
    head_dim: Count | None = Field(default=None, description="Size of a head; null means width / heads.")
    vocab: Count = Field(description="Tokens in the vocabulary.")
    max_positions: Count = Field(description="Longest prompt and output together, in tokens.")
    rope_theta: float = Field(default=10000.0, gt=0, description="Base of the rotary position embedding.")
    rope_scaling: dict[str, str | float] | None = Field(
        default=None,
        description="Rotary scaling as in Hugging Face configs, with its rope_type; null means none.",
        examples=[{"rope_type": "linear", "factor": 2.0}],
    )
    rms_eps: float = Field(default=1e-5, gt=0, description="Epsilon of the RMS norms.")
    tied: bool = Field(default=True, description="Whether the output head shares the embedding's weight.")
    qkv_bias: bool | None = Field(
        default=None, description="Bias on queries, keys and values; null means as in the family."
    )
    out_bias: bool = Field(default=False, description="Bias on the attention's output projection.")
    mlp_bias: bool = Field(default=False, description="Bias on the MLP's projections.")
    qk_norm: bool | None = Field(default=None, description="RMS norm on queries and keys; null means as in the family.")
    windows: Annotated[tuple[Count | None, ...], Items] | None = Field(
        default=None, description="Sliding window of each layer (null where it attends to everything); null means none."
    )
    eos_ids: Annotated[tuple[int, ...], Items] = Field(default=(), description="Token ids that end an output.")
    bos_id: int | None = Field(default=None, description="Token id that begins a sequence.")
    mask_id: int | None = Field(default=None, description="Token id that stands for a place to be filled in.")

    @model_validator(mode="after")
    def _is_possible(self) -> ModelShape:
        _check_shape(self)
        return self


class ZayaShape(_Strict):
    """The shape of ZAYA1: compressed convolutional attention and a mixture of experts, one per token."""

    family: Literal["zaya"] = Field(description="Architecture family.")
    layers: Count = Field(description="Blocks: attention, then experts.")
    width: Count = Field(description="Size of the residual stream.")
    ffn: Count = Field(description="Inner size of one expert's gated MLP.")
    heads: Count = Field(description="Query heads, in the compressed space.")
    kv_heads: Count = Field(description="Key and value heads, in the compressed space.")
    head_dim: Count = Field(description="Size of a head.")
    vocab: Count = Field(description="Tokens in the vocabulary.")
    max_positions: Count = Field(description="Longest prompt and output together, in tokens.")
    experts: Count = Field(description="Experts of a layer; the router can also skip them all.")
    router_width: Count = Field(default=256, description="Size of the router's state.")
    rope_theta: float = Field(default=5_000_000.0, gt=0, description="Base of the rotary position embedding.")
    rotary_fraction: float = Field(default=0.5, gt=0, le=1, description="Share of a head's dimensions that is rotated.")
    rms_eps: float = Field(default=1e-5, gt=0, description="Epsilon of the RMS norms.")
    tied: bool = Field(default=True, description="Whether the output head shares the embedding's weight.")
    eos_ids: Annotated[tuple[int, ...], Items] = Field(default=(), description="Token ids that end an output.")
    bos_id: int | None = Field(default=None, description="Token id that begins a sequence.")
    mask_id: int | None = Field(
        default=None, description="Token id that stands for a position to fill in (diffusion); null means none."
    )

    @model_validator(mode="after")
    def _is_possible(self) -> ZayaShape:
        _check_shape(self)
        return self


def _check_shape(shape: _Strict) -> None:
    try:
        families.from_fields(shape.model_dump(exclude_none=True))
    except UserError as error:
        raise ValueError(str(error).removeprefix("model config: ")) from error


_SHAPES: dict[str, type[_Strict]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ModelShape),
    "zaya": ZayaShape,
}


def _shape_branch(value: Any) -> str | None:
    family = value.get("family") if isinstance(value, dict) else getattr(value, "family", None)
    return f"{_BRANCH}{_SHAPES[family].__name__}" if isinstance(family, str) and family in _SHAPES else None


class ModelRandom(_Strict):
    """A shape with random weights: its speed is real, its text means nothing."""

    config: Annotated[
        Annotated[ModelShape, Tag(f"{_BRANCH}ModelShape")] | Annotated[ZayaShape, Tag(f"{_BRANCH}ZayaShape")],
        Discriminator(_shape_branch),
    ] = Field(description="The shape.")
    weights: Literal["random"] = Field(default="random", description="Where the weights come from.")
    seed: int = Field(default=0, ge=0, description="Seed of the weights.")


class PromptChoice(_Strict):
    """Which prompts of a set or file."""

    limit: Count | None = Field(
        default=None, description="At most this many prompts, taken evenly from the categories."
    )
    categories: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, description="Only prompts of these categories; null takes all.", examples=[["code", "math"]]
    )


class PromptSet(PromptChoice):
    """Prompts that come with zbench."""

    set: str = Field(min_length=1, description="Name of a packaged prompt set.", examples=["quickstart"])


class PromptFile(PromptChoice):
    """Prompts in a JSONL file, one object per line."""

    file: str = Field(
        min_length=1,
        description='Each line: {"turns": [...]} or {"prompt": "..."}, with optional "id", "question_id" or "task_id",'
        ' "category" and "reference"; with "entry_point" and "test", "prompt" is code to be completed. Of several turns'
        " the first is decoded."
        " Relative to where the command runs.",
        examples=["my_prompts.jsonl"],
    )


class PromptDataset(_Strict):
    """Prompts from a data set of the Hugging Face hub."""

    dataset: str = Field(min_length=1, description="Hub id of the data set.", examples=["openai/gsm8k"])
    subset: str | None = Field(default=None, min_length=1, description="Its configuration, where it has several.")
    split: str = Field(default="test", min_length=1, description="Split to read.")
    column: str = Field(min_length=1, description="Column that holds the prompt.", examples=["question"])
    limit: Count | None = Field(default=None, description="At most this many prompts, from the start of the split.")


class SamplingSpec(_Strict):
    """How tokens are chosen. Filters apply after the temperature: top_k, then top_p."""

    temperature: float = Field(
        default=0.0, ge=0, description="0 is greedy; the least other one is 0.001.", examples=[0, 0.8]
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Nucleus sampling: keep the likeliest tokens of this mass."
    )
    top_k: Count | None = Field(default=None, description="Keep this many of the likeliest tokens; null keeps all.")

    @field_validator("temperature")
    @classmethod
    def _divides(cls, temperature: float) -> float:
        """Logits divided by less may not be finite."""
        if 0 < temperature < 1e-3:
            raise ValueError("must be 0, which is greedy, or at least 0.001")
        return temperature


class WarmupSpec(_Strict):
    """What every engine decodes before it is measured, on prompts that are not measured."""

    prompts: int = Field(default=1, ge=0, description="Warm-up prompts.")
    output_tokens: Count = Field(default=16, description="Tokens decoded for each.")


class ParallelSpec(_Strict):
    """The ranks of a point: `torchrun` starts the processes, one per GPU."""

    tensor: Count = Field(
        default=1, description="Ranks that hold one model between them: heads, MLPs and vocabulary are shared out."
    )
    data: Count = Field(default=1, description="Replicas of the model that share the prompts, `tensor` ranks each.")
    timeout_seconds: float = Field(
        default=120, gt=0, description="A rank that has made no progress for so long ends the run."
    )

    @property
    def ranks(self) -> int:
        return self.tensor * self.data


class BudgetSpec(_Strict):
    """When to stop early. What was measured until then is kept, and the run can be resumed."""

    minutes: float | None = Field(default=None, gt=0, description="Wall time of the run; null means until it is done.")


class AccuracySpec(_Strict):
    """How right the answers are, beside how fast they come. Numbers are always checked; code only if it may be run."""

    execute_generated_code: bool = Field(
        default=False,
        description="Run the code that the model wrote against the tests of prompts that have some (HumanEval's keys:"
        " prompt, entry_point, test), confined as docs/accuracy.md says. Nobody has looked at that code: leave it off"
        " where that matters.",
    )
    seconds: float = Field(default=10, gt=0, le=600, description="Wall time that one answer's tests may take.")
    memory_mb: Annotated[int, Field(ge=64)] = Field(
        default=512, description="Address space that one answer's tests may take, in MiB."
    )


class TelemetrySpec(_Strict):
    """Power, energy, clocks, temperature and throttling, sampled while engines decode. `telemetry: off` for none."""

    period_ms: Annotated[int, Field(ge=10, le=10_000)] | None = Field(
        default=100, description="Time between samples; longer where one would cost more than 1% of a core. null: off."
    )

    @model_validator(mode="before")
    @classmethod
    def _may_be_off(cls, value: Any) -> Any:
        return {"period_ms": None} if value is False else value  # what YAML makes of `off`


def _or_off(schema: dict[str, Any]) -> None:
    schema["anyOf"] = [{"$ref": schema.pop("$ref")}, {"const": False}]


def _engine_branch(value: Any) -> str | None:
    if isinstance(value, str):
        return f"{_BRANCH}name" if value in ENGINES else None
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return f"{_BRANCH}{name}" if isinstance(name, str) and name in ENGINES else None


_MODELS: dict[str, type[_Strict]] = {"path": ModelFolder, "hub": ModelHub, "config": ModelRandom}
_PROMPTS: dict[str, type[_Strict]] = {"set": PromptSet, "file": PromptFile, "dataset": PromptDataset}
_BRANCHES = {
    f"{_BRANCH}{key}": model
    for key, model in (_MODELS | _PROMPTS | _DRAFTERS | _ADAPTERS | _SYNTHETICS | ENGINES).items()
} | {f"{_BRANCH}{shape.__name__}": shape for shape in _SHAPES.values()}

_UNIONS = {
    "model": _MODELS,
    "prompts": _PROMPTS,
    "drafter": _DRAFTERS,
    "adapter": _ADAPTERS,
    "synthetic": _SYNTHETICS,
}

ModelSpec = Annotated[
    Annotated[str, StringConstraints(min_length=1), Tag(f"{_BRANCH}name")]
    | Annotated[ModelFolder, Tag(f"{_BRANCH}path")]
    | Annotated[ModelHub, Tag(f"{_BRANCH}hub")]
    | Annotated[ModelRandom, Tag(f"{_BRANCH}config")],
    _key_branch(_MODELS),
]
PromptSpec = PromptSet | PromptFile | PromptDataset
_PromptBranch = Annotated[
    Annotated[PromptSet, Tag(f"{_BRANCH}set")]
    | Annotated[PromptFile, Tag(f"{_BRANCH}file")]
    | Annotated[PromptDataset, Tag(f"{_BRANCH}dataset")],
    _key_branch(_PROMPTS),
]
if TYPE_CHECKING:
    _Engine = EngineSpec
else:
    _by_name = Annotated[
        Literal[tuple(ENGINES)], AfterValidator(lambda name: ENGINES[name](name=name)), Tag(f"{_BRANCH}name")
    ]
    _by_options = (Annotated[spec, Tag(f"{_BRANCH}{name}")] for name, spec in ENGINES.items())
    _Engine = Annotated[Union[(_by_name, *_by_options)], Discriminator(_engine_branch)]


class Scenario(_Strict):
    """What to compare: engines on one model and one set of prompts, at every point of a matrix of settings."""

    name: str = Field(
        pattern=_NAME,
        description="Short name; run folders are called after it.",
        examples=["quickstart"],
    )
    description: str = Field("", description="The question that this scenario answers, in one line.")
    model: ModelSpec = Field(
        description="Name of a zoo model (`zbench models list`), or {path: FOLDER}, {hub: ORG/NAME}, {config: SHAPE}.",
        examples=["smollm2-135m", {"path": "models/my-llama"}, {"hub": "HuggingFaceTB/SmolLM2-360M-Instruct"}],
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="Type of the weights and activations."
    )
    device: str = Field(
        default="auto",
        pattern=_DEVICE,
        description="auto (first GPU, else CPU), cpu, cuda, cuda:N, rocm or rocm:N.",
        examples=["auto", "cuda:1"],
    )
    hardware: str | None = Field(
        default=None,
        description="GPU that this scenario is about, of those that `zbench project --help` lists. `zbench run`"
        " measures there; elsewhere it projects from the spec sheet. null means whatever device it runs on.",
        examples=["MI300X", "H100 SXM"],
    )
    engines: Annotated[tuple[_Engine, ...], Field(strict=False, min_length=1)] = Field(
        description="Engines to compare: a name, or a mapping of name, label and options.",
        examples=[["autoregressive", {"name": "reference", "assisted": "prompt_lookup"}]],
    )
    baseline: str | None = Field(
        default=None,
        description="Label of the engine that the others are compared with; null takes the first autoregressive one,"
        " or else the first.",
    )
    prompts: _PromptBranch = Field(
        description="Prompts to decode: {set: NAME}, {file: PATH} or {dataset: ORG/NAME, column: NAME}.",
        examples=[{"set": "quickstart", "limit": 8}],
    )
    context: Count | None = Field(
        default=None,
        description="Tokens that every prompt is cut or extended to; null leaves prompts as they are.",
        examples=[512],
    )
    output_tokens: Count = Field(default=64, description="Tokens to decode for each prompt, at most.")
    ignore_eos: bool = Field(
        default=False, description="Decode on after the end of the text, so that all outputs are as long."
    )
    sampling: SamplingSpec = Field(default=SamplingSpec(), description="How tokens are chosen.")
    batch: Count = Field(default=1, description="Prompts decoded together.")
    threads: _Threads = Field(default=None, description="CPU threads; null leaves torch's choice.")
    parallel: ParallelSpec = Field(
        default=ParallelSpec(),
        description="Over how many ranks the model and the prompts are spread (see docs/parallel.md). As an axis of the"
        " matrix, parallel.tensor measures several sizes in one run.",
    )
    repeats: Count = Field(default=2, description="Times that every prompt is measured on every engine.")
    lossless_check: bool = Field(
        True,
        description="Check every emitted token against one forward of the target over prompt and output, outside the"
        " measured time; an engine that promises the target's tokens fails where it emits others.",
    )
    warmup: WarmupSpec = Field(default=WarmupSpec(), description="What runs before the measurement.")
    budget: BudgetSpec = Field(default=BudgetSpec(), description="When to stop early.")
    accuracy: AccuracySpec = Field(
        default=AccuracySpec(),
        description="Whether code that the model writes is run against tests.",
        examples=[{"execute_generated_code": True}],
    )
    telemetry: TelemetrySpec = Field(
        default=TelemetrySpec(),
        description="Sampling of power, energy, clocks and temperature: {period_ms: N}, or off.",
        examples=[{"period_ms": 50}, False],
        json_schema_extra=_or_off,
    )
    seed: int = Field(default=0, ge=0, description="Seed of the run; every request's own seed follows from it.")
    matrix: dict[str, Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]] = Field(
        default={},
        description="Axes: a dotted key of the scenario, and the values it takes. Every combination is a point.",
        examples=[{"batch": [1, 4], "sampling.temperature": [0, 1]}],
    )
    include: Annotated[tuple[dict[str, Any], ...], Items] = Field(
        default=(),
        description="Extra points; keys they do not name keep the scenario's own value.",
        examples=[[{"batch": 16, "dtype": "float32"}]],
    )
    exclude: Annotated[tuple[dict[str, Any], ...], Items] = Field(
        default=(),
        description="Points of the matrix to leave out: all that agree with every axis named here.",
        examples=[[{"batch": 4, "dtype": "float32"}]],
    )

    @field_validator("hardware")
    @classmethod
    def _is_known_hardware(cls, hardware: str | None) -> str | None:
        from zbench.hardware import specs

        if hardware is None:
            return None
        try:
            return specs.named(hardware).name
        except UserError as error:
            raise ValueError(str(error)) from error

    @field_validator("engines")
    @classmethod
    def _have_distinct_labels(cls, engines: tuple[EngineSpec, ...]) -> tuple[EngineSpec, ...]:
        for one, other in itertools.combinations((engine.title for engine in engines), 2):
            if slug(one) == slug(other):
                raise ValueError(f"labels {one!r} and {other!r} are too alike; give one of the engines another label")
        return engines

    @field_validator("baseline")
    @classmethod
    def _is_an_engine(cls, baseline: str | None, info: ValidationInfo) -> str | None:
        titles = [engine.title for engine in info.data.get("engines", ())]
        if baseline is not None and titles and baseline not in titles:
            raise ValueError(f"no engine is labelled {baseline!r}; {_nearest(baseline, titles)}")
        return baseline

    @model_validator(mode="after")
    def _can_be_spread(self) -> Scenario:
        for engine in self.engines if self.parallel.ranks > 1 else ():
            if engine.name in ("endpoint", "vllm"):
                raise ValueError(
                    f"{engine.name} is spread by options of its own; leave it out where parallel is above 1"
                )
        for engine in self.engines if self.parallel.tensor > 1 else ():
            if engine.name in PEERS:
                raise ValueError(
                    f"{engine.name} decodes on one rank only; leave it out where parallel.tensor is above 1"
                )
            if (execution := engine.options.get("execution", "auto")) not in ("auto", "eager"):
                raise ValueError(f"execution: {execution} runs on one rank only; not where parallel.tensor is above 1")
        return self

    @property
    def baseline_label(self) -> str:
        """The label of the engine that the others are compared with."""
        own = (engine.title for engine in self.engines if engine.name == "autoregressive")
        return self.baseline or next(own, self.engines[0].title)

    @property
    def model_spec(self) -> str | dict[str, Any]:
        """The model as `zbench.models.loading.load` takes it."""
        return self.model if isinstance(self.model, str) else self.model.model_dump(exclude_none=True)

    @property
    def model_name(self) -> str:
        """The model in one word or two, different for different models."""
        match self.model:
            case ModelFolder(path=path):
                return path
            case ModelHub(hub=hub, revision=revision):
                return f"{hub}@{revision}" if revision else hub
            case ModelRandom(config=shape):
                return f"random-{shape.family}-{shape.layers}x{shape.width}-{_digest(self.model_spec)[:6]}"
            case name:
                return name

    @property
    def budget_seconds(self) -> float | None:
        """Wall time that the run may take; None where it has no budget."""
        return None if self.budget.minutes is None else self.budget.minutes * 60


class KernelScenario(_Strict):
    """Which hand-written kernels to time on this device, each against its reference and what else computes the same."""

    name: str = Field(pattern=_NAME, description="Short name; run folders are called after it.", examples=["kernels"])
    description: str = Field("", description="The question that this scenario answers, in one line.")
    kernels: Literal["all"] | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        description="all, or a list of their names.", examples=["all", ["block_attention"]]
    )
    device: str = Field(default="auto", pattern=_DEVICE, description="As in a scenario of engines.")
    threads: _Threads = Field(default=None, description="CPU threads; null leaves torch's choice.")
    seconds: float = Field(
        default=2.0, gt=0, description="What the repetitions of one case aim for; five rounds are made anyway."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the inputs.")


# --- Text to document ---


class _Origin(NamedTuple):
    """Where a value was written: a line of a file, or an override (line 0)."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


_Path = tuple[str | int, ...]
_Model = TypeVar("_Model", bound=BaseModel)
_Problem = tuple[_Origin, str]


@dataclass(frozen=True, slots=True)
class _Document:
    """Plain data, and where each of its keys and items was written."""

    data: Any
    origins: dict[_Path, _Origin]

    def origin(self, path: _Path) -> _Origin:
        """Of the path itself, or of the innermost thing around it that was written down."""
        return next(self.origins[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.origins)

    def replaced(self, path: _Path, value: Any, origin: _Origin) -> _Document:
        """This document with another value at `path`; what is no mapping on the way there becomes one."""
        new, inner = path, self.data
        for n, part in enumerate(path[:-1], start=1):
            inner = inner[part] if isinstance(part, int) else inner.get(part) if isinstance(inner, dict) else None
            if not isinstance(inner, dict | list):
                new = path[:n]
                break
        kept = {at: where for at, where in self.origins.items() if at[: len(new)] != new}
        return _Document(_replaced(self.data, path, value), {**kept, new: origin})


def _replaced(data: Any, path: _Path, value: Any) -> Any:
    if not path:
        return value
    if isinstance(path[0], int):
        return [*data[: path[0]], _replaced(data[path[0]], path[1:], value), *data[path[0] + 1 :]]
    inner = data if isinstance(data, dict) else {}
    return {**inner, path[0]: _replaced(inner.get(path[0]), path[1:], value)}


class _Loader(yaml.SafeLoader):
    """YAML without aliases and tags: a scenario is a tree of plain values, and every value stands on its own line."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) not in (None, "!"):
            raise yaml.composer.ComposerError(
                None, None, "aliases (*) and tags (!) are not supported; write the value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # something that looks like a date or a number, and is none
            problem = f"{node.value!r} cannot be read ({error}); put it in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


class _Dumper(yaml.SafeDumper):
    """What `_Loader` reads as it was."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind in (_Loader, _Dumper):
    # YAML 1.1, which PyYAML reads, takes 1e-5 for text; nobody who writes it means that.
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def to_yaml(scenario: Scenario) -> str:
    """What `load` reads as the same scenario; defaults that were not written are left out."""
    data = scenario.model_dump(mode="json", exclude_unset=True)
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _parse(text: str, source: str) -> _Document:
    """Raises UserError: malformed YAML, a key that is given twice or is not text."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            data = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        origin = _Origin(source, mark.line + 1 if mark else 1)
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{origin}: malformed YAML: {said}") from error
    except yaml.reader.ReaderError as error:
        origin = _Origin(source, text.count("\n", 0, error.position) + 1)
        raise UserError(f"{origin}: malformed YAML: character {error.character:#x} is not allowed") from error
    except RecursionError as error:
        raise UserError(f"{source}: malformed YAML: nested too deeply") from error
    if problems := list(_key_problems(node, source)):
        raise _user_error(problems)
    return _Document(data, dict(_origins(node, source)))


def _origins(node: yaml.Node | None, source: str, path: _Path = ()) -> Iterator[tuple[_Path, _Origin]]:
    if not path:
        yield path, _Origin(source, 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, key.value), _Origin(source, key.start_mark.line + 1)
            yield from _origins(value, source, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), _Origin(source, item.start_mark.line + 1)
            yield from _origins(item, source, (*path, index))


def _key_problems(node: yaml.Node | None, source: str) -> Iterator[_Problem]:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _key_problems(item, source)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                yield _Origin(source, line), f"key {key.value!r} is not text; put it in quotes"
            elif key.value in first:
                yield _Origin(source, line), f"key {key.value!r} is given twice, first on line {first[key.value]}"
            first.setdefault(key.value, line)
            yield from _key_problems(value, source)


# --- Document to scenario ---


def load(path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """Read and check a scenario of engines, every point of its matrix included.

    `overrides` are "key=value": a dotted key of the scenario and a YAML value, applied in order.
    Raises UserError, with one line for each thing that is wrong.
    """
    found = load_any(path, overrides)
    if isinstance(found, KernelScenario):
        raise UserError(f"{path}: is about kernels, which `zbench run` times; this takes a scenario of engines")
    return found


def load_any(path: str | Path, overrides: Sequence[str] = ()) -> Scenario | KernelScenario:
    """As `load`, for a scenario of engines or, where it has a key `kernels`, of kernels."""
    document = _written_out(_override(_parse(_read(Path(path)), str(path)), overrides))
    if isinstance(document.data, dict) and "kernels" in document.data:
        of_kernels, problems = _check(document, KernelScenario)
        if of_kernels is None:
            raise _user_error(problems)
        return of_kernels
    scenario, problems = _check(document, Scenario)
    if scenario is None:
        raise _user_error(problems)
    _expand(scenario, document)
    return scenario


def load_other(path: Path, kind: type[_Model]) -> _Model:
    """Read another kind of YAML file as strictly as a scenario. Raises UserError, one line for each thing wrong."""
    checked, problems = _check(_parse(_read(path), str(path)), kind)
    if checked is None:
        raise _user_error(problems)
    return checked


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the YAML, for completion and checks in an editor."""
    either = TypeAdapter(Scenario | KernelScenario).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **either}


# Options by engine that runs kept from before them do not have: null, they change nothing.
_LATER = {
    "eagle3": ("beam", "lookup"),
    "dflash": ("draft_vocab", "tokens", "lookup"),
    "diffusion": ("tokens", "lookup"),
}


def content_hash(scenario: Scenario) -> str:
    """sha256 of what the scenario measures: its name, its description and the order of its keys do not matter. Nor
    does the hardware that it is about: on which device something was measured, the environment says. Nor do the sensors
    that were read meanwhile."""
    content = scenario.model_dump(mode="json", exclude={"name", "description", "hardware", "telemetry"})
    if scenario.parallel.ranks == 1:  # as in scenarios from before there was such a key
        del content["parallel"]
    if not scenario.accuracy.execute_generated_code:  # likewise
        del content["accuracy"]
    engines = [
        {key: value for key, value in engine.items() if value is not None or key not in _LATER.get(spec.name, ())}
        | {"label": spec.title}
        for engine, spec in zip(content["engines"], scenario.engines, strict=True)
    ]
    return _digest({**content, "engines": engines, "baseline": scenario.baseline_label})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; a scenario is a YAML file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give the path of a scenario YAML file") from error


def _override(document: _Document, overrides: Sequence[str]) -> _Document:
    for override in overrides:
        origin = _Origin(f"-o {override}")
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"{origin}: write -o KEY=VALUE with a dotted key of the scenario")
        path = _path(key)
        axes = document.data.get("matrix") if isinstance(document.data, dict) else None
        for axis in axes if isinstance(axes, dict) else ():
            if path[: len(_path(axis))] == _path(axis):
                raise UserError(f"{origin}: {axis} is an axis of the matrix; write -o matrix.{axis}=[...] instead")
        engines = document.data.get("engines") if isinstance(document.data, dict) else None
        if path[0] == "engines" and len(path) > 1 and isinstance(engines, list):
            place = _place(engines, str(path[1]), origin)
            path = ("engines", place, *path[2:])
            if isinstance(name := engines[place], str) and path[2:]:
                document = document.replaced(path[:2], {"name": name}, document.origin(path[:2]))
        document = document.replaced(path, _parse(text, str(origin)).data, origin)
    return document


def _place(engines: Sequence[Any], wanted: str, origin: _Origin) -> int:
    """Where the engine of a label, a name or a number stands. Raises UserError where it is none, or one of several."""
    names = [engine.get("name") if isinstance(engine, dict) else engine for engine in engines]
    labels = [engine.get("label", engine.get("name")) if isinstance(engine, dict) else engine for engine in engines]
    for known in (labels, names):
        if len(places := [n for n, name in enumerate(known) if name == wanted]) == 1:
            return places[0]
    if wanted.isdecimal() and int(wanted) < len(engines):
        return int(wanted)
    there = ", ".join(f"{n} {label}" for n, label in enumerate(labels))
    raise UserError(f"{origin}: {wanted} is not one engine of the scenario, write its label or number: {there}")


def _path(dotted: str) -> _Path:
    """ "sampling.top_p" -> ("sampling", "top_p"). Axes of the matrix are themselves dotted keys."""
    head, _, rest = dotted.partition(".")
    return (head, rest) if head == "matrix" and rest else tuple(dotted.split("."))


def _written_out(document: _Document) -> _Document:
    """Each engine that sweeps options as one engine for every combination. Malformed sweeps stay as they are."""
    engines = document.data.get("engines") if isinstance(document.data, dict) else None
    if not isinstance(engines, list):
        return document
    origins = {path: origin for path, origin in document.origins.items() if path[:1] != ("engines",) or len(path) == 1}
    found: list[Any] = []
    for index, engine in enumerate(engines):
        here: _Path = ("engines", index)
        inside = {path[2:]: origin for path, origin in document.origins.items() if path[:2] == here}
        sweep = engine.get("sweep") if isinstance(engine, dict) else None
        valid = isinstance(sweep, dict) and all(isinstance(values, list) and values for values in sweep.values())
        if not valid or not isinstance(sweep, dict) or sweep.keys() & {"label", "sweep"}:
            origins |= {("engines", len(found), *rest): origin for rest, origin in inside.items()}
            found.append(engine)
            continue
        for chosen in itertools.product(*(enumerate(values) for values in sweep.values())):
            one = {key: value for key, value in engine.items() if key != "sweep"}
            words = [str(one.get("label") or one.get("name"))]
            origins |= {("engines", len(found), *rest): origin for rest, origin in inside.items()}
            for key, (place, value) in zip(sweep, chosen, strict=True):
                one = _replaced(one, _path(key), value)
                words.append(f"{key} {value}")
                where = document.origin((*here, "sweep", key, place))
                origins[("engines", len(found), *_path(key))] = where
            found.append({**one, "label": ", ".join(words)})
    return _Document({**document.data, "engines": found}, origins)


def _check(document: _Document, kind: type[_Model]) -> tuple[_Model | None, list[_Problem]]:
    if document.data is None:
        needs = "name, model, engines and prompts" if kind is Scenario else f"one of {', '.join(kind.model_fields)}"
        return None, [(document.origin(()), f"is empty; a {kind.__name__.lower()} needs {needs}")]
    try:
        return kind.model_validate(document.data), []
    except ValidationError as error:
        # A list whose items are all wrong is also reported as too short.
        real = (each for each in error.errors(include_url=False) if each["type"] != "too_short" or not each["input"])
        return None, [_problem(document, each, kind) for each in real]


_EXPECTED = {
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "too_short": "at least one item",
    "string_too_short": "some text",
}


def _problem(document: _Document, error: Any, of: type[BaseModel]) -> _Problem:
    """One of pydantic's errors in our words."""
    path = tuple(part for part in error["loc"] if not str(part).startswith(_BRANCH))
    kind, value = error["type"], error["input"]
    where, around = (_dotted(at) or of.__name__.lower() for at in (path, path[:-1]))
    if kind == "extra_forbidden":
        known = _model_at(of, error["loc"][:-1]).model_fields
        text = f"unknown key {path[-1]!r} in {around}; {_nearest(path[-1], known)}"
    elif kind == "missing":
        text = f"missing key {path[-1]!r} in {around}"
    elif kind.startswith("union_tag") and path[-1] in _UNIONS:
        text = _no_branch(where, _UNIONS[path[-1]], value)
    elif kind.startswith("union_tag") and path[-1] == "config":
        path, text = (*path, "family"), _no_family(where, value)
    elif kind == "union_tag_not_found":
        path, text = (*path, "name"), _no_engine(where, value)
    elif kind == "value_error":
        text = f"{where}: {error['ctx']['error']}"
    else:
        expected = _EXPECTED.get(kind) or error["msg"].removeprefix("Input should be ")
        expected = expected.replace("String should match pattern", "text that matches")
        text = f"{where}: expected {expected}, found {_found(value)}"
        if kind == "string_type" and not isinstance(value, dict | list | None):
            text += "; put it in quotes"
    return document.origin(path), text


def _no_engine(where: str, value: Any) -> str:
    if isinstance(value, dict) and "name" not in value:
        return f"missing key 'name' in {where}"
    name = value["name"] if isinstance(value, dict) else value
    if isinstance(name, str):
        return f"unknown engine {name!r}; {_nearest(name, ENGINES)}"
    return f"{where}: expected the name of an engine or a mapping with its name, found {_found(value)}"


def _no_family(where: str, value: Any) -> str:
    if not isinstance(value, dict):
        return f"{where}: expected a mapping, found {_found(value)}"
    if "family" not in value:
        return f"missing key 'family' in {where}"
    return f"{where}.family: expected one of {', '.join(_SHAPES)}, found {_found(value['family'])}"


def _no_branch(where: str, branches: Collection[str], value: Any) -> str:
    text = f"{where}: expected a mapping with one of the keys {', '.join(branches)}, found {_found(value)}"
    close = [key for wrong in (value if isinstance(value, dict) else ()) for key in _close(wrong, branches)]
    return f"{text}; did you mean {close[0]!r}?" if close else text


def _model_at(model: type[BaseModel], location: Iterable[str | int]) -> type[BaseModel]:
    """The model whose keys stand at a location as pydantic gives it, starting from that of the whole file."""
    for part in location:
        field = model.model_fields.get(str(part))
        if str(part) in _BRANCHES:
            model = _BRANCHES[str(part)]
        elif field:
            values = get_args(field.annotation)[-1:] if get_origin(field.annotation) is dict else (field.annotation,)
            model = next((v for v in values if isinstance(v, type) and issubclass(v, BaseModel)), model)
    return model


def _dotted(path: _Path) -> str:
    """("engines", 1, "name") -> "engines[1].name"; "" at the top."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]


def _found(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return "nothing" if value is None else text if len(text) <= 60 else f"{text[:57]}..."


def _close(word: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(word, list(known), n=1)


def _nearest(word: str, known: Collection[str]) -> str:
    close = _close(word, known)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _user_error(problems: Iterable[_Problem]) -> UserError:
    ordered = sorted(dict.fromkeys(problems), key=lambda problem: problem[0])
    return UserError("\n".join(f"{origin}: {text}" for origin, text in ordered))


# --- Scenario to points and cells ---


def points(scenario: Scenario) -> tuple[tuple[Scenario, tuple[CellRecord, ...]], ...]:
    """The points of the matrix, each as a scenario without a matrix, with its engines as cells.

    Axes vary in the order they are written, the last one fastest; `exclude` drops points, then `include` adds its own.
    Points that come to the same are kept once. Raises UserError where an axis or a value is not one of a scenario.
    """
    data = scenario.model_dump(exclude_unset=True)
    return _expand(scenario, _Document(data, {(): _Origin(f"scenario {scenario.name}")}))


def cells(scenario: Scenario) -> tuple[CellRecord, ...]:
    """Every engine at every point of the matrix; the engines of a point stand together. Raises as `points` does."""
    return tuple(cell for _, at_point in points(scenario) for cell in at_point)


# What the runner takes once for all points of a run.
_WHOLE_RUN = (
    "name", "description", "device", "hardware", "engines", "baseline", "threads", "budget", "telemetry", "accuracy",
)  # fmt: skip
_MATRIX = ("matrix", "include", "exclude")

_Setting = dict[str, tuple[Any, _Origin]]  # axis -> its value at one point, and where that was written


def _expand(scenario: Scenario, document: _Document) -> tuple[tuple[Scenario, tuple[CellRecord, ...]], ...]:
    data = {key: value for key, value in document.data.items() if key not in _MATRIX}
    base = _Document(data, document.origins)
    if problems := list(_axis_problems(scenario, document, base)):
        raise _user_error(problems)
    settings = list(_settings(scenario, document))
    if not settings:
        raise _user_error([(document.origin(("exclude",)), "exclude leaves no point of the matrix")])
    found: dict[str, tuple[Scenario, tuple[CellRecord, ...]]] = {}
    for setting in settings:
        at = base
        for axis, (value, origin) in setting.items():
            at = at.replaced(_path(axis), value, origin)
        checked, wrong = _check(at, Scenario)
        problems += wrong
        if checked is not None:
            point = {axis: value for axis, (value, _) in setting.items()}
            found.setdefault(_digest(checked.model_dump(mode="json")), (checked, _cells(checked, point)))
    if problems:
        raise _user_error(problems)
    return tuple(found.values())


def _settings(scenario: Scenario, document: _Document) -> Iterator[_Setting]:
    axes = [
        [(axis, value, document.origin(("matrix", axis, index))) for index, value in enumerate(values)]
        for axis, values in scenario.matrix.items()
    ]
    if axes or not scenario.include:
        for combination in itertools.product(*axes):
            setting = {axis: (value, origin) for axis, value, origin in combination}
            if not any(all(setting[axis][0] == entry[axis] for axis in entry) for entry in scenario.exclude):
                yield setting
    for index, entry in enumerate(scenario.include):
        yield {axis: (value, document.origin(("include", index, axis))) for axis, value in entry.items()}


def _axis_problems(scenario: Scenario, document: _Document, base: _Document) -> Iterator[_Problem]:
    """Axes that are no key of a scenario, or none that can vary."""
    named: list[tuple[_Path, Any]] = [(("matrix", axis), values[0]) for axis, values in scenario.matrix.items()]
    for index, entry in enumerate(scenario.include):
        named += [(("include", index, axis), value) for axis, value in entry.items()]
    for at, value in named:
        axis, origin = str(at[-1]), document.origin(at)
        if axis.split(".")[0] in (*_WHOLE_RUN, *_MATRIX):
            yield origin, f"{axis} cannot be an axis of the matrix: it holds for the whole run"
            continue
        _, problems = _check(base.replaced(_path(axis), value, origin), Scenario)
        yield from (problem for problem in problems if problem[1].startswith("unknown key"))
    for one, other in itertools.permutations(scenario.matrix, 2):
        if other.startswith(f"{one}."):
            yield document.origin(("matrix", other)), f"axis {other} is part of axis {one}; keep one of them"
    for index, entry in enumerate(scenario.exclude):
        for axis in entry:
            if axis not in scenario.matrix:
                where = document.origin(("exclude", index, axis))
                yield where, f"unknown axis {axis!r} in exclude[{index}]; {_nearest(axis, scenario.matrix)}"


def _cells(at: Scenario, point: dict[str, Any]) -> tuple[CellRecord, ...]:
    place = ",".join(f"{axis}={_value_slug(value)}" for axis, value in sorted(point.items()))
    return tuple(
        CellRecord(
            id=f"{slug(engine.title)}/{place}" if place else slug(engine.title),
            label=engine.title,
            engine=engine.name,
            options=engine.options,
            point=point,
            model=at.model_name,
            dtype=at.dtype,
            device=at.device,
            batch=at.batch,
            context=at.context,
            output_tokens=at.output_tokens,
            sampling=at.sampling.model_dump(),
            baseline=engine.title == at.baseline_label,
            tensor=at.parallel.tensor,
            replicas=at.parallel.data,
        )
        for engine in at.engines
    )


def slug(text: str) -> str:
    """A label within an id; labels that share one are too alike for one scenario."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")


def _value_slug(value: Any) -> str:
    """A value within an id. What does not survive as it is gets a piece of its hash, so that ids stay unique."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    short = slug(text)[:40]
    return short if short == text else f"{short}-{_digest(text)[:6]}"


def _digest(value: Any) -> str:
    """sha256 of the canonical JSON of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
