"""Data sets by name or file, their splits, and batches of any common form."""

from isthmus.data.batches import Batch, Data, check_data, read_batches
from isthmus.data.load import load_data
from isthmus.data.sets import Batches, DataSet, normalise
from isthmus.data.splits import split_for_models

__all__ = [
    "Batch",
    "Batches",
    "Data",
    "DataSet",
    "check_data",
    "load_data",
    "normalise",
    "read_batches",
    "split_for_models",
]
