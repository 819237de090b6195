"""llama.cpp, in this process through `llama-cpp-python`: the same weights in a GGUF, the same threads, the same ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zbench.engines import Shared
from zbench.engines.base import Finish, Generated, Meter, Request, commit
from zbench.errors import UserError
from zbench.models.gguf import gguf_file

_CACHE = {torch.float32: "GGML_TYPE_F32", torch.float16: "GGML_TYPE_F16", torch.bfloat16: "GGML_TYPE_F16"}


class LlamaCpp:
    """A step is one token as `Llama.generate` yields it: forward, sampling and the wrapper around them."""

    exact = False

    def __init__(self, options: Mapping[str, Any], shared: Shared) -> None:
        import llama_cpp

        file = gguf_file(shared.model, shared.dtype)
        threads = torch.get_num_threads()
        kind = getattr(llama_cpp, _CACHE[shared.dtype])
        self.model = llama_cpp.Llama(
            str(file),
            n_ctx=min(options["context"], shared.model.config.max_positions),
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0 if shared.device.type == "cpu" else -1,
            type_k=kind,
            type_v=kind,
            flash_attn=options["flash_attention"],
            verbose=False,
        )
        self.kernels = {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "forward": "llama.cpp" + (" (flash attention)" if options["flash_attention"] else ""),
            "weights": file.name,
            "times": "every token",
        }

    def close(self) -> None:
        self.model.close()

    def generate(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated:
        if len(prompts) > 1:
            raise UserError("llama-cpp-python decodes one sequence at a time: set batch to 1")
        (prompt,) = prompts
        if (needed := len(prompt) + request.limit) > self.model.n_ctx():
            raise UserError(f"llama_cpp: prompt and output need {needed} tokens: set its context to that or more")
        sampling = request.sampling
        self.model.reset()  # else a prompt that begins like the last one is not read again
        self.model.set_seed(request.seeds[0] & 0xFFFFFFFF)
        tokens = self.model.generate(
            prompt,
            temp=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            min_p=0.0,
        )
        outputs: list[list[int]] = [[]]
        active, finish = [True], list[Finish](["length"])
        while active[0]:
            with meter.step():
                meter.gained(commit([[next(tokens)]], outputs, active, request, finish))
        tokens.close()
        return Generated(outputs, finish)
