"""One run as typed, immutable data: what to train, where, for how long, and how it is watched."""

import dataclasses
import hashlib
import inspect
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, Protocol

from typing_extensions import TypeVar
from tyro.conf import UseAppendAction, arg

from ..agents import ACE, DQN, SAC, DrM, DrQv2
from ..agents.learner import Agent, Spec, Wrap, as_given
from ..interventions import Intervention
from ..replay import Sampler, masked, prioritized, reshuffled, uniform, without_replacement
from .intervening import build_agent, parse_intervention
from .sources import parse_sources
from .specs import LIMIT, parse_spec


class ExperimentError(ValueError):
    """A run that cannot be made, in one line that says why."""


class AgentConfig(Protocol):
    """What the loop reads of an agent's configuration; every agent's frozen dataclass has these fields."""

    @property
    def gamma(self) -> float: ...
    @property
    def n_step(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def replay_ratio(self) -> float: ...  # gradient steps per agent step
    @property
    def warmup(self) -> int: ...  # agent steps of uniformly random actions before learning
    @property
    def capacity(self) -> int: ...  # transitions in the replay
    def build(self, spec: Spec, wrap: Wrap = as_given) -> Agent: ...


AGENTS: dict[str, type[Any]] = {"dqn": DQN, "sac": SAC, "ace": ACE, "drqv2": DrQv2, "drm": DrM}
REPLAYS = {
    "uniform": uniform,
    "without_replacement": without_replacement,
    "reshuffled": reshuffled,
    "prioritized": prioritized,
    "masked": masked,
}

# What may differ between a run and its continuation: nothing that training depends on.
CHANGEABLE = frozenset(
    {"steps", "eval_every", "eval_episodes", "log_every", "track", "on_nan", "out", "keep_checkpoints", "replay_on"}
)


A = TypeVar("A", bound=AgentConfig, default=AgentConfig)


@dataclass(frozen=True)
class Experiment(Generic[A]):
    """A training run; `steps` and every other step count are agent steps (decisions) over all environments."""

    agent: A
    """the agent and its settings"""
    env: str
    """atari/Breakout, mujoco/HalfCheetah-v5, dmc/walker-run, dmc-pixels/walker-run, metaworld/hammer, robotics/HandReach-v3,
    minatar/Breakout, gymnax/CartPole-v1, changing/minatar-cycle@50000 or gym/ANY-ID; `resprout list envs`"""
    steps: int = 1_000_000
    """agent steps (decisions) over all environments"""
    seed: int = 0
    """root of every random stream"""
    num_envs: int = 1
    """environments stepped together"""
    protocol: str | None = None
    """Atari protocol: dopamine (the default), cleanrl or atari100k"""
    replay: str = "uniform"
    """which slots of the replay to learn from: a name, or name:field=value,field=value; `resprout list replays`"""
    replay_from: tuple[str, ...] = ()
    """past data to mix into every batch, RUN_DIR[:fraction] or minari:NAME[:fraction]; half of it when not said"""
    save_replay: bool = False
    """keep everything the run stores in its replay, for --replay-from and `resprout export`"""
    count_draws: bool = False
    """count how often each transition is drawn in its life, for summary.json"""
    replay_ratio: float | None = None
    """gradient steps per agent step; the agent's own when not given"""
    interventions: tuple[Intervention | str, ...] = ()
    """what keeps the networks able to learn, in this order: name or name:field=value,field=value; `resprout list interventions`"""
    diagnose_every: int = 0
    """agent steps between diagnostics in the metrics, 0 for none; `resprout list diagnostics`"""
    loop: Literal["auto", "host", "device"] = "auto"
    """where the loop runs: auto is on the device, whole, where the environment is a function of JAX (minatar/*, gymnax/*, most of changing/*)"""
    replay_on: Literal["auto", "host", "device"] = "auto"
    """where the frames of image stacks are kept if the loop runs on the host: auto is an accelerator where they fit; the same numbers"""
    sync: bool = False
    """environments wait for the update; otherwise actions may come from parameters one agent step old"""
    eval_every: int = 10_000
    """agent steps between evaluations, 0 for none before the end"""
    eval_episodes: int = 10
    """episodes of each evaluation, played by the policy without exploration; 0 for no evaluation at all"""
    log_every: int = 1_000
    """agent steps between lines of metrics"""
    checkpoint_every: int = 100_000
    """agent steps between checkpoints, 0 for one at the end only"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints stay"""
    on_nan: Literal["stop", "skip"] = "stop"
    """a metric that is not finite stops the run, or its gradient step is undone"""
    track: Literal["tensorboard", "wandb"] | None = None
    """also send metrics there"""
    out: str | None = None
    """run directory; runs/ENV-AGENT-sSEED-TIME when not given"""

    def __post_init__(self) -> None:
        def check(holds: bool, message: str) -> None:
            if not holds:
                raise ExperimentError(message)

        if isinstance(self.interventions, Intervention | str):  # a single one, which could be taken apart as well
            object.__setattr__(self, "interventions", (self.interventions,))
        if isinstance(self.replay_from, str):
            object.__setattr__(self, "replay_from", (self.replay_from,))
        for name in ("steps", "num_envs", "log_every", "keep_checkpoints"):
            check(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("seed", "eval_every", "eval_episodes", "checkpoint_every", "diagnose_every"):
            check(getattr(self, name) >= 0, f"{name} must not be negative, not {getattr(self, name)}")
        given = self.agent.replay_ratio if self.replay_ratio is None else self.replay_ratio
        check(0 <= given < math.inf, f"replay_ratio must be finite and not negative, not {given}")
        check(self.seed < 2**32, f"seed must be below 2^32, not {self.seed}")
        numbers = {part.name: getattr(self, part.name) for part in dataclasses.fields(self) if part.name != "seed"}
        numbers |= {f"agent.{name}": value for name, value in vars(self.agent).items()}
        for name, value in numbers.items():
            for each in value if isinstance(value, tuple) else (value,):
                check(not isinstance(each, int) or abs(each) < LIMIT, f"{name} must be below 2^31, not {each}")
        check(
            self.agent.warmup < self.steps,
            f"the warm-up of {self.agent.warmup} agent steps is not shorter than the run of {self.steps}",
        )
        check(
            self.agent.capacity >= self.agent.batch_size,
            f"a replay of {self.agent.capacity} transitions is smaller than a batch of {self.agent.batch_size}",
        )
        self.sampler()  # says what is wrong with its SPEC
        if getattr(self.agent, "loss", None) == "lap":
            least = getattr(self.agent, "lap_threshold", None)
            check(
                self.replay_fields.get("minimum") == least,
                f"loss lap is half of a method: it needs a replay prioritized or masked with minimum={least}, not {self.replay}",
            )
        parsed = tuple(parse_intervention(each) if isinstance(each, str) else each for each in self.interventions)
        object.__setattr__(self, "interventions", parsed)
        controls = [each.name for each in parsed if each.control]
        check(len(controls) < 2, f"only one of {', '.join(controls)} can set the replay ratio")
        check(
            not controls or self.replay_ratio is None,
            f"{''.join(controls)} sets the replay ratio: leave out --replay-ratio",
        )
        for each in parsed:
            window = each.control.window if each.control else None
            check(
                window is None or self.num_envs <= window,
                f"{each.name} looks at the last {window} agent steps before a check, and {self.num_envs} environments step over them",
            )
        parse_sources(self.replay_from, self.agent.batch_size)

    @property
    def ratio(self) -> float:
        """Gradient steps per agent step, resolved; where an intervention sets it, the first."""
        for each in self.acting:
            if each.control:
                return each.control.initial
        return self.agent.replay_ratio if self.replay_ratio is None else self.replay_ratio

    @property
    def acting(self) -> tuple[Intervention, ...]:
        """The interventions, none as a SPEC any more."""
        return tuple(each for each in self.interventions if not isinstance(each, str))

    def build_agent(self, spec: Spec) -> Agent:
        """The agent with all that interventions change before training; ValueError in one line where something does not fit."""
        return build_agent(self.agent, spec, self.acting)

    @property
    def agent_name(self) -> str:
        return next(name for name, kind in AGENTS.items() if type(self.agent) is kind)

    def sampler(self, capacity: int | None = None) -> Sampler:
        """Over the run's own replay, or over one of `capacity` slots."""
        sampler: Sampler = self._make_sampler(self.agent.capacity if capacity is None else capacity)
        return sampler

    @property
    def replay_fields(self) -> dict[str, Any]:
        """Those of the sampler, as given or by default."""
        return {name: field.default for name, field in inspect.signature(self._make_sampler).parameters.items()}

    @property
    def _make_sampler(self) -> Any:
        return parse_spec(self.replay, REPLAYS, "replay", given=("capacity",))

    def to_json(self) -> dict[str, Any]:
        """Plain data from which `from_json` makes an equal experiment."""
        agent: Any = self.agent
        values = {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}
        specs = [intervention.spec for intervention in self.acting]
        return values | {"interventions": specs, "agent": {"name": self.agent_name, **dataclasses.asdict(agent)}}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Experiment":
        def thaw(values: dict[str, Any]) -> dict[str, Any]:
            return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}

        agent = thaw(data["agent"])
        return Experiment(**thaw(data) | {"agent": AGENTS[agent.pop("name")](**agent)})

    def digest(self) -> str:
        """Hash of all that training depends on; equal for a run and its continuation."""
        data = {key: value for key, value in self.to_json().items() if key not in CHANGEABLE}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TrainFlags(Experiment[A]):
    """What `resprout train` takes beside an experiment's own fields."""

    interventions: Annotated[tuple[str, ...], arg(name="with"), UseAppendAction] = ()
    """an intervention, name or name:field=value,field=value; once for each, in their order; `resprout list interventions`"""
    preset: str | None = None
    """start from a named configuration; `resprout list presets`"""
    resume: str | None = None
    """go on with the run in this directory"""
    seeds: str | None = None
    """several seeds at once, 0,1,2: a run directory for each, and one curve"""
    seeds_mode: Literal["auto", "vmap", "processes"] = "auto"
    """with --seeds: all in one process, vmapped, or a process on each core (on an accelerator, on four); auto is the first there"""
    profile: int = 0
    """gradient steps to trace once all is compiled, for TensorBoard and Perfetto, into the run directory's profile; 0 for none"""
    devices: str = "1"
    """of each process, that share every batch of a run equally, or with --seeds and a loop on the device the seeds: a number or all"""
    num_processes: int = 1
    """processes, on one host or on many, that train a run together, or each its part of --seeds"""
    process_id: int = 0
    """which of them this is, from 0"""
    coordinator: str | None = None
    """where they meet: HOST:PORT, an address of process 0"""

    def experiment(self) -> Experiment[A]:
        return Experiment(**{part.name: getattr(self, part.name) for part in dataclasses.fields(Experiment)})

    def __post_init__(self) -> None:
        """The checks of an experiment; interventions stay as they are written."""
        written = self.interventions
        super().__post_init__()
        object.__setattr__(self, "interventions", written)
