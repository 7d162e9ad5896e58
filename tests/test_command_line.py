"""The command line as a stranger meets it: help, bad input, evaluation, video, lists."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resprout.training import __main__ as command_line

BAD_INPUT = [
    (["trian"], "unknown command 'trian' (did you mean train?)"),
    (["train"], "which agent?"),
    (["train", "dnq", "--env", "gym/CartPole-v1"], "unknown agent 'dnq' (did you mean dqn?)"),
    (["train", "dqn"], "Missing from resprout train dqn: --env"),
    (["train", "dqn", "--env", "atari/Brekout"], "nearest: atari/Breakout"),
    (["train", "dqn", "--env", "atary/Breakout"], "atari"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--stepz", "3"], "--stepz"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--agent.gama", "3"], "--agent.gamma"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--steps", "many"], "--steps"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--agent.batch-size", "1.5"], "--agent.batch-size"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--agent.batch-size", "0"], "batch_size must be"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--agent.capacity", "-5"], "capacity must be"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--num-envs", "0"], "num_envs must be at least 1"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--steps", "-1"], "steps must be at least 1"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--steps", "1000"], "warm-up of 20000 agent steps"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--agent.loss", "l1"], "--agent.loss"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--replay", "unifrom"], "unknown replay 'unifrom'"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--preset", "drq"], "unknown preset 'drq'"),
    (["train", "sac", "--env", "mujoco/Hopper-v5", "--preset", "drq_eps"], "preset drq_eps is for dqn, not for sac"),
    (["train", "dqn", "--env", "mujoco/Hopper-v5"], "DQN needs discrete actions"),
    (["train", "ace", "--env", "gym/CartPole-v1"], "ACE needs continuous actions"),
    (["train", "sac", "--env", "gym/CartPole-v1"], "SAC needs continuous actions"),
    (["train", "dqn", "--env", "atari/Pong", "--steps", "900000000", "--agent.capacity", "900000000"], "it cannot fit"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--track", "wandb"], "pip install 'resprout[wandb]'"),
    (["train", "--resume", "nowhere"], "nowhere is not a run directory"),
    (["eval", "nowhere"], "nowhere is not a run directory"),
    (["eval", "nowhere", "--episodes", "0"], "--episodes must be at least 1"),
    (["export", "nowhere", "--minari", "x-v0"], "nowhere is not a run directory"),
    (["export", "nowhere"], "required: --minari"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--replay-from"], "--replay-from needs a value"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--replay-from", "nowhere"], "nowhere/replay: no saved replay there"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--replay-from", "nowhere:1.5"], "must be between 0 and 1, not 1.5"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--seeds_mode", "vmap"], "--seeds-mode is for several seeds"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--seeds", "0,1", "--seeds=2,3"], "--seeds is given twice"),
    (
        ["train", "dqn", "--env", "gym/CartPole-v1", "--preset", "drq_eps", "--preset", "rrc_dqn"],
        "--preset is given twice",
    ),
    (
        ["train", "dqn", "--env", "gym/CartPole-v1", "--agent.loss", "lap"],
        "prioritized or masked with minimum=0.01, not",
    ),
    (
        ["train", "dqn", "--env", "gym/CartPole-v1", "--agent.loss", "lap", "--replay", "prioritized:beta=0"],
        "prioritized or masked with minimum=0.01, not prioritized:beta=0",
    ),
    (["list", "agnets"], "resprout list agents|envs"),
    (["diagnose", "nowhere"], "nowhere is not a run directory"),
    (
        ["train", "dqn", "--env", "gym/CartPole-v1", "--with", "redoo"],
        "unknown intervention 'redoo' (did you mean redo?)",
    ),
    (
        ["train", "dqn", "--env", "gym/CartPole-v1", "--with", "redo:taw=1"],
        "redo has no field 'taw' (did you mean tau?)",
    ),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--with", "redo:period=0"], "period must be at least 1"),
    (
        ["train", "dqn", "--env", "gym/CartPole-v1", "--with", "redo:score=size"],
        "score must be one of activation, gradient",
    ),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--with", "redo:learner=actor"], "there are: critic"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--with", "redo:when=fauu<1"], "there is no diagnostic 'fauu'"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--with", "reset:layers=tail"], "no layer tail: there are"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--with", "layer_norm:actor=true"], "it is a field of ACE, SAC"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--with", "crelu", "deep_fourier"], "activation is crelu already"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--with"], "--with"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT, ids=lambda value: " ".join(value)[:60])
def test_bad_input_is_one_line_and_creates_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_line.dispatch(arguments) == 2
    said = capfd.readouterr().err
    assert message in said
    assert said.startswith("resprout: ")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--agent.warmup", "100", "--agent.hidden", "16", "--steps", "1500", "--eval-episodes", "3"]
    assert command_line.dispatch(["train", "dqn", "--env", "minatar/Breakout", *flags, "--out", str(out)]) == 0
    return out


def test_a_run_leaves_what_was_promised(run_directory: Path) -> None:
    config = json.loads((run_directory / "config.json").read_text())
    assert config["experiment"]["agent"]["name"] == "dqn"
    assert config["versions"]["jax"] and config["versions"]["envpool"] and config["digest"]
    summary = json.loads((run_directory / "summary.json").read_text())
    assert summary["return"] == pytest.approx(sum(summary["episode_returns"]) / 3)
    assert summary["agent_steps"] == 1500 and summary["peak_memory_bytes"] > 1e7
    assert (run_directory / "curve.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "gradient_step", "wall_clock"} <= lines[0].keys()
    assert any("critic/loss" in line for line in lines) and any("eval/return" in line for line in lines)


def test_an_existing_directory_needs_resume(run_directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(run_directory.rglob("*"))
    flags = ["--env", "minatar/Breakout", "--agent.warmup", "100", "--steps", "1500", "--out", str(run_directory)]
    assert command_line.dispatch(["train", "dqn", *flags]) == 2
    assert f"go on with --resume {run_directory}" in capfd.readouterr().err
    assert sorted(run_directory.rglob("*")) == before


def test_resume_refuses_another_experiment(run_directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command_line.dispatch(["train", "--resume", str(run_directory), "--agent.gamma", "0.5"]) == 2
    assert "cannot change agent.gamma (it is 0.99, asked for 0.5)" in capfd.readouterr().err
    assert command_line.dispatch(["train", "sac", "--resume", str(run_directory)]) == 2
    assert "is a run of dqn" in capfd.readouterr().err


def test_eval_plays_and_films(run_directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import av

    assert command_line.dispatch(["eval", str(run_directory), "--episodes", "2"]) == 0
    first = capfd.readouterr().out
    assert first.count("episode ") == 2 and "return: " in first
    assert command_line.dispatch(["eval", str(run_directory), "--episodes", "2"]) == 0
    assert capfd.readouterr().out == first
    film = tmp_path / "film.mp4"
    assert command_line.dispatch(["eval", str(run_directory), "--episodes", "1", "--video", str(film)]) == 0
    length = int(capfd.readouterr().out.split(",")[1].split()[0])
    with av.open(str(film)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == length + 1  # the first observation and one after each step
    assert all(frame.std() > 1 for frame in frames)


@pytest.mark.slow
def test_diagnose_prints_and_keeps_every_diagnostic(
    run_directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "values.json"
    assert command_line.dispatch(["diagnose", str(run_directory), "--json", str(kept)]) == 0
    printed = dict(line.split() for line in capfd.readouterr().out.splitlines())
    values = json.loads(kept.read_text())
    assert printed.keys() == values.keys()
    assert {
        "fau/critic",
        "dormant/post/tau0/critic",
        "ntk_rank/critic",
        "sharpness/critic",
        "value_churn",
    } <= values.keys()
    assert 0 < values["fau/critic"] <= 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--with", "a", "b", "--out", "x"], ["--with", "a", "--with", "b", "--out", "x"]),
        (["--with", "a", "--with", "b"], ["--with", "a", "--with", "b"]),
        (["--out", "x", "--with", "a"], ["--out", "x", "--with", "a"]),
    ],
)
def test_several_values_are_as_many_flags(flags: list[str], expected: list[str]) -> None:
    assert command_line.one_by_one(flags, "--with") == expected


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("agents", "sac"),
        ("replays", "uniform"),
        ("presets", "drq_eps"),
        ("interventions", "redo"),
        ("diagnostics", "fau"),
    ],
)
def test_list_has_a_line_with_a_source_each(kind: str, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert command_line.dispatch(["list", kind]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert any(line.split()[0] == name for line in lines)
    assert all(len(line.split()) > 3 for line in lines)


def test_list_envs_names_what_is_installed(capfd: pytest.CaptureFixture[str]) -> None:
    assert command_line.dispatch(["list", "envs"]) == 0
    names = {line.split()[0] for line in capfd.readouterr().out.splitlines()}
    assert {"atari/Breakout", "mujoco/HalfCheetah-v5", "minatar/Breakout", "gym/CartPole-v1"} <= names


def test_help_of_an_agent_lists_its_flags(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    with pytest.raises(SystemExit) as stop:
        command_line.dispatch(["train", "sac", "--help"])
    assert not stop.value.code and "--agent.gamma" in capsys.readouterr().out


def test_help_is_quick_and_imports_no_jax() -> None:
    code = "import sys, resprout.training.__main__ as m; m.dispatch(['--help']); sys.exit('jax' in sys.modules)"
    started = time.monotonic()
    said = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True).stdout
    assert time.monotonic() - started < 5  # about 0.1 s; the bound only catches a heavy import
    assert "resprout train" in said


def test_python_m_works_as_well() -> None:
    arguments = [sys.executable, "-P", "-m", "resprout.training", "list", "presets"]
    assert "drq_eps" in subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
