"""Recurrent layers: every step ties the hidden units to the rows of all gates and to the columns that read them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import fx

from isthmus.tracing.blocks import pin
from isthmus.tracing.execute import Rule, Tracing, output_shapes
from isthmus.tracing.labels import Value, combine, concatenate, narrow, unsqueeze, with_rigid
from isthmus.tracing.rules.contraction import contract, with_bias
from isthmus.tracing.rules.pointwise import PERMUTATION_LEVEL, limit_value
from isthmus.tracing.units import UnitTable


def _recurrent(gates: int, states: int) -> Callable[[Tracing, fx.Node, SimpleNamespace], Any]:
    """The rule of layers with so many gates (rows of a weight, one block a gate) and so many states.

    Labels do not change from step to step, so one step says all that the others would say again.

    Source: Hochreiter and Schmidhuber, Long Short-Term Memory (1997); Cho et al. (2014) for the gated unit.
    """

    def rule(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Any:
        shapes = output_shapes(node)
        each = 4 if a.__dict__.get("has_biases") else 2
        directions = 2 if a.__dict__.get("bidirectional") else 1
        if not hasattr(a, "input") or a.train or not isinstance(shapes, list):
            return NotImplemented  # packed sequences, or dropout between layers
        if len(a.params) != each * directions * a.num_layers or len(a.input.shape) != 3:
            return NotImplemented  # projected hidden states have one more weight
        units = tracing.units
        time = 1 if a.batch_first else 0
        x: Value = pin(units, a.input, [time], "lies along the steps of a recurrent layer")
        starts = a.hx if isinstance(a.hx, list | tuple) else [a.hx]
        finals: list[Value] = []
        for layer in range(a.num_layers):
            found = []
            for direction in range(directions):
                place = layer * directions + direction
                start = [narrow(units, value, 0, place, 1) for value in starts]
                start = [Value(value.shape[1:], tuple(x[0] for x in value.layers)) for value in start]
                start = [unsqueeze(value, time) for value in start]
                weights = a.params[place * each : (place + 1) * each]
                found.append(_step(units, x, start, weights, gates))
            finals += found
            x = concatenate(units, found, -1) if directions > 1 else found[0]
        out = with_rigid(units, x, shapes[0], [time])
        last = [Value((*value.shape[:time], *value.shape[time + 1 :]), _drop(value, time)) for value in finals]
        last = [unsqueeze(value, 0) for value in last]
        final = concatenate(units, last, 0) if len(last) > 1 else last[0]
        return [out, *[final] * states]

    return rule


def _step(units: UnitTable, x: Value, start: list[Value], weights: list[Value], gates: int) -> Value:
    """The hidden state after a step, whose time axis has size 1."""
    bias = [*weights[2:], None, None][:2]
    size = weights[1].shape[1]
    arriving = with_bias(units, contract(units, unsqueeze(x, -2), weights[0], [-1]), bias[0])
    hidden = combine(units, [*_parts(units, arriving, gates, size), *start])
    limit_value(units, hidden, PERMUTATION_LEVEL)
    returning = with_bias(units, contract(units, unsqueeze(hidden, -2), weights[1], [-1]), bias[1])
    hidden = combine(units, [hidden, *_parts(units, combine(units, [arriving, returning]), gates, size)])
    limit_value(units, hidden, PERMUTATION_LEVEL)
    return hidden


def _parts(units: UnitTable, value: Value, gates: int, size: int) -> list[Value]:
    """A value cut into its gates."""
    return [narrow(units, value, len(value.shape) - 1, gate * size, size) for gate in range(gates)]


def _drop(value: Value, dim: int) -> tuple[Any, ...]:
    """A value's label arrays without a dimension of size 1."""
    return tuple(layer.take(0, axis=dim) for layer in value.layers)


RECURRENT: dict[str, Rule] = {
    "aten.lstm": _recurrent(gates=4, states=2),
    "aten.gru": _recurrent(gates=3, states=1),
    "aten.rnn_tanh": _recurrent(gates=1, states=1),
    "aten.rnn_relu": _recurrent(gates=1, states=1),
}
