"""Which rows of a matrix a rank holds: torch.chunk's rule, which DTensor's Shard(0) follows."""

from __future__ import annotations


def rows_per_rank(rows: int, world: int) -> int:
    """Of all ranks but the last ones, which may hold fewer, or none."""
    return -(-rows // world)


def rows_of_rank(rows: int, world: int, rank: int) -> tuple[int, int]:
    """The first row, and the one behind the last."""
    size = rows_per_rank(rows, world)
    return min(rank * size, rows), min((rank + 1) * size, rows)
