"""The flow of the helpers: no module imports one of a later step, and the local cloud stands apart."""

import ast
from pathlib import Path

import helpers

ROOT = Path(helpers.__file__).parent
STEPS = (
    ("models", "packaged_model"),
    ("sizing", "machine_types", "memory"),
    ("load_state_dict", "state_dicts"),
    ("model_handler", "serving"),
    ("pipeline",),
    ("dataflow", "preflight", "jobs", "worker_image"),
)
STEP_OF = {name: number for number, names in enumerate(STEPS) for name in names}


def imported(path: Path) -> set[str]:
    """The parts of ``helpers`` that a module imports as it is imported itself, not when a function runs."""
    parts = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module == "helpers":
            parts |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helpers."):
            parts.add(node.module.split(".")[1])
    return parts


def modules() -> list[tuple[str, Path]]:
    return [(path.relative_to(ROOT).parts[0].removesuffix(".py"), path) for path in ROOT.rglob("*.py")]


def test_no_module_imports_one_of_a_later_step():
    seen = 0
    for part, path in modules():
        for other in imported(path) & STEP_OF.keys():
            seen += 1
            # What all steps use stands before the first of them; a notebook's own parts after the last.
            if part not in ("notebook", "plots"):
                assert STEP_OF[other] <= STEP_OF.get(part, -1), f"{path.relative_to(ROOT)} imports {other}"
    assert seen >= 30


def test_the_local_cloud_knows_nothing_of_the_others_nor_they_of_it():
    for part, path in modules():
        if part == "local_cloud":
            assert imported(path) <= {"local_cloud"}, path.name
        elif path.name != "notebook.py":
            assert "local_cloud" not in imported(path), path.name
