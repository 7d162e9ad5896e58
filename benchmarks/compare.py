"""Two runs side by side: what differs in their configurations, what they returned, what they measured at the end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..training.files import read_record
from ..training.metrics import read_metrics
from .sheet import Sheet

POSITION = frozenset({"step", "gradient_step", "wall_clock"})  # of a line of metrics, and no measurement
OWN = frozenset({"out"})  # fields of an experiment in which any two runs differ


def compare(first: Path, second: Path) -> list[Sheet]:
    """ValueError, in one line, where one is no run directory. Runs may be unfinished."""
    a, b = read(first), read(second)
    columns = (str(first), str(second))
    results = [(name, text(a["results"].get(name)), text(b["results"].get(name))) for name in a["results"]]
    last = sorted(a["metrics"].keys() | b["metrics"].keys())
    measured = [(name, text(a["metrics"].get(name)), text(b["metrics"].get(name))) for name in last]
    return [
        Sheet("Configuration, where it differs", ("field", *columns), differing(a["config"], b["config"])),
        Sheet("Result", ("", *columns), results),
        Sheet("Last value of each metric", ("metric", *columns), measured),
    ]


def read(directory: Path) -> dict[str, dict[str, Any]]:
    """config, results and metrics of a run, flat."""
    try:
        config = read_record(directory / "config.json", experiment=dict, versions=dict)
        experiment = flat({key: value for key, value in config["experiment"].items() if key not in OWN})
        versions = flat({"version": config["versions"]})
        lines = read_metrics(directory / "metrics.jsonl")
        summary_path = directory / "summary.json"
        summary = read_record(summary_path) if summary_path.exists() else {}
        episodes = len(summary.get("episode_returns", ())) or None
    except (OSError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{directory} is not a run directory ({type(error).__name__}: {error})") from None
    metrics: dict[str, Any] = {}
    for line in lines:
        metrics |= {name: value for name, value in line.items() if name not in POSITION}
    step = lines[-1]["step"] if lines else 0
    results = {
        "finished": "yes" if summary else f"no, at agent step {step}",
        "return": summary.get("return"),
        "episodes": episodes,
        "agent steps": summary.get("agent_steps", step),
        "gradient steps": summary.get("gradient_steps", lines[-1].get("gradient_step") if lines else 0),
        "steps per second": summary.get("steps_per_second"),
        "peak memory, bytes": summary.get("peak_memory_bytes"),
    }
    commit = {"git_commit": config.get("git_commit")}
    return {"config": experiment | versions | commit, "results": results, "metrics": metrics}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, agent.gamma."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(field, value, value) where they are not the same; a field that one of them has not is a dash there."""
    absent = object()
    found = []
    for key in [*first, *(key for key in second if key not in first)]:
        values = [of.get(key, absent) for of in (first, second)]
        exact = [repr(value) for value in values]  # true is not 1
        if exact[0] == exact[1]:
            continue
        a, b = ("-" if value is absent else text(value, "none") for value in values)
        found.append((key, a, b) if a != b else (key, exact[0], exact[1]))
    return found


def text(value: Any, nothing: str = "-") -> str:
    if value is None:
        return nothing
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
