"""What every source of networks says of itself: a library, or a kind of file. A source is one file and one line."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Source:
    """A library or a kind of file that networks come from.

    Attributes:
        prefix: What a specification starts with, before the colon.
        example: How one of its networks is named, as texts and errors show it.
        build: The network of a specification, of the name in it, and of its arguments.
        is_path: Whether the name is a path.
        suffix: Names that end so need no prefix; "" if all do.
        takes_arguments: Whether `?key=value` may follow the name.
    """

    prefix: str
    example: str
    build: Callable[[str, str, Mapping[str, object]], nn.Module]
    is_path: bool = False
    suffix: str = ""
    takes_arguments: bool = False
