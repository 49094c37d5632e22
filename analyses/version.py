"""The version of the code that a result depends on: a hash of its script and of every file that the script imports."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
# what these define changes the picture or the verdict, never the numbers
_SHOWN = {"TITLE", "SOURCES", "CAPTION", "claims", "draw"}


def code_version(script: Path) -> str:
    """Hash what the numbers of a script depend on.

    Args:
        script: path of the script.

    Returns:
        Sixteen hexadecimal digits; editing a caption, a claim or the drawing leaves them as they are.
    """
    digest = hashlib.sha256(ast.dump(_computing(script)).encode())
    for path in sorted(_closure(script)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _computing(script: Path) -> ast.Module:
    tree = ast.parse(script.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body[1:] if not _names(node) & _SHOWN]
    return tree


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


def _closure(script: Path) -> set[Path]:
    """Follow the imports of normscope and of the chapters' own modules; the frame changes no number."""
    found: set[Path] = set()
    waiting = [*_imports(script)]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imports(path)
    return found - {script}


@functools.cache
def _imports(path: Path) -> tuple[Path, ...]:
    """Return the files that a file imports, those under TYPE_CHECKING too: the public face resolves them when used."""
    found: list[Path | None] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [_file(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [_file(f"{node.module}.{alias.name}") or _file(node.module) for alias in node.names]
    return tuple(path for path in found if path is not None)


def _file(name: str) -> Path | None:
    """Return the file of a module of normscope or of a chapter, else None."""
    top, *rest = name.split(".")
    if top != "normscope" and not (top == "analyses" and len(rest) == 2):
        return None
    base = ROOT.joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
