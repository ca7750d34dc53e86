"""Would the tests notice if the method were wrong? One change at a time, they must fail.

    python audit/mutations.py [WORD ...] [--list] [--rows] [--jobs N]

WORD: only changes whose row, file or text holds it. --list: say them, run nothing. --rows: for each
row of the README's audit table, how many changes there are and the tests that must fail.

The changes stand in table.txt. Each is made in a copy of the tree without anything beside it, so
that what needs other people's numbers skips there and proves nothing. Then the tests that it names
run, each must fail, and in its own body: not in an import, a fixture or on an unknown name. First
all of them must pass on the copy as it is. A change that no longer fits the code is an error.
Exit code 1 if a change survives, 2 if the table is wrong.
"""

import argparse
import gc
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120  # a change may take; more counts as survived
UNFAIR = ("NameError", "ImportError", "ModuleNotFoundError", "SyntaxError", "AttributeError")


def changes():
    """Every change of table.txt: (row, file, old text, new text, names of tests)."""
    row = file = tests = None
    old, new = [], []
    lines = (ROOT / "audit" / "table.txt").read_text("utf-8").splitlines()
    for line in [*lines[lines.index("") :], "# end"]:
        kind, text = line[:1], line[2:]
        if new and kind != "+":
            yield row, file, "\n".join(old), "\n".join(new), tests
            old, new = [], []
        if kind == "#":
            row = text
        elif kind == "@":
            file, *tests = text.split()
        elif kind:
            (old if kind == "-" else new).append(text)


def shown(change):
    row, file, old, new, tests = change
    flat = " ".join(f"{old} -> {new or 'nothing'}".split())
    return f"{file}: {flat:.150}  [{' '.join(tests)}]"


def test_files():
    """{name of a test: its file}."""
    files = [ROOT / "test_msd.py", *sorted((ROOT / "tests").glob("test_*.py"))]
    named = re.compile(r"^def (test_\w+)", re.M)
    return {
        name: f.relative_to(ROOT).as_posix()
        for f in files
        for name in named.findall(f.read_text("utf-8"))
    }


def faults(table, where):
    """What is wrong with the table itself, a line each."""
    texts = {file: (ROOT / file).read_text("utf-8") for _, file, *_ in table}
    for change in table:
        _, file, old, new, tests = change
        if texts[file].count(old) != 1:
            yield f"old text found {texts[file].count(old)} times: {shown(change)}"
        if old == new:
            yield f"changes nothing: {shown(change)}"
        if unknown := set(tests) - set(where):
            yield f"no such test, {' '.join(sorted(unknown))}: {shown(change)}"


def copy_tree(place):
    """The files of the project, and nothing beside them."""
    skip = shutil.ignore_patterns(".*", "__pycache__", "runs", "results", "node_modules")
    shutil.copytree(ROOT, place, ignore=skip)
    (place / "results").mkdir()


# ------------------------------------------------------------------------------ one run of pytest
class Outcome:
    """A pytest plugin: what became of each test, "passed", "skipped" or how it failed."""

    def __init__(self):
        self.seen = {}

    def pytest_exception_interact(self, node, call, report):
        self.seen.setdefault(getattr(node, "originalname", node.name), []).append(
            f"{report.when}: {call.excinfo.typename}"
        )

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and not report.failed or report.skipped:
            name = report.nodeid.split("::")[-1].split("[")[0]
            self.seen.setdefault(name, []).append(report.outcome)


def run_tests(place, ids, stop, answer, changed=None):
    """In a process of its own: the tests `ids` of a copy; writes {test: outcomes} as JSON."""
    import pytest

    os.setsid()
    out = os.open(f"{answer}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.chdir(place)
    if changed:
        compile(changed.read_bytes(), changed, "exec")
    sys.path[:] = [str(place), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    outcome = Outcome()
    # Asserts as they are, and no plugin that sweeps the memory: half of the time otherwise.
    without = [x for p in ("cacheprovider", "unraisableexception") for x in ("-p", f"no:{p}")]
    flags = ["-q", "--assert=plain", "--tb=short", *without, f"--basetemp={answer}.tmp"]
    pytest.main([*flags, *["-x"] * stop, *ids], plugins=[outcome])
    Path(answer).write_text(json.dumps(outcome.seen), "utf-8")


class Worker:
    """One copy of the tree and at most one process that runs tests in it."""

    def __init__(self, folder, number):
        self.place, self.answer = folder / f"copy{number}", folder / f"answer{number}"
        copy_tree(self.place)
        self.process = None

    def start(self, job, ids, stop=True, changed=None):
        """Run tests; changed: (file, text) of the copy, until the outcome is asked for."""
        self.job, self.begun, self.restore = job, time.monotonic(), None
        self.answer.unlink(missing_ok=True)
        if changed:
            file, text = self.place / changed[0], changed[1]
            self.restore = file, file.read_bytes(), file.stat()
            file.write_text(text, "utf-8")
        sys.stdout.flush()
        self.process = os.fork()
        if not self.process:
            try:
                run_tests(self.place, ids, stop, self.answer, changed and file)
            finally:
                os._exit(0)

    def done(self):
        """Has the process ended, or been ended for taking too long?"""
        if os.waitpid(self.process, os.WNOHANG)[0]:
            self.process = None
        elif time.monotonic() - self.begun > SECONDS:
            os.killpg(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            self.process = None
        return self.process is None

    def outcome(self):
        """{test: outcomes}, None where the process gave none; the copy is as it was again."""
        if self.restore:
            file, content, stat = self.restore
            file.write_bytes(content)
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # what is compiled goes by it
        return json.loads(self.answer.read_text("utf-8")) if self.answer.exists() else None


def share_out(workers, jobs, begin, end):
    """Run all jobs, one a worker at a time: begin(worker, job), then end(worker, job)."""
    jobs, idle = deque(jobs), list(workers)
    while jobs or len(idle) < len(workers):
        while jobs and idle:
            worker = idle.pop()
            begin(worker, jobs.popleft())
        for worker in workers:
            if worker not in idle and worker.done():
                end(worker, worker.job)
                idle.append(worker)
        time.sleep(0.005)


def verdict(change, seen):
    """None where every named test failed in its own body, else why that is not so."""
    for name in change[4]:
        found = sorted(set((seen or {}).get(name, ["no outcome: no Python, or too slow"])))
        failed = {x.removeprefix("call: ") for x in found if x.startswith("call: ")}
        if not failed:
            return f"{name}: {', '.join(found)}"
        if failed <= set(UNFAIR):
            return f"{name} failed for another reason: {', '.join(failed)}"
    return None


# --------------------------------------------------------------------------------------- the whole
def check_clean(workers, tests, where):
    """The tests that do not pass on the tree as it is: {test: outcomes}."""
    wrong = {}

    def end(worker, names):
        seen = worker.outcome() or {}
        wrong.update({n: seen.get(n) for n in names if set(seen.get(n, ())) != {"passed"}})

    parts = [tests[i :: len(workers)] for i in range(len(workers))]
    share_out(
        workers,
        [p for p in parts if p],
        lambda w, names: w.start(names, [f"{where[n]}::{n}" for n in names], stop=False),
        end,
    )
    return wrong


def try_all(workers, table, where):
    """{index of a change that survived: why}."""
    survived = {}

    def begin(worker, i):
        _, file, old, new, tests = table[i]
        text = (worker.place / file).read_text("utf-8").replace(old, new)
        worker.start(i, [f"{where[t]}::{t}" for t in tests], len(tests) == 1, (file, text))

    def end(worker, i):
        if why := verdict(table[i], worker.outcome()):
            survived[i] = why
            print(f"SURVIVED  {shown(table[i])}\n          {why}", flush=True)

    share_out(workers, range(len(table)), begin, end)
    return survived


def rows_of(table):
    """{row: (number of changes, tests in order of their first use)}."""
    rows = {}
    for row, *_, tests in table:
        n, known = rows.get(row, (0, {}))
        rows[row] = n + 1, known | dict.fromkeys(tests)
    return rows


def warm_up():
    """Import once what every process needs and no change touches; a fork then has it."""
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ["OMP_NUM_THREADS"] = "1"
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import tokenizers  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401
    import torch.nn.parallel  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # what was imported is never garbage
    sys.dont_write_bytecode = False


def run(table, where, jobs):
    """Try a table's changes and say what became of them; returns the exit code."""
    begun = time.monotonic()
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        workers = [Worker(Path(folder), i) for i in range(min(jobs, len(table)))]
        if wrong := check_clean(workers, sorted({t for c in table for t in c[4]}), where):
            print(*(f"does not pass as it is: {k}: {v}" for k, v in wrong.items()), sep="\n")
            return 2
        sys.dont_write_bytecode = True  # what was compiled is of the code as it is
        clean = time.monotonic() - begun
        print(f"{len(table)} changes; the tests as they are: {clean:.0f} s", flush=True)
        survived = try_all(workers, table, where)
    left = Counter(table[i][0] for i in survived)
    for row, (n, _) in rows_of(table).items():
        print(f"{n - left[row]:4} of {n:3} killed  {row}")
    seconds = time.monotonic() - begun
    print(f"{len(table) - len(survived)} of {len(table)} changes killed, {seconds:.0f} s")
    return 1 if survived else 0


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("words", nargs="*", metavar="WORD")
    ap.add_argument("--list", action="store_true")
    ap.add_argument("--rows", action="store_true")
    has_limits = hasattr(os, "sched_getaffinity")  # not macOS
    cores = len(os.sched_getaffinity(0)) if has_limits else os.cpu_count()
    ap.add_argument("--jobs", type=int, default=cores)
    args = ap.parse_args()
    table, where = list(changes()), test_files()
    if wrong := list(faults(table, where)):
        print(*wrong, sep="\n")
        return 2
    table = [c for c in table if all(w in " ".join(map(str, c)) for w in args.words)]
    if args.list:
        print(*(f"{c[0]}\n    {shown(c)}" for c in table), sep="\n")
    elif args.rows:
        rows = rows_of(table).items()
        print(*(f"{n:4}  {row}\n      {', '.join(tests)}" for row, (n, tests) in rows), sep="\n")
    else:
        return run(table, where, args.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
