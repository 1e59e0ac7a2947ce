"""How much there is of a run's data, in numbers: `data/stats.json`, which the report reads too."""

from __future__ import annotations

from typing import Any

import numpy as np

from recipe.data.documents import Documents
from recipe.data.pack import MicroBatches
from recipe.data.sources import Origin
from recipe.data.tokenise import Tally
from recipe.settings import Settings

BAR = 40  # characters


def statistics(
    documents: Documents,
    packed: MicroBatches,
    settings: Settings,
    train: np.ndarray,
    held: np.ndarray,
    tallies: list[Tally],
    origins: list[Origin],
) -> dict[str, Any]:
    """Of the training documents, each once, but for `epoch_tokens` and `fill`, which are of what an epoch takes."""
    lengths = documents.lengths()
    edges = _edges(settings.longest_row)
    counts, _ = np.histogram(lengths[train], [*edges[:-1], edges[-1] + 1])
    tokens = packed.tokens()
    return {
        "rows": len(train),
        "tokens": int(lengths[train].sum()),
        "in_loss": int(documents.learnt[train].sum(dtype=np.int64)),
        "held_out_rows": len(held),
        "held_out_tokens": int(lengths[held].sum()),
        "micro_batches": len(packed),
        "epoch_tokens": int(tokens.sum()),
        "fill": round(float(tokens.sum() / (len(packed) * settings.micro_batch_tokens)), 5),
        "lengths": {"edges": edges, "counts": counts.tolist()},
        "turns": sum(tally.turns for tally in tallies[: len(origins)]),
        "sources": _sources(documents, lengths, train, tallies, origins),
    }


def _edges(longest: int) -> list[int]:
    """0, 16, 32, 64 … up to data.max_length, or twice that for pairs."""
    edges = [0]
    while edges[-1] < longest:
        edges.append(min(longest, max(16, 2 * edges[-1])))
    return edges


def _sources(
    documents: Documents, lengths: np.ndarray, train: np.ndarray, tallies: list[Tally], origins: list[Origin]
) -> list[dict[str, Any]]:
    found, end, rows = [], 0, documents.rows[train]
    for origin, tally in zip(origins, tallies, strict=False):
        begin, end = end, end + tally.rows
        own = train[np.searchsorted(rows, begin) : np.searchsorted(rows, end)]
        found.append(
            {
                "path": origin.path,
                "weight": origin.weight,
                "rows": len(own),
                "tokens": int(lengths[own].sum()),
                "in_loss": int(documents.learnt[own].sum(dtype=np.int64)),
            }
        )
    return found


def render(stats: dict[str, Any]) -> str:
    """As `recipe data stats` prints it."""
    share = stats["in_loss"] / max(stats["tokens"], 1)
    lines = [
        f"{stats['rows']:,} rows, {stats['tokens']:,} tokens, {stats['in_loss']:,} in the loss ({share:.0%}); "
        f"{stats['held_out_rows']:,} rows held out ({stats['held_out_tokens']:,} tokens)",
        f"{stats['turns'] / max(stats['rows'] + stats['held_out_rows'], 1):.1f} messages a row; {stats['micro_batches']:,} micro-batches an "
        f"epoch, {stats['fill']:.1%} of their slots used",
        "",
        "tokens        rows",
    ]
    edges, counts = stats["lengths"]["edges"], stats["lengths"]["counts"]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * round(BAR * count / max(*counts, 1))
        lines.append(f"{low:>5} – {high:<6}{count:>10,}  {bar}".rstrip())
    if len(stats["sources"]) > 1:
        lines += ["", f"{'rows':>10}{'tokens':>14}{'in the loss':>14}{'weight':>8}  source"]
        for source in stats["sources"]:
            lines.append(
                f"{source['rows']:>10,}{source['tokens']:>14,}{source['in_loss']:>14,}{source['weight']:>8g}  {source['path']}"
            )
    return "\n".join(lines)
