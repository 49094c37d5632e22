"""Who may import whom, and what must work without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import normscope

ROOT = Path(normscope.__file__).parent
HEAVY = {"torch", "numpy", "pandas", "scipy", "matplotlib", "plotly", "jinja2"}

# package -> packages of ours that it may import
_WAIST = {"core"}
_TORCH = {"core", "linalg"}
_LEFT = _TORCH | {"norms", "weights", "gradients", "probes"}
_RIGHT = {"core", "metrics", "diagnostics", "figures", "report"}
_VERBS = _LEFT | _RIGHT | {"applications", "scope"}
ALLOWED = {
    "core": set(),
    "linalg": _WAIST,
    "norms": _TORCH,
    "weights": _TORCH | {"norms"},
    "gradients": _TORCH | {"norms"},
    "probes": _LEFT - {"probes"},
    "metrics": _WAIST,
    "diagnostics": {"core", "metrics"},
    "figures": {"core", "metrics"},
    "report": _RIGHT - {"report"},
    "applications": _LEFT - {"probes"},
    "scope": _VERBS - {"scope"},
    "integrations": _VERBS,
    "workbench": _VERBS,
    "cli": _VERBS | {"workbench", "integrations"},
}
# packages that may use the lazy public face
FACE = ("scope", "integrations", "workbench", "cli")
# third-party packages that right of the waist may import
FOREIGN = {
    "core": {"numpy", "pandas"},
    "metrics": {"numpy", "pandas", "scipy"},
    "diagnostics": {"numpy", "pandas"},
    "figures": {"numpy", "pandas", "matplotlib"},
    "report": {"numpy", "pandas", "plotly", "jinja2"},
}


def modules():
    return [path for path in ROOT.rglob("*.py") if path.parent != ROOT]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_package_may(path):
    package = path.relative_to(ROOT).parts[0]
    assert package in ALLOWED, f"{package} is no package of the design"
    for name, _ in imported(path):
        assert not name.startswith("."), f"relative import of {name}"
        parts = name.split(".")
        if parts[0] == "normscope":
            assert len(parts) > 1 or package in ("scope", "cli", "workbench", "integrations"), (
                "the public face is for users"
            )
            assert len(parts) == 1 or parts[1] in ALLOWED[package] | {package}, f"{package} imports {name}"
        elif package in FOREIGN and parts[0] not in sys.stdlib_module_names:
            assert parts[0] in FOREIGN[package], f"{package} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_our_own_imports_stand_at_the_top(path):
    tree = ast.parse(path.read_text())
    inner = [
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = [alias.name for node in inner if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in inner if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.split(".")[0] == "normscope"]


# what a figure's script may import of ours: the public face, a chapter's own modules, and the frame's words
SCRIPT = ("normscope", "normscope.applications", "normscope.gradients", "normscope.norms", "normscope.weights")
SCRIPT += ("normscope.workbench", "analyses", "analyses.claim", "analyses.style")


@pytest.mark.parametrize("path", sorted((ROOT.parent / "analyses").glob("*/*.py")), ids=lambda path: path.stem)
def test_a_figure_imports_the_public_face_alone(path):
    for name, node in imported(path):
        if name.split(".")[0] in ("normscope", "analyses"):
            assert name in SCRIPT or name.startswith(f"analyses.{path.parent.name}"), f"{path.name} imports {name}"
        if name in SCRIPT and isinstance(node, ast.ImportFrom):
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]


def test_only_hooks_registers_hooks():
    names = ("register_forward", "register_full_backward", "register_hook", "register_step", "register_backward")
    users = [p.relative_to(ROOT).as_posix() for p in modules() if any(f".{name}" in p.read_text() for name in names)]
    assert users == ["probes/hooks.py"]


def test_the_public_face_resolves_every_name():
    assert sorted([*normscope._NAMES, *normscope._PACKAGES]) == sorted(normscope.__all__)
    for name in normscope.__all__:
        assert getattr(normscope, name) is not None


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        getattr(normscope, "atach")  # noqa: B009  # an attribute on its own line reads as a mistake


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_training_loads_no_pandas():
    found = run(
        "import sys, normscope\nnormscope.attach\nprint(sorted(set(sys.modules) & {'pandas', 'scipy', 'plotly'}))"
    )
    assert found.stdout.splitlines()[-1] == "[]", found.stderr


def test_help_imports_nothing_heavy():
    found = run(
        "import sys\nfrom normscope.cli import main\n"
        "assert main(['--help']) == 0 and main(['--version']) == 0\n"
        f"print(sorted(set(sys.modules) & {HEAVY!r}))"
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "[]"


def test_right_of_the_record_needs_no_torch():
    found = run(
        "import sys, types, importlib, pkgutil\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch': raise ImportError('torch is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        "for package in ('core', 'metrics', 'diagnostics', 'figures', 'report'):\n"
        "    module = importlib.import_module('normscope.' + package)\n"
        "    for item in pkgutil.walk_packages(module.__path__, module.__name__ + '.'):\n"
        "        importlib.import_module(item.name)\n"
        "for name in ('report', 'catalog', 'figures', 'watch', 'findings'):\n"
        "    importlib.import_module('normscope.cli.' + name)\n"
    )
    assert found.returncode == 0, found.stderr
