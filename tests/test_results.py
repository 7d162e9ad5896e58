"""Rows and curves of finished runs, on a real run and on copies of it: written, read, added, summed up, compared."""

import dataclasses
import io
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from resprout.agents import DQN
from resprout.benchmarks import __main__ as bench_command
from resprout.benchmarks import results_ as results
from resprout.benchmarks import tables
from resprout.benchmarks.compare import compare
from resprout.benchmarks.published_ import Column
from resprout.benchmarks.runner import run_directory
from resprout.benchmarks.sheet import Sheet, verdict
from resprout.benchmarks.stats import Interval
from resprout.benchmarks.suites import SUITES, Suite
from resprout.training import Experiment, train
from resprout.training import __main__ as command_line
from resprout.training.metrics import read_metrics

SMALL = DQN(warmup=100, batch_size=8, hidden=(8,), capacity=300, epsilon_decay_steps=100)
CARTPOLE = Experiment(
    agent=SMALL,
    env="gym/CartPole-v1",
    eval_episodes=2,
    eval_every=50,
    log_every=10,
)
FIRST, SECOND = "gym/CartPole-v1", "gym/Acrobot-v1"
TINY = Suite(
    arms={"a": CARTPOLE, "b": dataclasses.replace(CARTPOLE, replay="reshuffled")},
    tasks=(FIRST, SECOND),
    seeds=(0, 1, 2),
    steps={"laptop": 150, "paper": 300},
    baselines={"b": "a"},
)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A run of the first arm on the first task, seed 0, as `bench run` would make it."""
    out = tmp_path_factory.mktemp("tiny")
    directory = run_directory(out, "a", FIRST, 0)
    train(TINY.experiment("a", FIRST, 0, 150, str(directory)), quiet=True)
    return directory


@pytest.fixture
def finish(real, tmp_path):
    """Copies of that run as another arm, task, seed, length and return."""

    def make(
        arm: str, task: str, seed: int, value: float | None, steps: int = 150, out: Path = tmp_path / "out"
    ) -> Path:
        directory = run_directory(out, arm, task, seed)
        shutil.copytree(real, directory)
        experiment = TINY.experiment(arm, task, seed, steps, str(directory))
        config, summary = (json.loads((directory / name).read_text()) for name in ("config.json", "summary.json"))
        config |= {"experiment": experiment.to_json(), "digest": experiment.digest()}
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "summary.json").write_text(json.dumps(summary | {"return": value, "agent_steps": steps}))
        return directory

    return make


def rendered(sheets) -> str:
    console = Console(file=io.StringIO(), width=200)
    for sheet in sheets:
        sheet.print(console)
    return console.file.getvalue()


def sheets_of(suite, rows):
    return tables.sheets(suite, rows, [])


def summed_up(out, suite=TINY, stored=None) -> str:
    return rendered(tables.sheets(suite, *tables.gather("tiny", suite, out, stored)))


def paired_of(folder, suite=TINY):
    """The table of paired differences of the last evaluations."""
    made = tables.sheets(suite, *tables.gather("tiny", suite, folder / "out", None))
    (paired,) = [sheet for sheet in made if sheet.title.startswith(f"{tables.PAIRS}, last evaluation: ")]
    return paired


# Rows and curves


def test_a_row_says_what_the_run_says(real):
    row = results.row_of(real, "tiny", "a")
    summary = json.loads((real / "summary.json").read_text())
    config = json.loads((real / "config.json").read_text())
    assert (row.task, row.seed, row.agent_steps, row.protocol) == (FIRST, 0, 150, "")
    assert row.final_return == np.mean(summary["episode_returns"]) and row.episodes == 2
    assert row.gradient_steps == summary["gradient_steps"] > 0
    assert row.digest == TINY.experiment("a", FIRST, 0, 150, "").digest() == config["digest"]
    assert (row.commit, row.resprout, row.jax) == (
        config["git_commit"] or "",
        config["versions"]["resprout"],
        config["versions"]["jax"],
    )
    assert row.directory == f"{real.parents[2].name}/a/gym-CartPole-v1/s0"
    assert len(row.finished) == 10


def test_an_atari_row_has_its_protocol(real, tmp_path):
    for given, said in ((None, "dopamine"), ("atari100k", "atari100k")):
        shutil.copytree(real, tmp_path / said)
        config = json.loads((real / "config.json").read_text())
        config["experiment"] |= {"env": "atari/Pong", "protocol": given}
        (tmp_path / said / "config.json").write_text(json.dumps(config))
        assert results.row_of(tmp_path / said, "tiny", "a").protocol == said


def test_curves_are_means_over_equal_parts_of_the_run(real):
    row = results.row_of(real, "tiny", "a")
    points = results.curve_points(real, row)
    by_metric = {}
    for point in points:
        by_metric.setdefault(point.metric, {})[point.step] = point.value
    assert set(by_metric) == {"eval/return", "episode/return"}
    lines = read_metrics(real / "metrics.jsonl")
    evaluated = {line["step"]: line["eval/return"] for line in lines if "eval/return" in line}
    # 20 parts of 7.5 agent steps: 50 lies in the seventh, which ends at 52
    assert by_metric["eval/return"] == {52: evaluated[50], 105: evaluated[100], 150: evaluated[150]}


def test_a_part_of_a_curve_is_the_mean_of_what_lies_in_it(real, tmp_path):
    shutil.copytree(real, tmp_path / "run")
    """A mean over episodes where they are counted, not over lines."""
    lines = [
        {"step": step, "episode/return": value, "episode/count": count, "eval/return": value}
        for step, value, count in ((1, 1.0, 2), (5, 3.0, 1), (10, 8.0, 1), (11, 7.0, 3))
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = dataclasses.replace(results.row_of(real, "tiny", "a"), agent_steps=200)
    assert [point[3:] for point in results.curve_points(tmp_path / "run", row)] == [
        (10, "episode/return", 3.25),
        (10, "eval/return", 4.0),
        (20, "episode/return", 7.0),
        (20, "eval/return", 7.0),
    ]


def test_what_a_report_draws_is_kept_and_nothing_else(real, tmp_path):
    shutil.copytree(real, tmp_path / "run")
    kept = [
        "dormant/post/tau0/critic",
        "dormant/post/tau0.1/actor",
        "fau/critic",
        "srank/critic",
        "effective_rank/critic",
    ]
    kept += ["adaptive_replay_ratio/replay_ratio"]
    left = ["critic/loss", "eval/return_std", "dormant/grad/tau0.05/critic", "stable_rank/critic", "steps_per_second"]
    line = {"step": 10, **dict.fromkeys([*kept, *left], 0.5), "fau/none": None}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    points = results.curve_points(tmp_path / "run", results.row_of(real, "tiny", "a"))
    assert sorted(point.metric for point in points) == sorted(kept)


def test_files_hold_what_was_written_and_say_the_same_in_any_order(real, finish, tmp_path):
    rows = [results.row_of(finish("b", FIRST, 1, None), "tiny", "b"), results.row_of(real, "tiny", "a")]
    points = results.curve_points(real, rows[1])
    table, curves = results.paths("tiny", tmp_path)
    results.write_rows(table, rows)
    results.write_curves(curves, points)
    once = table.read_bytes(), curves.read_bytes()
    read = results.read_rows(table)
    assert np.isnan(read[1].final_return) and read[0].key == ("tiny", "a", FIRST, 0)
    for field in dataclasses.fields(results.Row):
        value = getattr(rows[1], field.name)
        assert getattr(read[0], field.name) == (
            pytest.approx(value, rel=1e-9, nan_ok=True) if field.type is float else value
        )
    drawn = {point[:5]: point.value for point in results.read_curves(curves)}
    assert drawn == {point[:5]: pytest.approx(point.value, rel=1e-4) for point in points}
    results.write_rows(table, reversed(read))
    results.write_curves(curves, reversed(points))
    assert (table.read_bytes(), curves.read_bytes()) == once
    assert str(tmp_path) not in table.read_text()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text.replace("schema,suite", "suite"), "has no column schema"),
        (lambda text: text.replace("\n2,", "\n3,"), "schema '3' is not 1 or 2"),
        (lambda text: text + text.partition("\n")[2], "lines 2 and 3: tiny a gym/CartPole-v1 0 is there twice"),
        (lambda text: re.sub(r",150,(\d+),[^,]*,", r",150,\1,inf,", text), "cannot be read: inf is not finite"),
        (lambda text: text + '"' + "x" * 200_000, "field larger than field limit"),
        (lambda text: text.encode() + b"\xff", "can't decode byte 0xff"),
        (lambda text: text.replace(",150,", ",many,"), "cannot be read: invalid literal"),
        (lambda text: text.rpartition(",")[0], "line 2: not as many values as columns"),
        (lambda text: "", "has no column schema"),
    ],
)
def test_a_table_that_is_none_is_one_line(edit, message, real, tmp_path):
    path = tmp_path / "tiny.csv"
    results.write_rows(path, [results.row_of(real, "tiny", "a")])
    text = edit(path.read_text())
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        results.read_rows(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_part_of_a_curve_that_is_there_twice_is_one_line(real, tmp_path):
    path = tmp_path / "tiny-curves.csv"
    results.write_curves(path, results.curve_points(real, results.row_of(real, "tiny", "a")))
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    with pytest.raises(ValueError, match=r"lines \d+ and \d+: a gym/CartPole-v1 0 150 is there twice"):
        results.read_curves(path)


def test_rows_of_the_first_schema_are_read(real, tmp_path):
    """They had no column for what is behind the environment."""
    path, row = tmp_path / "tiny.csv", results.row_of(real, "tiny", "a")
    assert row.environment.startswith("gymnasium 1.")
    results.write_rows(path, [row])
    lines = [line.rpartition(",")[0] for line in path.read_text().splitlines()]
    assert lines[0].endswith(",finished")
    path.write_text("\n".join([lines[0], "1" + lines[1][1:], ""]))
    (read,) = results.read_rows(path)
    assert read.environment == "" and read.digest == row.digest
    results.write_rows(path, [read])
    assert results.read_rows(path)[0].environment == ""


def test_a_damaged_run_is_one_line(real, tmp_path):
    for name, edit in (
        ("summary.json", lambda summary: summary | {"agent_steps": None}),
        ("summary.json", lambda summary: [summary]),
        ("config.json", lambda config: config | {"experiment": config["experiment"] | {"env": 3}}),
        ("metrics.jsonl", lambda line: line | {"wall_clock": 1e300}),
        ("metrics.jsonl", lambda line: line | {"episode/return": 1.0, "episode/count": None}),
        ("metrics.jsonl", lambda line: line | {"eval/return": "much"}),
        ("metrics.jsonl", lambda line: line | {"eval/return": 1.0, "step": "late"}),
    ):
        shutil.copytree(real, tmp_path / "a" / "task" / "s0")
        path = tmp_path / "a" / "task" / "s0" / name
        first, *others = path.read_text().splitlines() if name.endswith("l") else [path.read_text()]
        path.write_text("\n".join([json.dumps(edit(json.loads(first))), *others, ""]))
        with pytest.raises(ValueError, match="s0 is no finished run") as error:
            results.read_finished(tmp_path, "tiny", ["a"])
        assert "\n" not in str(error.value)
        shutil.rmtree(tmp_path / "a")


def test_two_directories_of_one_run_are_refused(finish, tmp_path):
    directory = finish("a", FIRST, 0, 1.0)
    shutil.copytree(directory, directory.with_name("s0-copy"))
    with pytest.raises(ValueError, match=r"/s0 and .*/s0-copy are runs of the same arm, task and seed"):
        results.read_finished(tmp_path / "out", "tiny", ["a"])


def test_an_unfinished_run_has_no_row(real, tmp_path):
    shutil.copytree(real, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(ValueError, match="run is no finished run"):
        results.row_of(tmp_path / "run", "tiny", "a")


# Adding


@pytest.fixture
def tiny(monkeypatch):
    """TINY as a suite that the command line knows."""

    def suite() -> Suite:
        """A suite of tests."""
        return TINY

    monkeypatch.setitem(SUITES, "tiny", suite)
    return lambda *arguments: command_line.dispatch(["bench", *map(str, arguments)])


def test_add_puts_in_what_is_new_and_leaves_what_is_there(tiny, finish, tmp_path, capsys):
    finish("a", FIRST, 0, 10.0)
    out, folder = tmp_path / "out", tmp_path / "results"
    assert tiny("add", "tiny", out, "--results", folder) == 0
    assert "1 runs added, 0 were there already" in " ".join(capsys.readouterr().out.split())
    shutil.rmtree(out)
    finish("a", FIRST, 0, 99.0)  # a second run of what is there already
    finish("b", FIRST, 0, 20.0)
    assert tiny("add", "tiny", out, "--results", folder) == 0
    assert "1 runs added, 1 were there already" in " ".join(capsys.readouterr().out.split())
    assert [(row.arm, row.final_return) for row in results.read_rows(folder / "tiny.csv")] == [("a", 10), ("b", 20)]
    assert {point.arm for point in results.read_curves(folder / "tiny-curves.csv")} == {"a", "b"}

    assert tiny("add", "tiny", folder / "tiny.csv", "--results", tmp_path / "other") == 0  # somebody else's table
    for name in ("tiny.csv", "tiny-curves.csv"):
        assert (tmp_path / "other" / name).read_bytes() == (folder / name).read_bytes()
    capsys.readouterr()
    assert tiny("table", "tiny", "--results", folder, "--out", out, "--rows", "--markdown") == 0
    said = capsys.readouterr().out  # what the results hold counts
    assert "| 10 |" in said and "| 99 |" not in said


def test_curves_that_were_missing_are_added_later(tiny, finish, tmp_path, capsys):
    finish("a", FIRST, 0, 10.0)
    finish("a", FIRST, 1, 11.0)
    out, folder, theirs = tmp_path / "out", tmp_path / "results", tmp_path / "theirs"
    assert tiny("add", "tiny", out, "--results", theirs) == 0
    (theirs / "tiny-curves.csv").rename(tmp_path / "kept.csv")
    capsys.readouterr()
    assert tiny("add", "tiny", theirs / "tiny.csv", "--results", folder) == 0
    assert "2 runs added, 0 were there already; 2 without a curve" in capsys.readouterr().out
    (tmp_path / "kept.csv").rename(theirs / "tiny-curves.csv")
    assert tiny("add", "tiny", theirs / "tiny.csv", "--results", folder) == 0
    assert "0 runs added, 2 were there already\n" in capsys.readouterr().out
    assert (folder / "tiny-curves.csv").read_bytes() == (theirs / "tiny-curves.csv").read_bytes()


def test_a_curve_stands_beside_the_row_of_its_run_alone(tiny, finish, tmp_path, capsys):
    """Not beside that of a repeat: what was left of an earlier one gives way, and what is there takes none of a later one."""
    out, folder = tmp_path / "out", tmp_path / "results"
    rows, points = results.read_finished(finish("a", FIRST, 0, 10.0).parents[2], "tiny", TINY.arms)
    results.write_curves(
        folder / "tiny-curves.csv", [point._replace(value=-7.0) for point in points]
    )  # its row is gone
    assert tiny("add", "tiny", out, "--results", folder) == 0
    assert -7.0 not in {point.value for point in results.read_curves(folder / "tiny-curves.csv")}
    (folder / "tiny-curves.csv").unlink()
    repeat = dataclasses.replace(rows[0], final_return=99.0, commit="other")
    results.add([repeat], points, "tiny", folder)
    assert results.read_curves(folder / "tiny-curves.csv") == []
    results.add(rows, points, "tiny", folder)
    assert len(results.read_curves(folder / "tiny-curves.csv")) == len(points)


def test_runs_of_changing_tasks_are_added_with_their_curves_alone(finish, tmp_path, monkeypatch, capsys):
    finish("a", FIRST, 0, 10.0)
    finish("b", FIRST, 0, 10.0)
    out, folder, theirs = tmp_path / "out", tmp_path / "results", tmp_path / "theirs"
    rows, points = results.read_finished(out, "tiny", TINY.arms)
    results.write_rows(theirs / "tiny.csv", rows)
    results.write_curves(theirs / "tiny-curves.csv", [point for point in points if point.arm == "a"])

    def changing() -> Suite:
        """A suite of tests."""
        return dataclasses.replace(TINY, fresh="a")

    monkeypatch.setitem(SUITES, "tiny", changing)
    assert command_line.dispatch(["bench", "add", "tiny", str(theirs / "tiny.csv"), "--results", str(folder)]) == 2
    assert f"has no curve of b {FIRST} 0, and runs of tiny are measured by their curves" in capsys.readouterr().err
    assert not folder.exists()


def test_add_refuses_what_does_not_belong(tiny, finish, tmp_path, capsys):
    out, folder = tmp_path / "out", tmp_path / "results"
    longer = finish("a", FIRST, 1, 1.0, steps=300)
    finish("a", FIRST, 0, 1.0)
    assert tiny("add", "tiny", out, "--results", folder) == 2
    assert "different lengths" in capsys.readouterr().err
    shutil.rmtree(longer)
    config = json.loads((run_directory(out, "a", FIRST, 0) / "config.json").read_text())
    (run_directory(out, "a", FIRST, 0) / "config.json").write_text(json.dumps(config | {"digest": "0" * 16}))
    assert tiny("add", "tiny", out, "--results", folder) == 2
    said = capsys.readouterr().err
    assert "another configuration (0000000000000000) than a of tiny" in said and said.count("\n") == 1
    assert not folder.exists()


def test_add_refuses_rows_beside_older_ones_of_another_configuration(tiny, finish, tmp_path, capsys):
    """An arm that was changed since: its new runs do not go beside its old ones."""
    folder = tmp_path / "results"
    finish("a", FIRST, 0, 1.0)
    assert tiny("add", "tiny", tmp_path / "out", "--results", folder) == 0
    old = results.read_rows(folder / "tiny.csv")
    results.write_rows(folder / "tiny.csv", [dataclasses.replace(old[0], digest="0" * 16)])
    before = (folder / "tiny.csv").read_bytes()
    finish("a", FIRST, 1, 2.0)
    capsys.readouterr()
    assert tiny("add", "tiny", tmp_path / "out", "--results", folder) == 2
    assert "another configuration (0000000000000000)" in capsys.readouterr().err
    assert (folder / "tiny.csv").read_bytes() == before


def test_two_that_add_at_once_wait_for_each_other(real, tmp_path):
    row = results.row_of(real, "tiny", "a")
    others = [dataclasses.replace(row, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        with results._alone_in(tmp_path):
            every = [pool.submit(results.add, [each], [], "tiny", tmp_path) for each in others]
            time.sleep(0.3)
            assert not any(each.done() for each in every) and list(tmp_path.iterdir()) == []
        assert [each.result() for each in every] == [1] * 8
    assert [row.seed for row in results.read_rows(tmp_path / "tiny.csv")] == list(range(8))


def test_a_row_names_every_commit_that_trained_it(real, tmp_path):
    directory = tmp_path / "run"
    begun = dataclasses.replace(TINY.experiment("a", FIRST, 0, 120, str(directory)), save_replay=True)
    train(begun, quiet=True)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"git_commit": "a1b2"}))
    train(dataclasses.replace(begun, steps=150), resume=directory, quiet=True)
    now = config["git_commit"]
    assert results.row_of(directory, "tiny", "a").commit == " ".join(["a1b2", *([now] if now else [])])


def test_rows_of_other_suites_arms_and_protocols_are_refused(real):
    row = results.row_of(real, "tiny", "a")
    tables.check_rows("tiny", TINY, [row])
    for change, message in (
        ({"suite": "other"}, "a run of the suite other, not of tiny"),
        ({"arm": "c"}, "no arm c on gym/CartPole-v1"),
        ({"task": "gym/Pendulum-v1"}, "no arm a on gym/Pendulum-v1"),
        ({"seed": 1}, "another configuration"),
    ):
        with pytest.raises(ValueError, match=message):
            tables.check_rows("tiny", TINY, [dataclasses.replace(row, **change)])
    later = dataclasses.replace(TINY, paper={"a": dataclasses.replace(TINY.arms["a"], replay="reshuffled")})
    paper = dataclasses.replace(row, seed=1, digest=later.experiment("a", FIRST, 1, 150, "", "paper").digest())
    tables.check_rows("tiny", later, [paper])
    other = dataclasses.replace(
        row, arm="b", seed=2, digest=TINY.experiment("b", FIRST, 2, 150, "").digest(), directory="o/b"
    )
    tables.check_rows("tiny", later, [paper, other])  # an arm that is the same at both budgets
    with pytest.raises(ValueError, match=r"runs at different budgets .* not as at the paper's and .* laptop's"):
        tables.check_rows("tiny", later, [row, paper])
    two = dataclasses.replace(
        later, paper=later.paper | {"b": dataclasses.replace(TINY.arms["b"], replay="without_replacement")}
    )
    with pytest.raises(ValueError, match=r"runs at different budgets .* o/b is not as at the paper's"):
        tables.check_rows("tiny", two, [paper, other])
    with pytest.raises(ValueError, match=r"evaluated at different length .* has 2, .* has 3 episodes"):
        tables.check_comparable([row, dataclasses.replace(row, seed=1, episodes=3)])
    atari = [dataclasses.replace(row, task="atari/Pong", protocol=name, seed=seed) for seed, name in enumerate("xy")]
    with pytest.raises(ValueError, match=r"different Atari protocols are not compared: .* is under x, .* is under y"):
        tables.check_comparable(atari)


# Summing up


def test_scores_are_relative_to_the_first_arm_that_has_every_task(finish, tmp_path):
    finish("a", FIRST, 0, 50.0)  # `a` has no run on the second task
    for seed, (on_first, on_second) in enumerate([(10.0, 4.0), (30.0, 4.0)]):
        finish("b", FIRST, seed, on_first)
        finish("b", SECOND, seed, on_second)
    rows, _ = tables.gather("tiny", TINY, tmp_path / "out", None)
    returns = tables.returns_of(TINY, rows, [])
    assert returns == {"a": {FIRST: {0: 50.0}, SECOND: {}}, "b": {FIRST: {0: 10.0, 1: 30.0}, SECOND: {0: 4.0, 1: 4.0}}}
    assert tables.scales(returns, TINY.tasks) == {FIRST: 20.0, SECOND: 4.0}
    said = summed_up(tmp_path / "out")
    assert "2.500" in said  # 50 / 20
    assert "-2.000" in said  # (10 - 50) / 20
    assert "a (of 1 tasks)" in said and "too few pairs" in said and "none of one run" in said


def test_over_all_tasks_each_counts_the_same_whichever_has_more_seeds(finish, tmp_path):
    for seed in (0, 1):
        finish("a", SECOND, seed, 1.0)
    for seed, value in enumerate([1.0, 1.0, 7.0, 7.0]):  # more than half of all six are of the first task
        finish("a", FIRST, seed, value)
    rows, _ = tables.gather("tiny", TINY, tmp_path / "out", None)
    note = "the seeds of an arm that each of its tasks has."
    over_all, *of_each = tables.sheets(TINY, rows, [])
    (line,) = over_all.lines
    assert line[1:3] == ("4", "0.625")  # (1 / 4 + 1 / 1) / 2, of the whole seeds 0 and 1
    assert any(note in said for said in over_all.notes) and "4.0 ± 3.5" in rendered(of_each)
    first, *_ = tables.sheets(TINY, [row for row in rows if row.task == FIRST], [])
    assert first.lines[0][1:3] == ("4", "4.000") and not any(note in said for said in first.notes)


def test_seeds_that_every_task_has():
    runs = {"x": {0: 1.0, 1: 2.0, 2: 3.0}, "y": {2: 4.0, 0: 5.0}, "z": {}}
    assert tables.whole_seeds(runs) == {"x": {0: 1.0, 2: 3.0}, "y": {2: 4.0, 0: 5.0}, "z": {}}
    apart = {"x": {0: 1.0}, "y": {1: 2.0}}
    assert tables.whole_seeds(apart) == apart and tables.whole_seeds({"z": {}}) == {"z": {}}


def test_training_returns_are_those_of_the_last_tenth(real):
    row = dataclasses.replace(results.row_of(real, "tiny", "a"), agent_steps=100)
    other = dataclasses.replace(row, arm="b", digest=TINY.experiment("b", FIRST, 0, 150, "").digest())
    points = [
        results.Point(arm, FIRST, 0, step, metric, value + (arm == "b"))
        for arm in "ab"
        for step, value in ((85, 40.0), (90, 30.0), (95, 2.0), (100, 4.0))
        for metric in ("episode/return", "eval/return")
    ]
    returns = tables.training_returns(TINY, [row, other], points)
    assert returns == {"a": {FIRST: {0: 3.0}, SECOND: {}}, "b": {FIRST: {0: 4.0}, SECOND: {}}}
    _, training = tables.pairs_sheets(TINY, tables.returns_of(TINY, [row, other], points), "return", [FIRST], returns)
    assert training.title == f"{tables.PAIRS}, {tables.TRAINING}: return" and training.lines[0][2] == "1.000"
    assert tables.training_returns(dataclasses.replace(TINY, fresh="b"), [row, other], points) == {}


def test_returns_of_a_single_task_stay_as_they_are(finish, tmp_path):
    for seed, value in enumerate([1.0, -3.0]):
        finish("a", FIRST, seed, value)
        finish("b", FIRST, seed, value + 2)
    said = summed_up(tmp_path / "out")
    assert "-1.000" in said and "-3.000 to 1.000" in said
    assert "2.000 to 2.000" in said and "too few pairs" in said
    assert "0.75 (0.00 to 1.00)" in said  # of four pairs 3 and -1 win all but one
    assert "-1.0 ± 2.8" in said and "fewer than 5 runs" in said


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([-1.0, 1.0, 0.5, -0.2, 0.1], "no difference shown"),
        ([1.0, 2.0, 0.5, 0.2, 0.1], "higher"),
        ([-1.0, -2.0, -0.5, -0.2, -0.1], "lower"),
        ([1.0, 2.0, 0.5, 0.2], "too few pairs"),
    ],
)
def test_a_difference_is_shown_by_enough_pairs_on_one_side_of_zero(finish, tmp_path, differences, said):
    for seed, difference in enumerate(differences):
        finish("a", FIRST, seed, 5.0)
        finish("b", FIRST, seed, 5.0 + difference)
    paired = paired_of(tmp_path)
    assert paired.title.endswith(": return")
    assert paired.lines[0][1] == str(len(differences)) and paired.lines[0][4] == said
    assert bool(paired.notes) == (said == "too few pairs")


def test_one_task_of_several_makes_no_arm_higher(finish, tmp_path):
    """Half the pairs of three are cut off by the interquartile mean, and a large difference of one task is left."""
    suite = dataclasses.replace(TINY, tasks=(*TINY.tasks, "gym/MountainCar-v0"))
    values = {FIRST: 9.0, SECOND: 0.9, "gym/MountainCar-v0": 0.9}
    for arm, of in (("a", dict.fromkeys(values, 1.0)), ("b", values)):
        for task, value in of.items():
            for seed in range(5):
                finish(arm, task, seed, value)
    paired = paired_of(tmp_path, suite)
    assert paired.columns[4:] == ("tasks up / down", "verdict", "P(better), 95 %")
    (line,) = paired.lines
    assert (*line[:2], *line[4:]) == ("b\n- a", "15", "1 / 2", "tasks disagree", "0.33 (0.33 to 0.33)")
    assert verdict(Interval(1.0, 0.5, 2.0), [np.ones(5), np.ones(5), -np.ones(5)]) == "higher"
    assert verdict(Interval(-1.0, -2.0, -0.5), [np.ones(5), -np.ones(5)]) == "tasks disagree"


def test_one_run_has_no_interval_and_none_no_chance(finish, tmp_path):
    finish("a", FIRST, 0, 1.0)
    finish("b", FIRST, 0, 2.0)
    assert paired_of(tmp_path).lines[0][-1] == "1.00 (none of one run)"
    apart = {"a": {FIRST: {0: 1.0}, SECOND: {}}, "b": {FIRST: {}, SECOND: {0: 2.0}}}
    paired = tables.differences_sheet(TINY, apart, TINY.tasks, "title")
    assert paired.lines[0][1:] == ("0", "", "", "0 / 0", "no pairs yet", "")


def test_a_pipe_gets_whole_cells_and_a_narrow_terminal_too(tiny, finish, tmp_path, capsys):
    directory = finish("a", FIRST, 0, 4.0)
    assert tiny("table", "tiny", "--out", tmp_path / "out", "--rows") == 0
    said = capsys.readouterr().out
    row = results.row_of(directory, "tiny", "a")
    assert row.directory in said and row.digest in said and row.environment in said and "…" not in said
    narrow = Console(file=io.StringIO(), width=60, force_terminal=True)
    Sheet("title", ("run directory",), [(str(directory) * 3,)]).print(narrow)
    assert "…" not in narrow.file.getvalue()


def test_what_cannot_be_summed_up_is_one_line_and_the_rest_is_told(finish, tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        summed_up(tmp_path / "out")
    results.write_rows(tmp_path / "tiny.csv", [])  # its columns alone
    for given in ((None, tmp_path), (tmp_path / "tiny.csv", None)):
        with pytest.raises(ValueError, match=r"no finished run in .*tiny.csv"):
            tables.gather("tiny", TINY, *given)
    finish("a", FIRST, 0, 0.0)
    finish("b", SECOND, 0, 7.0)
    said = summed_up(tmp_path / "out")
    assert "no arm has a finished run on every task" in said and "7.0" in said
    finish("a", SECOND, 0, 1.0)
    assert "mean return of 0 on gym/CartPole-v1, which cannot be score 1" in " ".join(
        summed_up(tmp_path / "out").split()
    )
    finish("a", FIRST, 1, 1.0, steps=300)
    with pytest.raises(ValueError, match="different lengths"):
        summed_up(tmp_path / "out")


def test_run_directories_and_results_make_one_table(finish, tmp_path):
    directory = finish("a", FIRST, 0, 4.0)
    results.add([results.row_of(directory, "tiny", "a")], [], "tiny", tmp_path)
    finish("a", FIRST, 1, 6.0)
    assert len(tables.gather("tiny", TINY, tmp_path / "out", tmp_path)[0]) == 2
    assert len(tables.gather("tiny", TINY, None, tmp_path)[0]) == 1


def test_the_curve_of_a_run_that_is_in_both_counts_once(finish, tmp_path):
    directory = finish("a", FIRST, 0, 4.0)
    row = results.row_of(directory, "tiny", "a")
    points = results.curve_points(directory, row)
    stored = [point._replace(value=point.value + 1) for point in points]
    results.add([row], stored, "tiny", tmp_path)
    _, gathered = tables.gather("tiny", TINY, tmp_path / "out", tmp_path)
    assert [point[:5] for point in sorted(gathered)] == [point[:5] for point in sorted(stored)]
    np.testing.assert_allclose(
        [point.value for point in sorted(gathered)], [point.value for point in sorted(stored)], rtol=1e-4
    )


def test_a_table_of_some_tasks(tiny, finish, tmp_path, capsys):
    finish("a", FIRST, 0, 7.0)
    table = ["table", "tiny", "--out", str(tmp_path / "out"), "--tasks"]
    assert tiny(*table, FIRST) == 0
    assert "7.0" in capsys.readouterr().out
    assert tiny(*table, SECOND) == 2
    assert capsys.readouterr().err == f"resprout: no run of tiny is finished on {SECOND}\n"
    assert tiny(*table, "gym/Pong") == 2 and "--tasks" in capsys.readouterr().err


def test_a_table_can_be_traced_and_written_as_markdown(tiny, finish, tmp_path, capsys):
    finish("a", FIRST, 0, 4.0)
    assert tiny("table", "tiny", "--out", tmp_path / "out", "--rows", "--markdown") == 0
    said = capsys.readouterr().out
    row = results.row_of(run_directory(tmp_path / "out", "a", FIRST, 0), "tiny", "a")
    for value in ("out/a/gym-CartPole-v1/s0", row.digest, row.commit[:12]):
        assert value in said
    assert tiny("table", "tiny", "--out", tmp_path / "out", "--markdown") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| a | 1 | 4.000 | none of one run |" in lines and "| arm | CartPole-v1 |" in lines


def test_published_figures_stand_beside_ours_with_what_differs(real):
    suite = Suite(
        arms={"dqn": CARTPOLE},
        tasks=("atari/Boxing", "atari/Pong"),
        seeds=(0, 1),
        steps={"laptop": 150, "paper": 150},
        baselines={},
        published={"dqn": Column("rliable_100k", "atari100k", "DrQ(eps)")},
        human=True,
    )
    row = dataclasses.replace(results.row_of(real, "tiny", "dqn"), arm="dqn", protocol="dopamine")
    rows = [dataclasses.replace(row, task=task, final_return=8.0) for task in suite.tasks]
    last = sheets_of(suite, rows)[-1]
    assert last.title == "Beside rliable_100k: eval_return after 100,000 agent steps ≠"
    ((task, arm, ours, theirs, value), _) = last.lines
    assert (task, arm, ours, theirs) == ("Boxing", "dqn", "8.0, 1 run", "DrQ(eps)")
    assert value.startswith("9.04 ± 3.07") and value.endswith("100 runs")
    for difference in ("sticky actions 0, ours 0.25", "a lost life ends an episode", "agent steps 100,000, ours 150"):
        assert difference in last.notes[0]
    (arms, *_) = sheets_of(suite, rows)
    assert arms.columns[-1] == "optimality gap" and "human-normalised" in arms.title
    assert arms.lines[0][2] == f"{((8 - 0.1) / 12 + (8 + 20.7) / 35.3) / 2:.3f}"


def test_a_published_aggregate_stands_beside_ours_only_when_every_task_has_a_run(real):
    suite = SUITES["resets-dmc"]()
    row = dataclasses.replace(results.row_of(real, "resets-dmc", "sac-rr1"), arm="sac-rr1", agent_steps=2_000_000)
    rows = [dataclasses.replace(row, task=task, final_return=100.0 * i) for i, task in enumerate(suite.tasks)]
    by_title = {sheet.title: sheet for sheet in sheets_of(suite, rows)}
    aggregate = by_title["Beside nikishin_curves: iqm_return after 2,000,000 agent steps"]
    assert aggregate.lines == [
        (
            "iqm, 10 tasks",
            "sac-rr1",
            "450.0 (none of one run), 1 run",
            "SAC, RR 1, no resets",
            "577.6 (546.1 to 607.0), 10 runs",
        )
    ]
    assert aggregate.notes[0].startswith("No difference in version, length")
    assert len(by_title["Beside nikishin_curves: eval_return after 2,000,000 agent steps"].lines) == 10
    assert not [sheet for sheet in sheets_of(suite, rows[1:]) if "iqm_return" in sheet.title]
    more = [*rows, *(dataclasses.replace(rows[-1], seed=seed) for seed in range(1, 10))]
    (again,) = [sheet for sheet in sheets_of(suite, more) if "iqm_return" in sheet.title]
    assert (
        again.lines[0][2] == "450.0 (none of one run), 1 run"
    )  # a task with more seeds counts no more than the others


def test_what_a_comparison_and_a_table_leave_out_is_said(finish, tmp_path):
    for seed in range(5):
        finish("a", FIRST, seed, 10.0)
        finish("a", SECOND, seed, 10.0)
        finish("b", FIRST, seed, 11.0 + seed)
    finish("b", SECOND, 1, None)  # not evaluated
    rows, points = tables.gather("tiny", TINY, tmp_path / "out", None)
    arms, means, pairs, *_ = tables.sheets(TINY, rows, points)
    assert pairs.lines[0][:2] == ("b\n- a\n(of 1 tasks)", "5")
    assert means.notes[0] == "Runs of 150 agent steps, evaluated by 2 episodes."
    assert means.notes[1].startswith("Left out") and means.notes[1].endswith(": 1 of 16 runs.")
    assert means.lines[1] == ("b", "13.0 ± 1.6", "")
    assert means.lines[0][1:] == ("10.0 ± 0.0", "10.0 ± 0.0") and "mean return of 5 runs" in means.title
    assert tables.UNIT in arms.notes
    rows = [
        dataclasses.replace(row, environment="gymnasium 2.0" if row.key[2:] == (FIRST, 3) else row.environment)
        for row in rows
    ]
    (*_, versions) = tables.sheets(TINY, rows, points)[1].notes
    assert (
        versions
        == f"≠ Runs under several versions of an environment: {FIRST} of {rows[0].environment} and of gymnasium 2.0."
    )


def test_brackets_and_bars_in_a_table_are_no_markup():
    sheet = Sheet("title", ("runs[old]/a", "runs[/x]/a"), [("[recalled]", "a|b")])
    said = rendered([sheet])
    assert "runs[old]/a" in said and "runs[/x]/a" in said and "[recalled]" in said and "a|b" in said
    assert sheet.markdown().splitlines()[2:] == ["| runs[old]/a | runs[/x]/a |", "|---|---|", r"| [recalled] | a\|b |"]


# Comparing


def test_compare_shows_what_differs_and_nothing_else(real, finish, tmp_path):
    other = finish("b", FIRST, 1, 3.25)
    config, result, metrics = compare(real, other)
    assert {line[0]: line[1:] for line in config.lines} == {"replay": ("uniform", "reshuffled"), "seed": ("0", "1")}
    assert next((line[0], line[2]) for line in result.lines if line[0] == "return") == ("return", "3.25")
    assert {"eval/return", "critic/loss"} <= {line[0] for line in metrics.lines}
    for name, values in (("gamma", (0.9999999, 1.0)), ("dueling", (True, "True")), ("hidden", ([], None))):
        for directory, value in zip((real, other), values, strict=True):
            shutil.copytree(directory, tmp_path / name / directory.parts[-3])
            path = tmp_path / name / directory.parts[-3] / "config.json"
            edited = json.loads(path.read_text())
            edited["experiment"]["agent"][name] = value
            path.write_text(json.dumps(edited))
        differing = {line[0]: line[1:] for line in compare(tmp_path / name / "a", tmp_path / name / "b")[0].lines}
        assert differing[f"agent.{name}"] == tuple(map(repr, values))
    (other / "summary.json").unlink()
    assert ("no, at agent step 150") in compare(real, other)[1].lines[0]
    with pytest.raises(ValueError, match="nothing is not a run directory"):
        compare(real, tmp_path / "nothing")


def test_the_command_of_rows_asks_for_these_runs_and_no_others(real):
    row = results.row_of(real, "tiny", "a")
    every = [
        dataclasses.replace(
            row, arm=arm, task=task, seed=seed, digest=TINY.experiment(arm, task, seed, 150, "").digest()
        )
        for arm in "ab"
        for task in TINY.tasks
        for seed in (0, 1, 2)
    ]
    assert tables.command("tiny", TINY, every) == "resprout bench run tiny"
    assert tables.command("tiny", TINY, every[1:]) == "some runs of resprout bench run tiny"
    some = [each for each in every if each.task == FIRST and each.seed != 1]
    assert tables.command("tiny", TINY, some) == f"resprout bench run tiny --tasks {FIRST} --seeds 0 2"
    longer = [dataclasses.replace(each, agent_steps=170) for each in every if each.arm == "b"]
    assert tables.command("tiny", TINY, longer) == "resprout bench run tiny --steps 170 --arms b"
    later = dataclasses.replace(TINY, paper={"a": dataclasses.replace(TINY.arms["a"], replay="reshuffled")})
    paper = dataclasses.replace(row, digest=later.experiment("a", FIRST, 0, 150, "", "paper").digest())
    said = tables.command("tiny", later, [paper])
    assert said == f"resprout bench run tiny --budget paper --steps 150 --arms a --tasks {FIRST} --seeds 0"


def test_stored_results_are_shown_until_a_run_is_finished_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    unfinished = tmp_path / "runs" / "redo-minatar" / "dqn-rr1" / "minatar-Asterix" / "s0"
    unfinished.mkdir(parents=True)
    assert command_line.dispatch(["bench", "table", "redo-minatar"]) == 0
    stored = tables.command(
        "redo-minatar", SUITES["redo-minatar"](), results.read_rows(results.RESULTS / "redo-minatar.csv")
    )
    assert f"runs of: {stored}" in " ".join(capsys.readouterr().out.split())
    (unfinished / "summary.json").write_text("{}")
    assert command_line.dispatch(["bench", "table", "redo-minatar"]) == 2


@pytest.mark.parametrize("path", sorted(results.RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_stored_results_are_of_the_length_that_their_suite_has_by_itself(path):
    """Or `bench run` would make runs that `bench add` refuses beside these."""
    if not path.stem.endswith("-curves"):
        suite = SUITES[path.stem]()
        assert {row.agent_steps for row in results.read_rows(path)} <= set(suite.steps.values())


def test_compare_on_the_command_line(real, capsys):
    assert command_line.dispatch(["bench", "compare", str(real), str(real), "--markdown"]) == 0
    assert "| agent steps | 150 | 150 |" in capsys.readouterr().out


def test_every_stored_result_belongs_to_its_suite():
    for path in sorted(results.RESULTS.glob("*.csv")):
        if path.stem.endswith("-curves"):
            assert results.read_curves(path)
        elif path.stem in dict(bench_command.names()):
            tables.check_rows(path.stem, SUITES[path.stem](), results.read_rows(path))
