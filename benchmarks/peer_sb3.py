"""Speed of Stable-Baselines3's DQN on an Atari game; run by path with the peers' Python, writes one JSON file."""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

WARM_AFTER = 100  # agent steps of learning that are not timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="BreakoutNoFrameskip-v4", help="ALE id without frame skip")
    parser.add_argument("--steps", type=int, required=True, help="agent steps (4 frames each)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=10_000, help="agent steps of uniform actions before learning")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    timed_from = args.warmup + WARM_AFTER
    if args.steps <= timed_from:
        parser.error(f"--steps must be more than {timed_from}, or nothing is timed")

    # Here, so that this module can be imported and checked where the peers are not installed.
    import ale_py
    import gymnasium
    from stable_baselines3 import DQN
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gymnasium.register_envs(ale_py)
    model = DQN(
        "CnnPolicy",
        VecFrameStack(make_atari_env(args.env, n_envs=1, seed=args.seed), n_stack=4),
        learning_rate=1e-4,
        buffer_size=100_000,
        learning_starts=args.warmup,
        batch_size=32,
        gamma=0.99,
        train_freq=4,
        gradient_steps=1,
        target_update_interval=8_000,
        exploration_initial_eps=0.05,  # constant: random actions are cheaper, so both sides must take equally many
        exploration_final_eps=0.05,
        optimize_memory_usage=True,
        replay_buffer_kwargs={"handle_timeout_termination": False},  # optimize_memory_usage demands it
        seed=args.seed,
    )
    started = ended = 0.0

    def on_step(_locals: dict[str, Any], _globals: dict[str, Any]) -> bool:
        nonlocal started, ended
        ended = time.monotonic()
        if model.num_timesteps == timed_from:
            started = ended
        return True

    model.learn(args.steps, callback=on_step)
    result = {
        "peer": "stable-baselines3",
        "version": version("stable-baselines3"),
        "env": args.env,
        "seed": args.seed,
        "steps": args.steps,
        "steps_per_second": (args.steps - timed_from) / (ended - started),
    }
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
