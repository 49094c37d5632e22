"""Progress: a bar over products with the remaining time, on a terminal."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from normscope.linalg import ranks


def bar(total: int, label: str, progress: bool | None) -> Any:
    """Return a progress bar over products; a context manager with `update`.

    Args:
        total: number of products.
        label: what is computed.
        progress: True shows it, False hides it, None shows it on a terminal.

    Returns:
        The bar.
    """
    hidden = None if progress is None else not progress
    return tqdm(total=total, desc=label, unit="product", disable=True if ranks.rank() else hidden, leave=False)
