"""The version of the code that a result depends on: a hash of every definition that computing it can reach."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
# what computes the numbers; the other names of a script judge and draw them
_ROOTS = ("setting", "run")
_ALL = "*"
# statements that bind nothing run whenever a module is loaded
_LOADED = ""
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class _Module:
    """The top level of a file: its statements by the name they bind, and where its imported names come from."""

    bound: dict[str, list[ast.stmt]]
    imported: dict[str, tuple[str, str]]


def code_version(script: Path) -> str:
    """Hash what the numbers of a script depend on.

    Args:
        script: path of the script.

    Returns:
        Sixteen hexadecimal digits. Captions, claims, drawing, docstrings, annotations and whatever `setting` and `run`
        cannot reach leave them as they are.
    """
    dumps = {dump for path, name in reached(script) for dump in _dumps(path, name)}
    return hashlib.sha256("\n".join(sorted(dumps)).encode()).hexdigest()[:16]


def reached(script: Path) -> set[tuple[Path, str]]:
    """Follow the names that a script's computation uses, through normscope and the chapters' own modules.

    Args:
        script: path of the script.

    Returns:
        Files and names of the definitions in them; a name of a class stands for all of it.
    """
    found: set[tuple[Path, str]] = set()
    waiting = [(script, name) for name in _ROOTS]
    while waiting:
        at = waiting.pop()
        if at not in found:
            found.add(at)
            waiting += [(at[0], _LOADED), *_uses(*at)]
    return found


@functools.cache
def _dumps(path: Path, name: str) -> tuple[str, ...]:
    return tuple(ast.dump(statement) for statement in _module(path).bound.get(name, ()))


@functools.cache
def _uses(path: Path, name: str) -> tuple[tuple[Path, str], ...]:
    """Return what the definition of a name uses, or what an imported name stands for."""
    module = _module(path)
    if name == _ALL:
        return tuple((path, every) for every in (*module.bound, *module.imported))
    if name in module.imported:
        return tuple(_resolved(*module.imported[name]))
    chains = [chain for statement in module.bound.get(name, ()) for chain in _chains(statement)]
    return tuple(at for chain in chains for at in _followed(path, chain))


def _chains(node: ast.AST) -> Iterator[list[str]]:
    """Yield names with their attributes, as ["norms", "build"]."""
    names: list[str] = []
    inner = node
    while isinstance(inner, ast.Attribute):
        names.insert(0, inner.attr)
        inner = inner.value
    if isinstance(inner, ast.Name):
        yield [inner.id, *names]
    else:
        for child in ast.iter_child_nodes(inner):
            yield from _chains(child)


def _followed(path: Path, chain: list[str]) -> Iterator[tuple[Path, str]]:
    """Yield the definition that a chain names: modules are passed through, a module by itself is all it has."""
    module, (first, *rest) = _module(path), chain
    if first in module.bound:
        yield path, first
        return
    dotted, name = module.imported.get(first, ("", ""))
    while name == _ALL and rest:
        name, *rest = rest
        if _file(f"{dotted}.{name}"):
            dotted, name = f"{dotted}.{name}", _ALL
    yield from _resolved(dotted, name)


def _resolved(dotted: str, name: str) -> Iterator[tuple[Path, str]]:
    path = _file(dotted)
    if path is not None:
        yield path, name


@functools.cache
def _module(path: Path) -> _Module:
    """Read a file, with imports under TYPE_CHECKING: the public face resolves these names when they are used."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    _Bare().visit(tree)
    module = _Module({}, {})
    for statement in tree.body:
        imports = [node for node in ast.walk(statement) if isinstance(node, ast.Import | ast.ImportFrom)]
        if imports and not isinstance(statement, (*_FUNCTION, ast.ClassDef)):
            module.imported.update(pair for node in imports for pair in _imports(node))
        else:
            for name in _names(statement):
                module.bound.setdefault(name, []).append(statement)
    return module


def _names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (*_FUNCTION, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    return [_LOADED]


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield each name that an import binds, with its module and its name there."""
    for alias in node.names:
        if isinstance(node, ast.Import):
            name = alias.name if alias.asname else alias.name.partition(".")[0]
            yield alias.asname or name, (name, _ALL)
        elif node.module:
            inner = f"{node.module}.{alias.name}"
            yield alias.asname or alias.name, (inner, _ALL) if _file(inner) else (node.module, alias.name)


@functools.cache
def _file(name: str) -> Path | None:
    """Return the file of a module of normscope or of a chapter, else None."""
    top, *rest = name.split(".")
    if top != "normscope" and not (top == "analyses" and len(rest) == 2):
        return None
    base = ROOT.joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


class _Bare(ast.NodeTransformer):
    """Take away docstrings and annotations, which compute nothing."""

    def visit(self, node: ast.AST) -> ast.AST:
        """Strip one node, after those in it."""
        self.generic_visit(node)
        if isinstance(node, (ast.Module, ast.ClassDef, *_FUNCTION)) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
        if isinstance(node, _FUNCTION):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        return node
