"""The straight way through a base model, learnt from watching one call of it.

Most base models call their pieces one after another and do nothing else to the states. What
transformers wraps around that costs as much as half a small block, which a decode step notices. A
model that was seen to do more is called as it is. Families are not known here.

Shapes: N = tokens of all rows, D = hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["Inputs", "Walk", "drawn_like", "learn_walk", "says_only"]

Inputs = Mapping[str, object]
"""Keyword arguments of the base model."""


class _From(Enum):
    """Where an argument of a piece comes from."""

    INPUT = auto()
    """The base model was given it, by this name."""
    RESULT = auto()
    """An earlier piece returned it: the number of that call."""
    CONSTANT = auto()
    """It is this value."""


_Source = tuple[_From, object]


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One call of a piece."""

    piece: nn.Module
    args: tuple[_Source, ...]
    options: tuple[tuple[str, _Source], ...]


class Walk:
    """Calls the pieces of a base model as the base model does."""

    def __init__(self, steps: Sequence[_Step]) -> None:
        """`learn_walk` makes one."""
        forms: dict[tuple[tuple[str, _Source], ...], int] = {}
        self._steps = [(step, forms.setdefault(step.options, len(forms))) for step in steps]
        self._num_forms = len(forms)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Last hidden states [1, N, D]."""
        results: list[object] = []
        # All blocks are usually given the same: that is put together once.
        built: list[dict[str, object] | None] = [None] * self._num_forms
        for step, form in self._steps:
            options = built[form]
            if options is None:
                options = {name: _value(s, inputs, results) for name, s in step.options}
                built[form] = options
            args = [_value(source, inputs, results) for source in step.args]
            results.append(step.piece(*args, **options))
        return cast(Tensor, results[-1])


def learn_walk(
    base: nn.Module, pieces: Sequence[nn.Module], make_inputs: Callable[[], Inputs]
) -> Walk | None:
    """Watch one call of a base model; None where it does more than call its pieces.

    Args:
        base: is called once, and its pieces once more for comparison.
        pieces: its children, with each of its blocks by itself.
        make_inputs: the same inputs each time, fit for another call; states as `drawn_like` gives
            them.
    """
    inputs = make_inputs()
    steps: list[_Step | None] = []
    results: list[object] = []

    def note(piece: nn.Module, args: Sequence[object], options: Inputs, result: object) -> None:
        steps.append(_step(piece, args, options, _Known(inputs, results)))
        results.append(result)

    with _watched(pieces, note):
        output: Tensor = base(**inputs).last_hidden_state
    known = [step for step in steps if step is not None]
    if len(known) < len(steps) or not results or results[-1] is not output:
        return None
    walk = Walk(known)
    # Whether states were changed in place is all that the sources cannot show.
    return walk if torch.equal(walk(make_inputs()), output) else None


def says_only(model: nn.Module, lm_head: nn.Module, normed_1ND: Tensor) -> bool:
    """Whether a causal LM returns what its LM head makes of normed states, no scale and no cap.

    Args:
        model: whose base model passes states on.
        lm_head: of the model.
        normed_1ND: [1, N, D] as `drawn_like` gives it.
    """
    seen: list[object] = []

    def note(piece: nn.Module, args: Sequence[object], options: Inputs, result: object) -> None:
        seen.append(result)

    with _watched([lm_head], note):
        logits: Tensor = model(inputs_embeds=normed_1ND, use_cache=False).logits
    # As in `learn_walk`, the second call shows what was changed in place.
    return len(seen) == 1 and seen[0] is logits and torch.equal(logits, lm_head(normed_1ND))


def drawn_like(inputs: Tensor) -> Tensor:
    """States to learn by: no peer has chosen them, and a scale or a shift would show. Ids as is."""
    if not inputs.is_floating_point():
        return inputs
    generator = torch.Generator().manual_seed(0)
    return torch.randn(inputs.shape, generator=generator).to(inputs)


@contextmanager
def _watched(pieces: Sequence[nn.Module], note: Callable[..., None]) -> Iterator[None]:
    with ExitStack() as hooks:
        for piece in pieces:
            hooks.enter_context(piece.register_forward_hook(note, with_kwargs=True))
        yield


@dataclass(frozen=True)
class _Known:
    """What may be handed to a piece."""

    inputs: Inputs
    results: Sequence[object]

    def source(self, value: object) -> _Source | None:
        """None where it was made on the way, or may be another one in the next call."""
        if value is None or isinstance(value, bool | str):
            return _From.CONSTANT, value
        for name, given in self.inputs.items():
            if value is given:
                return _From.INPUT, name
        for number, result in enumerate(self.results):
            if value is result:
                return _From.RESULT, number
        return None


def _step(piece: nn.Module, args: Sequence[object], options: Inputs, known: _Known) -> _Step | None:
    places = [known.source(value) for value in args]
    names = [(name, known.source(value)) for name, value in options.items()]
    found = [source for source in places if source is not None]
    named = [(name, source) for name, source in names if source is not None]
    if len(found) < len(places) or len(named) < len(names):
        return None
    return _Step(piece=piece, args=tuple(found), options=tuple(named))


def _value(source: _Source, inputs: Inputs, results: Sequence[object]) -> object:
    kind, what = source
    if kind is _From.RESULT:
        return results[cast(int, what)]
    return inputs[cast(str, what)] if kind is _From.INPUT else what
