"""Numbers, names and sources as people read them."""

import numpy as np
import pytest

from normscope.core.table import printable
from normscope.report.text import number, source


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"),
        (0.0, "0"),
        (81234.5, "81,234"),
        (12345678.9, "1.235e7"),
        (1.5e-7, "1.5e-7"),
        (-3.0, "-3"),
        (10**12, "1,000,000,000,000"),
        (float("inf"), "∞"),
        (float("-inf"), "-∞"),
        (float("nan"), "NaN"),
        (np.float32(0.5), "0.5"),
        (np.int64(4096), "4,096"),
        (True, "True"),
        (None, "–"),
        ("text", "text"),
        (list(range(20)), "0, 1, 2, 3, 4, 5, 6, 7, … (20 in all)"),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize("text", ["a\nb", "a\x00", "a\x1b[0m", "a\u2028b", "a\u202eb", "a\ud800b", "a\u200bb"])
def test_what_is_invisible_is_written_out(text):
    assert printable(text).isprintable()
    assert printable(text).encode("utf-8").decode("unicode_escape") == text


def test_ordinary_names_stay_as_they_are():
    assert printable("blöcke.0.注意 <b>") == "blöcke.0.注意 <b>"


def test_a_source_is_a_work_or_its_own_text():
    assert source("chen2016") == (
        "Training Deep Nets with Sublinear Memory Cost (2016)",
        "https://arxiv.org/abs/1604.06174",
    )
    assert source("identity: 1 = 1") == ("identity: 1 = 1", "")
