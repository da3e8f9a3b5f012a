"""A call as it goes from the functions to the ops: its options by name, and what is neither tensor nor number as one string."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bupo_kernels import dispatch, linear_cross_entropy, linear_logprobs, linear_policy_loss, logit_lens
from bupo_kernels.engine import Settings
from bupo_kernels.policy_losses import PolicyObjective
from bupo_kernels.request import Request

FLAGS = st.tuples(st.booleans(), st.booleans(), st.booleans())
OBJECTIVES = (PolicyObjective(), PolicyObjective(clip="cispo", kl="k3", kl_coefficient=0.1))


@given(
    st.builds(
        Settings,
        ignore_index=st.integers(-(2**40), 2**40),
        with_entropy=st.booleans(),
        backend=st.sampled_from(dispatch.NAMES),
        memory_budget=st.integers(1, 2**50),
        planned=FLAGS,
        needed=FLAGS,
        objective=st.sampled_from(["", *(objective.encoded for objective in OBJECTIVES)]),
    )
)
def test_settings_come_back_from_their_string(settings):
    assert Settings.decode(settings.encode()) == settings


@pytest.mark.parametrize("function", [linear_logprobs, linear_cross_entropy, linear_policy_loss, logit_lens])
def test_an_option_that_is_not_there_is_named(function):
    hidden, weight, targets = torch.randn(2, 3, 8), torch.randn(20, 8), torch.randint(0, 20, (2, 3))
    more = (torch.ones(2, 3),) if function is linear_policy_loss else ()
    with pytest.raises(TypeError, match="temprature"):
        function(hidden, weight, targets, *more, temprature=0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", dispatch.BACKENDS)
def test_a_cache_of_no_rows_is_empty(name, dtype):
    targets = torch.zeros(4, dtype=torch.int64)
    request = Request.of(torch.randn(4, 64, dtype=dtype), torch.randn(300, 64, dtype=dtype), targets, backend="torch")
    problem = request.plan().problem
    cache = dispatch.BACKENDS[name](problem).empty_cache(problem, 0)
    assert cache.is_empty
    assert cache.values.numel() == cache.offsets.numel() == 0
    assert cache.values is not cache.offsets  # an op may not return one tensor twice
