"""Checkpoints in and out: files are data, checked against the architecture, written whole or not at all."""

from isthmus.checkpoint.fitting import check_state, load_module, load_weights
from isthmus.checkpoint.folders import new_folder
from isthmus.checkpoint.hashes import hash_file, hash_state
from isthmus.checkpoint.reading import convert_trusted, load_state, read_metadata
from isthmus.checkpoint.writing import save_state, write_text

__all__ = [
    "check_state",
    "convert_trusted",
    "hash_file",
    "hash_state",
    "load_module",
    "load_state",
    "load_weights",
    "new_folder",
    "read_metadata",
    "save_state",
    "write_text",
]
