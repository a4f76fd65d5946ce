"""Shapes in signatures are checked at every call; by default seeds, examples and the order of tests are fixed."""

import os
import random

from jaxtyping import install_import_hook

install_import_hook("isthmus", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# The suite runs one process a core, so one thread each; OMP_NUM_THREADS says otherwise. No test may depend on it.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)

# No verdict hangs on the clock. By default the same examples are drawn every time; `make random-tests` draws others.
settings.register_profile(
    "fixed", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("random", settings.get_profile("fixed"), derandomize=False)
settings.load_profile("fixed")


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the files and the tests of each in random order")


def pytest_collection_modifyitems(config, items):
    seed = config.getoption("--shuffle")
    if seed is not None:
        draw = random.Random(seed)
        places = {path: draw.random() for path in dict.fromkeys(item.path for item in items)}
        items.sort(key=lambda item: (places[item.path], draw.random()))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
