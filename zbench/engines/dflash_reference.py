"""DFlash as its authors publish it (the package `dflash`), on the `transformers` model: seen from outside by hooks.

Its loop tells neither when a step ends nor what it gained. Both follow from what it hands its drafter: one call a step,
with the target's hidden states of the tokens that the step before gained.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from zbench.engines import Shared
from zbench.engines.base import Generated, Meter, Request
from zbench.errors import UserError
from zbench.models import dflash
from zbench.models.cost import forward_cost
from zbench.records import Role


class DFlashReference:
    exact = False

    def __init__(self, options: Mapping[str, Any], shared: Shared, folder: Path | None) -> None:
        """`folder` holds the drafter in the released layout; None makes a random one."""
        from dflash import DFlashDraftModel

        self.target, self.config, self.dtype = shared.transformers, shared.model.config, shared.dtype
        with tempfile.TemporaryDirectory() as made:
            if folder is None:
                chosen, folder = options["drafter"], Path(made)
                size = {"layers": chosen["layers"]} if chosen["layers"] else {}
                random = dflash.random_drafter(self.config, chosen["seed"], dtype=shared.dtype, **size)
                dflash.save_drafter(folder, random, self.config)
            self.shape = dflash.read_config(folder, self.config)
            if self.shape.own_head:
                raise UserError("dflash_reference: it knows no drafter with a head of its own")
            self.drafter = DFlashDraftModel.from_pretrained(folder, dtype=shared.dtype)
        self.drafter.to(shared.device.torch).eval()
        if options["block"]:
            self.drafter.block_size = options["block"]
        self.kernels = {
            "version": f"dflash {importlib.metadata.version('dflash')}",
            "forward": "transformers (sdpa attention)",
            "times": "every step",
        }

    def generate(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated:
        if len(prompts) > 1:
            raise UserError("the dflash package decodes one sequence at a time: set batch to 1")
        (prompt,) = prompts
        sampling = request.sampling
        torch.manual_seed(request.seeds[0])  # it draws from torch's one global stream
        watch = _Watch(self, meter)
        with watch.attached():
            ids = self.drafter.spec_generate(
                self.target,
                torch.tensor([list(prompt)], device=self.target.device),
                request.limit,
                sorted(request.eos_ids) or None,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k or 0,
            )
            output = ids[0, len(prompt) :].tolist()
            watch.step_gained(len(output) - watch.gained)
        return Generated([output], ["eos" if output[-1] in request.eos_ids else "length"])


class _Watch:
    """Hooks of one generate call: a step is the drafter's forward, the target's, and what is done with the two."""

    def __init__(self, engine: DFlashReference, meter: Meter) -> None:
        self.engine, self.meter = engine, meter
        self.gained = 0  # by the steps that have ended
        self.drafts = 0  # of the step that runs

    @contextmanager
    def attached(self) -> Iterator[None]:
        hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True)
            for model in (self.engine.drafter, self.engine.target)
        ]
        hooks.append(self.engine.drafter.register_forward_hook(self._drafted, with_kwargs=True))
        hooks.append(self.engine.target.register_forward_hook(self._verified, with_kwargs=True))
        self.meter.begin_step()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.meter.end_step()

    def step_gained(self, count: int) -> None:
        drafted, accepted = ((self.drafts,), (count - 1,)) if self.drafts else ((), ())
        self.meter.gained((count,), drafted, accepted)
        self.gained += count

    def _before(self, model: Any, args: tuple, kwargs: dict) -> None:
        if model is self.engine.drafter:
            self.step_gained(kwargs["target_hidden"].shape[1] if self.drafts else 1)
            self.meter.end_step()
            self.meter.begin_step()
            self.drafts = kwargs["noise_embedding"].shape[1] - 1
        self.context = kwargs["past_key_values"].get_seq_length()
        self.start = self.meter.device.mark()

    def _drafted(self, model: Any, args: tuple, kwargs: dict, out: Any) -> None:
        end, shape, itemsize = self.meter.device.mark(), self.engine.shape, self.engine.dtype.itemsize
        read, rows = kwargs["target_hidden"].shape[1], kwargs["noise_embedding"].shape[1]
        contexts = [self.context + read]
        self.meter.add_forward(
            "draft", rows, contexts, lambda: shape.cost(read, rows, contexts, itemsize), self.start, end, "drafter"
        )

    def _verified(self, model: Any, args: tuple, kwargs: dict, out: Any) -> None:
        end, config, itemsize = self.meter.device.mark(), self.engine.config, self.engine.dtype.itemsize
        rows, contexts, wanted = args[0].shape[1], [self.context], out.logits.shape[1]
        role: Role = "verify" if self.drafts else "prefill"
        self.meter.add_forward(
            role, rows, contexts, lambda: forward_cost(config, rows, contexts, wanted, itemsize), self.start, end
        )
