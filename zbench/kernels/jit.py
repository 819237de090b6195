"""Triton when it is needed: a kernel is a plain function of its module until it is first launched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

launches = 0  # of kernels in this process: torch's profiler sees none of them on the host


def compiled(function: Callable[..., Any]) -> Any:
    """What launches `function`, once. Its module's `tl` becomes `triton.language`; functions of its module that it
    calls become functions of the device."""
    global launches
    launches += 1
    return _compiled(function)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Any:
    import triton
    import triton.language as tl

    assert isinstance(function, FunctionType)
    scope = function.__globals__
    scope["tl"] = tl
    for name in function.__code__.co_names:
        if isinstance(called := scope.get(name), FunctionType):
            scope[name] = _compiled(called)
    return triton.jit(function)


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), which multiplies the bits of bfloat16 matrices
    as integers: kernels have to widen what they multiply there. The products of two bfloat16 are exact in float32."""
    from triton.runtime.jit import JITFunction

    return not isinstance(_compiled(_nothing), JITFunction)


def _nothing() -> None:
    pass
