"""One progress bar for everything that can take a while; quiet where nobody watches."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")


def progress(items: Iterable[T], description: str, sized: Any = None) -> Iterator[T]:
    """The items, with a bar on standard error while they are worked on, if that is a terminal.

    Args:
        items: What to go through.
        description: What is being done, as a verb's -ing form.
        sized: Something whose length is the number of items, if the items themselves have none.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    sized = items if sized is None else sized
    total = len(sized) if hasattr(sized, "__len__") else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield from bar.track(items, description=description, total=total)
