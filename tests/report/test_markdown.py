"""The Markdown twin."""

import re

import pytest

from normscope.report.layers import COLUMNS
from normscope.report.markdown import markdown
from tests.report.records import HOSTILE, Run, findings_of


@pytest.fixture(scope="module")
def record():
    return Run(12, 20).record()


def test_it_tells_the_findings_in_the_order_of_the_page(record):
    text = markdown(record, findings_of(record))
    words = re.findall(r"^## \S+ (\w+):", text, re.M)
    assert words == ["failure"] * 2 + ["warning"] * 6 + ["undecided"] * 2 + ["note"] * 3
    assert "- dead fraction: 0.56\n- layers: 6\n- threshold: 0.1 ([Dying ReLU" in text
    assert "(<https://arxiv.org/abs/1903.06733>)" in text
    assert "## Looked at, and fine\n\n- " in text
    assert "\n- No bounded activation is saturated. (`propagation.saturated-units`)\n" in text


def test_its_tables_are_regular(record):
    text = markdown(record, findings_of(record))
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1


def test_names_of_layers_are_literal_in_it():
    record = Run(12, 20).rename(*HOSTILE).record()
    text = markdown(record, findings_of(record))
    bare = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "CODE", re.sub(r"\\[\\`*_\[\]<>|~&$#]", "", text))
    bare = bare.replace("(<https://", "(")
    assert "<" not in bare
    assert "`<script>alert(1)</script>/output`" in text
    assert r"a\|b\`c\*\_d\_\&amp;\$e\$%{y}/output" in text
    assert all(
        len(re.findall(r"(?<!\\)\|", line)) == len(COLUMNS) + 2
        for line in text.splitlines()
        if line.startswith("| ") and "Conv2d" in line
    )
