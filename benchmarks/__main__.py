"""`resprout bench`: run a suite or a simulation, and sum up what is finished."""

import inspect
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from ..training.__main__ import OneLineParser, UsageError, first_line
from ..training.files import check_file, check_folder
from ..training.specs import nearest
from . import draw_counts, ray_
from .compare import compare
from .results_ import RESULTS, add, paths, read_finished
from .runner import is_finished, run_all, runs
from .sheet import Sheet
from .suites import SUITES
from .tables import check_rows, command, gather, returns_of, rows_sheet, sheets

SIMULATIONS = {"errr-counts": "Fujita (2025), arXiv 2503.02269: draws of a transition over its life, all samplers"}
USAGE = """\
resprout bench run SUITE [--jobs N | --ray ADDRESS] [--budget laptop|paper] [--out DIR] [FLAG ...]     run what is not finished yet
resprout bench table SUITE [--out DIR] [--results DIR] [--tasks TASK ...] [--markdown] [--rows]     sum up what is finished
resprout bench report SUITE --html FILE [--out DIR] [--results DIR]                   the same with curves, in one HTML file
resprout bench add SUITE DIR|FILE.csv [--results DIR]                                 put finished runs into the results
resprout bench compare RUN_DIR RUN_DIR                                                two runs side by side
"""
ACTIONS = ("run", "table", "report", "add", "compare")
HELP = ("-h", "--help")
WIDE = 10_000  # columns, more than any table of ours has


def names() -> list[tuple[str, str]]:
    """Name and source of everything that can be run."""
    return [*((name, first_line(suite.__doc__)) for name, suite in SUITES.items()), *SIMULATIONS.items()]


def bench(arguments: list[str]) -> int:
    """`arguments` after `resprout bench`; the result is the exit code. ValueError, in one line, for bad input."""
    known = [name for name, _ in names()]
    action, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if action in HELP or (action in ACTIONS and action != "compare" and rest and rest[0] in HELP):
        print(f"{USAGE}\nsuites: {', '.join(known)}; `resprout bench run SUITE --help` for the flags of one")
        return 0
    if action not in ACTIONS:
        raise UsageError(f"cannot {action!r}; resprout bench {'|'.join(ACTIONS)}")
    if action == "compare":
        return compare_runs(rest)
    if not rest or rest[0].startswith("-"):
        raise UsageError(f"which suite? resprout bench {action} SUITE; there are: {', '.join(known)}")
    name, flags = rest[0], rest[1:]
    if name not in known:
        raise UsageError(f"unknown suite {name!r}{nearest(name, known)}; there are: {', '.join(known)}")
    console = standard_output()
    if name in SIMULATIONS:
        if action != "run":
            raise UsageError(f"{name} is a simulation and prints its table itself: resprout bench run {name}")
        return run_draw_counts(flags, console)
    actions = {"run": run_suite, "table": table_of_suite, "report": report_of_suite, "add": add_to_results}
    return actions[action](name, flags, console)


def run_suite(name: str, flags: list[str], console: Console) -> int:
    suite = SUITES[name]()
    parser = OneLineParser(prog=f"resprout bench run {name}", description=first_line(SUITES[name].__doc__))
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores")
    where.add_argument("--ray", metavar="ADDRESS", help="on a Ray cluster: HOST:PORT, auto, or local to start one here")
    parser.add_argument("--cpus-per-run", type=int, default=1, metavar="N", help="with --ray")
    parser.add_argument("--gpus-per-run", type=float, default=0.0, metavar="N", help="with --ray; below 1, runs share")
    parser.add_argument(
        "--seeds-together",
        action="store_true",
        help="those of an arm on a task in one process, side by side: faster on an accelerator",
    )
    parser.add_argument("--budget", choices=list(suite.steps), default="laptop", help=f"agent steps: {suite.steps}")
    parser.add_argument("--steps", type=int, help="agent steps of every run, instead of the budget's")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=list(suite.arms),
        default=list(suite.arms),
        metavar="ARM",
        help=f"some of {', '.join(suite.arms)}",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=suite.tasks,
        metavar="TASK",
        help=f"some of {', '.join(suite.tasks)}; {few(suite.laptop_tasks)}",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="SEED",
        help=f"{few(suite.laptop_seeds)}, or {', '.join(map(str, suite.seeds))}",
    )
    parser.add_argument("--keep-replay", action="store_true", help="of finished runs, so that they can be made longer")
    parser.add_argument("--out", type=Path, default=Path("runs", name), help="default: %(default)s")
    asked = parser.parse_args(flags)
    if asked.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, not {asked.jobs}")
    if asked.seeds_together and asked.ray:
        raise UsageError("--seeds-together is for processes of this machine, not for --ray")
    check_once(asked.arms, asked.tasks or (), asked.seeds or ())
    check_folder("--out", asked.out)
    steps = suite.steps[asked.budget] if asked.steps is None else asked.steps
    tasks, seeds = asked.tasks or suite.tasks_of(asked.budget), asked.seeds or suite.seeds_of(asked.budget)
    every = runs(suite, asked.arms, tasks, seeds, steps, asked.out, asked.budget)
    pending = [run for run in every if not is_finished(run)]
    console.print(f"{len(every)} runs of {steps} agent steps, {len(every) - len(pending)} of them finished")
    if asked.ray is None:
        failures = run_all(pending, asked.jobs, asked.keep_replay, console, asked.seeds_together)
    else:
        needs = ray_.Needs(asked.cpus_per_run, asked.gpus_per_run)
        failures = ray_.run_all(pending, asked.out, asked.ray, needs, asked.keep_replay, console)
    for failure in failures:
        console.print(f"failed: {failure.run}: {failure.last_words} ({failure.log})", markup=False)
    if failures:
        return 1
    try:
        print_sheets(sheets(suite, *gather(name, suite, asked.out, None)), console)
    except ValueError as problem:  # all runs are done; they cannot be summed up beside those that were there before
        console.print(f"no table: {problem}", markup=False)
    return 0


def check_once(*chosen: Sequence[object]) -> None:
    """UsageError where something is asked for twice."""
    for values in chosen:
        for value in values:
            if list(values).count(value) > 1:
                raise UsageError(f"{value} is given twice")


def few(laptop: Sequence[object]) -> str:
    """What a flag that is not given means."""
    return f"by default {', '.join(map(str, laptop))} at the laptop's budget" if laptop else "by default all"


def table_of_suite(name: str, flags: list[str], console: Console) -> int:
    suite = SUITES[name]()
    parser = OneLineParser(prog=f"resprout bench table {name}", description=first_line(SUITES[name].__doc__))
    add_source_flags(parser, name)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--rows", action="store_true", help="directory, digest and commit of every run instead")
    parser.add_argument(
        "--tasks", nargs="+", choices=suite.tasks, metavar="TASK", help="what is finished on these alone"
    )
    asked = parser.parse_args(flags)
    rows, points = gather(name, suite, *where_from(name, asked))
    if asked.tasks:
        rows = [row for row in rows if row.task in asked.tasks]
        points = [point for point in points if point.task in asked.tasks]
        if not rows:
            raise UsageError(f"no run of {name} is finished on {' '.join(asked.tasks)}")
    made = [rows_sheet(rows, returns_of(suite, rows, points))] if asked.rows else sheets(suite, rows, points)
    print_sheets(made, console, asked.markdown)
    said = command(name, suite, rows)
    print(f"`{said}`") if asked.markdown else console.print(f"runs of: {said}", markup=False, soft_wrap=True)
    return 0


def report_of_suite(name: str, flags: list[str], console: Console) -> int:
    parser = OneLineParser(prog=f"resprout bench report {name}", description="Tables and curves in one HTML file.")
    parser.add_argument("--html", type=Path, required=True, metavar="FILE", help="written whole or not at all")
    add_source_flags(parser, name)
    asked = parser.parse_args(flags)
    check_file("--html", asked.html)
    check_folder("--html", asked.html.parent)  # where it takes the place of an older one
    from .report import write_report

    write_report(asked.html, name, SUITES[name](), inspect.getdoc(SUITES[name]) or "", *where_from(name, asked))
    console.print(f"report: {asked.html}", markup=False, soft_wrap=True)
    return 0


def add_source_flags(parser: ArgumentParser, name: str) -> None:
    default = Path("runs", name)
    parser.add_argument("--out", type=Path, help=f"run directories; {default} if a run is finished there")
    parser.add_argument("--results", type=Path, help=f"folder with {name}.csv; otherwise the repository's")


def where_from(name: str, asked: Namespace) -> tuple[Path | None, Path | None]:
    """Run directories and folder of results that are meant."""
    if asked.out is not None or asked.results is not None:
        return asked.out, asked.results
    default = Path("runs", name)
    stored = paths(name)[0].exists() and not any(default.glob("*/*/*/summary.json"))
    return (None, RESULTS) if stored else (default, None)


def standard_output() -> Console:
    """A file or a pipe has no width that tables must fit."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    return console


def print_sheets(made: list[Sheet], console: Console, markdown: bool = False) -> None:
    for sheet in made:
        if markdown:
            print(sheet.markdown())
        else:
            sheet.print(console)


def add_to_results(name: str, flags: list[str], console: Console) -> int:
    suite = SUITES[name]()
    parser = OneLineParser(prog=f"resprout bench add {name}", description="Put finished runs into the results.")
    parser.add_argument("source", type=Path, help="directory of bench run, or somebody's table of this suite, .csv")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the suite's table; the repository's")
    asked = parser.parse_args(flags)
    check_folder("--results", asked.results)
    rows, points = read_finished(asked.source, name, suite.arms, suite.width)
    bare = {row.key[1:] for row in rows} - {point[:3] for point in points}
    if bare and suite.fresh:
        one = " ".join(map(str, min(bare)))
        raise UsageError(f"{asked.source} has no curve of {one}, and runs of {name} are measured by their curves")
    table = paths(name, asked.results)[0]
    new = add(rows, points, name, asked.results, partial(check_rows, name, suite))
    said = f"{table}: {new} runs added, {len(rows) - new} were there already"
    console.print(said + f"; {len(bare)} without a curve" * bool(bare), markup=False, soft_wrap=True)
    return 0


def compare_runs(flags: list[str]) -> int:
    parser = OneLineParser(prog="resprout bench compare", description="Two runs side by side.")
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN_DIR")
    parser.add_argument("--markdown", action="store_true")
    asked = parser.parse_args(flags)
    print_sheets(compare(*asked.runs), standard_output(), asked.markdown)
    return 0


def run_draw_counts(flags: list[str], console: Console) -> int:
    size = draw_counts.Simulation()
    parser = OneLineParser(
        prog="resprout bench run errr-counts",
        description=SIMULATIONS["errr-counts"],
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--capacity", type=int, default=size.capacity, help="transitions in the ring")
    parser.add_argument("--batch-size", type=int, default=size.batch_size, help="transitions")
    parser.add_argument("--period", type=int, default=size.period, help="agent steps between batches")
    parser.add_argument("--learning-starts", type=int, default=size.learning_starts, help="agent steps")
    parser.add_argument("--lives", type=int, default=size.lives, help="transitions that are followed to their end")
    parser.add_argument("--spread", type=float, default=size.spread, help="standard deviation of log(priority)")
    parser.add_argument("--seed", type=int, default=size.seed, help="of the draws and the priorities")
    known = list(draw_counts.SAMPLERS)
    parser.add_argument("--samplers", nargs="+", choices=known, default=known, metavar="SAMPLER", help="some of them")
    parser.add_argument("--out", type=Path, default=Path("runs", "errr-counts"), help="directory")
    asked = vars(parser.parse_args(flags))
    samplers, out = asked.pop("samplers"), asked.pop("out")
    check_once(samplers)
    check_folder("--out", out)
    if there := [name for name in draw_counts.FILES if (out / name).exists()]:
        raise UsageError(f"{out / there[0]} exists already; give another --out")
    draw_counts.run(draw_counts.Simulation(**asked), samplers, out, console)
    return 0


if __name__ == "__main__":
    sys.exit(bench(sys.argv[1:]))
