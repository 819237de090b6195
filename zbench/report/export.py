"""The metrics as files for other programs: CSV for a spreadsheet, JSON with every definition."""

from __future__ import annotations

import json
from dataclasses import asdict

import pandas as pd

from zbench.metrics import DEFINITIONS_VERSION, METRICS, definitions_hash
from zbench.report.findings import warnings
from zbench.report.readings import answers
from zbench.results import Results

SCHEMA_VERSION = 1


def to_csv(results: Results) -> str:
    """One line per metric, cell and part; what is not known is empty, with its reason in `note`."""
    return pd.DataFrame([asdict(row) for row in results.rows]).to_csv(index=False, lineterminator="\n")


def to_json(results: Results) -> str:
    """Metrics, definitions, and the identity of the run they come from. Never NaN: JSON has none."""
    manifest = results.run.manifest
    content = {
        "schema_version": SCHEMA_VERSION,
        "definitions_version": DEFINITIONS_VERSION,
        "definitions_hash": definitions_hash(),
        "definitions": [
            {"name": d.name, "unit": d.unit, "formula": d.formula, "better": d.better} for d in METRICS.values()
        ],
        "run": {
            "name": manifest.name,
            "created": manifest.created,
            "zbench_version": manifest.zbench_version,
            "scenario_hash": manifest.scenario_hash,
            "environment_hash": manifest.environment_hash,
            "models": manifest.models,
            "read_roof": results.run.read_roof,
            "cells": [asdict(cell) for cell in manifest.cells],
        },
        "answers": [{"point": point, "sentences": sentences} for point, sentences in answers(results)],
        "warnings": warnings(results),
        "metrics": [asdict(row) for row in results.rows],
    }
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
