"""The command line: ``bupo train | evaluate | analyze | bench | export | demo | check | tune | env``."""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import logging
import os
import signal
import sys
import threading
import webbrowser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from bupo.config import ExportType, describe_config, load_config, override, parse_config
from bupo.errors import ConfigError
from bupo.packaged import MODELS, require_packaged

if TYPE_CHECKING:
    from bupo_kernels.backends.machine import Gpu


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit code.

    It is 0 when done, 1 where sides of a benchmark do not agree or the disk is full, 2 for bad input (one line on stderr, nothing
    written), 130 when interrupted, 143 when terminated.
    """
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    if left and (options.command != "train" or any(word.startswith("-") for word in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:  # argparse leaves positional arguments that stand behind an option
        options.overrides += left
    handlers = [signal.signal(signal.SIGTERM, _terminate)] if threading.current_thread() is threading.main_thread() else []
    try:
        return options.do(options)
    except ConfigError as error:
        return _refuse(options.command, error)
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        if int(os.environ.get("RANK", 0)) == 0:
            unfinished = "; what is in --out stays, and the same command goes on from there"
            if getattr(options, "out", None) is None:
                unfinished = "; nothing is kept without --out"
            endings = {"evaluate": unfinished, "analyze": unfinished}
            endings["train"] = "; the same command goes on from the newest checkpoint in the run folder"
            line = ("SIGTERM" if terminated else "interrupted") + endings.get(options.command, "")
            print(f"\nbupo {options.command}: {line}", file=sys.stderr)
        return 143 if terminated else 130
    except BaseException as error:  # for a full disk torch raises one that is no Exception
        if not _says_no_space(error):
            raise
        print(f"bupo {options.command}: the disk is full; what was written before is whole", file=sys.stderr)
        return 1
    finally:
        for handler in handlers:
            signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception, which ends a command as Ctrl-C does, where the command does not listen for it."""


def _terminate(*_) -> None:
    raise Terminated


def _refuse(command: str, error: ConfigError) -> int:
    """Print the line of an error, once under torchrun, where it is one rank's or the same on all; return the exit code."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from bupo.distributed import agree_on

        error = agree_on(error)
    if error.speaker in (None, int(os.environ.get("RANK", 0))):
        print(f"bupo {command}: {error}", file=sys.stderr)
    return 2


def _says_no_space(error: BaseException) -> bool:
    """Return whether an error comes of a full disk, which libraries turn into errors of their own."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bupo",
        description="Bottom-up Policy Optimization (arXiv 2512.19673): train a language model from its inner layers up.",
    )
    parser.add_argument("--version", action="version", version=f"bupo {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train as a YAML file says",
        description="Trains as CONFIG says: internal-policy steps first (policy: bupo), then GRPO on the model's own policy; "
        "or on that throughout (policy: grpo), while a layer learns from it (policy: oisd).",
        epilog="keys of CONFIG, with defaults:\n\n" + describe_config(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
    train.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="values that replace those of CONFIG, e.g. rollout.samples=16"
    )
    train.add_argument(
        "--dry-run", action="store_true", help="print memory per device and FLOPs per step from the model's config alone, and stop"
    )
    train.add_argument("--devices", type=int, default=1, metavar="N", help="how many the dry run is for (default 1)")
    train.add_argument("--gpu", metavar="NAME", help="H100, A100, ...: add the least time of the dry run on these cards")
    train.set_defaults(do=_train)

    evaluate = commands.add_parser(
        "evaluate",
        help="avg@k, pass@k and greedy accuracy of a model, by data source",
        description="Generates responses to the problems of the data files, greedily and sampled, grades them, and prints accuracy "
        "with bootstrap confidence intervals, per data source and overall. Runs under torchrun, too.",
    )
    evaluate.add_argument("model", metavar="MODEL", help="folder of a Hugging Face checkpoint, or a model's name on the hub")
    evaluate.add_argument("--data", nargs="+", required=True, metavar="FILE", help="as data.train of `bupo train`")
    evaluate.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="new folder for accuracy.json and responses.jsonl, or that of an unfinished evaluation",
    )
    evaluate.add_argument("--samples", type=int, default=16, help="responses per problem, for avg@ and pass@ (default 16)")
    evaluate.add_argument("--k", type=int, nargs="+", default=[1, 4, 16], help="of pass@k (default 1 4 16)")
    evaluate.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="key.path=value",
        help="keys of `bupo train` that apply: data.template, reward.function, rollout.max_new_tokens, hardware.precision, ...",
    )
    evaluate.set_defaults(do=_evaluate)

    analyze = commands.add_parser(
        "analyze",
        help="what every layer of a model would say: of a text in seconds, or entropy flow, ΔH and the boundary layer",
        description="Reads every layer of a model through its unembedding (the logit lens). With --prompt it reads a text as "
        "it stands and generates nothing: a table of what each layer would say next, and report.html. With --data "
        "or --responses it reads the model's own responses: entropy, ΔH, norms, similarities and divergences of "
        "the policies of all layers, attentions and FFNs, with 95 % intervals over responses, and which layer "
        "`bupo train` should train. One process; the same command goes on after an interruption.",
    )
    analyze.add_argument("model", metavar="MODEL", help="folder of a Hugging Face checkpoint, a GGUF file, or a name on the hub")
    what = analyze.add_argument_group("what it reads, one of").add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a text, read as it stands (of a long one the last 64 positions); give it several times for several texts. "
        "--set data.template=chat puts it into the model's chat template",
    )
    what.add_argument("--data", nargs="+", metavar="FILE", help="problems, as data.train of `bupo train`; answers are not needed")
    what.add_argument(
        "--responses",
        nargs="+",
        metavar="FILE",
        help="JSONL with prompt and response, as `bupo evaluate --out` writes it; greedy ones are left out",
    )
    how = analyze.add_argument_group("how")
    how.add_argument(
        "--norm",
        choices=("none", "final", "both"),
        help="what internal policies go through first: none is how the paper reads layers, final the model's final norm, both puts "
        "the two side by side (default: both with --prompt, final with translators, else none)",
    )
    how.add_argument(
        "--points",
        nargs="+",
        choices=("layer", "attention", "ffn"),
        help="read the residual stream after each layer, and the two modules with their inputs, for ΔH (default: layer with "
        "--prompt or translators, else all three; each module is two fifths of the work)",
    )
    how.add_argument(
        "--track",
        action="append",
        default=[],
        metavar="WORD",
        help="follow the rank of a word through the layers; may be given several times. It is the token of the word behind a space "
        "and, where that is one too, that of the word without",
    )
    how.add_argument("--against", metavar="MODEL", help="a second model of the same depth and tokenizer: what it does differently")
    tuned = how.add_mutually_exclusive_group()
    tuned.add_argument(
        "--translators",
        type=Path,
        metavar="FILE",
        help="read layers also through affine translators (the tuned lens, arXiv 2303.08112), beside the other readings",
    )
    tuned.add_argument(
        "--fit-translators",
        type=Path,
        metavar="FILE",
        help="fit them to what is read, print what the samples held out gain, put them into FILE, and use them",
    )
    how.add_argument("--fit-steps", type=int, metavar="N", help="of that fit (default 250, on a CPU 40)")
    how.add_argument("--suggest", action="store_true", help="print the YAML lines of the layer to train, and how sure that is")
    size = analyze.add_argument_group("how much; on a CPU defaults are smaller, and what it will take is said first")
    size.add_argument("--prompts", type=int, metavar="N", help="of --data, chosen by the seed (default 64, on a CPU 16)")
    size.add_argument("--samples", type=int, default=1, metavar="N", help="responses per prompt of --data (default 1)")
    size.add_argument("--examples", type=int, default=4, metavar="N", help="responses shown in report.html (default 4)")
    size.add_argument("--max-tokens", type=int, metavar="N", help="in a batch; bounds memory (default 2048, on a CPU 512)")
    size.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="key.path=value",
        help="keys of `bupo train` that apply: data.template, rollout.max_new_tokens (default 256, on a CPU 64), "
        "hardware.precision, seed, ...",
    )
    where = analyze.add_argument_group("where to")
    where.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="new folder, or that of an unfinished analysis; with --prompt by default runs/analysis-MODEL, numbered if taken",
    )
    where.add_argument("--open", action="store_true", help="show the report in a browser")
    analyze.set_defaults(do=_analyze)

    bench = commands.add_parser(
        "bench",
        help="a training step against the naive logit lens: tokens/s, memory, agreement",
        description="Times old log-probs and update of phase 1 and of phase 2 on random weights and tokens: the naive logit lens "
        "as the paper's released code has it (all layers, logits of both heads), the same with only the layers and the head that "
        "are optimised, and this library with and without leaving layers out. The sides take turns on one model and must agree in "
        "loss and gradients: else the exit code is 1. Several values of an option are measured in all combinations.",
    )
    bench.add_argument(
        "--model-config",
        type=Path,
        metavar="FILE",
        help="config.json of a Hugging Face model (default: Qwen3 of 24 layers, 512 wide, with 32,000 tokens; Qwen3-4B on a GPU)",
    )
    bench.add_argument(
        "--layer", type=int, nargs="+", metavar="N", help="of the internal policy, from 1 (default: a sixth of the depth)"
    )
    bench.add_argument("--tokens", type=int, nargs="+", metavar="N", help="of a step (default 1024, on a GPU 8192)")
    bench.add_argument("--context", type=int, nargs="+", metavar="N", help="of a sequence, half of it prompt (default 256, 2048)")
    bench.add_argument("--phase", type=int, nargs="+", choices=(1, 2), default=[1, 2], help="default both")
    sides = ("naive", "naive-truncated", "bupo-not-truncated", "bupo")
    bench.add_argument("--sides", nargs="+", choices=sides, default=list(sides), help="default all that the phase has")
    bench.add_argument("--rounds", type=int, default=5, metavar="N", help="timed turns of every side (default 5)")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    bench.add_argument("--precision", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    bench.add_argument(
        "--keep-activations",
        action="store_true",
        help="the default recomputes each layer in the backward, as the reference does",
    )
    bench.add_argument("--minutes", type=float, metavar="M", help="begin nothing after that; what is left out is listed")
    bench.add_argument("--out", type=Path, metavar="DIR", help="put the numbers into DIR/<device>.json, as its section `step`")
    bench.add_argument("--commit", help="of the code, where there is no git to ask")
    bench.set_defaults(do=_bench)

    export = commands.add_parser(
        "export",
        help="a checkpoint of a run, or a GGUF file, as a model for from_pretrained",
        description="Writes the weights of a run's checkpoint, on however many devices it was saved, or those of a GGUF file, as a "
        "Hugging Face checkpoint.",
    )
    export.add_argument(
        "run",
        metavar="RUN",
        help=f"folder of a run (its output_dir), a .gguf file, or an installed package's model: {', '.join(MODELS)}",
    )
    export.add_argument("output", type=Path, metavar="DIR", help="new folder")
    export.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    export.add_argument(
        "--dtype",
        choices=get_args(ExportType),
        help="of its weights (default: checkpoints.export_dtype of the run, else auto; float32 for a GGUF file)",
    )
    export.set_defaults(do=_export)

    demo = commands.add_parser(
        "demo",
        help="train a small model on this machine: a million parameters on sums, or a real language model",
        description="sums: builds a small Qwen3 and a character tokenizer, warms the model up on two-digit sums until about half "
        "of its samples are right, then runs `bupo train` on the reward of being right, and `bupo analyze`; some minutes. "
        "smollm2: takes SmolLM2-135M-Instruct from an installed package of the Python index, analyzes it, and trains it with BuPO "
        "and with GRPO to go on with arithmetic sequences; ten minutes on two cores; the same command with --output goes on.",
    )
    demo.add_argument("--model", choices=("sums", "smollm2"), default="sums", help="default sums")
    demo.add_argument(
        "--policy", choices=("bupo", "grpo"), help="bupo, or the GRPO baseline with the same budget (default: bupo; smollm2: both)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of the data split, the weights and the sampling (default 0)")
    demo.add_argument(
        "--output", type=Path, help="new folder (default runs/demo-POLICY-seedSEED or demo-MODEL-seedSEED, numbered if taken)"
    )
    demo.set_defaults(do=_demo)

    check = commands.add_parser(
        "check",
        help="whether the kernels are right on this machine's GPUs",
        description="Holds every backend against float64 on small problems, on every GPU (without one: on the CPU), and prints a "
        'table. Verdicts of a GPU go on record, where backend="auto" reads them; it checks by itself what has no record. The exit '
        "code is 1 where something is wrong.",
    )
    dtypes = ("bfloat16", "float16", "float32")
    check.add_argument("--device", help="as in cuda:0 (default: every GPU, or the CPU where there is none)")
    check.add_argument("--dtype", nargs="+", default=list(dtypes), choices=dtypes, help="of the operands (default all)")
    check.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    check.set_defaults(do=_check)

    tune = commands.add_parser(
        "tune",
        help="the fastest tiles of the Triton kernels on this machine's GPU",
        description="Times every tile that fits the GPU, in turns with the default and with what would run without Triton, and "
        "puts the winners on record, where later processes find them; and where Triton is the slower, that it is. Some minutes, "
        "most of them compiling. Nothing else should run on the GPU.",
    )
    tune.add_argument("--device", default="cuda:0", help="default cuda:0")
    tune.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=dtypes, help="of the operands (default bfloat16)")
    tune.add_argument("--width", type=int, nargs="+", default=[1024, 2560, 4096], metavar="D", help="default 1024 2560 4096")
    tune.add_argument("--vocab", type=int, default=151936, metavar="V", help="default 151936")
    tune.add_argument("--rows", type=int, default=8192, metavar="N", help="of a call (default 8192); winners are for any number")
    tune.add_argument("--rounds", type=int, default=7, metavar="N", help="timed turns of every tile (default 7)")
    tune.add_argument("--out", type=Path, metavar="DIR", help="put all timings into DIR/<device>-tune.json")
    tune.add_argument("--commit", help="of the code, where there is no git to ask")
    tune.add_argument("--forget", action="store_true", help="take what was tuned off the record, and measure nothing")
    tune.set_defaults(do=_tune)

    env = commands.add_parser(
        "env",
        help="versions, devices, what was built, and which backend runs what here",
        description="Prints versions, devices, what the native module was built for, and which backend each kind of call would use "
        "on this machine and why not the others. Nothing is computed.",
    )
    env.add_argument("--json", action="store_true", help="the same for a program to read")
    env.set_defaults(do=_env)
    return parser


def _version() -> str:
    try:
        return version("bupo-kernels")
    except PackageNotFoundError:  # it runs from a checkout on PYTHONPATH
        return "not installed"


def _train(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    if options.dry_run:
        from bupo.architecture import check_fits, load_architecture
        from bupo.dry_run import describe

        if options.devices < 1:
            raise ConfigError(f"--devices: {options.devices} given, accepted are 1 and more")
        check_fits(architecture := load_architecture(config), config)
        print(describe(architecture, config, options.devices, gpu=_gpu(options.gpu)))
        return 0
    if options.gpu is not None:
        raise ConfigError(f"--gpu: {options.gpu} given, accepted with --dry-run")
    _prepare_process()
    from bupo.trainer import train

    train(config)
    return 0


def _gpu(name: str | None) -> Gpu | None:
    """Return the GPU of a name of ``explain``. Raises :class:`ConfigError`."""
    from bupo_kernels.backends.machine import named

    try:
        return None if name is None else named(name)
    except ValueError as error:
        raise ConfigError(f"--gpu: {str(error).removeprefix('device: ')}") from None


def _evaluate(options: argparse.Namespace) -> int:
    tree = {
        "model": options.model,
        "output_dir": "unused",
        "policy": "grpo",
        "data": {"train": options.data, "heldout": options.data},
    }
    evaluation = {"evaluation": {"samples": options.samples, "k": options.k}}
    config = parse_config(override(tree | evaluation, options.set))
    _prepare_process()
    from bupo.commands import evaluate_command

    evaluate_command(config, options.out)
    return 0


def _analyze(options: argparse.Namespace) -> int:
    if options.out is None:
        if not options.prompt:
            raise ConfigError(
                "--out: not given, accepted with --data and --responses is a folder, where an unfinished analysis goes on"
            )
        options.out = _free_folder(Path("runs") / f"analysis-{Path(options.model).stem}")
    given = override({}, options.set)
    from bupo.analysis.defaults import device_defaults

    defaults = device_defaults(given)
    files = options.data or options.responses or ["unused"]
    tree = {
        "model": options.model,
        "output_dir": str(options.out),
        "policy": "grpo",
        "data": {"train": files, "heldout": files},
        "objective": {"advantage": "reinforce++"},  # the one that takes one sample per prompt; nothing is trained here
        "rollout": {"samples": options.samples, "max_new_tokens": defaults.max_new_tokens},
        "hardware": {"precision": defaults.precision},
    }
    config = parse_config(override(tree, options.set))
    _prepare_process()
    from bupo.analysis.command import Source, analyze_command

    if defaults.note:
        print(defaults.note)
    if options.fit_steps is not None and (options.fit_translators is None or options.fit_steps < 1):
        raise ConfigError(f"--fit-steps: {options.fit_steps} given, accepted are 1 and more, with --fit-translators")
    translators, fit_steps = options.fit_translators or options.translators, 0
    if options.fit_translators:
        fit_steps = options.fit_steps or defaults.fit_steps
    few = options.prompt or translators  # what reads the residual stream alone unless it is told otherwise
    norm = options.norm or ("both" if options.prompt else "final" if translators else "none")
    analyze_command(
        config,
        options.out,
        source=Source(bool(options.data), options.responses or (), options.prompt or ()),
        prompts=defaults.prompts if options.prompts is None else options.prompts,
        readings={"none": ("raw",), "final": ("normed",), "both": ("raw", "normed")}[norm],
        points=options.points or (("layer",) if few else ("layer", "attention", "ffn")),
        track=options.track,
        against=options.against,
        translators=translators,
        fit_steps=fit_steps,
        suggest_layer=options.suggest,
        examples=options.examples,
        max_tokens=defaults.max_tokens if options.max_tokens is None else options.max_tokens,
    )
    if options.open:
        webbrowser.open((options.out / "report.html").absolute().as_uri())
    return 0


def _bench(options: argparse.Namespace) -> int:
    _prepare_process()
    from bupo.bench import bench_command

    return bench_command(
        model_config=options.model_config,
        layers=options.layer,
        tokens=options.tokens,
        contexts=options.context,
        phases=options.phase,
        sides=options.sides,
        rounds=options.rounds,
        device=options.device,
        precision=options.precision,
        keep_activations=options.keep_activations,
        minutes=options.minutes,
        out=options.out,
        commit=options.commit,
    )


def _export(options: argparse.Namespace) -> int:
    _prepare_process()
    from bupo.commands import convert_command, export_command

    if options.run.lower().endswith(".gguf") or (options.run in MODELS and not Path(options.run).is_dir()):
        if options.step is not None:
            raise ConfigError(f"--step: {options.step} given, accepted with the folder of a run")
        convert_command(options.run, options.output, options.dtype)
        print(f"{options.run} is in {options.output}")
        return 0
    step = export_command(Path(options.run), options.output, options.step, options.dtype)
    print(f"step {step} is in {options.output}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    if not 0 <= options.seed < 2**32:
        raise ConfigError(f"--seed: {options.seed} given, accepted are 0 to 2^32 - 1")
    name = (options.policy or "bupo") if options.model == "sums" else options.model
    folder = options.output or _free_folder(Path("runs") / f"demo-{name}-seed{options.seed}")
    if options.model != "sums":
        from bupo.demo_llm import demo_llm

        require_packaged(options.model)
        print(f"\n{demo_llm(folder, options.model, [options.policy] if options.policy else ('bupo', 'grpo'), options.seed)}")
        return 0
    _prepare_process()
    from bupo.demo import demo

    before, after = demo(folder, name, options.seed)
    print(f"before  {before}\nafter   {after}")
    return 0


def _check(options: argparse.Namespace) -> int:
    from bupo_kernels.selfcheck.__main__ import check_devices, devices_of

    try:
        devices = devices_of(options.device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return check_devices(devices, options.dtype, as_json=options.json)


def _tune(options: argparse.Namespace) -> int:
    for name in ("width", "vocab", "rows", "rounds"):
        for number in [given] if isinstance(given := getattr(options, name), int) else given:
            if number < 1:
                raise ConfigError(f"--{name}: {number} given, accepted are 1 and more")
    import torch

    from bupo.tune import forget, tune_command
    from bupo_kernels.selfcheck.__main__ import devices_of

    try:
        (device,) = devices_of(options.device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if options.forget:
        forget(device)
        return 0
    return tune_command(
        device=device,
        dtypes=[getattr(torch, name) for name in options.dtype],
        widths=options.width,
        vocab=options.vocab,
        rows=options.rows,
        rounds=options.rounds,
        out=options.out,
        commit=options.commit,
    )


def _env(options: argparse.Namespace) -> int:
    from bupo.env import describe, environment

    found = environment()
    print(json.dumps(found, indent=2) if options.json else describe(found))
    return 0


def _free_folder(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}-{i}") for i in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], numbered) if not candidate.exists())


def _prepare_process() -> None:
    """Have rewards in the current folder found, as under python -m, and only the program's own progress bars and notices shown."""
    sys.path.insert(0, "")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # On a CPU it logs an error at every start where there is none; a real one is raised.
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
