"""What a kernel's examples launch, compiled for GPUs that need not be here: `python -m tests.kernels.compiled verify`.

The interpreter accepts what the compiler refuses (types that change in a loop, shapes that are no power of two).
Prints one line per launch and target; ends with an error where one does not compile.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from zbench.kernels import chips, registry

TARGETS = {"sm90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
OPTIONS = ("num_warps", "num_stages")
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def compile(kernel: JITFunction, target: GPUTarget, seen: set[str], *args: Any, **kwargs: Any) -> None:
    """What `kernel` is launched with, once for each of its variants."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constant = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants = {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = given.get(name)
        if name in constant or value is None:
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    key = f"{kernel.__name__} {signature} {constants}"
    if key in seen:
        return
    seen.add(key)
    began = time.perf_counter()
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=target, options=options)
    shared, took = made.metadata.shared, time.perf_counter() - began
    print(f"{kernel.__name__} {target.arch}: {shared} bytes shared, {took:.1f} s", flush=True)


def main(names: list[str]) -> None:
    for chip, target in TARGETS.items():
        here, seen = chips.Chip(chip, 100, *chips.KNOWN[chip]), set[str]()
        chips.of = lambda device, here=here: here  # type: ignore[assignment, misc]
        JITFunction.__getitem__ = lambda kernel, grid, to=(target, seen): partial(compile, kernel, *to)
        for name in names:
            kernel = registry.get(name)
            for seed in range(kernel.examples):
                kernel.launch(*kernel.example(torch.device("cpu"), seed))


if __name__ == "__main__":
    main(sys.argv[1:] or list(registry.MODULES))
