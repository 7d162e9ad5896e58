"""Resets, perturbations, averages, replaced units and pruning: each against NumPy or numbers worked out by hand."""

import functools
import itertools
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from resprout.agents.dqn import DQN
from resprout.agents.learner import Batch, Learner, Network
from resprout.agents.optimizer import adam, ages_of
from resprout.agents.sac import SAC
from resprout.diagnostics import gradient_dormancy
from resprout.interventions.averaging import elastic_reset, hare_and_tortoise
from resprout.interventions.base import Context, InterventionError, intervene
from resprout.interventions.injection import inject, plasticity_injection
from resprout.interventions.parameters import orthogonal
from resprout.interventions.perturb import dormancy_perturb, shrink_and_perturb
from resprout.interventions.pruning import magnitude_pruning, smallest, sparsity_at
from resprout.interventions.resets import layer_mask, reset
from resprout.interventions.units import continual_backprop, self_normalized_resets


@dataclass(frozen=True)
class Space:
    id: str
    observation_shape: tuple[int, ...]
    discrete: bool
    action_size: int


VECTOR = Space("gym/Vector-v0", (4,), discrete=True, action_size=3)
IMAGE = Space("atari/Image", (36, 36, 2), discrete=True, action_size=3)
CONTROL = Space("gym/Control-v0", (4,), discrete=False, action_size=2)
KEY = jax.random.key(7, impl="unsafe_rbg")  # its draws compile in half the time


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Nearly all of the time goes into compiling what then runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_like(tree, seed=0):
    """Every float is drawn, and every integer 3: as after some steps, without the compilations of any."""
    rng = np.random.default_rng(seed)

    def drawn(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(np.full(leaf.shape, 3), leaf.dtype)
        return jnp.asarray(np.asarray(0.7 * rng.normal(size=leaf.shape), np.float32))

    return jax.tree.map(drawn, tree)


def trained(init, tx=None, seed=0):
    """A learner whose parameters, target and moments are all drawn, three steps old; init(key) -> params."""
    params = jax.eval_shape(init, jax.random.key(0))
    opt_state = jax.eval_shape((tx or adam(1e-3)).init, params)
    opt_state = jax.tree.map(abs, random_like(opt_state, seed + 2))  # a second moment is positive
    return Learner(random_like(params, seed), random_like(params, seed + 1), opt_state)


def named(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("params/"): np.asarray(leaf)
        for path, leaf in flat
    }


def changed(old, new):
    """Names of the leaves of which an entry differs."""
    old, new = named(old), named(new)
    return {name for name in old if not np.array_equal(old[name], new[name])}


def adam_of(learner):
    return learner.opt_state[0]


def equal(left, right):
    return jax.tree.all(jax.tree.map(np.array_equal, left, right))


def zero(tree):
    return not any(np.any(leaf) for leaf in jax.tree.leaves(tree))


def host(tree):
    """NumPy arrays, whose arithmetic needs no compilation."""
    return jax.tree.map(np.asarray, tree)


def batch_of(spec, size=8, seed=0):
    rng = np.random.default_rng(seed)
    observation, following = (
        jnp.asarray(rng.normal(size=(size, *spec.observation_shape)), jnp.float32) for _ in range(2)
    )
    action = rng.integers(0, spec.action_size, size) if spec.discrete else rng.uniform(-1, 1, (size, spec.action_size))
    ones = jnp.ones(size)
    action = jnp.asarray(action, jnp.int32 if spec.discrete else jnp.float32)
    return Batch(observation, action, normal(size, seed=seed + 9), 0.99 * ones, following, ones)


def uniform_like(key, like):
    """Fresh parameters that cost little to compile."""
    leaves, structure = jax.tree.flatten(like)
    sizes = [leaf.size for leaf in leaves]
    parts = jnp.split(jax.random.uniform(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    return structure.unflatten([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


@functools.cache
def agent_of(config, spec):
    """Networks of an agent, and its state after a little training."""
    agent = config.build(spec)
    networks = {
        name: network._replace(init=jax.jit(partial(uniform_like, like=jax.eval_shape(network.init, KEY))))
        for name, network in agent.networks.items()
        if network.apply is not None
    }
    state = jax.eval_shape(agent.init, jax.random.key(0))
    learners = {
        name: trained(network.init, seed=10 * index) for index, (name, network) in enumerate(agent.networks.items())
    }
    return dict(agent.networks) | networks, state.replace(gradient_step=jnp.zeros((), jnp.int32), **learners)


def agent_context(config, spec, name):
    """What an intervention that is due reads of an agent, and its learner."""
    networks, state = agent_of(config, spec)
    batch = batch_of(spec)
    inputs = networks[name].inputs(batch)
    context = Context(KEY, 1, 0, networks[name], inputs, name, batch=batch, state=state, networks=networks, now=True)
    return context, getattr(state, name)


def done(intervention, learner, context):
    """Learner and info after an update under jit."""

    @jax.jit
    def update(learner):
        after, _, info = intervention.update(learner, intervention.init(learner), context)
        return after, info

    return host(update(learner))


def done_by_hand(intervention, learner, network, inputs, **functions):
    """As a loop of one's own does it."""
    call = jax.jit(lambda learner: intervene(intervention, learner, network.apply, (inputs,), KEY, **functions))
    return host(call(learner))


class MLP(nn.Module):
    features: tuple[int, ...] = (5, 4, 2)

    @nn.compact
    def __call__(self, x):
        for size in self.features[:-1]:
            x = nn.relu(nn.Dense(size)(x))
        return nn.Dense(self.features[-1])(x)


def mlp(features=(5, 4, 2), inputs=3):
    network = MLP(features)
    return network, partial(network.init, x=jnp.zeros((1, inputs)))


# ---- Resets


def test_reset_of_everything():
    context, learner = agent_context(SAC(hidden=(6, 5)), CONTROL, "critic")
    after, info = done(reset(), learner, context)
    fresh = host(context.fresh(context.stream("reset")))
    assert equal(after.params, fresh) and equal(after.target_params, fresh)
    state = adam_of(after)
    assert zero(state)
    assert info == {"resets": 1}
    members = named(after.params)["hidden/dense_0/kernel"]
    assert not np.array_equal(members[0], members[1])


def test_reset_of_the_temperature():
    intervention = reset()
    context, learner = agent_context(SAC(hidden=(6, 5), initial_temperature=0.5), CONTROL, "temperature")
    assert intervention.acts_on("temperature", context.network)
    assert not reset(last=1).acts_on("temperature", context.network)
    learner = learner.replace(target_params=None)
    for init in ("own", "xavier"):
        after = done(reset(init=init), learner, context)[0]
        np.testing.assert_allclose(after.params["log_alpha"], np.log(0.5), rtol=1e-6)
        assert zero(adam_of(after))


@pytest.mark.parametrize(
    ("config", "fields", "leaves"),
    [
        (DQN(hidden=(5, 4)), {"last": 1}, {"head"}),
        (DQN(hidden=(5, 4)), {"last": 2}, {"hidden/dense_1", "head"}),
        (DQN(hidden=(5, 4), dueling=True), {"last": 1}, {"value", "advantage"}),
        (DQN(hidden=(5, 4)), {"layers": ("hidden/dense_0",)}, {"hidden/dense_0"}),
        (DQN(hidden=(5, 4)), {"layers": ("hidden", "head")}, {"hidden/dense_0", "hidden/dense_1", "head"}),
    ],
)
def test_reset_of_layers(config, fields, leaves):
    context, learner = agent_context(config, VECTOR, "critic")
    after = done(reset(**fields, target="edit"), learner, context)[0]
    expected = {f"{leaf}/{part}" for leaf in leaves for part in ("kernel", "bias")}
    fresh, old, target = (
        named(host(context.fresh(context.stream("reset")))),
        named(learner.params),
        named(after.target_params),
    )
    mu, nu = named(adam_of(after).mu), named(adam_of(after).nu)
    ages = dict(zip(named(learner.params), host(jax.jit(ages_of)(adam_of(after))), strict=True))
    for name, leaf in named(after.params).items():
        inside = name in expected
        np.testing.assert_array_equal(leaf, fresh[name] if inside else old[name])
        np.testing.assert_array_equal(target[name], fresh[name] if inside else named(learner.target_params)[name])
        assert bool(mu[name].any()) is not inside and bool(nu[name].any()) is not inside
        assert {int(age) for part in ages[name] for age in part.ravel()} == ({0} if inside else {3})


def test_reset_of_convolutions_and_norms_takes_what_makes_the_units():
    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.LayerNorm(name="norm")(nn.Dense(5, name="first")(x)))
            return nn.Dense(2, name="head")(x)

    network = Normalised()
    inputs = normal(4, 3)
    learner = trained(lambda key: network.init(key, inputs))
    by_layer = done_by_hand(reset(layers=("first",)), learner, network, inputs)[0]
    assert changed(learner.params, by_layer.params) == {"first/kernel", "first/bias", "norm/scale", "norm/bias"}
    by_module = done_by_hand(reset(layers=("norm",)), learner, network, inputs)[0]
    assert changed(learner.params, by_module.params) == {"norm/scale", "norm/bias"}
    context, learner = agent_context(DQN(hidden=(6,), width=0.1), IMAGE, "critic")
    after = done(reset(layers=("torso/conv_1",), target="keep"), learner, context)[0]
    assert changed(learner.params, after.params) == {"torso/conv_1/kernel", "torso/conv_1/bias"}
    assert equal(learner.target_params, after.target_params)


def test_whole_reset_starts_the_count_of_any_optimiser():
    network, init = mlp()
    inputs = normal(4, 3)
    learner = trained(init, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.constant_schedule(1e-3))))
    after = done_by_hand(reset(), learner, network, inputs, init_fn=init)[0]
    adam_state, schedule = after.opt_state[1]
    assert (adam_state.count, schedule.count) == (0, 3) and zero(adam_state.mu)
    kept = done_by_hand(reset(count="keep"), learner, network, inputs, init_fn=init)[0]
    assert kept.opt_state[1][0].count == 3


def test_orthogonal_kernels():
    params = {
        "dense": {"kernel": jnp.zeros((6, 3)), "bias": jnp.ones(3)},
        "members": {"kernel": jnp.zeros((2, 3, 6)), "bias": jnp.ones((2, 6))},
        "conv": {"kernel": jnp.zeros((2, 2, 2, 5)), "bias": jnp.ones(5)},
        "norm": {"scale": jnp.zeros((2, 6)), "bias": jnp.ones((2, 6))},
    }
    fresh = jax.jit(orthogonal)(KEY, params)
    dense, members, conv = (fresh[name]["kernel"] for name in ("dense", "members", "conv"))
    np.testing.assert_allclose(dense.T @ dense, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(jnp.einsum("mij,mkj->mik", members, members), np.tile(np.eye(3), (2, 1, 1)), atol=1e-5)
    np.testing.assert_allclose(conv.reshape(8, 5).T @ conv.reshape(8, 5), np.eye(5), atol=1e-5)
    assert not np.allclose(members[0], members[1])
    assert (fresh["norm"]["scale"] == 1).all()
    assert not any(jnp.any(layer["bias"]) for layer in fresh.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: reset(last=0), "last must be at least 1 layer, not 0"),
        (lambda: reset(last=1, layers=("head",)), "last and layers exclude each other"),
        (lambda: reset(init="he"), "init must be one of own, xavier, orthogonal, not he"),
        (lambda: reset(period=0), "period must be at least 1 gradient step, not 0"),
        (lambda: shrink_and_perturb(shrink=1.2), r"shrink must lie in \[0, 1\], not 1.2"),
        (lambda: shrink_and_perturb(period=1), "give forget=none"),
        (lambda: shrink_and_perturb(target="both"), "target must be one of keep, edit, own, copy, not both"),
        (lambda: dormancy_perturb(low=0.9, high=0.2), "low and high must be ordered"),
        (
            lambda: dormancy_perturb(measure="weights"),
            "measure must be one of gradient, activation, state, not weights",
        ),
        (lambda: hare_and_tortoise(decay=1.5), r"decay must lie in \[0, 1\], not 1.5"),
        (lambda: elastic_reset(forget="some"), "forget must be one of all, none, not some"),
        (lambda: magnitude_pruning(start=5, end=5), "start and end must be ordered gradient steps, not 5 and 5"),
        (lambda: magnitude_pruning(scope="row"), "scope must be one of layer, global, not row"),
        (lambda: magnitude_pruning(sparsity=95), r"sparsity must lie in \[0, 1\], not 95"),
        (lambda: continual_backprop(rate=2.0), r"rate must lie in \[0, 1\], not 2.0"),
        (lambda: continual_backprop(maturity=-1), "maturity must be zero or more, not -1"),
        (lambda: self_normalized_resets(eta=0.0), r"eta must lie in \(0, 1\), not 0.0"),
        (lambda: self_normalized_resets(eta=0.001, decay=0.99), "decay must be above 1 - eta = 0.999, not 0.99"),
        (lambda: dormancy_perturb(tau=-1), "tau must be zero or more, not -1"),
    ],
)
def test_fields_that_cannot_be(make, message):
    with pytest.raises(InterventionError, match=message):
        make()


def test_layers_that_are_not_there():
    context, learner = agent_context(DQN(hidden=(5, 4)), VECTOR, "critic")
    names = "hidden/dense_0, hidden/dense_1, head, and the modules"
    for make in (reset, partial(shrink_and_perturb)):
        with pytest.raises(InterventionError, match=f"critic has no layer dense_0: there are {names}"):
            make(layers=("dense_0",)).update(learner, (), context)
        with pytest.raises(InterventionError, match="last must be at most 3 in critic, not 4"):
            make(last=4).update(learner, (), context)
    with pytest.raises(InterventionError, match="of must be one of critic, not actor"):
        dormancy_perturb(of="actor").update(learner, (), context)


# ---- Perturbations


def test_shrink_and_perturb():
    context, learner = agent_context(SAC(hidden=(6, 5)), CONTROL, "critic")
    own_key, target_key = jax.random.split(context.stream("shrink_and_perturb"))
    draw = context.fresh
    fresh, other, old = host((draw(own_key), draw(target_key), learner))

    def mixed(params, fresh, share=0.25):
        return jax.tree.map(lambda old, new: 0.75 * old + share * new, params, fresh)

    make = partial(shrink_and_perturb, shrink=0.75)
    after = done(make(), learner, context)[0]
    check = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7))
    check(after.params, mixed(old.params, fresh))
    check(after.target_params, mixed(old.target_params, fresh))
    assert zero(adam_of(after))
    after = done(make(target="own", forget="none", perturb=0.1), learner, context)[0]
    check(after.params, mixed(old.params, fresh, 0.1))
    check(after.target_params, mixed(old.target_params, other, 0.1))
    assert equal(after.opt_state, learner.opt_state)
    after = done(make(target="copy"), learner, context)[0]
    assert equal(after.params, after.target_params)
    after = done(make(layers=("head",), target="keep"), learner, context)[0]
    assert changed(learner.params, after.params) == {"head/kernel", "head/bias"}
    assert equal(after.target_params, learner.target_params)
    assert changed(adam_of(learner).mu, adam_of(after).mu) == {"head/kernel", "head/bias"}
    after = done(make(shrink=1.0, forget="none"), learner, context)[0]
    assert equal(after, learner)


def test_soft_shrink_and_perturb_goes_the_same_way_in_small_steps():
    network, init = mlp()
    learner = trained(init).replace(target_params=None)
    soft = shrink_and_perturb(shrink=0.99, perturb=0.0, period=1, forget="none")
    context = Context(KEY, 1, 0, Network(init, network.apply, lambda batch: (), None), (normal(4, 3),))
    update = jax.jit(lambda learner, step: soft.update(learner, (), replace(context, gradient_step=step))[0])
    after = learner
    for step in range(1, 4):
        after = update(after, step)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.99**3 * b, rtol=1e-5), after.params, learner.params)


class DrMActor(nn.Module):
    """Trunk with LayerNorm, two hidden layers and a head, behind a convolution: what DrM's rule meets."""

    hidden: int = 10

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (2, 2), name="conv")(x)).reshape(x.shape[0], -1)
        x = jnp.tanh(nn.LayerNorm(name="norm")(nn.Dense(5, name="trunk")(x)))
        for index in range(2):
            x = nn.relu(nn.Dense(self.hidden, name=f"dense_{index}")(x))
        return nn.Dense(2, name="head")(x)


def test_activation_dormancy_sets_how_much_is_kept():
    # C1 and C3: m units whose bias is -1e6 count for exactly m of 3 + 5 + 10 + 10 + 2 units.
    network, inputs = DrMActor(), normal(6, 3, 3, 2)
    learner = trained(lambda key: network.init(key, inputs))
    layers = learner.params["params"]
    layers["dense_1"] = {"kernel": jnp.abs(layers["dense_1"]["kernel"]), "bias": jnp.ones(10)}
    layers["conv"]["bias"] = jnp.full(3, 5.0, jnp.float32)
    drm = dormancy_perturb(measure="activation", tau=0.025, k=2, high=1)
    call = jax.jit(lambda learner: intervene(drm, learner, network.apply, (inputs,), KEY))
    # Of a silent layer no unit is strictly below a share of the mean, 0.
    for dead, counted in ((0, 0), (4, 4), (9, 9), (10, 0)):
        layers["dense_0"]["bias"] = jnp.asarray(np.where(np.arange(10) < dead, -1e6, 5.0), jnp.float32)
        after, info = host(call(learner))
        np.testing.assert_allclose(info["dormancy"], counted / 30, rtol=1e-6)
        keep = 1 - 2 * counted / 30
        np.testing.assert_allclose(info["keep"], keep, rtol=1e-6)
        for old, new in ((learner.params, after.params), (learner.target_params, after.target_params)):
            old, new = named(old), named(new)
            for name in ("conv/kernel", "conv/bias", "norm/scale", "norm/bias"):
                np.testing.assert_array_equal(old[name], new[name])
            for layer in ("trunk", "dense_0", "dense_1", "head"):
                np.testing.assert_allclose(new[f"{layer}/bias"], keep * old[f"{layer}/bias"], rtol=1e-6)
                if keep < 1:
                    fresh = (new[f"{layer}/kernel"] - keep * old[f"{layer}/kernel"]) / (1 - keep)
                    product = fresh.T @ fresh if fresh.shape[0] >= fresh.shape[1] else fresh @ fresh.T
                    np.testing.assert_allclose(product, np.eye(len(product)), atol=1e-4)
        assert zero(adam_of(after))


def test_gradient_dormancy_sets_how_much_is_kept():
    # A8 and A9: of 20 units, 18 hidden ones and 2 outputs, m get no gradient.
    network, init = mlp((18, 2))
    inputs = jnp.abs(normal(6, 3))
    learner = trained(init)

    @jax.jit
    def call(learner, weights):
        loss = {"loss_fn": lambda outputs: (outputs * weights).mean()}
        return intervene(dormancy_perturb(), learner, network.apply, (inputs,), KEY, **loss)

    for dead, keep in ((0, 0.9), (1, 0.9), (2, 0.9), (6, 0.7), (16, 0.2), (18, 0.2)):
        hidden = min(
            dead, 15 if dead < 18 else 17
        )  # one of each layer stays: strictly below its mean, none of a silent one is
        weights = np.asarray([[float(dead < 16), 1.0]], np.float32)
        outgoing = np.where(np.arange(18)[:, None] < hidden, 0.0, np.ones((18, 2))).astype(np.float32)
        first = {"kernel": np.ones((3, 18), np.float32), "bias": np.ones(18, np.float32)}
        params = {"Dense_0": first, "Dense_1": {"kernel": outgoing, "bias": np.ones(2, np.float32)}}
        after, info = host(call(learner.replace(params={"params": params}), weights))
        np.testing.assert_allclose(info["dormancy"], dead / 20, rtol=1e-6)
        np.testing.assert_allclose(info["keep"], keep, rtol=1e-6)
        np.testing.assert_allclose(after.params["params"]["Dense_0"]["bias"], keep, rtol=1e-6)
        fresh = (after.params["params"]["Dense_0"]["kernel"] - keep) / (1 - keep)
        np.testing.assert_allclose(fresh @ fresh.T, np.eye(3), atol=1e-4)
        target = named(after.target_params)["Dense_0/kernel"] - keep * named(learner.target_params)["Dense_0/kernel"]
        assert not np.allclose(target / (1 - keep), fresh)


def test_one_draw_for_both_networks_leaves_them_as_far_apart_as_they_were_but_for_the_share_kept():
    """target=edit; with own, above, they draw apart."""
    network, init = mlp((8, 2))
    learner = trained(init)
    shared = dormancy_perturb(low=0.25, high=0.25, target="edit")
    after = intervene(shared, learner, network.apply, (jnp.abs(normal(6, 3)),), KEY, loss_fn=lambda out: out.mean())[0]
    before, now = (
        jax.tree.map(lambda one, other: np.asarray(one - other), each.params, each.target_params)
        for each in (learner, after)
    )
    jax.tree.map(lambda old, new: np.testing.assert_allclose(new, 0.25 * old, atol=1e-6), before, now)


def test_the_dormancy_of_the_actor_perturbs_the_critic():
    config = SAC(hidden=(6, 5))
    actor_context, actor = agent_context(config, CONTROL, "actor")
    critic_context, critic = agent_context(config, CONTROL, "critic")
    after, info = done(dormancy_perturb(of="actor", tau=0.8, init="own"), critic, critic_context)

    @jax.jit
    def dormancies(actor, critic):
        own, other = critic_context.gradients(critic), actor_context.gradients(actor)
        graphs = critic_context.graph, actor_context.graph
        return [gradient_dormancy(*pair, 0.8, strict=True) for pair in zip(graphs, (own, other), strict=True)]

    own, expected = dormancies(actor.params, critic.params)
    assert info["dormancy"] == expected > 0 and expected != own
    keep = np.clip(1 - expected, 0.2, 0.9)
    fresh = critic_context.fresh(jax.random.split(critic_context.stream("dormancy_perturb"))[0])
    for name, leaf in named(after.params).items():
        mixed = keep * named(critic.params)[name] + (1 - keep) * named(fresh)[name]
        np.testing.assert_allclose(leaf, mixed, rtol=1e-5, atol=1e-6)


# ---- Averages


def test_averages_against_numpy():
    network, init = mlp()
    inputs = normal(4, 3)
    for make, elastic in ((hare_and_tortoise, False), (elastic_reset, True)):
        intervention = make(period=3, decay=0.75)
        learner = trained(init)
        start = slow = named(learner.params)
        state = jax.jit(intervention.init)(learner)

        @jax.jit
        def update(learner, state, step, intervention=intervention):
            return intervention.update(learner, state, Context(KEY, step, 0, network, (inputs,)))

        for step in range(1, 7):
            learner = host(learner)
            learner = learner.replace(params=jax.tree.map(lambda leaf, step=step: leaf + step, learner.params))
            slow = {name: 0.75 * slow[name] + 0.25 * leaf for name, leaf in named(learner.params).items()}
            after, state, info = update(learner, state, step)
            assert info["restarts"] == (step % 3 == 0)
            if step % 3 == 0:
                for name, leaf in named(after.params).items():
                    np.testing.assert_allclose(leaf, slow[name], rtol=1e-5, atol=1e-6)
                slow = start if elastic else slow
                assert equal(after.params, after.target_params) and zero(adam_of(after))
                learner = after
            else:
                assert equal(after, learner)
            for name, leaf in named(state.slow).items():
                np.testing.assert_allclose(leaf, slow[name], rtol=1e-5, atol=1e-6)


def test_average_keeps_what_the_optimiser_knows_if_told():
    network, init = mlp()
    learner = trained(init)
    kept = hare_and_tortoise(forget="none", target="keep")
    learner = learner.replace(params=random_like(learner.params, seed=5))
    after = done_by_hand(kept, learner, network, normal(4, 3), state=kept.init(trained(init)))[0]
    assert equal(after.opt_state, learner.opt_state) and equal(after.target_params, learner.target_params)
    for name, leaf in named(after.params).items():
        expected = 0.999 * named(trained(init).params)[name] + 0.001 * named(learner.params)[name]
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)


# ---- Units


def test_continual_backprop_against_numpy():
    network, init = mlp((5, 4, 2))
    inputs = np.asarray(normal(6, 3))
    fresh = jax.jit(init)(KEY)
    layers = ("Dense_0", "Dense_1", "Dense_2")
    cbp = continual_backprop(rate=0.15, maturity=2, decay=0.5)
    learner = trained(init)
    state = cbp.init(learner)
    context = Context(KEY, 0, 0, Network(lambda key: fresh, network.apply, lambda batch: (), None), (inputs,))
    update = jax.jit(lambda learner, state, step: cbp.update(learner, state, replace(context, gradient_step=step)))
    memory = {
        name: [np.zeros(size), np.zeros(size), np.zeros(size, int), 0.0]
        for name, size in zip(layers[:2], (5, 4), strict=True)
    }
    rng, replaced_in_all = np.random.default_rng(3), 0
    for step in range(1, 9):
        learner = host(learner)
        learner = learner.replace(
            params=jax.tree.map(lambda w: w + 0.1 * rng.normal(size=w.shape).astype(np.float32), learner.params)
        )
        weights = {
            name: {part: leaf.copy() for part, leaf in learner.params["params"][name].items()} for name in layers
        }
        h, chosen = inputs, {}
        for name, reader in itertools.pairwise(layers):
            h = np.maximum(h @ weights[name]["kernel"] + weights[name]["bias"], 0)
            utility, mean, age, owed = memory[name]
            age = age + 1
            utility = 0.5 * utility + 0.5 * np.abs(h).mean(0) * np.abs(weights[reader]["kernel"]).sum(1)
            mean = 0.5 * mean + 0.5 * h.mean(0)
            owed += 0.15 * (age > 2).sum()
            order = [unit for unit in np.argsort(utility / (1 - 0.5**age)) if age[unit] > 2]
            chosen[name] = order[: int(owed + 1e-6)]
            owed -= len(chosen[name])
            memory[name] = [utility, mean, age, owed]
        for name, reader in itertools.pairwise(layers):  # outputs keep their mean
            utility, mean, age, _ = memory[name]
            for unit in chosen[name]:
                moved = mean[unit] / (1 - 0.5 ** age[unit]) * learner.params["params"][reader]["kernel"][unit]
                weights[reader]["bias"] += moved
        for name in layers[:2]:
            for unit in chosen[name]:
                weights[name]["kernel"][:, unit] = fresh["params"][name]["kernel"][:, unit]
                weights[name]["bias"][unit] = 0
        for name, reader in itertools.pairwise(layers):
            for unit in chosen[name]:
                weights[reader]["kernel"][unit] = 0
                for part in memory[name][:3]:
                    part[unit] = 0
        learner, state, info = update(learner, state, step)
        assert {name: int(count) for name, count in info["replaced"].items()} == {n: len(c) for n, c in chosen.items()}
        for name, leaf in named(learner.params).items():
            layer, part = name.split("/")
            np.testing.assert_allclose(leaf, weights[layer][part], rtol=2e-5, atol=1e-5, err_msg=f"{name} at {step}")
        replaced_in_all += sum(map(len, chosen.values()))
    assert replaced_in_all >= 5


def test_last_layers_are_no_norms_of_a_residual_stream():
    """Those before the layers named stay, whosever they are; the network is IMPALA's with layer norm and two heads."""
    config = DQN(torso="impala", layer_norm=True, dueling=True, hidden=(8,), width=0.25)
    context, learner = agent_context(config, IMAGE, "critic")
    for last, parts in ((1, {"value", "advantage"}), (2, {"value", "advantage", "hidden"})):
        mask = named(jax.jit(lambda params, last=last: layer_mask(context, params, last))(learner.params))
        assert {name.partition("/")[0] for name, leaf in mask.items() if np.any(leaf)} == parts
        assert all(np.all(leaf) for name, leaf in mask.items() if name.partition("/")[0] in parts)


def test_units_in_several_forms_are_replaced_without_compensation():
    """One mean would stand for relu(x) and relu(-x), whose weights differ."""
    cbp = continual_backprop(rate=0.5, maturity=0)
    for activation, compensates in (("relu", True), ("crelu", False)):
        context, learner = agent_context(SAC(hidden=(6, 5), activation=activation), CONTROL, "critic")
        after, info = done(cbp, learner, context)
        assert all(count > 0 for count in info["replaced"].values())
        before, biases = (
            {name: leaf for name, leaf in named(params).items() if name.endswith("bias")}
            for params in (learner.params, after.params)
        )
        heads = [name for name in biases if name.startswith("head")]
        assert heads and all(np.array_equal(before[name], biases[name]) != compensates for name in heads)


@pytest.mark.parametrize(
    ("config", "space"), [(SAC(hidden=(6, 5)), CONTROL), (DQN(hidden=(60,), width=0.1, padding="valid"), IMAGE)]
)
def test_replaced_units_leave_constant_outputs(config, space):
    # Where activations do not vary, their means are all that is lost.
    context, learner = agent_context(config, space, "critic")
    learner = learner.replace(params=jax.tree.map(abs, learner.params))  # every unit fires
    inputs = tuple(jnp.full_like(leaf, 0.3) for leaf in context.inputs)
    cbp = continual_backprop(rate=0.5, maturity=0)
    apply = jax.jit(context.network.apply)
    before = np.asarray(apply(learner.params, *inputs))
    after, info = done(cbp, learner, replace(context, given=inputs))
    assert all(count > 0 for count in info["replaced"].values())
    np.testing.assert_allclose(apply(after.params, *inputs), before, rtol=1e-4)
    # Without what the biases took over they differ.
    kept = jax.tree_util.tree_map_with_path(
        lambda path, new, old: old if "bias" in str(path[-1]) else new, after.params, learner.params
    )
    assert not np.allclose(apply(kept, *inputs), before, rtol=1e-2)
    assert equal(after.target_params, learner.target_params)


def test_self_normalized_resets():
    # Unit i fires where x_i > 0. Of three in a hidden layer, one always fires, one every third step, one never.
    network, init = mlp((3, 2))
    learner = trained(init)
    learner.params["params"]["Dense_0"] = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}
    snr = self_normalized_resets(eta=0.25, decay=1.0, longest=20)
    context = Context(KEY, 0, 0, Network(init, network.apply, lambda batch: (), None), ())

    @jax.jit
    def update(state, step, x):
        seen = replace(context, gradient_step=step, given=(jnp.stack([x, -jnp.abs(x)]),))
        after, state, info = snr.update(learner, state, seen)
        outgoing = after.params["params"]["Dense_1"]["kernel"]
        return state, (outgoing == 0).all(axis=1), info["reset"]["Dense_0"]

    state, first = snr.init(learner), {}
    for step in range(1, 36):
        fires = np.asarray([step <= 30, step <= 30 and step % 3 == 0, False])
        state, reset_units, count = update(state, step, np.where(fires, 1.0, -1.0).astype(np.float32))
        assert count == reset_units.sum()
        for unit in np.flatnonzero(reset_units):
            first.setdefault(int(unit), step)
    # Silent for longer than 1 step, than 3, and for `longest`.
    assert first == {0: 31, 1: 33, 2: 20}


def test_units_of_which_none_may_be_replaced():
    network = nn.Dense(2)
    learner = trained(lambda key: network.init(key, jnp.zeros((1, 3))))
    for make in (continual_backprop, self_normalized_resets):
        with pytest.raises(InterventionError, match=r"no unit may be recycled \(there is no hidden layer"):
            intervene(make(), learner, network.apply, (normal(4, 3),), KEY, state=make().init(learner))
        with pytest.raises(InterventionError, match="remembers between gradient steps"):
            intervene(make(), learner, network.apply, (normal(4, 3),), KEY)


# ---- Plasticity injection


def test_plasticity_injection():
    # B8: outputs stay to the bit, and only the new head learns.
    layers = ("Dense_1", "Dense_2")
    network, init = mlp()
    inputs = normal(6, 3)
    plain = Network(init, network.apply, lambda batch: (inputs,), None)
    injectable = inject(plain, layers)
    tx = adam(1e-2)
    learner = trained(injectable.init)
    learner.params["learned"] = learner.params["frozen"]
    for params in (learner.params, learner.target_params):
        params["injected"] = jnp.zeros(())
    injection = plasticity_injection(step=4, layers=layers)
    context = Context(KEY, 0, 0, injectable, (inputs,))
    update = jax.jit(lambda learner, step: injection.update(learner, (), replace(context, gradient_step=step))[0])
    value = jax.jit(injectable.apply)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda params: jnp.square(injectable.apply(params, inputs) - 1).sum())(params)

    @jax.jit
    def descended(learner):
        updates, opt_state = tx.update(gradient(learner.params), learner.opt_state, learner.params)
        return learner.replace(params=optax.apply_updates(learner.params, updates), opt_state=opt_state)

    expected = jax.jit(jax.grad(lambda params: jnp.square(network.apply(params, inputs) - 1).sum()))
    before = gradient(learner.params)
    np.testing.assert_array_equal(
        value(learner.params, inputs), jax.jit(network.apply)(learner.params["network"], inputs)
    )
    for name, leaf in named(expected(learner.params["network"])).items():
        np.testing.assert_allclose(named(before["network"])[name], leaf, rtol=1e-5, atol=1e-6)
    assert zero((before["learned"], before["frozen"], before["injected"]))
    assert equal(update(learner, 3), learner) and equal(update(learner, 8), learner)

    after = update(learner, 4)
    for old, new in ((learner.params, after.params), (learner.target_params, after.target_params)):
        old_head = old | {"injected": jnp.zeros(())}
        np.testing.assert_array_equal(value(new, inputs), value(old_head, inputs))
        assert equal(new["network"], old["network"]) and equal(new["learned"], new["frozen"])
    assert equal(after.params["learned"], after.target_params["learned"]) and after.params["injected"] == 1
    grads = gradient(after.params)
    assert all(np.any(leaf) for name, leaf in grads["learned"].items() if name == "Dense_2/kernel")
    assert zero((grads["frozen"], grads["injected"]))
    head = set(after.params["learned"])
    assert head == {name for name in named(plain.init(KEY)) if not name.startswith("Dense_0")}
    assert set(jax.eval_shape(inject(plain).init, KEY)["learned"]) == head | {"Dense_0/kernel", "Dense_0/bias"}
    for name, leaf in named(grads["network"]).items():
        assert np.any(leaf) != (name in head)
    later = descended(descended(after))
    assert changed(after.params["network"], later.params["network"]) == set(named(plain.init(KEY))) - head
    assert equal(later.params["frozen"], after.params["frozen"]) and later.params["injected"] == 1
    assert changed(after.params["learned"], later.params["learned"])
    assert not np.allclose(value(later.params, inputs), value(after.params, inputs))
    # The graph sees the units of all three heads.
    graph = replace(context, given=(inputs,)).graph
    assert [layer.units for layer in graph.layers].count(4) == 3


def test_injection_that_cannot_be():
    context, learner = agent_context(DQN(hidden=(5, 4)), VECTOR, "critic")
    with pytest.raises(InterventionError, match="critic has no place for new parameters"):
        plasticity_injection().update(learner, (), context)
    with pytest.raises(InterventionError, match="no module torso: there are head, hidden/dense_0, hidden/dense_1"):
        jax.eval_shape(inject(context.network, ("torso",)).init, KEY)
    with pytest.raises(InterventionError, match="step must be at least 1"):
        plasticity_injection(step=0)


# ---- Pruning


def test_pruning_schedule():
    # Zhu & Gupta's cubic: at half time 1 - 1/8 of the final sparsity.
    table = {0: 0, 100: 0, 150: 0.8 * 0.875, 200: 0.8, 10_000: 0.8, 125: 0.8 * (1 - 0.75**3)}
    for step, expected in table.items():
        np.testing.assert_allclose(sparsity_at(step, 0.8, 100, 200), expected, rtol=1e-6)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruning_against_numpy(scope):
    network, init = mlp((6, 4, 2))
    pruning = magnitude_pruning(sparsity=0.75, start=0, end=4, period=2, scope=scope)
    learner, state = trained(init), None
    state = pruning.init(learner)

    @jax.jit
    def update(learner, state, step):
        return pruning.update(learner, state, Context(KEY, step, 0, network, (normal(4, 3),)))

    pruned = {name: np.zeros(leaf.shape, bool) for name, leaf in named(learner.params).items()}
    kernels = [name for name in pruned if name.endswith("kernel")]
    rng = np.random.default_rng(0)
    for step in range(1, 7):
        # Pruned weights move again, as by a gradient step, and must return to 0.
        learner = host(learner)
        learner = learner.replace(
            params=jax.tree.map(lambda w: w + rng.normal(size=w.shape).astype(np.float32), learner.params)
        )
        if step in (2, 4):
            share = 0.75 * (1 - (1 - step / 4) ** 3)
            sizes = {name: np.where(pruned[name], -1, np.abs(named(learner.params)[name])) for name in kernels}
            for group in [kernels] if scope == "global" else [[name] for name in kernels]:
                values = np.sort(np.concatenate([sizes[name].ravel() for name in group]))
                number = round(share * len(values))
                for name in group:
                    pruned[name] = sizes[name] < values[number]
        after, state, info = update(learner, state, step)
        for name, leaf in named(after.params).items():
            np.testing.assert_array_equal(leaf, np.where(pruned[name], 0, named(learner.params)[name]))
            np.testing.assert_array_equal(
                named(after.target_params)[name], np.where(pruned[name], 0, named(learner.target_params)[name])
            )
            for moments, old in ((adam_of(after).mu, adam_of(learner).mu), (adam_of(after).nu, adam_of(learner).nu)):
                np.testing.assert_array_equal(named(moments)[name], np.where(pruned[name], 0, named(old)[name]))
        assert (np.asarray(adam_of(after).ages) == 3).all()
        total = sum(pruned[name].sum() for name in kernels) / sum(pruned[name].size for name in kernels)
        np.testing.assert_allclose(info["sparsity"], total, rtol=1e-6)
        learner = after
    assert abs(total - 0.75) < 0.02


def test_ties_are_not_pruned_together():
    weights = np.asarray([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0]], np.float32)
    none = np.zeros((2, 3), bool)
    assert smallest(weights, none, np.float32(0.5)).sum() == 3
    already = np.asarray([[False, False, False], [False, False, True]])
    chosen = smallest(weights, already, np.float32(1 / 3))
    assert chosen[1, 2] and chosen.sum() == 2
    assert (smallest(weights, already, np.float32(0.0)) == already).all()


# ---- Every method: schedules, jit and vmap

METHODS = {
    "continual_backprop": partial(continual_backprop, rate=1.0, maturity=0, period=3),
    "reset": partial(reset, period=3, last=1),
    "shrink_and_perturb": partial(shrink_and_perturb, period=3),
    "dormancy_perturb": partial(dormancy_perturb, period=3),
}


@pytest.mark.parametrize("name", METHODS)
def test_never_due_changes_nothing_and_due_does_under_jit_and_vmap(name):
    intervention = METHODS[name]()
    context, learner = agent_context(SAC(hidden=(6, 5)), CONTROL, "critic")
    seeds = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), learner)
    keys = jax.random.split(KEY)

    @jax.jit
    def update(learners, keys, step):
        def one(learner, key):
            seen = replace(context, key=key, gradient_step=step, now=False)
            return intervention.update(learner, intervention.init(learner), seen)

        return jax.vmap(one)(learners, keys)

    waiting, _, info = update(seeds, keys, 2)
    assert equal(waiting, seeds) and zero(info)
    due = update(seeds, keys, 3)[0]
    assert changed(due.params, seeds.params)
    assert any(not np.array_equal(*leaf) for leaf in named(due.params).values())
