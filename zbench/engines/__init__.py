"""Decoders. A new one is a file in this folder, one entry in `_BUILDERS` and its options in `scenario.ENGINES`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from zbench.engines.base import Engine
    from zbench.hardware.device import Device
    from zbench.models.loading import LoadedModel
    from zbench.models.transformer import Transformer


class Shared:
    """What the engines of one matrix point have in common: the target model, loaded onto the device once."""

    def __init__(self, model: LoadedModel, dtype: torch.dtype, device: Device) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self._targets: dict[str, Transformer] = {}

    def target(self, execution: str) -> Transformer:
        from zbench.models.transformer import Transformer

        if execution not in self._targets:
            self._targets[execution] = Transformer(
                self.model.config, self.model.tensors, self.dtype, self.device.torch, execution
            )
        return self._targets[execution]

    @cached_property
    def transformers(self) -> Any:
        """The same weights as a `transformers` model."""
        from zbench.engines.reference import load_transformers

        return load_transformers(self.model, self.dtype, self.device.torch)


def _autoregressive(options: dict[str, Any], shared: Shared) -> Engine:
    from zbench.engines.autoregressive import Autoregressive

    return Autoregressive(shared.target(options["execution"]))


def _reference(options: dict[str, Any], shared: Shared) -> Engine:
    from zbench.engines.reference import Reference

    return Reference(shared, options["assisted"], options["prompt_lookup_tokens"])


_BUILDERS: dict[str, Callable[[dict[str, Any], Shared], Engine]] = {
    "autoregressive": _autoregressive,
    "reference": _reference,
}


def create(name: str, options: dict[str, Any], shared: Shared) -> Engine:
    """The engine `name` with its validated options. The scenario layer refuses unknown names."""
    return _BUILDERS[name](options, shared)
