"""SAC of sbx on a Gymnasium task, with the settings of ours; run by path with the peers' Python, writes one JSON file."""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

COMPILED_AFTER = 100  # agent steps of learning that are not timed; all is compiled by then


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="HalfCheetah-v4", help="Gymnasium id")
    parser.add_argument("--steps", type=int, required=True, help="agent steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=10_000, help="agent steps of uniform actions before learning")
    parser.add_argument("--eval-episodes", type=int, default=10, help="at the end, by the deterministic policy")
    parser.add_argument("--eval-every", type=int, default=0, help="agent steps between evaluations, 0: at the end only")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    timed_from = args.warmup + COMPILED_AFTER
    if args.steps <= timed_from:
        parser.error(f"--steps must be more than {timed_from}, or nothing is timed")

    # Here, so that this module can be imported and checked where the peers are not installed.
    import gymnasium
    from sbx import SAC

    env = gymnasium.make(args.env)
    model = SAC(
        "MlpPolicy",
        env,
        learning_rate=3e-4,
        buffer_size=1_000_000,
        learning_starts=args.warmup,
        batch_size=256,
        tau=0.005,
        gamma=0.99,
        train_freq=1,
        gradient_steps=1,
        ent_coef="auto",
        policy_kwargs={"net_arch": [256, 256]},
        seed=args.seed,
    )

    def evaluate() -> list[float]:
        test_env, returns = gymnasium.make(args.env), []
        for episode in range(args.eval_episodes):
            observation, _ = test_env.reset(seed=args.seed + episode)
            episode_return, over = 0.0, False
            while not over:
                action, _ = model.predict(observation, deterministic=True)
                observation, reward, terminated, truncated, _ = test_env.step(action)
                episode_return += float(reward)
                over = terminated or truncated
            returns.append(episode_return)
        return returns

    curve: list[tuple[int, list[float]]] = []
    started = ended = paused = 0.0

    def on_step(_locals: dict[str, Any], _globals: dict[str, Any]) -> bool:
        nonlocal started, ended, paused
        step, now = model.num_timesteps, time.monotonic()
        if step == timed_from:
            started, paused = now, 0.0
        ended = now
        if args.eval_every and step % args.eval_every == 0 and step < args.steps:
            curve.append((step, evaluate()))
            paused += time.monotonic() - now
        return True

    model.learn(args.steps, callback=on_step)
    returns = evaluate()
    curve.append((args.steps, returns))
    result = {
        "peer": "sbx-rl",
        "version": version("sbx-rl"),
        "env": args.env,
        "seed": args.seed,
        "steps": args.steps,
        "eval_returns": returns,
        "steps_per_second": (args.steps - timed_from) / (ended - started - paused),
        "curve": curve,
    }
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
