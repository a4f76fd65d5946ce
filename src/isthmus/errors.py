"""Every deliberate exception. A message is one line: what is wrong, where, and what to do about it."""


class IsthmusError(Exception):
    """Base of all deliberate errors; the command line prints its message and exits with code 2."""


class InputError(IsthmusError, ValueError):
    """An argument or option cannot be used as given."""


class SymmetryError(IsthmusError):
    """A symmetry does not fit the model, or a transform built from it changes the model's function."""


class TraceError(IsthmusError):
    """The model could not be captured as a graph."""


class TransformError(IsthmusError):
    """A transform does not fit its space, or cannot act exactly where it was asked to."""


class ModelError(IsthmusError):
    """A model or its state dict cannot be used: unknown name, other architecture, wrong shape, NaN weight."""


class DataError(IsthmusError):
    """A data set is missing, empty, of the wrong shape, or can be read only once."""


class CheckpointError(IsthmusError):
    """A file or run folder cannot be read or written safely."""
