"""The virtual cluster, started once for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster.lab import Lab, Unavailable, check


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A running Slurm of 32 nodes with 8 GPUs each; without one, tests are skipped, or with REQUIRE_CLUSTER=1 fail."""
    try:
        check()
    except Unavailable as error:
        if os.environ.get("REQUIRE_CLUSTER") == "1":
            pytest.fail(f"no virtual cluster: {error}")
        pytest.skip(f"no virtual cluster: {error}")
    with Lab(tmp_path_factory.mktemp("lab")) as cluster:
        yield cluster
