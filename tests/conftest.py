"""Shapes in signatures are checked at every call during the tests; one thread, so that results are the same anywhere."""

from jaxtyping import install_import_hook

install_import_hook("isthmus", "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(1)
