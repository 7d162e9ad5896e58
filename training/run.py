"""A whole run: check everything, make the directory, train or go on training, evaluate, sum up."""

import dataclasses
import fcntl
import importlib.metadata
import json
import math
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from ..agents.learner import Agent, Batch, PyTree
from ..envs import Env, make
from ..replay import Part, Replay, Rings, Sampler, Storage, mixture
from ..replay.past import DESCRIPTION, segments, span
from . import checkpoint
from .batched_loop import BatchedLoop
from .compiled import bind_interventions, compile_functions, sampler_device, seed_from, streams
from .device_loop import DeviceLoop, next_multiple
from .evaluation import Evaluation, Video, evaluate, exploit_function
from .experiment import Experiment, ExperimentError
from .files import check_folder, read_record
from .host_loop import Training, host_loop, learn_owed
from .intervening import PROBE, labels, no_dormant
from .metrics import (
    Episodes,
    MetricsFile,
    ProgressDisplay,
    Totals,
    Tracker,
    plain,
    plot_causal_weights,
    plot_curve,
    read_metrics,
    say,
)
from .placement import (
    check_memory,
    check_networks,
    describe_replay,
    frames_on_device,
    loop_on_device,
    make_rings,
    place_frames,
    replay_arguments,
)
from .process import peak_device_memory, peak_memory, prepare_process, signals
from .processes import agreed, all_or_none
from .profiling import WARM_UPDATES, Profile, named
from .refitting import Refitting
from .sharing import alone, everywhere, placed, share_batch
from .sources import Past, open_sources

PACKAGES = ("resprout", "jax", "jaxlib", "flax", "optax", "numpy", "envpool", "gymnasium", "mujoco", "ale-py", "gymnax")
EVALUATION_ENVS = 10  # at most; episodes are spread evenly over them
LEFTOVERS = {".lock", ".config.json.tmp"}  # in a directory whose run was killed before it had a configuration


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP: a checkpoint was written and the run can be resumed."""

    def __init__(self, number: int, directory: Path) -> None:
        super().__init__(f"interrupted; go on with: resprout train --resume {directory}")
        self.exit_code = 128 + number


class Abandoned(Exception):
    """A signal came in the middle of an evaluation."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message names what happened and the last good checkpoint."""


@dataclass(frozen=True)
class Result:
    """What a finished run leaves."""

    directory: Path
    state: PyTree  # the agent's
    evaluation: Evaluation | None  # of the last state
    steps_per_second: float  # agent steps, learning on; no first updates, evaluations, diagnostics or checkpoints
    curve: Path | None
    summary: dict[str, Any]


def make_env(experiment: Experiment, *, training: bool, num_envs: int, render: bool = False) -> Env:
    return make(
        experiment.env,
        num_envs=num_envs,
        seed=experiment.seed,
        protocol=experiment.protocol,
        training=training,
        render=render,
    )


def train(
    experiment: Experiment,
    *,
    resume: str | Path | None = None,
    quiet: bool = False,
    profile: int = 0,
    devices: int | None = 1,
) -> Result:
    """Train `experiment` in a new run directory, or go on with the one at `resume`.

    profile: gradient steps to trace into the run directory (`Profile`); 0 for none.
    devices: of each process, that share every batch (`share_batch`); None for all there are.
    Everything that can be wrong is found before anything is created: EnvError, ExperimentError (both ValueError).
    Raises Interrupted on SIGINT and SIGTERM after saving, TrainingStopped when a metric is not finite.
    """
    prepare_process()
    Tracker.check(experiment.track)
    with ExitStack() as stack:
        with all_or_none():
            mesh = share_batch(experiment, devices)
            env = stack.enter_context(closing(make_env(experiment, training=True, num_envs=experiment.num_envs)))
            agent = experiment.build_agent(env.spec)
            recorded = read_record(Path(resume) / "config.json").get("sources", []) if resume else []
            description = describe_replay(experiment, env.spec)
            past = open_sources(experiment.replay_from, experiment.agent.batch_size, description, recorded)
            first = jax.process_index() == 0
            directory = Path(resume) if resume else new_directory(experiment) if first else Path(str(experiment.out))
            on_device = loop_on_device(experiment, env)
            rings = make_rings(experiment, env.spec, sharding=everywhere(mesh)) if on_device else None
            frames_there = not on_device and frames_on_device(experiment, env.spec)
            run = Run(experiment, directory, env, agent, past, quiet or not first, stack, rings, 0, frames_there, mesh)
            run.trace(profile)
            if first:
                run.start(resume is not None)
        with all_or_none():  # the other processes read what the first one leaves
            if not first:
                run.start(resume is not None)
        return run.train()


def evaluate_run(
    experiment: Experiment, directory: Path, episodes: int, seed: int = 0, video: Path | None = None
) -> Evaluation:
    """Play `episodes` games with the newest readable checkpoint of a run; `video` films the first environment."""
    prepare_process()
    path, complaints = checkpoint.newest(directory / "checkpoints", with_replay=False)
    for line in complaints:
        say(line)
    count = 1 if video else min(episodes, EVALUATION_ENVS)
    with closing(make_env(experiment, training=False, num_envs=count, render=video is not None)) as env:
        agent = experiment.build_agent(env.spec)
        template = jax.jit(agent.init)(jax.random.key(0))
        state = checkpoint.restore_agent(path, template)
        exploit = exploit_function(agent.exploit)
        if video is None:
            return evaluate(exploit, state, env, episodes, seed)
        with closing(Video(video)) as film:
            return evaluate(exploit, state, env, episodes, seed, film.add)


def diagnose_run(experiment: Experiment, directory: Path, seed: int = 0) -> dict[str, float]:
    """Every diagnostic of a run's newest readable checkpoint, on transitions of its replay; some take a minute on a large network."""
    prepare_process()
    path, complaints = checkpoint.newest(directory / "checkpoints")
    for line in complaints:
        say(line)
    with ExitStack() as stack:
        env = stack.enter_context(closing(make_env(experiment, training=False, num_envs=experiment.num_envs)))
        run = Run(experiment, directory, env, experiment.build_agent(env.spec), (), quiet=True, stack=stack)
        t = run.fresh()
        agent = checkpoint.restore_agent(path, t.agent)
        checkpoint.restore_transitions(path, t.storage)
        if not len(t.storage):
            raise ExperimentError(f"{path} has no transitions to look at")
        columns = t.storage.draw(PROBE + experiment.agent.batch_size, np.random.default_rng(seed))
        look = jax.jit(run.compiled.diagnose_all)
        values = jax.device_get(look(agent, {}, run.keys["agent"], columns, agent.gradient_step)[0])
        return {name: float(value) for name, value in sorted(values.items())}


def train_on_device(
    runs: Sequence["Run"], rings: Rings, sharding: jax.sharding.NamedSharding | None = None
) -> list[Result]:
    """Train runs of one experiment with different seeds, begun or resumed at one agent step, in one loop on the device."""
    first = runs[0]
    loop = DeviceLoop(
        first.experiment,
        [run.experiment.seed for run in runs],
        [run.training for run in runs],
        rings,
        first.agent,
        first.sampler,
        sharding,
        first.mesh,
    )
    return _train_in(loop, runs)


def train_batched(runs: Sequence["Run"]) -> list[Result]:
    """As `train_on_device`, in one loop on the host."""
    first = runs[0]
    seeds, trainings = [run.experiment.seed for run in runs], [run.training for run in runs]
    loop = BatchedLoop(first.experiment, seeds, trainings, first.agent, first.sampler, first.watch)
    if first.profile:
        loop.compiled = named(loop.compiled)
    return _train_in(loop, runs)


def _train_in(loop: DeviceLoop | BatchedLoop, runs: Sequence["Run"]) -> list[Result]:
    first = runs[0]
    for run in runs:
        run.show_progress()
        run.speed = first.speed  # of all together, so that what one is busy with is left out for all
        run.leader, run.spare = first, len(runs) > 1

    def prune() -> None:
        """Only now that all are saved: a kill in between leaves all of them a checkpoint of the same step."""
        for run in runs:
            checkpoint.prune(run.directory / "checkpoints", run.experiment.keep_checkpoints)

    def boundary() -> bool:
        saved, stops = first.saved_step, [run.boundary() for run in runs]
        if len(runs) > 1 and first.saved_step != saved:
            prune()
        return any(stops)

    with first.signals():
        loop.run(lambda: min(run.next_due() for run in runs), boundary)
        if first.stop is not None:
            for run in runs[1:]:  # before the first saves and raises
                run.save()
        first.stop_if_interrupted()
        with first.speed.excluded():
            for run in runs:
                run.save()
            if len(runs) > 1:
                prune()
        first.stop_if_interrupted()
        steps_per_second = first.speed.rate(first.training)
        loop.settle()
    return [run.finish(steps_per_second) for run in runs]


class Run:
    """The parts of a run in progress and what is done with them between agent steps."""

    def __init__(
        self,
        experiment: Experiment,
        directory: Path,
        env: Env,
        agent: Agent,
        past: tuple[Past, ...],
        quiet: bool,
        stack: ExitStack,
        rings: Rings | None = None,
        place: int = 0,
        frames_there: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        """rings, place: where the replay is if the loop runs on the device; frames_there: whether only its frames are.

        mesh: of the devices that share every batch.
        Of several processes the first writes `directory`; the others read there, and write to a temporary folder.
        """
        self.experiment, self.directory, self.env, self.agent, self.past = experiment, directory, env, agent, past
        self.keys = streams(experiment.seed)
        self.sampler = self._sampler()
        self.acting = bind_interventions(experiment, env.spec, agent, self.keys)
        self.mesh, self.everywhere = mesh, everywhere(mesh)
        self.spans = jax.process_count() > 1  # several processes, all of which do the same
        self.writes = jax.process_index() == 0
        self.output = directory if self.writes else Path(stack.enter_context(TemporaryDirectory(prefix="resprout-")))
        self.compiled = compile_functions(experiment, env.spec, agent, self.sampler, self.acting, mesh)
        self.exploit = exploit_function(agent.exploit)
        self.rings, self.place, self.frames_there = rings, place, frames_there
        self.sampler_device = sampler_device(self.sampler) if rings is None else None
        apart = self.sampler_device and jax.sharding.SingleDeviceSharding(self.sampler_device)
        self.sampler_place = apart or self.everywhere
        self.evaluation_env: Env | None = None
        self.stack = stack
        self.quiet = quiet
        self.received: int | None = None  # the number of a signal
        self.leader = self  # of several runs in one loop, the one that signals are told
        self.spare = 0  # checkpoints to keep beyond those asked for, until all of several runs are saved
        self.whole = directory  # what --resume goes on with: of several runs that of all
        self.stopping: int | None = None  # that of any process
        self.saved_step = -1  # agent step of the newest checkpoint
        self.saved_transitions = 0  # those in files
        # Transitions to a file where all are kept: none may be overwritten before, and a step writes this many at most.
        most = env.spec.num_envs * experiment.agent.n_step
        self.segment = max(1, min(checkpoint.SEGMENT, experiment.agent.capacity - most))
        self.speed = Speed()
        self.progress: ProgressDisplay | None = None
        self.profile: Profile | None = None

    def share_compiled(self, other: "Run") -> None:
        """Compile nothing that a run of the same experiment with another seed has compiled."""
        diagnose, self.exploit = other.compiled.diagnose.func, other.exploit
        stream, remember = self.keys["diagnostics"], other.compiled.remember
        self.compiled = dataclasses.replace(self.compiled, diagnose=partial(diagnose, stream), remember=remember)

    def trace(self, gradient_steps: int) -> None:
        """Trace so many of them; 0 for none."""
        if gradient_steps < 0:
            raise ExperimentError(f"profile must not be negative, not {gradient_steps}")
        if gradient_steps:
            self.profile = Profile(self.output / "profile", gradient_steps, self.say)

    @property
    def shared_by(self) -> int:
        """How many devices share a batch."""
        return self.mesh.size if self.mesh else 1

    # Starting and resuming

    def _sampler(self) -> Sampler:
        """The experiment's own, or one over each source."""
        capacity = self.experiment.agent.capacity
        if not self.past:
            return self.experiment.sampler(capacity)
        live = Part(self.experiment.sampler(capacity), capacity, 1 - sum(past.share for past in self.past))
        sizes = [len(past.replay) for past in self.past]
        samplers = [self.experiment.sampler(size) for size in sizes]
        return mixture(live, *map(Part, samplers, sizes, [past.share for past in self.past]))

    def fresh(self) -> Training:
        """The state of a run at agent step 0, but for its environments."""
        init = jax.jit(self.agent.init)
        check_networks(init.eval_shape(self.keys["agent"]))
        state = init(self.keys["agent"])
        spec, experiment = self.env.spec, self.experiment
        batch = jax.eval_shape(self._probe_batch)
        metrics = jax.eval_shape(self.agent.update, state, batch, self.keys["agent"])[1]
        # Interventions that do not fit the agent say so here, before anything is created.
        effects = [jax.eval_shape(each.update, state, each.init(state), batch, 0, 0)[2] for each in self.acting]
        memories = jax.jit(lambda state: jax.tree.map(jnp.copy, [each.init(state) for each in self.acting]))(state)
        storage: Replay = self._storage() if self.rings is None else self.rings[self.place]
        if self.rings is not None:
            self.say(check_memory(experiment, spec, self.rings))
        dormant = no_dormant(self.agent, state, batch) if experiment.diagnose_every else None
        sampler = jax.jit(self.sampler.init)(jax.device_put(self.keys["sampler"], self.sampler_device))
        return Training(
            env=self.env,
            storage=storage,
            observation=None,
            agent=placed(self.everywhere, state),
            sampler=placed(self.sampler_place, sampler),
            totals=self._zeros(tuple(sorted(metrics))),
            episodes=Episodes(spec.num_envs),
            past=tuple(past.replay for past in self.past),
            ratio=fraction(experiment.ratio),
            memories=placed(self.everywhere, memories),
            effects=[self._zeros(tuple(sorted(names))) for names in effects],
            refitting=Refitting(self.agent.refit) if self.agent.refit else None,
            dormant=placed(self.everywhere, dormant),
        )

    def _zeros(self, names: tuple[str, ...]) -> Totals:
        return placed(self.everywhere, Totals.zeros(names))

    def _storage(self) -> Storage:
        experiment, spec = self.experiment, self.env.spec
        try:
            self.say(check_memory(experiment, spec, frames_there=self.frames_there))
            frames = place_frames(experiment, spec, self.mesh) if self.frames_there else None
            arguments = replay_arguments(experiment, spec)
            return Storage(experiment.agent.capacity, count_draws=experiment.count_draws, frames=frames, **arguments)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            said = str(error).splitlines()[0]
            raise ExperimentError(f"the replay cannot be reserved ({said}); lower --agent.capacity") from None

    def _probe_batch(self) -> Any:
        spec, size = self.env.spec, self.experiment.agent.batch_size
        observation = jax.numpy.zeros((size, *spec.observation_shape), spec.observation_dtype)
        action = jax.numpy.zeros(
            (size,) if spec.discrete else (size, spec.action_size), "int32" if spec.discrete else "float32"
        )
        scalar = jax.numpy.zeros(size)
        return Batch(observation, action, scalar, scalar, observation, scalar)

    def restart_environments(self) -> None:
        """New episodes in all environments, their randomness a function of the agent step."""
        t = self.training
        t.observation = self.env.reset(seed_from(self.keys["environment"], t.agent_step))
        t.storage.begin(t.observation)

    def start(self, resume: bool, until: int | None = None) -> None:
        """until: the agent step from whose checkpoint to go on, or from one before it; None for the newest."""
        self.resume(until) if resume else self.begin()

    def begin(self) -> None:
        self.training = self.fresh()
        self.output.mkdir(parents=True, exist_ok=True)
        self._lock()
        self._write_config()
        self.restart_environments()
        self._open(metrics_bytes=0)

    def resume(self, until: int | None = None) -> None:
        saved = read_record(self.directory / "config.json", digest=str, versions=dict)
        if saved["digest"] != self.experiment.digest():
            raise ExperimentError(f"{self.directory} is a run of another experiment")
        self._lock()
        for name, now in self._versions().items():
            if saved["versions"].get(name) != now:
                self.say(f"{name} was {saved['versions'].get(name)} and is {now}: the run may differ from here on")
        kinds = self._device_kinds()
        for what, before, after in (
            ("devices", saved.get("shared_by", 1), self.shared_by),
            ("kinds of device", saved.get("device_kinds", kinds), kinds),
        ):
            if before != after:
                self.say(f"{what} were {before} and are {after}: the run may round otherwise from here on")
        checkpoints = self.directory / "checkpoints"
        if not any(checkpoints.glob("[0-9]*")):
            experiment, written = self.experiment, segments(self.directory / "replay")
            first = experiment.checkpoint_every  # a kill may come between its transitions and itself
            if not first and experiment.save_replay and written:  # of a run of any length
                raise ExperimentError(
                    f"{self.directory} has no checkpoint, but transitions that --save-replay keeps: begin anew in another --out"
                )
            lost = experiment.save_replay and written and span(written[-1])[1] >= first + experiment.num_envs
            if lost or (self.directory / "summary.json").exists():
                raise ExperimentError(f"{self.directory} has lost its checkpoints: begin anew in another --out")
            self.say(f"{self.directory} has no checkpoint yet: starting from the beginning")
            self.training = self.fresh()
            for name in ("checkpoints", "replay"):  # of a first checkpoint cut short
                shutil.rmtree(self.output / name, ignore_errors=True)
            self._write_config()
            self.restart_environments()
            self._open(metrics_bytes=0)
            return
        path, complaints = checkpoint.newest(checkpoints, until=until)
        for line in complaints:
            self.say(line)
        summary = self.directory / "summary.json"  # missing if the run was stopped in its last evaluation
        reached = int(path.name)  # agent steps
        beyond = reached - self.experiment.steps
        if beyond >= self.env.spec.num_envs or (beyond >= 0 and summary.exists()):
            raise ExperimentError(f"{self.directory} is complete at {reached} agent steps; give more --steps")
        later = checkpoint.names(checkpoints)[-1]
        if until is not None and later > path:
            self.say(
                f"{self.directory}: back from agent step {int(later.name)} to {reached}, the last that all seeds have"
            )
        self.training = t = self.fresh()
        snapshot, metrics_bytes = checkpoint.restore(path, t, back=until is not None)
        for part in checkpoint.DEVICE_PARTS:
            place = self.sampler_place if part == "sampler" else self.everywhere
            setattr(t, part, placed(place, getattr(t, part)))
        self.saved_step, self.saved_transitions = t.agent_step, t.storage.written
        summary.unlink(missing_ok=True)  # of the shorter run
        if snapshot is None:
            t.observation = self.env.reset(seed_from(self.keys["environment"], t.agent_step))
        else:
            t.observation = self.env.restore(snapshot)
        self._write_config()
        self._open(metrics_bytes)
        self.say(f"resumed {self.directory} at agent step {t.agent_step}")
        if self._evaluation_due() and not any(
            line["step"] == t.agent_step and "eval/return" in line
            for line in read_metrics(self.output / "metrics.jsonl")
        ):
            self.evaluate()  # the shorter run's last one, which was of its end and is cut off, came in its place

    def _lock(self) -> None:
        """Keep every other process out of the directory for as long as this run lasts."""
        lock = self.stack.enter_context((self.output / ".lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExperimentError(f"{self.directory} is in use by another process") from None

    @staticmethod
    def _versions() -> dict[str, str | None]:
        return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}

    @staticmethod
    def _device_kinds() -> list[str]:
        return sorted({device.device_kind for device in jax.devices()})

    def _open(self, metrics_bytes: int) -> None:
        path = self.output / "metrics.jsonl"
        self.metrics = self.stack.enter_context(closing(MetricsFile(path, metrics_bytes)))
        config, track = self.experiment.to_json(), self.experiment.track if self.writes else None
        self.tracker = self.stack.enter_context(closing(Tracker(track, self.output, config)))

    def _write_config(self) -> None:
        config = {
            "experiment": self.experiment.to_json(),
            "digest": self.experiment.digest(),
            "environment": dataclasses.asdict(self.env.spec),
            "versions": self._versions(),
            "sources": [past.to_json() for past in self.past],
            "devices": [str(device) for device in jax.devices()],
            "device_kinds": self._device_kinds(),
            "shared_by": self.shared_by,
            "git_commit": " ".join(self._commits()) or None,
        }
        checkpoint.write_atomically(self.output / "config.json", json.dumps(config, indent=2))
        if self.experiment.save_replay:
            replay = self.output / "replay"
            replay.mkdir(exist_ok=True)
            description = describe_replay(self.experiment, self.env.spec).to_json()
            checkpoint.write_atomically(replay / DESCRIPTION, json.dumps(description, indent=2))

    def _commits(self) -> list[str]:
        """Of the code that this run was trained by, oldest first: more than one where it was gone on with after a change."""
        config = self.output / "config.json"
        before = json.loads(config.read_text()).get("git_commit") if config.exists() else None
        commits, now = (before or "").split(), _git_commit()
        return commits if now is None or now in commits[-1:] else [*commits, now]

    # Training

    def train(self) -> Result:
        t, experiment = self.training, self.experiment
        if self.rings is not None:
            return train_on_device([self], self.rings)[0]
        self.show_progress()
        compiled = named(self.compiled) if self.profile else self.compiled
        with self.signals():
            host_loop(experiment, t, compiled, self.boundary)
            self.stop_if_interrupted()
            with self.speed.excluded():
                self.save()
            self.stop_if_interrupted()
        learn_owed(t, compiled)  # what the last agent step owes; a continuation does so itself
        return self.finish(self.speed.rate(t))

    def show_progress(self) -> None:
        self.progress = ProgressDisplay(self.experiment.steps, self.training.agent_step, self.quiet)
        self.stack.enter_context(closing(self.progress))
        if self.profile:
            self.stack.callback(self.profile.end, self.training)

    def stop_if_interrupted(self) -> None:
        """Interrupted, after a checkpoint, if a signal came."""
        if self.stop is not None:
            self.save()
            plot_curve(self.output)
            plot_causal_weights(self.output)
            raise Interrupted(self.stop, self.directory)

    def finish(self, steps_per_second: float) -> Result:
        """The last line, evaluation and summary of a run that has taken all its steps."""
        jax.block_until_ready(self.training.agent)
        if self.profile:
            self.profile.end(self.training)
        if not self._due(self.experiment.log_every):
            self.write_line()
        self._stop_if_not_finite()
        return self._sum_up(steps_per_second)

    def next_due(self) -> int:
        """The next agent step at which `boundary` may have something to do."""
        t, experiment, num_envs = self.training, self.experiment, self.env.spec.num_envs
        periods = [experiment.log_every, experiment.diagnose_every, experiment.eval_every, experiment.checkpoint_every]
        periods += [each.intervention.control.every for each in self.acting if each.intervention.control]
        due = [next_multiple(t.agent_step, every, num_envs) for every in periods if every > 0]
        if experiment.save_replay:
            due.append(t.agent_step + max(num_envs, self.segment - (t.storage.written - self.saved_transitions)))
        if self.profile and t.ratio and (left := self.profile.left(t)):
            before = max(0, experiment.agent.warmup - t.agent_step)
            due.append(t.agent_step + max(num_envs, before + math.ceil(left / t.ratio)))
        return min(due)

    def watch(self) -> bool:
        """Show how far it is; whether a signal came."""
        if self.progress:
            self.progress.update(self.training.agent_step, self.training.episodes.last_return)
        return self.received is not None

    def boundary(self) -> bool:
        """Between two agent steps: lines, evaluations and checkpoints that are due; True to stop."""
        t, experiment = self.training, self.experiment
        self.speed.observe(t)
        if self.profile:
            with self.speed.excluded():
                self.profile.observe(t)
        if self.progress:
            self.progress.update(t.agent_step, t.episodes.last_return)
        if self._due(experiment.log_every):
            self.write_line()
        if t.gradient_step and self._due(experiment.diagnose_every):
            with self.speed.excluded():
                self.diagnose()
        self._control()
        self._refit()
        if self._evaluation_due():
            with self.speed.excluded(), suppress(Abandoned):  # whoever goes on from here begins with it
                self.evaluate()
        if experiment.save_replay and t.storage.written - self.saved_transitions >= self.segment:
            with self.speed.excluded(), self._writing("replay"):
                if self.writes:
                    checkpoint.save_transitions(self.directory / "replay", t.storage)
                self.saved_transitions = t.storage.written
        if self._due(experiment.checkpoint_every):
            with self.speed.excluded():
                self.save()
        if self.spans and self._due(experiment.log_every):
            self.stopping = agreed(self.received)
        return self.stop is not None

    @property
    def stop(self) -> int | None:
        """The number of a signal to stop at; of several processes, once all know of it."""
        return self.stopping if self.spans else self.leader.received

    def _control(self) -> None:
        """Let an intervention set the replay ratio, where one does and it is time to."""
        t = self.training
        for index, each in enumerate(self.acting):
            control = each.intervention.control
            if control and t.gradient_step and self._due(control.every):
                name = each.learners[0]
                t.memories[index][name], ratio = jax.jit(control.decide)(t.memories[index][name])
                t.ratio = fraction(float(ratio))
                self._write({f"{each.intervention.name}/replay_ratio": float(t.ratio)})

    def _refit(self) -> None:
        """Let the agent start a fit on the host or take one over, where it has one and it is time to."""
        t = self.training
        if t.refitting:
            assert isinstance(t.storage, Storage)
            starts = self._due(t.refitting.refit.every)
            t.agent, described = t.refitting.step(t.agent, t.storage, t.agent_step, starts)
            if described:
                t.agent = placed(self.everywhere, t.agent)
            for values in described:
                self._write(values)

    def _due(self, every: int) -> bool:
        step = self.training.agent_step
        return every > 0 and step // every != (step - self.env.spec.num_envs) // every

    def _evaluation_due(self) -> bool:
        """The one at the end of a run comes when everything is learnt, in its summary."""
        experiment = self.experiment
        before_end = self.training.agent_step < experiment.steps
        return bool(experiment.eval_episodes and before_end and self._due(experiment.eval_every))

    def write_line(self) -> None:
        self._stop_if_not_finite()
        t = self.training
        line = t.episodes.line() | t.totals.means() | {"replay/size": len(t.storage)}
        for label, effects in zip(labels(self.experiment.acting), t.effects, strict=True):
            line |= {f"{label}/{name}": value for name, value in effects.means().items()}  # of one event, the mean
        if self.experiment.on_nan == "skip":
            line["updates/skipped"] = t.totals.skipped
        t.totals = self._zeros(t.totals.names)
        t.effects = [self._zeros(effects.names) for effects in t.effects]
        self._write(line)

    def _write(self, values: dict[str, Any]) -> None:
        t = self.training
        position = {"step": t.agent_step, "gradient_step": t.gradient_step}
        clock = {"wall_clock": time.time(), "steps_per_second": self.progress.rate if self.progress else float("nan")}
        with self._writing("line of metrics"):
            self.metrics.write(position | clock | values)
        self.tracker.write(position | values)

    def diagnose(self) -> None:
        """A line of diagnostics, on transitions that neither the sampler nor any other random stream knows of."""
        t = self.training
        generator = self.compiled.generator("diagnostics", t.gradient_step)
        columns = t.storage.draw(PROBE + self.experiment.agent.batch_size, generator)
        agent, dormant = alone(self.mesh, (t.agent, t.dormant))
        values, t.dormant = self.compiled.diagnose(
            agent, dormant, self.keys["agent"], alone(self.mesh, columns), np.int32(t.gradient_step)
        )
        self._write({name: float(value) for name, value in jax.device_get(values).items()})

    def evaluate(self) -> Evaluation:
        """Abandoned if a signal comes before its end."""

        def look(env: Env) -> None:
            if self.stop is not None:
                raise Abandoned

        episodes = self.experiment.eval_episodes
        if self.evaluation_env is None:
            env = make_env(self.experiment, training=False, num_envs=min(episodes, EVALUATION_ENVS))
            self.evaluation_env = self.stack.enter_context(closing(env))
        seed = seed_from(self.keys["evaluation"], self.training.agent_step)
        agent = alone(self.mesh, self.training.agent)
        result = evaluate(self.exploit, agent, self.evaluation_env, episodes, seed, look)
        spread = float(np.std(result.returns))
        self._write({"eval/return": result.mean, "eval/return_std": spread, "eval/episodes": episodes})
        return result

    def save(self) -> None:
        """Write a checkpoint. Environments that cannot be captured begin new episodes, whether or not the run stops."""
        self._stop_if_not_finite()
        t = self.training
        if t.agent_step == self.saved_step:
            return
        snapshot = self.env.snapshot()
        if snapshot is None:
            assert isinstance(t.storage, Storage)
            t.sampler = self.compiled.remember(t.sampler, t.storage.end())
            t.episodes.abandon()
            self.restart_environments()
        with self._writing("checkpoint"):
            if self.writes:
                folder, length = self.directory / "checkpoints", self.metrics.length()
                checkpoint.save(folder, t, snapshot, self.experiment.keep_checkpoints + self.spare, length)
        self.saved_step, self.saved_transitions = t.agent_step, t.storage.written

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            free = shutil.disk_usage(self.directory).free / 1e6
            raise TrainingStopped(
                f"the {what} at agent step {self.training.agent_step} could not be written ({error}; {free:.1f} MB of "
                f"disk are free); {self._last_good()}; make room, then: resprout train --resume {self.whole}"
            ) from error

    def _stop_if_not_finite(self) -> None:
        if self.experiment.on_nan == "skip":
            return
        problem = self.training.totals.not_finite()
        if problem:
            raise TrainingStopped(f"{problem}; {self._last_good()}; --on-nan skip would leave such gradient steps out")

    def _last_good(self) -> str:
        good = checkpoint.names(self.directory / "checkpoints")
        return f"the last good checkpoint is {good[-1]}" if good else "there was no checkpoint yet"

    def _sum_up(self, steps_per_second: float) -> Result:
        t = self.training
        try:
            evaluation = self.evaluate() if self.experiment.eval_episodes else None
        except Abandoned:  # by a signal that came when all was saved
            raise Interrupted(int(self.stop or 0), self.whole) from None
        summary: dict[str, Any] = {
            "return": evaluation.mean if evaluation else None,
            "episode_returns": evaluation.returns if evaluation else [],
            "episode_lengths": evaluation.lengths if evaluation else [],
            "agent_steps": t.agent_step,
            "gradient_steps": t.gradient_step,
            "steps_per_second": steps_per_second,
            "peak_memory_bytes": peak_memory(),
            "peak_device_memory_bytes": peak_device_memory(),
            "digest": self.experiment.digest(),
        }
        if self.experiment.count_draws:
            assert isinstance(t.storage, Storage)
            summary["lifetime_draws"] = draw_statistics(t.storage.lifetime_draws)
        text = json.dumps({key: plain(value) for key, value in summary.items()}, indent=2)
        with self._writing("summary"):
            checkpoint.write_atomically(self.output / "summary.json", text)
        plot_causal_weights(self.output)
        return Result(self.directory, t.agent, evaluation, steps_per_second, plot_curve(self.output), summary)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Turn the first signal into a wish to stop; a second SIGINT or SIGTERM has its usual effect."""

        def receive(number: int, frame: FrameType | None) -> None:
            self.received = number
            for each in (signal.SIGINT, signal.SIGTERM):  # a shell has the first ignored by jobs in the background
                signal.signal(each, signal.SIG_DFL if previous[each] == signal.SIG_IGN else previous[each])
            self.say("stopping after a checkpoint; once more to stop at once")

        with signals(receive) as previous:
            yield

    def say(self, message: str) -> None:
        if self.progress:
            self.progress.say(message)
        else:
            say(message, self.quiet)


def draw_statistics(histogram: NDArray[np.int64]) -> dict[str, Any]:
    """Of `Storage.lifetime_draws`; mean and variance (population) are None before a life is over."""
    lives = int(histogram.sum())
    draws = np.arange(len(histogram))
    mean = float(histogram @ draws) / lives if lives else None
    variance = float(histogram @ (draws - mean) ** 2) / lives if mean is not None else None
    return {"lives": lives, "mean": mean, "variance": variance, "histogram": histogram.tolist()}


class Speed:
    """Agent steps per second while learning, without what is compiled for the first updates and without what is `excluded`."""

    def __init__(self) -> None:
        self.start: tuple[int, float] | None = None
        self.paused = 0.0
        self.updates_seen = 0

    def observe(self, training: Training) -> None:
        if self.start is None:
            if self.updates_seen == 0 and training.gradient_step > 0:
                self.updates_seen = training.gradient_step
            if self.updates_seen and training.gradient_step >= self.updates_seen + WARM_UPDATES:
                jax.block_until_ready(training.agent)
                self.start = (training.agent_step, time.monotonic())

    @contextmanager
    def excluded(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        if self.start is not None:
            self.paused += time.monotonic() - started

    def rate(self, training: Training) -> float:
        """NaN if there were too few gradient steps to tell."""
        jax.block_until_ready(training.agent)
        if self.start is None or training.agent_step == self.start[0]:
            return float("nan")
        return (training.agent_step - self.start[0]) / (time.monotonic() - self.start[1] - self.paused)


def fraction(ratio: float) -> Fraction:
    return Fraction(ratio).limit_denominator(1_000_000)


def new_directory(experiment: Experiment) -> Path:
    """Where a new run goes; ExperimentError if something is there already. Creates nothing.

    What a kill in the first instant leaves is nothing.
    """
    if experiment.out is not None:
        directory = Path(experiment.out)
        check_folder("--out", directory)
        if directory.exists() and not {path.name for path in directory.iterdir()} <= LEFTOVERS:
            ours = any((directory / name).exists() for name in ("config.json", "seeds.json"))
            advice = f"go on with --resume {directory}, or give another --out" if ours else "give another --out"
            raise ExperimentError(f"{directory} exists already; {advice}")
        return directory
    name = f"{experiment.env.replace('/', '_')}-{experiment.agent_name}-s{experiment.seed}"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Of the checkout this code runs from, +dirty where a file of it has been changed since; None if it is none."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:  # installed inside somebody's checkout, this file is not one of those that git knows there
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+dirty"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
