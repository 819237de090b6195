"""Hugging Face `transformers` generate, plain or with prompt lookup: the oracle for tokens and a peer for speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from zbench.engines import Shared
from zbench.engines.base import Generated, Meter, Request, commit
from zbench.errors import UserError
from zbench.models.cost import Cost, forward_cost
from zbench.models.loading import LoadedModel
from zbench.models.model import count_choices, routing
from zbench.records import Role


class Reference:
    exact = False

    def __init__(self, shared: Shared, assisted: str | None = None, lookup_tokens: int = 10) -> None:
        self.model = shared.transformers
        self.config, self.dtype = shared.model.config, shared.dtype
        self.lookup = {"prompt_lookup_num_tokens": lookup_tokens} if assisted == "prompt_lookup" else {}
        attention = getattr(self.model.config, "_attn_implementation", "unknown")
        self.kernels = {
            "forward": f"transformers ({attention} attention)",
            "version": f"transformers {transformers.__version__}",
        }

    def generate(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated:
        if self.lookup and len(prompts) > 1:
            raise UserError("transformers' prompt lookup decodes one sequence at a time: set batch to 1")
        ids, mask = _left_pad(prompts, self.model.device)
        settings: dict[str, Any] = {"do_sample": False}
        if not request.sampling.greedy:
            settings = {
                "do_sample": True,
                "temperature": request.sampling.temperature,
                "top_p": request.sampling.top_p,
                "top_k": request.sampling.top_k or 0,
            }
            torch.manual_seed(request.seeds[0])  # generate draws the whole batch from torch's one global stream
        watch = _Watch(self, meter, len(prompts), request)
        with watch.attached(self.model), torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=request.limit,
                eos_token_id=sorted(request.eos_ids) or None,
                pad_token_id=0,
                streamer=watch,
                **settings,
                **self.lookup,
            )
        return watch.generated


class _Watch:
    """Sees a generate call from outside: hooks time each forward, the streamer interface each step's tokens."""

    def __init__(self, engine: Reference, meter: Meter, batch: int, request: Request) -> None:
        self.engine, self.meter, self.request = engine, meter, request
        self.generated = Generated([[] for _ in range(batch)], ["length"] * batch)
        self.active = [True] * batch
        self.submitted = False

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        before = model.register_forward_pre_hook(self._before, with_kwargs=True)
        after = model.register_forward_hook(self._after, with_kwargs=True)
        routers = [module for module in model.modules() if hasattr(module, "balancing_biases")]
        hooks = [before, after, *(router.register_forward_hook(self._route) for router in routers)]
        self.meter.begin_step()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.meter.end_step()  # what generate did after its last token

    def _before(self, model: Any, args: tuple, kwargs: dict) -> None:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # renamed in transformers 5.24
        self.context = cache.get_seq_length() if cache is not None else 0
        self.choices: list[Tensor] = []
        self.start = self.meter.device.mark()

    def _after(self, model: Any, args: tuple, kwargs: dict, out: Any) -> None:
        end = self.meter.device.mark()
        batch, rows = kwargs["input_ids"].shape
        role: Role = "prefill" if self.context == 0 else "decode" if rows == 1 else "verify"
        contexts, wanted = [self.context] * batch, out.logits.shape[0] * out.logits.shape[1]
        engine, choices = self.engine, self.choices

        def cost() -> Cost:
            seen = routing(count_choices(choices, engine.config.experts)) if choices else None  # type: ignore[union-attr]
            return forward_cost(engine.config, rows, contexts, wanted, engine.dtype.itemsize, routing=seen)

        self.meter.add_forward(role, rows, contexts, cost, self.start, end)

    def _route(self, router: Any, args: tuple, out: Any) -> None:
        """A ZAYA router's choices [N]; it marks a row that skips by the weight 0."""
        _, probs, indices, _ = out
        self.choices.append(indices[:, 0].where(probs[:, 0] > 0, self.engine.config.experts))  # type: ignore[union-attr]

    def put(self, tokens: Tensor) -> None:
        """Called by generate: once with the prompts, then with each step's tokens ([B], or [1, n] when assisted)."""
        if not self.submitted:
            self.submitted = True
            return
        outputs, finish = self.generated.outputs, self.generated.finish
        gained = tokens.view(len(outputs), -1).tolist()
        counts = commit(gained, outputs, self.active, self.request, finish)
        self.meter.gained(counts)
        self.meter.end_step()
        self.meter.begin_step()

    def end(self) -> None:
        """Called by generate when it is done."""


def load_transformers(model: LoadedModel, dtype: torch.dtype, device: torch.device) -> Any:
    """A `transformers` causal LM in eval mode that holds the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    if model.path is not None:
        hf = AutoModelForCausalLM.from_pretrained(model.path, dtype=dtype, local_files_only=True)
    else:
        settings = model.config.to_hf()
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=dtype)
        hf.load_state_dict(model.tensors, strict=False)
    # Sampling settings come from the scenario alone, not from a checkpoint's generation_config.json.
    hf.generation_config = GenerationConfig()
    hf.to(device=device)  # type: ignore[call-arg]
    return hf.eval()


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
