"""How often every transition of a ring is drawn over its life, sampler by sampler, beside what theory says.

The simulation of Fujita (2025), "Experience Replay with Random Reshuffling", with no environment and no network: every
`period` agent steps as many transitions are written and one batch is drawn. Priorities are given: each transition keeps
one, log-normal, for its whole life, so that the draws it can expect are known exactly.
"""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..replay import Sampler, masked, prioritized, reshuffled, uniform, without_replacement

Floats = NDArray[np.float64]
PARTS = 4  # of the transitions written while the ring fills, after learning began

# The paper's names; priorities are used as they are given (alpha 1).
UNIFORM: dict[str, Callable[[int], Sampler]] = {
    "WR": uniform,
    "WOR": without_replacement,
    "RR-C": reshuffled,
}
PRIORITIZED: dict[str, Callable[[int], Sampler]] = {
    "PER": partial(prioritized, alpha=1.0),
    "ST": partial(prioritized, alpha=1.0, stratified=True),
    "RR-M": partial(masked, alpha=1.0),
    "RR-M+ST": partial(masked, alpha=1.0, stratified=True),
}
SAMPLERS = UNIFORM | PRIORITIZED
FILES = ("draw-counts.csv", "draw-counts.png")


@dataclass(frozen=True)
class Simulation:
    """Sizes of a simulation; ValueError in one line where they cannot be."""

    capacity: int = 10_000  # transitions in the ring
    batch_size: int = 32  # transitions
    period: int = 4  # agent steps between batches
    learning_starts: int = 800  # agent steps before the first batch
    lives: int = (
        100_000  # transitions to be followed from the moment they are written to that when they are overwritten
    )
    spread: float = 1.0  # standard deviation of the logarithm of a priority
    seed: int = 0  # of the draws and the priorities

    def __post_init__(self) -> None:
        for name in ("capacity", "batch_size", "period", "lives"):
            if getattr(self, name) < 1:
                raise ValueError(f"errr-counts: {name} must be at least 1, not {getattr(self, name)}")
        for name in ("spread", "seed", "learning_starts"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"errr-counts: {name} must be finite and not negative, not {getattr(self, name)}")
        for name in ("capacity", "lives", "learning_starts"):
            if getattr(self, name) % self.period:
                raise ValueError(f"errr-counts: {name} must be a multiple of the period, {self.period}")
        if not self.batch_size <= self.learning_starts <= self.capacity:
            raise ValueError("errr-counts: learning_starts must lie between batch_size and capacity")
        if self.lives <= self.capacity:
            raise ValueError("errr-counts: lives must be more than capacity, or none is lived in a full ring")

    @property
    def draws_per_life(self) -> float:
        """Expected draws of a transition whose whole life is in a full ring (mu)."""
        return self.batch_size / self.period


def priorities(simulation: Simulation) -> Floats:
    """[lives + capacity]: of every transition written."""
    generator = np.random.default_rng(simulation.seed)
    return generator.lognormal(0.0, simulation.spread, simulation.lives + simulation.capacity)


@partial(jax.jit, static_argnums=(0, 1))
def draw(sampler: Sampler, simulation: Simulation, priorities: jax.Array, key: jax.Array) -> jax.Array:
    """[batches, batch_size] int32: which transitions were drawn, numbered in the order they were written."""
    capacity, period = simulation.capacity, simulation.period

    def write(state: Any, index: jax.Array) -> tuple[Any, None]:
        written = index * period + jnp.arange(period)
        slots = written % capacity
        return sampler.update(sampler.add(state, slots), slots, priorities[written]), None

    def write_and_learn(state: Any, index: jax.Array) -> tuple[Any, jax.Array]:
        state, _ = write(state, index)
        state, slots, _ = sampler.sample(state, simulation.batch_size)
        newest = (index + 1) * period - 1
        drawn = newest - (newest - slots) % capacity
        return sampler.update(state, slots, priorities[drawn]), drawn

    first = simulation.learning_starts // period
    state, _ = jax.lax.scan(write, sampler.init(key), jnp.arange(first))
    return jax.lax.scan(write_and_learn, state, jnp.arange(first, len(priorities) // period))[1]


def expected_draws(simulation: Simulation, priorities: Floats) -> Floats:
    """[lives]: sum over the batches of a transition's life of batch_size * priority / (sum of all priorities)."""
    period = simulation.period
    batches = np.arange(1, len(priorities) // period + 1)
    total = np.concatenate([[0.0], np.cumsum(priorities)])
    mass = total[batches * period] - total[np.maximum(batches * period - simulation.capacity, 0)]
    rate = np.where(batches * period > simulation.learning_starts, simulation.batch_size / mass, 0.0)
    share = np.concatenate([[0.0], np.cumsum(rate)])
    born = np.arange(simulation.lives) // period
    draws: Floats = priorities[: simulation.lives] * (share[born + simulation.capacity // period] - share[born])
    return draws


def filling_mean(simulation: Simulation, written: NDArray[Any]) -> Floats:
    """Expected draws of the transition written at agent step s < capacity: mu (ln(C / max(s, L)) + s / C)."""
    capacity, starts = simulation.capacity, simulation.learning_starts
    mean: Floats = simulation.draws_per_life * (np.log(capacity / np.maximum(written, starts)) + written / capacity)
    return mean


def reshuffled_probabilities(mu: float) -> Floats:
    """[floor(mu) + 3]: probability of n draws in a life of mu epochs, which begins anywhere in an epoch (RR-C).

    A life takes part of a first and of a last epoch, and in a whole epoch a slot is drawn once. With mu = m + f the
    ends leave (1 - f)^3 / 6 for m - 1 and f^3 / 6 for m + 2 draws; sum and mean give the two between. For mu < 1 the
    ends may lie in one epoch, in which nothing is drawn twice.
    """
    m, f = int(mu), mu % 1
    if m == 0:
        return np.array([1 - f + f**3 / 6, f - f**3 / 3, f**3 / 6])
    low, high = (1 - f) ** 3 / 6, f**3 / 6
    return np.array([0.0] * (m - 1) + [low, 1 - f - 2 * low + high, f + low - 2 * high, high])


def variance(probabilities: Floats) -> float:
    counts = np.arange(len(probabilities))
    return float(probabilities @ counts**2 - (probabilities @ counts) ** 2)


class Closed(NamedTuple):
    """What theory says of lives in a full ring; NaN where it has no closed form."""

    variance: float  # of the draws
    never: float  # share of the transitions that are never drawn
    excess_variance: float  # of draws less expected draws


def closed_form(name: str, simulation: Simulation, expected: Floats) -> Closed:
    """With mu = batch_size / period = B / F and C the capacity, to the first order in 1 / C.

    WR: draws are Poisson, of variance mu. WOR: binomial, C / F batches with probability B / C each. RR-C: variance 1/3
    (for mu >= 1). PER: Poisson with a mean of its own for every transition.
    """
    mu = simulation.draws_per_life
    share = simulation.batch_size / simulation.capacity
    if name == "WR":
        return Closed(mu, float(np.exp(-mu)), mu)
    if name == "WOR":
        return Closed(mu * (1 - share), (1 - share) ** (simulation.capacity / simulation.period), mu * (1 - share))
    if name == "RR-C":
        probabilities = reshuffled_probabilities(mu)
        return Closed(variance(probabilities), float(probabilities[0]), variance(probabilities))
    if name == "PER":
        mean = float(expected.mean())
        return Closed(float(expected.var()) + mean, float(np.exp(-expected).mean()), mean)
    return Closed(np.nan, np.nan, np.nan)


class Row(NamedTuple):
    """Draws of the transitions written from one agent step to another, measured and by theory."""

    sampler: str
    written_from: int
    written_to: int
    lives: int
    mean: float
    mean_theory: float
    variance: float
    variance_theory: float
    never: float
    never_theory: float
    least: int
    most: int
    excess_variance: float
    excess_variance_theory: float
    most_above_expected: float


def parts(simulation: Simulation) -> list[tuple[int, int]]:
    """Whole lives in a full ring; then, written before it was full: before learning began, and the others in parts."""
    edges = np.linspace(simulation.learning_starts, simulation.capacity, PARTS + 1, dtype=int)
    filling = [0, *(int(edge) for edge in edges)]
    return [(simulation.capacity, simulation.lives), *pairwise(filling)]


def rows(name: str, simulation: Simulation, counts: NDArray[np.int64], expected: Floats) -> list[Row]:
    """One of each of the `parts` that has transitions."""
    found = []
    for start, stop in parts(simulation):
        if start == stop:
            continue
        drawn, hoped = counts[start:stop], expected[start:stop]
        excess = drawn - hoped
        full = start == simulation.capacity
        closed = closed_form(name, simulation, hoped) if full else Closed(np.nan, np.nan, np.nan)
        mean = hoped.mean()
        if name in UNIFORM:
            mean = simulation.draws_per_life if full else filling_mean(simulation, np.arange(start, stop) + 0.5).mean()
        found.append(
            Row(
                *(name, start, stop, stop - start, float(drawn.mean()), float(mean)),
                *(float(drawn.var()), closed.variance, float((drawn == 0).mean()), closed.never),
                *(int(drawn.min()), int(drawn.max())),
                *(float(excess.var()), closed.excess_variance, float(excess.max())),
            )
        )
    return found


class Result(NamedTuple):
    counts: dict[str, NDArray[np.int64]]  # by sampler: [lives]
    expected: dict[str, Floats]
    rows: list[Row]


def simulate(simulation: Simulation, samplers: list[str], console: Console | None = None) -> Result:
    """Every sampler with a stream of its own, on the same priorities where it has any."""
    result = Result({}, {}, [])
    given = priorities(simulation)
    for name in samplers:
        if console:
            console.print(f"{name}: {simulation.lives} lives")
        weights = given if name in PRIORITIZED else np.ones(len(given))
        key = jax.random.fold_in(jax.random.key(simulation.seed), list(SAMPLERS).index(name))
        drawn = draw(SAMPLERS[name](simulation.capacity), simulation, jnp.asarray(weights, jnp.float32), key)
        result.counts[name] = np.bincount(np.ravel(drawn), minlength=len(given))[: simulation.lives]
        result.expected[name] = expected_draws(simulation, weights)
        result.rows.extend(rows(name, simulation, result.counts[name], result.expected[name]))
    return result


def beside(measured: float, theory: float, digits: int = 4) -> str:
    """Measured, and theory's value below it in brackets where there is one."""
    return f"{measured:.{digits}g}" + ("" if np.isnan(theory) else f"\n[dim]({theory:.{digits}g})[/dim]")


def tables(simulation: Simulation, found: list[Row]) -> list[Table]:
    full = Table(
        *("sampler", "mean", "variance", "never drawn", "range", "excess\nvariance", "largest\nexcess"),
        title=f"Draws per life in a full ring, mu = {simulation.draws_per_life:g}; theory in brackets",
        caption="excess: draws less expected draws",
        box=SIMPLE,
    )
    names = list(dict.fromkeys(row.sampler for row in found))
    ranges = dict.fromkeys((row.written_from, row.written_to) for row in found if row.written_to <= simulation.capacity)
    filling = Table(
        *("sampler", *(f"{start} to\n{stop}" for start, stop in ranges)),
        title="Mean draws of transitions written while the ring filled, by agent step; theory in brackets",
        box=SIMPLE,
    )
    for name in names:
        own = [row for row in found if row.sampler == name]
        row = own[0]
        full.add_row(
            name,
            beside(row.mean, row.mean_theory),
            beside(row.variance, row.variance_theory),
            beside(row.never, row.never_theory, 3),
            f"{row.least} to {row.most}",
            beside(row.excess_variance, row.excess_variance_theory),
            f"{row.most_above_expected:.3g}",
        )
        filling.add_row(name, *(beside(row.mean, row.mean_theory) for row in own[1:]))
    return [full, filling]


def plot(simulation: Simulation, result: Result, path: Path) -> None:
    """Lives by draws; by how far draws are from what was expected; mean draws while the ring fills."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), dpi=110, layout="constrained")
    by_draws, by_excess, by_step = FigureCanvasAgg(figure).figure.subplots(1, 3)
    mu, full = simulation.draws_per_life, slice(simulation.capacity, None)
    edges = np.linspace(0, simulation.capacity, min(simulation.capacity, 40) + 1, dtype=int)
    for index, name in enumerate(result.counts):
        counts, style = result.counts[name], {"color": f"C{index}", "label": name}
        excess = np.sort(np.abs(counts[full] - result.expected[name][full]))
        distance = np.linspace(0, excess[-1], 400)
        share_beyond = 1 - np.searchsorted(excess, distance) / len(excess)
        by_excess.plot(distance, share_beyond, linestyle="-" if name in UNIFORM else "--", **style)
        if name in UNIFORM:
            share = np.bincount(counts[full]) / len(excess)
            by_draws.stairs(share, np.arange(len(share) + 1) - 0.5, baseline=None, linewidth=1.8, **style)
            means = [counts[start:stop].mean() for start, stop in pairwise(edges)]
            by_step.plot(edges[:-1] + np.diff(edges) / 2, means, ".", **style)

    if "WR" in result.counts:
        n = np.arange(result.counts["WR"][full].max() + 1)
        log_factorial = np.cumsum(np.log(np.maximum(n, 1)))
        by_draws.plot(n, np.exp(n * np.log(mu) - mu - log_factorial), "k_", label=f"Poisson, mean {mu:g}")
    if "RR-C" in result.counts:
        probabilities = reshuffled_probabilities(mu)
        n = np.flatnonzero(probabilities)
        by_draws.plot(n, probabilities[n], "k+", label="RR-C, theory")
    steps = np.arange(simulation.capacity) + 0.5
    by_step.plot(steps, filling_mean(simulation, steps), "k", linewidth=1, label="theory")
    by_step.axhline(mu, color="grey", linewidth=1, linestyle=":", label="in a full ring")

    by_draws.set(xlabel="draws in a life, full ring", ylabel="share of lives", yscale="log")
    by_excess.set(
        xlabel="distance between draws and expected draws, full ring",
        ylabel="share of lives at least that far",
        yscale="log",
    )
    by_step.set(xlabel="agent step of writing, while the ring fills", ylabel="mean draws in a life")
    for axes in (by_draws, by_excess, by_step):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def run(simulation: Simulation, samplers: list[str], out: Path, console: Console) -> None:
    """Simulate, print the tables, and write draw-counts.csv and draw-counts.png into `out`."""
    result = simulate(simulation, samplers, console)
    out.mkdir(parents=True, exist_ok=True)
    rows, figure = (out / name for name in FILES)
    with rows.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(result.rows)
    plot(simulation, result, figure)
    for table in tables(simulation, result.rows):
        console.print(table)
    console.print(f"table: {rows}\nfigure: {figure}")
