"""A ledger of what autograd keeps alive: forward operations in order, replayed backwards.

An operation is written down with what it reads, what it makes, what it saves for backward and
what it needs for a moment. From that the tape finds the bytes that are alive at every
operation, forward and backward, by the rules of torch's engine: a saved tensor dies when its
node has run, a gradient dies when its consumer has run, the sum of two gradients of one tensor
is a third (H100, torch 2.11: measured for linear layers and tied weights; taken to hold for all,
which no measured peak contradicts). The likely reason is that torch adds in place only to a
gradient that is no view (``csrc/autograd/input_buffer.cpp``), as a linear layer's is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes as a polynomial: per token, per attention score (token x token), and fixed."""

    token: float = 0.0
    score: float = 0.0
    fixed: float = 0.0

    def __add__(self, other: Size) -> Size:
        return Size(self.token + other.token, self.score + other.score, self.fixed + other.fixed)

    def __mul__(self, factor: float) -> Size:
        return Size(self.token * factor, self.score * factor, self.fixed * factor)

    def at(self, tokens: float, scores: float) -> float:
        """Return bytes for ``tokens`` tokens and ``scores`` token pairs."""
        return self.token * tokens + self.score * scores + self.fixed


NOTHING = Size()


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """Bytes beyond an operation's inputs and output."""

    saved: Size = NOTHING
    """Kept for backward, and nobody else's: a mask, a row statistic."""
    forward: Size = NOTHING
    """For the moment of its forward."""
    backward: Size = NOTHING
    """For the moment of its backward, besides the gradients it makes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """An operation's parameter: dequantised bytes while it runs, gradient elements after."""

    dequantized_bytes: float = 0.0
    gradient_elements: int = 0


NO_EXTRA, NO_WEIGHT = Extra(), Weight()

GradientKind = Literal["new", "shared", "saved"]
"""Whose storage the inputs' gradients take: their own, the output gradient's, or that of the
tensors that the operation saved (a kernel that writes them in place)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One instant: what this layer has saved, what passes through, and weight gradients.

    ``new_gradient_elements`` is the parameter gradient that the instant produces,
    ``last_gradient_elements`` the one before it in the same layer (0 if none), and
    ``earlier_gradient_elements`` all those before it in the same layer.
    """

    name: str
    saved: Size
    passing: Size
    weight_bytes: float = 0.0
    """A dequantised weight that exists at this instant only."""
    new_gradient_elements: int = 0
    last_gradient_elements: int = 0
    earlier_gradient_elements: int = 0
    is_parameter_done: bool = False
    """The instant after the gradient hook's operation: its inputs are already freed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operation:
    name: str
    reads: tuple[int, ...]
    makes: int | None
    saves: tuple[int, ...]
    extra: Extra
    weight: Weight
    gradient: GradientKind


# Tensor -> (owner of the gradient's storage, its bytes); operations own _OWNERS numbers each.
_Pending = dict[int, tuple[int, Size]]
_OWNERS = 100


class Tape:
    """Forward operations of one piece of a model, in program order."""

    def __init__(self) -> None:
        self._sizes: list[Size] = []
        self._gradients: list[Size] = []
        self._is_outside: list[bool] = []
        self._made_at: list[int] = []
        self._last_use: list[int] = []
        self._saved_at: list[int | None] = []
        self._operations: list[_Operation] = []
        self._prefixes: list[Size] = []

    def value(self, size: Size, *, gradient: Size | None = None, is_outside: bool = False) -> int:
        """Name a tensor; one from outside is counted only if an operation saves it.

        ``gradient`` is given for views, which own no bytes but get a gradient of their own.
        """
        self._sizes.append(size)
        self._gradients.append(size if gradient is None else gradient)
        self._is_outside.append(is_outside)
        self._made_at.append(len(self._operations) if not is_outside else -1)
        self._last_use.append(len(self._operations))
        self._saved_at.append(None)
        return len(self._sizes) - 1

    def size(self, value: int) -> Size:
        """Return a tensor's bytes."""
        return self._sizes[value]

    def hold(self, values: Iterable[int]) -> None:
        """Say that Python variables still name ``values`` at the latest operation."""
        for value in values:
            self._last_use[value] = max(self._last_use[value], len(self._operations) - 1)

    def record(
        self,
        name: str,
        reads: tuple[int, ...],
        makes: Size | None = None,
        *,
        saves: tuple[int, ...] = (),
        saves_output: bool = False,
        extra: Extra = NO_EXTRA,
        weight: Weight = NO_WEIGHT,
        gradient: Size | GradientKind = "new",
    ) -> int:
        """Write down one operation and return its output tensor.

        Args:
            name: what to call its moments.
            reads: inputs that need a gradient.
            makes: bytes of the output; ``None`` makes none.
            saves: tensors kept for backward.
            saves_output: the output is kept too.
            extra: other bytes, kept or passing.
            weight: the parameter at work.
            gradient: bytes of the output's gradient where the output is a view; or where the
                inputs' gradients are: ``shared`` is the output's own (addition, views).
        """
        index = len(self._operations)
        own = gradient if isinstance(gradient, Size) else None
        output = self.value(makes, gradient=own) if makes is not None else None
        kept = (*saves, output) if saves_output and output is not None else saves
        self._operations.append(
            _Operation(
                name=name,
                reads=reads,
                makes=output,
                saves=kept,
                extra=extra,
                weight=weight,
                gradient="new" if isinstance(gradient, Size) else gradient,
            )
        )
        for value in (*reads, *saves, *(() if output is None else (output,))):
            self._last_use[value] = index
        for value in kept:
            if self._saved_at[value] is None:
                self._saved_at[value] = index
        return output if output is not None else -1

    def _saved(self, upto: int) -> Size:
        """Return what the first ``upto`` operations keep."""
        return self._saved_prefixes()[upto]

    def _saved_prefixes(self) -> list[Size]:
        if len(self._prefixes) != len(self._operations) + 1:
            self._prefixes = [NOTHING]
            for index, operation in enumerate(self._operations):
                total = self._prefixes[-1] + operation.extra.saved
                for value in set(operation.saves):
                    if self._saved_at[value] == index:
                        total = total + self._sizes[value]
                self._prefixes.append(total)
        return self._prefixes

    def saved(self) -> Size:
        """Return everything that is kept for backward after the whole forward."""
        return self._saved(len(self._operations))

    def is_saved(self, value: int) -> bool:
        """Return whether an operation keeps ``value`` for backward."""
        return self._saved_at[value] is not None

    def saved_by_prefix(self, name: tuple[str, ...]) -> Size:
        """Return what the leading operations whose names start with ``name`` keep."""
        count = 0
        while count < len(self._operations) and self._operations[count].name.startswith(name):
            count += 1
        return self._saved(count)

    def forward_moments(self, *, keeps_graph: bool = True) -> Iterator[Moment]:
        """Yield what is alive while each operation runs forward."""
        for index, operation in enumerate(self._operations):
            passing = operation.extra.forward
            for value, size in enumerate(self._sizes):
                if not self._made_at[value] <= index <= self._last_use[value]:
                    continue
                saved_at = self._saved_at[value]
                is_kept = keeps_graph and saved_at is not None and saved_at <= index
                if not is_kept and not self._is_outside[value]:
                    passing = passing + size
            yield Moment(
                name=operation.name,
                saved=self._saved(index + 1) if keeps_graph else NOTHING,
                passing=passing,
                weight_bytes=operation.weight.dequantized_bytes,
            )

    def backward_moments(self) -> Iterator[Moment]:
        """Yield what is alive while, and just after, each operation runs backward."""
        pending: _Pending = {}
        final = self._operations[-1].makes
        if final is not None:
            pending[final] = (-1, self._gradients[final])
        last = earlier = 0
        for index in range(len(self._operations) - 1, -1, -1):
            operation = self._operations[index]
            made = self._made_gradients(operation, pending, owner=index * _OWNERS)
            created = NOTHING if operation.gradient != "new" else _total(made.values())
            new = operation.weight.gradient_elements
            yield Moment(
                name=operation.name,
                saved=self._saved(index + 1),
                passing=_total(pending.values()) + created + operation.extra.backward,
                weight_bytes=operation.weight.dequantized_bytes,
                new_gradient_elements=new,
                last_gradient_elements=last,
                earlier_gradient_elements=earlier,
            )
            if operation.makes is not None:
                pending.pop(operation.makes, None)
            sums = list(_distribute(pending, made, owner=index * _OWNERS + len(made)))
            saved = self._saved(index)
            if new:
                yield Moment(
                    name=f"{operation.name} (gradient hook)",
                    saved=saved,
                    passing=_total(pending.values()),
                    new_gradient_elements=new,
                    last_gradient_elements=last,
                    earlier_gradient_elements=earlier,
                    is_parameter_done=True,
                )
                last, earlier = new, earlier + new
            for passing in sums:
                yield Moment(
                    name=f"{operation.name} (gradient sum)",
                    saved=saved,
                    passing=passing,
                    last_gradient_elements=last,
                    earlier_gradient_elements=earlier,
                )

    def _made_gradients(self, operation: _Operation, pending: _Pending, *, owner: int) -> _Pending:
        """Return the gradients of an operation's inputs and whose storage they take."""
        incoming = None if operation.makes is None else pending.get(operation.makes)
        if operation.gradient == "shared" and incoming is not None:
            return dict.fromkeys(operation.reads, incoming)
        return {
            value: (owner + place, self._gradients[value])
            for place, value in enumerate(operation.reads)
        }


def _distribute(pending: _Pending, made: _Pending, *, owner: int) -> Iterator[Size]:
    """Hand gradients to their tensors; yield what is alive in each sum, a tensor of its own."""
    rest = dict(made)
    for value, gradient in made.items():
        if value in pending:
            size = gradient[1]
            yield _total([*pending.values(), *rest.values()]) + size
            pending[value] = owner, size
            owner += 1
        else:
            pending[value] = gradient
        del rest[value]


def _total(gradients: Iterable[tuple[int, Size]]) -> Size:
    unique = dict(gradients)
    total = NOTHING
    for size in unique.values():
        total = total + size
    return total
