"""The page on reproducing the paper, and the configurations it names, are what their generator makes of the sources."""

from pathlib import Path

import pytest

from benchmarks import reproduce
from bupo.architecture import load_architecture
from bupo.config import load_config
from bupo.dry_run import describe
from bupo_kernels.backends.machine import named


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(reproduce.ROOT)


def test_page_and_variants_are_up_to_date():
    assert reproduce.outdated(reproduce.generate()) == []


@pytest.mark.parametrize("path", ["configs/qwen3-4b.yaml", "configs/paper/octothinker-8b.yaml", "configs/scripts/qwen3-8b.yaml"])
def test_the_costs_on_the_page_are_those_that_a_dry_run_prints(path):
    config = load_config(Path(path))
    text = describe(load_architecture(config), config, reproduce.DEVICES, gpu=named(reproduce.CARD))
    page = (reproduce.ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    *sizes, hours = next(line for line in page.splitlines() if line.startswith(f"| `{path}` ")).split("|")[2:-1]
    printed = next(line for line in text.splitlines() if line.startswith("peak")).split()[1:]
    assert [size.strip() for size in sizes] == printed
    assert f"at least {hours.strip()} hours" in text


@pytest.mark.parametrize("variant", reproduce.VARIANTS)
def test_a_variant_differs_in_what_it_says(variant):
    for name in reproduce.NAMES:
        config, base = load_config(Path(f"configs/{variant}/{name}.yaml")), load_config(Path(f"configs/{name}.yaml"))
        for item in reproduce.ITEMS:
            section, key = item.key.split(".")
            wanted, there = reproduce.value_of(getattr(item, variant), name)
            found, before = (getattr(getattr(tree, section), key) for tree in (config, base))
            assert found == (wanted if there else before), item.key
