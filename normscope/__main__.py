"""Run the command line as `python -m normscope`."""

from __future__ import annotations

import sys

from normscope.cli import main

sys.exit(main())
