"""``python -m bupo_kernels.selfcheck``: check every backend on every GPU (without one: on the CPU), and print a table.

Verdicts of a GPU go on record, where ``backend="auto"`` reads them. The exit code is 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch

from bupo_kernels.backends.base import Problem
from bupo_kernels.backends.triton_ import config, target_of
from bupo_kernels.dispatch import BACKENDS, default_memory_budget
from bupo_kernels.selfcheck import records
from bupo_kernels.selfcheck.card import Card
from bupo_kernels.selfcheck.decision import Variant, checked, only_records
from bupo_kernels.selfcheck.problems import check
from bupo_kernels.selfcheck.records import Verdict

DTYPES = ("bfloat16", "float16", "float32")
HEADER = f"{'device':<32} {'variant':<24} {'verdict':<8} {'worst error / bound':>19} {'seconds':>8}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bupo_kernels.selfcheck", description=__doc__.split(":", 1)[1].strip())
    parser.add_argument("--device", help="as in cuda:0; default: every GPU, or the CPU where there is none")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES, help="of the operands; default: all")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    parser.add_argument("--variant", type=Variant.named, help=argparse.SUPPRESS)  # these two: of the process of a self-check
    parser.add_argument("--expect", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        devices = devices_of(options.device)
    except ValueError as error:
        parser.error(str(error))
    if options.variant:
        print(json.dumps(_answer(options.variant, devices[0], options.expect)))
        return 0
    return check_devices(devices, options.dtype, as_json=options.json)


def check_devices(devices: Sequence[torch.device], dtypes: Sequence[str], *, as_json: bool) -> int:
    """Check every variant on ``devices``, print a line for each as it is found, and return 1 where one is wrong."""
    if not as_json:
        print(HEADER, flush=True)
    failed = 0
    for device in devices:
        card = Card.of(device)
        for variant, reason in _variants(device, dtypes):
            verdict = None
            if reason is None:
                try:
                    verdict = checked(variant, device, card) if device.type == "cuda" else check(variant, device)
                    failed += not verdict.passed
                except torch.OutOfMemoryError as error:
                    failed, reason = failed + 1, str(error).splitlines()[0]
            name = f"{device} {card.name}"
            if as_json:
                found = {"device": name, "variant": variant.name, "skipped": reason, "verdict": verdict and asdict(verdict)}
                print(json.dumps(found), flush=True)
            else:
                print(_line(name, variant.name, verdict, reason), flush=True)
    if not as_json and any(device.type == "cuda" for device in devices):
        print(f"on record in {records.folder() or 'the memory of this process: no folder can be written'}")
    return 1 if failed else 0


def devices_of(wanted: str | None) -> list[torch.device]:
    """Return the devices to check, for None every GPU or else the CPU. Raise ``ValueError`` where there is none by that name."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if wanted is None:
        return gpus or [torch.device("cpu")]
    there = {str(device): device for device in (*gpus, torch.device("cpu"))} | ({"cuda": gpus[0]} if gpus else {})
    if wanted not in there:
        raise ValueError(f"--device: {wanted!r} given, accepted are {', '.join(there)}")
    return [there[wanted]]


def _variants(device: torch.device, dtypes: Sequence[str]) -> Iterator[tuple[Variant, str | None]]:
    """Yield every variant, with the reason why it cannot run here, if there is one."""
    for backend, stands_for in BACKENDS.items():
        for dtype in dtypes:
            kinds = [{}, {"softcap": True}] if backend == "triton" else [{}]
            if backend == "triton" and device.type == "cuda" and _specialised(dtype, device):
                kinds.insert(0, {"specialised": True})
            for kind in kinds:
                variant = Variant(backend, dtype, **kind)
                problem = Problem(
                    *(1, 1, 1, 64, variant.torch_dtype, device),
                    grad_hidden=True,
                    grad_weight=True,
                    grad_bias=False,
                    softcap=variant.softcap,
                    memory_budget=default_memory_budget(device),
                )
                yield variant, stands_for(problem).why_not(problem, None)


def _specialised(dtype: str, device: torch.device) -> bool:
    with only_records():
        target = target_of(device)
    return config.specialises(config.STATISTICS, getattr(torch, dtype), target, softcap=False)


def _line(device: str, variant: str, verdict: Verdict | None, reason: str | None) -> str:
    if verdict is None:
        return f"{device:<32} {variant:<24} {'–':<8} {reason}"
    worst = "" if verdict.worst is None else f"{verdict.worst:.2f}"
    line = f"{device:<32} {variant:<24} {'right' if verdict.passed else 'WRONG':<8} {worst:>19} {verdict.seconds:>8.1f}"
    return line if verdict.passed else f"{line}  {verdict.reason}"


def _answer(variant: Variant, device: torch.device, expected: str | None) -> dict[str, object]:
    """Return the verdict as JSON for the process that asked; or "refused", where it is not this process that can find it."""
    try:
        torch.zeros(1, dtype=torch.float32, device=device)
    except RuntimeError as error:  # exclusive mode, a MIG slice that is taken, no memory left
        return {"refused": str(error).splitlines()[0]}
    if expected is not None and Card.of(device).key != expected:
        return {"refused": f"{device} is another card in a process of its own"}
    try:
        return asdict(check(variant, device))
    except torch.OutOfMemoryError as error:  # the process that asks may hold what is missing
        return {"refused": str(error).splitlines()[0]}


if __name__ == "__main__":
    sys.exit(main())
