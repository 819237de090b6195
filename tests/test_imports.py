"""The import rule: what reads a run folder needs no torch, the command line starts without it, and no layer knows what
stands above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import zbench

LIGHT = [
    "records",
    "scenario",
    "metrics",
    "stats",
    "report",
    "report.html",
    "report.figures",
    "report.export",
    "report.projection",
    "cli",
    "gate",
    "report.verdict",
    "history",
    "changes",
    "report.trend",
    "starter",
]
LIGHT += [
    "ab",
    "pytest_plugin",
    "engines.plans",
    "projection",
    "estimate",
    "hardware.peaks",
    "models.drafters",
    "report.attention",
    "models.attention",
]
LIGHT += ["checks", "imported", "importers", "codejudge", "compare", "models.shard"]
LIGHT += ["report.compare", "report.kernels", "report.scaling", "report.tuning"]
LIGHT += ["telemetry", "hardware.telemetry", "report.telemetry", "trace"]
HEAVY = ("torch", "transformers")
# What each layer may import of zbench, beside itself.
LAYERS = {
    "kernels": {"cache"},
    "models": {"cache", "errors", "hardware", "kernels", "paths", "records"},
    "hardware": {"__version__", "cache", "errors", "models", "records", "telemetry"},
    "engines": {"errors", "hardware", "kernels", "models", "paths", "prompts", "records", "serving"},
    "serving": {"errors", "models", "paths", "records"},
    "records": {"errors"},
    "paths": {"errors"},
    "stats": set(),
    "metrics": {"errors", "hardware", "records", "serving_metrics", "stats", "telemetry"},
    "results": {"metrics", "records"},
    "compare": {"errors", "gate", "imported", "importers", "metrics", "records", "results", "stats"},
}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_neither_torch_nor_transformers(module: str) -> None:
    code = f"import sys, zbench.{module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_loads_nothing_but_click() -> None:
    code = (
        "import sys\nfrom zbench.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'pandas', 'pydantic', 'rich', 'numpy', 'yaml'}\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_nothing_that_stands_above_it(layer: str) -> None:
    root = Path(zbench.__file__).parent
    files = sorted((root / layer).rglob("*.py")) or [root / f"{layer}.py"]
    found = {name for file in files for name in imported(ast.parse(file.read_text(encoding="utf-8")))}
    assert found - {layer} <= LAYERS[layer]


def imported(tree: ast.AST) -> set[str]:
    """Packages and modules of zbench that a module imports anywhere, but for types alone."""
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    ignored = {id(inner) for node in typing for inner in ast.walk(node)}
    names = []
    for node in ast.walk(tree):
        if id(node) in ignored:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("zbench.")}
