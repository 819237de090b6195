"""What `zbench init` writes into a repository: a scenario, a gate policy, and the CI that runs them.

The files are packaged beside this module, and `examples/ci/` links to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from zbench.cache import atomic_write
from zbench.errors import UserError

PLACES = {
    "scenario.yaml": "benchmarks/zbench/scenario.yaml",
    "gate.yaml": "benchmarks/zbench/gate.yaml",
    "ci.sh": "benchmarks/zbench/ci.sh",
    "workflow.yml": ".github/workflows/zbench.yml",
}
Done = Literal["wrote", "unchanged", "kept", "replaced"]


def write(folder: Path, force: bool = False) -> Iterator[tuple[Path, Done]]:
    """Put each file in its place under `folder`, and say what became of it.

    A file that is there with another content is "kept", or with `force` "replaced". Raises UserError where a place
    cannot be written or leads out of the folder.
    """
    root = folder.resolve()
    for name, place in PLACES.items():
        content = (Path(__file__).parent / name).read_bytes()
        target = folder / place
        if not target.resolve().is_relative_to(root):
            raise UserError(
                f"{target} leads out of {folder}; write there yourself, from {Path(__file__).parent / name}"
            )
        try:
            old = target.read_bytes() if target.exists() else None
            if old == content:
                yield target, "unchanged"
            elif old is not None and not force:
                yield target, "kept"
            else:
                atomic_write(target, content)
                yield target, "wrote" if old is None else "replaced"
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror}") from error
