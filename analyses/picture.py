"""Pictures in print quality that are small enough to be committed."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure as Canvas
from PIL import Image

DPI = 300


def save(canvas: Canvas, path: Path) -> None:
    """Write a PNG at 300 dpi with a palette of 256 colors, a third of the size of one in true color.

    Args:
        canvas: what to write.
        path: where.
    """
    buffer = BytesIO()
    canvas.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    picture = Image.open(buffer).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
    picture.save(path, optimize=True, dpi=(DPI, DPI))
