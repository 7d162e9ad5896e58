"""The command line. JAX is imported only by the command that needs it."""

import contextlib
import dataclasses
import io
import json
import os
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any, NoReturn

from .files import check_file
from .specs import nearest

USAGE = """\
resprout: deep reinforcement learning that keeps learning

  resprout train AGENT --env ENV [FLAG ...]     train; `resprout train AGENT --help` lists every flag
  resprout train --resume DIR [--steps N]       go on with a run that was stopped, or with a finished one
  resprout train AGENT --env ENV --seeds 0,1,2 [FLAG ...]  train several seeds at once, a run directory for each
  resprout eval DIR [--episodes N] [--video FILE.mp4]     play the newest checkpoint of a run
  resprout export DIR --minari NAME             the replay of a run with --save-replay as a Minari data set
  resprout bench run SUITE [--jobs N | --ray ADDRESS] [--out DIR]     run what is not finished yet of a suite
  resprout bench table SUITE [--out DIR]        sum up what is finished; `resprout bench` has more
  resprout bench report SUITE --html FILE       the same with curves, in one file for a browser
  resprout diagnose DIR                         every diagnostic of the newest checkpoint of a run
  resprout list agents|envs|interventions|replays|diagnostics|presets|suites     what there is, a line each
  resprout --version

AGENT is dqn, sac, ace, drqv2 or drm. ENV is atari/Breakout, mujoco/HalfCheetah-v5, dmc/walker-run,
dmc-pixels/walker-run, metaworld/hammer, robotics/HandReach-v3, minatar/Breakout, gymnax/CartPole-v1,
changing/minatar-cycle@50000 or gym/ANY-GYMNASIUM-ID; `resprout list envs` names all.

  resprout train sac --env mujoco/HalfCheetah-v5 --steps 100000
  resprout train dqn --env atari/Boxing --preset drq_eps
  resprout train sac --env mujoco/Hopper-v5 --with layer_norm --with redo:tau=0.1,period=1000 --diagnose-every 1000
  resprout train dqn --env gym/CartPole-v1 --steps 20000 --agent.warmup 1000 --agent.replay-ratio 1
"""
COMMANDS = ("train", "eval", "diagnose", "export", "bench", "list")
LISTS = ("agents", "envs", "interventions", "replays", "diagnostics", "presets", "suites")


class UsageError(ValueError):
    """Something the user should write differently, in one line."""


class OneLineParser(ArgumentParser):
    """Says what is wrong in one line, as every command does."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main() -> None:
    """Entry point of the console script. Exit codes: 0 done, 1 the run failed, 2 bad input, 130/143 interrupted."""
    try:
        sys.exit(dispatch(sys.argv[1:]))
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


def dispatch(arguments: list[str]) -> int:
    """Run one command; the result is the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("resprout"))
        return 0
    command, rest = arguments[0], arguments[1:]
    try:
        if command not in COMMANDS:
            raise UsageError(
                f"unknown command {command!r}{nearest(command, COMMANDS)}; there are: {', '.join(COMMANDS)}"
            )
        commands = {
            "train": train_command,
            "eval": eval_command,
            "diagnose": diagnose_command,
            "export": export_command,
            "bench": bench_command,
            "list": list_command,
        }
        return commands[command](rest)
    except ValueError as error:  # UsageError, ExperimentError, EnvError, CheckpointError and the agents' own checks
        return fail(error, 2)
    except BrokenPipeError:  # whoever read the output has seen enough
        raise
    except OSError as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)


def fail(error: Any, code: int) -> int:
    print("resprout:", " ".join(str(error).split()), file=sys.stderr)
    return code


def train_command(arguments: list[str]) -> int:
    from .experiment import AGENTS
    from .presets import PRESETS

    arguments = [with_hyphens(argument) for argument in arguments]
    preset_name, resume = flag_value(arguments, "--preset"), flag_value(arguments, "--resume")
    flag_value(arguments, "--replay-from")  # a list without a value would pass for an empty one
    agent_name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    flags = arguments[1:] if agent_name else arguments
    if agent_name is not None and agent_name not in AGENTS:
        raise UsageError(f"unknown agent {agent_name!r}{nearest(agent_name, AGENTS)}; there are: {', '.join(AGENTS)}")
    if preset_name is not None and preset_name not in PRESETS:
        raise UsageError(
            f"unknown preset {preset_name!r}{nearest(preset_name, PRESETS)}; there are: {', '.join(PRESETS)}"
        )
    seeds = several_seeds(arguments, resume)
    if resume is not None:
        each = [Path(resume, f"s{seed}") for seed in seeds or ()]  # some may have been stopped before they had begun
        begun = [own for own in each if (own / "config.json").exists()]
        default = (
            read_config(begun[0]) if begun else read_config(Path(resume), "seeds.json" if seeds else "config.json")
        )
        if flag_value(arguments, "--out"):
            raise UsageError(f"--resume goes on in {resume} itself and takes no --out")
        if agent_name not in (None, default.agent_name) or preset_name is not None:
            raise UsageError(f"{resume} is a run of {default.agent_name}; --resume takes no other agent and no preset")
    elif agent_name is None:
        if {"-h", "--help"} & set(arguments):
            print(USAGE, end="")
            return 0
        raise UsageError(f"which agent? resprout train AGENT --env ENV; there are: {', '.join(AGENTS)}")
    else:
        default = preset_experiment(agent_name, preset_name)
    experiment = parse_experiment(one_by_one(flags, "--with"), default)
    if resume is not None:
        check_unchanged(default, experiment, resume)
    from .processes import Processes
    from .run import Interrupted, TrainingStopped, train

    processes = Processes(
        int(flag_value(arguments, "--num-processes") or 1),
        int(flag_value(arguments, "--process-id") or 0),
        flag_value(arguments, "--coordinator"),
    )
    if processes.count > 1 and experiment.out is None and resume is None:
        raise UsageError("several processes need one --out, a directory that all of them see")
    profile = int(flag_value(arguments, "--profile") or 0)
    options: dict[str, Any] = {"resume": resume, "devices": asked_devices(arguments), "profile": profile}
    try:
        if seeds:
            mode = flag_value(arguments, "--seeds-mode") or "auto"
            return train_several(experiment, seeds, processes, mode=mode, **options)
        processes.connect()
        result = train(experiment, **options)
    except Interrupted as stop:
        return fail(stop, stop.exit_code)
    except TrainingStopped as stop:
        fail(stop, 1)
        processes.leave(1)
        return 1
    if processes.index:
        return 0
    if result.evaluation:
        print(f"return: {result.evaluation.mean:.1f} (mean of {len(result.evaluation.returns)} evaluation episodes)")
    print(f"run directory: {result.directory}")
    if result.curve:
        print(f"learning curve: {result.curve}")
    return 0


def several_seeds(arguments: list[str], resume: str | None) -> tuple[int, ...] | None:
    """What --seeds asks for, or what the directory of --resume is of; None for a single run."""
    text, mode = flag_value(arguments, "--seeds"), flag_value(arguments, "--seeds-mode")
    if text is None and resume is None:
        if mode:
            raise UsageError("--seeds-mode is for several seeds: give --seeds 0,1,2, too")
        return None
    from .seeds import parse_seeds, read_seeds

    known = read_seeds(Path(resume)) if resume is not None else None
    if text is None:
        if mode and known is None:
            raise UsageError(f"--seeds-mode is for several seeds, and {resume} is one run")
        return known
    if flag_value(arguments, "--seed") is not None:
        raise UsageError("--seed is for one seed and --seeds for several: give one of them")
    seeds = parse_seeds(text)
    if resume is not None and known != seeds:
        raise UsageError(f"{resume} is {'one run' if known is None else f'of seeds {known}'}; leave out --seeds")
    return seeds


def train_several(experiment: Any, seeds: tuple[int, ...], processes: Any, resume: str | None, **options: Any) -> int:
    from .seeds import train_seeds

    if resume is not None:
        experiment = dataclasses.replace(experiment, out=resume)
    out = train_seeds(experiment, seeds, processes=processes, resume=resume is not None, **options)
    own = seeds[processes.index :: processes.count]
    print(f"run directories: {', '.join(str(out / f's{seed}') for seed in own)}")
    if (out / "curve.png").exists():
        print(f"learning curve: {out / 'curve.png'}")
    return 0


def asked_devices(arguments: list[str]) -> int | None:
    """What --devices asks for; None for all."""
    devices = flag_value(arguments, "--devices") or "1"
    if devices != "all" and not devices.isdecimal():
        raise UsageError(f"--devices must be a number or all, not {devices}")
    return None if devices == "all" else int(devices)


def flag_value(arguments: list[str], flag: str) -> str | None:
    """The value of a flag that decides how the others are read. UsageError if it has none, or is there twice."""
    found = []
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            found.append(argument.partition("=")[2])
        if argument == flag:
            if index + 1 == len(arguments) or arguments[index + 1].startswith("--"):
                raise UsageError(f"{flag} needs a value")
            found.append(arguments[index + 1])
    if len(found) > 1:
        raise UsageError(f"{flag} is given twice")
    return found[0] if found else None


def with_hyphens(argument: str) -> str:
    """--seeds_mode=a_b as --seeds-mode=a_b, which is the spelling that flags are looked for in."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def one_by_one(arguments: list[str], flag: str) -> list[str]:
    """`--with a b` as `--with a --with b`."""
    result: list[str] = []
    inside = False
    for argument in arguments:
        if inside and not argument.startswith("--") and result[-1] != flag:
            result.append(flag)
        inside = argument == flag or (inside and not argument.startswith("--"))
        result.append(argument)
    return result


def preset_experiment(agent_name: str, preset_name: str | None) -> Any:
    import tyro

    from .experiment import AGENTS, Experiment
    from .presets import PRESETS

    if preset_name is None:
        return Experiment(agent=AGENTS[agent_name](), env=tyro.MISSING)
    preset = PRESETS[preset_name]
    default = Experiment(agent=preset.agent, env=tyro.MISSING, **preset.experiment)
    if default.agent_name != agent_name:
        raise UsageError(f"preset {preset_name} is for {default.agent_name}, not for {agent_name}")
    return default


def parse_experiment(flags: list[str], default: Any) -> Any:
    """The experiment that `flags` make of `default`; SystemExit(0) after --help."""
    import tyro

    from .experiment import TrainFlags

    kind, values = type(default.agent), {part.name: getattr(default, part.name) for part in dataclasses.fields(default)}
    values["interventions"] = tuple(intervention.spec for intervention in default.acting)
    said = io.StringIO()
    width = os.environ.get("COLUMNS")
    try:
        if not {"-h", "--help"} & set(flags):
            os.environ["COLUMNS"] = "2000"  # no line of an error message is folded
        with contextlib.redirect_stderr(said):
            parsed = tyro.cli(
                TrainFlags[kind],  # type: ignore[valid-type]
                args=flags,
                default=TrainFlags(**values),
                prog=f"resprout train {default.agent_name}",
                description=f"Train {default.agent_name}.",
            )
    except SystemExit as stop:
        if stop.code:
            raise UsageError(one_line(said.getvalue())) from None
        raise
    finally:
        os.environ.pop("COLUMNS", None) if width is None else os.environ.__setitem__("COLUMNS", width)
    experiment = parsed.experiment()
    if flag_value(flags, "--agent.replay-ratio") is not None:  # the agent's own is one that it cannot be told from
        for control in (each.name for each in experiment.acting if each.control):
            raise UsageError(f"{control} sets the replay ratio: leave out --agent.replay-ratio")
    return experiment


def one_line(boxed: str) -> str:
    """The gist of tyro's boxed message: its first part, and the flags it suggests."""
    parts: list[list[str]] = [[]]
    for line in boxed.splitlines():
        text = line.strip("╭╮╰╯│─ ")
        if line.startswith("│ ──"):
            parts.append([])
        elif line.startswith("│") and text:
            parts[-1].append(text)
    if not any(parts):  # no boxes where the output's encoding has none
        parts = [[line.strip("+-| ") for line in boxed.splitlines() if line.strip("+-| ")]]
    message = " ".join(parts[0]).removeprefix("Error parsing TrainFlags: ")
    suggested = [line for part in parts[1:] if part and part[0].startswith("Perhaps") for line in part[1:]]
    flags = [line.split()[0] for line in suggested if line.startswith("--")]
    return message + (f" (did you mean {' or '.join(flags[:3])}?)" if flags else "")


def read_config(directory: Path, name: str = "config.json") -> Any:
    from .experiment import Experiment

    try:
        return Experiment.from_json(json.loads((directory / name).read_text())["experiment"])
    except (OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{directory} is not a run directory ({type(error).__name__}: {error})") from None


def check_unchanged(before: Any, after: Any, directory: str) -> None:
    from .experiment import CHANGEABLE

    def flat(experiment: Any) -> dict[str, Any]:
        data: dict[str, Any] = experiment.to_json()
        return data | {f"agent.{key}": value for key, value in data.pop("agent").items()}

    old, new = flat(before), flat(after)
    for key in old.keys() - CHANGEABLE:
        if old[key] != new[key]:
            raise UsageError(f"--resume {directory} cannot change {key} (it is {old[key]}, asked for {new[key]})")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed must be from 0 to 2^32 - 1, not {seed}")


def eval_command(arguments: list[str]) -> int:
    parser = OneLineParser(prog="resprout eval", description="Play the newest checkpoint of a run.")
    parser.add_argument("directory", type=Path, help="run directory")
    parser.add_argument("--episodes", type=int, default=10, help="whole games to play")
    parser.add_argument("--seed", type=int, default=0, help="of the environments")
    parser.add_argument("--video", type=Path, help="write the games of the first environment to this mp4")
    asked = parser.parse_args(arguments)
    if asked.episodes < 1:
        raise UsageError(f"--episodes must be at least 1, not {asked.episodes}")
    check_seed(asked.seed)
    if asked.video:
        check_file("--video", asked.video)
        if asked.video.suffix != ".mp4":
            raise UsageError(f"--video must end in .mp4, not {asked.video}")
    experiment = read_config(asked.directory)
    from .run import evaluate_run

    result = evaluate_run(experiment, asked.directory, asked.episodes, asked.seed, asked.video)
    for index, (value, length) in enumerate(zip(result.returns, result.lengths, strict=True)):
        print(f"episode {index}: return {value:.1f}, {length} agent steps")
    print(f"return: {result.mean:.1f} (mean of {asked.episodes} evaluation episodes)")
    if asked.video:
        print(f"video: {asked.video}")
    return 0


def diagnose_command(arguments: list[str]) -> int:
    parser = OneLineParser(prog="resprout diagnose", description="Every diagnostic of the newest checkpoint of a run.")
    parser.add_argument("directory", type=Path, help="run directory")
    parser.add_argument("--seed", type=int, default=0, help="of the transitions that are looked at")
    parser.add_argument("--json", type=Path, help="also write the values to this file")
    asked = parser.parse_args(arguments)
    check_seed(asked.seed)
    if asked.json:
        check_file("--json", asked.json)
    experiment = read_config(asked.directory)
    from .run import diagnose_run

    values = diagnose_run(experiment, asked.directory, asked.seed)
    for name, value in values.items():
        print(f"{name:<44} {value:.6g}")
    if asked.json:
        asked.json.write_text(json.dumps(values, indent=2))
    return 0


def export_command(arguments: list[str]) -> int:
    parser = OneLineParser(prog="resprout export", description="Write the replay of a run as a data set.")
    parser.add_argument("directory", type=Path, help="run directory of a run with --save-replay")
    parser.add_argument("--minari", required=True, metavar="NAME", help="local Minari data set to make, FOLDER/NAME-v0")
    asked = parser.parse_args(arguments)
    experiment = read_config(asked.directory)
    from ..replay import PastReplay, export_minari

    past = PastReplay(asked.directory / "replay", checksums=True)
    clip = past.description.reward_clip
    path = export_minari(
        past,
        asked.minari,
        algorithm_name=experiment.agent_name,
        description=f"All that a run of resprout stored while it trained on {experiment.env}, seed {experiment.seed}"
        + ("." if clip is None else f"; rewards are clipped to {clip:g}."),
    )
    print(f"{asked.minari}: {len(past)} agent steps in {path}")
    return 0


def bench_command(arguments: list[str]) -> int:
    from ..benchmarks.__main__ import bench

    return bench(arguments)


def list_command(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"resprout list {'|'.join(LISTS)}     what there is, a line each")
        return 0
    if len(arguments) != 1 or arguments[0] not in LISTS:
        asked = f"cannot list {' '.join(arguments)!r}; " if arguments else ""
        raise UsageError(f"{asked}resprout list {'|'.join(LISTS)}")
    for name, text in listing(arguments[0]):
        print(f"{name:<28} {text}".rstrip())
    return 0


def listing(kind: str) -> list[tuple[str, str]]:
    """Name and one line, with its source, of everything of a kind."""
    if kind == "envs":
        from ..envs import list_envs

        return [(name, family) for family, names in list_envs().items() for name in names]
    if kind == "suites":
        from ..benchmarks.__main__ import names

        return names()
    from .experiment import AGENTS, REPLAYS
    from .presets import PRESETS

    if kind == "presets":
        agents = {type_: name for name, type_ in AGENTS.items()}
        return [(name, f"{agents[type(preset.agent)]}: {preset.source}") for name, preset in PRESETS.items()]
    if kind == "diagnostics":
        from ..diagnostics import DIAGNOSTICS

        return [(name, each.source + (" (logged)" if each.default else "")) for name, each in DIAGNOSTICS.items()]
    from ..interventions import METHODS

    kinds: dict[str, Any] = {"agents": AGENTS, "interventions": METHODS, "replays": REPLAYS}
    entries: dict[str, Any] = kinds[kind]
    return [(name, first_line(entry.__doc__)) for name, entry in entries.items()]


def first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]


if __name__ == "__main__":
    main()
