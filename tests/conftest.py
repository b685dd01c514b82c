"""One thread a process, since the problems are small and tests run in parallel; and `quick`."""

from fnmatch import fnmatchcase

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with the marker `quick`, the variants it does not name are `slow`."""
    for item in items:
        variant = item.name.partition("[")[2].removesuffix("]")
        marker = item.get_closest_marker("quick")
        if marker and not any(fnmatchcase(variant, pattern) for pattern in marker.args):
            item.add_marker(pytest.mark.slow)
