"""How cost grows: which runs are planned, and how what they say is summed up and drawn; at size in `make bench-scaling`."""

import dataclasses
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from resprout.benchmarks import scaling
from resprout.benchmarks.scaling import CACHES, Point, Row, experiment, fill, plan, plot, said, summarise, table
from resprout.envs import make
from resprout.training.placement import make_rings
from resprout.training.run import Run

ROWS = [
    Row("seeds", "sac", "e", 1, 0, steps_per_second=100.0, peak_memory_bytes=1_000),
    Row("seeds", "sac", "e", 2, 0, steps_per_second=150.0, peak_memory_bytes=2_000),
    Row("seeds", "sac", "e", 1, 1, steps_per_second=80.0, peak_memory_bytes=1_000),
    Row("seeds", "sac", "e", 2, 1, steps_per_second=190.0, peak_memory_bytes=4_000),
    Row("seeds", "sac", "e", 1, 2, steps_per_second=90.0, peak_memory_bytes=1_600),
    Row("start", "dqn", "e", "cold", 0, first_update_seconds=30.0, peak_memory_bytes=10**9),
    Row("start", "dqn", "e", "warm", 0, first_update_seconds=10.0),
]
POINTS = [
    Point("seeds", "sac", 1, 90.0, 80.0, 100.0, 1_000),
    Point("seeds", "sac", 2, 170.0, 150.0, 190.0, 3_000),
    Point("start", "dqn", "cold", 30.0, 30.0, 30.0, 10**9),
    Point("start", "dqn", "warm", 10.0, 10.0, 10.0, None),
]


def test_medians_and_ranges_of_every_point() -> None:
    assert summarise(ROWS) == POINTS
    assert table(POINTS).row_count == 4
    assert [said(row) for row in ROWS[-3::2]] == ["seeds 1, sac: 90 steps/s", "start warm, dqn: 10.0 s"]


def test_every_part_has_a_panel_with_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    from matplotlib.axes import Axes

    errorbar, bar = Axes.errorbar, Axes.bar

    def lines(self, x, y, **options):
        drawn.setdefault("line", (x, y, options["yerr"]))  # bars with ranges come here, too
        return errorbar(self, x, y, **options)

    def bars(self, x, height, *rest, **options):
        drawn[options["label"]] = x, height
        return bar(self, x, height, *rest, **options)

    monkeypatch.setattr(Axes, "errorbar", lines)
    monkeypatch.setattr(Axes, "bar", bars)
    plot(POINTS, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert drawn == {
        "line": ([1, 2], [90.0, 170.0], [[10.0, 20.0], [10.0, 20.0]]),
        "cold": ([-0.2], [30.0]),
        "warm": ([0.2], [10.0]),
    }


def test_the_plan_takes_turns_and_starts_cold() -> None:
    tasks = plan(["seeds", "start"], ["sac", "drm"], 2, quick=False)
    seeds = [task for task in tasks if task["part"] == "seeds"]
    assert [(task["agent"], task["value"]) for task in seeds] == [("sac", value) for value in (1, 2, 4, 8, 16)] * 2
    starts = [(task["repeat"], task["agent"], task["value"]) for task in tasks if task["part"] == "start"]
    assert starts == [(repeat, agent, cache) for repeat in (0, 1) for agent in ("sac", "drm") for cache in CACHES]
    agents = dict.fromkeys(task["agent"] for task in plan(scaling.PARTS, list(scaling.START_ENVS), 1, quick=True))
    assert sorted(agents) == ["ace", "dqn", "drm", "drqv2", "sac"]


@pytest.mark.parametrize("agent", ["sac", pytest.param("dqn", marks=pytest.mark.slow)])
def test_the_replay_is_full_before_the_clock_starts(agent: str) -> None:
    """On the host and on the device; the sampler draws from all of it."""
    common = experiment(agent, capacity=2_000)
    env = make(common.env)
    rings = make_rings(common, env.spec) if agent == "dqn" else None
    with ExitStack() as stack:
        run = Run(common, Path("none"), env, common.build_agent(env.spec), (), True, stack, rings)
        run.training = run.fresh()
        fill(run)
        run.restart_environments()
    storage = run.training.storage
    assert len(storage) == storage.written == 2_000
    slots = np.asarray(run.sampler.sample(run.training.sampler, 500)[1])
    assert slots.min() < 100 and slots.max() >= 1_900
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize(("agent", "seeds"), [("sac", 1), ("sac", 2), ("dqn", 2)])
def test_a_speed_is_measured(agent: str, seeds: int) -> None:
    common = experiment(agent, capacity=500, width=16)
    common = dataclasses.replace(common, agent=dataclasses.replace(common.agent, batch_size=8))
    assert 1 < scaling.speed(common, seeds, 30)["steps_per_second"] < 1e6


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "where to? --out DIR"),
        (("--out", "new", "--repeats", "0"), "--repeats must be at least 1, not 0"),
        (("--out", "full"), "full exists already; give another --out"),
        (("--out", "new", "--parts", "depth"), "invalid choice: 'depth'"),
    ],
)
def test_what_cannot_be_creates_nothing(
    flags: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scaling", *flags])
    with pytest.raises(SystemExit) as stop:
        scaling.main()
    assert stop.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()
