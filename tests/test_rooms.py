"""Imports point down: demos -> app -> pipelines -> processors -> maps, regions -> words -> engine; no circle of files.

Every import counts: those inside functions and those for type checkers, too.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "attnctl"
ROOMS = (  # from the bottom; a room may import those before it, and itself
    "errors",
    "files",
    "sheets",
    "comfy",
    "concepts",
    "loading",
    "fusing",
    "engine",
    "words",
    "regions",
    "areas",
    "maps",
    "processors",
    "pipelines",
    "glyph",
    "app",
    "glyph.train",
    "batch",
    "demos",
    "__main__",
)


def files() -> dict[str, Path]:
    """Module name -> file, of the whole package; the rooms at the top of the repository under their own names."""
    found = {}
    for path in sorted(_walk(PACKAGE)):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _walk(folder: Path) -> list[Path]:
    """Python files, symlinked folders included."""
    own = [path for path in folder.iterdir() if path.suffix == ".py"]
    return own + [file for path in folder.iterdir() if path.is_dir() for file in _walk(path)]


MODULES = files()


def imports(module: str) -> set[str]:
    """The modules of ours that a file names in an import anywhere in it."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(up + ([node.module] if node.module else []))
            for alias in node.names:  # `from attnctl.app import drawing` is about the submodule, not about its package
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in MODULES else base)
    return {name for name in found if name in MODULES} - {module}


GRAPH = {module: imports(module) for module in MODULES if module != "attnctl"}  # the front door imports lazily


def room(module: str) -> int:
    inside = module.removeprefix("attnctl.")
    return max(number for number, name in enumerate(ROOMS) if inside == name or inside.startswith(f"{name}."))


def test_the_graph_sees_what_it_should():
    assert "attnctl.engine.run" in GRAPH["attnctl.engine.control"]
    assert "attnctl.processors.latents.descent" in GRAPH["attnctl.processors.astar"]
    assert len(GRAPH) > 80


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_point_down(module):
    assert sorted(name for name in GRAPH[module] if name != "attnctl" and room(name) > room(module)) == []


def test_there_is_no_circle_of_files():
    graph = {module: found - {"attnctl"} for module, found in GRAPH.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_file_is_long():
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES.values()}
    long |= {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in (ROOT / "benchmarks").glob("*.py")
    }
    assert {name: count for name, count in long.items() if count > 400} == {}
