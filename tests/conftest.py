import pytest
import torch
from hypothesis import settings

# Seeded and without time limits: the same examples on every machine, however slow.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
