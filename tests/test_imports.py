"""The import rule: what reads a run folder needs no torch, and the command line starts without it."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
    "hardware.projection",
    "models.drafters",
    "report.attention",
    "models.attention",
]
LIGHT += ["checks", "imported", "importers", "codejudge", "compare", "models.shard"]
LIGHT += ["report.compare", "report.kernels", "report.scaling", "report.tuning"]
LIGHT += ["telemetry", "hardware.telemetry", "report.telemetry", "trace"]
HEAVY = ("torch", "transformers")


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
