"""What the script of a figure has."""

from __future__ import annotations

from typing import Any, Protocol

import pandas as pd
from matplotlib.figure import Figure as Canvas

from analyses.claim import Claim


class Script(Protocol):
    """A module with these names: the script of one figure.

    Attributes:
        ID: chapter and number, as "SI-1".
        TITLE: title of the figure, without a full stop.
        SOURCES: keys of the bibliography: the works whose figure or claim this is.
        CAPTION: what is drawn, in which setting, and what to see.
        COLUMNS: columns of the frame that `run` returns.
    """

    @property
    def ID(self) -> str: ...  # noqa: D102

    @property
    def TITLE(self) -> str: ...  # noqa: D102

    @property
    def SOURCES(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def CAPTION(self) -> str: ...  # noqa: D102

    @property
    def COLUMNS(self) -> tuple[str, ...]: ...  # noqa: D102

    def setting(self, fast: bool) -> Any:
        """Return the setting, a frozen dataclass: smaller if `fast`, for tests."""

    def run(self, setting: Any, seed: int) -> pd.DataFrame:
        """Compute with one seed; torch's global seed is already set to it, and one thread is used."""

    def claims(self, frame: pd.DataFrame) -> tuple[Claim, ...]:
        """Judge the claims; the frames of all seeds are joined, with a first column `seed`."""

    def draw(self, frame: pd.DataFrame, canvas: Canvas) -> None:
        """Draw the same frame."""
