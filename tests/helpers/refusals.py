"""How a refusal must read."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from isthmus.errors import IsthmusError


@contextmanager
def refuses(kind: type[IsthmusError], match: str) -> Iterator[None]:
    """The block raises exactly this kind of error, in one line that says `match`."""
    with pytest.raises(kind, match=match) as caught:
        yield
    assert caught.type is kind
    assert len(str(caught.value).splitlines()) == 1
