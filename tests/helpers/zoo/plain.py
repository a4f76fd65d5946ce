"""Fully connected networks."""

from torch import nn

from helpers.zoo.net import Chain


class PlainMLP(Chain):
    spaces = (5, 4)

    def __init__(self):
        super().__init__(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


class EqualWidths(Chain):
    """Batch, inputs, hidden units and outputs all number two, so that no axis is told by its length."""

    sample_shape = (2,)
    spaces = (2, 2)

    def __init__(self):
        super().__init__(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


class WidthOne(Chain):
    """A single unit has nothing to be exchanged with."""

    spaces = (4,)

    def __init__(self):
        super().__init__(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2))


class NothingToMove(Chain):
    def __init__(self):
        super().__init__(nn.Linear(3, 2), nn.ReLU())


class DeepLinear(Chain):
    """No nonlinearity: every invertible map keeps the function."""

    spaces = (5, 4)
    larger = ("invertible", "invertible")

    def __init__(self):
        super().__init__(nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2))


class Dropout(Chain):
    spaces = (5,)

    def __init__(self):
        super().__init__(nn.Linear(3, 5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 2))
