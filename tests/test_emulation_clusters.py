"""Blocks that run together in the emulation: what they share arrives, and what they do wrong is said, in every order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.emulated

MISTAKES = """RIGHT NO_FIRST_BARRIER NO_LAST_BARRIER NO_WAIT_FOR_RELEASE RELEASED_TO_ITSELF RELEASED_BEFORE_READ ONE_LEFT_OUT
TWO_HALVES NO_SECOND_HALF BEYOND_THE_CLUSTER""".split()
ROUNDS = 3
ANOTHER = "race in shared memory: a thread of another block of the cluster"


def share(library: Any, mistake: str, cluster: int, seed: int) -> bool:
    """Each block of a cluster copies a row to all of them, in rounds; whether every block has had every row."""
    library.emulator.seed(seed)
    blocks = 2 * cluster
    x, y = torch.randn(ROUNDS, 32 * cluster), torch.full((blocks, ROUNDS, 32 * cluster), torch.nan)
    try:
        for tensor in (x, y):
            library.emulator.allow(tensor.data_ptr(), tensor.nbytes)
        library.checks.share(y.data_ptr(), x.data_ptr(), blocks, ROUNDS, cluster, MISTAKES.index(mistake))
    finally:
        library.emulator.forget()
    return bool((y == x).all())


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_what_is_shared_arrives(emulated_library: Any, cluster: int) -> None:
    assert all(share(emulated_library, "RIGHT", cluster, seed) for seed in range(4))


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (
            "NO_FIRST_BARRIER",
            rf"{ANOTHER} uses the mbarrier at offset \d+, which thread 0 has written|an mbarrier of block \d+ of the "
            "cluster is used that was not initialised",
        ),
        ("NO_LAST_BARRIER", "block number .* ends while thread .* arrives at its mbarriers|of the cluster has ended"),
        ("NO_WAIT_FOR_RELEASE", rf"{ANOTHER} has the copy engine write to offset \d+, which a copy of the copy engine"),
        ("RELEASED_TO_ITSELF", f"{ANOTHER} has the copy engine write to"),
        ("RELEASED_BEFORE_READ", rf"{ANOTHER} has the copy engine write to offset \d+, which thread \d+ reads"),
        ("ONE_LEFT_OUT", "deadlock in share, .* at mbarrier_wait"),
        ("TWO_HALVES", "cluster_arrive twice without cluster_wait"),
        ("NO_SECOND_HALF", f"{ANOTHER} uses the mbarrier at|not initialised|cluster_arrive twice"),
        ("BEYOND_THE_CLUSTER", "a multicast to the blocks 7 of a cluster of 2"),
    ],
)
def test_mistakes_are_reported(emulated_library: Any, mistake: str, words: str) -> None:
    for seed in range(5):
        with pytest.raises(RuntimeError, match=words):
            share(emulated_library, mistake, 2, seed)
    assert share(emulated_library, "RIGHT", 2, 0), "the library stays usable"


def test_clusters_that_a_gpu_would_refuse(emulated_library: Any) -> None:
    x = torch.zeros(4096)
    for blocks, cluster in ((3, 2), (16, 16)):
        with pytest.raises(RuntimeError, match=f"launch of share: clusters of {cluster} blocks, 1 to 8 that divide"):
            emulated_library.checks.share(x.data_ptr(), x.data_ptr(), blocks, 1, cluster, 0)


def test_a_multicast_is_one_read(emulated_library: Any) -> None:
    """Of L2, whatever the blocks that it goes to."""
    emulator = emulated_library.emulator
    emulator.count(True)
    try:
        for cluster in (1, 4):
            emulator.clear_launches()
            assert share(emulated_library, "RIGHT", cluster, 0)
            (launch,) = emulator.launches()
            each = ROUNDS * 32 * cluster * 4
            assert launch["cluster"] == cluster
            assert launch["counts"]["copied"] == 2 * each and launch["counts"]["read_distinct"] == each
            assert launch["counts"]["written"] == launch["counts"]["written_distinct"] == 2 * cluster * each
    finally:
        emulator.count(False)
