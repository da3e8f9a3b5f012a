"""The configuration of a run: one tree of frozen models, read from YAML with ``key.path=value`` overrides on top."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from bupo.errors import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
ExportType = Literal["auto", "float32", "bfloat16", "float16"]

BASE = "base"  # the folder of a run with config and tokenizer of the model it started from


def _allows_flags(annotation: Any) -> bool:
    return bool in (annotation, *get_args(annotation))


class Section(BaseModel):
    """A part of the configuration: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _flags_are_not_numbers(cls, value: Any, field: ValidationInfo) -> Any:
        if isinstance(value, bool) and not _allows_flags(cls.model_fields[str(field.field_name)].annotation):
            raise PydanticCustomError("flag", "not true or false")
        return value


class Data(Section):
    """The data of a run. Files are JSONL or parquet, folders are what `datasets` saved, everything else is the name of a dataset on
    the Hugging Face hub (``name:split`` or ``name/config:split``)."""

    train: str | list[str] = Field(
        description="JSONL or parquet file, folder saved by `datasets`, or name:split on the hub; one or several"
    )
    heldout: str | list[str] = Field([], description="the same, for evaluation only; [] = no evaluation")
    prompt: str = Field("prompt", description="column: text, or a chat (a list of role and content); a.b reads b in the struct a")
    answer: str | None = Field(None, description="column; null = `answer`, or else `reward_model.ground_truth` (verl, BuPO)")
    source: str | None = Field(None, description="column to report accuracy by; null = `data_source`, or else the file's name")
    template: Literal["auto", "raw", "chat", "qwen-math", "qwen3-nothinking", "octothinker"] = Field(
        "auto", description="auto = text as it is, chats through the tokenizer's template; the last three are the paper's"
    )
    max_prompt_tokens: PositiveInt = 1024
    too_long: Literal["error", "drop"] = Field("error", description="what to do with a prompt above max_prompt_tokens")


class Reward(Section):
    function: str = Field(
        "bupo.rewards:math_answer", description="`module:function` of (response, answer) -> float, or as TRL or verl call one"
    )
    timeout: PositiveFloat = Field(10.0, description="seconds; a response whose reward takes longer leaves the batch")
    workers: PositiveInt = Field(2, description="processes per device that compute rewards")


class Guards(Section):
    """The guards that end phase 1 early; null is off."""

    perplexity: Annotated[float, Field(gt=1)] | None = Field(
        None, description="of the final policy on held-out responses of the first model, relative to that model's own"
    )
    kl: PositiveFloat | None = Field(None, description="KL(internal policy || final policy), nats per token")
    reward_drop: PositiveFloat | None = Field(None, description="below the best mean over `window` steps so far")
    window: PositiveInt = Field(5, description="steps over which kl and reward are averaged")
    responses: PositiveInt = Field(64, description="held-out responses for perplexity")


class Bupo(Section):
    """Phase 1 of Bottom-up Policy Optimization, which is there with `policy: bupo`."""

    layer: PositiveInt = Field(description="the internal policy's layer l, counted from 1")
    internal_steps: int = Field(ge=0, description="s_inter: this many steps optimise the internal policy, the rest the model's own")
    module: Literal["layer", "attention", "ffn"] = "layer"
    final_norm: bool = Field(False, description="apply the final norm before the unembedding (the paper does not)")
    guards: Guards = Guards()


class Oisd(Section):
    """On-policy internal self-distillation (arXiv 2605.29089), which is there with `policy: oisd`: GRPO on the model's own policy,
    and a layer that learns from it where the advantage is positive, and away from it where it is negative."""

    layer: PositiveInt = Field(description="the layer that learns from the model's own policy, from 1, below the last")
    weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="of the Jensen-Shannon divergence of the two policies in the loss"
    )
    attention_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="the same of the two layers' attention (the paper: 0.1), with hardware.attention: eager"
    )
    final_norm: bool = Field(True, description="apply the final norm before the unembedding of the layer's policy")


class Rollout(Section):
    engine: Literal["continuous", "generate", "vllm"] = Field(
        "continuous", description="transformers' continuous batching, its generate, vLLM"
    )
    prompts: PositiveInt = Field(32, description="prompts per step, over all devices")
    samples: PositiveInt = Field(8, description="responses per prompt, the group of GRPO")
    max_new_tokens: PositiveInt = 256
    temperature: PositiveFloat = Field(1.0, description="of sampling, and of every log-prob in the loss")
    top_k: NonNegativeInt = Field(
        0, description="how many ids sampling keeps, the most probable; 0 = all. All log-probs in the loss are on the ids kept"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="the probability together of the fewest ids that sampling keeps, after top_k; 1 = all"
    )
    min_p: Decay = Field(
        0.0, description="the least share of the greatest probability of ids that sampling keeps, after top_p; 0 = all"
    )
    sequences: PositiveInt = Field(512, description="generated at a time per device; bounds the cache of keys and values")
    skip_special_tokens: bool = Field(
        False, description="leave all special tokens out of the text that rewards and files have, not only end and padding"
    )
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="share of the GPU's memory that vLLM may take")


class Objective(Section):
    advantage: Literal["grpo", "rloo", "reinforce++", "reinforce++-baseline"] = "grpo"
    advantage_std: bool = Field(True, description="grpo: divide group advantages by their standard deviation")
    ratio: Literal["token", "sequence"] = Field("token", description="whose ratio is bounded; sequence = GSPO, GMPO, VESPO, LUSPO")
    clip: Literal["ppo", "cispo", "sapo", "gmpo", "vespo"] = Field(
        "ppo", description="what bounds it; gmpo and vespo are of sequences"
    )
    clip_low: Share = Field(0.2, description="of ppo: ratios from 1 - clip_low; of gmpo: ln ratios from -clip_low")
    clip_high: Annotated[float, Field(ge=0)] = Field(0.2, description="the same above, and of cispo")
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        10.0, description="of ppo: the highest ratio where the advantage is < 0"
    )
    sapo_temperature_pos: PositiveFloat = Field(1.0, description="of sapo's gate where the advantage is positive")
    sapo_temperature_neg: PositiveFloat = Field(1.05, description="the same elsewhere")
    vespo_k_pos: Annotated[float, Field(ge=0)] = Field(
        2.0, description="of vespo where the advantage is positive: r^k e^(lambda (1 - r))"
    )
    vespo_lambda_pos: PositiveFloat = 3.0
    vespo_k_neg: Annotated[float, Field(ge=0)] = Field(3.0, description="the same where it is negative")
    vespo_lambda_neg: PositiveFloat = 2.0
    top_entropy_quantile: Share = Field(
        1.0, description="share of an update's tokens with a loss, those of highest entropy before it; others count in means"
    )
    aggregation: Literal["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum"] = Field(
        "token-mean", description="sequence-mean-token-sum with ratio: sequence is LUSPO"
    )


class Optimizer(Section):
    learning_rate: PositiveFloat = 1e-6
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: PositiveFloat = 1.0
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after warm-up; linear and cosine fall to 0")
    warmup_steps: int = Field(0, ge=0, description="steps of the run over which the learning rate rises")
    mini_batch: PositiveInt = Field(32, description="prompts per optimizer step; must divide rollout.prompts")
    upper_layers: Share = Field(
        1.0, description="share of the learning rate for layers above `upper_from` and the final norm; 0 freezes them"
    )
    upper_from: PositiveInt | None = Field(None, description="the last layer, counted from 1, with the full learning rate")


class Evaluation(Section):
    every: int = Field(0, ge=0, description="steps between evaluations; 0 = only before and after training")
    samples: PositiveInt = Field(8, description="responses per problem")
    k: list[PositiveInt] = Field([1, 8], description="of pass@k, each at most `samples`")
    temperature: PositiveFloat = 1.0


class Hardware(Section):
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N; under torchrun auto, cpu or cuda"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of weights and activations in use; masters, gradients, sums are float32"
    )
    max_tokens_per_device: PositiveInt = Field(
        16384, description="tokens in a packed micro-batch; changes memory and speed, not the result"
    )
    attention: Literal["per-sequence", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "eager"] = Field(
        "per-sequence", description="in training; per-sequence = scaled_dot_product_attention on each sequence of the packed batch"
    )
    checkpoint_activations: bool = Field(
        False, description="recompute each layer in the backward instead of keeping its activations"
    )
    offload: bool = Field(False, description="keep sharded weights and optimizer state in CPU memory")
    liger: bool = Field(False, description="liger-kernel's norm, rotary embedding and MLP kernels; GPU only")
    timeout: PositiveFloat = Field(1800.0, description="seconds after which a device that waits for the others gives up")


class Checkpoints(Section):
    every: int = Field(0, ge=0, description="steps between checkpoints; 0 = only at the end and on SIGTERM")
    keep: PositiveInt = Field(2, description="how many to keep, the newest")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto continues a run found in output_dir; never refuses such a folder"
    )
    export_dtype: ExportType = Field("auto", description="of the exported model; auto = as `model` is loaded by default")


class Telemetry(Section):
    episodes_every: PositiveInt = Field(20, description="steps between groups of episodes written as text")
    look_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="of a step's FLOPs, the most that looks at policies may take, by samples and by steps; 1 = unbounded"
    )
    look_tokens: PositiveInt | None = Field(
        None, description="the most of a look at both policies, per device; null = 4096, or the longest sequence"
    )
    lens_every: NonNegativeInt = Field(10, description="steps between looks at the policies of all layers; 0 = never")
    lens_tokens: PositiveInt = Field(256, description="the most of each such look, per device")
    tensorboard: bool | None = Field(None, description="null = if it is installed")
    wandb: str | None = Field(None, description="project on Weights & Biases; null = off")
    peak_tflops: PositiveFloat | None = Field(None, description="of one device, for MFU; null = known GPUs only")


class TrainConfig(Section):
    model: str = Field(description="folder of a Hugging Face checkpoint, a GGUF file, or a model's name on the hub")
    architecture: Path | None = Field(None, description="a model's config.json, for --dry-run where the model is not at hand")
    output_dir: Path = Field(description="run folder: new, empty, or one to continue")
    data: Data
    bupo: Bupo | None = None
    oisd: Oisd | None = None
    policy: Literal["bupo", "grpo", "oisd"] = "bupo"
    steps: PositiveInt = 300
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    reward: Reward = Reward()
    rollout: Rollout = Rollout()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    evaluation: Evaluation = Evaluation()
    hardware: Hardware = Hardware()
    checkpoints: Checkpoints = Checkpoints()
    telemetry: Telemetry = Telemetry()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        def require(holds: bool, key: str, accepted: str) -> None:
            value = self
            for name in key.split("."):
                value = getattr(value, name)
            if not holds:
                raise ValueError(f"{key}: {value} given, accepted {accepted}")

        rollout, optimizer = self.rollout, self.optimizer
        if self.policy == "bupo":
            if self.bupo is None:
                raise ValueError("bupo: missing, accepted is a section with layer and internal_steps, or policy: grpo")
            require(self.bupo.internal_steps <= self.steps, "bupo.internal_steps", f"are 0 to {self.steps} (steps)")
            measurable = self.guards.perplexity is None or self.heldout != []
            require(measurable, "bupo.guards.perplexity", "is null without data.heldout")
        if self.policy == "oisd":
            if self.oisd is None:
                raise ValueError("oisd: missing, accepted is a section with layer, or policy: bupo or grpo")
            seen = self.oisd.attention_weight == 0 or self.hardware.attention == "eager"
            require(seen, "oisd.attention_weight", f"is 0.0 with hardware.attention: {self.hardware.attention}")
        objective = self.objective
        of_sequences = objective.ratio == "sequence" or objective.clip not in ("gmpo", "vespo")
        require(of_sequences, "objective.ratio", f"is sequence with objective.clip: {objective.clip}")
        of_all = objective.top_entropy_quantile == 1 or objective.clip != "gmpo"
        require(of_all, "objective.top_entropy_quantile", "is 1.0 with objective.clip: gmpo")
        require(self.data.train != [], "data.train", "is at least one")
        unpacked = rollout.engine != "vllm" or not self.model.lower().endswith(".gguf")
        require(unpacked, "rollout.engine", "are continuous and generate for a GGUF file")
        bounded = rollout.engine != "vllm" or rollout.top_k > 0 or (rollout.top_p == 1 and rollout.min_p == 0)
        require(bounded, "rollout.top_k", "with rollout.engine: vllm and a top_p or min_p are 1 and more, which bound its sets")
        require(
            rollout.prompts % optimizer.mini_batch == 0,
            "optimizer.mini_batch",
            f"are divisors of rollout.prompts ({rollout.prompts})",
        )
        require(
            rollout.samples >= 2 or self.objective.advantage == "reinforce++",
            "rollout.samples",
            "are 2 or more, or objective.advantage: reinforce++",
        )
        longest = self.data.max_prompt_tokens + rollout.max_new_tokens
        require(
            longest <= self.hardware.max_tokens_per_device,
            "hardware.max_tokens_per_device",
            f"is at least data.max_prompt_tokens + rollout.max_new_tokens ({longest})",
        )
        require(
            optimizer.upper_layers == 1 or optimizer.upper_from is not None,
            "optimizer.upper_layers",
            "is 1.0 without optimizer.upper_from",
        )
        require(optimizer.warmup_steps < self.steps, "optimizer.warmup_steps", f"are 0 to {self.steps - 1} (below steps)")
        require(
            max(self.evaluation.k, default=1) <= self.evaluation.samples,
            "evaluation.k",
            f"are up to evaluation.samples ({self.evaluation.samples})",
        )
        return self

    @property
    def guards(self) -> Guards:
        """The guards on phase 1; all are off without a section `bupo`."""
        return self.bupo.guards if self.bupo else Guards()

    @property
    def distillation(self) -> Oisd | None:
        """The section `oisd` with `policy: oisd`, None with another."""
        return self.oisd if self.policy == "oisd" else None

    @property
    def heldout(self) -> list[str]:
        """`data.heldout` as a list."""
        return [self.data.heldout] if isinstance(self.data.heldout, str) else self.data.heldout

    def with_absolute_paths(self) -> TrainConfig:
        """Return the configuration with absolute names of files and folders, so that it means the same in any folder."""

        def absolute(names: Any) -> Any:
            if isinstance(names, list):
                return [absolute(name) for name in names]
            return str(Path(names).absolute()) if Path(names).exists() else names  # a name on the hub stays

        data = {name: absolute(getattr(self.data, name)) for name in ("train", "heldout")}
        changes = {"model": absolute(self.model), "output_dir": self.output_dir.absolute()}
        changes["data"] = self.data.model_copy(update=data)
        if self.architecture is not None:
            changes["architecture"] = self.architecture.absolute()
        return self.model_copy(update=changes)

    @property
    def lengths(self) -> tuple[int, int]:
        """The greatest number of tokens of a prompt, and of a response."""
        return self.data.max_prompt_tokens, self.rollout.max_new_tokens

    @property
    def look_tokens(self) -> int:
        """The most tokens per device of a look at both policies: as configured, else some thousands, and the longest sequence."""
        return min(self.hardware.max_tokens_per_device, max(self.telemetry.look_tokens or 4096, sum(self.lengths)))


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read and check the configuration in ``path``, with ``key.path=value`` overrides, whose values are YAML.

    The configuration of a run folder means the folder it lies in, wherever that was moved to. The model and the files that it names
    are not looked at. Raises :class:`ConfigError`.
    """
    if not path.is_file():
        raise ConfigError(f"config: {path} is not a file, accepted is a YAML file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config: {path} holds a {type(tree).__name__}, accepted is a mapping of keys to values")
    if (path.parent / BASE).is_dir():
        tree["output_dir"] = str(path.absolute().parent)
    return parse_config(override(tree, overrides))


def parse_config(tree: dict[str, Any]) -> TrainConfig:
    """Check the configuration in ``tree``. Raises :class:`ConfigError`."""
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(error.errors()[0])) from None


def check_new_folder(path: Path, key: str) -> None:
    """Raise :class:`ConfigError` unless ``path`` is an empty folder, or can become one.

    What a process leaves that was killed before it had written anything whole (a lock, a file's first part) does not count.
    """
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ConfigError(f"{key}: {existing} is a file, accepted is a new or empty folder")
    if existing == path and any(entry.name != "lock" and entry.suffix != ".partial" for entry in path.iterdir()):
        raise ConfigError(f"{key}: {path} is not empty, accepted is a new or empty folder")


def dump_config(config: TrainConfig) -> str:
    """Return the configuration as YAML that :func:`load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def describe_config() -> str:
    """Return every key with its default and meaning, one a line, for ``--help``."""
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
        choices = " | ".join(get_args(field.annotation)) if get_origin(field.annotation) is Literal else ""
        lines.append(f"  {key:<28}{default:<29}{field.description or choices}".rstrip())
    return lines


def override(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Put ``key.path=value``, whose values are YAML, into ``tree`` and return it. Raises :class:`ConfigError`."""
    for given in overrides:
        key, equals, value = given.partition("=")
        if not equals or not key:
            raise ConfigError(f"override: {given!r} given, accepted is key.path=value")
        *parents, leaf = key.split(".")
        section = tree
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise ConfigError(f"{key}: {parent} is a single value, it has no keys below it")
        try:
            section[leaf] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{key}: {value!r} given, accepted is a YAML value") from None
    return tree


def _one_line(error: ErrorDetails) -> str:
    """Return a pydantic error as ``key.path: what was given, what is accepted``."""
    *parents, leaf = error["loc"] or ("",)
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{key}: missing, it has no default"
    if error["type"] == "extra_forbidden":
        fields = TrainConfig.model_fields
        for parent in parents:
            section = _section(fields[str(parent)].annotation)
            assert section is not None  # or it would have no keys to forbid
            fields = section.model_fields
        accepted = list(fields)
        near = difflib.get_close_matches(str(leaf), accepted, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{key}: unknown key, {hint}accepted are {', '.join(accepted)}"
    message = error["msg"].removeprefix("Input should be ")
    return f"{key}: {error['input']!r} given, accepted is {message}"


def _section(annotation: Any) -> type[Section] | None:
    """Return the section in ``Section`` or ``Section | None``; None for a plain value."""
    options = (annotation, *get_args(annotation))
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)
