"""The imports of the package point down: read from the source, module level and function level alike.

Imports under `if TYPE_CHECKING:` never run and are left out.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mythos_jax"

# From top to bottom. A room is a folder or a module next to them; it may import the rooms on lower floors, and itself.
FLOORS = (
    ("__main__", "reference"),
    ("cli",),
    ("commands",),
    ("__init__",),  # the public names, each imported from its room when it is first used
    ("watch",),
    ("preflight", "report"),
    ("server",),
    ("language_model",),
    ("training",),
    ("evaluation",),
    ("serving",),
    ("inference",),
    ("runs", "retrofit"),
    ("porting",),
    ("flops",),
    ("model",),
    ("ops", "data"),
    ("sharding",),
    ("connection",),
    ("cluster",),
    ("processes",),
    ("config",),
    ("typed",),
    ("bounds",),
    ("progress",),
    ("calls", "chips", "interrupts", "paths", "streams"),
    ("json_text",),
    ("errors", "version"),
)
FLOOR = {room: -i for i, rooms in enumerate(FLOORS) for room in rooms}


def files() -> dict[str, Path]:
    """Every module of the package by its dotted name below it; `__init__` is the package itself."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return names


FILES = files()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(node: ast.AST) -> set[str]:
    """The modules of the package that run when this code and its functions do."""
    found = set()
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names if alias.name.split(".")[0] == "mythos_jax"}
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"relative import of {child.module}"
            if (child.module or "").split(".")[0] == "mythos_jax":
                found |= {f"{child.module}.{alias.name}" for alias in child.names}
        else:
            found |= imports(child)
    return found


def module_of(dotted: str) -> str:
    """The file that `mythos_jax.a.b` or a name in it comes from."""
    name = dotted.removeprefix("mythos_jax").removeprefix(".")
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name or "__init__"


GRAPH = {
    name: {module_of(dotted) for dotted in imports(ast.parse(path.read_text()))} - {name}
    for name, path in FILES.items()
}


def room(name: str) -> str:
    return name.partition(".")[0]


def assert_no_cycle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("imports form a ring: " + " -> ".join(reversed(error.args[1])))


def test_the_graph_is_read():
    """Both kinds of imports are seen, and names resolve to files."""
    assert "training.train" in GRAPH["commands.train"]  # inside a function
    assert "errors" in GRAPH["config.files"]  # at module level
    assert "model.halting" in GRAPH["commands.arguments"]  # not only for type checkers
    assert module_of("mythos_jax.model.mythos.Mythos") == "model.mythos"
    assert module_of("mythos_jax.sharding") == "sharding"


def test_a_ring_is_reported():
    with pytest.raises(pytest.fail.Exception, match=r"ring: a -> b -> a|ring: b -> a -> b"):
        assert_no_cycle({"a": {"b"}, "b": {"a"}, "c": {"a"}})


def test_no_ring_of_files():
    assert_no_cycle(GRAPH)


def test_no_ring_of_rooms():
    rooms: dict[str, set[str]] = {}
    for name, targets in GRAPH.items():
        rooms.setdefault(room(name), set()).update({room(target) for target in targets} - {room(name)})
    assert_no_cycle(rooms)


def test_every_room_is_on_a_floor():
    assert {room(name) for name in FILES} == set(FLOOR)


def test_imports_point_down():
    upwards = [
        f"{name} imports {target}"
        for name, targets in GRAPH.items()
        for target in targets
        if room(name) != room(target) and FLOOR[room(name)] <= FLOOR[room(target)]
    ]
    assert not upwards, "\n".join(upwards)
