"""The tests under the numerics of other machines, on this one: ``make test-machines``.

CPUs differ in the order of their sums, in fused multiply-adds, and in how many threads share the work. Each pass tells torch,
oneDNN, MKL and this library's own kernels to act as on an older one. What this CPU lacks is left out, with a line.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

from bupo_kernels.backends.compiled import isas

DOCUMENT = Path(__file__).parent.parent / "docs" / "reliability.md"
TABLE = re.compile(r"(?<=<!-- machines -->\n).*?(?=<!-- /machines -->)", re.S)


def acting_as(isa: str, aten: str, onednn: str, mkl: str, threads: int) -> dict[str, str]:
    return {
        "BUPO_MAX_ISA": isa,
        "ATEN_CPU_CAPABILITY": aten,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_CBWR": mkl,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # there are fewer cores than threads
    }


PASSES = {
    "no vectors, one thread": acting_as("portable", "default", "SSE41", "COMPATIBLE", 1),
    "AVX2 (AMD Zen, Intel before 2017), two threads": acting_as("avx2", "avx2", "AVX2", "AVX2", 2),
    "AVX-512, three threads": acting_as("avx512", "avx512", "AVX512_CORE", "AVX512", 3),
    "AVX-512-BF16, one thread": acting_as("avx512_bf16", "avx512", "AVX512_CORE_BF16", "AVX512", 1),
    "AMX, two threads": acting_as("amx", "avx512", "DEFAULT", "AUTO", 2),
}


def run(name: str, variables: dict[str, str], seed: int, jobs: str, given: list[str]) -> tuple[str, int]:
    """Runs the suite once, in an order and with hashes of the seed; returns its row of the table, and how many tests failed."""
    report = Path(os.environ.get("TMPDIR", "/tmp"), f"machine-{seed}.xml")
    command = [sys.executable, "-m", "pytest", "-n", jobs, "--junitxml", report, "--random-order", f"--random-order-seed={seed}"]
    print(f"\n== {name}: {' '.join(f'{k}={v}' for k, v in variables.items())}, seed {seed}", flush=True)
    start = time.monotonic()
    subprocess.run([*command, *given], env={**os.environ, **variables, "PYTHONHASHSEED": str(seed)})
    (suite,) = ElementTree.parse(report).getroot()
    total, failed, skipped = (int(suite.get(count)) for count in ("tests", "failures", "skipped"))
    failed += int(suite.get("errors"))
    said = " ".join(f"`{key}={value}`" for key, value in variables.items() if key != "OMP_WAIT_POLICY")
    passed = f"{total - failed - skipped:,}"
    return f"| {name} | {said} | {passed} | {failed} | {(time.monotonic() - start) / 60:.1f} |", failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="passes whose name contains this")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**16), help="of test order and hashes")
    parser.add_argument("--jobs", default="2", help="processes of pytest-xdist")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.name}")
    parser.add_argument("given", nargs="*", help="for pytest, behind --: files, -k, --broad")
    options = parser.parse_args()
    failed, rows = 0, ["| as | | passed | failed | minutes |", "| --- | --- | ---: | ---: | ---: |"]
    for name, variables in PASSES.items():
        if variables["BUPO_MAX_ISA"] not in isas():
            print(f"== {name}: left out, this CPU or this build has no {variables['BUPO_MAX_ISA']}")
        elif options.only in name:
            row, of_pass = run(name, variables, options.seed, options.jobs, options.given)
            failed, rows = failed + of_pass, [*rows, row]
    table = "\n".join([*rows, "", f"Test order and hashes of seed {options.seed}, {options.jobs} processes.", ""])
    print(f"\n{table}")
    if options.write:
        DOCUMENT.write_text(TABLE.sub(lambda _: table, DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
