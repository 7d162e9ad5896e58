"""What an intervention is, what it may read, and how several become one."""

import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..agents.learner import Learner, Network, PyTree
from ..diagnostics import DIAGNOSTICS, LayerGraph, Probe, layer_graph, measure, named_leaves
from ..diagnostics.dormancy import activation_gradients
from ..diagnostics.layers import check_inputs
from .parameters import glorot

Info = dict[str, Any]  # what was done: a PyTree of scalars, always of the same structure
Step = jax.Array | int

# Diagnostics that an intervention can read: it has not got the first parameters.
MEASURABLE = tuple(name for name, diagnostic in DIAGNOSTICS.items() if "initial_params" not in diagnostic.needs)


class InterventionError(ValueError):
    """An intervention that cannot be made or does not apply, in one line."""


@dataclass(frozen=True)
class Context:
    """What an intervention may read. Nothing is computed before it is asked for."""

    key: jax.Array  # of this intervention, learner and gradient step alone
    gradient_step: Step  # taken so far, the one just taken included
    agent_step: Step  # taken so far, in all environments of one seed
    network: Network
    given: tuple[Any, ...] | Callable[[], tuple[Any, ...]]  # `inputs`, or what makes them
    learner: str = "network"  # its name in the agent's state
    batch: Any = None  # the transitions of `inputs`, a Batch; None in a loop of one's own
    state: PyTree = None  # of the agent, before this intervention touched any of its learners
    networks: Mapping[str, Network] = field(default_factory=dict)  # of all its learners
    task: Step | None = 0  # how often it has changed; None where it never does, as in `train` but for changing/*
    now: bool = False  # due, whatever a schedule says
    common_key: jax.Array | None = None  # as key, but the same for all learners; None in a loop of one's own

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Of the network, [B, ...]: the transitions just learnt from, or a fresh uniform draw.

        What an encoder has to make of them first is made where it is asked for: under a condition, only when that holds.
        """
        return self.given() if callable(self.given) else self.given

    @functools.cached_property
    def graph(self) -> LayerGraph:
        """The hidden units of the network; LayerGraphError where it cannot be traced."""
        if self.network.apply is None:
            raise InterventionError(f"the learner {self.learner} has no network")
        params = jax.eval_shape(self.network.init, jax.random.key(0))
        return layer_graph(self.network.apply, params, *self.inputs)

    def activations(self, params: PyTree) -> dict[str, jax.Array]:
        """Of every hidden layer on the inputs, as `LayerGraph.activations`; one forward pass."""
        return self.graph.activations(params, *self.inputs)

    def loss(self, outputs: Any) -> jax.Array:
        """What the learner descends, of the network's outputs on the inputs; ()."""
        return self.network.loss(outputs, self.state, self.batch, jax.random.fold_in(self.key, 0))

    def activation_gradients(self, params: PyTree) -> dict[str, jax.Array]:
        """Gradients of the loss by the activations, in their form; a forward and a backward pass."""
        return activation_gradients(self.graph, self.loss, params, *self.inputs)

    def gradients(self, params: PyTree) -> PyTree:
        """Gradients of the loss by the parameters; a forward and a backward pass."""
        apply = self.network.apply
        assert apply is not None
        return jax.grad(lambda params: self.loss(apply(params, *self.inputs)))(params)

    def measure(self, params: PyTree, name: str, layers: tuple[str, ...] = ()) -> jax.Array:
        """One of MEASURABLE, of the network on the inputs, or of `layers` of it (see `Probe`); () float32."""
        if self.network.apply is None:
            raise InterventionError(f"{name} cannot be measured of the learner {self.learner}, which has no network")
        probe = Probe(self.network.apply, params, self.inputs, self.loss, key=self.stream(name), layers=layers)
        return measure(probe, (name,))[name]

    def stream(self, name: str) -> jax.Array:
        """A key of its own for each method, so that no two in a chain draw the same numbers."""
        return jax.random.fold_in(self.key, sum(byte << 8 * (i % 3) for i, byte in enumerate(name.encode())))

    def fresh(self, key: jax.Array) -> PyTree:
        """Parameters from the network's own initialisers."""
        return self.network.init(key)


def keep(learner: Learner, state: PyTree, context: Context) -> tuple[Learner, PyTree, Info]:
    """The `update` of what acts elsewhere: nothing changes."""
    return learner, state, {}


def no_state(learner: Learner) -> PyTree:
    """The `init` of what remembers nothing."""
    return ()


Wrapper = Callable[[Network, optax.GradientTransformation], optax.GradientTransformation]


class Control(NamedTuple):
    """How an intervention sets the replay ratio: the loop calls decide(state) -> (state, () float32 ratio) on the host.

    state: the intervention's, of its first learner; the ratio is in gradient steps per agent step.
    """

    initial: float
    every: int  # agent steps between decisions
    decide: Callable[[PyTree], tuple[PyTree, jax.Array]]
    window: int | None = None  # agent steps before a decision in which it looks; None for all


class Intervention(NamedTuple):
    """What is done to learners while they learn; pure, for use under jit and vmap.

    init(learner) -> state
    update(learner, state, context) -> (learner, state, info): after a gradient step.
    wrap(network, tx) -> tx: the optimiser that the learner gets; what acts on gradients does so there.
    project(network, tx) -> tx: likewise, around all wraps; what acts on the optimiser's steps does so there.
    rebuild(network) -> network: the network that the learner gets; with other parameters, it may be.
    configure(config) -> config: the agent's configuration, before anything is built; architectures act there.
    period: gradient steps; `update` changes nothing at those that it does not divide. 0 if it never does.
    probe: transitions of a fresh uniform draw that `update` reads as context.inputs; None for those just learnt from.
    control: for those that set the replay ratio.
    due(learner, context) -> () bool: whether its own schedule lets `update` act now; None where it has none.
    keeps: whether some of the parameters are its own, and no other method may change them.
    remembers: whether `update` keeps count of something at every gradient step, so that nothing may skip one.
    learners: names of those that it acts on; None are all that have a network, and everywhere those without one, too.
    spec: how the command line writes it, from which it can be made again.
    """

    init: Callable[[Learner], PyTree] = no_state
    update: Callable[[Learner, PyTree, Context], tuple[Learner, PyTree, Info]] = keep
    wrap: Wrapper | None = None
    project: Wrapper | None = None
    rebuild: Callable[[Network], Network] | None = None
    configure: Callable[[Any], Any] | None = None
    period: int = 1
    probe: int | None = None
    control: Control | None = None
    due: Callable[[Learner, Context], jax.Array] | None = None
    keeps: bool = False
    remembers: bool = False
    learners: tuple[str, ...] | None = None
    everywhere: bool = False
    spec: str = "intervention"

    @property
    def name(self) -> str:
        """Without the fields."""
        return self.spec.partition(":")[0].partition("(")[0]

    def optimiser(self, network: Network, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        """What a learner's optimiser becomes, in a loop of one's own."""
        tx = self.wrap(network, tx) if self.wrap else tx
        return self.project(network, tx) if self.project else tx

    @property
    def changes(self) -> bool:
        """Whether it changes parameters, or the steps that they take."""
        updates = self.period > 0 and self.control is None and self.update is not keep
        return updates or self.wrap is not None or self.project is not None

    def acts_on(self, learner: str, network: Network) -> bool:
        if self.learners is None:
            return self.everywhere or network.apply is not None
        return learner in self.learners


def method(function: Callable[..., Intervention]) -> Callable[..., Intervention]:
    """Makes what `function` returns know its name and fields.

    InterventionError in one line for a value that cannot be: none of a Literal's, or one that `function` refuses.
    """
    signature, hints = inspect.signature(function), typing.get_type_hints(function)

    @functools.wraps(function)
    def made(*arguments: Any, **fields: Any) -> Intervention:
        name = function.__name__
        try:
            given = signature.bind(*arguments, **fields)
        except TypeError as error:
            raise InterventionError(f"{name}: {error}; its fields are {', '.join(signature.parameters)}") from None
        given.apply_defaults()
        values = {name: _as_read(value, hints.get(name)) for name, value in given.arguments.items()}
        written = ",".join(
            f"{name}={_written(value)}" for name, value in values.items() if value != signature.parameters[name].default
        )
        try:
            for field, value in values.items():
                hint = hints.get(field)
                choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else (value,)
                require(value in choices, f"{field} must be one of {', '.join(map(str, choices))}, not {value}")
                require(not isinstance(value, float) or math.isfinite(value), f"{field} must be finite, not {value}")
            return function(**values)._replace(spec=f"{name}:{written}" if written else name)
        except (TypeError, ValueError) as error:
            raise InterventionError(f"{name}: {error}") from None

    return made


def _as_read(value: Any, hint: Any) -> Any:
    """The value as it is when read from what is written: one experiment has one SPEC, and one digest."""
    if isinstance(value, list):
        return tuple(value)
    kinds = {hint, *typing.get_args(hint)}
    if isinstance(value, str) and any(typing.get_origin(kind) is tuple for kind in kinds):
        return (value,)
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        return int(value)
    return float(value) if float in kinds and isinstance(value, int) and not isinstance(value, bool) else value


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def require(holds: bool, message: str) -> None:
    if not holds:
        raise InterventionError(message)


@method
def identity() -> Intervention:
    """Nothing, at every gradient step: the control for what looking costs."""
    return Intervention()


def chain(*interventions: Intervention) -> Intervention:
    """One after the other, in this order, each on what the one before left; those that want a probe see the largest.

    Info is numbered where names repeat, and those of one name draw different numbers.
    """
    plain = [inner.name for inner in interventions]
    names = [f"{name}_{i}" if plain.count(name) > 1 else name for i, name in enumerate(plain)]

    def init(learner: Learner) -> PyTree:
        return tuple(inner.init(learner) for inner in interventions)

    def update(learner: Learner, state: PyTree, context: Context) -> tuple[Learner, PyTree, Info]:
        states, info = [], {}
        for i, (name, inner, own) in enumerate(zip(names, interventions, state, strict=True)):
            before = plain[:i].count(plain[i])
            its = replace(context, key=jax.random.fold_in(context.key, before)) if before else context
            if inner.acts_on(context.learner, context.network):
                learner, own, info[name] = inner.update(learner, own, its)
            states.append(own)
        return learner, tuple(states), info

    def due(learner: Learner, context: Context) -> jax.Array:
        of_each = [inner.due(learner, context) for inner in interventions if inner.due]
        return jnp.stack(of_each).any(axis=0)

    def rebuild(network: Network) -> Network:
        for inner in interventions:
            network = inner.rebuild(network) if inner.rebuild else network
        return network

    def configure(config: Any) -> Any:
        for inner in interventions:
            config = inner.configure(config) if inner.configure else config
        return config

    check_together(interventions)
    chosen = [inner.learners for inner in interventions]
    probes = [inner.probe for inner in interventions if inner.probe is not None]
    require(all(inner.control is None for inner in interventions), "chain: what sets the replay ratio stands alone")
    require(
        not any(
            (inner.wrap or inner.project or inner.rebuild) and inner.learners is not None for inner in interventions
        ),
        "chain: an optimiser or network of some learners only stands alone: put on(...) around the chain",
    )
    return Intervention(
        init,
        update,
        functools.partial(wrapped, interventions) if any(inner.wrap for inner in interventions) else None,
        functools.partial(projected, interventions) if any(inner.project for inner in interventions) else None,
        rebuild if any(inner.rebuild for inner in interventions) else None,
        configure if any(inner.configure for inner in interventions) else None,
        period=math.gcd(*(inner.period for inner in interventions)),
        probe=max(probes, default=None),
        due=due if interventions and all(inner.due for inner in interventions) else None,
        keeps=any(inner.keeps for inner in interventions),
        remembers=any(inner.remembers for inner in interventions),
        everywhere=any(inner.everywhere for inner in interventions),
        learners=None if None in chosen else tuple({name: None for names in chosen for name in names or ()}),
        spec="chain(" + "; ".join(inner.spec for inner in interventions) + ")",
    )


def wrapped(
    interventions: Sequence[Intervention], network: Network, tx: optax.GradientTransformation
) -> optax.GradientTransformation:
    """With what each makes of gradients; the first is the outermost, which sees them first."""
    for inner in reversed(interventions):
        tx = inner.wrap(network, tx) if inner.wrap else tx
    return tx


def projected(
    interventions: Sequence[Intervention], network: Network, tx: optax.GradientTransformation
) -> optax.GradientTransformation:
    """With what each makes of the optimiser's steps; the first is the innermost, which sees them first."""
    for inner in interventions:
        tx = inner.project(network, tx) if inner.project else tx
    return tx


def check_together(interventions: Sequence[Intervention]) -> None:
    """InterventionError where one has parameters of its own that others, on the same learner, would change."""
    for keeper in (inner for inner in interventions if inner.keeps):
        others = (other for other in interventions if other is not keeper and other.changes)
        changing = [other.name for other in others if _overlap(keeper.learners, other.learners)]
        require(
            not changing,
            f"{keeper.name} has heads that must stay as they are: it cannot act on a learner together with "
            f"{', '.join(changing)}",
        )


def _overlap(first: tuple[str, ...] | None, second: tuple[str, ...] | None) -> bool:
    return first is None or second is None or bool(set(first) & set(second))


def every(period: int, inner: Intervention, start: int = 0, stop: int | None = None) -> Intervention:
    """`inner` after those gradient steps g that `period` divides, start <= g < stop.

    Its schedule is one unbatched step: under vmap over seeds the surgery is still only done when it is due.
    """
    require(period >= 1, f"period must be at least 1 gradient step, not {period}")
    require(start >= 0, f"start must be zero or more, not {start}")
    require(stop is None or stop > start, f"stop must lie behind start, not at {stop}")
    first = -(-max(start, 1) // period) * period
    require(
        stop is None or first < stop,
        f"it would never act: period {period} comes first at gradient step {first}, stop is {stop}",
    )
    require_schedulable("every", inner)

    def own(context: Context) -> jax.Array:
        step = jnp.asarray(context.gradient_step)
        fits = (step % period == 0) & (step >= max(start, 1))
        return fits if stop is None else fits & (step < stop)

    def update(learner: Learner, state: PyTree, context: Context) -> tuple[Learner, PyTree, Info]:
        return only_if(True if context.now else own(context), inner, learner, state, context)

    def due(learner: Learner, context: Context) -> jax.Array:
        return own(context) if inner.due is None else own(context) & inner.due(learner, context)

    bounds = "".join(f", {name} {value}" for name, value in (("start", start), ("stop", stop)) if value)
    spec = f"every({period}{bounds}; {inner.spec})"
    return inner._replace(update=update, period=math.lcm(period, inner.period), due=due, spec=spec)


def require_schedulable(what: str, inner: Intervention) -> None:
    """InterventionError if `what`, which schedules updates, would leave `inner` as it is or break it."""
    require(inner.period > 0, f"{what}: {inner.name} acts in the agent or its optimiser and has no schedule")
    require(inner.control is None, f"{what}: {inner.name} has a schedule of its own")
    require(
        not inner.remembers, f"{what}: {inner.name} keeps count at every gradient step; its own fields say when it acts"
    )


def only_if(
    condition: jax.Array | bool, inner: Intervention, learner: Learner, state: PyTree, context: Context
) -> tuple[Learner, PyTree, Info]:
    """The update of `inner` where the condition holds; where not, everything stays and info is zero."""
    if condition is True:
        return inner.update(learner, state, context)

    def act(learner: Learner, state: PyTree) -> tuple[Learner, PyTree, Info]:
        return inner.update(learner, state, context)

    def wait(learner: Learner, state: PyTree) -> tuple[Learner, PyTree, Info]:
        return learner, state, jax.tree.map(lambda form: jnp.zeros(form.shape, form.dtype), form_of_info)

    form_of_info = jax.eval_shape(act, learner, state)[2]
    acted: tuple[Learner, PyTree, Info] = jax.lax.cond(condition, act, wait, learner, state)
    return acted


def on(learners: str | tuple[str, ...], inner: Intervention) -> Intervention:
    """`inner` on these learners of the agent only: "critic", "actor", "temperature"."""
    names = (learners,) if isinstance(learners, str) else tuple(learners)
    require(bool(names), f"on: {inner.name} needs at least one learner")
    require(inner.configure is None, f"on: {inner.name} acts on the agent as a whole, not on single learners")
    mark = "," if ":" in inner.spec else ":"

    def update(learner: Learner, state: PyTree, context: Context) -> tuple[Learner, PyTree, Info]:
        return inner.update(learner, state, context) if context.learner in names else keep(learner, state, context)

    return inner._replace(update=update, learners=names, spec=f"{inner.spec}{mark}learner={'+'.join(names)}")


def intervene(
    intervention: Intervention,
    learner: Learner,
    apply_fn: Callable[..., Any],
    inputs: tuple[Any, ...],
    key: jax.Array,
    *,
    init_fn: Callable[[jax.Array], PyTree] | None = None,
    loss_fn: Callable[[Any], jax.Array] | None = None,
    state: PyTree = None,
    gradient_step: Step = 1,
) -> tuple[Learner, Info]:
    """The learner after the intervention, done now whatever its schedule, and what was done; for loops of one's own.

    The arguments are those of `context_for`. `state` is the intervention's, its initial one if None; InterventionError for
    what must remember between calls and is given none: it goes through `Intervention.init` and `update`. Works under jit.
    """
    require(
        intervention.period > 0,
        f"{intervention.name} acts in the agent or its optimiser: there is nothing to do to a learner",
    )
    require(
        state is not None or not intervention.remembers,
        f"{intervention.name} remembers between gradient steps: call its init and, with a context_for each, its update",
    )
    context = context_for(
        learner, apply_fn, inputs, key, init_fn=init_fn, loss_fn=loss_fn, gradient_step=gradient_step, now=True
    )
    require(
        intervention.acts_on(context.learner, context.network),
        f"{intervention.name} is for {', '.join(intervention.learners or ())} only, and intervene has one nameless learner",
    )
    if state is None:
        state = intervention.init(learner)
    learner, _, info = intervention.update(learner, state, context)
    return learner, info


def context_for(
    learner: Learner,
    apply_fn: Callable[..., Any],
    inputs: tuple[Any, ...],
    key: jax.Array,
    *,
    init_fn: Callable[[jax.Array], PyTree] | None = None,
    loss_fn: Callable[[Any], jax.Array] | None = None,
    gradient_step: Step = 1,
    now: bool = False,
) -> Context:
    """What an intervention may read in a loop of one's own.

    apply_fn(params, *inputs) -> any PyTree; inputs: [B, ...] each. init_fn(key) -> params gives fresh parameters by their
    own initialisers, InterventionError unless of the structure and the shapes of the learner's; without it kernels are
    Glorot-uniform, scales 1 and biases 0. loss_fn(outputs) -> () is needed where gradients are read. key: another one for
    every call. gradient_step: taken so far; now: whether what has a schedule is due whatever that says.
    """
    check_inputs(inputs)
    if init_fn is not None:
        _check_fresh(jax.eval_shape(init_fn, key), learner.params)

    def fresh(key: jax.Array) -> PyTree:
        if init_fn is None:
            return glorot(key, learner.params)
        return jax.tree.map(lambda new, own: jnp.asarray(new, own.dtype), init_fn(key), learner.params)

    def loss(outputs: Any, *arguments: Any) -> jax.Array:
        if loss_fn is None:
            raise InterventionError("gradients are read: give a loss_fn(outputs) -> ()")
        return loss_fn(outputs)

    network = Network(init=fresh, apply=apply_fn, inputs=lambda batch: inputs, loss=loss)
    return Context(key, gradient_step, 0, network, inputs, now=now)


def _check_fresh(fresh: PyTree, params: PyTree) -> None:
    structures: list[Any] = [jax.tree.structure(tree) for tree in (fresh, params)]
    require(
        structures[0] == structures[1],
        f"init_fn makes parameters of another structure than the learner's: {', '.join(named_leaves(fresh))} "
        f"in {type(fresh).__name__}, not {', '.join(named_leaves(params))} in {type(params).__name__}",
    )
    for (name, new), own in zip(named_leaves(fresh).items(), jax.tree.leaves(params), strict=True):
        require(new.shape == own.shape, f"init_fn makes {name} of shape {new.shape}, the learner's is {own.shape}")
