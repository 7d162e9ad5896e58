"""Penalties against hand numbers and NumPy's gradients, each member of an ensemble by itself, and all of them on agents."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resprout.agents.dqn import DQN
from resprout.agents.learner import Batch, Learner, Network
from resprout.agents.optimizer import adam
from resprout.agents.sac import SAC
from resprout.interventions.averaging import elastic_reset, hare_and_tortoise
from resprout.interventions.base import Context, InterventionError, chain
from resprout.interventions.optimisers import spam, upgd
from resprout.interventions.penalties import (
    add_churn_penalty,
    add_infer,
    add_l2_init,
    add_parseval,
    add_spectral,
    add_wasserstein_init,
    churn_penalty,
    infer,
    l2_init,
    parseval,
    spectral,
    wasserstein_init,
    weight_decay,
)
from resprout.interventions.perturb import shrink_and_perturb
from resprout.interventions.projections import normalize_and_project, project_norms, weight_clipping
from resprout.interventions.surgery import edit

KEY = jax.random.key(0)
NOTHING = Network(init=lambda key: {}, apply=None, inputs=lambda batch: (), loss=lambda *arguments: jnp.zeros(()))


def normal(*shape, seed=0, size=1.0):
    return jnp.asarray(size * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def gradient_of(tx, params, state=None, **extra):
    """What the penalty adds to a gradient of zero, and the state after."""
    return jax.jit(tx.update)(zeros(params), tx.init(params) if state is None else state, params, **extra)


def close(first, second, **tolerance):
    np.testing.assert_allclose(first, second, **{"rtol": 2e-4, "atol": 1e-5, **tolerance})


def slopes(function, array, step=1e-5):
    """Central differences in float64."""
    array = np.asarray(array, np.float64)
    found = np.zeros_like(array)
    for place in np.ndindex(array.shape):
        up, down = array.copy(), array.copy()
        up[place] += step
        down[place] -= step
        found[place] = (function(up) - function(down)) / (2 * step)
    return found


# ---- Of parameters alone


def test_weight_decay():
    params, gradient = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([0.5, 0.5])}

    def step(**fields):
        tx = weight_decay(0.1, **fields).optimiser(NOTHING, optax.sgd(2.0))
        return tx.update(gradient, tx.init(params), params)[0]["w"]

    close(step(), [-1.2, -0.6])
    close(step(decoupled=True), [-1.1, -0.8])


def test_l2_init():
    start, now = (
        {"w": jnp.array([[1.0, 2.0]]), "b": jnp.array([0.0])},
        {"w": jnp.array([[1.5, 0.0]]), "b": jnp.array([3.0])},
    )
    tx = add_l2_init(0.1)
    added, _ = gradient_of(tx, now, tx.init(start))
    close(added["w"], [[0.1, -0.4]])
    close(added["b"], [0.6])
    chex.assert_trees_all_equal(gradient_of(tx, start)[0], zeros(start))


def test_the_reference_follows_an_edit():
    """Of l2_init and of churn_penalty: what is drawn anew is pulled to its new value."""
    params = {"w": normal(3, 2), "b": normal(2)}
    new, mask = (
        {"w": normal(3, 2, seed=1), "b": normal(2, seed=1)},
        {"w": jnp.eye(3, 2, dtype=bool), "b": jnp.array([True, False])},
    )
    for tx in (add_l2_init(1.0), add_churn_penalty(lambda p, x: p, 1.0, history=2)):
        moved = jax.tree.map(lambda leaf: leaf + 1, params)
        learner = edit(Learner(moved, None, tx.init(params)), new, mask)
        added, _ = gradient_of(tx, learner.params, learner.opt_state, inputs=(jnp.ones((1, 1)),))
        chex.assert_trees_all_equal(jax.tree.map(lambda g: g == 0, added), mask)


def test_parseval_by_hand():
    """K K^T - I = diag(3, 0): the penalty is 9 and its gradient 4 (K K^T - I) K."""
    params = {"hidden": jnp.diag(jnp.array([2.0, 1.0])), "last": normal(2, 1)}
    added, _ = gradient_of(add_parseval(0.5, heads=["last"]), params)
    close(added["hidden"], 0.5 * np.diag([24.0, 0.0]))
    chex.assert_trees_all_equal(added["last"], jnp.zeros((2, 1)))
    rotation = np.linalg.qr(np.asarray(normal(4, 4)))[0]
    for scale in (1.0, 2.0):
        params = {"hidden": jnp.asarray(np.sqrt(scale) * rotation, jnp.float32), "last": normal(4, 1)}
        close(gradient_of(add_parseval(1.0, scale, heads=["last"]), params)[0]["hidden"], np.zeros((4, 4)))


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (2, 2, 3, 4), (2, 4, 3), (2, 2, 1, 2, 3)])
def test_parseval_is_that_of_every_member(shape):
    params = {"hidden": {"kernel": normal(*shape), "bias": normal(2, 3)}, "last": normal(2, 1)}
    added, _ = gradient_of(add_parseval(0.1, 1.5, heads=["last"]), params)

    def penalty(kernel):
        members = kernel if kernel.ndim in (3, 5) else kernel[None]
        weights = [member.reshape(-1, member.shape[-1]).T for member in members]
        return 0.1 * sum(np.square(w @ w.T - 1.5 * np.eye(len(w))).sum() for w in weights)

    close(added["hidden"]["kernel"], slopes(penalty, params["hidden"]["kernel"]), atol=1e-4)
    assert not added["hidden"]["bias"].any()


def test_parseval_makes_kernels_orthogonal():
    tx = optax.chain(add_parseval(1.0, heads=["last"]), optax.sgd(0.02))
    params = {"hidden": normal(4, 3), "last": normal(3, 1)}

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(zeros(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=500))((params, tx.init(params)))
    close(params["hidden"].T @ params["hidden"], np.eye(3), atol=1e-4)


def mlp(params, x):
    """Its output layer is the first in the order of names."""
    return jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None]) @ params["a_head"]["kernel"]


def mlp_params(seed=0):
    return {
        "hidden": {"kernel": normal(3, 4, seed=seed), "bias": normal(4, seed=seed + 1)},
        "a_head": {"kernel": normal(4, 2, seed=seed + 2)},
    }


def test_parseval_spares_the_heads():
    added, _ = gradient_of(add_parseval(1.0, apply_fn=mlp), mlp_params(), inputs=(normal(5, 3),))
    assert added["hidden"]["kernel"].any() and not added["a_head"]["kernel"].any()
    for tx in (add_parseval(1.0, apply_fn=mlp), add_parseval(1.0), project_norms()):
        with pytest.raises(InterventionError, match="heads are told by the network"):
            gradient_of(tx, mlp_params())
    with pytest.raises(TypeError, match="inputs must be a tuple"):
        gradient_of(add_parseval(1.0, apply_fn=mlp), mlp_params(), inputs=normal(5, 3))
    with pytest.raises(InterventionError, match="parseval: there is no hidden kernel"):
        gradient_of(add_parseval(1.0, apply_fn=lambda p, x: x @ p["w"]), {"w": normal(3, 2)}, inputs=(normal(5, 3),))


def test_spectral_by_hand():
    """sigma_1 = 3: 4 (9 - 1) 3 = 96 along its vectors; |b|^4 has the gradient 4 |b|^2 b; norms' scales have none."""
    params = {"kernel": jnp.diag(jnp.array([3.0, 1.0])), "bias": jnp.array([1.0, 2.0]), "scale": jnp.ones(2)}
    added, _ = gradient_of(add_spectral(0.5), params)
    close(added["kernel"], [[48.0, 0.0], [0.0, 0.0]], atol=1e-2)
    close(added["bias"], [10.0, 20.0])
    assert not added["scale"].any()


@pytest.mark.parametrize("shape", [(5, 3), (2, 2, 3, 4), (2, 4, 3), (2, 2, 1, 2, 3)])
def test_spectral_is_that_of_every_member(shape):
    params = {"kernel": normal(*shape), "bias": normal(2, 3)}
    tx = add_spectral(0.1)

    def again(carry, _):
        return tx.update(zeros(params), carry[1], params), None

    added, _ = jax.jit(lambda carry: jax.lax.scan(again, carry, length=100)[0])((zeros(params), tx.init(params)))

    def penalty(kernel):
        members = kernel if kernel.ndim in (3, 5) else kernel[None]
        largest = [np.linalg.svd(member.reshape(-1, member.shape[-1]))[1][0] for member in members]
        return 0.1 * sum((sigma**2 - 1) ** 2 for sigma in largest)

    close(added["kernel"], slopes(penalty, params["kernel"]), rtol=1e-2, atol=1e-2)
    close(added["bias"], slopes(lambda b: 0.1 * np.square(np.square(b).sum(axis=1)).sum(), params["bias"]))


def test_spectral_survives_a_kernel_of_zeros():
    tx, params = add_spectral(1.0), {"kernel": jnp.zeros((3, 2))}
    added, state = gradient_of(tx, params)
    assert not added["kernel"].any()
    added, _ = gradient_of(tx, {"kernel": 2 * jnp.eye(3, 2)}, state)
    assert jnp.isfinite(added["kernel"]).all() and added["kernel"].any()


def test_wasserstein_by_hand():
    """Sorted (1, 2, 3, 5) against (1, 2, 3, 4): the largest entry is pulled by 2 / 4 * (5 - 4); a permutation costs nothing."""
    tx = add_wasserstein_init(0.1)
    state = tx.init({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])})
    added, state = gradient_of(tx, {"w": jnp.array([[5.0, 1.0], [2.0, 3.0]])}, state)
    close(added["w"], [[0.05, 0.0], [0.0, 0.0]])
    added, _ = gradient_of(tx, {"w": jnp.array([[4.0, 1.0], [2.0, 3.0]])}, state)
    chex.assert_trees_all_equal(added["w"], jnp.zeros((2, 2)))


def test_wasserstein_is_that_of_every_member():
    start = {"kernel": normal(2, 3, 4), "bias": normal(2, 4), "log_alpha": jnp.ones(())}
    now = {"kernel": normal(2, 3, 4, seed=1), "bias": start["bias"][::-1], "log_alpha": 3 * jnp.ones(())}
    tx = add_wasserstein_init(0.1)
    added, _ = gradient_of(tx, now, tx.init(start))
    close(added["log_alpha"], 0.4)
    for name, leaf in start.items():
        for member in range(2) if leaf.ndim else ():
            wanted = np.sort(np.asarray(leaf[member], np.float64).ravel())
            close(
                added[name][member],
                slopes(lambda x, y=wanted: 0.1 * np.square(np.sort(x.ravel()) - y).mean(), now[name][member]),
            )


# ---- Of outputs and features


def test_churn_is_that_of_the_parameters_some_updates_ago():
    """A linear map: the gradient of mean (x (w - w_old))^2 is 2 / (B * outputs) x^T x (w - w_old)."""
    x, series = normal(6, 3), [{"w": normal(3, 2, seed=seed)} for seed in range(5)]
    for history in (1, 2):
        tx = add_churn_penalty(lambda params, x: x @ params["w"], 0.5, history)
        state, update = tx.init(series[0]), jax.jit(tx.update)
        for now, params in enumerate(series):
            old = series[max(now - history, 0)]
            added, state = update(zeros(params), state, params, inputs=(x,))
            close(added["w"], 0.5 * 2 / 12 * x.T @ x @ (params["w"] - old["w"]))


def test_churn_may_be_held_on_another_batch():
    tx = add_churn_penalty(lambda params, x: x @ params["w"], 1.0)
    state = tx.init({"w": normal(3, 2)})
    params, other = {"w": normal(3, 2, seed=1)}, (normal(6, 3, seed=2),)
    there = gradient_of(tx, params, state, inputs=(normal(4, 3),), reference=other)[0]
    chex.assert_trees_all_equal(there, gradient_of(tx, params, state, inputs=other)[0])


def test_churn_of_members_is_that_of_each():
    start, now, x = normal(2, 3, 1), normal(2, 3, 1, seed=1), normal(6, 3)
    both = add_churn_penalty(lambda params, x: jnp.einsum("bi,eio->eb", x, params), 1.0)
    one = add_churn_penalty(lambda params, x: (x @ params)[:, 0], 1.0)
    added = gradient_of(both, now, both.init(start), inputs=(x,))[0]
    for member in range(2):
        close(added[member], gradient_of(one, now[member], one.init(start[member]), inputs=(x,))[0])


def test_infer_is_the_gradient_of_its_formula():
    start, now, x = mlp_params(), mlp_params(5), normal(6, 3, seed=9)
    tx = add_infer(mlp, alpha=0.1, beta=3.0, heads=2)
    state = tx.init(start)
    added, after = gradient_of(tx, now, state, inputs=(x,))
    first, second, given = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (start["hidden"], now["hidden"], x))
    heads = np.asarray(state.heads["hidden/kernel"][0], np.float64)
    assert heads.shape == (4, 2)
    wanted = 3.0 * np.maximum(given @ first["kernel"] + first["bias"], 0) @ heads

    def penalty(kernel=second["kernel"], bias=second["bias"], heads=heads):
        return 0.1 * np.square(np.maximum(given @ kernel + bias, 0) @ heads - wanted).sum(axis=1).mean()

    close(added["hidden"]["kernel"], slopes(penalty, second["kernel"]), rtol=1e-3, atol=1e-3)
    close(added["hidden"]["bias"], slopes(lambda bias: penalty(bias=bias), second["bias"]), rtol=1e-3, atol=1e-3)
    assert not added["a_head"]["kernel"].any()
    step = after.heads["hidden/kernel"][0] - state.heads["hidden/kernel"][0]  # Adam's first, against the gradient
    close(step, -1e-4 * np.sign(slopes(lambda heads: penalty(heads=heads), heads)), rtol=1e-2, atol=1e-6)
    chex.assert_trees_all_equal(after.heads["a_head/kernel"], state.heads["a_head/kernel"])


def test_infer_at_the_start_is_zero_for_beta_one():
    params = mlp_params()
    added, state = gradient_of(add_infer(mlp, beta=1.0), params, inputs=(normal(6, 3),))
    chex.assert_trees_all_equal(added, zeros(params))
    chex.assert_trees_all_equal(state.heads, state.initial_heads)


def test_infer_of_members_is_that_of_each():
    x = normal(6, 3, seed=9)

    def critics(params, x):
        hidden = jax.nn.relu(jnp.einsum("bi,eih->ebh", x, params["hidden"]))
        return jnp.einsum("ebh,eho->ebo", hidden, params["out"])

    start, now = ({"hidden": normal(2, 3, 4, seed=s), "out": normal(2, 4, 1, seed=s)} for s in (0, 1))
    tx = add_infer(critics, beta=2.0, heads=2)
    added, _ = gradient_of(tx, now, tx.init(start), inputs=(x,))
    member = add_infer(lambda params, x: jax.nn.relu(x @ params["hidden"]) @ params["out"], beta=2.0, heads=2)
    for index in range(2):
        first, second = ({name: leaf[index] for name, leaf in params.items()} for params in (start, now))
        drawn = {name: leaf[index : index + 1] for name, leaf in tx.init(start).heads.items()}
        state = member.init(first)._replace(heads=drawn, initial_heads=drawn)
        close(added["hidden"][index], gradient_of(member, second, state, inputs=(x,))[0]["hidden"], atol=1e-4)


@pytest.mark.parametrize("tx", [add_churn_penalty(mlp, 1.0), add_infer(mlp)], ids=["churn_penalty", "infer"])
def test_what_needs_inputs_says_so(tx):
    with pytest.raises(InterventionError, match="needs a network and its inputs"):
        gradient_of(tx, mlp_params())


def test_infer_needs_a_hidden_layer():
    with pytest.raises(InterventionError, match="infer: there is no hidden layer"):
        gradient_of(add_infer(lambda p, x: x @ p["w"]), {"w": normal(3, 2)}, inputs=(normal(5, 3),))


# ---- All of them


def everything():
    return chain(
        *(weight_decay(), l2_init(), parseval(), spectral(), wasserstein_init(), churn_penalty(), infer()),
        *(spam(), upgd(), normalize_and_project(period=2), weight_clipping()),
    )


SPACES = {
    "dqn": SimpleNamespace(id="minatar/Probe", observation_shape=(6, 6, 2), discrete=True, action_size=3),
    "sac": SimpleNamespace(id="probe", observation_shape=(3,), discrete=False, action_size=2),
}


def agent_of(name):
    """A small agent whose networks have all penalties, and transitions for it."""
    space, config = SPACES[name], {"dqn": DQN(hidden=(8,), dueling=True), "sac": SAC(hidden=(8, 8))}[name]
    intervention = everything()
    agent = config.build(
        space, lambda learner, network, tx: (network, intervention.optimiser(network, tx) if network.apply else tx)
    )
    rng = np.random.default_rng(0)
    observations = jnp.asarray(rng.normal(size=(2, 5, *space.observation_shape)), jnp.float32)
    actions = jnp.zeros(5, jnp.int32) if space.discrete else jnp.asarray(rng.uniform(-1, 1, (5, 2)), jnp.float32)
    return agent, Batch(observations[0], actions, jnp.ones(5), jnp.full(5, 0.9), observations[1], jnp.ones(5))


@pytest.mark.parametrize("name", ["dqn", "sac"])
def test_all_at_once_fit_an_agent(name):
    """They find every network's heads and members; the state keeps its form."""
    agent, batch = agent_of(name)
    state = jax.eval_shape(agent.init, KEY)
    after = jax.eval_shape(agent.update, state, batch, KEY)[0]
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dqn", "sac"])
def test_all_at_once_train_an_agent(name):
    """Vmapped over seeds, compiled together: finite steps of every parameter."""
    agent, batch = agent_of(name)
    keys = jax.random.split(KEY, 2)
    seeds = jax.jit(jax.vmap(agent.init))(keys)
    update = jax.jit(jax.vmap(agent.update, in_axes=(0, None, 0)))
    state = update(update(seeds, batch, keys)[0], batch, keys)[0]
    for learner in agent.networks:
        before, after = getattr(seeds, learner).params, getattr(state, learner).params
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
        assert all((new != old).any() for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True))


def test_in_a_chain_of_ones_own():
    params = mlp_params()
    tx = optax.chain(add_l2_init(0.1), add_spectral(0.0), add_wasserstein_init(0.0), optax.sgd(1.0))
    moved = jax.tree.map(lambda leaf: leaf + 1, params)
    updates, _ = jax.jit(tx.update)(zeros(params), tx.init(params), moved)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.2), params), rtol=1e-5)


def test_a_coefficient_of_zero_is_the_optimiser_alone():
    params, gradient = mlp_params(), mlp_params(7)
    plain, network = adam(0.1), NOTHING._replace(apply=mlp)
    wanted, _ = jax.jit(plain.update)(gradient, plain.init(params), params)
    made = (weight_decay, l2_init, parseval, spectral, wasserstein_init, churn_penalty)
    tx = chain(*(function(lam=0.0) for function in made)).optimiser(network, plain)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params, inputs=(normal(5, 3),))
    chex.assert_trees_all_close(updates, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("made", "fields", "message"),
    [
        *(
            (made, {"lam": -1.0}, f"{made.__name__}: lam must be zero or more, not -1.0")
            for made in (weight_decay, l2_init, parseval, spectral, wasserstein_init, churn_penalty)
        ),
        (parseval, {"scale": 0.0}, "parseval: scale must be positive, not 0.0"),
        (churn_penalty, {"history": 0}, "churn_penalty: history must be at least 1 gradient step, not 0"),
        (infer, {"alpha": -1.0}, "infer: alpha must be zero or more"),
        (infer, {"heads": 0}, "infer: heads must be at least 1"),
        (infer, {"learning_rate": 0.0}, "infer: learning_rate must be positive"),
    ],
)
def test_bad_values(made, fields, message):
    with pytest.raises(InterventionError, match=message):
        made(**fields)


def test_what_acts_on_steps_does_so_in_the_order_given():
    """The last projection holds; noise behind it would leave the bounds, and does where it is given so."""
    params = mlp_params()
    network = NOTHING._replace(apply=mlp)
    clipping, noise = weight_clipping(0.5), upgd(noise=0.3)

    def beyond(*interventions):
        tx = chain(*interventions).optimiser(network, optax.sgd(0.1))
        steps, _ = jax.jit(tx.update)(params, tx.init(params), params, inputs=(normal(5, 3),), key=KEY)
        after = optax.apply_updates(params, steps)
        kernels = [leaf for leaf in jax.tree.leaves(after) if leaf.ndim == 2]
        return max(float(jnp.abs(leaf).max()) * np.sqrt(leaf.shape[0]) / 0.5 for leaf in kernels)

    assert beyond(noise, clipping) == pytest.approx(1, abs=1e-5) and beyond(clipping, noise) > 1.2
    assert beyond(l2_init(0.1), noise, clipping) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", [shrink_and_perturb, hare_and_tortoise, elastic_reset])
def test_a_penalty_goes_on_where_nothing_is_drawn_anew(method):
    """Soft shrink-and-perturb takes what l2_init holds the parameters against along; restarts leave it."""
    fields = {"shrink": 0.9, "forget": "none"} if method is shrink_and_perturb else {}
    params = mlp_params()
    network = NOTHING._replace(apply=mlp, init=lambda key: mlp_params(5))
    tx = l2_init(lam=1.0).optimiser(network, optax.sgd(0.1))
    moved = jax.tree.map(lambda leaf: leaf + 1, params)
    learner = Learner(moved, None, tx.init(params))
    intervention = method(period=1, **fields)
    context = Context(KEY, 1, 0, network, (normal(5, 3),), now=True)
    after, _, _ = intervention.update(learner, intervention.init(learner), context)
    added, _ = tx.update(zeros(params), after.opt_state, after.params)
    distance = 0.9 if method is shrink_and_perturb else 1.0
    chex.assert_trees_all_close(
        added, jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.1 * 2 * distance), params), rtol=1e-4
    )
