"""The command line: one thin function per command. Heavy modules are imported inside, so that --help is instant."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from zbench import MOST_THREADS, __version__
from zbench.errors import UserError
from zbench.paths import NEWEST, expanded

if TYPE_CHECKING:
    from zbench.hardware.device import Device
    from zbench.hardware.peaks import Peaks
    from zbench.ranks import World
    from zbench.report.verdict import Judged
    from zbench.scenario import KernelScenario, Scenario

FAILED_CELLS, INTERRUPTED = 5, 130
OVERRIDE_HELP = (
    "Override a scenario key, e.g. -o repeats=5 -o sampling.temperature=0.8, or an engine's by its label, name or"
    " number: -o engines.eagle3.depth=6. Repeatable."
)


class Finite(click.FloatRange):
    """A range without NaN, which no bound keeps out, and without infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found


FRACTION = Finite(min=0, min_open=True, max=1)

_overrides = click.option("-o", "--override", "overrides", multiple=True, metavar="KEY=VALUE", help=OVERRIDE_HELP)
_device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N, rocm or rocm:N.")
_threads = click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads; default: torch's choice.")
_model = click.option("--model", required=True, help="A name of `zbench models list`, or a model's folder.")
_allow_pickle = click.option(
    "--allow-pickle", is_flag=True, help="Read a drafter that exists as a pickle only (weights only, no code is run)."
)


def _out(what: str) -> Any:
    return click.option(
        "--out", type=click.Path(path_type=Path), default=Path("reports"), show_default=True, help=f"Where {what}."
    )


def _resume(what: str) -> Any:
    return click.option(
        "--resume",
        type=click.Path(path_type=Path),
        is_flag=False,
        flag_value=NEWEST,
        help=f"Finish {what}; without a value, the newest of this scenario under --out.",
    )


class Commands(click.Group):
    """Turns the errors a user can mend into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (UserError, PermissionError) as error:
            said, alone = str(error), isinstance(error, PermissionError)
            if isinstance(error, PermissionError) and error.filename:  # any place that asks about a path may raise it
                said = f"{error.filename}: {error.strerror}"
            if alone or os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun's other ranks say the same
                for line in said.splitlines():
                    click.echo(f"zbench: {line}", err=True)
            sys.exit(2)
        except KeyboardInterrupt as stopped:
            click.echo(f"zbench: interrupted{f'; {stopped}' if str(stopped) else ''}", err=True)
            sys.exit(INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="zbench")
def main() -> None:
    """Where does decode time go, and would speculation or diffusion really help, on this device?

    \b
    Examples:
      zbench run scenarios/quickstart.yaml           measure, then write a report
      zbench run scenarios/quickstart.yaml --dry-run what would be measured, with time and memory
      zbench run scenarios/quickstart.yaml --resume  finish the newest interrupted run
      zbench tune scenarios/quickstart.yaml          the fastest setting of each engine, on this device
      zbench serve scenarios/endpoint.yaml           only start the server that a scenario names
      zbench gate RUN --baseline last                is it worse than the run before?
      zbench history show                            where did a metric change over time?
      zbench init                                    start benchmarking in your own repository
      zbench profile scenarios/quickstart.yaml       time per operator, and a trace
      zbench roofs                                   this device's bandwidth and compute ceilings
    """


@main.command()
@click.argument("scenario", type=click.Path(path_type=Path))
@_overrides
@_out("run folders go")
@_resume("a run folder")
@click.option("--dry-run", is_flag=True, help="Print the cells and an estimate of time and memory; measure nothing.")
@click.option("--report/--no-report", default=True, show_default=True, help="Render report.html at the end.")
@_allow_pickle
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON on stdout; progress goes to stderr.")
def run(
    scenario: Path,
    overrides: tuple[str, ...],
    out: Path,
    resume: Path | None,
    dry_run: bool,
    report: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Measure a scenario into a run folder and render its report.

    \b
    Examples:
      zbench run scenarios/quickstart.yaml
      zbench run scenarios/quickstart.yaml -o model=smollm2-135m -o batch=4 --out /tmp/runs
      zbench run scenarios/random_1b.yaml --dry-run

    A scenario about other hardware than this machine's is projected instead of measured (see `zbench project`); one
    with a key `kernels` times operators (see docs/kernels.md).

    Exit codes: 0 measured or projected, 2 bad input, 5 some cells failed or nothing was measured, 130 interrupted
    (continue with --resume).
    """
    from zbench import scenario as scenarios

    wanted = scenarios.load_any(scenario, overrides)
    if isinstance(wanted, scenarios.KernelScenario):
        if resume:
            raise UserError("a run of kernels takes a minute or two and cannot be resumed; start it again")
        _kernels(wanted, out, dry_run, report, as_json)
        return
    if dry_run:
        if resume:
            raise UserError("--dry-run measures nothing, so there is nothing to resume: leave one of the two out")
        from zbench import estimate

        cells = estimate.estimate(wanted, allow_pickle)
        click.echo(json.dumps([c.to_dict() for c in cells], indent=1) if as_json else estimate.table(cells))
        return
    if wanted.hardware:
        from zbench import checks
        from zbench.hardware import peaks

        if why := checks.elsewhere(wanted):
            if resume:
                raise UserError(f"{why}, so there is nothing to resume")
            click.echo(why, err=True)
            _project(wanted, peaks.on_paper(wanted.hardware), out, report, as_json)
            return
    _measure(wanted, out, resume, report, allow_pickle, as_json)


def _measure(wanted: Scenario, out: Path, resume: Path | None, report: bool, allow_pickle: bool, as_json: bool) -> None:
    """Measure a scenario into a folder, and say what it comes to."""
    from rich.console import Console

    from zbench import run as runner
    from zbench.progress import say

    _interrupt_on_sigterm()
    console = Console(stderr=True)
    first = runner.ranks.is_first()
    folder = runner.latest(out, wanted) if resume == NEWEST and first else resume
    outcome = runner.run(wanted, out, console, folder, allow_pickle)
    if not first:
        return
    page = None
    if report:
        from zbench.report import render

        page = render(outcome.folder)
    if as_json:
        click.echo(json.dumps({**outcome.to_dict(), "report": str(page) if page else None}))
    else:
        say(console, outcome.summary())
        if page:
            from zbench.report import headline

            for line in headline(outcome.folder):
                click.echo(line)
            click.echo(f"report: {page}")
    if outcome.interrupted:
        sys.exit(INTERRUPTED)
    if outcome.failed or not outcome.finished:
        sys.exit(FAILED_CELLS)


def _kernels(wanted: KernelScenario, out: Path, dry_run: bool, report: bool, as_json: bool) -> None:
    """Time kernels into a folder, and say what it comes to."""
    from zbench import operators
    from zbench.cache import new_folder
    from zbench.hardware import device
    from zbench.records import KERNELS
    from zbench.report import kernels as pages

    if dry_run:
        here = device.resolve(wanted.device)
        planned = [(k.name, case.label) for k in operators.chosen(wanted) for case in operators.cases(k, here)]
        lines = [json.dumps([{"kernel": name, "case": case} for name, case in planned], indent=1)]
        for line in lines if as_json else [f"{name}: {case}" for name, case in planned]:
            click.echo(line)
        return
    found = operators.measure(wanted, lambda line: click.echo(line, err=True))
    text = json.dumps(found, indent=1, allow_nan=False)
    folder = new_folder(out, wanted.name, {KERNELS: text})
    page = pages.render(folder) if report else folder / KERNELS
    for line in [text] if as_json else pages.headline(folder):
        click.echo(line)
    click.echo(f"report: {page}", err=as_json)


@main.command()
@click.argument("scenario", type=click.Path(path_type=Path))
@_overrides
@click.option(
    "--device",
    help="MI300X, MI325X, MI350X, MI355X, H100 SXM, H200 SXM or B200, or as much of a name as tells it from the others;"
    " `here` takes this machine's roofs. Default: the scenario's hardware.",
)
@_out("folders go")
@click.option(
    "--memory-fraction", type=FRACTION, default=1.0, help="Share of the bandwidth that is reached; default 1."
)
@click.option(
    "--compute-fraction", type=FRACTION, default=1.0, help="Share of the FLOP rate that is reached; default 1."
)
@click.option("--report/--no-report", default=True, show_default=True, help="Render projection.html.")
@click.option("--json", "as_json", is_flag=True, help="Print the projection as JSON on stdout too.")
def project(
    scenario: Path,
    overrides: tuple[str, ...],
    device: str | None,
    out: Path,
    memory_fraction: float,
    compute_fraction: float,
    report: bool,
    as_json: bool,
) -> None:
    """Predict a scenario's step times on a device that need not be here. Nothing is loaded or measured.

    \b
    Examples:
      zbench project scenarios/random_1b.yaml --device MI300X
      zbench project scenarios/speculative.yaml --device here
      zbench project mine.yaml --device mi355x --memory-fraction 0.8 --compute-fraction 0.6
    """
    from zbench import projection
    from zbench import scenario as scenarios
    from zbench.hardware import peaks

    wanted = scenarios.load(scenario, overrides)
    name = device or wanted.hardware
    if name is None:
        raise UserError("no device to project to: give --device NAME, or the scenario a key hardware: NAME")
    measured = name == projection.HERE
    of = peaks.measured_here(wanted.device, wanted.threads) if measured else peaks.on_paper(name)
    reached = replace(of, memory_fraction=memory_fraction, compute_fraction=compute_fraction)
    _project(wanted, reached, out, report, as_json)


def _project(wanted: Scenario, peaks: Peaks, out: Path, report: bool, as_json: bool) -> None:
    """Write a projection's folder, and say what it comes to."""
    from zbench import projection
    from zbench.cache import new_folder
    from zbench.records import PROJECTION
    from zbench.report import projection as pages

    text = json.dumps(projection.project(wanted, peaks).to_dict(), indent=1, allow_nan=False)
    folder = new_folder(out, f"{wanted.name}-projected", {PROJECTION: text})
    page = pages.render(folder) if report else folder / PROJECTION
    for line in [text] if as_json else pages.headline(folder):
        click.echo(line)
    click.echo(f"projection: {page}", err=as_json)


@main.command()
@click.argument("scenario", type=click.Path(path_type=Path))
@_overrides
@click.option(
    "--prompts",
    type=click.IntRange(min=4),
    default=16,
    show_default=True,
    help="Prompts in all, or as many as there are: half choose settings, half measure what was chosen.",
)
@_out("folders go")
@_resume("a tuning's folder")
@click.option(
    "--report/--no-report", default=True, show_default=True, help="Render tune.html and the last run's report.html."
)
@_allow_pickle
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout; progress goes to stderr.")
def tune(
    scenario: Path,
    overrides: tuple[str, ...],
    prompts: int,
    out: Path,
    resume: Path | None,
    report: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Find the fastest setting of every engine of a scenario, on this device: depth, trees, blocks, lookups.

    \b
    Examples:
      zbench tune scenarios/quickstart.yaml
      zbench tune mine.yaml -o 'matrix={batch: [1, 4, 16]}' --prompts 160
      zbench tune mine.yaml --resume

    An engine that stands in the scenario once is searched through; one with a `sweep`, or several that differ in their
    settings, are the settings to choose from. Every point of a matrix is tuned for itself. The folder gets tuned.yaml,
    the scenario with what was found in it; for a matrix, one in a folder for each point.

    Exit codes: 0 found, 2 bad input, 5 some engine has no setting that works, 130 interrupted (continue with --resume).
    """
    from rich.console import Console

    from zbench import scenario as scenarios
    from zbench import tune as tuning

    _interrupt_on_sigterm()
    wanted = scenarios.load(scenario, overrides)
    found = tuning.tune(wanted, out, Console(stderr=True), prompts, resume, allow_pickle)
    pages = []
    if report:
        from zbench.report import render

        pages = [render(found.folder / point.last.folder) for point in found.points] + [render(found.folder)]
    if as_json:
        click.echo(found.to_json())
    else:
        from zbench.report.tuning import headline

        for line in headline(found.folder):
            click.echo(line)
        for point in found.points:
            click.echo(f"scenario: {found.folder / point.tuned}")
        for page in pages:
            click.echo(f"report: {page}")
    if any(one.chosen.error for point in found.points for one in point.found):
        sys.exit(FAILED_CELLS)


@main.command()
@click.argument("scenario", type=click.Path(path_type=Path))
@_overrides
@click.option("--engine", help="Label or name of the engine; default: the scenario's baseline.")
@click.option("--steps", type=click.IntRange(min=1), default=16, show_default=True, help="Decode steps to profile.")
@_out("folders go")
@click.option(
    "--counters",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="CSV of ncu or rocprofv3 over the same profile (docs/profiling.md). Repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print profile.json on stdout instead of the table.")
def profile(
    scenario: Path,
    overrides: tuple[str, ...],
    engine: str | None,
    steps: int,
    out: Path,
    files: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Where a decode step goes: time per operator with FLOPs, bytes and share of the roof, and a Chrome trace.

    \b
    Examples:
      zbench profile scenarios/quickstart.yaml
      zbench profile scenarios/quickstart.yaml -o 'engines=[{name: autoregressive, execution: eager}]' --steps 8
      zbench profile scenarios/speculative.yaml --engine eagle3 --json

    The first point of the matrix and its first batch of prompts are taken. Open trace.json in ui.perfetto.dev.
    """
    from zbench import profiling
    from zbench import scenario as scenarios
    from zbench.cache import new_folder

    wanted = scenarios.load(scenario, overrides)
    folder = new_folder(out, f"{wanted.name}-profile")
    try:
        found = profiling.profile(wanted, engine, steps, folder, lambda line: click.echo(line, err=True), files)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        if not any(folder.iterdir()):  # nothing came of it
            folder.rmdir()
    click.echo(json.dumps(found, indent=1) if as_json else profiling.table(found))
    click.echo(f"profile: {folder / profiling.PROFILE}, {folder / profiling.TRACE}", err=as_json)


@main.command()
@click.argument("scenario", type=click.Path(path_type=Path))
@_overrides
@click.option("--engine", help="Label of the endpoint whose server to start; default: the only one with a server.")
@click.option("--logs", type=click.Path(path_type=Path), default=Path(), help="Folder of its log; default: here.")
def serve(scenario: Path, overrides: tuple[str, ...], engine: str | None, logs: Path) -> None:
    """Start the server that a scenario names, as `zbench run` would, and keep it up until Ctrl-C.

    \b
    Examples:
      zbench serve scenarios/endpoint.yaml
      zbench serve mine.yaml --engine "vllm eagle3"
    """
    from zbench import scenario as scenarios
    from zbench.serving import process

    _interrupt_on_sigterm()
    process.serve(scenarios.load(scenario, overrides), engine, logs, click.echo)


@main.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Render report.html, figures and metric files of a run folder. Needs neither torch nor the device.

    \b
    Example:
      zbench report reports/quickstart-20261123-120000
    """
    from zbench.report import render, warned

    page = render(folder)
    click.echo(page)
    for line in warned(folder) if page.name == "report.html" else ():  # others say of themselves that they predict
        click.echo(line, err=True)


@main.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--cross-hardware", is_flag=True, help="Compare what is the same in different scenarios, and say what is left out."
)
@_out("the folder goes")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout; write no folder.")
def compare(runs: tuple[Path, ...], cross_hardware: bool, out: Path, as_json: bool) -> None:
    """Runs side by side, from any machines, as one page: compare.html, with CSV and JSON. Needs neither torch nor the
    devices. The first run is what the others are held against. Folders of `zbench import` stand beside the runs.

    \b
    Examples:
      zbench compare mi300x/quickstart-20261123-120000 h100/quickstart-20261123-130000
      zbench compare reports/quickstart-2026112*       before, after, and after that
      zbench compare cpu_run gpu_run --cross-hardware  scenarios that name different devices
      zbench compare RUN RUN --json | jq .answers

    Exit codes: 0 compared, 2 bad input, 3 not comparable (other scenario, prompts, weights or format).
    """
    from zbench import compare as comparing
    from zbench import gate as gates
    from zbench.report import compare as pages

    try:
        found = comparing.compare(runs, cross_hardware)
    except gates.NotComparable as reason:
        click.echo(f"zbench: not comparable: {reason}", err=True)
        sys.exit(gates.NOT_COMPARABLE)
    if as_json:
        click.echo(pages.to_json(found), nl=False)
        return
    page = pages.render(found, out)
    for line in pages.answers(found):
        click.echo(line)
    for note in found.notes:
        click.echo(f"note: {note}")
    for warning in pages.run_warnings(found):
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"comparison: {page}")


@main.command("import")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--label", default="", help="What reports call it, e.g. the device; default: the file's name.")
@_out("folders go")
def import_results(files: tuple[Path, ...], label: str, out: Path) -> None:
    """Take results of other benchmarks in, for `zbench compare`: vLLM bench, SGLang, GuideLLM, AIPerf, llama-bench.

    \b
    Examples:
      zbench import vllm-infqps-concurrency8.json --label "vLLM on H100"
      zbench import sglang_1126.jsonl benchmarks.json profile_export_aiperf.json
      zbench compare reports/endpoint-20261126-120000 reports/imported-*

    Each file becomes a folder. Nothing is derived: what a tool does not report reads "not reported", and every figure
    stands beside its tool's definition.
    """
    from zbench import imported

    for found in [imported.read(file, label) for file in files]:  # all of them, or none
        count = len(found.results)
        click.echo(f"{found.tool}, {count} result{'' if count == 1 else 's'}: {imported.write(found, out)}")


@main.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the files; default: vllm/ in the run folder.")
@click.option("--detailed", is_flag=True, help="With values of every request and the texts, as vLLM's --save-detailed.")
def export(folder: Path, out: Path | None, detailed: bool) -> None:
    """Write a run in the keys of `vllm bench serve`'s JSON, one file for each engine and point.

    \b
    Examples:
      zbench export reports/endpoint-20261126-120000
      zbench export reports/quickstart-20261123-120000 --detailed --out /tmp/results

    Figures are computed as vLLM defines them, which is not as zbench's own metrics are; what a run cannot tell is null.
    """
    from zbench.report import vllm

    for path in vllm.export(folder, out, detailed):
        click.echo(path)


def _self_test(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if not asked or context.resilient_parsing:
        return
    from zbench import selftest

    found = []
    for check in selftest.checks():
        found.append(check)
        if not context.params.get("as_json"):
            click.echo(f"{'ok' if check.passed else 'FAILED':<8}{check.name}: {check.found}")
    passed = all(check.passed for check in found)
    if context.params.get("as_json"):
        click.echo(json.dumps({"passed": passed, "checks": [asdict(check) for check in found]}, indent=1))
    context.exit(0 if passed else 1)


@main.command()
@click.argument("run", metavar="[RUN]", required=False, type=click.Path(path_type=Path))
@click.option("--self-test", is_flag=True, expose_value=False, callback=_self_test,
    help="Check the gate itself: what is the same must pass, the smallest change for the worse must fail.")  # fmt: skip
@click.option("--baseline", type=click.Path(path_type=Path), help="A run folder, a file of --save, or `last`.")
@click.option("--policy", "rules", type=click.Path(path_type=Path), help="YAML: which metrics, with what tolerance.")
@click.option("--save", type=click.Path(path_type=Path), help="Write RUN as a baseline file, small enough to check in.")
@click.option("--strict", is_flag=True, help="Exit with 4 where a metric is inconclusive.")
@click.option("--verbose", is_flag=True, help="Also list the counts that did not change.")
@click.option("--json", "as_json", is_flag=True, is_eager=True, help="Print the verdicts as JSON.")
@click.option("--write", "written", multiple=True, metavar="FORMAT=FILE", help="text, json, markdown, junit, bencher, "
    "action-benchmark-smaller or action-benchmark-bigger. Repeatable.")  # fmt: skip
@click.option("--github", is_flag=True, help="Annotate the workflow run and write its step summary.")
@click.option("--ab", nargs=2, metavar="BASELINE CANDIDATE", help="Instead of RUN: two environments that run "
    "--scenario in turns until decided, each a virtual environment, its python, a checkout's folder, or a server's "
    "address.")  # fmt: skip
@click.option("--scenario", type=click.Path(path_type=Path), help="What --ab runs.")
@_overrides
@click.option("--out", type=click.Path(path_type=Path), default=Path("reports"), help="Where the runs of --ab go.")
@click.option("--max-pairs", type=click.IntRange(min=1), default=24, show_default=True, help="Pairs of runs, of --ab.")
@click.option("--budget-minutes", type=Finite(min=0, min_open=True), help="Time for --ab; ends between runs.")
def gate(
    run: Path | None,
    baseline: Path | None,
    rules: Path | None,
    save: Path | None,
    strict: bool,
    verbose: bool,
    as_json: bool,
    written: tuple[str, ...],
    github: bool,
    ab: tuple[str, str] | None,
    scenario: Path | None,
    overrides: tuple[str, ...],
    out: Path,
    max_pairs: int,
    budget_minutes: float | None,
) -> None:
    """Is RUN worse than its baseline? Counted metrics exactly, timed ones by interval and tolerance.

    \b
    Examples:
      zbench gate reports/ci_gate-20261123-120000 --save baseline.json
      zbench gate reports/ci_gate-20261124-090000 --baseline baseline.json --write junit=gate.xml
      zbench gate reports/quickstart-20261124-090000 --baseline last --policy gate.yaml --strict
      zbench gate --ab ../main . --scenario scenarios/quickstart.yaml --budget-minutes 20
      zbench gate --self-test

    Exit codes: 0 no regression, 1 regressed, 2 bad input, 3 not comparable, 4 inconclusive (with --strict), 130
    interrupted (--ab; what was measured is kept and judged).
    """
    from zbench import gate as gates
    from zbench.cache import write
    from zbench.report import verdict as forms

    targets = [choice.partition("=") for choice in written]
    for kind, _, file in targets:
        if kind not in forms.FORMATS or not file:
            raise UserError(f"--write {kind}: write FORMAT=FILE with one of {', '.join(forms.FORMATS)}")
    policy = gates.load_policy(rules) if rules else gates.Policy()
    found: gates.Gate | None = None
    interrupted = False
    try:
        if ab:
            from rich.console import Console

            from zbench import ab as turns

            if scenario is None:
                raise UserError("--ab needs --scenario FILE: what both are to run")
            if run or baseline or save:
                raise UserError("--ab makes its own runs: neither a RUN nor --baseline or --save goes with it")
            _interrupt_on_sigterm()
            compared = turns.compare(
                ab, scenario, overrides, out, policy, max_pairs, budget_minutes, strict, Console(stderr=True)
            )
            taken, found, interrupted = compared.candidate, compared.found, compared.interrupted
        elif run is None:
            raise UserError("give a RUN, or --ab BASELINE CANDIDATE --scenario FILE")
        elif idle := _given("scenario", "overrides", "out", "max_pairs", "budget_minutes"):
            raise UserError(f"{', '.join(idle)} goes with --ab, which makes runs; a RUN has been made")
        elif not (baseline or save or written):
            raise UserError("nothing to do: give --baseline, or --save to make RUN a baseline")
        else:
            taken = gates.read(run, policy)
            if baseline:
                against = gates.last(run) if str(baseline) == "last" else baseline
                found = gates.judge(taken, gates.read(against, policy), policy)
    except gates.NotComparable as reason:
        click.echo(f"zbench: not comparable: {reason}", err=True)
        sys.exit(gates.NOT_COMPARABLE)
    judged = forms.Judged(taken, found, strict)
    if save:
        gates.save(taken, save)
    for kind, _, file in targets:
        write(Path(file), forms.FORMATS[kind](judged))
    if github and found:
        _annotate(judged)
    if as_json:
        click.echo(forms.as_json(judged), nl=False)
    elif found:
        for line in forms.text(found, verbose):
            click.echo(line)
    if interrupted:
        sys.exit(INTERRUPTED)
    sys.exit(found.exit_code(strict) if found else gates.OK)


def _annotate(judged: Judged) -> None:
    """Write the step summary of the GitHub workflow that this is a step of, and its annotations."""
    from zbench.report import verdict as forms

    try:
        if page_file := os.environ.get("GITHUB_STEP_SUMMARY"):
            with Path(page_file).open("a", encoding="utf-8") as page:
                page.write(forms.step_summary(judged))
        for line in forms.workflow_commands(judged):
            click.echo(line)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error


@main.group()
def history() -> None:
    """Keep runs over time, and see where a metric changed.

    \b
    Examples:
      zbench history add reports/ci_gate-20261124-090000
      zbench history show
    """


_history = click.option("--file", type=click.Path(path_type=Path), default=Path("history.jsonl"), show_default=True,
    help="The history: a file that is only ever appended to.")  # fmt: skip


@history.command("add")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@_history
@click.option("--note", default="", help="Kept with the run and shown with it.")
@click.option("--commit", help="Of the program under test; default: zbench's own, which the run recorded.")
@click.option("--url", help="Where the run can be seen, for when its folder is gone: a CI job's page.")
def history_add(runs: tuple[Path, ...], file: Path, note: str, commit: str | None, url: str | None) -> None:
    """Append runs to a history. One that is there already is not added twice.

    \b
    Examples:
      zbench history add reports/ci_gate-20261124-090000
      zbench history add reports/quickstart-* --file ours.jsonl --note "new driver" --commit "$(git rev-parse HEAD)"
    """
    from zbench import history as kept

    for run in runs:
        click.echo(f"{run}: {kept.add(run, file, note, commit, url)} ({file})")


@history.command("show")
@click.argument("metrics", metavar="[METRIC]...", nargs=-1)
@_history
@click.option("--cell", default="", help="Only cells whose name contains this.")
@click.option("--last", type=click.IntRange(min=1), default=100, show_default=True, help="Only the newest runs.")
@click.option("--json", "as_json", is_flag=True, help="Print every point and change as JSON.")
@click.option("--html", "page", type=click.Path(path_type=Path), metavar="OUT", help="Write a page of trends.")
def history_show(metrics: tuple[str, ...], file: Path, cell: str, last: int, as_json: bool, page: Path | None) -> None:
    """Show metrics over time and where they changed: those of a gate, or the METRICs named.

    \b
    Examples:
      zbench history show
      zbench history show decode_tps acceptance_length --cell eagle3
      zbench history show --html trend.html
    """
    from zbench import history as kept
    from zbench.cache import write
    from zbench.report import trend

    entries, warnings = kept.read(file)
    entries = entries[-last:]
    found = kept.series(entries, metrics, cell)
    for warning in warnings:
        click.echo(f"zbench: {warning}", err=True)
    if page:
        write(page, trend.page(entries, found, warnings, file, page))
    if as_json:
        click.echo(trend.as_json(found, warnings), nl=False)
    elif page:
        click.echo(page)
    else:
        for line in trend.table(found, every=bool(metrics)) or [f"{file} holds no run"]:
            click.echo(line)


@main.command()
@click.argument("files", metavar="SCENARIO...", nargs=-1, required=True, type=click.Path(path_type=Path))
@_overrides
def validate(files: tuple[Path, ...], overrides: tuple[str, ...]) -> None:
    """Check scenario files, and that their prompts and drafters fit their models where these are on this machine; of
    one file, also list its cells. All are checked before the command fails.

    \b
    Examples:
      zbench validate scenarios/quickstart.yaml -o batch=4
      zbench validate scenarios/*.yaml
    """
    wrong = []
    for file in files:
        try:
            said = _validated(file, overrides, alone=len(files) == 1)
        except UserError as error:
            wrong.append(str(error))
            continue
        for line in said:
            click.echo(line)
    if wrong:
        raise UserError("\n".join(wrong))


def _validated(file: Path, overrides: tuple[str, ...], alone: bool) -> list[str]:
    """What is said of a valid scenario; where it is `alone`, with its cells. Raises UserError where it is not valid."""
    from zbench import checks
    from zbench import scenario as scenarios

    wanted = scenarios.load_any(file, overrides)
    if isinstance(wanted, scenarios.KernelScenario):
        from zbench import operators

        with _about(file):
            operators.chosen(wanted)
        named = wanted.kernels if wanted.kernels == "all" else ", ".join(wanted.kernels)
        return [f"{file}: valid, kernels: {named}"]
    cells = scenarios.cells(wanted)
    with _about(file):
        unknown = checks.check(wanted)
    listed = [f"  {cell.id}" for cell in cells] if alone else []
    count = f"{len(cells)} cell{'s' if len(cells) != 1 else ''}"
    return [f"{file}: valid, {count}", *listed, *(f"  not known yet: {what}" for what in unknown)]


@contextmanager
def _about(file: Path) -> Iterator[None]:
    """UserErrors name the file, which those of reading it do already."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


@main.command()
@click.argument("folder", default=".", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace files that are there already.")
def init(folder: Path, force: bool) -> None:
    """Write a scenario, a gate policy and a GitHub Actions workflow into a repository, to start from.

    \b
    Examples:
      zbench init
      zbench init ~/src/my-model --force
    """
    from zbench import starter

    kept = False
    for file, done in starter.write(folder, force):
        kept |= done == "kept"
        click.echo(f"{done:<9} {file}")
    if kept:
        click.echo("What was kept has another content; --force replaces it.")
    where = folder / "benchmarks/zbench"
    click.echo(
        f"\nNext:\n"
        f"  1. put your model and your drafters into {where / 'scenario.yaml'}, and check it:\n"
        f"     zbench validate {where / 'scenario.yaml'}\n"
        f"  2. measure once; without a baseline this saves one, and says how to take it:\n"
        f"     bash {where / 'ci.sh'}\n"
        f"  3. commit the files and the baseline; on GitHub, set the repository variable ZBENCH to what pip installs.\n"
        f"     Elsewhere, let your CI call ci.sh. Keep zbench-results/ out of git."
    )
    if not (folder / ".git").exists():
        click.echo(f"note: {folder} is not the top of a git repository; GitHub reads workflows only there")


@main.command()
def schema() -> None:
    """Print the JSON schema of scenario files, for completion in editors.

    \b
    Example:
      zbench schema > scenario.schema.json
      # first line of a scenario: # yaml-language-server: $schema=scenario.schema.json
    """
    from zbench import scenario as scenarios

    click.echo(json.dumps(scenarios.json_schema(), indent=1))


@main.command()
@_device
@click.option(
    "--dtype", "dtypes", multiple=True,
    help="Repeatable; default: bfloat16 and float32, on a GPU float16 and, where it has it, float8 too.",
)  # fmt: skip
@_threads
@click.option("--refresh", is_flag=True, help="Measure again although a cached measurement exists.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def roofs(device: str, dtypes: tuple[str, ...], threads: int | None, refresh: bool, as_json: bool) -> None:
    """Measure this device's memory bandwidth, its caches' and its compute ceilings, or show the cached ones.

    \b
    Examples:
      zbench roofs
      zbench roofs --device cuda:1 --dtype bfloat16 --refresh
    """
    import torch

    from zbench.hardware import device as devices
    from zbench.hardware import roofs as ceilings

    if threads:
        torch.set_num_threads(threads)
    found = devices.resolve(device)
    measured = ceilings.load_or_measure(
        found,
        dtypes or ceilings.usual_dtypes(found),
        refresh=refresh,
        progress=lambda line: click.echo(line, err=True),
    )
    click.echo(json.dumps(measured, indent=1) if as_json else ceilings.table(measured))


@main.command()
@click.option("--width", default=2048, show_default=True, help="Size of the residual stream.")
@click.option("--context", default=4096, show_default=True, type=click.IntRange(min=1), help="Tokens of the prompt.")
@click.option("--head-dim", default=128, show_default=True, help="Size of a head.")
@click.option("--group", default=4, show_default=True, help="Query heads per key/value head, of GQA and CCGQA.")
@click.option("--compression", default=2, show_default=True, help="CCGQA: width over the width of its queries.")
@click.option("--latent", default=512, show_default=True, help="MLA: size of the cached latent.")
@click.option("--rope", default=64, show_default=True, help="MLA: rotated dimensions, cached once for all heads.")
@click.option(
    "--dtype", default="bfloat16", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type of the cache.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
@click.option("--figure", type=click.Path(path_type=Path), help="Also draw it, as .png or .svg.")
def attention(
    width: int,
    context: int,
    head_dim: int,
    group: int,
    compression: int,
    latent: int,
    rope: int,
    dtype: str,
    as_json: bool,
    figure: Path | None,
) -> None:
    """Compare what MHA, GQA, MLA and CCGQA cost in one layer, from shapes: prefill arithmetic and KV cache.

    The defaults are ZAYA1-8B's shape, with DeepSeek-V2-Lite's for MLA.

    \b
    Examples:
      zbench attention
      zbench attention --width 4096 --context 32768 --json
      zbench attention --figure attention.svg
    """
    from zbench.models import attention as kinds

    shape = kinds.Shape(width, head_dim, group, compression, latent, rope)
    itemsize = 4 if dtype == "float32" else 2
    rows = kinds.compare(shape, context, itemsize)
    if figure:
        from zbench.report import attention as drawing

        drawing.save(figure, shape, context, itemsize)
    click.echo(json.dumps(rows, indent=1) if as_json else kinds.table(rows, shape, context))


@main.command()
@_device
def env(device: str) -> None:
    """Print the environment snapshot that a run records, as JSON.

    \b
    Examples:
      zbench env
      zbench env --device cuda:1
    """
    from zbench.hardware import device as devices
    from zbench.hardware import environment

    click.echo(json.dumps(environment.snapshot(devices.resolve(device)), indent=1))


@main.group()
def models() -> None:
    """Models zbench knows by name.

    \b
    Examples:
      zbench models list
      zbench models fetch smollm2-135m
    """


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def models_list(as_json: bool) -> None:
    """List the named models and drafters, and whether they are on this machine.

    \b
    Examples:
      zbench models list
      zbench models list --json | jq '.[].name'
    """
    from zbench.models import zoo

    rows = zoo.available()
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    for row in rows:
        state = f"{row.bytes / 1e6:.0f} MB on disk" if row.bytes else f"not fetched ({row.download_bytes / 1e6:.0f} MB)"
        what = "" if row.kind == "model" else f"{row.kind} for {row.target}, "
        click.echo(f"{row.name}  {what}{row.parameters / 1e6:.3g} M parameters, {row.licence}, {state}\n  {row.source}")


@models.command("fetch")
@click.argument("name")
def models_fetch(name: str) -> None:
    """Download a named model, check it and convert it. Does nothing if it is there.

    \b
    Example:
      zbench models fetch smollm2-135m
    """
    from zbench.models import zoo

    with zoo.progress_bar() as progress:
        folder = zoo.fetch(name, progress)
    click.echo(folder)


@models.command("path")
@click.argument("name")
def models_path(name: str) -> None:
    """Print the folder of a named model or drafter; fails if it has not been fetched.

    \b
    Example:
      ls "$(zbench models path smollm2-135m)"
    """
    from zbench.models import zoo

    folder = zoo.shipped(name) if name in zoo.SHIPPED else zoo.path(name)
    if folder is None:
        raise UserError(f"{name} is not on this machine; run: zbench models fetch {name}")
    click.echo(folder)


@main.group()
def train() -> None:
    """Train drafters for a model on text that it writes itself.

    \b
    Examples:
      zbench train data   --model smollm2-135m --out corpus --tokens 1000000
      zbench train eagle3 --model smollm2-135m --data corpus --out drafter --minutes 60
    """


@train.command("data")
@_model
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of the corpus; goes on if it has some."
)
@click.option(
    "--tokens", default=1_000_000, show_default=True, type=click.IntRange(min=1), help="Answer tokens wanted."
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="The corpus follows from model and seed.",
)
@click.option(
    "--written",
    type=Finite(0, 1),
    default=0.3,
    show_default=True,
    help="Share of conversations whose user turns the model writes.",
)
@click.option(
    "--opened",
    type=Finite(0, 1),
    default=0.45,
    show_default=True,
    help="Share where it writes on from the first words of a request. The rest is templated.",
)
@click.option("--minutes", type=Finite(min=0, min_open=True), help="Stop after the shard under way then.")
@click.option("--batch", default=32, show_default=True, type=click.IntRange(min=1), help="Conversations at a time.")
@click.option(
    "--exclude", multiple=True, type=click.Path(path_type=Path), help="JSONL prompts to keep out as well. Repeatable."
)
@click.option(
    "--execution",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "eager", "graph"]),
    help="How the model runs; auto: as a graph on a GPU, natively on a CPU if it can.",
)
@_device
@_threads
def train_data(
    model: str,
    out: Path,
    tokens: int,
    seed: int,
    written: float,
    opened: float,
    minutes: float | None,
    batch: int,
    exclude: tuple[Path, ...],
    execution: str,
    device: str,
    threads: int | None,
) -> None:
    """Let a chat model write a training corpus: its own user turns, templated ones, and answers to both.

    \b
    Examples:
      zbench train data --model smollm2-135m --out corpus --tokens 1000000
      zbench train data --model ~/models/mine --out corpus --exclude my_benchmark.jsonl
    """
    import torch
    from rich.console import Console

    from zbench.engines import Shared
    from zbench.hardware import device as devices
    from zbench.models import loading
    from zbench.models.execution import ExecutionUnavailable
    from zbench.progress import amounts, say
    from zbench.training import data

    if written + opened > 1:
        raise UserError(f"--written {written:g} and --opened {opened:g} are more than all conversations")
    if threads:
        torch.set_num_threads(threads)
    where = devices.resolve(device)
    loaded = loading.load(_model_spec(model), "bfloat16")
    console = Console(stderr=True)
    seconds = None if minutes is None else 60 * minutes
    try:
        shared = Shared(loaded, torch.bfloat16, where)
        shared.say = partial(say, console)
        target = shared.target(execution)
        with amounts(tokens, console) as advance:
            data.generate(
                target, loaded, out, tokens, data.Settings(seed, written, opened), batch, exclude, advance, seconds
            )
    except ExecutionUnavailable as error:
        raise UserError(f"{error}; choose --execution eager") from error
    click.echo(out)


def _training(command: Any) -> Any:
    """The options that the training commands share."""
    options = (
        _model,
        click.option(
            "--data",
            required=True,
            multiple=True,
            type=click.Path(path_type=Path),
            help="A corpus of `zbench train data`. Repeatable: several of different seeds are one.",
        ),
        click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of what is trained."),
        click.option("--minutes", type=Finite(min=0, min_open=True), help="How long to train."),
        click.option("--steps", type=click.IntRange(min=1), help="How long to train; repeatable bit by bit."),
        click.option("--resume", is_flag=True, help="Go on with the run in --out."),
        click.option(
            "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of weights, order and places."
        ),
        click.option(
            "--batch", default=4, show_default=True, type=click.IntRange(min=1), help="Conversations per step."
        ),
        click.option(
            "--rate",
            type=Finite(min=0, min_open=True),
            help="Peak learning rate; default 0.002 for tidar, 0.001 for eagle3 and dflash, 0.0001 for full.",
        ),
        click.option(
            "--dtype",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "bfloat16", "float32"]),
            help="Of products; auto: float32 on a CPU that is clearly faster at it, else bfloat16.",
        ),
        _device,
        _threads,
    )
    for option in reversed(options):
        command = option(command)
    return command


_start = click.option(
    "--start", metavar="NAME|FOLDER", help="Begin with what was trained before: of the zoo, or a folder."
)


@train.command("tidar")
@_training
@_start
@click.option("--block", default=8, show_default=True, type=click.IntRange(2, 32), help="Tokens of a block.")
@click.option(
    "--short-block", type=click.IntRange(2, 32), help="Tokens of the short blocks of most steps.  [default: half]"
)
@click.option("--rank", default=24, show_default=True, type=click.IntRange(min=1), help="Of the low-rank updates.")
def train_tidar(block: int, short_block: int | None, rank: int, start: str | None, **options: Any) -> None:
    """Train an adapter that makes a model draft for itself: for the engine `diffusion`.

    \b
    Examples:
      zbench train tidar --model smollm2-135m --data corpus --out adapter --minutes 60
      zbench train tidar --model smollm2-135m --data corpus --out more --minutes 60 --start smollm2-135m-tidar
    """
    from zbench.models.adapter import load_adapter
    from zbench.training.tidar import Tidar, TidarSettings

    if short_block and short_block > block:
        raise UserError(f"--short-block {short_block} is longer than the blocks themselves, --block {block}")

    def objective(target: Any, corpus: Any, seed: int) -> Tidar:
        begun = load_adapter(_trained(start, "adapter"), target.config) if start else None
        return Tidar(target, TidarSettings(block=block, rank=rank, short_block=short_block), seed, begun)

    _train(options, objective, 2e-3)


@train.command("eagle3")
@_training
@_start
@click.option(
    "--draft-vocab", type=click.IntRange(min=16), help="Tokens it can draft.  [default: --start's, else 4096]"
)
@click.option("--depth", default=7, show_default=True, type=click.IntRange(1, 16), help="Steps of training-time test.")
@click.option(
    "--reach",
    default=2,
    show_default=True,
    type=click.IntRange(min=0),
    help="A chain ends where the text is none of the drafter's likeliest so many; 0: never.",
)
@click.option("--ffn", type=click.IntRange(min=1), help="Width of its MLP.  [default: --start's, else the target's]")
def train_eagle3(
    draft_vocab: int | None, depth: int, reach: int, ffn: int | None, start: str | None, **options: Any
) -> None:
    """Train an EAGLE-3 drafter.

    \b
    Example:
      zbench train eagle3 --model smollm2-135m --data corpus --out drafter --minutes 60
    """
    from zbench.models.eagle3 import load_drafter
    from zbench.training.eagle3 import Eagle3, Eagle3Settings

    def objective(target: Any, corpus: Any, seed: int) -> Eagle3:
        if draft_vocab and draft_vocab > target.config.vocab:
            raise UserError(
                f"--draft-vocab {draft_vocab} is too large: the model has {target.config.vocab} tokens in all"
            )
        begun = load_drafter(_trained(start, "eagle3"), target.config) if start else None
        vocab, width = (begun.config.draft_vocab, begun.config.layer.ffn) if begun else (4096, None)
        settings = Eagle3Settings(draft_vocab or vocab, depth, reach, ffn=ffn or width)
        return Eagle3(target, settings, corpus.part(held_out=False), seed, begun)

    _train(options, objective, 1e-3)


@train.command("dflash")
@_training
@_start
@click.option("--block", default=8, show_default=True, type=click.IntRange(2, 64), help="Tokens of a block.")
@click.option("--layers", default=2, show_default=True, type=click.IntRange(min=1), help="Of the drafter.")
def train_dflash(block: int, layers: int, start: str | None, **options: Any) -> None:
    """Train a DFlash drafter.

    \b
    Example:
      zbench train dflash --model smollm2-135m --data corpus --out drafter --minutes 60
    """
    from zbench.models.dflash import load_drafter
    from zbench.training.dflash import DFlash, DFlashSettings

    def objective(target: Any, corpus: Any, seed: int) -> DFlash:
        begun = load_drafter(_trained(start, "dflash"), target.config) if start else None
        return DFlash(target, DFlashSettings(block=block, layers=layers), seed, begun)

    _train(options, objective, 1e-3)


@train.command("full")
@_training
@click.option(
    "--alpha",
    default=1.0,
    show_default=True,
    type=Finite(min=0),
    help="Weight of the autoregressive loss beside the masks'.",
)
@click.option("--block", default=8, show_default=True, type=click.IntRange(2, 32), help="Masks of a block.")
@click.option("--no-masks", is_flag=True, help="Autoregressive loss only.")
@click.option("--mask-id", type=click.IntRange(min=0), help="Token that is the mask; default: one that no text has.")
@click.option("--prompts", is_flag=True, help="Predict prompts too, not answers alone.")
def train_full(alpha: float, block: int, no_masks: bool, mask_id: int | None, prompts: bool, **options: Any) -> None:
    """Convert a model as TiDAR does: all weights learn, and what comes out drafts for itself without an adapter.

    It is a model of its own, with a distribution of its own: its drafts are verified against that, not the original.

    \b
    Examples:
      zbench train full --model smollm2-135m --data corpus --out converted --minutes 600
      torchrun --nproc-per-node 8 -m zbench train full --model ~/models/mine --data corpus --out converted --steps 5000
    """
    from zbench.training.conversion import Conversion, ConversionSettings, unused_token

    if no_masks and (idle := _given("alpha", "block", "mask_id")):
        raise UserError(f"{', '.join(idle)} is about masks, of which --no-masks trains none: leave one of the two out")

    def objective(target: Any, corpus: Any, seed: int) -> Conversion:
        source = target.loaded.path
        if source and source.resolve() == options["out"].resolve():
            raise UserError("--out is the model's own folder, which training must not change; choose another")
        if no_masks:
            return Conversion(target, ConversionSettings(None, block, None, prompts))
        mask = unused_token(corpus.conversations, target.config, mask_id)
        return Conversion(target, ConversionSettings(alpha, block, mask, prompts))

    _train(options, objective, 1e-4)


def _trained(name: str, kind: Any) -> Path:
    """Where something that was trained lies: a folder, or a drafter of the zoo."""
    from zbench.models import zoo

    folder = expanded(name)
    return folder if folder.is_dir() else zoo.drafter(name, kind)


def _train(options: dict[str, Any], objective: Any, rate: float) -> None:
    import torch
    from rich.console import Console

    from zbench import progress, ranks
    from zbench.models import loading
    from zbench.training import trainer
    from zbench.training.corpus import joined, load_corpus
    from zbench.training.target import Target

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    if options["steps"] is None and options["minutes"] is None:
        raise UserError("say how long to train: --minutes or --steps")
    if options["steps"] is not None and options["minutes"] is not None:
        raise UserError("--minutes and --steps are both given: how long to train is one of them")
    if not ranks.launched():  # torchrun ends the others so where a rank died, which is no interruption
        _interrupt_on_sigterm()
    console = Console(stderr=True, quiet=not ranks.is_first())
    say = partial(progress.say, console)
    given = {key: options[key] for key in ("seed", "batch", "steps", "minutes")}
    with ranks.joined("the last checkpoint is kept, continue with --resume") as world:
        device = world.together(lambda: world.device(options["device"]))
        dtype = _training_dtype(options, device, world, say)

        def prepare() -> tuple[Any, Target, Any]:
            loaded = loading.load(_model_spec(options["model"]))
            corpus = joined([load_corpus(folder, loaded.weights_hash) for folder in options["data"]])
            target = Target(loaded, getattr(torch, dtype), device.torch)
            return objective(target, corpus, options["seed"]), target, corpus

        learner, target, corpus = world.together(prepare)
        with progress.amounts(1.0, console) as advance, world.measuring(trainer.STALLED):
            try:
                last = trainer.train(
                    learner,
                    target,
                    corpus,
                    options["out"],
                    trainer.Settings(**given, rate=options["rate"] or rate),
                    options["resume"],
                    advance,
                    say,
                    world,
                )
            except KeyboardInterrupt:
                world.interrupted()
                raise
    if world.rank == 0:
        click.echo(json.dumps(last))


def _training_dtype(options: dict[str, Any], device: Device, world: World, say: Callable[[str], None]) -> str:
    """Of products: the one given, else that of the run that is resumed, else what the device is faster at. All ranks
    take the same."""
    from zbench.hardware.device import bfloat16_cost
    from zbench.training import trainer

    if options["dtype"] != "auto":
        return options["dtype"]
    if options["resume"] and (before := world.told(trainer.dtype_of(options["out"]))) is not None:
        return before
    slower = world.told(bfloat16_cost()) if device.type == "cpu" else 0.0
    if slower <= 1.5:
        return "bfloat16"
    say(f"in float32: torch takes {slower:.1f} times as long over products in bfloat16 on this CPU")
    return "float32"


def _interrupt_on_sigterm() -> None:
    """What is terminated is interrupted: what was finished is kept, locks are released."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _given(*names: str) -> list[str]:
    """Those of these options that the command line has, as it spells them."""
    context = click.get_current_context()
    given = {name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    return [option.opts[0] for option in context.command.params if option.name in given]


def _model_spec(name: str) -> str | dict[str, str]:
    """A folder if there is one of that name, else a name of the zoo."""
    return {"path": name} if expanded(name).is_dir() else name


if __name__ == "__main__":
    main()
