"""The config of the model that a run names, read without its weights, and whether the run suits it."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from bupo.config import TrainConfig
from bupo.cost import MODEL_TYPES
from bupo.errors import ConfigError
from bupo.model import pretrained, unusable


def load_architecture(config: TrainConfig, key: str = "model") -> PretrainedConfig:
    """Return the model's own config: that of the local folder or file ``config.model``, else the file ``config.architecture``, else
    that on the hub (or in its cache).

    Raises :class:`ConfigError` with ``key``, the option that names the model, where it cannot be read.
    """
    source = config.model
    if config.architecture is not None and not Path(config.model).exists():
        source, key = str(config.architecture), "architecture"
        if not config.architecture.is_file():
            raise ConfigError(f"architecture: {source} is not a file, accepted is a model's config.json")
    try:
        return AutoConfig.from_pretrained(**pretrained(source))
    except Exception as error:  # A file can be damaged in many ways, and each raises another kind.
        raise unusable(source, error, key) from error


def check_type(architecture: PretrainedConfig, name: str, key: str = "model") -> None:
    """Raise :class:`ConfigError` unless the model ``name``, which the option ``key`` gives, has internal policies."""
    if architecture.model_type not in MODEL_TYPES:
        raise ConfigError(f"{key}: {name} is of type {architecture.model_type!r}, accepted are {', '.join(MODEL_TYPES)}")


def check_fits(architecture: PretrainedConfig, config: TrainConfig) -> None:
    """Raise :class:`ConfigError` where the run asks for a type, a layer or a length that the model does not have."""
    check_type(architecture, config.model)
    depth = architecture.num_hidden_layers
    asked = {"optimizer.upper_from": config.optimizer.upper_from}
    if config.policy == "bupo" and config.bupo is not None:
        asked["bupo.layer"] = config.bupo.layer
    if config.distillation is not None and config.distillation.layer >= depth:
        given = config.distillation.layer
        raise ConfigError(f"oisd.layer: {given} given, accepted are 1 to {depth - 1} (below the last layer of {config.model})")
    for key, layer in asked.items():
        if layer is not None and layer > depth:
            raise ConfigError(f"{key}: {layer} given, accepted are 1 to {depth} (the layers of {config.model})")
    (prompt, response), longest = config.lengths, architecture.max_position_embeddings
    if prompt + response > longest:
        raise ConfigError(
            f"rollout.max_new_tokens: {response} given with data.max_prompt_tokens: {prompt}, accepted are together at most "
            f"{longest} (the positions of {config.model})"
        )
