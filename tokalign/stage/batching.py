"""Batches of rows of about one length, for everything that runs a model over rows offline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches_by_length(lengths: Sequence[int], token_budget: int, copies: int = 1) -> Iterator[list[int]]:
    """Indices by falling length, so the first batch is the largest and memory trouble shows at once.

    Args:
        lengths: tokens of the longest row of each entry.
        token_budget: most rows × longest row in one batch; a longer entry is a batch of its own.
        copies: rows that one entry puts into a batch.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * copies * lengths[batch[0]] > token_budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
