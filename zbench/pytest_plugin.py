"""A gate in a project's own test suite: `@pytest.mark.zbench(scenario=..., baseline=...)` or the fixture `zbench_gate`.

pytest loads this in every project that has zbench installed, so nothing else is imported before a test asks for a gate.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from zbench.gate import Gate

MARK = (
    "zbench(scenario, baseline, policy=None, overrides=(), strict=False): run a scenario and fail the test where it is "
    "worse than its baseline. Paths are relative to the root of the project."
)
_NEEDED = {"scenario", "baseline"}
_KNOWN = {*_NEEDED, "policy", "overrides", "strict"}
SAVE = "--zbench-save-baseline"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("zbench", "gates of decoding speed and counts")
    group.addoption("--zbench-out", default="zbench-runs", metavar="DIR", help="Where the runs of gates are kept.")
    group.addoption(SAVE, action="store_true", help="Write the baselines of gates instead of comparing with them.")
    group.addoption("--zbench-strict", action="store_true", help="Fail where a metric is inconclusive.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARK)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """The gates of its marks come before a test's own body."""
    for mark in reversed(list(item.iter_markers("zbench"))):
        given = mark.kwargs.keys()
        if mark.args or not given >= _NEEDED or not given <= _KNOWN:
            pytest.fail(f"expected @pytest.mark.{MARK.partition(':')[0]}, all by keyword", pytrace=False)
        _gate(item, **mark.kwargs)
    return (yield)


@pytest.fixture
def zbench_gate(request: pytest.FixtureRequest) -> Callable[..., Gate]:
    """`zbench_gate(scenario=..., baseline=...)` gates now: it fails the test as the mark does, or returns the Gate."""

    def gate(**given: Any) -> Gate:
        return _gate(request.node, **given)

    return gate


def _gate(
    item: pytest.Item,
    *,
    scenario: str | Path,
    baseline: str | Path,
    policy: str | Path | None = None,
    overrides: Sequence[str] = (),
    strict: bool = False,
) -> Gate:
    from zbench import gate
    from zbench.errors import UserError
    from zbench.report import verdict

    refused: list[str] = []
    root = item.config.rootpath
    reference = root / baseline
    saving = item.config.getoption(SAVE)
    strict = strict or item.config.getoption("--zbench-strict")
    try:
        if not saving and not reference.exists():
            raise UserError(f'there is no baseline {reference}; make one with: pytest "{item.nodeid}" {SAVE}')
        rules = gate.load_policy(root / policy) if policy else gate.Policy()
        folder = _run(item, root / scenario, overrides)
        if saving:
            if reference.is_dir():
                raise UserError(f"{reference} is a folder; name a file to save a baseline to")
            gate.save(gate.read(folder, rules), reference)
            pytest.skip(f"saved {reference}; nothing was compared")
        found = gate.judge(gate.read(folder, rules), gate.read(reference, rules), rules)
    except (UserError, gate.NotComparable) as error:
        word = "not comparable: " if isinstance(error, gate.NotComparable) else ""
        refused = [f"zbench: {word}{line}" for line in str(error).splitlines()]
    if refused:
        pytest.fail("\n".join(refused), pytrace=False)
    lines = "\n".join([*verdict.text(found), f"run: {folder}"])
    if found.exit_code(strict):
        pytest.fail(lines, pytrace=False)
    item.add_report_section("call", "zbench gate", lines)
    if found.verdict == "inconclusive":
        warnings.warn(f"{item.nodeid}: {verdict.summary(found)}", stacklevel=2)
    return found


def _run(item: pytest.Item, scenario: Path, overrides: Sequence[str]) -> Path:
    """Measure in a process of its own, one at a time: what the tests did to this one moves no time."""
    from filelock import FileLock

    import zbench
    from zbench import ab
    from zbench.cache import new_folder

    out = item.config.rootpath / item.config.getoption("--zbench-out")
    kept = new_folder(out, scenario.stem)
    this = ab.Environment("zbench", sys.executable, Path(zbench.__file__).parents[1])
    with FileLock(out / ".lock"):
        return ab.measure(this, scenario, overrides, kept)
