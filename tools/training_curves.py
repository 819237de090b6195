"""How often the first draft is right on held-out conversations, against drafted tokens learnt, as in docs/zoo.md.

The first place alone can be compared between runs that draft to different lengths.

    python tools/training_curves.py docs/zoo_curves.png "TiDAR=one/log.jsonl,more/log.jsonl" "EAGLE-3=eagle3/log.jsonl"

A run that began with what another had trained (`--start`) goes on where that ended: its logs are joined by commas.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's, told apart without colour vision
MARKERS = "osD^"


def curve(logs: list[Path]) -> list[list[tuple[float, float]]]:
    """(tokens learnt before and in each run, share of first drafts that are right), run by run."""
    before, runs = 0, []
    for log in logs:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        runs.append([(before + line["tokens"], line["right"][0]) for line in lines])
        before += lines[-1]["tokens"]
    return runs


def main(out: str, *named: str) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, given in enumerate(named):
        name, logs = given.split("=", 1)
        for part, run in enumerate(curve([Path(log) for log in logs.split(",")])):
            axes.plot(
                [tokens / 1e6 for tokens, _ in run], [100 * right for _, right in run], color=COLOURS[number],
                marker=MARKERS[number], markersize=4, label=None if part else name,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("drafted tokens learnt (millions)")
    axes.set_ylabel("first drafts right, % (held out)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
