"""The Python blocks of the README and of the guide run as they stand, and the page of findings is what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from normscope.cli.findings import page
from normscope.diagnostics.explanation import explanations

README = Path(__file__).parent.parent / "README.md"
PAGES = (README, *sorted((README.parent / "reports" / "guide").glob("*.md")))
BLOCKS = {
    f"{page.stem}-{i}": block
    for page in PAGES
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL))
}


def test_there_are_blocks():
    assert BLOCKS


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs(name, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(README.parent), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", BLOCKS[name]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr


def test_the_page_of_findings_is_what_is_explained():
    text = (README.parent / "reports" / "guide" / "findings.md").read_text()
    assert text == page(), "run: normscope findings --markdown > reports/guide/findings.md"
    assert re.findall(r"^### (.*)", text, flags=re.MULTILINE) == list(explanations())


def test_links_and_pictures_of_the_pages_exist():
    for file in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)|src=\"([^\":]+)\"", file.read_text()):
            assert (file.parent / "".join(target)).exists(), f"{file}: {target}"
