"""Every architecture behind one door: which config a model has follows from its family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zbench.errors import UserError
from zbench.models import config as dense
from zbench.models.config import ModelConfig
from zbench.models.zaya_config import ZayaConfig

AnyConfig = ModelConfig | ZayaConfig


def from_hf(config: Mapping[str, Any]) -> AnyConfig:
    """The config of a Hugging Face `config.json`, by its model_type. Raises UserError as the configs do."""
    return _kind("model_type", config.get("model_type")).from_hf(config)


def from_fields(values: Mapping[str, Any]) -> AnyConfig:
    """The config of a shape in our own names, by its family. Raises UserError as the configs do."""
    if "family" not in values:
        return ModelConfig.from_fields(values)  # which says that it is missing
    return _kind("model family", values["family"]).from_fields(values)


def tensor_shapes(config: AnyConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor name -> shape of every weight of the model; a tied head is not listed."""
    return config.tensor_shapes() if isinstance(config, ZayaConfig) else dense.tensor_shapes(config)


def parameter_count(config: AnyConfig) -> int:
    """Weights of the model; a tied embedding and head count once."""
    return config.parameter_count() if isinstance(config, ZayaConfig) else dense.parameter_count(config)


def _kind(what: str, family: Any) -> type[AnyConfig]:
    if family == "zaya":
        return ZayaConfig
    if family in dense.FAMILIES:
        return ModelConfig
    raise UserError(f"{what} {family!r} is not supported; supported: {dense.listed((*dense.FAMILIES, 'zaya'))}")
