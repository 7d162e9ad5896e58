"""Figures of a report as SVG that takes its colours from the page around it, and whose arms can be hidden one by one."""

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from .stats import LEVEL, Array, Interval, Profile

HUES = 8  # colours of arms; --hue-0 to --hue-7 in report.html, where light and dark pages have their own
DASHES = ("-", "--", ":", "-.")  # then the next dash begins the hues anew
RESAMPLES = 2_000  # of a band
TEXT, RULE = "#010101", "#010102"  # stand for what the page decides
STYLE: Any = {
    "axes.edgecolor": RULE,
    "axes.labelcolor": TEXT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "resprout",
    "text.color": TEXT,
    "xtick.color": RULE,
    "xtick.labelcolor": TEXT,
    "ytick.color": RULE,
    "ytick.labelcolor": TEXT,
}

Curve = tuple[Array, Array]  # agent steps and values, [points] each


class Look(NamedTuple):
    """Of an arm, in every figure."""

    number: int  # among the arms of the report
    hue: int
    dash: str

    @property
    def colour(self) -> str:
        """Stands for the hue until the page decides."""
        return f"#0200{self.hue:02x}"


def looks(arms: Sequence[str]) -> dict[str, Look]:
    """Hue first, then dash, so that no two of the first 32 are alike."""
    return {arm: Look(i, i % HUES, DASHES[i // HUES % len(DASHES)]) for i, arm in enumerate(arms)}


def together(curves: Sequence[Curve]) -> tuple[Array, Array]:
    """Several runs on one grid, [points] and [runs, points], over the steps that all of them span."""
    grid = np.unique(np.concatenate([steps for steps, _ in curves]))
    begin, end = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    grid = grid[(begin <= grid) & (grid <= end)]
    return grid, np.array([np.interp(grid, *curve) for curve in curves]).reshape(len(curves), len(grid))


def band(values: Array, seed: int = 0) -> Profile:
    """Mean of the runs, [runs, points] -> [points], and at each point by itself a bootstrap interval of it."""
    count = len(values)
    shares = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
    low, high = np.quantile(shares @ values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return Profile(values.mean(axis=0), low, high)


# Figures. `key` names one in the page.


def curves_svg(key: str, title: str, by_arm: Mapping[str, Sequence[Curve]], styles: Mapping[str, Look]) -> str:
    """Means over runs with bands, against agent steps; an arm with a single run has no band."""

    def draw(axes: Any) -> None:
        for arm, curves in by_arm.items():
            grid, values = together(curves)
            if grid.size:
                draw_line(axes, grid, band(values), styles[arm], banded=len(curves) > 1)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set(xlabel="agent steps", title=title)

    return drawn(key, f"{title}, against agent steps", (4.2, 2.7), draw)


def profiles_svg(
    key: str, title: str, unit: str, thresholds: Array, by_arm: Mapping[str, Profile], styles: Mapping[str, Look]
) -> str:
    """Share of runs above each score."""

    def draw(axes: Any) -> None:
        for arm, profile in by_arm.items():
            draw_line(axes, thresholds, profile, styles[arm], banded=True)
        axes.set(xlabel=unit, ylabel="share of runs above", ylim=(-0.02, 1.02))

    return drawn(key, title, (7.2, 3.2), draw)


def intervals_svg(
    key: str,
    title: str,
    unit: str,
    by_arm: Mapping[str, Interval],
    styles: Mapping[str, Look],
    compared: Mapping[str, str] | None = None,
) -> str:
    """A point and its interval for each arm, the first at the top; compared: their names where they are differences, from zero."""

    names = compared or {arm: arm for arm in by_arm}

    def draw(axes: Any) -> None:
        if compared:
            axes.axvline(0, color=TEXT, linewidth=0.8)
        for place, (arm, interval) in enumerate(by_arm.items()):
            look = styles[arm]
            (line,) = axes.plot(
                [interval.low, interval.high], [place, place], color=look.colour, linewidth=5, alpha=0.4
            )
            (point,) = axes.plot([interval.estimate], [place], "o", color=look.colour, markersize=6)
            line.set_gid(f"line-arm{look.number}")
            point.set_gid(f"point-arm{look.number}")
        axes.set(
            xlabel=unit,
            yticks=range(len(by_arm)),
            yticklabels=[names[arm] for arm in by_arm],
            ylim=(len(by_arm) - 0.4, -0.6),
        )
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)

    return drawn(key, title, (5.6, 0.75 + 0.27 * len(by_arm)), draw)


def draw_line(axes: Any, x: Array, profile: Profile, look: Look, banded: bool) -> None:
    marker = "o" if len(x) == 1 else ""
    (line,) = axes.plot(x, profile.estimate, look.dash, color=look.colour, marker=marker, markersize=4, linewidth=1.6)
    line.set_gid(f"line-arm{look.number}")
    if banded:
        area = axes.fill_between(x, profile.low, profile.high, color=look.colour, alpha=0.15, linewidth=0)
        area.set_gid(f"band-arm{look.number}")


def drawn(key: str, label: str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """What `draw` does to axes of `size` inches, as one <svg> whose ids begin with `key` and whose colours are the page's."""
    written = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = FigureCanvasSVG(figure).figure.add_subplot()
        axes.grid(visible=True)
        axes.set_axisbelow(True)
        draw(axes)
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'( id="|="#|url\(#)', rf"\g<1>{key}-", text)
    view = re.search(r' viewBox="[^"]*"', text)
    assert view is not None
    text = f'<svg{view[0]} role="img" aria-label="{html.escape(label)}">{text[text.index(">") + 1 :]}'
    text = text.replace(TEXT, "var(--text)").replace(RULE, "var(--rule)")
    return re.sub(r"#0200([0-9a-f]{2})", lambda found: f"var(--hue-{int(found[1], 16)})", text)
