"""The campaign: random kills, mutated configs, corrupted files, odd numbers. `make campaign`; not part of `make test`.

Every trial draws from the `rng` of its own number, so that one that fails can be run again alone:
`pytest tests/campaign -m slow --campaign-seed 3 --campaign-count 1000`.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Callable[[int], Iterator[tuple[str, random.Random]]]:
    """``trials(n)``: as many trials as --campaign-count says, n unless given; of each its name and its numbers."""
    seed, count = (request.config.getoption(f"--campaign-{name}") for name in ("seed", "count"))

    def of(n: int) -> Iterator[tuple[str, random.Random]]:
        for i in range(n if count is None else count):
            name = f"{request.node.name}, seed {seed}, trial {i}"
            yield name, random.Random(name)

    return of
