"""`resprout bench report`: one HTML file that opens without a network, from which every figure can be traced to its runs."""

import json
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..training.checkpoint import write_atomically
from .changing import Turns
from .compare import flat
from .plots import Curve, Look, curves_svg, intervals_svg, looks, profiles_svg
from .results_ import RESULTS, RETURNS, Point, Row
from .runner import run_directory
from .sheet import FEW, Sheet, cells, few, plain
from .stats import LEVEL, differences, mean, performance_profile, stratified_interval
from .suites import Suite
from .tables import (
    Returns,
    arms_sheet,
    arrays,
    changes,
    command,
    gather,
    measured,
    notes_on_rows,
    ours,
    pairs_sheets,
    published_sheets,
    returns_of,
    rows_sheet,
    run_length,
    to_scores,
    training_returns,
    turn_sheets,
)

TEMPLATE = Path(__file__).with_name("report.html")
THRESHOLDS = 101  # of a performance profile
PLACES = ("env", "seed", "out", "steps")  # what differs between the runs of an arm anyway

Curves = dict[str, dict[str, dict[str, list[Curve]]]]  # metric -> task -> arm -> runs


def write_report(path: Path, name: str, suite: Suite, source: str, out: Path | None, results: Path | None) -> None:
    """Write the report of what is finished to `path`, whole or not at all; `source` says what the suite is.

    out, results: run directories and a folder of results, either or both. ValueError, in one line, where there is nothing.
    """
    rows, points = gather(name, suite, out, results)
    given = (("--out", out), ("--results", results if results != RESULTS else None))
    flags = [f" {flag} {shlex.quote(str(folder))}" for flag, folder in given if folder]
    written_by = f"resprout bench report {name} --html {shlex.quote(str(path))}{''.join(flags)}"
    page = TEMPLATE.read_text().replace("@title@", escape(f"{name} · resprout"))
    write_atomically(path, page.replace("@body@", body(name, suite, source, rows, points, out, written_by)))


def body(
    name: str,
    suite: Suite,
    source: str,
    rows: Sequence[Row],
    points: Sequence[Point],
    out: Path | None,
    written_by: str = "",
) -> str:
    """What stands between <body> and the script."""
    returns, turns = returns_of(suite, rows, points), changes(suite, rows, points)
    arms = [arm for arm in suite.arms if any(row.arm == arm for row in rows)]
    tasks = [task for task in suite.tasks if any(row.task == task for row in rows)]
    styles = looks(arms)
    parts = {
        "Aggregate": aggregate(suite, returns, training_returns(suite, rows, points), turns, tasks, styles),
        "Tasks": by_task(suite, rows, returns, tasks),
        "Changes of task": "\n".join(map(table, turn_sheets(suite, returns, turns, tasks))),
        "Published figures": published(suite, rows, returns, turns, tasks),
        "Learning curves": learning(points, arms, tasks, styles, suite.width),
        "Diagnostics": diagnostics(points, arms, tasks, styles),
        "Configurations": configurations(suite, rows, arms, out),
        "Runs": runs(rows, returns),
    }
    parts = {title: text for title, text in parts.items() if text}
    links = " ".join(f'<a href="#{anchor(title)}">{title}</a>' for title in parts)
    sections = "\n".join(
        f'<section aria-labelledby="{anchor(title)}"><h2 id="{anchor(title)}">{title}</h2>\n{text}</section>'
        for title, text in parts.items()
    )
    return f"{head(name, suite, source, rows, written_by)}<nav>{links}</nav>\n{legend(styles)}\n<main>\n{sections}\n</main>"


# Sections


def head(name: str, suite: Suite, source: str, rows: Sequence[Row], written_by: str) -> str:
    """What was run, when and with what."""
    commits = sorted({commit for row in rows for commit in row.commits}) or ["not recorded"]
    versions = sorted({f"{row.resprout}, jax {row.jax}" for row in rows})
    first, last = min(row.finished for row in rows), max(row.finished for row in rows)
    facts = {
        "runs": f"{len(rows):,}",
        "agent steps each": f"{rows[0].agent_steps:,}",
        "evaluation episodes": f"{rows[0].episodes:,}",
        "seeds": ", ".join(str(seed) for seed in sorted({row.seed for row in rows})),
        "finished": first if first == last else f"{first} to {last}",
        "resprout": "; ".join(versions),
        "commit": ", ".join(commits),
    }
    if protocols := sorted({row.protocol for row in rows if row.protocol}):
        facts["protocol"] = ", ".join(protocols)
    if environments := sorted({row.environment for row in rows if row.environment}):
        facts["environment"] = ", ".join(environments)
    told = "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    paragraphs = [" ".join(part.split()) for part in source.split("\n\n")]
    said = "".join(f"<p>{escape(part)}</p>" for part in paragraphs if part)
    return (
        f'<header><h1>{escape(name)}</h1>{said}<dl class="facts">{told}</dl>'
        f'<p class="soft">Runs: <code>{escape(command(name, suite, rows))}</code>, written by '
        f"<code>{escape(written_by)}</code>. Intervals are of {LEVEL:.0%}, by a bootstrap over runs within each task: "
        "they say how well these runs pin down a figure on these tasks.</p></header>\n"
    )


def legend(styles: Mapping[str, Look]) -> str:
    """A box for each arm, which hides it in every figure."""
    dashes = {"-": "", "--": "5 2.5", ":": "1.5 2.5", "-.": "6 2 1.5 2"}
    items = "".join(
        f'<label><input type="checkbox" checked value="{look.number}">'
        f'<svg viewBox="0 0 30 10" aria-hidden="true"><path d="M0 5H30" fill="none" stroke="var(--hue-{look.hue})" '
        f'stroke-width="3" stroke-dasharray="{dashes[look.dash]}"/></svg>{escape(arm)}</label>'
        for arm, look in styles.items()
    )
    switch = '<button type="button">none</button>' if len(styles) > 1 else ""
    return f'<div class="legend" role="group" aria-label="Arms shown in the figures">{items}{switch}</div>'


def aggregate(
    suite: Suite, returns: Returns, training: Returns, turns: Turns, tasks: Sequence[str], styles: Mapping[str, Look]
) -> str:
    """Interquartile means, paired differences and performance profiles over all tasks."""
    evaluated = [task for task in tasks if any(by_task[task] for by_task in returns.values())]
    if not evaluated:
        return "<p>No run was evaluated.</p>"
    try:
        scores, unit = to_scores(suite, returns, evaluated, turns)
    except ValueError as problem:
        return f"<p>No interquartile means: {escape(str(problem))}.</p>"
    intervals = {arm: stratified_interval(arrays(by_task, evaluated)) for arm, by_task in scores.items()}
    sheet = arms_sheet(suite, scores, evaluated, unit, returns)
    drawn = figure(intervals_svg("iqm", sheet.title, f"IQM of {unit}", intervals, styles))
    parts = [f"<h3>{escape(sheet.title)}</h3>{pair(drawn, table(sheet, title=False))}"]
    if found := pairs_sheets(suite, scores, unit, evaluated, training):
        pairs, *more = found
        paired = {
            arm: stratified_interval([differences(scores[arm][task], scores[other][task]) for task in evaluated])
            for arm, other in suite.baselines.items()
            if arm in scores and other in scores
        }
        paired = {arm: interval for arm, interval in paired.items() if not np.isnan(interval.estimate)}
        named = {arm: f"{arm} - {suite.baselines[arm]}" for arm in paired}
        axis = f"IQM of differences of {unit}"
        drawn = figure(intervals_svg("pairs", pairs.title, axis, paired, styles, named)) if paired else ""
        parts.append(f"<h3>{escape(pairs.title)}</h3>{drawn}{table(pairs, title=False)}")
        parts += [table(sheet) for sheet in more]
    complete = {arm: by_task for arm, by_task in scores.items() if all(by_task[task] for task in evaluated)}
    if complete:
        every = [value for by_task in complete.values() for task in evaluated for value in by_task[task].values()]
        low, high = min(0.0, *every), max(every)
        thresholds = np.linspace(low, high if high > low else low + 1, THRESHOLDS)
        profiles = {
            arm: performance_profile(arrays(by_task, evaluated), thresholds) for arm, by_task in complete.items()
        }
        parts.append("<h3>Performance profiles</h3>")
        title = "Share of runs above each score, mean over tasks"
        caption = f"{title}; bands at each score by itself. Arms that lack a task are left out."
        parts.append(figure(profiles_svg("profiles", title, unit, thresholds, profiles, styles), caption))
    return "\n".join(parts)


def by_task(suite: Suite, rows: Sequence[Row], returns: Returns, tasks: Sequence[str]) -> str:
    """Every arm on every task, with the published figure beside it; the number of runs leads to them."""
    lines: list[tuple[str, ...]] = []
    every = []
    for task in tasks:
        for arm in returns:
            values = list(returns[arm][task].values())
            if not values:
                continue
            scored = [np.array(values)]
            every.append(scored)
            link = f'<a href="#{anchor(arm, task)}">{len(values)}</a>'
            theirs = suite.published[arm].of(task) if arm in suite.published else None
            lines.append(
                (
                    *(escape(task), escape(arm), link),
                    *cells(stratified_interval(scored, statistic=mean), scored, plain),
                    *(plain(min(values)), plain(max(values)), plain(theirs.mean) if theirs else ""),
                )
            )
    columns: tuple[str, ...] = ("task", "arm", "runs", "mean return", "95 % interval", "lowest", "highest", "published")
    if not any(line[-1] for line in lines):
        columns, lines = columns[:-1], [line[:-1] for line in lines]
    notes = [
        f"{measured(suite)}: mean return. {run_length(rows)} A click on a heading sorts; the number of runs leads to them.",
        *map(escape, notes_on_rows(rows, returns)),
    ]
    if "published" in columns:
        notes.append("Published figures may be under another protocol: the next section says which, and what differs.")
    if few(*every):
        notes.append(FEW)
    return html_table(columns, lines, tall=True) + "".join(f'<p class="note">{note}</p>' for note in notes)


def published(suite: Suite, rows: Sequence[Row], returns: Returns, turns: Turns, tasks: Sequence[str]) -> str:
    """A table for each protocol of theirs; empty where nobody has published any."""
    try:
        scores = to_scores(suite, returns, tasks, turns)[0]
    except ValueError:
        scores = {}
    experiments = {(row.arm, row.task): ours(suite, row) for row in rows if row.arm in suite.published}
    return "\n".join(table(sheet) for sheet in published_sheets(suite, returns, scores, tasks, experiments))


def learning(
    points: Sequence[Point], arms: Sequence[str], tasks: Sequence[str], styles: Mapping[str, Look], width: int | None
) -> str:
    """Evaluation returns against agent steps, or those of training episodes where none was evaluated on the way.

    width: agent steps of a point, None for a twentieth of a run.
    """
    curves = curves_of(points, RETURNS)
    if not curves:
        return "<p>No curves are stored with these results.</p>"
    told = {"eval/return": "Return of evaluations", "episode/return": "Return of training episodes"}
    part = f"{width:,} agent steps" if width else "a twentieth of a run"
    note = f"Mean over runs with the interval of it at each point; every point is the mean over {part}."
    return f'<p class="soft">{note}</p>' + "\n".join(
        group(metric, told[metric], curves[metric], tasks, arms, styles, opened=metric == next(iter(curves)))
        for metric in RETURNS
        if metric in curves
    )


def diagnostics(points: Sequence[Point], arms: Sequence[str], tasks: Sequence[str], styles: Mapping[str, Look]) -> str:
    """Everything else that was measured on the way; docs/diagnostics.md has the definitions."""
    metrics = sorted({point.metric for point in points} - set(RETURNS))
    curves = curves_of(points, metrics)
    return "\n".join(
        group(metric, metric, curves[metric], tasks, arms, styles, opened=index == 0)
        for index, metric in enumerate(metrics)
    )


def configurations(suite: Suite, rows: Sequence[Row], arms: Sequence[str], out: Path | None) -> str:
    """In which fields arms differ, and what they have in common."""
    found: dict[str, dict[str, str]] = {}
    unknown = []
    for arm in arms:
        values: dict[str, set[str]] = defaultdict(set)
        for row in (row for row in rows if row.arm == arm):
            config = configuration(suite, row, out)
            if config is None:
                unknown.append(row)
                continue
            for key, value in flat(config).items():
                values[key].add(json.dumps(value))
        found[arm] = {key: next(iter(seen)) if len(seen) == 1 else "by task" for key, seen in values.items()}
    fields = list(dict.fromkeys(key for each in found.values() for key in each if key not in PLACES))
    grid = {key: tuple(shown(each.get(key)) for each in found.values()) for key in fields}
    differ = [(escape(key), *values) for key, values in grid.items() if len(set(values)) > 1]
    same = [(escape(key), values[0]) for key, values in grid.items() if len(set(values)) == 1]
    parts = [html_table(("field", *arms), differ)] if differ else ["<p>All arms have one configuration.</p>"]
    if same:
        parts.append(f"<details><summary>Common to all arms</summary>{html_table(('field', 'value'), same)}</details>")
    if unknown:
        named = ", ".join(sorted({row.arm for row in unknown}))
        parts.append(
            f'<p class="note">{len(unknown)} runs ({escape(named)}) have a configuration that the suite no longer has and '
            "whose run directory is not here; their digests stand below.</p>"
        )
    return "\n".join(parts)


def runs(rows: Sequence[Row], returns: Returns) -> str:
    """Where every number comes from."""
    sheet, seen, anchors = rows_sheet(rows, returns), set(), []
    for row in rows:  # the first run of an arm on a task is where the table of tasks leads
        place = anchor(row.arm, row.task)
        anchors.append("" if place in seen else place)
        seen.add(place)
    note = "<p>The digest hashes all that training depends on; it stands in the run directory's config.json too.</p>"
    return note + html_table(sheet.columns, [tuple(map(escape, line)) for line in sheet.lines], anchors, tall=True)


# Their parts


def curves_of(points: Sequence[Point], metrics: Sequence[str]) -> Curves:
    """The curves of some metrics, in their order."""
    series: dict[tuple[str, str, str, int], list[tuple[int, float]]] = defaultdict(list)
    for point in points:
        series[point.metric, point.task, point.arm, point.seed].append((point.step, point.value))
    found: Curves = {}
    for metric in metrics:
        for (its, task, arm, _), pairs in sorted(series.items()):
            if its == metric:
                steps, values = np.array(sorted(pairs), np.float64).T
                found.setdefault(metric, {}).setdefault(task, {}).setdefault(arm, []).append((steps, values))
    return found


def group(
    metric: str,
    title: str,
    curves: Mapping[str, Mapping[str, Sequence[Curve]]],
    tasks: Sequence[str],
    arms: Sequence[str],
    styles: Mapping[str, Look],
    opened: bool,
) -> str:
    """One metric, a figure for each task, that folds away."""
    figures = "".join(
        figure(
            curves_svg(
                anchor(metric, task), task, {arm: curves[task][arm] for arm in arms if arm in curves[task]}, styles
            ),
            wide=False,
        )
        for task in tasks
        if task in curves
    )
    state = " open" if opened else ""
    return f'<details{state}><summary>{escape(title)}</summary><div class="grid">{figures}</div></details>'


def configuration(suite: Suite, row: Row, out: Path | None) -> dict[str, Any] | None:
    """Of a run: its directory's, or the suite's own if that has the same digest; None if neither."""
    if out is not None:
        path = run_directory(out, row.arm, row.task, row.seed) / "config.json"
        if path.exists() and (config := json.loads(path.read_text()))["digest"] == row.digest:
            experiment: dict[str, Any] = config["experiment"]
            return experiment
    candidates = (ours(suite, row, budget) for budget in suite.steps)
    return next((each.to_json() for each in candidates if each.digest() == row.digest), None)


def shown(value: str | None) -> str:
    """A value as JSON, without quotes and brackets; a hyphen where an arm has no such field."""
    if value is None:
        return "-"
    if value == "by task":
        return value
    plain = json.loads(value)
    if isinstance(plain, list):
        return escape(", ".join(str(part) for part in plain)) or "none"
    return escape(plain if isinstance(plain, str) else value)


def pair(drawn: str, told: str) -> str:
    """A figure and its table, side by side where the window is wide enough."""
    return f'<div class="pair"><div>{drawn}</div><div>{told}</div></div>'


def figure(svg: str, caption: str = "", wide: bool = True) -> str:
    told = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{"wide" if wide else "small"}">{svg}{told}</figure>'


def table(sheet: Sheet, title: bool = True) -> str:
    head = f"<h3>{escape(sheet.title)}</h3>" if title else ""
    lines = [tuple(escape(cell.replace("\n", " ")) for cell in line) for line in sheet.lines]
    return (
        head + html_table(sheet.columns, lines) + "".join(f'<p class="note">{escape(note)}</p>' for note in sheet.notes)
    )


def html_table(
    columns: Sequence[str], lines: Sequence[Sequence[str]], anchors: Sequence[str] = (), tall: bool = False
) -> str:
    """A table that sorts; cells are HTML. A column of numbers is set to the right."""
    right = [any(line[i] for line in lines) and all(numeric(line[i]) for line in lines) for i in range(len(columns))]
    kind = ["number" if is_right else "" for is_right in right]
    heads = "".join(f'<th scope="col" class="{c}">{escape(name)}</th>' for name, c in zip(columns, kind, strict=True))
    rows = "".join(
        (f'<tr id="{place}">' if place else "<tr>")
        + "".join(f'<td class="{c}">{cell}</td>' for cell, c in zip(line, kind, strict=True))
        + "</tr>"
        for line, place in zip(lines, anchors or [""] * len(lines), strict=True)
    )
    return (
        f'<div class="scroll{" tall" if tall and len(lines) > 20 else ""}" tabindex="0"><table class="sorts"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def numeric(cell: str) -> bool:
    """Whether a cell is a number, a link with a number, or empty."""
    text = cell.rpartition("</a>")[0].rpartition(">")[2] or cell
    try:
        float(text or "0")
    except ValueError:
        return False
    return True


def anchor(*parts: str) -> str:
    """An id in the page."""
    return "-".join("".join(c if c.isalnum() or c in "._" else "-" for c in part) for part in parts)
