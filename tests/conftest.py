"""Shapes in signatures are checked at every call; one thread and fixed seeds give the same results anywhere."""

from jaxtyping import install_import_hook

install_import_hook("isthmus", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
