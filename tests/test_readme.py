"""What the README prints works as printed."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.broad  # at the sizes that a reader sees, while tests of each function take small ones
def test_python_examples_run_as_printed(capsys):
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(block, namespace)
    assert "256 of 512 rows x 32000 columns x 512" in capsys.readouterr().out
    assert namespace["hidden"].grad.abs().sum() > 0
    assert namespace["policy"].logprobs.shape == (2, 32)
    assert namespace["seen"].pairwise_kl.shape == (3, 3, 2, 32)


def test_files_it_names_exist():
    root = Path(__file__).parent.parent
    for name in re.findall(r"`((?:bupo|bupo_kernels|benchmarks)/[\w/.]*)`|\((docs/[\w.]+)\)", README):
        assert (root / (name[0] or name[1])).exists(), name
