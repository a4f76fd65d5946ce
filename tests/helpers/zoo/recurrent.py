"""Recurrent layers."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.zoo.net import Net


class LSTM(Net):
    sample_shape = (3, 2)
    spaces = (4, 5)

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(2, 4, batch_first=True)
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(F.relu(self.layer(self.rnn(x)[0])))


class LSTMDeepBothWays(LSTM):
    spaces = (4, 4, 4, 4, 5)

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(2, 4, num_layers=2, bidirectional=True)
        self.layer = nn.Linear(8, 5)


class LSTMLastState(LSTM):
    def forward(self, x):
        _, (hidden, cell) = self.rnn(x)
        return self.head(F.relu(self.layer(hidden[-1] + cell[-1])))


class LSTMStart(LSTM):
    """The first state is learned: its units move with the layer's."""

    def __init__(self):
        super().__init__()
        self.start = nn.ParameterList([nn.Parameter(torch.randn(1, 1, 4)) for _ in range(2)])

    def forward(self, x):
        start = tuple(value.expand(1, len(x), 4) for value in self.start)
        return self.head(F.relu(self.layer(self.rnn(x, start)[0])))


class LSTMProjected(LSTM):
    spaces = (5,)
    missed = 7
    why = "aten.lstm has no rule for projected hidden states"
    frozen_by = ("aten.lstm",)

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(2, 4, batch_first=True, proj_size=3)
        self.layer = nn.Linear(3, 5)


class GRU(LSTM):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(2, 4, batch_first=True, bias=False)


class RNN(LSTM):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(2, 4, nonlinearity="relu")


class LSTMCell(Net):
    """Written out: the four gates are quarters of one layer, and a unit stands in each."""

    sample_shape = (3, 2)
    spaces = (4,)

    def __init__(self):
        super().__init__()
        self.input, self.hidden, self.head = nn.Linear(2, 16), nn.Linear(4, 16, bias=False), nn.Linear(4, 2)

    def forward(self, x):
        h = c = torch.zeros(len(x), 4, dtype=x.dtype)
        for step in x.unbind(1):
            i, f, g, o = (self.input(step) + self.hidden(h)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)
