"""Which KV heads a worker holds, and what most of them come to."""

import pytest

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("count", "workers", "copies", "firsts"),
    [
        (8, 1, 1, [0]),
        (4, 2, 1, [0, 4]),
        (1, 2, 1, [0, 1]),
        (1, 2, 2, [0, 0]),
        (1, 8, 4, [0, 0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_heads_are_numbered_as_the_layers(
    count: int, workers: int, copies: int, firsts: list[int]
) -> None:
    from vllm_kvcompress.engine.heads import HeldHeads

    held = [HeldHeads(count, workers, rank, copies) for rank in range(workers)]
    assert [heads.first for heads in held] == firsts
    total = firsts[-1] + count
    assert {heads.total for heads in held} == {total}
    shares = [*range(total)]
    most = max(sum(shares[first : first + count]) for first in firsts)
    assert {heads.most(shares) for heads in held} == {most}
