"""Suites: what they hold, which runs are left to do, how processes are started and stopped, how runs are summed up."""

import dataclasses
import fcntl
import inspect
import io
import json
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from rich.console import Console

from resprout.agents import DQN
from resprout.benchmarks import runner, tables
from resprout.benchmarks.suites import SUITES, Suite
from resprout.envs import make
from resprout.interventions import METHODS
from resprout.training import Experiment
from resprout.training import __main__ as command_line
from resprout.training.run import Run

SMALL = DQN(warmup=100, batch_size=8, hidden=(8,), capacity=300, epsilon_decay_steps=100)
CARTPOLE = Experiment(agent=SMALL, env="gym/CartPole-v1", eval_episodes=2, eval_every=0, checkpoint_every=0)
TINY = Suite(
    arms={"a": CARTPOLE, "b": dataclasses.replace(CARTPOLE, replay="reshuffled")},
    tasks=("gym/CartPole-v1", "gym/Acrobot-v1"),
    seeds=(0, 1, 2),
    steps={"laptop": 150, "paper": 300},
    baselines={"b": "a"},
)


def finish(out: Path, arm: str, task: str, seed: int, value: float, steps: int = 150) -> None:
    """What a finished run of TINY leaves, as far as `is_finished` reads it."""
    directory = runner.run_directory(out, arm, task, seed)
    directory.mkdir(parents=True)
    experiment = TINY.experiment(arm, task, seed, steps, str(directory))
    (directory / "config.json").write_text(json.dumps({"digest": experiment.digest()}))
    (directory / "summary.json").write_text(json.dumps({"return": value, "agent_steps": steps}))


# What a suite holds


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_can_be_run(name):
    suite = SUITES[name]()
    assert SUITES[name].__doc__
    assert len(suite.seeds) >= 10 and set(suite.steps) == {"laptop", "paper"}
    assert set(suite.baselines) | set(suite.baselines.values()) | set(suite.paper) <= set(suite.arms)
    assert set(suite.published) <= set(suite.arms)
    for budget in suite.steps:
        assert set(suite.tasks_of(budget)) <= set(suite.tasks) and set(suite.seeds_of(budget)) <= set(suite.seeds)
        for arm in suite.arms:
            for task in suite.tasks:
                experiment = suite.experiment(arm, task, 0, suite.steps[budget], "out", budget)
                assert type(experiment).from_json(experiment.to_json()).digest() == experiment.digest()


@pytest.mark.parametrize("name", SUITES)
def test_every_arm_builds_and_every_intervention_fits(name):
    if name == "arr-dmc":
        pytest.importorskip("dm_control")
    suite = SUITES[name]()
    task = suite.tasks_of("laptop")[0]
    spec = make(task, protocol=next(iter(suite.arms.values())).protocol).spec
    for arm in suite.arms:
        for budget in suite.steps:
            suite.experiment(arm, task, 0, suite.steps[budget], "out", budget).build_agent(spec)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SUITES if name != "arr-dmc"])  # pixels want a screen
def test_every_arm_can_begin_on_every_kind_of_task(name, tmp_path):
    suite = SUITES[name]()
    tasks = {task.partition("/")[0]: task for task in suite.tasks}  # one of each family
    for arm in suite.arms:
        for task in tasks.values():
            experiment = suite.experiment(arm, task, 0, suite.steps["laptop"], str(tmp_path / "run"))
            smaller = dataclasses.replace(experiment.agent, capacity=10_000)  # ACE's fit reads as many
            with ExitStack() as stack:
                env = stack.enter_context(closing(make(task, protocol=experiment.protocol)))
                run_ = dataclasses.replace(experiment, agent=smaller)
                Run(run_, tmp_path / "run", env, run_.build_agent(env.spec), (), True, stack).fresh()
    assert list(tmp_path.iterdir()) == []


def test_budgets_of_a_suite_differ_where_it_says_so():
    suite = SUITES["redo-sac"]()
    made = {
        budget: {arm: suite.experiment(arm, suite.tasks[0], 0, steps, "out", budget) for arm in suite.arms}
        for budget, steps in suite.steps.items()
    }
    assert {arm for arm in suite.arms if made["laptop"][arm].digest() != made["paper"][arm].digest()} == set(
        suite.paper
    )
    for budget, steps in suite.steps.items():
        assert made[budget]["sac"].eval_every == steps // 10
        period = int(made[budget]["redo"].acting[0].spec.partition("period=")[2].partition(",")[0])
        updates = steps - made[budget]["redo"].agent.warmup
        assert updates // period == (9 if budget == "laptop" else 4)


@pytest.mark.parametrize("name", SUITES)
def test_every_intervention_acts_within_every_budget(name):
    suite = SUITES[name]()
    for budget, steps in suite.steps.items():
        for arm in suite.arms:
            experiment = suite.experiment(arm, suite.tasks[0], 0, steps, "out", budget)
            updates = (steps - experiment.agent.warmup) * experiment.ratio
            for intervention in experiment.acting:
                given = dict(field.split("=") for field in intervention.spec.partition(":")[2].split(",") if field)
                fields = inspect.signature(METHODS[intervention.name]).parameters
                values = {field: given.get(field, parameter.default) for field, parameter in fields.items()}
                limits = {"period": updates, "start": updates, "step": updates, "end": updates, "every": steps}
                for field, limit in limits.items():
                    assert int(values.get(field) or 0) < limit, (budget, arm, intervention.spec)
                period, stop = int(values.get("period") or 0), int(values.get("stop") or updates)
                assert period <= 1_000 or updates % period or stop < updates, (
                    "the last evaluation comes right after a reset"
                )


def test_a_task_may_change_the_agent():
    suite = SUITES["arr-dmc"]()
    walker, cheetah = (
        suite.experiment("arr", f"dmc-pixels/{task}", 0, 5_000, "out") for task in ("walker-run", "cheetah-run")
    )
    assert (walker.agent.n_step, walker.agent.batch_size) == (1, 512)
    assert (cheetah.agent.n_step, cheetah.agent.batch_size) == (3, 256)


def test_redo_minatar_differs_from_its_baseline_by_the_intervention_alone():
    suite = SUITES["redo-minatar"]()
    assert {suite.arms[arm].ratio for arm in suite.arms} == {1, 4}
    for arm, baseline in suite.baselines.items():
        one, other = suite.arms[arm], suite.arms[baseline]
        assert one.interventions
        if arm.startswith("random"):  # which units, and nothing else
            (chosen,), (control,) = one.interventions, other.interventions
            assert chosen.spec.replace("select=random,", "") == control.spec and "fraction=0.1," in control.spec
        else:
            assert other.interventions == ()
        assert dataclasses.replace(one, interventions=other.interventions) == other
    target = {arm: each.agent.target_period / each.ratio for arm, each in suite.arms.items()}
    assert set(target.values()) == {1_000}  # agent steps


@pytest.mark.parametrize("name", SUITES)
def test_a_published_column_has_one_protocol_and_at_least_one_figure(name):
    suite = SUITES[name]()
    for column in suite.published.values():
        found = [row for task in suite.tasks if (row := column.of(task))]
        for metric in ("iqm_hns", "mean_hns"):
            found.append(dataclasses.replace(column, metric=metric).value(f"ALL({len(suite.tasks)})"))
        found = [row for row in found if row]
        assert found, column
        assert len({(row.sticky, row.life_loss_terminal, row.budget) for row in found}) == 1
        assert not {row.evidence for row in found} & {"memory"}


def test_errr_minatar_changes_nothing_but_the_sampler_between_compared_arms():
    suite = SUITES["errr-minatar"]()
    assert len(suite.arms) == 12 and len(suite.tasks) == 5
    for arm, baseline in suite.baselines.items():
        assert suite.arms[baseline].replay == "uniform" != suite.arms[arm].replay
        assert dataclasses.replace(suite.arms[arm], replay="uniform") == suite.arms[baseline]
    draws = {arm.split("-")[1]: arm_.agent.batch_size * arm_.ratio for arm, arm_ in suite.arms.items()}
    assert draws == {"mu8": 8, "mu2": 2}


# What is left to do


def test_runs_go_seed_by_seed_into_directories_of_their_own(tmp_path):
    every = runner.runs(TINY, ["a", "b"], TINY.tasks, [0, 1], 150, tmp_path)
    assert [run.seed for run in every] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert len({run.directory for run in every}) == 8
    run = every[1]
    assert (run.arm, run.task, run.directory) == ("b", "gym/CartPole-v1", tmp_path / "b" / "gym-CartPole-v1" / "s0")
    experiment = run.experiment
    assert (experiment.env, experiment.seed, experiment.steps, experiment.replay) == (run.task, 0, 150, "reshuffled")


def test_a_finished_run_is_left_alone_and_a_begun_one_is_not(tmp_path):
    (run, *_) = runner.runs(TINY, ["a"], TINY.tasks, [0], 150, tmp_path)
    assert not runner.is_finished(run)
    finish(tmp_path, "a", TINY.tasks[0], 0, 1.0)
    assert runner.is_finished(run)
    (run.directory / "summary.json").unlink()
    assert not runner.is_finished(run)


def test_a_longer_run_needs_the_replay_of_the_shorter_one(tmp_path):
    finish(tmp_path, "a", TINY.tasks[0], 0, 1.0)
    (run, *_) = runner.runs(TINY, ["a"], TINY.tasks, [0], 300, tmp_path)
    with pytest.raises(ValueError, match="finished at 150 agent steps without --keep-replay"):
        runner.is_finished(run)
    (run.directory / "replay").mkdir()
    assert not runner.is_finished(run)


def test_a_longer_run_is_no_shorter_one(tmp_path):
    finish(tmp_path, "a", TINY.tasks[0], 0, 1.0)
    for steps, num_envs in ((149, 1), (140, 8)):
        suite = dataclasses.replace(TINY, arms={"a": dataclasses.replace(CARTPOLE, num_envs=num_envs)})
        (run, *_) = runner.runs(suite, ["a"], TINY.tasks, [0], steps, tmp_path)
        (run.directory / "config.json").write_text(json.dumps({"digest": run.experiment.digest()}))
        with pytest.raises(ValueError, match="finished at 150 agent steps, which is more; give another --out"):
            runner.is_finished(run)
    (run, *_) = runner.runs(suite, ["a"], TINY.tasks, [0], 145, tmp_path)  # the last step is one of eight environments
    assert runner.is_finished(run)


def test_a_run_that_is_over_when_the_suite_is_stopped_leaves_no_replay(tmp_path, monkeypatch):
    finish(tmp_path, "a", TINY.tasks[0], 0, 1.0)
    runs = runner.runs(TINY, ["a"], TINY.tasks[:1], [0, 1], 150, tmp_path)
    for run in runs:
        (run.directory / "replay").mkdir(parents=True)

    def stop(progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "start", lambda *_: (subprocess.Popen(["true"], stdin=subprocess.PIPE), 0))
    monkeypatch.setattr(runner.SuiteProgress, "show", stop)
    with pytest.raises(KeyboardInterrupt):
        runner.run_all(runs, 2, False, Console(file=io.StringIO()))
    assert [(run.directory / "replay").exists() for run in runs] == [False, True]


@pytest.mark.parametrize(("jobs", "seeds", "memory"), [(3, 2, "0.450"), (2, 5, "0.450"), (4, 1, None)])
def test_processes_have_equal_parts_of_an_accelerator(jobs, seeds, memory, tmp_path, monkeypatch):
    """As many parts as there are processes at a time."""
    told = []

    def start(experiments, cores, environment):
        told.append(environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION"))
        return subprocess.Popen(["false"], stdin=subprocess.PIPE), 0

    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(runner, "start", start)
    monkeypatch.setattr(runner, "last_words", lambda *_: "")
    every = runner.runs(TINY, ["a"], TINY.tasks[:1], range(seeds), 150, tmp_path)
    assert len(runner.run_all(every, jobs, False, Console(file=io.StringIO()))) == seeds
    assert told == [memory] * seeds


def test_a_directory_of_another_experiment_is_refused(tmp_path):
    finish(tmp_path, "a", TINY.tasks[0], 0, 1.0)
    other = dataclasses.replace(TINY, arms={"a": dataclasses.replace(CARTPOLE, num_envs=2)})
    (run, *_) = runner.runs(other, ["a"], TINY.tasks, [0], 150, tmp_path)
    with pytest.raises(ValueError, match="another experiment"):
        runner.is_finished(run)


# Processes


DIVERGES = dataclasses.replace(CARTPOLE, agent=dataclasses.replace(CARTPOLE.agent, learning_rate=1e30))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "said"), [(dataclasses.replace(CARTPOLE, protocol="none"), "EnvError"), (DIVERGES, "nan")]
)
def test_one_failure_stops_nothing_and_is_told(arm, said, tmp_path):
    broken = dataclasses.replace(TINY, arms={"a": CARTPOLE, "broken": arm})
    every = runner.runs(broken, ["broken", "a"], TINY.tasks[:1], [0], 150, tmp_path)
    console = Console(file=io.StringIO(), width=200)
    (failure,) = runner.run_all(every, jobs=2, keep_replay=False, console=console)
    assert failure.run.arm == "broken"
    assert said in failure.last_words and failure.log.read_text()
    assert runner.is_finished(every[1])
    assert not (every[1].directory / "replay").exists()
    assert "FAILED" in console.file.getvalue()
    assert [row.arm for row in tables.gather("tiny", broken, tmp_path, None)[0]] == ["a"]


COMMAND = [sys.executable, "-P", "-m", "resprout.training", "bench", "run", "errr-minatar"]
ONE_GAME = ["--tasks", "minatar/Breakout", "--seeds", "0", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "processes", "stopped"), [((), 4, 2), (("--seeds-together",), 2, 4)], ids=["apart", "together"]
)
def test_end_to_end_stopped_and_gone_on_with(more, processes, stopped, tmp_path):
    flags = ["--arms", "dqn-mu2-wr", "dqn-mu2-rrc", *ONE_GAME, "--steps", "5500", "--jobs", "2", "--out", str(tmp_path)]
    flags, last = [*flags, *more], f"[{processes}/{processes}]"
    process = subprocess.Popen([*COMMAND, *flags], stdout=subprocess.PIPE, text=True)
    while not (begun := [path for path in tmp_path.glob("*/*/s0/metrics.jsonl") if path.stat().st_size]):
        assert process.poll() is None
        time.sleep(0.2)
    first = begun[0].parent  # whichever it is: by the first line of the other this one could be over
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and f"stopping {stopped} runs" in said
    assert not (first / "summary.json").exists() and "interrupted" in first.with_suffix(".log").read_text().lower()
    assert ("side by side" in first.with_suffix(".log").read_text()) == ("--seeds-together" in more)

    done = subprocess.run([*COMMAND, *flags], check=True, capture_output=True, text=True)
    assert "4 runs of 5500 agent steps, 0 of them finished" in done.stdout
    assert "- dqn-mu2-wr" in done.stdout and last in done.stdout
    assert json.loads((first / "summary.json").read_text())["agent_steps"] == 5500
    again = subprocess.run([*COMMAND, *flags], check=True, capture_output=True, text=True)
    assert "4 of them finished" in again.stdout
    assert again.stdout.partition("\n")[2] == done.stdout.partition(last)[2].partition("\n")[2]  # the same tables
    assert command_line.dispatch(["bench", "table", "errr-minatar", "--out", str(tmp_path)]) == 0


def test_seeds_of_an_arm_on_a_task_are_one_batch():
    runs = runner.runs(TINY, ["a", "b"], TINY.tasks[:1], [3, 1], 150, Path("out"))
    batches = runner.seeds_together(runs)
    assert list(map(str, batches)) == ["a gym/CartPole-v1 seeds 3 1", "b gym/CartPole-v1 seeds 3 1"]
    assert [run for batch in batches for run in batch] == [runs[0], runs[2], runs[1], runs[3]]
    assert str(runner.Batch(runs[:1])) == str(runs[0]) == "a gym/CartPole-v1 seed 3"


@pytest.mark.slow
def test_seeds_together_fail_together_and_stop_no_others(tmp_path):
    broken = dataclasses.replace(TINY, arms={"a": CARTPOLE, "broken": DIVERGES})
    every = runner.runs(broken, ["broken", "a"], TINY.tasks[:1], [0, 1], 150, tmp_path)
    console = Console(file=io.StringIO(), width=200)
    failures = runner.run_all(every, 2, False, console, together=True)
    assert [(failure.run.arm, failure.run.seed) for failure in failures] == [("broken", 0), ("broken", 1)]
    assert all("nan" in failure.last_words for failure in failures)
    assert [runner.is_finished(run) for run in every] == [False, True, False, True]
    assert not any((run.directory / "replay").exists() for run in every if run.arm == "a")


@pytest.mark.slow
def test_seeds_that_cannot_be_side_by_side_come_one_after_the_other(tmp_path, capsys):
    """Adaptive RR gives each a replay ratio of its own."""
    arm = dataclasses.replace(CARTPOLE, interventions=("adaptive_replay_ratio:every=50,window=10",))
    suite = dataclasses.replace(TINY, arms={"a": arm})
    every = runner.runs(suite, ["a"], TINY.tasks[:1], [0, 1], 150, tmp_path)
    runner.train_together([run.experiment for run in every])
    said = capsys.readouterr().out
    assert "adaptive_replay_ratio gives every seed a replay ratio of its own: one seed after the other" in said
    assert said.count("from agent step 0") == 2 and all(map(runner.is_finished, every))


@pytest.mark.slow
def test_runs_end_with_a_suite_that_is_killed(tmp_path):
    flags = ["--arms", "dqn-mu2-wr", *ONE_GAME, "--steps", "200000", "--jobs", "1", "--out", str(tmp_path)]
    process = subprocess.Popen([*COMMAND, *flags], stdout=subprocess.DEVNULL)
    lock = tmp_path / "dqn-mu2-wr" / "minatar-Breakout" / "s0" / ".lock"
    while not lock.exists():
        assert process.poll() is None
        time.sleep(0.2)
    process.kill()
    process.wait()
    with lock.open() as file:  # which the run holds for as long as it lasts
        for _ in range(100):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        else:
            raise AssertionError("the run goes on")


# The command line


@pytest.mark.parametrize("arguments", [[], ["--help"], ["run", "--help"], ["report", "-h"]])
def test_help_without_a_suite_names_them(arguments, capsys):
    assert command_line.dispatch(["bench", *arguments]) == 0
    output = capsys.readouterr().out
    assert "bench run SUITE" in output
    assert all(suite in output for suite in SUITES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "resprout bench run|table|report|add|compare"),
        (["run"], "which suite?"),
        (["run", "errr-minatra"], "unknown suite 'errr-minatra' (did you mean errr-minatar"),
        (["table", "errr-counts"], "prints its table itself"),
        (["add", "errr-counts", "out"], "prints its table itself"),
        (["table", "errr-minatar", "--out", "runs"], "no finished run in runs"),
        (["table", "errr-minatar", "--results", "res"], "there are no results at res/errr-minatar.csv"),
        (["add", "errr-minatar"], "required: source"),
        (["add", "errr-minatar", "runs"], "no finished run in runs"),
        (["add", "errr-minatar", "mine.csv"], "there are no results at mine.csv"),
        (["compare", "one"], "required: RUN_DIR"),
        (["compare", "one", "two"], "one is not a run directory"),
        (["run", "errr-minatar", "--budget", "huge"], "--budget"),
        (["run", "errr-minatar", "--jobs", "0"], "--jobs must be at least 1"),
        (["run", "errr-minatar", "--seeds", "0", "1", "0"], "0 is given twice"),
        (["run", "errr-minatar", "--arms", "c51-mu2-wr", "c51-mu2-wr"], "c51-mu2-wr is given twice"),
        (["run", "errr-minatar", "--out", f"{__file__}/out"], "test_suites.py is no directory"),
        (["add", "errr-minatar", "runs", "--results", __file__], "test_suites.py is no directory"),
        (["run", "errr-minatar", "--arms", "dqn"], "--arms"),
        (["run", "errr-minatar", "--tasks", "minatar/Pong"], "--tasks"),
        (["run", "errr-minatar", "--steps", "100"], "warm-up of 5000 agent steps"),
        (["run", "errr-minatar", "--seeds", "-1"], "seed must not be negative"),
        (["run", "errr-counts", "--out", f"{__file__}/out"], "test_suites.py is no directory"),
        (["run", "errr-counts", "--samplers", "WR", "WR"], "WR is given twice"),
    ],
)
def test_bad_input_is_one_line_and_creates_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command_line.dispatch(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("resprout: ") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_and_lists(capsys):
    assert command_line.dispatch(["bench"]) == 0
    assert "resprout bench run SUITE" in capsys.readouterr().out
    assert command_line.dispatch(["list", "suites"]) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(listed) == {*SUITES, "errr-counts"}
    assert "Sokar et al. (2023" in listed["redo-atari"] and "Fujita (2025)" in listed["errr-counts"]
