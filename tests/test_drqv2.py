"""DrQ-v2: its parts against NumPy and hand-made tables, whole updates against the equations, and a task it can solve."""

from dataclasses import dataclass, replace
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from scipy.stats import chisquare

from resprout.agents import Batch, DrQv2
from resprout.agents.augmentation import random_shift, shift
from resprout.agents.drqv2 import ACTION_EPS, Algorithm, Encoder, noisy_action, standard_deviation, td_error
from resprout.agents.learner import as_given
from resprout.diagnostics import layer_graph
from resprout.interventions import Context, adaptive_replay_ratio, dormancy_perturb, plasticity_injection, redo, reset
from resprout.replay import Storage, decode
from resprout.training.intervening import Acting, build_agent, diagnose, no_dormant


@dataclass(frozen=True)
class Spec:
    id: str = "gym/Probe"
    observation_shape: tuple[int, ...] = (17, 17, 3)
    discrete: bool = False
    action_size: int = 2


KEY = jax.random.key(0)
SMALL = DrQv2(channels=4, features=6, hidden=(8, 8), random_shift=2, batch_size=16, warmup=20, capacity=300)
tree_equal = partial(jax.tree.map, np.testing.assert_array_equal)


def random_batch(key: jax.Array = KEY, size: int = 16, shape: tuple[int, ...] = (17, 17, 3), actions: int = 2) -> Batch:
    keys = jax.random.split(key, 6)
    return Batch(
        observation=jax.random.randint(keys[0], (size, *shape), 0, 256).astype(jnp.uint8),
        action=jax.random.uniform(keys[1], (size, actions), minval=-1.0),
        reward=jax.random.normal(keys[2], (size,)),
        discount=0.99 * jax.random.bernoulli(keys[3], 0.7, (size,)),
        next_observation=jax.random.randint(keys[4], (size, *shape), 0, 256).astype(jnp.uint8),
        weight=jax.random.uniform(keys[5], (size,)),
    )


@cache
def small():
    algorithm = Algorithm(SMALL, Spec(), as_given)
    return algorithm, jax.jit(algorithm.init)(KEY), jax.jit(algorithm.update)


# The random shift


def test_b4_a_shift_is_numpy_pad_and_crop_at_every_offset():
    pad = 4
    image = np.random.default_rng(0).integers(0, 256, (12, 10, 9)).astype(np.uint8)
    offsets = np.array([(i, j) for i in range(2 * pad + 1) for j in range(2 * pad + 1)])
    shifted = shift(jnp.broadcast_to(image, (81, *image.shape)), jnp.asarray(offsets), pad)
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    expected = [padded[i : i + 12, j : j + 10] for i, j in offsets]
    np.testing.assert_array_equal(shifted, expected)
    assert shifted.dtype == jnp.uint8


def test_b4_offsets_are_uniform_and_those_of_observation_and_next_differ():
    where = np.zeros((24, 24, 2), np.uint8)
    where[12, 12] = 1, 2  # a channel each
    shifted = np.asarray(random_shift(KEY, jnp.broadcast_to(where, (8_100, *where.shape)), 4))
    places = np.argwhere(shifted[..., 0] == 1)[:, 1:]
    np.testing.assert_array_equal(places, np.argwhere(shifted[..., 1] == 2)[:, 1:])
    counts = np.unique(places, axis=0, return_counts=True)[1]
    assert len(counts) == 81 and chisquare(counts).pvalue > 0.01

    algorithm, state, _ = small()
    batch = random_batch(size=64)
    seen = algorithm.view(state, batch.replace(next_observation=batch.observation), KEY)
    same = np.all(np.asarray(seen.features) == np.asarray(seen.next_features), axis=1)
    assert 0 <= same.sum() < 12  # of 64, each with a chance of 1 in 25


# n-step returns, as the replay makes them for this agent


def test_b5_returns_of_three_steps_in_an_episode_of_five():
    """Terminal at the fifth step: windows of 3, 3, 3, 2, 1, the last three without anything to bootstrap from."""
    storage = Storage(10, (4, 4, 3), "uint8", frame_stack=3, action_shape=(1,), action_dtype="float32", n_step=3)

    def stack(*frames):
        return np.broadcast_to(np.array(frames, np.uint8), (1, 4, 4, 3))

    storage.begin(stack(0, 0, 0))
    rewards = [1.0, 2.0, 4.0, 8.0, 16.0]
    for t, reward in enumerate(rewards):
        after = stack(*(max(0, frame) for frame in (t - 1, t, t + 1)))
        end = t == 4
        flags = np.array([end]), np.array([False])
        storage.add(np.zeros((1, 1)), np.array([reward]), *flags, after, stack(50, 50, 50) if end else after)
    gathered = decode(storage.gather(np.arange(5)), 3)
    g = 0.99
    expected = [1 + g * 2 + g**2 * 4, 2 + g * 4 + g**2 * 8, 4 + g * 8 + g**2 * 16, 8 + g * 16, 16]
    np.testing.assert_allclose(gathered["reward"], expected, rtol=1e-6)
    np.testing.assert_allclose(gathered["discount"], [g**3, g**3, 0, 0, 0], rtol=1e-6)
    assert gathered["observation"][:, 0, 0].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert gathered["next_observation"][:2, 0, 0].tolist() == [[1, 2, 3], [2, 3, 4]]


# Noise


def test_b6_noise_is_clipped_actions_stay_inside_and_their_gradient_is_one():
    mean = jnp.array([-1.0, -0.99, -0.2, 0.0, 0.7, 1.0])
    noise = jnp.array([-2.0, 1.0, 0.1, 3.0, -3.0, 2.0])
    clipped = noisy_action(mean, 0.5, noise, clip=0.3)
    assert (jnp.abs(clipped) <= 1 - ACTION_EPS).all()
    inside = np.clip(np.asarray(mean) + np.clip(0.5 * np.asarray(noise), -0.3, 0.3), -1, 1)
    np.testing.assert_allclose(clipped, inside, atol=2 * ACTION_EPS)
    assert (jnp.abs(clipped - mean) <= 0.3 + 1e-6).all()
    np.testing.assert_allclose(noisy_action(mean, 0.5, noise), np.clip(mean + 0.5 * noise, -1, 1), atol=2e-6)
    gradient = jax.vmap(jax.grad(lambda m, n: noisy_action(m, 0.5, n, clip=0.3)))(mean, noise)
    np.testing.assert_array_equal(gradient, np.ones(6))


@pytest.mark.parametrize(("step", "std"), [(0, 1.0), (50_000, 0.55), (100_000, 0.1), (300_000, 0.1)])
def test_the_schedule_is_linear_in_agent_steps(step, std):
    assert standard_deviation(DrQv2(std_steps=100_000), step) == pytest.approx(std)


@pytest.mark.slow
def test_acting_follows_the_schedule_and_evaluation_has_no_noise():
    algorithm, state, _ = small()
    observation = jnp.broadcast_to(random_batch().observation[:1], (800, 17, 17, 3))
    mean = algorithm.exploit(state, observation, KEY)
    np.testing.assert_allclose(mean, np.broadcast_to(mean[0], mean.shape), atol=1e-5)
    spread = {}
    for step in (0, 450_000, None):
        action = algorithm.act(state, observation, KEY, step)
        assert (jnp.abs(action) <= 1).all()
        spread[step] = float(jnp.std(action, axis=0).mean())
    assert spread[450_000] == pytest.approx(0.19, rel=0.1)
    assert spread[None] == pytest.approx(0.1, rel=0.1) and spread[0] > 0.6  # clamped at the bounds


# Networks


def test_b7_the_encoder_of_84_pixels_has_39200_outputs_and_is_numpys():
    encoder = Encoder(32)
    assert jax.eval_shape(encoder.init_with_output, KEY, jnp.zeros((2, 84, 84, 9)))[0].shape == (2, 39_200)

    small_encoder = Encoder(2)
    images = np.asarray(random_batch(size=3).observation)
    params = small_encoder.init(KEY, images)
    x = images / 255 - 0.5
    for index, stride in enumerate((2, 1, 1, 1)):
        layer = params["params"][f"conv_{index}"]
        kernel, side = np.asarray(layer["kernel"]), (x.shape[1] - 3) // stride + 1
        np.testing.assert_array_equal(layer["bias"], 0)
        flat = kernel.reshape(-1, kernel.shape[-1])
        np.testing.assert_allclose(flat.T @ flat, 2 * np.eye(2), atol=1e-5)  # orthogonal, gain sqrt(2)
        out = np.zeros((3, side, side, 2))
        for i in range(side):
            for j in range(side):
                patch = x[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
                out[:, i, j] = np.tensordot(patch, kernel, 3)
        x = np.maximum(out, 0)
    np.testing.assert_allclose(small_encoder.apply(params, images), x.reshape(3, -1), atol=1e-5)


def test_actor_and_critic_have_trunks_of_their_own_and_orthogonal_layers():
    _, state, _ = small()
    actor, critic = state.actor.params["params"], state.critic.params["params"]
    assert not np.array_equal(actor["trunk"]["dense"]["kernel"], critic["trunk"]["dense"]["kernel"])
    kernel = np.asarray(actor["trunk"]["dense"]["kernel"])
    np.testing.assert_allclose(kernel.T @ kernel, np.eye(6), atol=1e-5)
    first, second = np.asarray(critic["heads"]["hidden"]["dense_0"]["kernel"])
    assert first.shape == (6 + 2, 8) and not np.array_equal(first, second)
    np.testing.assert_allclose(second @ second.T, np.eye(8), atol=1e-5)


def test_b1_the_layer_graph_sees_the_rectified_layers_of_both_heads():
    """FAU of a fresh critic is about a half, 1 or 0 where biases leave no doubt, and NumPy's count in between."""
    algorithm, state, _ = small()
    batch = random_batch(size=256)
    network = algorithm.networks["critic"]
    inputs = network.inputs_in(state, batch)
    params = state.critic.params
    graph = layer_graph(network.apply, params, *inputs)
    assert [(layer.name, layer.shape) for layer in graph.layers] == [
        ("trunk/dense", (6,)),
        ("heads/hidden/dense_0", (2, 8)),
        ("heads/hidden/dense_1", (2, 8)),
    ]
    activations = graph.activations(params, *inputs)
    x = np.concatenate([np.asarray(activations["trunk/dense"]), np.asarray(batch.action)], axis=1)
    for name in ("dense_0", "dense_1"):
        layer = params["params"]["heads"]["hidden"][name]
        x = np.maximum(x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])[:, None], 0)
        found = np.moveaxis(np.asarray(activations[f"heads/hidden/{name}"]), 1, 0)
        np.testing.assert_allclose(found, x, atol=1e-4)


def rectified_layers_of(params, bias):
    """The critic's parameters with nothing but this bias in its ReLU layers."""
    hidden = params["params"]["heads"]["hidden"]
    layers = {name: {"kernel": 0 * layer["kernel"], "bias": bias + 0 * layer["bias"]} for name, layer in hidden.items()}
    return {"params": {**params["params"], "heads": {**params["params"]["heads"], "hidden": layers}}}


def test_b1_adaptive_rr_reads_the_share_of_active_units_of_the_four_rectified_layers():
    """About a half of a fresh critic, as NumPy counts it; 1 and 0 where the biases leave no doubt, whatever the trunk's tanh units."""
    algorithm, state, _ = small()
    batch, network = random_batch(size=256), algorithm.networks["critic"]
    context = Context(KEY, 1, 0, network, partial(network.inputs_in, state, batch), "critic", batch, state)
    adaptive = adaptive_replay_ratio(layers=("heads",))

    def active(params):
        learner = state.critic.replace(params=params)
        return float(
            adaptive.update(learner, adaptive.init(learner), context)[1].previous
        )  # of the first gradient step

    params = state.critic.params
    activations = context.activations(params)
    layers = [np.asarray(activations[f"heads/hidden/dense_{i}"]) > 0 for i in (0, 1)]
    assert active(params) == pytest.approx(np.mean(layers), abs=1e-6) and 0.3 < np.mean(layers) < 0.7
    assert active(rectified_layers_of(params, 1.0)) == 1
    assert active(rectified_layers_of(params, -1.0)) == 0


def test_b1_about_half_of_the_units_of_a_fresh_critic_are_active():
    """Of its four layers of 1,024 units, as the presets have them."""
    algorithm = Algorithm(replace(SMALL, hidden=(1024, 1024)), Spec(), as_given)
    state, network, batch = algorithm.init(KEY), algorithm.networks["critic"], random_batch(size=64)
    context = Context(KEY, 1, 0, network, partial(network.inputs_in, state, batch), "critic", batch, state)
    adaptive = adaptive_replay_ratio(layers=("heads",))
    measured = adaptive.update(state.critic, adaptive.init(state.critic), context)[1].previous
    assert float(measured) == pytest.approx(0.5, abs=0.03)


def outside_of_conditions(jaxpr):
    """Names of the primitives that run whatever holds."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        if equation.primitive.name != "cond":
            for inner in jaxprs_in_params(equation.params):
                yield from outside_of_conditions(inner)


def test_adaptive_rr_encodes_a_batch_only_when_it_looks():
    _, state, _ = small()
    acting = Acting(adaptive_replay_ratio(layers=("heads",)), SMALL.build(Spec()), KEY)
    step = jnp.int32(1)
    traced = jax.make_jaxpr(acting.update)(state, acting.init(state), random_batch(), step, step)
    names = set(outside_of_conditions(traced.jaxpr))
    assert "cond" in names and "conv_general_dilated" not in names and "conv_general_dilated" in str(traced)


# The update


def test_the_error_of_a_transition_by_hand():
    error = td_error(jnp.array([1.0, 3.0]), jnp.asarray(0.5), jnp.asarray(0.9), jnp.asarray(2.0))
    np.testing.assert_allclose(error, [0.5 + 1.8 - 1.0, 0.5 + 1.8 - 3.0], rtol=1e-6)
    by_target = jax.grad(lambda v: td_error(jnp.zeros(2), jnp.asarray(0.0), jnp.asarray(0.9), v).sum())(1.0)
    assert by_target == 0


def test_an_update_is_the_equations():
    """Without a shift: target by the online encoder and the target critic, MSE of both heads, -min Q for the actor."""
    algorithm = Algorithm(replace(SMALL, random_shift=0, tau=0.25), Spec(), as_given)
    state = small()[1]
    target_params = jax.tree.map(lambda leaf: 0.7 * leaf + 0.01, state.critic.params)
    state = state.replace(critic=state.critic.replace(target_params=target_params), agent_step=jnp.int32(250_000))
    batch = random_batch()
    after, metrics, priorities = jax.jit(algorithm.update)(state, batch, KEY)
    std = 0.55
    assert metrics["actor/std"] == pytest.approx(std)
    apply = {name: network.apply for name, network in algorithm.networks.items()}
    _, critic_key, actor_key = jax.random.split(KEY, 3)

    def noisy(mean, key):
        return noisy_action(mean, std, jax.random.normal(key, mean.shape), 0.3)

    features, next_features = (
        apply["encoder"](state.encoder.params, x) for x in (batch.observation, batch.next_observation)
    )
    next_action = noisy(apply["actor"](state.actor.params, next_features), critic_key)
    q_t = apply["critic"](state.critic.target_params, next_features, next_action)
    target = batch.reward + batch.discount * jnp.minimum(*q_t)

    def critic_loss(encoder, critic):
        q = apply["critic"](critic, apply["encoder"](encoder, batch.observation), batch.action)
        return jnp.sum(batch.weight[None] * (q - target[None]) ** 2) / 16, jnp.abs(q - target[None]).mean(axis=0)

    (loss, error), gradients = jax.value_and_grad(critic_loss, (0, 1), has_aux=True)(
        state.encoder.params, state.critic.params
    )
    assert metrics["critic/loss"] == pytest.approx(float(loss), rel=1e-5)
    np.testing.assert_allclose(priorities, error, rtol=1e-5)

    def actor_loss(actor):
        q = apply["critic"](after.critic.params, features, noisy(apply["actor"](actor, features), actor_key))
        return -jnp.minimum(*q).mean()

    loss, gradient = jax.value_and_grad(actor_loss)(state.actor.params)
    assert metrics["actor/loss"] == pytest.approx(float(loss), rel=1e-5)
    for name, expected in zip(("encoder", "critic", "actor"), (*gradients, gradient), strict=True):
        before, now = getattr(state, name).params, getattr(after, name).params
        # Adam's first step: learning_rate times the sign, but for gradients near its eps
        step = jax.tree.map(lambda g: -1e-4 * g / (jnp.abs(g) + 1e-8), expected)
        chex.assert_trees_all_close(jax.tree.map(jnp.subtract, now, before), step, atol=2e-6)
    moved = jax.tree.map(lambda o, t: 0.25 * o + 0.75 * t, after.critic.params, state.critic.target_params)
    chex.assert_trees_all_close(after.critic.target_params, moved, atol=1e-6)
    assert after.gradient_step == 1 and after.agent_step == 250_000


def test_b7_nothing_of_the_actor_loss_reaches_the_encoder():
    """Where nothing is bootstrapped, two actors leave the same encoder and critic behind, to the bit."""
    _, state, update = small()
    batch = random_batch().replace(discount=jnp.zeros(16))
    params = jax.tree.map(lambda leaf: -0.5 * leaf, state.actor.params)
    other = state.replace(actor=state.actor.replace(params=params))
    one, two = (update(each, batch, KEY)[0] for each in (state, other))
    tree_equal((one.encoder, one.critic), (two.encoder, two.critic))
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), one.actor.params, state.actor.params)
    assert max(jax.tree.leaves(moved)) > 0
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), one.encoder.params, state.encoder.params)
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.slow
def test_it_learns_to_answer_brightness_with_an_action():
    """Reward -(a - target)^2 with one action, target in [-0.8, 0.8] the brightness of the image."""
    config = replace(SMALL, channels=8, hidden=(64, 64), features=16, learning_rate=1e-3, std_start=0.3, batch_size=64)
    algorithm = Algorithm(config, Spec(action_size=1), as_given)
    state, update = algorithm.init(KEY), jax.jit(algorithm.update, donate_argnums=0)
    generator = np.random.default_rng(0)

    def images(target):
        noise = generator.integers(-20, 20, (len(target), 17, 17, 3))
        return (128 + 120 * target[:, None, None, None] + noise).clip(0, 255).astype(np.uint8)

    def distance():
        target = np.linspace(-0.8, 0.8, 64)
        return np.abs(np.asarray(algorithm.exploit(state, images(target), KEY))[:, 0] - target).mean()

    before = distance()
    for step in range(400):
        target, action = generator.uniform(-0.8, 0.8, 64), generator.uniform(-1, 1, 64)
        seen, ones = images(target), jnp.ones(64)
        reward = jnp.asarray(-((action - target) ** 2), jnp.float32)
        batch = Batch(seen, jnp.asarray(action[:, None], jnp.float32), reward, 0 * ones, seen, ones)
        state, _, _ = update(state, batch, jax.random.fold_in(KEY, step))
    assert distance() < 0.12 < before


# Interventions and diagnostics


@pytest.mark.slow
def test_diagnostics_see_every_network():
    agent = SMALL.build(Spec())
    state = agent.init(KEY)
    batch = random_batch()
    values, dormant = jax.jit(partial(diagnose, agent))(
        state, state, no_dormant(agent, state, batch), batch, batch, KEY
    )
    for name in ("encoder", "actor", "critic"):
        assert 0.2 < values[f"fau/{name}"] < 0.8
    assert values["value_churn"] > 0 and values["policy_churn"] > 0
    assert set(dormant["encoder"]) == {"conv_0", "conv_1", "conv_2"}  # the fourth makes its output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("intervention", "name"),
    [
        (redo(tau=0.9, period=1), "critic"),
        pytest.param(redo(tau=0.9, period=1), "encoder", marks=pytest.mark.slow),
        pytest.param(reset(period=1, layers=("head",)), "actor", marks=pytest.mark.slow),
        (dormancy_perturb(period=1, of="actor"), "critic"),
        pytest.param(plasticity_injection(step=1, layers=("heads",)), "critic", marks=pytest.mark.slow),
    ],
)
def test_interventions_reach_its_learners(intervention, name):
    intervention = intervention._replace(learners=(name,))
    agent = build_agent(SMALL, Spec(), (intervention,))
    state, batch = agent.init(KEY), random_batch()
    acting = Acting(intervention, agent, KEY)
    network = agent.networks[name]
    features = network.inputs_in(state, batch)
    outputs = network.apply(getattr(state, name).params, *features)
    after, _, _ = jax.jit(acting.update)(state, acting.init(state), batch, jnp.int32(1), jnp.int32(1))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), getattr(after, name), getattr(state, name))
    assert any(jax.tree.leaves(changed))
    for other in {"encoder", "actor", "critic"} - {name}:
        tree_equal(getattr(after, other), getattr(state, other))
    if intervention.name == "plasticity_injection":  # B8
        np.testing.assert_allclose(network.apply(getattr(after, name).params, *features), outputs, atol=1e-5)


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": 0}, "features must be positive, not 0"),
        ({"std_end": -0.1}, "std_end must be zero or more, not -0.1"),
        ({"tau": 2.0}, "tau must be at most 1, not 2.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite, not nan"),
    ],
)
def test_bad_fields_are_one_line(fields, message):
    with pytest.raises(ValueError, match=message):
        DrQv2(**fields)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec(discrete=True), "DrQv2 needs continuous actions; gym/Probe has 2 discrete ones: use DQN"),
        (Spec(observation_shape=(4,)), r"DrQv2 needs \[H, W, C\] images; gym/Probe has \[4\]: use SAC"),
        (Spec(observation_shape=(10, 14, 3)), "DrQv2 needs images of 15 pixels; gym/Probe has 10 x 14"),
    ],
)
def test_bad_environments_are_one_line(spec, message):
    with pytest.raises(ValueError, match=message):
        DrQv2().build(spec)
