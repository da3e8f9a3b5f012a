"""The scale and softcap of a model of transformers, between its last hidden state, its head and its logits, measured on its code.

Its forward runs once, eagerly, on as many ids as :data:`VALUES`, with stand-ins for the costly parts: each backbone in it hands
out a known hidden state, and the head hands out known logits. No weight is read, gathered or moved and no hook of a backbone or of
the head runs, so that models on the meta device, offloaded, sharded by FSDP2 or partitioned by ZeRO-3 are measured like any other.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits that the head is made to answer with, exact in every dtype: the first pair tells a scale, the last a cap, and all together
# whether there is more to it.
VALUES = tuple(sign * value for value in (2.0**-20, 0.5, 3.0, 16.0, 64.0, 2.0**15) for sign in (1, -1))


class Unmeasured(Exception):
    """The reason why the model's forward does not run this way."""


@dataclass(frozen=True)
class Readout:
    """The ``scale`` of the last hidden state before the head reads it (None where it is not only scaled), and the ``options`` of
    the ops, ``logit_scale`` and ``softcap``, that turn the head's logits into the model's."""

    scale: float | None
    options: dict[str, float]


@torch.no_grad()
def measure_readout(model: PreTrainedModel, head: nn.Module, linear: nn.Linear) -> Readout:
    """Return the :class:`Readout` of ``model``, whose output embedding is ``head``, which is ``linear`` or adapters around it.

    Raises:
        ValueError: the model's logits are no ``softcap(scale · logits)`` of its head's, with the difference that was measured.
        Unmeasured: the forward raises, does not call its head, or would run a sharded module.
    """
    states: list[Tensor] = []
    answers: list[Tensor] = []
    weight = linear.weight
    device = torch.device("cpu") if weight.is_meta else weight.device
    columns = getattr(weight, "ds_shape", weight.shape)[0]  # the shape that ZeRO-3 has partitioned
    values = torch.tensor(VALUES, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    config = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    width = getattr(config, "hidden_size", linear.in_features)
    hidden = torch.arange(len(VALUES) * width, dtype=values.dtype, device=device).sin().to(weight.dtype).view(1, -1, width)

    def answer(given: Tensor, *_: object, **__: object) -> Tensor:  # [..., D] -> [..., V]
        """Return known logits: each column goes through all values, and no two neighbours are alike in a row."""
        states.append(given)
        rows = torch.arange(given.shape[:-1].numel(), dtype=torch.int64, device=device)
        ids = torch.arange(columns, dtype=torch.int64, device=device)
        answers.append(values[(rows[:, None] + ids) % len(VALUES)])
        return answers[-1].clone().view(*given.shape[:-1], columns)  # models write into it

    ids = torch.zeros(1, len(VALUES), dtype=torch.int64, device=device)
    inputs = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    # The rest of the forward may draw random numbers; compiled parts of it would be compiled again for the stand-ins.
    with (
        _stand_ins(model, head, lambda *_, **__: _output(hidden), answer),
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
    """Return the ``logit_scale`` and ``softcap`` by which ``model`` has turned its head's ``answered`` into its ``logits``."""
    if logits.numel() != answered.numel():
        raise ValueError(
            f"model: {type(model).__name__} has {logits.shape[-1]} logits where its head has {answered.shape[-1]}, accepted are "
            "models with as many"
        )
    logits, rtol = logits.reshape(answered.shape), max(2e-6, 2 * torch.finfo(logits.dtype).eps)
    logits = logits.to(answered.dtype)

    def logit_for(value: float) -> float:
        return logits[answered == value].median().item()  # a few columns may be masked

    scale, softcap = logit_for(VALUES[0]) / VALUES[0], None
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    expected = scale * answered
    if not math.isclose(logit_for(VALUES[-2]), scale * VALUES[-2], rel_tol=rtol):
        softcap = abs(logit_for(VALUES[-2]))
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
    """Return the number by which ``hidden`` was multiplied to become ``state``, or None where no number does that."""
    if state.shape != hidden.shape:
        return None
    tolerance = 4 * torch.finfo(hidden.dtype).eps
    state, hidden = state.cpu().double(), hidden.cpu().double()
    scale = ((state * hidden).sum() / (hidden * hidden).sum()).item()
    if not torch.allclose(state, scale * hidden, rtol=tolerance, atol=0):
        return None
    return 1.0 if abs(scale - 1) < tolerance else scale


def _output(hidden: Tensor) -> Any:
    """Return an output of a backbone with ``hidden``, whose every other field is None."""
    from transformers.modeling_outputs import BaseModelOutput

    class Output(BaseModelOutput):
        def __getattr__(self, name: str) -> None:
            if name.startswith("_"):
                raise AttributeError(name)

    return Output(last_hidden_state=hidden)


@contextmanager
def _stand_ins(model: nn.Module, head: nn.Module, backbone: Callable, answer: Callable) -> Iterator[None]:
    """Let ``answer`` run for ``head``, and ``backbone`` for the models that ``model`` is made of, within the context."""
    from transformers import PreTrainedModel

    class StandIn(nn.Module):
        def __init__(self, real: nn.Module, forward: Callable):
            super().__init__()
            vars(self).update(real=real, forward=forward)

        def __getattr__(self, name: str) -> Any:
            value = getattr(vars(self)["real"], name)
            return StandIn(value, backbone) if isinstance(value, PreTrainedModel) else value

    def replace(parent: nn.Module, name: str, real: nn.Module, forward: Callable) -> None:
        parent._modules[name] = StandIn(real, forward)
        undo.callback(parent._modules.__setitem__, name, real)

    backbones = 0
    with ExitStack() as undo:
        for parent in [module for module in model.modules() if any(child is head for child in module._modules.values())]:
            for name, child in list(parent._modules.items()):
                if child is head:
                    replace(parent, name, head, answer)
        for parent in [module for module in model.modules() if isinstance(module, PreTrainedModel)]:
            for name, child in list(parent._modules.items()):
                holds_the_head = child is not None and any(isinstance(module, StandIn) for module in child.modules())
                if isinstance(child, PreTrainedModel) and not holds_the_head:
                    replace(parent, name, child, backbone)
                    backbones += 1
        if not backbones:
            raise Unmeasured("none of its children is a model of transformers")
        for name, module in model.named_modules():
            if name and type(module).__bases__[0].__name__ == "FSDPModule":  # to run it now would tell FSDP2 that it is a root
                raise Unmeasured(f"FSDP2 shards its {name}, which would run")
        yield
