"""Decoders. A new one is a file in this folder, one entry in `_BUILDERS` and its options in `scenario.ENGINES`."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zbench import paths
from zbench.models import zoo

if TYPE_CHECKING:
    import torch

    from zbench.engines.base import Engine
    from zbench.hardware.device import Device
    from zbench.models.families import AnyConfig
    from zbench.models.loading import LoadedModel
    from zbench.models.model import Model
    from zbench.models.team import Team
    from zbench.records import PreparationRecord
    from zbench.serving.process import Servers

_OF_TORCH = ("eager", "compiled", "graph")
T = TypeVar("T")


class Shared:
    """What engines on the same model have in common: the target, loaded onto the device once."""

    def __init__(
        self,
        model: LoadedModel,
        dtype: torch.dtype,
        device: Device,
        allow_pickle: bool = False,
        team: Team | None = None,
    ) -> None:
        from zbench.models.team import ALONE

        self.model, self.dtype, self.device, self.allow_pickle = model, dtype, device, allow_pickle
        self.team = team or ALONE
        self._targets: dict[str, Model] = {}
        self._drafters: dict[str, Any] = {}
        self.why_no_graphs = ""  # a reason for auto not to be graphs, where there is one
        self.logs: Path | None = None  # where servers that are started log; None takes a temporary folder
        self.say: Callable[[str], None] = lambda line: None

    def target(self, execution: str) -> Model:
        """The model as `execution` runs it. On a GPU auto is graph, or eager where `kernels` says why that cannot be.

        Raises NativeUnavailable and ExecutionUnavailable where what was asked for cannot be had."""
        from zbench.models.model import build

        if execution == "auto" and self.device.type != "cpu":
            execution = self._on_gpu
        if execution not in self._targets:
            loaded = [target for target in self._targets.values() if target.execution != "native"]
            if loaded and execution in _OF_TORCH:  # the same weights, in the device's memory once
                self._targets[execution] = loaded[0].executed(execution)
            else:
                self._targets[execution] = build(self.model, self.dtype, self.device.torch, execution, self.team)
        return self._targets[execution]

    @property
    def reader(self) -> Model:
        """The target for forwards of lengths that seldom come again: auto, but no graph, of which each has its own."""
        return self.target("auto" if self.device.type == "cpu" else "eager")

    @cached_property
    def _on_gpu(self) -> str:
        """What auto is: graphs, if one of a single row can be recorded. One for all that is measured on this model."""
        from zbench.models.execution import ExecutionUnavailable, probe

        eager, why = self.target("eager"), self.why_no_graphs  # which has the weights of both
        try:
            if not why:
                probe(self.target("graph"))
        except ExecutionUnavailable as error:
            why = str(error)
            self.say(f"launching operators one by one: {why}")
        if why:
            eager.kernels["why_no_graphs"] = why
            return "eager"
        return "graph"

    def eagerly(self, why: str) -> bool:
        """Have auto run operators from now on, where it was graphs until now: engines are to be built again."""
        if self.__dict__.pop("_on_gpu", None) != "graph":
            return False
        self.why_no_graphs = why
        self._targets.pop("graph")
        self._drafters.clear()
        gc.collect()
        self.say(f"launching operators one by one: {why}")
        return True

    def sparing(self, work: Callable[[], T]) -> T:
        """What `work` gives. Where memory is short, once more without what recorded graphs hold for later."""
        import torch

        with suppress(torch.OutOfMemoryError):  # its frames have caches, and must be gone
            return work()
        gc.collect()
        for target in self._targets.values():
            while target.graphs and target.graphs.spare():
                pass
        return work()

    def unused(self, since: float) -> int:
        """Bytes of caches that recorded graphs hold for others than had one from a time of `perf_counter` on."""
        return sum(target.graphs.unused(since) for target in self._targets.values() if target.graphs)

    def drafter(self, target: Model, key: Any, make: Callable[[], T]) -> T:
        """What drafts beside `target`: one for all engines that ask with the same key, as those of a sweep do. Their
        caches are their own, and what is recorded as a graph holds every setting in its signature."""
        known = repr((target.execution, key))
        if known not in self._drafters:
            self._drafters[known] = make()
        return self._drafters[known]

    def prepared(self) -> tuple[PreparationRecord, ...]:
        """What the targets, and drafters beside them, had to compile or record since last asked."""
        found = []
        for target in self._targets.values():
            found += target.prepared
            target.prepared.clear()
        return tuple(found)

    def release(self) -> None:
        """Let go of what was loaded onto the device; it is loaded again when asked for."""
        self._targets.clear()
        self._drafters.clear()
        self.__dict__.pop("_on_gpu", None)
        self.__dict__.pop("transformers", None)
        if "servers" in self.__dict__:
            self.servers.stop()
        gc.collect()  # a model and its graphs know each other

    @cached_property
    def tokenizer(self) -> Any:
        from zbench.models.loading import load_tokenizer

        return load_tokenizer(self.model)

    @cached_property
    def servers(self) -> Servers:
        """The servers that engines on this model start."""
        from zbench.serving.process import Servers

        return Servers(self.logs, self.say)

    @cached_property
    def transformers(self) -> Any:
        """The same weights as a `transformers` model."""
        from zbench.engines.reference import load_transformers

        return load_transformers(self.model, self.dtype, self.device.torch)


def _autoregressive(options: dict[str, Any], shared: Shared) -> Engine:
    from zbench.engines.autoregressive import Autoregressive

    return Autoregressive(shared.target(options["execution"]))


def _prompt_lookup(options: dict[str, Any], shared: Shared) -> Engine:
    from zbench.engines.prompt_lookup import PromptLookup

    return PromptLookup(shared.target(options.get("execution", "auto")), options["match"], options["tokens"])


def _forward(options: dict[str, Any], shared: Shared) -> Engine:
    from zbench.engines.forward import Forward

    return Forward(shared.target(options["execution"]), options["rows"])


def _reference(options: dict[str, Any], shared: Shared) -> Engine:
    from zbench.engines.reference import Reference

    return Reference(shared, options["assisted"], options["prompt_lookup_tokens"])


def _eagle3(options: dict[str, Any], shared: Shared) -> Engine:
    from zbench.engines import synthetic
    from zbench.engines.eagle3 import Eagle3
    from zbench.models import eagle3

    chosen, target = options["drafter"], shared.target(options.get("execution", "auto"))
    recorded = target.graphs is not None and not options["confidence"]  # with one the host is asked at every level

    def load() -> tuple[eagle3.Eagle3Drafter, str]:
        if chosen.get("random"):
            size = {"draft_vocab": chosen["vocab"]} if chosen["vocab"] else {}
            checkpoint = eagle3.random_drafter(target.config, chosen["seed"], dtype=shared.dtype, **size)
        else:
            checkpoint = eagle3.load_drafter(_drafter_folder(chosen, "eagle3"), target.config, shared.allow_pickle)
        graphs = target.graphs.beside() if target.graphs and recorded else None
        stored = (checkpoint.config, checkpoint.tensors, target.embedding, shared.dtype, target.device)
        return eagle3.Eagle3Drafter(*stored, graphs=graphs), checkpoint.identity

    drafter, weights = shared.drafter(target, ("eagle3", chosen, recorded), load)
    drawn = options["synthetic"]
    engine = Eagle3(
        target,
        drafter,
        options["depth"],
        options["top_k"],
        options["tokens"],
        synthetic.parse(drawn, options["depth"]) if drawn else None,
        options["confidence"],
        options["beam"],
        options["lookup"],
    )
    engine.kernels["drafter_weights"] = weights
    return engine


def _dflash(options: dict[str, Any], shared: Shared) -> Engine:
    from zbench.engines import synthetic
    from zbench.engines.dflash import DFlash
    from zbench.models import dflash

    chosen, target = options["drafter"], shared.target(options.get("execution", "auto"))

    def load() -> tuple[dflash.DFlashDrafter, str]:
        if chosen.get("random"):
            size = {"layers": chosen["layers"]} if chosen["layers"] else {}
            checkpoint = dflash.random_drafter(target.config, chosen["seed"], dtype=shared.dtype, **size)
        else:
            checkpoint = dflash.load_drafter(_drafter_folder(chosen, "dflash"), target.config, shared.allow_pickle)
        if options["draft_vocab"]:
            checkpoint = dflash.reduced(checkpoint, target.config, shared.model.tensors, options["draft_vocab"])
        drafter = dflash.DFlashDrafter(checkpoint.config, checkpoint.tensors, target)
        return drafter, checkpoint.identity

    drafter, weights = shared.drafter(target, ("dflash", chosen, options["draft_vocab"]), load)
    block = options["block"] or drafter.config.block
    drawn = options["synthetic"]
    engine = DFlash(
        target,
        drafter,
        block,
        options["draft_sampling"],
        synthetic.parse(drawn, block - 1) if drawn else None,
        options["tokens"],
        options["lookup"],
    )
    engine.kernels["drafter_weights"] = weights
    return engine


def _diffusion(options: dict[str, Any], shared: Shared) -> Engine:
    from zbench.engines import synthetic
    from zbench.engines.denoise import Denoise
    from zbench.engines.diffusion import Diffusion
    from zbench.engines.diffusion_tree import DiffusionTree
    from zbench.models import adapter as adapters
    from zbench.models.config import ModelConfig

    target, chosen, block = shared.target(options.get("execution", "auto")), options["adapter"], options["block_size"]
    config, drawn, adapter, weights = target.config, options["synthetic"], None, ""

    def load(config: ModelConfig) -> tuple[adapters.MaskAdapter, str]:
        if chosen.get("random"):
            checkpoint = adapters.random_adapter(config, chosen["seed"], chosen["rank"], block, shared.dtype)
        else:
            checkpoint = adapters.load_adapter(_drafter_folder(chosen, "adapter"), config)
        loaded = adapters.MaskAdapter(checkpoint, config, target.dtype, target.device, shared.team.shard)
        return loaded, checkpoint.identity

    if chosen and isinstance(config, ModelConfig):
        key = (
            "adapter",
            chosen,
            block if chosen.get("random") else None,
        )  # a random one has as many masks as it is asked for
        adapter, weights = shared.drafter(target, key, lambda: load(config))
    mask_id = _mask_id(options, config)
    threshold = 0.9 if options["threshold"] is None else options["threshold"]
    engine: Engine
    proposals = None if options["proposals"] == "all" else options["proposals"]
    acceptance = synthetic.parse(drawn, max(block - 1, 1)) if drawn else None
    if options["sampler"] == "denoise":
        engine = Denoise(target, mask_id, block, threshold, adapter)
    elif options["tokens"] is not None:
        given = (options["tokens"], proposals, adapter, acceptance, options["lookup"])
        engine = DiffusionTree(target, mask_id, block, *given)
    else:
        engine = Diffusion(
            target,
            mask_id,
            block,
            proposals,
            options["outcomes"],
            options["fallback"],
            adapter,
            mix=(0.5 if options["beta"] is None else options["beta"]) if options["sampler"] == "logit_mix" else None,
            trust=threshold if options["sampler"] == "trust_diffusion" else None,
            draft_sampling=options["draft_sampling"],
            synthetic=acceptance,
            lookup=options["lookup"],
        )
    if adapter is not None:
        engine.kernels["mask_adapter"] = weights
    return engine


def _endpoint(options: dict[str, Any], shared: Shared) -> Engine:
    from zbench.engines.endpoint import Endpoint

    return Endpoint(options, shared)


def _llama_cpp(options: dict[str, Any], shared: Shared) -> Engine:
    from zbench.engines.llama_cpp import LlamaCpp

    return LlamaCpp(options, shared)


def _vllm(options: dict[str, Any], shared: Shared) -> Engine:
    from zbench.engines.vllm_offline import VllmOffline

    return VllmOffline(options, shared)


def _dflash_reference(options: dict[str, Any], shared: Shared) -> Engine:
    from zbench.engines.dflash_reference import DFlashReference

    chosen = options["drafter"]
    folder = None if chosen.get("random") else _drafter_folder(chosen, "dflash")
    engine = DFlashReference(options, shared, folder)
    if weights := drafter_weights("dflash_reference", options):
        engine.kernels["drafter_weights"] = weights
    return engine


# What an engine imports that zbench does not ask for, and the line that installs it.
_PACKAGES = {
    "llama_cpp": ("llama_cpp", "pip install llama-cpp-python"),
    "vllm": ("vllm", "pip install vllm"),
    "dflash_reference": ("dflash", "pip install --no-deps dflash"),
}


def missing(name: str) -> str:
    """What must be installed for this engine to run; "" where nothing must."""
    package, install = _PACKAGES.get(name, ("", ""))
    return f"{package} is not installed: {install}" if package and find_spec(package) is None else ""


def absent(name: str, options: dict[str, Any], batch: int) -> str:
    """Why this engine would not be measured here; "" where it would."""
    alone = name in ("llama_cpp", "dflash_reference") or (name == "reference" and options.get("assisted"))
    many = f"decodes one sequence at a time, not {batch}: set batch to 1" if alone and batch > 1 else ""
    return missing(name) or many


_DRAFTERS: dict[str, zoo.Kind] = {"eagle3": "eagle3", "dflash": "dflash", "dflash_reference": "dflash"}


def check(
    name: str, options: dict[str, Any], config: AnyConfig | None, allow_pickle: bool = False, fetch: bool = False
) -> None:
    """What can be said of an engine's options without weights; with `config` None, of a model that is not known yet.
    `fetch` downloads a drafter of the hub to see its shape. Raises UserError."""
    from zbench.engines import plans, synthetic
    from zbench.errors import UserError
    from zbench.models.config import ModelConfig
    from zbench.models.drafters import check_draft_vocab

    chosen = options.get("drafter") or options.get("adapter") or {}
    kind = _DRAFTERS.get(name, "adapter")
    if "zoo" in chosen:
        zoo.drafter(chosen["zoo"], kind)
    if "path" in chosen:
        paths.folder(chosen["path"], f"{name}: {'adapter' if kind == 'adapter' else 'drafter'}")
    known = _seen(chosen, kind, allow_pickle, fetch)
    if name == "eagle3":
        drafter = plans.eagle3_drafter(known, config) if known and config else None
        # Of a vocabulary that is not known yet all can be tried that is asked for.
        vocab = drafter.draft_vocab if drafter else config.vocab if config else options["top_k"]
        plans.eagle3_tokens(options["depth"], options["top_k"], options["tokens"], vocab, options["beam"])
        if options["synthetic"]:
            synthetic.parse(options["synthetic"], options["depth"])
    if config is None:
        return
    if name in ("dflash", "dflash_reference"):
        shape = plans.dflash_drafter(known, config) if known else None
        block = options["block"] or (shape.block if shape else None)
        if name == "dflash":
            vocab = options["draft_vocab"] or (shape.body.vocab if shape else config.vocab)
            check_draft_vocab(vocab, config.vocab)
            if shape and options["draft_vocab"]:
                shape.reduced(vocab)
            if (tokens := options["tokens"]) is not None:
                drawn = options["synthetic"] is not None
                plans.check_dflash_tree(tokens, block or 2, vocab, options["draft_sampling"], drawn)
            if options["synthetic"] and block:
                synthetic.parse(options["synthetic"], block - 1)
    if name == "diffusion":
        if chosen and not isinstance(config, ModelConfig):
            raise UserError(f"diffusion: adapters fit dense transformers only, not {config.family}")
        _mask_id(options, config)
        shift = plans.mask_shift(known, config)
        plans.check_diffusion_shift(options["sampler"], shift)
        if (tokens := options["tokens"]) is not None:
            block = options["block_size"]
            plans.check_diffusion_tree(tokens, block, shift, config.vocab, options["synthetic"] is not None)


def check_here(name: str, options: dict[str, Any]) -> None:
    """What an engine wants of the machine that it runs on. Raises UserError."""
    if name == "endpoint":
        if variable := options["api_key_env"]:
            from zbench.serving.client import api_key

            api_key(variable)
        if options["server"]:
            from zbench.serving.process import Wanted

            Wanted.of(options, Path())


def _seen(chosen: dict[str, Any], kind: zoo.Kind, allow_pickle: bool, fetch: bool) -> dict[str, Any] | None:
    """A drafter whose shape can be read without its weights, by its folder; None where there is none."""
    if "hub" in chosen:
        if not fetch:
            return None
        chosen = {"path": str(_drafter_folder(chosen, kind))}
    if "path" in chosen and allow_pickle:
        from zbench.models.checkpoint import pickles

        if pickles(paths.expanded(chosen["path"])):
            return None
    return chosen or None


def _mask_id(options: dict[str, Any], config: AnyConfig) -> int:
    """The token that a diffusion engine feeds as a mask. Raises UserError where there is none."""
    from zbench.errors import UserError

    if (given := options["mask_id"]) is not None and given >= config.vocab:
        raise UserError(f"diffusion: mask id {given} is not in the vocabulary of {config.vocab}")
    known = config.mask_id if given is None else given
    if known is not None:
        return known
    if options["adapter"] or options["synthetic"] or options["proposals"] == 0:
        return config.vocab - 1  # not embedded with an adapter, of no account with synthetic acceptance, or never fed
    raise UserError("diffusion: this model has no mask token; give mask_id or an adapter")


def _drafter_folder(chosen: dict[str, Any], kind: zoo.Kind) -> Path:
    if "zoo" in chosen:
        return zoo.drafter(chosen["zoo"], kind)
    if "path" in chosen:
        return paths.expanded(chosen["path"])
    from zbench.models import loading

    return loading.snapshot(chosen["hub"], chosen["revision"] or "main")


def drafter_weights(name: str, options: dict[str, Any]) -> str:
    """sha256 of the files of an engine's drafter or adapter, as its trials record it; "" where they are in none."""
    from zbench.models import adapter, checkpoint, loading

    chosen, kind = options.get("drafter") or options.get("adapter") or {}, _DRAFTERS.get(name, "adapter")
    if not chosen or chosen.get("random"):
        return ""
    folder = _drafter_folder(chosen, kind)
    adapters = [folder / adapter.WEIGHTS] if kind == "adapter" else []
    return loading.weights_hash(adapters or checkpoint.pickles(folder) or loading.weight_files(folder))


_BUILDERS: dict[str, Callable[[dict[str, Any], Shared], Engine]] = {
    "autoregressive": _autoregressive,
    "eagle3": _eagle3,
    "dflash": _dflash,
    "diffusion": _diffusion,
    "prompt_lookup": _prompt_lookup,
    "forward": _forward,
    "reference": _reference,
    "endpoint": _endpoint,
    "llama_cpp": _llama_cpp,
    "vllm": _vllm,
    "dflash_reference": _dflash_reference,
}


def create(name: str, options: dict[str, Any], shared: Shared) -> Engine:
    """The engine `name` with its validated options. The scenario layer refuses unknown names.

    Raises UserError where a package is missing that it needs.
    """
    if why := missing(name):
        from zbench.errors import UserError

        raise UserError(f"{name}: {why}")
    return _BUILDERS[name](options, shared)
