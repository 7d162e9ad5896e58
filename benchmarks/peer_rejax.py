"""DQN of rejax on a gymnax task, with the settings of ours; run by path with the peers' Python, writes one JSON file."""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="Breakout-MinAtar", help="gymnax id")
    parser.add_argument("--steps", type=int, required=True, help="agent steps of each seed that are timed")
    parser.add_argument("--seeds", type=int, default=8, help="vmapped, as rejax has it")
    parser.add_argument("--capacity", type=int, default=100_000, help="transitions of each seed's replay")
    parser.add_argument("--network", choices=("conv", "mlp"), default="conv", help="as ours, or rejax's own 64, 64")
    parser.add_argument("--warmup", type=int, default=100, help="agent steps of uniform actions before learning")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()

    # Here, so that this module can be imported and checked where the peers are not installed.
    import jax
    import jax.numpy as jnp
    from flax import linen as nn
    from rejax import DQN

    class Convolutional(nn.Module):
        """One 3 x 3 convolution of 16 channels and 128 units, with rejax's interface of a network of action values."""

        action_dim: int

        @nn.compact
        def __call__(self, observation: jax.Array) -> jax.Array:
            x = nn.relu(nn.Conv(16, (3, 3), padding="VALID")(observation))
            x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
            return nn.Dense(self.action_dim)(x)

        def take(self, observation: jax.Array, action: jax.Array) -> jax.Array:
            return jnp.take_along_axis(self(observation), action[:, None], axis=1).squeeze(axis=1)

        def act(self, observation: jax.Array, key: jax.Array, epsilon: Any) -> jax.Array:
            q = self(observation)
            explore_key, action_key = jax.random.split(key)
            random = jax.random.randint(action_key, (len(q),), 0, self.action_dim)
            return jnp.where(jax.random.uniform(explore_key, (len(q),)) < epsilon, random, q.argmax(axis=1))

    algorithm = DQN.create(
        env=args.env,
        num_envs=1,
        num_epochs=1,
        batch_size=32,
        buffer_size=args.capacity,
        fill_buffer=args.warmup,
        target_update_freq=1000,
        polyak=0.0,
        ddqn=False,
        learning_rate=6.25e-5,
        eps_start=0.05,
        eps_end=0.05,
        total_timesteps=1_000_000,
        skip_initial_evaluation=True,
    )
    if args.network == "conv":
        algorithm = algorithm.replace(agent=Convolutional(algorithm.action_dim))

    def train(state: Any, steps: Any) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, state: algorithm.train_iteration(state), state)

    advance = jax.jit(jax.vmap(train, in_axes=(0, None)), donate_argnums=0)
    started = time.monotonic()
    state = jax.jit(jax.vmap(algorithm.init_state))(jax.random.split(jax.random.key(0), args.seeds))
    for _ in range(2):  # what begins as numbers of Python has other types after the first call, which compiles again
        state = jax.block_until_ready(advance(state, args.warmup + 10))
    compile_seconds = time.monotonic() - started
    started = time.monotonic()
    jax.block_until_ready(advance(state, args.steps))
    seconds = time.monotonic() - started
    result = {
        "peer": f"rejax ({args.network})",
        "version": version("rejax"),
        "steps_per_second": args.seeds * args.steps / seconds,  # of all seeds together
        "compile_seconds": compile_seconds,
    }
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
