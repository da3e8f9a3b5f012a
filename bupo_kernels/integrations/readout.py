"""What a model of transformers does between its last hidden state, its head and its logits, measured on its own code.

Its forward runs once, eagerly, on :data:`VALUES` ids with stand-ins for what costs: each backbone in it hands out a known hidden
state, and the head hands out known logits. No weight is read, gathered or moved and no hook of a backbone or of the head runs, so
that models on the meta device, offloaded, sharded by FSDP2 or partitioned by ZeRO-3 are measured like any other.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Logits that the head is made to answer with, exact in every dtype: the first pair tells a scale, the last a cap, and all together
# whether there is more to it.
VALUES = tuple(sign * value for value in (2.0**-20, 0.5, 3.0, 16.0, 64.0, 2.0**15) for sign in (1, -1))


class Unmeasured(Exception):
    """The model's forward does not run this way; says why."""


@dataclass(frozen=True)
class Readout:
    """``scale`` on the last hidden state before the head reads it (None: something else is made of it), and the ``options`` of the
    ops, ``logit_scale`` and ``softcap``, that turn the head's logits into the model's."""

    scale: float | None
    options: dict[str, float]


@torch.no_grad()
def measure_readout(model: nn.Module, head: nn.Module, linear: nn.Linear) -> Readout:
    """The :class:`Readout` of ``model``, whose output embedding is ``head``, which is ``linear`` or adapters around it.

    Raises:
        ValueError: the model's logits are no ``softcap(scale · ·)`` of its head's, with the difference that was measured.
        Unmeasured: the forward raises, does not call its head, or would run what it should not.
    """
    states, answers = [], []
    weight = linear.weight
    device = torch.device("cpu") if weight.is_meta else weight.device
    columns = getattr(weight, "ds_shape", weight.shape)[0]  # the shape that ZeRO-3 has partitioned
    values = torch.tensor(VALUES, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    config = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    width = getattr(config, "hidden_size", linear.in_features)
    hidden = torch.arange(len(VALUES) * width, dtype=values.dtype, device=device).sin().to(weight.dtype).view(1, -1, width)

    def instead_of_the_head(given: Tensor, *_, **__) -> Tensor:
        """[..., D] -> [..., V]; each column goes through all values, and no two neighbours are alike in a row."""
        states.append(given)
        rows = torch.arange(given.shape[:-1].numel(), dtype=torch.int64, device=device)
        ids = torch.arange(columns, dtype=torch.int64, device=device)
        answers.append(values[(rows[:, None] + ids) % len(VALUES)])
        return answers[-1].clone().view(*given.shape[:-1], columns)  # models write into it

    ids = torch.zeros(1, len(VALUES), dtype=torch.int64, device=device)
    inputs = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    # What runs between may draw random numbers; what is compiled would be compiled again for the stand-ins.
    with (
        _stand_ins(model, head, lambda *_, **__: _output(hidden), instead_of_the_head),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.compiler.set_stance("force_eager"),
    ):
        try:
            accepted = inspect.signature(model.forward).parameters
            output = model.forward(**{name: value for name, value in inputs.items() if name in accepted})
            logits = output[0] if isinstance(output, tuple) else output.logits
        except Exception as error:
            raise Unmeasured(f"its forward raises {type(error).__name__}: {error}") from error
    if not states:
        raise Unmeasured("its forward does not call its head")
    if len(answers[-1]) < len(VALUES):
        raise Unmeasured(f"its head is given {len(answers[-1])} rows of {len(VALUES)}")
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise Unmeasured("its logits are no floating-point tensor")
    return Readout(_scale_of(states[-1], hidden), _options(model, answers[-1], logits))


def _options(model: nn.Module, answered: Tensor, logits: Tensor) -> dict[str, float]:  # [n, V], [..., V]
    """``logit_scale`` and ``softcap`` of what ``model`` has made of ``answered``."""
    if logits.numel() != answered.numel():
        raise ValueError(
            f"model: {type(model).__name__} has {logits.shape[-1]} logits where its head has {answered.shape[-1]}, accepted are "
            "models with as many"
        )
    logits, rtol = logits.reshape(answered.shape), max(2e-6, 2 * torch.finfo(logits.dtype).eps)
    logits = logits.to(answered.dtype)

    def at(value: float) -> float:
        return logits[answered == value].median().item()  # a few columns may be masked

    scale, softcap = at(VALUES[0]) / VALUES[0], None
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    expected = scale * answered
    if not math.isclose(at(VALUES[-2]), scale * VALUES[-2], rel_tol=rtol):
        softcap = abs(at(VALUES[-2]))
        expected = softcap * torch.tanh(expected / softcap)
    fits = torch.isclose(logits, expected, rtol=rtol, atol=0)
    if fits.all():
        return ({} if scale == 1 else {"logit_scale": scale}) | ({} if softcap is None else {"softcap": softcap})
    ids = (~fits).any(0).nonzero().flatten().tolist()
    usual = answered.abs() <= 64  # how far off log-probs would be, at logits as models have them
    off = (logits - answered)[usual].abs().max().item()
    shown = f"ids {', '.join(map(str, ids[:5]))}{', …' if len(ids) > 5 else ''}"
    raise ValueError(
        f"model: {type(model).__name__} changes its head's logits by up to {off:.4g}, and {len(ids)} of {logits.shape[-1]} "
        f"({shown}) by more than a scale and a softcap, accepted is softcap(scale · logits); call linear_logprobs on the weight of "
        "its head, with a bias that does the same"
    )


def _scale_of(state: Tensor, hidden: Tensor) -> float | None:
    """By which number ``hidden`` was multiplied to become ``state``; None: by none."""
    if state.shape != hidden.shape:
        return None
    tolerance = 4 * torch.finfo(hidden.dtype).eps
    state, hidden = state.cpu().double(), hidden.cpu().double()
    scale = ((state * hidden).sum() / (hidden * hidden).sum()).item()
    if not torch.allclose(state, scale * hidden, rtol=tolerance, atol=0):
        return None
    return 1.0 if abs(scale - 1) < tolerance else scale


def _output(hidden: Tensor):
    """What backbones return, with ``hidden``; whatever else is asked for is None."""
    from transformers.modeling_outputs import BaseModelOutput

    class Output(BaseModelOutput):
        def __getattr__(self, name: str):
            if name.startswith("_"):
                raise AttributeError(name)

    return Output(last_hidden_state=hidden)


@contextmanager
def _stand_ins(model: nn.Module, head: nn.Module, backbone: Callable, answer: Callable) -> Iterator[None]:
    """Within the context ``head`` answers as ``answer`` does, and the models that ``model`` is made of as ``backbone`` does."""
    from transformers import PreTrainedModel

    class StandIn(nn.Module):
        def __init__(self, real: nn.Module, forward: Callable):
            super().__init__()
            vars(self).update(real=real, forward=forward)

        def __getattr__(self, name: str):
            value = getattr(vars(self)["real"], name)
            return StandIn(value, backbone) if isinstance(value, PreTrainedModel) else value

    def replace(parent: nn.Module, name: str, forward: Callable) -> None:
        real = parent._modules[name]
        parent._modules[name] = StandIn(real, forward)
        undo.callback(parent._modules.__setitem__, name, real)

    backbones = 0
    with ExitStack() as undo:
        for parent in [module for module in model.modules() if any(child is head for child in module._modules.values())]:
            for name, child in list(parent._modules.items()):
                if child is head:
                    replace(parent, name, answer)
        for parent in [module for module in model.modules() if isinstance(module, PreTrainedModel)]:
            for name, child in list(parent._modules.items()):
                holds_the_head = child is not None and any(isinstance(module, StandIn) for module in child.modules())
                if isinstance(child, PreTrainedModel) and not holds_the_head:
                    replace(parent, name, backbone)
                    backbones += 1
        if not backbones:
            raise Unmeasured("none of its children is a model of transformers")
        for name, module in model.named_modules():
            if name and type(module).__bases__[0].__name__ == "FSDPModule":  # to run it now would tell FSDP2 that it is a root
                raise Unmeasured(f"FSDP2 shards its {name}, which would run")
        yield
