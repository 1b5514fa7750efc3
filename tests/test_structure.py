"""Imports run one way: a wing imports from the wings before it, and a module from none that imports it."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import trl_lightreasoner


PACKAGE = Path(trl_lightreasoner.__file__).parent
# From the ground up. The modules at the top are the ground, apart from `__main__`, which is the program
WINGS = [
    "",
    "grading",
    "models",
    "steps",
    "generation",
    "sampling",
    "evaluation",
    "hub",
    "training",
    "report",
    "pipeline",
    "demo",
    "commands",
    "__main__",
]


def wing_of(module: str) -> str:
    name = module.split(".")[0]
    return name if name in WINGS else ""


def imports_of(path: Path, package: Path = PACKAGE) -> Iterator[tuple[int, str]]:
    """Line and name, below the package, of every module of it that a file imports; types aside."""
    here = ["trl_lightreasoner", *path.relative_to(package).parts[:-1]]
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "trl_lightreasoner":
                yield node.lineno, module_of(parts[1:], package)


def module_of(parts: list[str], package: Path) -> str:
    """The longest beginning of a dotted name that is a module or a wing; what follows is a name in it."""
    for length in range(len(parts), 0, -1):
        place = package.joinpath(*parts[:length])
        if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
            return ".".join(parts[:length])
    return ""


def name_of(path: Path, package: Path = PACKAGE) -> str:
    return ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def runs_up(package: Path) -> list[str]:
    """`file:line: import` of every import of a higher wing."""
    return [
        f"{path.relative_to(package.parent)}:{line}: {wing_of(name_of(path, package)) or 'the top'} imports {module}"
        for path in sorted(package.rglob("*.py"))
        for line, module in imports_of(path, package)
        if WINGS.index(wing_of(module)) > WINGS.index(wing_of(name_of(path, package)))
    ]


def test_no_wing_imports_from_one_above_it():
    assert runs_up(PACKAGE) == []


def test_every_folder_with_modules_is_a_wing():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(WINGS) - {"", "__main__"}


def test_no_two_modules_import_each_other():
    paths = {name_of(path): path for path in PACKAGE.rglob("*.py")}
    graph = {name: {module for _, module in imports_of(path)} - {name} for name, path in paths.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(paths)  # a circle raises `CycleError`


def test_every_text_file_is_opened_in_a_named_encoding():
    """The locale's, which is the default, is CP1252 on many a Windows."""
    unnamed = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or "encoding" in {keyword.arg for keyword in node.keywords}:
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            is_open = name == "fdopen" or isinstance(node.func, ast.Name) and name == "open"
            is_method = isinstance(node.func, ast.Attribute) and name in ("read_text", "write_text")
            if is_method or is_open and not any("b" in mode for mode in modes):
                unnamed.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert unnamed == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from ..commands.cli import main", ["sampling imports commands.cli"]),
        ("def later():\n    from .. import report", ["sampling imports report"]),
        ("import trl_lightreasoner.training", ["sampling imports training"]),
        ("from trl_lightreasoner.hub.cards import model_card", ["sampling imports hub.cards"]),
        ("from ..models.loading import load_model\nimport trl", []),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..hub.cards import model_card", []),
    ],
)
def test_an_import_that_runs_up_is_found_with_its_file_and_line(line, found, tmp_path):
    for name in ("commands/cli", "report/page", "training/trainer", "hub/cards", "models/loading", "sampling/planted"):
        path = tmp_path / "trl_lightreasoner" / f"{name}.py"
        path.parent.mkdir(parents=True)
        path.write_text(f"{line}\n" if name == "sampling/planted" else "")
        path.with_name("__init__.py").touch()
    last_line = len(line.splitlines())
    assert runs_up(tmp_path / "trl_lightreasoner") == [
        f"trl_lightreasoner/sampling/planted.py:{last_line}: {each}" for each in found
    ]
