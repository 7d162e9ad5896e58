"""What all interventions share: composition, schedules, triggers, the replay ratio's controller, SPECs, and real runs."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resprout.agents import DQN, SAC
from resprout.agents.learner import Learner, Network
from resprout.agents.optimizer import adam
from resprout.interventions import (
    Context,
    Intervention,
    InterventionError,
    adam_reset,
    adaptive_replay_ratio,
    chain,
    every,
    identity,
    intervene,
    method,
    on,
    plateau,
    redo,
    reset,
    task_boundary,
    threshold,
    when,
)
from resprout.interventions.replay_ratio import next_plateau
from resprout.training import Experiment, ExperimentError, train
from resprout.training import __main__ as command_line
from resprout.training.intervening import Acting, build_agent, parse_intervention

from .runs import assert_equal, comparable
from .test_redo import mlp, mlp_params, normal, quickly_compiled, randomised, seasoned
from .test_training import cut_after

KEY = jax.random.key(0)
SMALL = DQN(warmup=60, batch_size=8, hidden=(8,), target_period=10, epsilon_decay_steps=100, capacity=300)


def small(directory, *interventions, **changes):
    fields = {"steps": 240, "log_every": 40, "checkpoint_every": 120, "eval_episodes": 0, "replay_ratio": 1.0}
    experiment = {"agent": SMALL, "env": "gym/CartPole-v1", "out": str(directory), "interventions": interventions}
    return Experiment(**experiment | fields | changes)


# ---- In a run


def test_watching_and_waiting_leave_training_as_it_is(tmp_path):
    """identity, diagnostics, and an intervention that is on but never due: every parameter and metric to the bit."""
    plain = train(small(tmp_path / "plain"), quiet=True)
    names = ("identity", "redo:period=1000", "redo:tau=9,start=500,period=5", "redo:tau=9,period=50,when=fau<-1")
    watched = train(small(tmp_path / "watched", *names, diagnose_every=50), quiet=True)
    assert_equal(plain.state, watched.state)
    lines = {line["step"]: line for line in comparable(tmp_path / "plain")}
    seen = {line["step"]: line for line in comparable(tmp_path / "watched") if "replay/size" in line}
    assert lines.keys() == seen.keys() == {40, 80, 120, 160, 200, 240}
    for step, line in lines.items():
        assert line.items() <= seen[step].items()
    diagnosed = [line for line in comparable(tmp_path / "watched") if "fau/critic" in line]
    assert [line["step"] for line in diagnosed] == [100, 150, 200]
    assert seen[240]["redo_2/critic/trigger/fired"] == 0 and seen[240]["redo_2/critic/recycled/hidden/dense_0"] == 0


def test_exact_resume_one_trace_and_every_count(tmp_path, monkeypatch):
    """Interventions with memories, two of them in one run; the controller's ratio is paid to the gradient step."""
    traces, events = [], []
    original = Acting.update
    monkeypatch.setattr(Acting, "update", lambda self, *rest: traces.append(self) or original(self, *rest))

    def count(learner, state, context):
        jax.debug.callback(lambda step: events.append(int(step)), context.gradient_step)
        return learner, state + 1, {}

    interventions = (
        "redo:tau=0.9,period=5,probe=16,when=fau<2.0,rearm=2.0,look=10",
        when(plateau("weight_norm", tolerance=0.05), redo(tau=0.5, period=9)),
        every(6, Intervention(init=lambda learner: jnp.zeros((), jnp.int32), update=count, spec="count")),
        # The first check that has something to compare switches for good.
        "adaptive_replay_ratio:low=0.5,high=2,every=100,window=30,tolerance=10",
    )
    options = {"replay_ratio": None, "sync": True}
    whole = train(small(tmp_path / "whole", *interventions, **options), quiet=True)
    jax.effects_barrier()
    # Once for its form, once to be compiled.
    assert all(traces.count(each) == 2 for each in traces) and len({id(each) for each in traces}) == 4
    steps = whole.summary["gradient_steps"]
    assert steps == (100 - 60) // 2 + 2 * (240 - 100)
    assert events == list(range(6, steps + 1, 6))
    ratios = [line for line in comparable(tmp_path / "whole") if "adaptive_replay_ratio/replay_ratio" in line]
    assert [(line["step"], line["adaptive_replay_ratio/replay_ratio"]) for line in ratios] == [(100, 2), (200, 2)]

    halved = small(tmp_path / "halved", *interventions, **options)
    train(halved, quiet=True)
    cut_after(tmp_path / "halved", 120)
    resumed = train(halved, resume=tmp_path / "halved", quiet=True)
    assert_equal(whole.state, resumed.state)
    assert comparable(tmp_path / "whole") == comparable(tmp_path / "halved")


# ---- Composition and schedules


def context_of(learner, step=1, name="critic", **more):
    x = normal(8, 3)
    network = Network(
        lambda key: randomised(learner.params, 99), mlp, lambda batch: (x,), lambda *arguments: jnp.zeros(())
    )
    return Context(KEY, step, 0, network, (x,), learner=name, **more)


def scaled(by):
    """Not commutative with `shifted`."""

    def update(learner, state, context):
        return (
            learner.replace(params=jax.tree.map(lambda x: x * by, learner.params)),
            state + 1,
            {"by": jnp.asarray(by)},
        )

    return Intervention(init=lambda learner: jnp.asarray(0), update=update, spec="scaled")


def shifted(by):
    def update(learner, state, context):
        return learner.replace(params=jax.tree.map(lambda x: x + by, learner.params)), state, {"by": jnp.asarray(by)}

    return Intervention(update=update, spec=f"shifted:by={by}")


def noisy():
    def update(learner, state, context):
        noise = jax.random.normal(context.stream("noisy"))
        return learner.replace(params=jax.tree.map(lambda x: x + noise, learner.params)), state, {"noise": noise}

    return Intervention(update=update, spec="noisy")


def test_chain_is_one_after_the_other():
    learner = seasoned(mlp_params(3, 5, 2))

    def by_hand(*interventions):
        def run(learner):
            infos = []
            for each in interventions:
                learner, info = intervene(each, learner, mlp, (normal(8, 3),), KEY)
                infos.append(info)
            return learner, infos

        return quickly_compiled(run)(learner)

    first, second = redo(tau=0.9), scaled(2.0)
    (apart, infos), (together, (info,)) = by_hand(first, second), by_hand(chain(first, second))
    chex.assert_trees_all_equal(together, apart)
    chex.assert_trees_all_equal(info, {"redo": infos[0], "scaled": infos[1]})
    (other_order, _), (reversed_, _) = by_hand(second, first), by_hand(chain(second, first))
    chex.assert_trees_all_equal(other_order, reversed_)


def test_chain_of_one_name_numbers_its_infos_and_draws_other_numbers():
    learner = Learner({"w": jnp.zeros(2)}, None, ())
    _, state, info = chain(noisy(), shifted(1.0), noisy()).update(learner, ((), (), ()), context_of(learner))
    assert info.keys() == {"noisy_0", "shifted", "noisy_2"} and len(state) == 3
    assert info["noisy_0"]["noise"] != info["noisy_2"]["noise"]
    empty = chain()
    assert empty.update(learner, (), context_of(learner))[0] is learner and empty.period == 0


def test_chain_passes_on_what_its_parts_need():
    wide = chain(every(6, shifted(1)), redo(period=4, probe=32), on("actor", identity()))
    assert (wide.period, wide.probe, wide.learners) == (1, 32, None)
    assert chain(every(6, shifted(1)), redo(period=4)).period == 2
    assert chain(on("actor", shifted(1)), on(("critic", "actor"), identity())).learners == ("actor", "critic")
    learner = Learner({"w": jnp.zeros(2)}, None, ())
    both = chain(on("actor", shifted(1.0)), on("critic", shifted(10.0)))
    for name, total in (("actor", 1.0), ("critic", 10.0), ("temperature", 0.0)):
        after, _, info = both.update(learner, both.init(learner), context_of(learner, name=name))
        assert after.params["w"].tolist() == [total] * 2 and len(info) == (total > 0)


@pytest.mark.parametrize(
    ("intervention", "due"),
    [
        (every(3, scaled(2.0)), [3, 6, 9, 12]),
        (every(3, scaled(2.0), start=6, stop=12), [6, 9]),
        (every(2, every(3, scaled(2.0))), [6, 12]),
        (every(1, scaled(2.0), stop=3), [1, 2]),
    ],
)
def test_every(intervention, due):
    learner = Learner({"w": jnp.ones(2)}, None, ())

    @jax.jit
    def update(step, state):
        return intervention.update(learner, state, context_of(learner, step))

    state, acted = intervention.init(learner), []
    for step in range(14):
        after, state, info = update(step, state)
        assert float(after.params["w"][0]) == (2.0 if float(info["by"]) else 1.0)
        acted += [step] if float(info["by"]) else []
    assert acted == due and int(state) == len(due)
    assert all(step % intervention.period == 0 for step in due)
    after, _, _ = intervention.update(learner, state, context_of(learner, 13, now=True))  # by hand, now
    assert float(after.params["w"][0]) == 2.0


def test_under_vmapped_seeds_surgery_is_done_only_when_due():
    """A callback inside counts: were the condition batched, it would run at every step."""
    calls = []

    def update(learner, state, context):
        jax.debug.callback(lambda step, seed: calls.append((int(step), int(seed))), context.gradient_step, state)
        return learner.replace(params=learner.params + 1), state, {}

    counted = every(4, Intervention(init=lambda learner: jnp.zeros((), jnp.int32), update=update))

    @jax.jit
    def train_seeds(params):
        def step(learners, index):
            def one(learner, seed):
                return counted.update(learner, seed, context_of(Learner({}, None, ()), index + 1))[0]

            return jax.vmap(one)(learners, jnp.arange(3)), None

        return jax.lax.scan(step, Learner(params, None, ()), jnp.arange(13))[0]

    assert train_seeds(jnp.zeros(3)).params.tolist() == [3.0] * 3
    jax.effects_barrier()
    assert sorted(calls) == [(step, seed) for step in (4, 8, 12) for seed in range(3)]
    jaxpr = str(jax.make_jaxpr(train_seeds)(jnp.zeros(3)))
    assert "cond[" in jaxpr


def test_on_names_the_learners():
    agent = SAC(hidden=(4,)).build(SPEC)

    def learners(intervention):
        return Acting(intervention, agent, KEY).learners

    assert learners(redo()) == ["actor", "critic"] and learners(on("critic", redo())) == ["critic"]
    assert learners(on(("temperature", "actor"), identity())) == ["actor", "temperature"]
    assert learners(adaptive_replay_ratio()) == ["critic"]
    assert learners(on("actor", adaptive_replay_ratio())) == ["actor"]
    with pytest.raises(InterventionError, match=r"redo: there is no learner 'crtic'; there are: actor, critic, temp"):
        build_agent(SAC(hidden=(4,)), SPEC, (on("crtic", redo()),))


class SPEC:
    id, observation_shape, discrete, action_size = "gym/Control-v0", (4,), False, 2


# ---- Triggers


def fired(trigger, values, tasks=None):
    """At which looks an intervention behind the trigger acts, and at which the trigger said so."""
    counting = Intervention(update=lambda learner, state, context: (learner, state, {"acted": jnp.asarray(1)}))
    triggered = when(trigger, counting)

    def look(state, seen):
        value, task = seen
        learner = Learner({"w": value}, None, ())
        _, state, info = triggered.update(learner, state, context_of(learner, 1, task=task))
        return state, (info["acted"], info["trigger"]["fired"])

    values = jnp.asarray(values, jnp.float32)
    tasks = jnp.zeros(len(values), int) if tasks is None else jnp.asarray(tasks)
    _, (acted, said) = jax.lax.scan(look, triggered.init(None), (values, tasks))
    np.testing.assert_array_equal(acted.astype(bool), said)
    return np.flatnonzero(acted).tolist()


def value(learner, context):
    return learner.params["w"]


@pytest.mark.parametrize(
    ("trigger", "values", "acts"),
    [
        (threshold(value, above=0.5), [0.4, 0.5, 0.6, 0.7, 0.4, 0.9], [2, 3, 5]),
        (threshold(value, below=0.5), [0.4, 0.5, 0.6, 0.3], [0, 3]),
        # Again only after it was back at 0.3 or below.
        (threshold(value, above=0.5, rearm=0.3), [0.6, 0.7, 0.4, 0.6, 0.3, 0.4, 0.6, 0.6], [0, 6]),
        (threshold(value, below=0.5, rearm=0.8), [0.4, 0.7, 0.4, 0.8, 0.4, 0.3], [0, 4]),
        (threshold(value, above=0.5), [np.nan, 0.6], [1]),
        (plateau(value, tolerance=0.25), [1, 2, 2.25, 3, 2.75, 2.75], [2, 4, 5]),
        (plateau(value, tolerance=0.25, once=True), [1, 2, 2.25, 3, 2.75, 2.75], [2]),
    ],
)
def test_triggers(trigger, values, acts):
    assert fired(trigger, values) == acts


def test_a_new_task():
    assert fired(task_boundary(), [0.0] * 7, [0, 0, 1, 1, 3, 3, 0]) == [2, 4, 6]
    assert fired(task_boundary(), [0.0] * 3, [5, 5, 6]) == [2]


def test_how_often_a_trigger_looks():
    """Its memory changes at its own looks; what fires where nothing is due fires again."""
    trigger = threshold(value, above=0.5, rearm=0.3)
    assert when(trigger, redo(period=6)).period == 6
    assert when(trigger, redo(period=6), period=4).period == 4
    assert when(trigger, shifted(1)).period == 1
    shift = when(trigger, every(6, shifted(1.0)), period=4)
    state, acted = shift.init(None), []
    for step in range(25):
        learner = Learner({"w": jnp.asarray(0.0 if step == 4 else 1.0)}, None, ())
        armed = state[0]
        _, state, info = shift.update(learner, state, context_of(learner, step))
        acted += [step] if float(info["by"]) else []
        assert step % 4 == 0 or bool(armed) == bool(state[0])
    assert acted == [12]  # it fired at 8, when nothing was due; from 12 on it was never armed again


def test_what_fires_between_updates_of_the_target_fires_again():
    """`adam_reset` without a period acts where the target is a copy, and a trigger that fires elsewhere is not spent."""
    tx = adam(0.1)
    once = when(threshold(value, above=0.5, rearm=0.3), adam_reset())
    params = {"w": jnp.ones(())}
    state, acted = once.init(None), []
    for step, target in enumerate((0.0, 0.0, 1.0, 1.0)):
        old = jax.tree.map(jnp.ones_like, tx.init(params))
        learner = Learner(params, {"w": jnp.asarray(target)}, old)
        learner, state, info = once.update(learner, state, context_of(learner, step))
        acted += [step] if int(info["reset"]) else []
        assert int(learner.opt_state[0].mu["w"]) == (step not in acted)
    assert acted == [2]


def test_what_fires_where_no_part_of_a_chain_is_due_fires_again():
    trigger = threshold(value, above=0.5, rearm=0.3)
    parts = every(6, shifted(1.0)), every(9, shifted(1.0))
    assert chain(*parts, shifted(1.0)).due is None and chain().due is None
    shift = when(trigger, chain(*parts), period=1)
    learner = Learner({"w": jnp.asarray(1.0)}, None, ())
    for first, acts in ((1, 6), (7, 9)):
        state, acted = shift.init(None), []
        for step in range(first, 25):
            _, state, info = shift.update(learner, state, context_of(learner, step))
            acted += [step] if any(float(info[part]["by"]) for part in info if part != "trigger") else []
        assert acted == [acts]


# ---- Adaptive replay ratio


def switched(means, first=0.5):
    method_ = adaptive_replay_ratio(tolerance=0.001)
    state, course = method_.init(None).replace(previous=jnp.asarray(first)), []
    for mean in means:
        state = state.replace(total=jnp.asarray(250 * mean), count=jnp.asarray(250))
        state, ratio = method_.control.decide(state)
        assert float(state.total) == 0 and int(state.count) == 0
        course.append(float(ratio))
    return course


def test_b2_the_ratio_rises_once_where_the_diagnostic_is_flat():
    assert switched([0.40, 0.38, 0.3795, 0.37]) == [0.5, 0.5, 2.0, 2.0]
    assert switched([0.51 + 0.01 * check for check in range(9)]) == [0.5] * 9
    assert switched([0.40, 0.3995, 0.9, 0.1]) == [0.5, 2.0, 2.0, 2.0]  # never back
    assert switched([0.5005]) == [2.0]  # the first is compared with that of the first gradient step


def test_a_check_that_saw_nothing_changes_nothing():
    state = adaptive_replay_ratio().init(None).replace(previous=jnp.asarray(0.4))
    chex.assert_trees_all_equal(next_plateau(state, jnp.asarray(jnp.nan), 0.001), state)


@pytest.mark.parametrize("sync", [True, False])
def test_the_window_before_a_check(sync):
    """Of two gradient steps per agent step, run before the check or, where environments do not wait, after it."""
    controller = adaptive_replay_ratio(every=10, window=4, diagnostic="weight_norm")
    network = Network(None, lambda params, x: x @ params["w"], lambda batch: (), None)

    @quickly_compiled
    def update(state, w, gradient_step, agent_step):
        learner = Learner({"w": jnp.full((1, 1), w)}, None, ())
        context = Context(KEY, gradient_step, agent_step, network, (jnp.ones((1, 1)),), learner="critic")
        return controller.update(learner, state, context)[1]

    state, seen = controller.init(None), []
    for agent_step in range(1, 31):
        for part in ("learn", "check") if sync else ("check", "learn"):
            if part == "check" and agent_step % 10 == 0:
                seen.append((int(state.count), float(state.total)))
                state, _ = controller.control.decide(state)
            for again in range(2) if part == "learn" else ():
                state = update(state, float(agent_step), 2 * agent_step - 1 + again, agent_step)
    # Agent steps 6 to 9, 16 to 19, 26 to 29; the norm is the number of the agent step.
    assert seen == [(8, 60.0), (8, 140.0), (8, 220.0)]


# ---- SPECs


SPECS = [
    "identity",
    "redo",
    "redo:tau=0.0,period=200000",
    "redo:select=random,fraction=0.1,decay=true,stop=5000,scaling=none",
    "redo:tau=0.025,learner=critic",
    "redo:learner=critic+actor",
    "redo:when=fau<0.3",
    "redo:tau=0.0,when=dormant/post/tau0.1>0.12345678,rearm=0.05,look=250,learner=critic",
    "adaptive_replay_ratio:low=1.0,every=2000",
    "adaptive_replay_ratio:learner=actor",
    "reset:learner=actor",
]


@pytest.mark.parametrize("spec", SPECS)
def test_specs_survive(spec):
    made = parse_intervention(spec)
    again = parse_intervention(made.spec)
    assert again.spec == made.spec
    assert (again.period, again.probe, again.learners) == (made.period, made.probe, made.learners)
    experiment = Experiment(agent=SMALL, env="gym/CartPole-v1", interventions=(spec,))
    read = Experiment.from_json(json.loads(json.dumps(experiment.to_json())))
    assert read.digest() == experiment.digest() and read.to_json() == experiment.to_json()


@pytest.mark.parametrize(
    ("made", "spec"),
    [
        (redo(), "redo"),
        (redo(0), "redo:tau=0.0"),
        (redo(tau=0.1, period=1000), "redo"),
        (redo(tau=1, fraction=1), "redo:tau=1.0,fraction=1.0"),
        (reset(layers=["head", "hidden/dense_0"]), "reset:layers=head+hidden/dense_0"),
        (on("critic", redo(tau=0)), "redo:tau=0.0,learner=critic"),
        (when(threshold("fau", below=0.3, rearm=0.5), redo(), 10), "redo:when=fau<0.3,rearm=0.5,look=10"),
    ],
)
def test_what_the_library_makes_has_the_spec_of_the_command_line(made, spec):
    assert made.spec == spec == parse_intervention(spec).spec


def test_what_has_no_spec_of_its_own_still_says_all():
    """Two experiments that differ are never taken for one."""
    x = shifted(1)
    told = [
        every(5, x),
        every(5, x, start=2),
        every(5, x, stop=9),
        when(plateau("fau"), x),
        when(plateau("fau", tolerance=0.1), x),
        when(plateau("fau", once=True), x),
        when(plateau("fau"), x, 7),
        chain(x, x),
        chain(x),
    ]
    assert len({each.spec for each in told}) == len(told)
    with pytest.raises(ValueError, match="put together in a program"):
        parse_intervention(told[0].spec)


# ---- Bad input


REFUSED = [
    ("redo:period=0", "redo: period must be at least 1 gradient step, not 0"),
    ("redo:tau=-0.1", "redo: tau must be zero or more, not -0.1"),
    ("redo:tau=nan", "redo: tau must be finite, not nan"),
    ("redo:tau=low", "redo: tau must be a number, not 'low'"),
    ("redo:score=loudness", "score must be one of activation, gradient, utility"),
    ("redo:fraction=0", "fraction must lie in (0, 1], not 0.0"),
    ("redo:decay=true", "decay needs fraction and stop"),
    ("redo:stop=5,start=5", "stop must lie behind start"),
    ("redo:period=30,stop=20", "it would never act: period 30 comes first at gradient step 30, stop is 20"),
    ("redo:period=30,start=31,stop=60", "period 30 comes first at gradient step 60, stop is 60"),
    ("redo:stop=100", "period 1000 comes first at gradient step 1000, stop is 100"),
    ("redo:tau", "intervention redo: tau has no value; it is written tau=VALUE"),
    ("weight_decay:lam=inf", "weight_decay: lam must be finite, not inf"),
    ("upgd:noise=inf", "upgd: noise must be finite, not inf"),
    ("shrink_and_perturb:perturb=inf", "shrink_and_perturb: perturb must be finite, not inf"),
    ("reset:when=task_boundary", "task_boundary: the task of this environment never changes"),
    (
        "redo:when=task_boundary,rearm=1",
        "when must be DIAGNOSTIC>LEVEL, DIAGNOSTIC<LEVEL or task_boundary, not task_boundary",
    ),
    ("redo:probe=0", "probe must be at least 1 transition"),
    ("redo:taux=0.1", "redo has no field 'taux' (did you mean tau?); its fields are: tau, period"),
    ("redo:tau=0.1,tau=0.2", "tau is given twice"),
    ("rdeo", "unknown intervention 'rdeo' (did you mean redo?); there are: identity, redo"),
    ("redo:learner=", "redo: learner needs a value"),
    ("redo:learner=actor,learner=critic", "redo: learner is given twice"),
    ("redo:learner=actor", "redo: there is no learner 'actor'; there are: critic"),
    ("redo:when=fauu<0.3", "there is no diagnostic 'fauu' to act on; there are: dormant/post/tau0"),
    ("redo:when=weight_distance_init>3", "there is no diagnostic 'weight_distance_init' to act on"),
    ("redo:when=fau", "when must be DIAGNOSTIC>LEVEL, DIAGNOSTIC<LEVEL or task_boundary, not fau"),
    ("redo:when=fau<low", "when=fau<low: could not convert"),
    ("redo:when=fau<nan", "the level must be finite, not nan"),
    ("redo:when=fau<0.3,rearm=0.1", "rearm 0.1 lies on the wrong side of 0.3"),
    ("redo:rearm=0.1", "redo: rearm needs when=DIAGNOSTIC<LEVEL"),
    ("redo:when=fau<0.3,look=0", "period must be at least 1"),
    ("redo:when=fau<0.3,look=often", "look must be a number, not 'often'"),
    ("l2_init:when=fau<0.3", "when: l2_init acts in the agent or its optimiser and has no schedule"),
    ("layer_norm:learner=critic", "on: layer_norm acts on the agent as a whole, not on single learners"),
    ("hare_and_tortoise:when=fau<0.3", "when: hare_and_tortoise keeps count at every gradient step"),
    ("continual_backprop:when=fau<0.3", "when: continual_backprop keeps count at every gradient step"),
    ("magnitude_pruning:when=fau<0.3", "when: magnitude_pruning keeps count at every gradient step"),
    ("adaptive_replay_ratio:when=fau<0.3", "when: adaptive_replay_ratio has a schedule of its own"),
    ("adaptive_replay_ratio:window=0", "window must lie in (0, every = 25000), not 0"),
    ("adaptive_replay_ratio:low=0", "low and high must be positive, not 0.0 and 2.0"),
    (
        "adaptive_replay_ratio:diagnostic=weight_distance_init",
        "there is no diagnostic 'weight_distance_init' to act on",
    ),
]


def refused(arguments, message, capfd):
    assert command_line.dispatch(["train", *arguments]) == 2
    said = capfd.readouterr().err
    assert said.startswith("resprout: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize(("spec", "message"), REFUSED)
def test_bad_specs_are_one_line_and_create_nothing(spec, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    refused(["dqn", "--env", "gym/CartPole-v1", "--with", spec], message, capfd)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--with", "adaptive_replay_ratio", "--with", "adaptive_replay_ratio:low=1"],
            "only one of adaptive_replay_ratio, adaptive_replay_ratio can set the replay ratio",
        ),
        (
            ["--with", "adaptive_replay_ratio:window=7", "--num-envs", "8"],
            "adaptive_replay_ratio looks at the last 7 agent steps before a check, and 8 environments step over them",
        ),
        (
            ["--with", "adaptive_replay_ratio", "--replay-ratio", "2"],
            "adaptive_replay_ratio sets the replay ratio: leave out --replay-ratio",
        ),
        (
            ["--with", "adaptive_replay_ratio", "--agent.replay_ratio=0.25"],
            "adaptive_replay_ratio sets the replay ratio: leave out --agent.replay-ratio",
        ),
        (
            ["--with", "redo:layers=isolated", "--agent.layer-norm", "--agent.hidden", "8"],
            "redo: no unit may be recycled (hidden/dense_0: reduce_sum mixes it with other values)",
        ),
        (["--with", "redo:learner=temperature"], "there is no learner 'temperature'"),
        (
            ["--with", "plasticity_injection", "--with", "l2_init", "--with", "identity"],
            "plasticity_injection has heads that must stay as they are: it cannot act on a learner together with l2_init",
        ),
    ],
)
def test_bad_combinations_are_one_line_and_create_nothing(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    refused(["dqn", "--env", "gym/CartPole-v1", *arguments], message, capfd)
    assert not list(tmp_path.iterdir())


def test_a_learner_without_a_network_or_without_layers(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    sac = ["sac", "--env", "gym/Pendulum-v1", "--agent.hidden", "4"]
    refused([*sac, "--with", "redo:learner=temperature"], "the learner temperature has no network", capfd)
    of_temperature = "fau cannot be measured of the learner temperature, which has no network"
    refused([*sac, "--with", "reset:when=fau<0.3"], of_temperature, capfd)
    with pytest.raises(ExperimentError, match="only one of"):
        small(tmp_path / "run", adaptive_replay_ratio(), adaptive_replay_ratio())
    experiment = small(
        tmp_path / "run", "redo:when=srank<3", agent=SAC(hidden=(), warmup=60, batch_size=8), env="gym/Pendulum-v1"
    )
    with pytest.raises(ValueError, match="the network has no hidden layer to look at"):
        train(experiment, quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: every(0, redo()), "period must be at least 1"),
        (lambda: every(5, redo(), start=-1), "start must be zero or more"),
        (lambda: every(5, adaptive_replay_ratio()), "every: adaptive_replay_ratio has a schedule of its own"),
        (lambda: every(5, Intervention(period=0, spec="l2_init")), "every: l2_init acts in the agent or its optimiser"),
        (lambda: on((), redo()), "on: redo needs at least one learner"),
        (lambda: chain(redo(), adaptive_replay_ratio()), "chain: what sets the replay ratio stands alone"),
        (lambda: threshold("fau"), "either above or below"),
        (lambda: threshold("fau", above=1, below=2), "either above or below"),
        (lambda: plateau("fau", tolerance=float("inf")), "tolerance must be zero or more and finite"),
        (lambda: by_hand(on("critic", redo())), "redo is for critic only, and intervene has one nameless learner"),
        (lambda: by_hand(Intervention(period=0, spec="l2_init")), "there is nothing to do to a learner"),
    ],
)
def test_what_cannot_be_made(make, message):
    with pytest.raises(InterventionError, match=message):
        make()


def by_hand(intervention):
    return intervene(intervention, seasoned(mlp_params(3, 5, 2)), mlp, (normal(8, 3),), KEY)


def test_a_method_of_one_s_own_knows_its_spec_and_its_mistakes():
    @method
    def doubling(period: int = 5, factor: float = 2.0) -> Intervention:
        """Parameters times a factor."""
        if factor <= 0:
            raise ValueError(f"factor must be positive, not {factor}")
        return every(period, scaled(factor))

    assert doubling().spec == "doubling" and doubling(3, factor=4).spec == "doubling:period=3,factor=4.0"
    assert doubling(3).period == 3 and doubling().name == "doubling"
    with pytest.raises(InterventionError, match=r"^doubling: factor must be positive, not -1.0$"):
        doubling(factor=-1)
    with pytest.raises(InterventionError, match=r"^doubling: period must be at least 1"):
        doubling(0)


def test_a_loop_of_one_s_own_keeps_the_state():
    """`update` under jit, with a trigger that acts once."""
    learner = seasoned(mlp_params(3, 5, 2))
    triggered = when(
        threshold(lambda learner, context: jnp.asarray(1.0), above=0.5, rearm=0.1), redo(tau=0.9, period=1)
    )
    state = triggered.init(learner)
    update = quickly_compiled(lambda learner, state, step: triggered.update(learner, state, context_of(learner, step)))
    counts = []
    for step in (1, 2):
        learner, state, info = update(learner, state, step)
        counts.append(int(info["recycled"]["layer_0"]))
    assert counts[0] > 0 == counts[1]
