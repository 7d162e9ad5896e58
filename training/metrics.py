"""What a run says of itself: sums on the device, episode statistics, metrics.jsonl, progress and the curve."""

import datetime
import errno
import importlib.util
import json
import os
import select
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

NEVER = np.iinfo(np.int32).max


class Totals(struct.PyTreeNode):
    """Sums of an agent's metrics since the last line; they stay on the device until a line is due.

    Two arrays rather than one for each metric, for every array costs the loop some microseconds in each gradient step.
    """

    names: tuple[str, ...] = struct.field(pytree_node=False)
    sums: jax.Array  # [names] float32
    counts: jax.Array  # [3] int32: gradient steps summed, those that were not finite, the first of these (or NEVER)

    @classmethod
    def zeros(cls, names: tuple[str, ...]) -> Self:
        return cls(names, jnp.zeros(len(names)), jnp.array([0, 0, NEVER], jnp.int32))

    def add(self, values: jax.Array, finite: jax.Array, gradient_step: jax.Array) -> Self:
        """With the metrics of one more gradient step, `values` in the order of `names`."""
        count, skipped, first_skipped = self.counts
        first_skipped = jnp.where(finite, first_skipped, jnp.minimum(first_skipped, gradient_step))
        return self.replace(
            sums=self.sums + values,
            counts=jnp.stack([count + 1, skipped + ~finite, first_skipped]),
        )

    def means(self) -> dict[str, float]:
        """Mean of each metric over the finite gradient steps; waits for the device. Empty if there were none."""
        count, skipped, _ = self.counts.tolist()
        if count == skipped:
            return {}
        return {name: value / (count - skipped) for name, value in zip(self.names, self.sums.tolist(), strict=True)}

    @property
    def skipped(self) -> int:
        """Gradient steps whose metrics were not finite; waits for the device."""
        return int(self.counts[1])

    def not_finite(self) -> str | None:
        """Name and value of a metric that is not finite, with the gradient step it began at; waits for the device."""
        for name, value in zip(self.names, self.sums.tolist(), strict=True):
            if not np.isfinite(value):
                return f"{name} became {value} at gradient step {int(self.counts[2])}"
        return None


class Episodes:
    """Returns (unclipped) and lengths (agent steps) of the running episodes and of those that ended since a line."""

    def __init__(self, num_envs: int) -> None:
        self.running_return = np.zeros(num_envs)
        self.running_length = np.zeros(num_envs, np.int64)
        self.ended: list[tuple[float, int]] = []  # (return, length)
        self.last_return = float("nan")  # mean over the last line that saw an episode end

    def add(self, reward: NDArray[np.float32], over: NDArray[np.bool_]) -> None:
        self.running_return += reward
        self.running_length += 1
        if over.any():
            self.ended += zip(self.running_return[over].tolist(), self.running_length[over].tolist(), strict=True)
            self.running_return[over] = 0
            self.running_length[over] = 0

    def add_all(self, rewards: NDArray[np.float32], over: NDArray[np.bool_]) -> None:
        """Many agent steps [T, N] at once; bit for bit as one after the other."""
        begin = 0
        for end in [*np.flatnonzero(over.any(axis=1)), len(over) - 1]:
            quiet = rewards[begin:end].astype(np.float64)  # in which no episode ends
            self.running_return = np.add.accumulate(np.vstack([self.running_return, quiet]))[-1]
            self.running_length += len(quiet)
            if begin <= end < len(over):
                self.add(rewards[end], over[end])
            begin = end + 1

    def abandon(self) -> None:
        """Forget the running episodes: they were cut short from outside and have no return."""
        self.running_return[:] = 0
        self.running_length[:] = 0

    def line(self) -> dict[str, float]:
        """Statistics of the episodes that ended since the last call; empty if none did."""
        if not self.ended:
            return {}
        returns, lengths = zip(*self.ended, strict=True)
        self.ended = []
        self.last_return = float(np.mean(returns))
        return {
            "episode/return": self.last_return,
            "episode/length": float(np.mean(lengths)),
            "episode/count": len(returns),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "running_return": self.running_return.tolist(),
            "running_length": self.running_length.tolist(),
            "ended": self.ended,
            "last_return": None if np.isnan(self.last_return) else self.last_return,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        episodes = cls(len(data["running_return"]))
        episodes.running_return[:] = data["running_return"]
        episodes.running_length[:] = data["running_length"]
        episodes.ended = [(float(value), int(length)) for value, length in data["ended"]]
        episodes.last_return = float("nan") if data["last_return"] is None else data["last_return"]
        return episodes


class MetricsFile:
    """metrics.jsonl: one object a line, appended whole; a kill or a full disk can cost at most the last line."""

    def __init__(self, path: Path, keep_bytes: int | None = None) -> None:
        """Open for appending; `keep_bytes` first cuts the file back to what a checkpoint knew of it."""
        self.file = path.open("ab", buffering=0)  # what a full disk refuses is not tried again when it is closed
        if keep_bytes is not None:
            self.file.truncate(min(keep_bytes, path.stat().st_size))
        self.file.seek(0, 2)

    def write(self, line: dict[str, Any]) -> None:
        text = json.dumps({key: plain(value) for key, value in line.items()}).encode() + b"\n"
        if self.file.write(text) != len(text):
            raise OSError(errno.ENOSPC, "the last line was cut short")

    def length(self) -> int:
        """Bytes so far, all of them on the disk when this returns."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        self.file.close()


def plain(value: Any) -> Any:
    """A number as JSON can hold it: None for one that is not finite."""
    return value if not isinstance(value, float) or np.isfinite(value) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl; a last line cut short by a kill is left out. ValueError if one is damaged."""
    text = path.read_text(errors="replace") if path.exists() else ""
    complete = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    try:
        lines = [json.loads(line) for line in complete]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if not all(isinstance(line, dict) and "step" in line for line in lines):
        raise ValueError(f"{path} is damaged (a line without a step)")
    return lines


class Tracker:
    """Sends every line to TensorBoard or Weights & Biases as well; `None` sends it nowhere."""

    def __init__(self, kind: str | None, directory: Path, config: dict[str, Any]) -> None:
        self.writer: Any = None
        self.kind = kind
        if kind == "tensorboard":
            from tensorboardX import SummaryWriter

            self.writer = SummaryWriter(str(directory / "tensorboard"))
        elif kind == "wandb":
            import wandb

            name = "/".join(directory.parts[-2:])  # that of one seed of several is s0
            self.writer = wandb.init(  # or seeds of one process would write into one run
                project="resprout", dir=str(directory), config=config, name=name, reinit="create_new"
            )

    @staticmethod
    def check(kind: str | None) -> None:
        """ValueError if the package behind `kind` is not installed."""
        package = {None: None, "tensorboard": "tensorboardX", "wandb": "wandb"}[kind]
        if package is not None and importlib.util.find_spec(package) is None:
            raise ValueError(f"--track {kind} needs an extra: pip install 'resprout[{kind}]'")

    def write(self, line: dict[str, Any]) -> None:
        values = {key: value for key, value in line.items() if key != "step" and isinstance(value, int | float)}
        if self.kind == "tensorboard":
            for key, value in values.items():
                self.writer.add_scalar(key, value, line["step"])
        elif self.kind == "wandb":
            self.writer.log(values, step=line["step"])

    def close(self) -> None:
        if self.kind == "tensorboard":
            self.writer.close()
        elif self.kind == "wandb":
            self.writer.finish()


def say(message: str, quiet: bool = False) -> None:
    """A line for whoever looks on, where there is no bar."""
    if not quiet:
        with lenient():
            print(message, file=sys.stderr, flush=True)


@contextmanager
def lenient() -> Iterator[None]:
    """For lines that nobody may read: that the reader has ended, or that the disk of a log is full, is no reason to stop."""
    try:
        yield
    except (OSError, SystemExit):  # the second is what rich makes of a broken pipe
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # of a stream that is no file
                _let_go_of_broken(stream.fileno())


def _let_go_of_broken(descriptor: int) -> None:
    """Whatever else is written to a pipe whose reader has ended would fail again, at the latest at the end of the process."""
    poll = select.poll()
    poll.register(descriptor, 0)
    if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


RATE_SECONDS = 30  # a look at the diagnostics or an evaluation in between does not pass for the speed of training


class ProgressDisplay:
    """A live bar with steps/s, return and time left; plain lines, at most one in ten seconds, without a terminal."""

    def __init__(self, total: int, start: int, quiet: bool = False) -> None:
        self.console = Console(stderr=True)
        self.quiet = quiet
        self.total, self.shown = total, time.monotonic()
        self.recent = deque([(start, time.monotonic())])
        self.rate = float("nan")  # agent steps/s over the last RATE_SECONDS
        self.bar: Progress | None = None
        if not quiet and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("agent steps", total=total, completed=start, note="")
            self.bar.start()

    def update(self, step: int, episode_return: float) -> None:
        """Called at least every few hundred agent steps; cheap."""
        now = time.monotonic()
        if now - self.recent[-1][1] < 0.5:
            return
        self.recent.append((step, now))
        while len(self.recent) > 2 and now - self.recent[1][1] >= RATE_SECONDS:
            self.recent.popleft()
        first_step, began = self.recent[0]
        self.rate = (step - first_step) / (now - began)
        if self.quiet:
            return
        shown_return = "" if np.isnan(episode_return) else f"  return {episode_return:.1f}"
        note = f"{self.rate:.0f} steps/s{shown_return}"
        if self.bar:
            self.bar.update(self.task, completed=step, note=note)
        elif now - self.shown >= 10:
            self.shown = now
            left = datetime.timedelta(seconds=int((self.total - step) / max(self.rate, 1e-9)))
            self.say(f"step {step}/{self.total}  {note}  {left} left")

    def say(self, message: str) -> None:
        if self.bar:
            with lenient():
                self.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            say(message, self.quiet)

    def close(self) -> None:
        if self.bar:
            with lenient():
                self.bar.stop()
            self.bar = None


CURVES = {"training episodes": "episode/return", "evaluation": "eval/return"}  # label -> value of a line


def plot_curve(directory: Path) -> Path | None:
    """Draw curve.png, the return against agent steps, from metrics.jsonl; None where no episode has ended yet."""
    return _plot(directory, "curve.png", "return", CURVES, ("-", "o-"))


def plot_causal_weights(directory: Path) -> Path | None:
    """Draw causal.png, the weight of each dimension of the action against agent steps; None where none was fitted yet."""
    fitted = (line for line in read_metrics(directory / "metrics.jsonl") if "causal/weight_0" in line)
    names = [key for key in next(fitted, {}) if key.startswith("causal/weight_")]
    keys = {f"action {name.removeprefix('causal/weight_')}": name for name in names}
    return _plot(directory, "causal.png", "causal weight", keys, ("o-",) * len(keys))


def plot_seeds(out: Path, directories: Sequence[Path]) -> Path | None:
    """Draw curve.png of several runs: their mean, and a band from the lowest to the highest, where all have a value."""
    drawn = []
    for label, key in CURVES.items():
        series = [_series(directory, key) for directory in directories]
        if not all(len(steps) for steps, _ in series):
            continue
        start, stop = max(steps[0] for steps, _ in series), min(steps[-1] for steps, _ in series)
        grid = np.unique(np.concatenate([steps for steps, _ in series]))
        grid = grid[(start <= grid) & (grid <= stop)]
        drawn.append((label, grid, np.array([np.interp(grid, *one) for one in series])))
    if not drawn:
        return None
    with _drawing(directories[0], out / "curve.png", "return") as axes:
        for label, grid, values in drawn:
            (line,) = axes.plot(grid, values.mean(axis=0), label=f"{label}, mean of {len(values)} seeds")
            axes.fill_between(grid, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2, lw=0)
    return out / "curve.png"


def _plot(directory: Path, name: str, ylabel: str, keys: dict[str, str], styles: tuple[str, ...]) -> Path | None:
    """Draw metrics, by label, against agent steps; None where there is nothing to draw."""
    series = {label: _series(directory, key) for label, key in keys.items()}
    if not any(len(steps) for steps, _ in series.values()):
        return None
    with _drawing(directory, directory / name, ylabel) as axes:
        for (label, (steps, values)), style in zip(series.items(), styles, strict=True):
            if len(steps):
                axes.plot(steps, values, style, label=label, markersize=4)
    return directory / name


def _series(directory: Path, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Agent steps and values of what the lines of a run say under `key`."""
    lines = read_metrics(directory / "metrics.jsonl")
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return steps, values


@contextmanager
def _drawing(run: Path, path: Path, ylabel: str) -> Iterator[Any]:
    """Axes for what changes with the agent steps, titled as `run` is; written to `path` at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    config = json.loads((run / "config.json").read_text())["experiment"]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    yield axes
    axes.set(xlabel="agent steps", ylabel=ylabel, title=f"{config['agent']['name']} on {config['env']}")
    axes.legend(frameon=False, ncols=1 + len(axes.lines) // 12)
    axes.grid(alpha=0.3)
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.png")  # another process may draw the same
    figure.savefig(temporary)
    temporary.replace(path)
