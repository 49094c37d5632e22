"""The survey's analysis figures, regenerated: one short script each, its claims judged.

    python -m analyses list
    python -m analyses run SI-1 SI-11
    python -m analyses all --jobs 2
    python -m analyses all --fast

To add a figure, write `analyses/<chapter>/<id>_<words>.py` with the names that `analyses.script.Script` lists, and put
the module into the tuple of its chapter's `__init__`. `analyses/scale/si_11_learning_rate_correction.py` is an example.

- `setting(fast)` returns a frozen dataclass: sizes, rates, steps. A fast setting takes about two seconds a seed.
- `run(setting, seed)` computes and returns a tidy frame with the declared `COLUMNS`, what theory predicts included; it
  imports only the public face of normscope (`normscope`, `normscope.norms`, `.weights`, `.gradients`, `.applications`,
  `.workbench`). Models, data and trainers that several scripts share are plain functions of `normscope.workbench`;
  what one chapter shares is a module in its folder. Thin long curves: a frame is committed as CSV.
- `claims(frame)` judges, by the functions of `analyses.claim`; `frame` has all seeds. An expected value comes from the
  source, never from what was seen. A claim that fails stays, with its `reason`.
- `draw(frame, canvas)` only draws, with `analyses.style`: nothing is computed that the frame does not hold.

Results are cached by setting and code: editing a caption, a claim or the drawing computes nothing anew.
"""

from __future__ import annotations

from types import ModuleType
from typing import Final

from analyses import applications, conditioning, methods, representation, scale, schematics, stochasticity

# title of each chapter, and its scripts, in the order of the gallery
CHAPTERS: Final[dict[str, tuple[ModuleType, ...]]] = {
    "Schematics": schematics.SCRIPTS,
    "Scale invariance": scale.SCRIPTS,
    "Conditioning": conditioning.SCRIPTS,
    "Stochasticity": stochasticity.SCRIPTS,
    "Representation": representation.SCRIPTS,
    "Two methods looked at closely": methods.SCRIPTS,
    "Applications": applications.SCRIPTS,
}
SCRIPTS: Final[dict[str, ModuleType]] = {script.ID: script for scripts in CHAPTERS.values() for script in scripts}
