"""Triton when it is needed: a kernel is a plain function of its module until it is first launched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def compiled(function: Callable[..., Any], helpers: tuple[Callable[..., Any], ...] = ()) -> Any:
    """What launches `function`; `helpers` are the functions of its module that it calls."""
    for helper in helpers:
        function.__globals__[helper.__name__] = _jitted(helper)
    return _jitted(function)


@functools.cache
def _jitted(function: Callable[..., Any]) -> Any:
    """As Triton has it; its module's `tl` becomes `triton.language`."""
    import triton
    import triton.language as tl

    function.__globals__["tl"] = tl
    return triton.jit(function)


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), which multiplies the bits of bfloat16 matrices
    as integers: kernels have to widen what they multiply there. The products of two bfloat16 are exact in float32."""
    from triton.runtime.jit import JITFunction

    return not isinstance(compiled(_nothing), JITFunction)


def _nothing() -> None:
    pass
