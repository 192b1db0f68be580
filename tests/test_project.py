"""The project as a whole: its wheel, its rules on imports."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = [*(ROOT / "sdlora_edge").rglob("*.py"), *(ROOT / "export").rglob("*.py")]
ORDER = [
    "errors",
    "progress",
    "results",
    "shortage",
    "platforms",
    "storage",
    "formats.canonical",
    "formats.limits",
    "formats.ed25519",
    "formats.trust",
    "formats.signing",
    "formats.confidence",
    "formats.encoding",
    "formats.head_update",
    "formats.bounds",
    "state",
    "formats.container",
    "formats.fields",
    "formats.current",
    "formats.packet",
    "formats.lead",
    "formats.control",
    "acceptance",
    "formats.manifest",
    "formats.bundle",
    "inputs",
    "device",
    "selftest",
    "fleet",
    "agent",
    "method",
    "train",
    "export",
    "label",
    "demo",
    "cli",
]
"""A module may import from those before it, and from its own package."""


def test_the_wheel_carries_export_and_works_without_the_source(tmp_path: Path) -> None:
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(wheel, check=True)
    (built,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(site),
            str(built),
        ],
        check=True,
    )
    program = "import sdlora_edge.export.bundles as e, sdlora_edge.cli; print(e.__file__); raise SystemExit(sdlora_edge.cli.main(['--version']))"
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    assert str(site / "sdlora_edge" / "export" / "bundles.py") in done.stdout
    assert (site / "sdlora_edge" / "py.typed").is_file()
    for name in ("page.html", "parts.html", "style.css"):
        assert (site / "sdlora_edge" / "train" / "report" / name).is_file()
    for name in ("label.html", "label.css", "label.js"):
        assert (site / "sdlora_edge" / "label" / name).is_file()
    collector = site / "sdlora_edge" / "fleet" / "collector"
    for name in ("fleet.html", "collector.css", "collector.js", "migrations/env.py"):
        assert (collector / name).is_file()
    assert len(list((collector / "migrations" / "versions").glob("v*.py"))) >= 2
    assert (site / "bin" / "sdlora-edge").is_file()


def test_the_editable_install_takes_export_from_the_top_level() -> None:
    import sdlora_edge.export

    assert Path(sdlora_edge.export.__file__ or "").parent == ROOT / "export"


def test_imports_point_downwards_only() -> None:
    for path in MODULES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[1:] if parts[0] == "sdlora_edge" else parts
        if parts[0] in ("__init__", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            package = parts[: len(parts) - node.level]
            module = ".".join([*package, *(node.module.split(".") if node.module else [])])
            for reached in {f"{module}.{alias.name}".lstrip(".") for alias in node.names}:
                if (place := _place(reached)) is not None:
                    assert place <= _place(".".join(parts)), f"{path} imports {reached}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports inside functions count too; those for the type checker alone do not."""
    found = {_module(path): path for path in MODULES}
    reached = {name: _imports(path, name, found.keys()) for name, path in found.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a cycle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for other in sorted(reached[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(found):
        visit(name, ())


def _module(path: Path) -> str:
    """Its name, such as sdlora_edge.train.loop; of a package's __init__ that of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "sdlora_edge" else ("sdlora_edge", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, module: str, known: Collection[str]) -> set[str]:
    """The modules of the package that a module imports."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                name = ".".join([*base, alias.name])
                found.add(name if name in known else ".".join(base))
    return found


def _place(module: str) -> int | None:
    """Where in ORDER a module, or what it holds, belongs."""
    return next((i for i, layer in enumerate(ORDER) if f"{module}.".startswith(f"{layer}.")), None)


def test_the_matrix_takes_the_oldest_versions_that_each_python_can_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for folder in ("matrix", "bench"):
        monkeypatch.syspath_prepend(str(ROOT / "tests" / folder))
    matrix = importlib.import_module("run")
    declared = {
        "numpy",
        "pillow",
        "safetensors",
        "securesystemslib",
        "onnxruntime",
        "threadpoolctl",
        "rich",
        "typer",
    }
    assert matrix.oldest("3.10").keys() == matrix.oldest("3.13").keys() == declared
    assert (matrix.oldest("3.10")["numpy"], matrix.oldest("3.13")["numpy"]) == ("1.24", "2.1")
    row = {"found": {"fp32 inputs": "6 of 6"}}
    assert matrix.passed(row)
    for found in ("5 of 6, not parity", "SIGSEGV", "0 of 0", "longer than 900 s"):
        assert not matrix.passed({"found": {"fp32 inputs": found}})
    assert not matrix.passed({"problem": "no wheel"})


def test_files_are_short_enough_to_read() -> None:
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 400, path


def test_no_two_modules_have_one_name() -> None:
    """But for commands, whose modules have the commands' names."""
    names = [path.stem for path in MODULES if path.stem != "__init__" and path.parent.name != "cli"]
    assert sorted(names) == sorted(set(names))
