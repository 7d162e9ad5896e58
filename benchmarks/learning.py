"""Learning curves of runs, ours and a peer's: a Markdown table of the last values, and a figure.

python -m resprout.benchmarks.learning runs/*-s? peers/*.json --png curves.png
python -m resprout.benchmarks.learning benchmarks/results/ace-mujoco-small-curves.csv --png curves.png
python -m resprout.benchmarks.learning runs/*-s? --metric eval/return dormant/post/tau0/critic --png dormancy.png
python -m resprout.benchmarks.learning benchmarks/results/redo-minatar-curves.csv --agents dqn-rr4 redo-rr4 --png ratio4.png
"""

import argparse
import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..training.experiment import CHANGEABLE
from ..training.files import read_record
from ..training.metrics import read_metrics
from .compare import flat, text
from .results_ import read_curves

RETURN = "eval/return"
# Fields that tell no two configurations apart: what is trained on, what is only watched, what has a field of its own.
SAME = {"env", "seed", "diagnose_every", "count_draws", "save_replay", "interventions"}


class Curve(NamedTuple):
    agent: str
    env: str
    seed: int
    metric: str
    points: list[tuple[int, float]]  # (agent step, value)
    config: dict[str, Any]  # of a run of ours, by field or intervention


def read(path: Path, metric: str = RETURN) -> list[Curve]:
    """Of a run directory of ours, of the curves of a suite's results, or of the JSON file of a peer's run, which has returns only.

    ValueError if it has no such metric.
    """
    if path.suffix == ".csv":
        points = defaultdict(list)
        for point in read_curves(path):
            if point.metric == metric:
                points[point.arm, point.task.partition("/")[2], point.seed].append((point.step, point.value))
        curves = [Curve(*run, metric, sorted(values), {}) for run, values in points.items()]
    else:
        curves = [read_run(path, metric)]
    if not curves or not all(curve.points for curve in curves):
        raise ValueError(f"{path} has no {metric}")
    return curves


def read_run(path: Path, metric: str) -> Curve:
    if path.is_dir():
        experiment = read_record(path / "config.json", experiment=dict)["experiment"]
        lines = read_metrics(path / "metrics.jsonl")
        points = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
        names = [f"resprout {experiment['agent']['name']}"]
        settings = defaultdict(list)
        for spec in experiment.get("interventions", ()):
            name, _, fields = spec.partition(":")
            names.append(name)
            settings[name].append(fields)
        config = {key: value for key, value in flat(experiment).items() if key not in SAME | CHANGEABLE}
        config |= {name: " and ".join(each) for name, each in settings.items()}
        return Curve(" + ".join(names), experiment["env"].partition("/")[2], experiment["seed"], metric, points, config)
    data = read_record(path, peer=str, version=str, env=str, seed=int, curve=list)
    points = [(step, float(np.mean(returns))) for step, returns in data["curve"]] if metric == RETURN else []
    return Curve(f"{data['peer']} {data['version']}", data["env"], data["seed"], metric, points, {})


def told_apart(curves: list[Curve]) -> list[Curve]:
    """With the fields in which configurations of one name differ added to it. ValueError if one has a seed twice."""
    configs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for curve in curves:
        if curve.config not in configs[curve.agent]:
            configs[curve.agent].append(curve.config)
    named = []
    for curve in curves:
        all_fields = sorted({field for config in configs[curve.agent] for field in config})
        differ = [field for field in all_fields if len({str(each.get(field)) for each in configs[curve.agent]}) > 1]
        added = ", ".join(f"{field} {text(curve.config.get(field))}" for field in differ)
        named.append(curve._replace(agent=f"{curve.agent} ({added})" if added else curve.agent))
    for group in grouped(named).values():
        for one, other in itertools.pairwise(group):
            if one.seed == other.seed:
                raise ValueError(f"seed {one.seed} of {one.agent} on {one.env} is there twice")
    return named


def only(curves: list[Curve], agents: list[str]) -> list[Curve]:
    """Those of some agents, as the table names them. ValueError if one is not there."""
    known = sorted({curve.agent for curve in curves})
    for agent in agents:
        if agent not in known:
            raise ValueError(f"no agent {agent!r}: there are {', '.join(known)}")
    return [curve for curve in curves if curve.agent in agents]


def table(curves: list[Curve]) -> str:
    """One Markdown row per task, metric and agent: the last value of every seed, their mean and range."""
    rows = [
        "| task | metric | agent | agent steps | last, by seed | mean | range |",
        "|---|---|---|---|---|---|---|",
    ]
    for (env, metric, agent), members in grouped(curves).items():
        for steps in sorted({member.points[-1][0] for member in members}):  # runs of other lengths are no comparison
            last = [member.points[-1][1] for member in members if member.points[-1][0] == steps]
            values = ", ".join(f"{value:.4g}" for value in last)
            spread = f"{np.mean(last):.4g} | {min(last):.4g} to {max(last):.4g}"
            rows.append(f"| {env} | {metric} | {agent} | {steps:,} | {values} | {spread} |")
    return "\n".join(rows)


def grouped(curves: list[Curve]) -> dict[tuple[str, str, str], list[Curve]]:
    groups: dict[tuple[str, str, str], list[Curve]] = defaultdict(list)
    for curve in sorted(curves, key=lambda curve: (curve.env, curve.metric, curve.agent, curve.seed)):
        groups[curve.env, curve.metric, curve.agent].append(curve)
    return groups


def plot(curves: list[Curve], path: Path) -> None:
    """A row of panels per metric, a column per task, of one task all in a row; a thin line per seed, a thick one for their mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    groups = grouped(curves)
    tasks, metrics = sorted({env for env, *_ in groups}), list(dict.fromkeys(curve.metric for curve in curves))
    agents = sorted({agent for *_, agent in groups})
    rows, columns = (len(metrics), len(tasks)) if len(tasks) > 1 else (1, len(metrics))
    figure = Figure(figsize=(5 * columns, 3.6 * rows + 0.2 * len(agents)), dpi=110, layout="constrained")
    panels = FigureCanvasAgg(figure).figure.subplots(rows, columns, squeeze=False).reshape(len(metrics), len(tasks))
    for (env, metric, agent), members in groups.items():
        axes, place = panels[metrics.index(metric), tasks.index(env)], agents.index(agent)
        look = {"color": f"C{place % 10}", "linestyle": ("-", "--", ":")[place // 10 % 3]}
        for member in members:
            axes.plot(*zip(*member.points, strict=True), **look, alpha=0.3, linewidth=1)
        steps = sorted(set.intersection(*({step for step, _ in member.points} for member in members)))
        means = [np.mean([dict(member.points)[step] for member in members]) for step in steps]
        axes.plot(steps, means, **look, label=_label(agent, groups), linewidth=2)
        axes.set(title=env, xlabel="agent steps", ylabel="evaluation return" if metric == RETURN else metric)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    every = [line for axes in panels.flat for line in axes.lines]
    lines = {line.get_label(): line for line in every if not line.get_label().startswith("_")}
    for axes in panels.flat:
        axes.set_visible(bool(axes.lines))
    figure.legend(lines.values(), lines.keys(), loc="outside lower left", frameon=False)
    figure.savefig(path)


def _label(agent: str, groups: dict[tuple[str, str, str], list[Curve]]) -> str:
    """With the number of its seeds, which need not be the same on every task."""
    counts = sorted({len(members) for (*_, of), members in groups.items() if of == agent})
    number = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"{agent}, {number} seed{'s' * (counts[-1] > 1)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", type=Path, nargs="+", help="run directories or SUITE-curves.csv of ours, JSON files of peers"
    )
    parser.add_argument("--metric", nargs="+", default=[RETURN], help="names in metrics.jsonl; a peer has returns only")
    parser.add_argument(
        "--agents", nargs="+", help="these alone, by the names that the table has for them; all if left out"
    )
    parser.add_argument("--png", type=Path, help="write the figure here")
    arguments = parser.parse_args()
    try:
        curves = [curve for metric in arguments.metric for path in arguments.runs for curve in read(path, metric)]
        curves = told_apart(curves)
        if arguments.agents:
            curves = only(curves, arguments.agents)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    print(table(curves))
    if arguments.png:
        plot(curves, arguments.png)
        print(f"figure: {arguments.png}")


if __name__ == "__main__":
    main()
