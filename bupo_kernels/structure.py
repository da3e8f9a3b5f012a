"""Where a decoder of transformers holds what internal policies are made of: found by running it, and verified on it.

No family is known by its name. A model is run on a few tokens: the stack of layers is what it has as many of as it has layers, the
final norm is what turns the last layer's output into the last hidden state, and what a layer adds to the residual stream are the
outputs of two of its modules, with what stands behind them. Layers 1 to l alone must then give the model's own hidden states of l.
"""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bupo_kernels.integrations.readout import Unmeasured, measure_readout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("bupo_kernels")

TOKENS = 6  # of a run that looks at the structure
MODULES = ("layer", "attention", "ffn")
PLUMBING = ("torch", "transformers", "accelerate", "deepspeed", "peft")  # packages whose hooks a forward may need
PASSING = ("Norm", "Dropout")  # classes of modules that may stand behind attention or FFN, in front of the residual stream


class Term(NamedTuple):
    """One of the two terms that a layer adds to the residual stream: ``factor`` times the output of the last of its modules."""

    path: tuple[str, ...]  # names of children of the layer: attention or FFN, and what reads its output behind it
    factor: float
    replaceable: bool  # whether the first of them turns one tensor into another of its shape


@dataclass
class Structure:
    """The structure of a decoder, as far as it is known."""

    depth: int
    norm: str  # the final norm's name among the modules of the decoder
    packs: bool  # whether ``position_ids`` that restart keep sequences of one row apart
    verified: set[int] = field(default_factory=set)  # the layers l whose 1 to l alone were found to be right
    terms: dict[int, dict[str, Term]] = field(default_factory=dict)  # by layer and module


_KNOWN: WeakKeyDictionary[nn.Module, Structure] = WeakKeyDictionary()  # by decoder
_READOUTS: WeakKeyDictionary[nn.Module, dict[str, float]] = WeakKeyDictionary()  # by head


class Stack(nn.ModuleList):
    """A stack of layers of which only the first ``shown`` are iterated over; as a module it still holds them all."""

    shown: int

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(self._modules.values())[: self.shown])

    def __len__(self) -> int:
        return self.shown

    def __getitem__(self, place: int | slice) -> Any:
        layers = list(self)
        return nn.ModuleList(layers[place]) if isinstance(place, slice) else layers[place]


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """Return the decoder of a causal language model, without looking into it. Raises ValueError where there is none."""
    base = _base(model)
    if hasattr(base, "get_output_embeddings") and hasattr(base, "config"):
        named = base.get_decoder() if hasattr(base, "get_decoder") else None
        for decoder in (named, *base.children()):
            if decoder is not base and hasattr(decoder, "config") and decoder is not base.get_output_embeddings():
                return decoder
    raise ValueError(
        f"model: of type {_type(base)!r}, accepted are causal language models of transformers, a decoder and an unembedding"
    )


def stack_of(decoder: nn.Module) -> nn.ModuleList:
    """Return the stack of layers of ``decoder``. Raises ValueError where it has none, or more layers than it says."""
    depth = getattr(_text_config(decoder), "num_hidden_layers", None)
    lists, modules = [], [("", decoder)]
    for place, module in modules:  # grows: those that are nearest come first
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                if len(child._modules) == depth:
                    return child
                lists.append(f"{place}{name} of {len(child)}")
            modules.append((f"{place}{name}.", child))
    found = ", ".join(lists) or "none"
    raise ValueError(
        f"model: of type {_type(decoder)!r} with {depth} layers and the lists {found}, accepted is one stack of them all"
    )


@contextmanager
def truncated(layers: nn.ModuleList, depth: int) -> Iterator[None]:
    """Let ``layers`` be iterated over up to ``depth`` only within the context. Parameters and state dict stay whole."""
    kind = layers.__class__
    layers.__class__, layers.shown = Stack, depth  # type: ignore[assignment]
    try:
        yield
    finally:
        layers.__class__ = kind
        del layers.shown


@contextmanager
def with_structure(
    decoder: PreTrainedModel, layer: int, module: str, install: Callable[[Structure, ExitStack], None]
) -> Iterator[None]:
    """Have ``install`` put hooks on ``decoder`` for a policy, once its structure is known and verified; take them off in the end.

    It is verified at once, or, where the weights are sharded (FSDP2, ZeRO-3), at the beginning of the first forward: there they are
    gathered, and every rank is at the same place. Raises ValueError, also from that forward, where the structure is another.
    """
    with ExitStack() as undo:
        known = _known(decoder, layer, module)
        if known is None and _is_sharded(decoder):

            def begin(*_: object) -> None:
                hook.remove()
                install(_known(decoder, layer, module) or verify(decoder, layer, module), undo)

            hook = decoder.register_forward_pre_hook(begin)
            undo.callback(hook.remove)
        else:
            install(known or verify(decoder, layer, module), undo)
        yield


def _known(decoder: PreTrainedModel, layer: int, module: str) -> Structure | None:
    """Return what is known of ``decoder`` where that is enough for the policy."""
    found = _KNOWN.get(decoder)
    if found is None or found.depth != len(stack_of(decoder)) or layer not in found.verified:
        return None
    return found if module == "layer" or layer in found.terms else None


@torch.no_grad()
def verify(decoder: PreTrainedModel, layer: int, module: str) -> Structure:
    """Run ``decoder`` on a few tokens and return its structure, with what the policy of ``layer`` needs.

    It runs whole, up to ``layer``, and on two sequences in one row; in evaluation mode, on ids that are the same each time. Mode,
    attention and random numbers are as before when it returns, and hooks that only watch have seen nothing.

    Raises:
        ValueError: with what was measured, where layers 1 to ``layer`` alone do not give their hidden states, no module is the
            final norm, or (for attention and ffn) no two modules add up to what the layer adds.
    """
    layers = stack_of(decoder)
    block = layers[layer - 1]
    outside = {name: child for name, child in decoder.named_modules() if name and not _holds(layers, child)}
    inside = dict(block.named_children())
    with _undisturbed(decoder):
        ids = _some_ids(decoder)
        with _recorded(outside) as outer, _recorded(inside) as inner, _recorded(dict(enumerate(layers))) as blocks:
            whole = _run(decoder, ids, output_hidden_states=True)
        states, last = whole.hidden_states, whole.last_hidden_state
        raw = {number: call.value for number, call in blocks}
        if states is None or len(states) != len(layers) + 1 or set(raw) != set(range(len(layers))):
            count = 0 if states is None else len(states)
            raise _refusal(decoder, f"has {count} hidden states of {len(layers)} layers, of which {len(raw)} ran")
        norm = _final_norm(decoder, outer, raw[len(layers) - 1], last)
        with truncated(layers, layer), ExitStack() as undo:
            undo.callback(decoder.get_submodule(norm).register_forward_hook(lambda _, inputs, __: inputs[0]).remove)
            alone = _run(decoder, ids).last_hidden_state
        truth = states[layer] if layer < len(layers) else raw[layer - 1]
        if (off := _difference(alone, truth)) is not None:
            raise _refusal(decoder, f"whose layers 1 to {layer} alone differ by {off} from its output_hidden_states[{layer}]")
        found = _KNOWN.get(decoder)
        if found is None or (found.depth, found.norm) != (len(layers), norm):
            found = _KNOWN[decoder] = Structure(len(layers), norm, _packs(decoder, ids))
        if module != "layer":
            previous = next(call for number, call in blocks if number == layer - 1).given
            found.terms[layer] = _terms(decoder, block, layer, previous, inner, raw[layer - 1])
    found.verified.add(layer)
    return found


def readout_of(model: nn.Module, head: nn.Linear) -> dict[str, float]:
    """Return the scale and the softcap between the logits of ``head`` and those of ``model``, as options of the ops.

    They are measured once, on the model's own forward, with stand-ins for its layers and its head, and verified, where the weights
    are whole, on the logits of a few tokens. Where its forward does not run that way, a warning says so. Raises ValueError where
    the model does more to its logits.
    """
    if head in _READOUTS:
        return _READOUTS[head]
    base = _base(model)
    try:
        measured = measure_readout(base, head, head)
    except Unmeasured as reason:
        log.warning(
            "%s: what it does to its head's logits could not be measured (%s); should it cap or scale them, give softcap or "
            "logit_scale",
            *(type(base).__name__, reason),
        )
        _READOUTS[head] = {}
        return {}
    options = dict(measured.options)
    if measured.scale is None or (measured.scale != 1 and head.bias is not None):
        raise ValueError(
            f"model: of type {_type(base)!r} does more than scale its last hidden state before its head, accepted is a scale"
        )
    if measured.scale != 1:
        options["logit_scale"] = options.get("logit_scale", 1.0) * measured.scale
    if not _is_sharded(base) and not _is_meta(base):
        _check_readout(base, head, options)
    _READOUTS[head] = options
    return options


@torch.no_grad()
def _check_readout(base: PreTrainedModel, head: nn.Linear, options: dict[str, float]) -> None:
    """Raise ValueError unless log-softmax of what ``options`` make of the head's logits is that of the model's own."""
    decoder = decoder_of(base)
    with _undisturbed(base):
        ids = _some_ids(decoder)
        hidden = _run(decoder, ids).last_hidden_state
        logits = _run(base, ids).logits.double()
    ours = nn.functional.linear(hidden, head.weight, head.bias).double() * options.get("logit_scale", 1.0)
    if (cap := options.get("softcap")) is not None:
        ours = cap * torch.tanh(ours / cap)
    off = (ours.log_softmax(-1) - logits.log_softmax(-1)).abs().max().item() if ours.shape == logits.shape else float("inf")
    bound = 8 * torch.finfo(hidden.dtype).eps * (1 + ours.abs().max().item())
    if not off <= bound:
        raise ValueError(
            f"model: of type {_type(base)!r}, whose log-probs differ by {off:.3g} from those of its head (allowed is {bound:.3g}), "
            "accepted are models whose logits are softcap(logit_scale · h Wᵀ)"
        )


def check_packing(decoder: nn.Module, found: Structure, position_ids: Tensor) -> None:  # [B, S]
    """Raise ValueError where ``position_ids`` restart within a row, which does not keep its sequences apart in ``decoder``."""
    if not found.packs and bool((position_ids.diff(dim=-1) < 0).any()):
        raise ValueError(
            f"position_ids: restart within a row, accepted in a model of type {_type(decoder)!r} are rows of one sequence: "
            "the second would see the first"
        )


def accepts(decoder: nn.Module, name: str) -> bool:
    """Tell whether the forward of ``decoder`` has an argument of that name, and does not only let it pass."""
    return name in inspect.signature(decoder.forward).parameters


class _Call(NamedTuple):
    """One call of a module: what it was given and what it gave."""

    given: Tensor
    output: Tensor
    value: Tensor  # a copy of the output, into which the next module may write
    plain: bool  # whether it was given one tensor alone, and gave one alone, of the same shape


@contextmanager
def _recorded(modules: dict[Any, nn.Module]) -> Iterator[list[tuple[Any, _Call]]]:
    """Yield a list that fills with the calls of ``modules``, by their names, in order."""
    calls: list[tuple[Any, _Call]] = []

    def record(name: Any, arguments: tuple, named: dict, output: Any) -> None:
        given = arguments[0] if arguments else named.get("hidden_states", next(iter(named.values()), None))
        first = tensor_of(output)
        if isinstance(given, Tensor) and isinstance(first, Tensor):
            alone = len(arguments) + len(named) == 1 and isinstance(output, Tensor) and given.shape == first.shape
            calls.append((name, _Call(given, first, first.clone(), alone)))

    with ExitStack() as undo:
        for name, module in modules.items():

            def hook(_: nn.Module, arguments: tuple, named: dict, output: Any, name: Any = name) -> None:
                record(name, arguments, named, output)

            undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield calls


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run ``model`` without dropout, with plain attention and unwatched within the context; after it everything is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}.values()
    attention = [(config, config._attn_implementation) for config in configs if hasattr(config, "_attn_implementation")]
    # Hooks of others see nothing, and those that transformers adds for its hidden states go again, with its note of them.
    hooks = [(module, name, getattr(module, name)) for module, _ in modes for name in ("_forward_hooks", "_forward_pre_hooks")]
    noted = [(module, set(vars(module))) for module, _ in modes if hasattr(module, "config")]
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            for module, name, found in hooks:
                setattr(module, name, OrderedDict((key, hook) for key, hook in found.items() if _is_plumbing(hook)))
            for module, _ in modes:
                module.training = False
            for config, _ in attention:
                config._attn_implementation = "eager"
            yield
        finally:
            for module, name, found in hooks:
                setattr(module, name, found)
            for module, names in noted:
                for name in set(vars(module)) - names:
                    delattr(module, name)
            for module, mode in modes:
                module.training = mode
            for config, implementation in attention:
                config._attn_implementation = implementation


def _is_plumbing(hook: Callable) -> bool:
    """Tell whether a forward needs ``hook``, which gathers weights or collects outputs; those of others only watch."""
    return (getattr(getattr(hook, "func", hook), "__module__", None) or "").partition(".")[0] in PLUMBING


def _some_ids(decoder: PreTrainedModel) -> Tensor:  # [1, TOKENS]
    """Return ids from all over the vocabulary, none of which is padding."""
    config = _text_config(decoder)
    vocab, padding = int(config.vocab_size), getattr(config, "pad_token_id", None)
    ids = [1 + i * (vocab - 2) // TOKENS for i in range(TOKENS)]
    device = next(decoder.parameters()).device
    if device.type == "meta":
        raise ValueError(
            f"model: of type {_type(decoder)!r} on the meta device, accepted is one with weights, on which it is verified"
        )
    return torch.tensor([[i + (i == padding) for i in ids]], dtype=torch.int64, device=device)


def _run(model: PreTrainedModel, ids: Tensor, **options: Any) -> Any:
    """Return what the forward of ``model`` gives, called without its own hooks: they may be running. Raises ValueError."""
    options |= {"use_cache": False, "return_dict": True}
    try:
        return model.forward(input_ids=ids, **{k: v for k, v in options.items() if v is not None})
    except Exception as error:
        raise _refusal(model, f"whose forward on {ids.shape[1]} tokens raises {type(error).__name__}: {error}") from error


def _final_norm(decoder: PreTrainedModel, calls: list[tuple[str, _Call]], raw: Tensor, last: Tensor) -> str:
    """Return the name of the module that turns the last layer's output into the last hidden state."""
    for name, call in calls:
        if call.given.shape == raw.shape and torch.equal(call.given, raw) and torch.equal(call.value, last):
            return name
    names = ", ".join(dict.fromkeys(name for name, _ in calls)) or "none"
    raise _refusal(decoder, f"in which no module turns the output of the last layer into the last hidden state (it calls {names})")


def _packs(decoder: PreTrainedModel, ids: Tensor) -> bool:
    """Tell whether a sequence is the same behind another in one row, with positions that restart, as it is alone."""
    if not accepts(decoder, "position_ids"):
        return False
    positions = torch.arange(TOKENS, dtype=torch.int64, device=ids.device).unsqueeze(0)
    alone = _run(decoder, ids, position_ids=positions).last_hidden_state
    both = _run(decoder, torch.cat([ids.flip(1), ids], 1), position_ids=positions.repeat(1, 2)).last_hidden_state
    # Of other shapes, whose sums are rounded otherwise; what leaks in from the other sequence is as large as the states.
    return _difference(both[:, TOKENS:], alone, min(1024 * torch.finfo(alone.dtype).eps, 0.1)) is None


def _terms(
    decoder: PreTrainedModel, block: nn.Module, layer: int, previous: Tensor, calls: list[tuple[str, _Call]], after: Tensor
) -> dict[str, Term]:
    """Return the terms of attention and FFN that make the residual stream of ``layer`` from the ``previous`` one."""
    own = [(name, call) for name, call in calls if not _passes(block, name) and call.output.numel() == previous.numel()]
    ran = ", ".join(f"{name} ({type(block.get_submodule(name)).__name__})" for name, _ in calls)
    if len(own) < 2:
        raise _refusal(decoder, f"in whose layer {layer} no two modules have outputs of the width of the residual stream: {ran}")
    mixer, feed_forward = own[0], own[-1]
    paths, outputs = [], []
    for name, call in (mixer, feed_forward):
        path, last = [name], call
        for other, behind in calls:
            if behind.given is last.output and _passes(block, other):
                path, last = [*path, other], behind
        paths.append(tuple(path))
        outputs.append(last.value.view_as(previous))
    factors = _factors(block, previous, outputs, after)
    if factors is None:
        off = (after - previous - sum(outputs)).abs().max().item()
        names = " and ".join(path[-1] for path in paths)
        raise _refusal(
            decoder, f"in whose layer {layer} the outputs of {names} miss what it adds to the residual stream by {off:.3g}: {ran}"
        )
    terms = {
        module: Term(path, factor, call.plain)
        for module, path, factor, call in zip(MODULES[1:], paths, factors, (mixer[1], feed_forward[1]), strict=True)
    }
    if "Attention" not in type(block.get_submodule(mixer[0])).__name__:
        del terms["attention"]
    return terms


def _factors(block: nn.Module, previous: Tensor, outputs: list[Tensor], after: Tensor) -> tuple[float, ...] | None:
    """Return the numbers by which ``outputs`` are multiplied in what takes the residual stream from ``previous`` to ``after``."""
    wide = [x.double() for x in (previous, *outputs, after)]
    allowed = 4 * torch.finfo(after.dtype).eps * (wide[0].abs() + wide[1].abs() + wide[2].abs())

    def fit(one: float, two: float) -> bool:
        return bool(((wide[0] + one * wide[1] + two * wide[2] - wide[3]).abs() <= allowed).all())

    if fit(1.0, 1.0):
        return 1.0, 1.0
    columns = torch.stack([x.flatten() for x in wide[1:3]], 1)
    solved = torch.linalg.lstsq(columns, (wide[3] - wide[0]).flatten().unsqueeze(1)).solution.flatten().tolist()
    # The module has the number itself, which is not rounded.
    held = [value for value in vars(block).values() if isinstance(value, float)] + [1.0]
    exact = tuple(min(held, key=lambda value: abs(value - factor)) for factor in solved)
    return exact if fit(*exact) else tuple(solved) if fit(*solved) else None


def _passes(block: nn.Module, name: str) -> bool:
    return any(part in type(block.get_submodule(name)).__name__ for part in PASSING)


def _difference(found: Tensor, truth: Tensor, allowed: float | None = None) -> str | None:
    """Return how far off ``found`` is, or None where that is rounding, or up to ``allowed`` of the largest value."""
    if found.shape != truth.shape:
        return f"shape ({tuple(found.shape)} for {tuple(truth.shape)})"
    off, largest = (found.double() - truth.double()).abs().max().item(), truth.abs().max().item()
    allowed = 16 * torch.finfo(truth.dtype).eps if allowed is None else allowed
    return None if off <= allowed * largest else f"{off:.3g} (of {largest:.3g})"


def _refusal(model: nn.Module, why: str) -> ValueError:
    return ValueError(f"model: of type {_type(model)!r}, {why}; accepted are decoders with a stack of layers, then a final norm")


def _holds(layers: nn.Module, module: nn.Module) -> bool:
    """Tell whether ``module`` is, or is in, or has in it the stack."""
    return any(part is layers for part in module.modules()) or any(part is module for part in layers.modules())


def _base(model: nn.Module) -> PreTrainedModel:
    """Return ``model`` without the wrappers of ``torch.compile`` and peft."""
    inner: Any = getattr(model, "_orig_mod", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _text_config(decoder: Any) -> Any:
    """Return the part of the config of ``decoder`` that is about text."""
    return decoder.config.get_text_config(decoder=True) if hasattr(decoder.config, "get_text_config") else decoder.config


def _type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def _is_sharded(model: nn.Module) -> bool:
    """Tell whether weights are gathered only while a forward runs."""
    return any(hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _is_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def tensor_of(output: Any) -> Any:
    """Return the hidden states in the output of a block, which releases of transformers give alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output
