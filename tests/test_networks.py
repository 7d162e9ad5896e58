"""Shapes, names and identities of the network bodies."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from numpy.lib.stride_tricks import sliding_window_view

from resprout.agents.dqn import DQN, q_network
from resprout.agents.networks import MLP, ImpalaResNet, MinAtarCNN, NatureCNN, QNetwork, flatten

KEY = jax.random.key(0)


def shapes(module, observation_shape):
    variables = jax.eval_shape(module.init, KEY, jax.ShapeDtypeStruct((2, *observation_shape), jnp.float32))
    outputs = jax.eval_shape(module.apply, variables, jax.ShapeDtypeStruct((2, *observation_shape), jnp.float32))
    return jax.tree.map(lambda leaf: leaf.shape, variables["params"]), outputs.shape


def init_and_apply(module, inputs):
    variables = jax.jit(module.init)(KEY, inputs)
    return variables, np.asarray(jax.jit(module.apply)(variables, inputs))


@pytest.mark.parametrize(
    ("module", "observation_shape", "units"),
    [
        (NatureCNN(padding="same"), (84, 84, 4), 7744),
        (NatureCNN(padding="valid"), (84, 84, 4), 3136),
        (NatureCNN(padding="valid"), (36, 36, 4), 64),  # the smallest image that leaves a pixel
        (NatureCNN(width=0.3, padding="valid"), (84, 84, 4), 7 * 7 * 20),  # ceil(64 * 0.3)
        (ImpalaResNet(), (84, 84, 4), 11 * 11 * 32),
        (ImpalaResNet(width=4), (84, 84, 4), 11 * 11 * 128),
        (MinAtarCNN(), (10, 10, 4), 8 * 8 * 16),
        (MLP((7, 5)), (3,), 5),
        (NatureCNN(padding="valid", activation="crelu"), (84, 84, 4), 7 * 7 * 128),
        (ImpalaResNet(activation="fourier"), (84, 84, 4), 11 * 11 * 64),
        (MinAtarCNN(activation="helu"), (10, 10, 4), 8 * 8 * 16),
        (MLP((7, 5), activation="fourier"), (3,), 10),
    ],
)
def test_units_of_a_torso(module, observation_shape, units):
    assert shapes(module, observation_shape)[1] == (2, units)


def test_nature_kernels_are_those_of_the_paper():
    parameters, _ = shapes(NatureCNN(), (84, 84, 4))
    assert {name: layer["kernel"] for name, layer in parameters.items()} == {
        "conv_0": (8, 8, 4, 32),
        "conv_1": (4, 4, 32, 64),
        "conv_2": (3, 3, 64, 64),
    }


def test_impala_has_fifteen_convolutions():
    parameters, _ = shapes(ImpalaResNet(), (84, 84, 4))
    kernels = [path for path, _ in jax.tree.leaves_with_path(parameters, is_leaf=lambda x: isinstance(x, tuple))]
    assert (
        sum("kernel" in jax.tree_util.keystr(path) for path in kernels) == 15
    )  # Espeholt et al.: 15 convolutional layers


@pytest.mark.parametrize("torso", [NatureCNN(), ImpalaResNet()])
def test_uint8_images_are_scaled_and_floats_are_not(torso):
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 1), dtype=np.uint8)
    variables, outputs = init_and_apply(torso, images)
    np.testing.assert_allclose(
        outputs, jax.jit(torso.apply)(variables, images.astype(np.float32) / 255), rtol=1e-5, atol=1e-6
    )


def convolve(images, layer, stride=1, padding="same"):
    """A convolution in float64, one window after the other, channels last."""
    kernel = np.float64(layer["kernel"])
    size = kernel.shape[0]
    if padding == "same":
        images = same(images, size, stride, 0.0)
    windows = sliding_window_view(images, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("brcihw,hwio->brco", windows, kernel) + np.float64(layer["bias"])


def same(images, size, stride, fill):
    """Padded so that every `stride`-th window of `size` begins one output; an odd pixel goes to the end."""
    missing = [max((-(-side // stride) - 1) * stride + size - side, 0) for side in images.shape[1:3]]
    return np.pad(images, ((0, 0), *((m // 2, m - m // 2) for m in missing), (0, 0)), constant_values=fill)


def after(x, params, norm, activation="relu"):
    """The activation, behind a LayerNorm over the last axis where the parameters hold one of this name."""
    if norm in params:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        x = x * np.float64(params[norm]["scale"]) + np.float64(params[norm]["bias"])
    return np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], -1) if activation == "crelu" else np.maximum(x, 0)


def nature(params, x, padding, activation="relu"):
    for index, stride in enumerate((4, 2, 1)):
        x = convolve(x, params[f"conv_{index}"], stride, padding)
        x = after(x, params, f"norm_{index}", activation)
    return x


def impala(params, x, activation="relu"):
    for stack in range(3):
        x = same(convolve(x, params[f"stack_{stack}_conv"]), 3, 2, -np.inf)
        x = sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max(axis=(-2, -1))
        for block in range(2):
            layers = params[f"stack_{stack}_block_{block}"]
            hidden = convolve(after(x, layers, "norm_0", activation), layers["conv_0"])
            x = x + convolve(after(hidden, layers, "norm_1", activation), layers["conv_1"])
    return after(x, params, "norm", activation)


def minatar(params, x, activation="relu"):
    return after(convolve(x, params["conv_0"], padding="valid"), params, "norm_0", activation)


WIDENED = {"activation": "crelu", "layer_norm": True}


@pytest.mark.parametrize(
    ("module", "reference", "shape"),
    [
        (NatureCNN(0.1, "same"), lambda params, x: nature(params, x, "same"), (21, 30, 2)),
        (NatureCNN(0.1, "valid"), lambda params, x: nature(params, x, "valid"), (41, 38, 2)),
        (ImpalaResNet(0.2), impala, (13, 10, 2)),
        (MinAtarCNN(0.5), minatar, (10, 9, 3)),
        (NatureCNN(0.1, **WIDENED), lambda params, x: nature(params, x, "same", "crelu"), (21, 30, 2)),
        (ImpalaResNet(0.2, **WIDENED), lambda params, x: impala(params, x, "crelu"), (13, 10, 2)),
        (MinAtarCNN(0.5, **WIDENED), lambda params, x: minatar(params, x, "crelu"), (10, 9, 3)),
    ],
)
def test_torsos_by_hand(module, reference, shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *shape)).astype(np.float32)
    shapes = jax.eval_shape(module.init, KEY, x)
    variables = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    expected = reference(variables["params"], np.float64(x)).reshape(2, -1)
    assert 0.1 < np.mean(expected == 0) < 0.9  # both sides of the last ReLU
    outputs = jax.jit(module.apply)(variables, x)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4 * expected.max())


def relu_network(params, planes):
    """DQN's default MinAtar network, written out."""
    x = nn.Conv(16, (3, 3), padding="VALID").apply({"params": params["torso"]["conv_0"]}, planes)
    x = nn.relu(x).reshape(len(planes), -1)
    x = nn.relu(nn.Dense(128).apply({"params": params["hidden"]["dense_0"]}, x))
    return nn.Dense(3).apply({"params": params["head"]}, x)


def test_defaults_are_relu_networks():
    planes = np.random.default_rng(0).integers(0, 2, (2, 10, 10, 4)).astype(np.float32)
    network, rng = q_network(DQN(), PLANES), np.random.default_rng(1)
    forms = jax.eval_shape(network.init, KEY, planes)
    variables = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), forms)
    expected = jax.jit(relu_network)(variables["params"], planes)
    # the convolution is a product over patches here, whose sums a processor may round otherwise
    np.testing.assert_allclose(jax.jit(network.apply)(variables, planes), expected, rtol=1e-5, atol=1e-5)


PLANES = SimpleNamespace(id="minatar/Planes", observation_shape=(10, 10, 4), discrete=True, action_size=3)
IMAGE = SimpleNamespace(id="atari/Image", observation_shape=(84, 84, 4), discrete=True, action_size=3)


@pytest.mark.parametrize(
    ("config", "kernels"),
    [
        (DQN(), {"torso/conv_0": (3, 3, 4, 16), "hidden/dense_0": (1024, 128), "head": (128, 3)}),
        (DQN(activation="crelu"), {"torso/conv_0": (3, 3, 4, 16), "hidden/dense_0": (2048, 128), "head": (256, 3)}),
        (
            DQN(activation="crelu", width_matched=True),
            {"torso/conv_0": (3, 3, 4, 8), "hidden/dense_0": (1024, 64), "head": (128, 3)},
        ),
        (  # of 17 / 2 and 129 / 2, as many or one more
            DQN(activation="fourier", width_matched=True, width=1.01),
            {"torso/conv_0": (3, 3, 4, 9), "hidden/dense_0": (64 * 18, 65), "head": (130, 3)},
        ),
    ],
)
def test_width_matched_networks_have_as_many_features(config, kernels):
    parameters, _ = shapes(q_network(config, PLANES), PLANES.observation_shape)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): shape for path, shape in leaves_of(parameters)}
    assert {name.removesuffix("/kernel"): shape for name, shape in flat.items() if "kernel" in name} == kernels
    assert {name.rpartition("/")[2] for name in flat} == {"kernel", "bias"}


def leaves_of(parameters):
    return jax.tree_util.tree_leaves_with_path(parameters, is_leaf=lambda node: isinstance(node, tuple))


@pytest.mark.parametrize(
    ("torso", "norms"),
    [
        ("nature", {"torso/norm_0": 32, "torso/norm_1": 64, "torso/norm_2": 64, "hidden/norm_0": 512}),
        (
            "impala",
            {
                f"torso/stack_{stack}_block_{block}/norm_{index}": channels
                for stack, channels in enumerate((16, 32, 32))
                for block in (0, 1)
                for index in (0, 1)
            }
            | {"torso/norm": 32, "hidden/norm_0": 512},
        ),
        ("minatar", {"torso/norm_0": 16, "hidden/norm_0": 128}),
    ],
)
def test_every_activation_has_a_layer_norm_of_its_units(torso, norms):
    parameters, _ = shapes(q_network(DQN(torso=torso, layer_norm=True), IMAGE), IMAGE.observation_shape)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): shape for path, shape in leaves_of(parameters)}
    assert {name.removesuffix("/scale"): shape for name, shape in flat.items() if name.endswith("scale")} == {
        name: (units,) for name, units in norms.items()
    }


def test_binary_planes_and_vectors_are_never_scaled():
    planes = np.ones((2, 10, 10, 4), np.uint8)
    torso = MinAtarCNN()
    variables, outputs = init_and_apply(torso, planes)
    np.testing.assert_array_equal(outputs, jax.jit(torso.apply)(variables, planes.astype(np.float32)))
    np.testing.assert_array_equal(flatten(jnp.full((2, 3), 7, jnp.uint8)), np.full((2, 3), 7.0))


def test_mlp_by_hand():
    kernel, bias = np.array([[1.0, -1.0, 0.0], [2.0, 1.0, -3.0]]), np.array([0.5, 0.0, 1.0])
    variables = {"params": {"dense_0": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}}
    np.testing.assert_allclose(MLP((3,)).apply(variables, jnp.array([[1.0, 2.0]])), [[5.5, 1.0, 0.0]])


def test_layer_norm_comes_before_the_relu():
    module = MLP((64,), layer_norm=True)
    x = 100 * np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    variables, outputs = init_and_apply(module, x)
    dense = x @ np.asarray(variables["params"]["dense_0"]["kernel"])
    normalised = (dense - dense.mean(1, keepdims=True)) / dense.std(1, keepdims=True)
    np.testing.assert_allclose(outputs, np.maximum(normalised, 0), atol=1e-4)


@pytest.mark.parametrize("atoms", [None, 5])
def test_dueling_is_value_plus_centred_advantage(atoms):
    network = QNetwork(flatten, MLP((8,)), actions=3, atoms=atoms, dueling=True)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    variables, outputs = init_and_apply(network, x)
    parameters = jax.tree.map(np.asarray, variables["params"])
    hidden = np.maximum(x @ parameters["hidden"]["dense_0"]["kernel"], 0)
    value, advantage = (
        (hidden @ parameters[name]["kernel"]).reshape(4, -1, *(() if atoms is None else (atoms,)))
        for name in ("value", "advantage")
    )
    np.testing.assert_allclose(outputs.mean(axis=1, keepdims=True), value, atol=1e-5)
    np.testing.assert_allclose(
        outputs - outputs[:, :1], advantage - advantage[:, :1], atol=1e-5, err_msg="differences between actions"
    )


def test_heads_are_named():
    plain, outputs = shapes(QNetwork(NatureCNN(), MLP((512,)), actions=6), (84, 84, 4))
    assert set(plain) == {"torso", "hidden", "head"}
    assert outputs == (2, 6)
    dueling, outputs = shapes(QNetwork(NatureCNN(), MLP((512,)), actions=6, atoms=51, dueling=True), (84, 84, 4))
    assert set(dueling) == {"torso", "hidden", "value", "advantage"}
    assert outputs == (2, 6, 51)
