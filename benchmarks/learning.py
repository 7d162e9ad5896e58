"""Learning curves of runs, ours and a peer's: a Markdown table of final evaluation returns, and a figure.

python -m resprout.benchmarks.learning runs/*-s? peers/*.json --png curves.png
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..training.metrics import read_metrics


class Curve(NamedTuple):
    agent: str
    env: str
    seed: int
    points: list[tuple[int, float]]  # (agent step, mean evaluation return)


def read(path: Path) -> Curve:
    """A run directory of ours, or the JSON file of a peer's run."""
    if path.is_dir():
        experiment = json.loads((path / "config.json").read_text())["experiment"]
        lines = read_metrics(path / "metrics.jsonl")
        points = [(line["step"], line["eval/return"]) for line in lines if "eval/return" in line]
        name = f"resprout {experiment['agent']['name']}"
        return Curve(name, experiment["env"].rpartition("/")[2], experiment["seed"], points)
    data = json.loads(path.read_text())
    points = [(step, float(np.mean(returns))) for step, returns in data["curve"]]
    return Curve(f"{data['peer']} {data['version']}", data["env"], data["seed"], points)


def table(curves: list[Curve]) -> str:
    """One Markdown row per task and agent: the last evaluation of every seed, their mean and range."""
    rows = [
        "| task | agent | agent steps | last evaluation return, by seed | mean | range |",
        "|---|---|---|---|---|---|",
    ]
    for (env, agent), members in grouped(curves).items():
        for steps in sorted({member.points[-1][0] for member in members}):  # runs of other lengths are no comparison
            last = [member.points[-1][1] for member in members if member.points[-1][0] == steps]
            values = ", ".join(f"{value:.1f}" for value in last)
            rows.append(
                f"| {env} | {agent} | {steps:,} | {values} | {np.mean(last):.1f} | {min(last):.1f} to {max(last):.1f} |"
            )
    return "\n".join(rows)


def grouped(curves: list[Curve]) -> dict[tuple[str, str], list[Curve]]:
    groups: dict[tuple[str, str], list[Curve]] = defaultdict(list)
    for curve in sorted(curves, key=lambda curve: (curve.env, curve.agent, curve.seed)):
        groups[curve.env, curve.agent].append(curve)
    return groups


def plot(curves: list[Curve], path: Path) -> None:
    """A panel per task; a thin line per seed, a thick one for their mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    groups = grouped(curves)
    envs = sorted({env for env, _ in groups})
    agents = sorted({agent for _, agent in groups})
    figure = Figure(figsize=(5 * len(envs), 3.6), dpi=110, layout="constrained")
    panels = FigureCanvasAgg(figure).figure.subplots(1, len(envs), squeeze=False)[0]
    for (env, agent), members in groups.items():
        axes, colour = panels[envs.index(env)], f"C{agents.index(agent)}"
        for member in members:
            axes.plot(*zip(*member.points, strict=True), color=colour, alpha=0.3, linewidth=1)
        steps = sorted(set.intersection(*({step for step, _ in member.points} for member in members)))
        means = [np.mean([dict(member.points)[step] for member in members]) for step in steps]
        axes.plot(steps, means, color=colour, label=f"{agent}, {len(members)} seeds", linewidth=2)
        axes.set(title=env, xlabel="agent steps", ylabel="evaluation return")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories of ours, JSON files of peers")
    parser.add_argument("--png", type=Path, help="write the figure here")
    arguments = parser.parse_args()
    curves = [read(path) for path in arguments.runs]
    print(table(curves))
    if arguments.png:
        plot(curves, arguments.png)
        print(f"figure: {arguments.png}")


if __name__ == "__main__":
    main()
