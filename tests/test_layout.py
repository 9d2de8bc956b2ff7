"""The helpers read as the flow: imports go one way, in circles nowhere, and the local cloud stands apart."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import helpers

ROOT = Path(helpers.__file__).parent

# What all steps use, the steps in the order of the flow, and what stands beside them.
FLOW = (
    "files",
    "models",
    "sizing",
    "load_state_dict",
    "model_handler",
    "pipeline",
    "dataflow",
    "measuring",
)
BESIDE = {"pubsub": {"files"}, "notebook": {"local_cloud", *FLOW}, "plots": set(FLOW), "local_cloud": set()}


def imports(path: Path, root: Path) -> Iterator[str]:
    """The modules of the package at `root` that a module imports, inside functions and for types too."""
    package = ".".join(path.relative_to(root.parent).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            found = module(name, root)
            if found and found != path:
                yield found.relative_to(root).as_posix()


def module(name: str, root: Path) -> Path | None:
    """The file that a dotted name is imported from: a module's, or of the package that has the name."""
    first, *parts = name.split(".")
    if first != root.name or not parts:
        return None
    for end in (len(parts), len(parts) - 1):
        path = root.joinpath(*parts[:end])
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if end and (path / "__init__.py").is_file():
            return path / "__init__.py"
    return None


def graph(root: Path) -> dict[str, set[str]]:
    return {path.relative_to(root).as_posix(): set(imports(path, root)) for path in root.rglob("*.py")}


def step(name: str) -> str:
    return name.partition("/")[0].removesuffix(".py")


def upward(found: dict[str, set[str]]) -> list[str]:
    """The imports that do not go down the listing."""
    wrong = []
    for name, others in found.items():
        own = step(name)
        allowed = set(FLOW[: FLOW.index(own)]) if own in FLOW else BESIDE.get(own, set())
        allowed |= {"pubsub"} if own == "measuring" else set()  # it sends load to a stream
        wrong += [f"{name} imports {other}" for other in others if step(other) not in {own, *allowed}]
    return [one for one in wrong if not one.endswith(" imports __init__.py")]


def circles(found: dict[str, set[str]]) -> list[str]:
    """The modules that import each other, over however many others."""
    reached = {name: set(others) for name, others in found.items()}
    for _ in found:
        grown = {
            name: others | {more for other in others for more in reached.get(other, ())}
            for name, others in reached.items()
        }
        if grown == reached:
            break
        reached = grown
    return sorted(name for name, others in reached.items() if name in others)


def test_imports_go_down_the_listing_those_inside_functions_too():
    found = graph(ROOT)
    assert sum(map(len, found.values())) > 150
    assert upward(found) == []


def test_no_modules_import_each_other():
    assert circles(graph(ROOT)) == []


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("models/planted.py", "from helpers.sizing.sizes import size_model"),
        ("models/planted.py", "def f():\n    from helpers import sizing"),
        ("pipeline/planted.py", "def f():\n    import helpers.dataflow.job"),
        ("sizing/planted.py", "from ..dataflow import job"),
        ("dataflow/planted.py", "from helpers.local_cloud import launch"),
        ("local_cloud/planted.py", "from ..files import storage"),
    ],
)
def test_a_planted_upward_import_is_seen(name, code, tmp_path):
    planted = copy_of_the_package(tmp_path) / name
    planted.write_text(code)
    assert upward(graph(planted.parents[1])) != []


def test_a_planted_circle_is_seen(tmp_path):
    root = copy_of_the_package(tmp_path)
    (root / "files" / "one.py").write_text("from helpers.files import two\n")
    (root / "files" / "two.py").write_text("def f():\n    from helpers.files.three import x\n")
    (root / "files" / "three.py").write_text("import helpers.files.one\n")
    assert circles(graph(root)) == ["files/one.py", "files/three.py", "files/two.py"]


def copy_of_the_package(folder: Path) -> Path:
    root = folder / "helpers"
    for path in ROOT.rglob("*.py"):
        copy = root / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    return root


def test_nothing_but_the_notebooks_asks_whether_the_cloud_is_the_local_one():
    asking = {
        step(path.relative_to(ROOT).as_posix())
        for path in ROOT.rglob("*.py")
        if "LOCAL_CLOUD" in path.read_text()
    }
    assert asking <= {"local_cloud", "notebook"}


def test_the_listing_reads_as_the_flow():
    entries = {path.name for path in ROOT.iterdir() if path.name != "__pycache__"}
    assert entries == {
        "__init__.py",
        *FLOW,
        *(name if (ROOT / name).is_dir() else f"{name}.py" for name in BESIDE),
    }
    assert len(entries) <= 13


@pytest.mark.parametrize("name", [name for name in FLOW if name != "files"])
def test_a_step_shows_its_users_what_it_defines(name):
    package = __import__(f"helpers.{name}", fromlist=["__all__"])
    for public in package.__all__:
        assert getattr(package, public) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        getattr(package, "nothing")  # noqa: B009 - as an import would
