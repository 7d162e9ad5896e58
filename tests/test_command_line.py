"""The command line as a stranger meets it: help, bad input, evaluation, video, lists."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resprout.agents import DQN
from resprout.training import PRESETS, Experiment, train
from resprout.training import __main__ as command_line
from resprout.training.experiment import AGENTS

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
    (["train", "dqn", "--env", "minatar/Breakout", "--preset", "redo_dqn", "--stepz", "5"], "(did you mean --steps?)"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--agent.target-period", f"{2**31}"], "target_period must be below"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--log-every", f"{2**31}"], "log_every must be below 2^31"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--agent.hidden", "8", f"{2**31}"], "hidden must be below 2^31"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--with", f"redo:period={2**31}"], "period must be below 2^31"),
    (
        ["train", "dqn", "--env", "gym/CartPole-v1", "--replay", f"prioritized:beta_steps={2**31}"],
        "beta_steps must be below 2^31",
    ),
    (["train", "dqn", "--env", f"changing/minatar-cycle@{2**31}"], "below 2^31"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--agent.width", "1e12"], "they cannot fit"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--agent.hidden", "1000000000"], "they cannot fit"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--out", f"{__file__}/run"], "test_command_line.py is no directory"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--out", "x" * 300], "File name too long"),
    (["train", "dqn", "--env", "gym/CartPole-v1", "--out", str(Path(__file__).parent)], "exists already; give another"),
    (["train", "sac", "--env", "gym/PandaReach-v9"], "Panda-gym, the extra panda"),
    (["eval", "nowhere", "--seed", "-1"], "--seed must be from 0 to 2^32 - 1, not -1"),
    (["eval", "nowhere", "--video", "no/x.mp4"], "--video no/x.mp4: there is no folder no"),
    (["eval", "nowhere", "--video", "x.txt"], "--video must end in .mp4, not x.txt"),
    (["diagnose", "nowhere", "--json", "no/x.json"], "--json no/x.json: there is no folder no"),
    (["diagnose", "nowhere", "--json", "."], "--json . is a directory"),
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


def test_interventions_are_added_to_those_of_a_preset() -> None:
    made = command_line.parse_experiment(
        ["--env", "minatar/Breakout", "--with", "layer_norm"], command_line.preset_experiment("dqn", "redo_dqn")
    )
    assert [each.name for each in made.acting] == ["redo", "layer_norm"]


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if "interventions" in preset.experiment])
def test_help_of_a_preset_with_interventions(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    agent = next(name for name, kind in AGENTS.items() if type(PRESETS[preset].agent) is kind)
    with pytest.raises(SystemExit) as stop:
        command_line.dispatch(["train", agent, "--preset", preset, "--help"])
    assert not stop.value.code and "--agent.batch-size" in capsys.readouterr().out


def damaged(directory: Path, name: str, text: str | bytes) -> None:
    (directory / name).write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    ("name", "text", "command", "message"),
    [
        ("config.json", '{"experiment": {"agent": []}}', ["train", "--resume"], "is not a run directory"),
        ("config.json", b"\xff\xfe", ["eval"], "is not a run directory"),
        ("summary.json", "{}", ["bench", "compare"], ""),
        ("summary.json", "[1]", ["bench", "compare"], "summary.json is damaged (no object)"),
        ("metrics.jsonl", '{"a": 1}\n', ["bench", "compare"], "metrics.jsonl is damaged (a line without a step)"),
        ("metrics.jsonl", "nonsense\n", ["bench", "compare"], "metrics.jsonl is damaged"),
        ("metrics.jsonl", '{"step": 5}\n', ["bench", "compare"], ""),
    ],
)
def test_what_is_damaged_is_named_in_one_line(
    name: str,
    text: str | bytes,
    command: list[str],
    message: str,
    run_directory: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_directory, copy)
    damaged(copy, name, text)
    after = [str(run_directory)] if command == ["bench", "compare"] else []
    code = command_line.dispatch([*command, str(copy), *after])
    said = capfd.readouterr().err
    assert (
        (code, said.count("\n")) == ((2, 1) if message else (0, 0))
        and message in said
        and (not message or str(copy) in said)
    )


def test_a_config_without_a_digest_is_damaged(
    run_directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_directory, copy)
    config = json.loads((copy / "config.json").read_text())
    del config["digest"]
    damaged(copy, "config.json", json.dumps(config))
    assert command_line.dispatch(["train", "--resume", str(copy), "--steps", "1600"]) == 2
    assert "config.json is damaged (its digest is null)" in capfd.readouterr().err


def test_a_finished_run_without_checkpoints_is_not_begun_anew(
    run_directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_directory, copy)
    shutil.rmtree(copy / "checkpoints")
    before = (copy / "metrics.jsonl").read_bytes(), (copy / "summary.json").read_bytes()
    assert command_line.dispatch(["train", "--resume", str(copy), "--steps", "1600"]) == 2
    assert "has lost its checkpoints: begin anew in another --out" in capfd.readouterr().err
    assert ((copy / "metrics.jsonl").read_bytes(), (copy / "summary.json").read_bytes()) == before


@pytest.mark.parametrize(
    ("checkpoint_every", "end", "message"),
    [
        (0, 300, "has no checkpoint, but transitions that --save-replay keeps"),
        (200, 201, ""),
        (200, 202, "has lost its checkpoints"),
        (200, 300, "has lost its checkpoints"),
    ],
)
def test_a_saved_replay_of_more_than_a_first_checkpoint_means_that_one_is_lost(
    checkpoint_every: int, end: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two environments, whose first checkpoint comes at 200 or 201 agent steps."""
    experiment = Experiment(
        agent=DQN(warmup=50, capacity=500, hidden=(8,)),
        env="minatar/Breakout",
        num_envs=2,
        steps=400,
        save_replay=True,
        checkpoint_every=checkpoint_every,
        out=str(tmp_path / "run"),
    )
    train(dataclasses.replace(experiment, steps=60), quiet=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "summary.json").unlink()
    (segment,) = (each for each in (tmp_path / "run" / "replay").iterdir() if each.is_dir())
    segment.rename(
        segment.with_name(segment.name.partition("-")[0] + f"-{end:0{len(segment.name.partition('-')[2])}d}")
    )
    if message:
        kept = sorted((tmp_path / "run").rglob("*"))
        with pytest.raises(ValueError, match=message):
            train(experiment, resume=tmp_path / "run", quiet=True)
        assert sorted((tmp_path / "run").rglob("*")) == kept
    else:
        assert train(experiment, resume=tmp_path / "run", quiet=True).summary["agent_steps"] == 400


def test_all_seeds_are_looked_at_before_one_goes_on(
    run_directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_directory, tmp_path / "s0")
    (tmp_path / "s1").mkdir()
    damaged(tmp_path, "seeds.json", '{"seeds": [0, 1]}')
    damaged(tmp_path / "s1", "config.json", "{")
    before = sorted(tmp_path.rglob("*"))
    assert command_line.dispatch(["train", "--resume", str(tmp_path), "--steps", "1600"]) == 2
    said = capfd.readouterr().err
    assert "s1/config.json is damaged" in said and said.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before
    config = json.loads((run_directory / "config.json").read_text())
    second = dataclasses.replace(Experiment.from_json(config["experiment"]), seed=1)
    config |= {"experiment": second.to_json(), "digest": second.digest()}
    damaged(tmp_path / "s1", "config.json", json.dumps(config))
    damaged(tmp_path / "s1", "summary.json", "{")
    before = sorted(tmp_path.rglob("*"))
    assert command_line.dispatch(["train", "--resume", str(tmp_path), "--steps", "1600"]) == 2
    assert "s1/summary.json is damaged" in capfd.readouterr().err and sorted(tmp_path.rglob("*")) == before
    damaged(tmp_path, "seeds.json", "{}")
    assert command_line.dispatch(["train", "--resume", str(tmp_path), "--steps", "1600"]) == 2
    assert "seeds.json is damaged (its seeds is null)" in capfd.readouterr().err


def test_errors_are_said_whatever_the_encoding_of_the_output() -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "resprout.training",
        "train",
        "dqn",
        "--env",
        "gym/CartPole-v1",
        "--stepz",
        "5",
    ]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 2 and "--stepz" in done.stderr and done.stderr.count("\n") == 1


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
