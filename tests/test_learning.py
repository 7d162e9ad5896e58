"""Curves of finished runs in a table and a figure."""

import json

import pytest

from resprout.agents import DQN
from resprout.benchmarks.learning import Curve, main, only, plot, read, table, told_apart
from resprout.training import Experiment

RESULTS = """\
schema,arm,task,seed,step,fau/critic,eval/return
1,ace,mujoco/Hopper-v4,0,10,0.5,3
1,ace,mujoco/Hopper-v4,0,20,,5
1,ace,mujoco/Hopper-v4,1,20,,7
1,sac,mujoco/Hopper-v4,0,20,,2
"""
TABLE = """\
| task | metric | agent | agent steps | last, by seed | mean | range |
|---|---|---|---|---|---|---|
| Hopper-v4 | eval/return | ace | 20 | 5, 7 | 6 | 5 to 7 |
| Hopper-v4 | eval/return | peer 1.0 | 20 | 4 | 4 | 4 to 4 |
| Hopper-v4 | eval/return | sac | 20 | 2 | 2 | 2 to 2 |"""


def test_results_and_a_peer_are_summed_up_by_task_and_arm(tmp_path):
    curves, peer = tmp_path / "suite-curves.csv", tmp_path / "peer.json"
    curves.write_text(RESULTS)
    peer.write_text(
        json.dumps({"peer": "peer", "version": "1.0", "env": "Hopper-v4", "seed": 0, "curve": [[20, [3.0, 5.0]]]})
    )
    read_all = [*read(curves), *read(peer)]
    assert read_all[0] == Curve("ace", "Hopper-v4", 0, "eval/return", [(10, 3.0), (20, 5.0)], {})
    assert table(read_all) == TABLE
    plot(read_all, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [curve.points for curve in read(curves, "fau/critic")] == [[(10, 0.5)]]


def test_what_is_not_there_is_said(tmp_path):
    curves = tmp_path / "suite-curves.csv"
    curves.write_text(RESULTS)
    with pytest.raises(ValueError, match="has no srank/critic"):
        read(curves, "srank/critic")
    with pytest.raises(ValueError, match="no agent 'redo': there are ace, sac"):
        only(read(curves), ["sac", "redo"])


def test_what_is_no_run_and_no_peer_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "peer.json").write_text('{"peer": "peer"}')
    for name, said in (
        ("run", "config.json is damaged (its experiment is null)"),
        ("peer.json", "is damaged (its version is"),
    ):
        monkeypatch.setattr("sys.argv", ["learning", str(tmp_path / name)])
        with pytest.raises(SystemExit, match="2"):
            main()
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_some_agents_of_many(tmp_path, monkeypatch, capsys):
    curves = tmp_path / "suite-curves.csv"
    curves.write_text(RESULTS)
    monkeypatch.setattr("sys.argv", ["learning", str(curves), "--agents", "sac"])
    main()
    assert capsys.readouterr().out.splitlines() == [*TABLE.splitlines()[:2], TABLE.splitlines()[-1]]


def test_no_two_agents_of_a_figure_look_alike(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: drawn.append(figure))
    plot(
        [Curve(f"a{i:02}", "Hopper-v4", 0, "eval/return", [(1, 0.0), (2, i)], {}) for i in range(20)],
        tmp_path / "a.png",
    )
    means = [line for line in drawn[0].axes[0].lines if not line.get_label().startswith("_")]
    assert len({(line.get_color(), line.get_linestyle()) for line in means}) == len(means) == 20


def test_an_agent_stands_once_in_the_legend_whichever_task_has_more_seeds(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: drawn.append(figure))
    runs = [("a", "Hopper-v4", 0), ("a", "Hopper-v4", 1), ("a", "Ant-v4", 0), ("b", "Ant-v4", 0)]
    plot([Curve(*run, "eval/return", [(1, 0.0), (2, 1.0)], {}) for run in runs], tmp_path / "a.png")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a, 1 to 2 seeds", "b, 1 seed"]


def test_configurations_of_one_name_are_told_apart_and_no_seed_counts_twice(tmp_path):
    def run(name, value, seed=0, **changes):
        path = tmp_path / name
        path.mkdir()
        experiment = Experiment(agent=DQN(warmup=10), env="minatar/Breakout", seed=seed, out=str(path), **changes)
        (path / "config.json").write_text(json.dumps({"experiment": experiment.to_json()}))
        (path / "metrics.jsonl").write_text(json.dumps({"step": 20, "eval/return": value}) + "\n")
        return read(path)

    plain = [*run("a", 1.0), *run("b", 3.0, seed=1, steps=20)]
    assert [curve.agent for curve in told_apart(plain)] == ["resprout dqn"] * 2
    every = told_apart([*plain, *run("c", 5.0, replay="reshuffled")])
    assert [curve.agent for curve in every] == [
        *["resprout dqn (replay uniform)"] * 2,
        "resprout dqn (replay reshuffled)",
    ]
    assert "| 20 | 1, 3 | 2 | 1 to 3 |" in table(every) and "| 20 | 5 | 5 | 5 to 5 |" in table(every)
    one = run("e", 5.0, interventions=("redo:tau=0", "redo:tau=0.1,score=gradient"))
    other = run("f", 7.0, interventions=("redo:tau=0.2", "redo:tau=0.1,score=gradient"))
    assert len({curve.agent for curve in told_apart([*one, *other])}) == 2
    with pytest.raises(ValueError, match="seed 0 of resprout dqn on Breakout is there twice"):
        told_apart([*plain, *run("d", 5.0, steps=100)])
