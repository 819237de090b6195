"""Generated code against its tests: right and wrong, and what hostile code can and cannot do."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zbench import codejudge, prompts, run
from zbench.codejudge import Limits, Problem, Verdict, judge, program
from zbench.errors import UserError
from zbench.run import TrialRecord
from zbench.scenario import PromptFile

LIKE = Path(__file__).parent / "humaneval_like.jsonl"
LINES = [json.loads(line) for line in LIKE.read_text().splitlines()]
LIMITS = Limits(seconds=20, memory=256 << 20)
ADD = Problem(
    "def add(a, b):\n    '''Sum.'''\n", "add", "def check(candidate):\n    assert candidate(1, 2) == 3\n"
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _confined() -> None:
    try:
        codejudge.confinement()
    except UserError as reason:
        pytest.skip(str(reason))


def outcome(body: str, problem: Problem = ADD, limits: Limits = LIMITS) -> Verdict:
    """Of a function body, indented once."""
    return judge(problem, "".join(f"    {line}\n" for line in body.splitlines()), limits)


# --- Right and wrong ---


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["task_id"])
def test_reference_solutions_pass_and_an_empty_one_fails(line: dict) -> None:
    problem = Problem(line["prompt"], line["entry_point"], line["test"])
    assert judge(problem, line["canonical_solution"], LIMITS) == Verdict("passed")
    assert judge(problem, "    return None\n", LIMITS).outcome == "failed"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("    return a + b\n", "passed"),
        ("    return a + b\n\nprint('and that is it')\ndef", "passed"),  # a base model goes on
        ("Here:\n```python\ndef add(a, b):\n    return a + b\n```\nIt adds.", "passed"),
        ("```\nimport math\n\ndef add(a, b):\n    return a + b", "passed"),  # cut by the output's length
        ("```python\nprint(add(1, 2))\n```\nwith\n```python\ndef add(a, b):\n    return a + b\n```", "passed"),
        ("def add(a, b):\n    return sum((a, b))\n", "passed"),
        ("1. Here:\n   ```python\n   def add(a, b):\n       return a + b\n   ```\nIt adds.", "passed"),
        ("1. Here:\n    ```python\ndef add(a, b):\n    return a + b\n    ```", "passed"),  # only the fence is indented
        ("1.  Here:\n\n    ```python\n\ndef add(a, b):\n    return a + b\n    ```", "passed"),
        ("- ```python\n\n  def add(a, b):\n      return a + b\n  ```\n", "passed"),
        ("- ```python\n  def add(a, b):\n\n      return a + b\n  ```\n", "passed"),
        ("10) Here:\n\n\t```\n\t    return a + b\n\t```", "passed"),  # the body alone
        ("    return a - b\n", "failed"),
        ("    return (a +", "failed"),
        ("I cannot do that.", "failed"),
        ("```python\ndef added(a, b):\n    return a + b\n```", "failed"),
        ("", "failed"),
    ],
)
def test_the_code_of_an_answer_is_found(answer: str, expected: str) -> None:
    assert judge(ADD, answer, LIMITS).outcome == expected


def test_a_whole_function_keeps_the_helpers_of_its_prompt() -> None:
    problem = Problem(LINES[1]["prompt"], "unshift", LINES[1]["test"])
    answer = "```python\ndef unshift(text):\n    assert shift('ab') == 'ba'\n    return text[-1:] + text[:-1]\n```"
    assert judge(problem, answer, LIMITS).outcome == "passed"


def test_values_of_other_classes_are_what_they_are_equal_to() -> None:
    problem = Problem(LINES[2]["prompt"], "counts", LINES[2]["test"])
    assert outcome("from collections import Counter\nreturn Counter(text.split())", problem).outcome == "passed"


def test_an_error_of_the_code_reaches_tests_that_expect_it() -> None:
    expecting = (
        "def check(f):\n    try:\n        f(1, 0)\n    except ZeroDivisionError:\n        return\n    assert False\n"
    )
    assert outcome("return a / b", Problem(ADD.prompt, "add", expecting)).outcome == "passed"


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("import json; json.loads('x')", "ValueError"),
        ("b'\\xff'.decode()", "UnicodeDecodeError"),
        ("class Own(KeyError): pass\nraise Own", "LookupError"),
    ],
)
def test_an_error_of_another_class_is_its_nearest_base_that_is_built_in(body: str, error: str) -> None:
    test = f"def check(f):\n    try:\n        f(1, 0)\n    except {error}:\n        return\n    assert False\n"
    assert outcome(body, Problem(ADD.prompt, "add", test)) == Verdict("passed")


@pytest.mark.parametrize(
    "value",
    [
        "float('inf')", "[-math.inf]", "(math.nan,)", "{'...': [math.nan, ...][:1]}", "10**5000", "-3 - 4j", "{*()}",
        "{1: {2: ({3},)}}", "'\\n\\udc80'", "b'\\n'", "None", "[True, 1, 1.0]",
    ],
)  # fmt: skip
def test_plain_values_come_and_go_as_they_are(value: str) -> None:
    test = f"import math\ndef check(f):\n    assert repr(f({value}, 0)) == repr(f(0, 1)) == repr({value})\n"
    test = test.replace("repr", "(lambda x: str(hash(x)) if isinstance(x, int) else repr(x))")
    assert outcome(f"import math\nreturn {value} if b else a", Problem(ADD.prompt, "add", test)) == Verdict("passed")


UNASKED, UNTOLD = "an argument is no plain value", "it returned no plain value"


@pytest.mark.parametrize(
    ("test", "why"),
    [
        ("def check(f):\n    f(lambda: 0, 1)\n", UNASKED),
        ("def check(f):\n    try:\n        f(lambda: 0, 1)\n    except:\n        pass\n", UNASKED),
        ("from collections import Counter\ndef check(f):\n    f(Counter('a'), 1)\n", UNASKED),
        ("def check(f):\n    f('x' * (1 << 20), 1)\n", UNASKED),
        ("check = ", "its tests do not load: SyntaxError"),
        ("1 / 0", "its tests do not load: ZeroDivisionError"),
        ("pass", "its tests do not load: KeyError"),
    ],
)
def test_tests_that_cannot_be_asked_judge_nothing(test: str, why: str) -> None:
    assert outcome("return a", Problem(ADD.prompt, "add", test)) == Verdict("not judged", why)


@pytest.mark.parametrize(
    "body",
    [
        "return range(a)",
        "yield from (a, b)",
        "return {a: object()}",
        "return 'x' * (4 << 20)",
        "kept = []\nkept.append(kept)\nreturn kept",
        "kept = []\nfor _ in range(500): kept = [kept]\nreturn kept",
        "class Equal:\n    def __eq__(self, other): return True\n    def __repr__(self): return '3'\nreturn Equal()",
        "class Odd(list):\n    def __iter__(self): raise ValueError\nreturn Odd()",
    ],
)
@pytest.mark.parametrize("test", [ADD.test, "def check(f):\n    try:\n        f(1, 2)\n    except:\n        pass\n"])
def test_what_returns_no_plain_value_fails(body: str, test: str) -> None:
    """Were it not judged, code that is wrong could leave the share of what passes."""
    assert outcome(body, Problem(ADD.prompt, "add", test)) == Verdict("failed", UNTOLD)


# --- A verdict cannot be had otherwise ---


@pytest.mark.parametrize(
    "body",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "print('passed'); return 0",
        "import sys; sys.stdout.write('passed-'); sys.stdout.flush(); return 0",
        "raise SystemExit(0)",
        "class Three(int):\n    def __eq__(self, other): return True\nreturn Three(0)",
        # Neither the tests nor a nonce are in any frame or descriptor of the process that runs the code.
        "import sys\nframe = sys._getframe()\nwhile frame:\n    if {'nonce', 'check'} & {*frame.f_locals}: return 3\n"
        "    frame = frame.f_back\nreturn 0",
        "import os\nfor n in range(64):\n    try: os.write(n, b'passed\\n')\n    except OSError: pass\nreturn 0",
        "import builtins; builtins.AssertionError = ZeroDivisionError; return 0",
        "import builtins\nclass Kept(Exception): __module__ = 'builtins'\nbuiltins.Kept = Kept\nraise Kept",
    ],
)
def test_no_exit_no_print_and_no_trick_is_a_verdict(body: str) -> None:
    assert outcome(body).outcome == "failed"
    top = f"```python\nimport os\nos._exit(0)\n{ADD.prompt}    return a + b\n```"
    assert judge(ADD, top, LIMITS) == Verdict("failed", "its process ended")


# --- Limits and confinement ---


@pytest.mark.parametrize("body", ["while True: pass", "import time\ntime.sleep(1000)"])
def test_code_without_end_is_ended_and_nothing_of_it_is_left(body: str) -> None:
    mine = psutil.Process()
    began = time.monotonic()
    assert outcome(body, limits=Limits(1, 256 << 20)) == Verdict("timeout")
    assert time.monotonic() - began < 30
    assert not [child for child in mine.children(recursive=True) if "-I" in child.cmdline()]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return 'x' * (1 << 40)", "MemoryError"),
        ("kept = []\nwhile True: kept.append(bytearray(1 << 24))", "MemoryError"),
        ("import os\nwhile True: os.fork()", "PermissionError"),
        ("import subprocess; subprocess.run(['true']); return 3", "PermissionError"),
        ("import threading; threading.Thread(target=print).start(); return 3", "RuntimeError"),
        ("import os, signal; os.kill(os.getppid(), signal.SIGKILL); return 3", "PermissionError"),
        ("import os; os.setsid(); return 3", "PermissionError"),
        ("import socket; socket.create_connection(('127.0.0.1', PORT)); return 3", "PermissionError"),
        ("open('x', 'w'); return 3", "PermissionError"),
        ("import os; os.open('OUTSIDE', os.O_RDONLY | os.O_CREAT); return 3", "PermissionError"),
        ("import os; os.truncate('OUTSIDE/run.json', 0); return 3", "PermissionError"),
        ("import shutil; shutil.rmtree('OUTSIDE'); return 3", "PermissionError"),
        ("import os; os.rename('OUTSIDE/run.json', 'OUTSIDE/x'); return 3", "PermissionError"),
        ("import os; return 3 if {*os.environ} - {'LC_CTYPE'} else 0", "AssertionError"),
        ("import sys; return 3 if sys.stdin.read() else 0", "AssertionError"),
        ("import numpy; return 3", "ModuleNotFoundError"),
    ],
)
def test_what_code_may_not_do_fails_it_and_does_not_happen(tmp_path: Path, body: str, why: str) -> None:
    (tmp_path / "run.json").write_text("whole")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        body = body.replace("OUTSIDE", str(tmp_path)).replace("PORT", str(server.getsockname()[1]))
        found = outcome(body)
        with pytest.raises(TimeoutError):
            server.accept()
    assert found.outcome == "failed"
    assert found.why == why
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"run.json": "whole"}


def test_its_folder_is_its_own_and_gone_afterwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert outcome(f"import os\nreturn 3 if os.getcwd().startswith({str(tmp_path)!r}) else 0").outcome == "passed"
    assert list(tmp_path.iterdir()) == []


def test_the_reason_is_never_the_codes_own_words() -> None:
    secret = "class Leak(Exception): pass\nLeak.__name__ = 'password123'\nraise Leak('password123')"
    assert outcome(secret) == Verdict("failed", "Exception")


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=60))
def test_whatever_an_answer_is_its_code_is_text(answer: str) -> None:
    assert isinstance(program(ADD, answer), str)


# --- Prompts and runs ---


def test_humanevals_keys_make_problems() -> None:
    found = prompts.load(PromptFile(file=str(LIKE)))
    assert [p.id for p in found] == ["own/0", "own/1", "own/2"]
    assert found[0].text == found[0].problem.prompt == LINES[0]["prompt"]
    assert (found[0].problem.entry_point, found[0].problem.test) == ("add_all", LINES[0]["test"])


@pytest.mark.parametrize("lacking", ["prompt", "entry_point"])
def test_a_test_without_what_it_needs_is_one_line(tmp_path: Path, lacking: str) -> None:
    line = {**LINES[0], "turns": ["Write it."]}
    del line[lacking]
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match=r'p\.jsonl:1: has a "test", which needs "prompt"'):
        prompts.load(PromptFile(file=str(tmp_path / "p.jsonl")))


def test_code_is_run_only_where_the_scenario_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_run import QUIET, wanted
    from zbench.metrics import load_run
    from zbench.results import Results

    monkeypatch.setattr("zbench.hardware.roofs.load_or_measure", lambda *_, **__: None)
    # Whatever a random model writes is a comment up to its first line end, or else no code.
    easy = {**LINES[0], "prompt": "def f(x):\n    return x\n\n# ", "entry_point": "f", "test": "def check(f): f(1)\n"}
    never = {**LINES[0], "task_id": "never", "test": "def check(f): assert False\n"}
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, (easy, never))))
    asked = (f"prompts={{file: {tmp_path / 'p.jsonl'}}}", "engines=[autoregressive]", "repeats=1", "context=null")

    off = run.run(wanted(tmp_path, *asked), tmp_path / "off", QUIET)
    assert {r.verdict for t in run.read_trials(off.folder)[0] for r in t.requests} == {None}
    on = run.run(wanted(tmp_path, *asked, "accuracy.execute_generated_code=true"), tmp_path / "on", QUIET)
    verdicts = {r.prompt_id: (r.passed, r.verdict) for t in run.read_trials(on.folder)[0] for r in t.requests}
    assert verdicts["never"][0] is False and verdicts["never"][1].startswith("failed")
    assert verdicts["own/0"][1] == "passed" or not verdicts["own/0"][0]
    assert run.read_manifest(on.folder).environment["generated_code"] == {"confined": codejudge.CONFINED}
    results = Results.of(load_run(on.folder))
    assert results.value(results.run.cells[0], "pass_at_1") == sum(passed for passed, _ in verdicts.values()) / 2
    results = Results.of(load_run(off.folder))
    assert "no code was run" in results.row(results.run.cells[0], "pass_at_1").note
    with pytest.raises(UserError, match="no prompt has tests"):
        run.run(wanted(tmp_path, "accuracy.execute_generated_code=true"), tmp_path / "none", QUIET)


def test_pass_at_1_takes_the_first_repeat_with_wilsons_interval(tmp_path: Path) -> None:
    from dataclasses import replace

    from scipy.stats import binomtest

    from tests.report.synthetic import write_run
    from zbench.metrics import load_run
    from zbench.report import render
    from zbench.results import Results

    folder = write_run(tmp_path / "run", engines=("autoregressive",), prompts=8, repeats=2, tokens=8)
    trials = [TrialRecord.from_json(line) for line in (folder / "trials.jsonl").read_text().splitlines()]

    def judged(unknown: int) -> Results:
        """The first repeat of the last prompts could not be judged; the second passes all that the first did not."""
        changed = []
        for t in trials:
            passed = (t.group < 6) == (t.repeat == 0) if t.repeat or t.group < 8 - unknown else None
            why = "an argument is no plain value" if t.group < 7 else "its tests do not load: KeyError"
            verdict = f"not judged {why}" if passed is None else "passed" if passed else "failed"
            requests = (replace(r, passed=passed, verdict=verdict) for r in t.requests)
            changed.append(replace(t, requests=tuple(requests)))
        (folder / "trials.jsonl").write_text("".join(t.to_json() + "\n" for t in changed))
        return Results.of(load_run(folder))

    results = judged(8)
    why = "8 of 8 prompts are not judged: an argument is no plain value; its tests do not load: KeyError"
    assert results.row(results.run.cells[0], "pass_at_1").note == f"unavailable: {why}"
    results = judged(2)
    row = results.row(results.run.cells[0], "pass_at_1")
    assert (row.value, row.n, row.note) == (1.0, 6, why.replace("8 of", "2 of"))
    results = judged(0)
    row = results.row(results.run.cells[0], "pass_at_1")
    expected = binomtest(6, 8).proportion_ci(0.95, method="wilson")
    assert (row.value, row.low, row.high, row.n) == (0.75, pytest.approx(expected.low), pytest.approx(expected.high), 8)
    assert "Code that passes" in render(folder).read_text()


def test_a_system_that_cannot_confine_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    codejudge.confinement.cache_clear()
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(UserError, match="Linux"):
        codejudge.confinement()
    monkeypatch.undo()
    monkeypatch.setattr(codejudge, "_run", lambda *_: "unconfined no seccomp")
    with pytest.raises(UserError, match=r"cannot be confined on this system \(no seccomp\), so it is not run"):
        judge(ADD, "    return a + b\n", LIMITS)
