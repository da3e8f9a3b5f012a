"""The configuration of a run: one tree of frozen models, read from YAML with ``key.path=value`` overrides on top."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class ConfigError(Exception):
    """One line that names the key, what was given and what is accepted."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _flags_are_not_numbers(cls, value: Any, field: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[field.field_name].annotation is not bool:
            raise PydanticCustomError("flag", "not true or false")
        return value


class Data(Section):
    train: Path = Field(description="JSONL file with `prompt` and `answer` on each line")
    heldout: Path = Field(description="JSONL file of the same form, for evaluation only")


class Bupo(Section):
    """Phase 1 of Bottom-up Policy Optimization; read when `policy: bupo`."""

    layer: PositiveInt = Field(description="the internal policy's layer l, counted from 1")
    internal_steps: int = Field(ge=0, description="s_inter: this many steps optimise the internal policy, the rest the model's own")
    module: Literal["layer", "attention", "ffn"] = "layer"
    final_norm: bool = Field(False, description="apply the final norm before the unembedding (the paper does not)")


class Rollout(Section):
    prompts: PositiveInt = Field(32, description="prompts per step")
    samples: int = Field(8, ge=2, description="responses per prompt, the group of GRPO")
    max_new_tokens: PositiveInt = 256
    temperature: PositiveFloat = Field(1.0, description="of sampling, and of every log-prob in the loss")


class Objective(Section):
    clip_low: Share = 0.2
    clip_high: Annotated[float, Field(ge=0)] = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = 10.0
    aggregation: Literal["token-mean", "sequence-mean-token-mean"] = "token-mean"
    advantage_std: bool = Field(True, description="divide group advantages by their standard deviation")


class Optimizer(Section):
    learning_rate: PositiveFloat = 1e-6
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: PositiveFloat = 1.0
    mini_batch: PositiveInt = Field(32, description="prompts per optimizer step; must divide rollout.prompts")
    micro_batch: PositiveInt = Field(64, description="sequences per forward and backward; changes memory, not the result")


class Evaluation(Section):
    every: int = Field(0, ge=0, description="steps between evaluations; 0 = only before and after training")
    samples: PositiveInt = Field(8, description="k of avg@k and pass@k")
    temperature: PositiveFloat = 1.0
    batch: PositiveInt = Field(512, description="sequences generated at a time")


class TrainConfig(Section):
    model: Path = Field(description="folder of a Hugging Face checkpoint")
    output_dir: Path = Field(description="run folder; must not exist yet, or be empty")
    data: Data
    bupo: Bupo | None = None
    policy: Literal["bupo", "grpo"] = "bupo"
    reward: str = Field("bupo.rewards:exact_match", description="`module:function` of (response, answer) -> float")
    steps: PositiveInt = 300
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    episodes_every: PositiveInt = Field(20, description="steps between groups of episodes written as text")
    rollout: Rollout = Rollout()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.policy == "bupo":
            if self.bupo is None:
                raise ValueError("bupo: missing, accepted is a section with layer and internal_steps, or policy: grpo")
            if self.bupo.internal_steps > self.steps:
                raise ValueError(f"bupo.internal_steps: {self.bupo.internal_steps} given, accepted are 0 to {self.steps} (steps)")
        if self.rollout.prompts % self.optimizer.mini_batch:
            given, prompts = self.optimizer.mini_batch, self.rollout.prompts
            raise ValueError(f"optimizer.mini_batch: {given} given, accepted are divisors of rollout.prompts ({prompts})")
        return self


def load_config(path: Path, overrides: list[str] = ()) -> TrainConfig:
    """The checked configuration in ``path`` with ``key.path=value`` overrides; values are YAML.

    Raises :class:`ConfigError`; the files it names exist when it returns.
    """
    if not path.is_file():
        raise ConfigError(f"config: {path} is not a file, accepted is a YAML file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config: {path} holds a {type(tree).__name__}, accepted is a mapping of keys to values")
    for override in overrides:
        _override(tree, override)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> TrainConfig:
    """The checked configuration in ``tree``. Raises :class:`ConfigError`."""
    try:
        config = TrainConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(error.errors()[0])) from None
    for key, path in (("data.train", config.data.train), ("data.heldout", config.data.heldout)):
        if not path.is_file():
            raise ConfigError(f"{key}: {path} is not a file, accepted is a JSONL file")
    if not (config.model / "config.json").is_file():
        raise ConfigError(f"model: {config.model} has no config.json, accepted is the folder of a Hugging Face checkpoint")
    check_new_folder(config.output_dir, "output_dir")
    return config


def check_new_folder(path: Path, key: str) -> None:
    """Raises :class:`ConfigError` unless ``path`` is an empty folder, or can become one."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ConfigError(f"{key}: {existing} is a file, accepted is a new or empty folder")
    if existing == path and any(path.iterdir()):
        raise ConfigError(f"{key}: {path} is not empty, accepted is a new or empty folder")


def dump_config(config: TrainConfig) -> str:
    """The configuration as YAML that :func:`load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def describe_config() -> str:
    """Every key with its default and meaning, one a line, for ``--help``."""
    return "\n".join(_describe(TrainConfig, ""))


def _describe(section: type[Section], prefix: str) -> list[str]:
    lines = []
    for name, field in section.model_fields.items():
        if (below := _section(field.annotation)) is not None:
            lines += _describe(below, f"{prefix}{name}.")
            continue
        key = prefix + name
        default = (
            "(required)" if field.is_required() else f"= {yaml.safe_dump(field.default, default_flow_style=True).split(chr(10))[0]}"
        )
        choices = " | ".join(field.annotation.__args__) if get_origin(field.annotation) is Literal else ""
        lines.append(f"  {key:<28}{default:<29}{field.description or choices}".rstrip())
    return lines


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override: {override!r} given, accepted is key.path=value")
    *parents, leaf = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {parent} is a single value, it has no keys below it")
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: {value!r} given, accepted is a YAML value") from None


def _one_line(error: dict[str, Any]) -> str:
    """A pydantic error as ``key.path: what was given, what is accepted``."""
    *parents, leaf = error["loc"] or ("",)
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{key}: missing, it has no default"
    if error["type"] == "extra_forbidden":
        section = TrainConfig
        for parent in parents:
            section = _section(section.model_fields[parent].annotation)
        accepted = list(section.model_fields)
        near = difflib.get_close_matches(str(leaf), accepted, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{key}: unknown key, {hint}accepted are {', '.join(accepted)}"
    message = error["msg"].removeprefix("Input should be ")
    return f"{key}: {error['input']!r} given, accepted is {message}"


def _section(annotation: Any) -> type[Section] | None:
    """The section in ``Section`` or ``Section | None``; None for a plain value."""
    options = (annotation, *get_args(annotation))
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)
