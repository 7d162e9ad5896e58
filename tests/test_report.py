"""The report of a suite: what it says, that it needs no network, and that it works in a browser."""

import dataclasses
import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from html.parser import HTMLParser

import numpy as np
import pytest

from resprout.benchmarks import __main__ as bench_command
from resprout.benchmarks import plots
from resprout.benchmarks.report import body
from resprout.benchmarks.results_ import Point, Row, paths, read_rows, write_curves, write_rows
from resprout.benchmarks.suites import SUITES
from resprout.benchmarks.tables import ours
from resprout.training import __main__ as command_line

NAME = "redo-minatar"
SUITE = SUITES[NAME]()
ARMS, TASKS, SEEDS, STEPS = ("dqn-rr1", "redo-rr1"), ("minatar/Breakout", "minatar/Asterix"), (0, 1, 2), 200_000


def row(arm: str, task: str, seed: int, value: float) -> Row:
    directory = f"{NAME}/{arm}/{task.replace('/', '-')}/s{seed}"
    made = Row(
        *(NAME, arm, task, seed, STEPS, 195_000, value, 30, 900.0, 10**9, "", "", "abcdef0123456789", "0.1.0"),
        *("0.10.2", directory, "2026-11-27"),
    )
    return dataclasses.replace(made, digest=ours(SUITE, made).digest())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Written by the command from a folder of results: Breakout 10, 9, 8 and 20, 19, 18; Asterix 1, 2, 3 and 4, 5, 6."""
    folder = tmp_path_factory.mktemp("results")
    levels = {("dqn-rr1", TASKS[0]): (10, 9, 8), ("redo-rr1", TASKS[0]): (20, 19, 18)}
    levels |= {("dqn-rr1", TASKS[1]): (1, 2, 3), ("redo-rr1", TASKS[1]): (4, 5, 6)}
    rows = [row(arm, task, seed, float(levels[arm, task][seed])) for arm in ARMS for task in TASKS for seed in SEEDS]
    points = [
        Point(each.arm, each.task, each.seed, step, metric, each.final_return * step / STEPS)
        for each in rows
        for step in range(10_000, STEPS + 1, 10_000)
        for metric in ("eval/return", "dormant/post/tau0/q")
    ]
    write_rows(paths(NAME, folder)[0], rows)
    write_curves(paths(NAME, folder)[1], points)
    path = folder / "report.html"
    assert command_line.dispatch(["bench", "report", NAME, "--results", str(folder), "--html", str(path)]) == 0
    return path


class Page(HTMLParser):
    """Tables as text, ids, and every address that a page names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.figures = 0
        self.cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.addresses += [values[name] for name in ("href", "xlink:href", "src", "action", "srcset") if name in values]
        self.figures += tag == "svg" and values.get("role") == "img"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = []

    def handle_data(self, data):
        if self.cell is not None:
            self.cell.append(data)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append("".join(self.cell))
            self.cell = None

    def table(self, heading: str) -> dict[str, list[str]]:
        """By the first cell, or the first two, of the table that has a column of this name."""
        found = next(table for table in self.tables if heading in table[0])
        return {" ".join(line[: 1 + (found[0][0] == "task")]): line for line in found[1:]}


def test_figures_are_those_of_the_rows(report):
    page = Page(report.read_text())
    tasks = page.table("mean return")
    assert tasks["minatar/Breakout dqn-rr1"][2:4] == ["3", "9.00"]
    assert tasks["minatar/Asterix redo-rr1"][3:] == ["5.00", "4.00 to 6.00", "4.00", "6.00"]
    aggregate = page.table("IQM")  # of 10/9, 9/9, 8/9, 1/2, 2/2, 3/2 the middle four
    assert aggregate["dqn-rr1"][1:3] == ["6", f"{(10 / 9 + 1 + 8 / 9 + 1) / 4:.3f}"]
    pairs = page.table("P(better), 95 %")["redo-rr1 - dqn-rr1"]
    assert pairs[1:3] == ["6", f"{(10 / 9 * 2 + 1.5 * 2) / 4:.3f}"] and pairs[4] == "2 / 0"
    assert ">redo-rr1 - dqn-rr1</text>" in report.read_text()  # the figure names both, too


def test_every_number_leads_to_its_runs(report):
    page = Page(report.read_text())
    runs = next(table for table in page.tables if "digest" in table[0])
    assert len(runs) == 1 + 12
    first = dict(zip(runs[0], runs[1], strict=True))
    assert first["digest"] == row("dqn-rr1", "minatar/Asterix", 0, 1.0).digest
    assert first["run directory"] == f"{NAME}/dqn-rr1/minatar-Asterix/s0" and first["commit"] == "abcdef012345"
    links = [address for address in page.addresses if address.startswith("#")]
    assert "#redo-rr1-minatar-Breakout" in links
    assert {link[1:] for link in links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_only_fields_that_differ_stand_in_the_difference(report):
    page = Page(report.read_text())
    differ = page.table("redo-rr1")
    assert list(differ) == ["interventions"]
    assert differ["interventions"][1] == "none" and differ["interventions"][2].startswith("redo:")
    assert page.table("value")["agent.replay_ratio"] == ["agent.replay_ratio", "1.0"]


def test_nothing_is_fetched(report):
    text = report.read_text()
    page = Page(text)
    assert {address.partition(",")[0] for address in page.addresses if not address.startswith("#")} == {"data:"}
    assert not re.findall(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text
    assert page.figures == 3 + 2 * 2  # interquartile means, pairs, profiles; two metrics on two tasks


def test_what_is_left_out_and_how_it_was_written_is_said(report):
    """Another report of the same rows, of which one was not evaluated and one is of another version of its environment."""
    folder = report.parent
    first, second, *others = read_rows(paths(NAME, folder)[0])
    odd = dataclasses.replace(first, final_return=math.nan), dataclasses.replace(second, environment="gymnax 9")
    rows = [*odd, *(dataclasses.replace(each, environment="gymnax 8") for each in others)]
    text = body(NAME, SUITE, "", rows, [], None, "the command")
    assert "1 of 12 runs" in text and "under several versions of an environment" in text and "gymnax 9" in text
    assert "30 episodes" in text and "<code>the command</code>" in text
    assert f"resprout bench report {NAME} --html {report} --results {folder}" in report.read_text()


def test_names_are_escaped():
    drawing = plots.curves_svg("key", "<b>&", {"a": [(np.array([1.0, 2.0]), np.array([0.0, 1.0]))]}, plots.looks(["a"]))
    assert "<b>" not in drawing and "&lt;b&gt;&amp;" in drawing


def test_runs_of_one_arm_meet_on_one_grid():
    grid, values = plots.together(
        [(np.array([10.0, 20.0, 40.0]), np.array([1.0, 2.0, 4.0])), (np.array([20.0, 30.0]), np.array([0.0, 1.0]))]
    )
    np.testing.assert_array_equal(grid, [20, 30])
    np.testing.assert_array_equal(values, [[2, 3], [0, 1]])


def test_a_band_is_the_bootstrap_of_the_mean():
    values = np.array([[0.0, 5.0], [1.0, 5.0]])  # resamples of two runs: 0, 1/2, 1/2, 1
    estimate, low, high = plots.band(values)
    np.testing.assert_array_equal(estimate, [0.5, 5])
    np.testing.assert_array_equal(low, [0, 5])
    np.testing.assert_array_equal(high, [1, 5])


def test_no_two_arms_look_alike():
    styles = plots.looks([str(index) for index in range(32)])
    assert len({(look.colour, look.dash) for look in styles.values()}) == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([NAME, "--html", "report.html"], "no finished run in runs/redo-minatar"),
        ([NAME, "--html", "report.html", "--results", "nowhere"], "no results at nowhere/redo-minatar.csv"),
        ([NAME], "--html"),
        ([NAME, "--html", "nowhere/report.html"], "--html nowhere/report.html: there is no folder nowhere"),
        ([NAME, "--html", "."], "--html . is a directory"),
        (["redo-minatra", "--html", "report.html"], "unknown suite 'redo-minatra'"),
        (["errr-counts", "--html", "report.html"], "is a simulation"),
    ],
)
def test_bad_input_is_one_line_and_creates_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # As for a suite that the repository has no results of, whatever has been added to them.
    monkeypatch.setattr(bench_command, "paths", lambda suite, folder=tmp_path / "none": paths(suite, folder))
    assert command_line.dispatch(["bench", "report", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# In a browser


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Browser:
    """Headless Chromium behind its own driver, which speaks JSON over HTTP (the W3C's WebDriver)."""

    def __init__(self, profile) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        self.base = f"http://127.0.0.1:{port}/session"
        flags = ["headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run"]
        flags += [f"user-data-dir={profile}", "window-size=1250,1600"]
        options = {
            "goog:chromeOptions": {"args": [f"--{flag}" for flag in flags], "binary": shutil.which("chromium")},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        deadline = time.monotonic() + 60
        while True:
            try:
                self.base += f"/{self.ask('', capabilities={'alwaysMatch': options})['sessionId']}"
                return
            except urllib.error.URLError as error:
                if not isinstance(error.reason, ConnectionRefusedError) or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def ask(self, path: str, **data):
        request = urllib.request.Request(self.base + path, json.dumps(data).encode())
        with DIRECT.open(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def run(self, script: str):
        return self.ask("/execute/sync", script=script, args=[])

    def close(self) -> None:
        request = urllib.request.Request(self.base, method="DELETE")
        with DIRECT.open(request, timeout=60):
            pass
        self.driver.terminate()
        self.driver.wait()


@pytest.fixture
def browser(tmp_path):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not installed")
    made = Browser(tmp_path / "profile")
    yield made
    made.close()


COLUMN = "return [...document.querySelectorAll('#Tasks ~ .scroll tbody tr')].map(row => row.cells[{}].textContent)"
CLICK = "document.querySelectorAll('#Tasks ~ .scroll th button')[{}].click()"
RUNS = "document.querySelector('#Runs ~ .scroll tbody tr')"
VISIBLE = "return [...document.querySelectorAll('[id$=\"line-arm{}\"]')].filter(line => line.getBoundingClientRect().width > 0).length"


@pytest.mark.slow
def test_in_a_browser(report, browser):
    browser.ask("/url", url=report.as_uri())
    assert browser.run("return document.title") == f"{NAME} · resprout"

    # A click on a heading sorts by numbers, a second one the other way; another heading by names.
    browser.run(CLICK.format(3))
    assert browser.run(COLUMN.format(3)) == ["2.00", "5.00", "9.00", "19.00"]
    browser.run(CLICK.format(3))
    assert browser.run(COLUMN.format(3)) == ["19.00", "9.00", "5.00", "2.00"]
    assert browser.run("return document.querySelectorAll('#Tasks ~ .scroll th')[3].ariaSort") == "descending"
    browser.run(CLICK.format(0))
    assert browser.run(COLUMN.format(0)) == ["minatar/Asterix"] * 2 + ["minatar/Breakout"] * 2
    for _ in range(2):  # what is no number stays last
        browser.run(f"{RUNS}.cells[3].textContent = 'none of one run'")
        browser.run(f"{RUNS}.closest('table').querySelectorAll('th button')[3].click()")
        last = f"return [...{RUNS}.parentNode.rows].map(row => row.cells[3].textContent).slice(-2)"
        assert "none of one run" in browser.run(last)

    # The number of runs leads to a row that is not hidden below the headings, of a table that scrolls.
    browser.run(
        "const box = document.querySelector('#Runs ~ .scroll'); box.classList.add('tall'); box.style.maxHeight = '8rem'"
    )
    browser.run("document.querySelectorAll('#Tasks ~ .scroll tbody a')[3].click()")
    seen = (
        "const row = document.querySelector('tr:target'), at = row.getBoundingClientRect();"
        "return row.contains(document.elementFromPoint(at.x + 20, at.y + at.height / 2))"
    )
    assert browser.run(seen)

    # Plots are there, with a size and with lines in them; an arm can be hidden in all of them at once.
    sizes = browser.run(
        "document.querySelectorAll('details').forEach(each => each.open = true);"
        "return [...document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect().height)"
    )
    assert len(sizes) == 7 and min(sizes) > 80
    before = browser.run(VISIBLE.format(0)), browser.run(VISIBLE.format(1))
    assert min(before) >= 6  # an interval without a width is not counted
    browser.run("document.querySelector('.legend input').click()")
    assert browser.run(VISIBLE.format(0)) == 0 and browser.run(VISIBLE.format(1)) == before[1]

    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    fetched = browser.run("return performance.getEntriesByType('resource').map(each => each.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []
    assert browser.ask("/se/log", type="browser") == []  # no errors, and no warnings either
