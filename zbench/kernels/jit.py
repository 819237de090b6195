"""Triton when it is needed: a kernel is a plain function of its module until it is first launched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any


@functools.cache
def compiled(function: Callable[..., Any]) -> Any:
    """What launches `function`. Its module's `tl` becomes `triton.language`, and so do the functions of its module that
    it calls become functions of the device."""
    import triton
    import triton.language as tl

    assert isinstance(function, FunctionType)
    scope = function.__globals__
    scope["tl"] = tl
    for name in function.__code__.co_names:
        if isinstance(called := scope.get(name), FunctionType):
            scope[name] = compiled(called)
    return triton.jit(function)


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), which multiplies the bits of bfloat16 matrices
    as integers: kernels have to widen what they multiply there. The products of two bfloat16 are exact in float32."""
    from triton.runtime.jit import JITFunction

    return not isinstance(compiled(_nothing), JITFunction)


def _nothing() -> None:
    pass
