"""Speed of DrQ-v2's update beside the same networks in PyTorch.

python -m resprout.benchmarks.pixel_updates --repeats 5

Gradient steps on one batch of 84 x 84 x 9 images and 6 actions, shift included, replay not. Runs come in pairs, ours and
then the peer's in each of its two memory formats, each in a process of its own; the peer's faster one counts.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import jax
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..agents import DrQv2
from ..envs import EnvSpec
from ..training.compiled import compiler_options
from ..training.process import prepare_process
from .peers import middle_and_range, random_batch

SPEC = EnvSpec("benchmark/pixels", 1, (84, 84, 9), "uint8", discrete=False, action_size=6)
WARM_UPDATES = 2


def our_seconds(batch_size: int, updates: int) -> float:
    """Of one gradient step, compiled as the training loop does it."""
    prepare_process()
    agent = DrQv2(batch_size=batch_size).build(SPEC)
    key = jax.random.key(0)
    state, batch = jax.jit(agent.init)(key), random_batch(SPEC, batch_size)
    update = jax.jit(agent.update, donate_argnums=0, compiler_options=compiler_options(SPEC))
    for _ in range(WARM_UPDATES):
        state, metrics, _ = update(state, batch, key)
    jax.block_until_ready(state)
    started = time.monotonic()
    for _ in range(updates):
        state, metrics, _ = update(state, batch, key)
    jax.block_until_ready((state, metrics))
    return (time.monotonic() - started) / updates


def peer_seconds(batch_size: int, updates: int, python: Path) -> tuple[str, float]:
    """The peer's name with its version, and the seconds of one gradient step in its faster memory format."""
    script = Path(__file__).with_name("peer_drqv2.py")
    seconds = []
    for flags in ([], ["--channels-last"]):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            sizes = [f"--batch-size={batch_size}", f"--updates={updates}", f"--warm-updates={WARM_UPDATES}"]
            command = [str(python), "-P", str(script), f"--out={out}", *sizes, *flags]
            done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{script.name} failed:\n{done.stderr[-2000:]}")
            result = json.loads(out.read_text())
        seconds.append(result["seconds_per_update"])
    return f"{result['peer']} {result['version']}", min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs")
    parser.add_argument("--updates", type=int, default=10, help="gradient steps timed in each run")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"))
    args = parser.parse_args()
    if min(args.repeats, args.updates, args.batch_size) < 1:
        parser.error("--repeats, --updates and --batch-size must be at least 1")
    if not args.peers_python.is_file():
        parser.error(f"no Python at {args.peers_python}; `make bench-peers` installs the peers")
    console, ours, theirs, peer = Console(), [], [], ""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        for repeat in range(args.repeats):
            ours.append(processes.submit(our_seconds, args.batch_size, args.updates).result())
            peer, seconds = peer_seconds(args.batch_size, args.updates, args.peers_python.absolute())
            theirs.append(seconds)
            console.print(f"pair {repeat + 1} of {args.repeats}: ours {ours[-1]:.3f}, {peer} {seconds:.3f} s/update")
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    table = Table("batch\npeer", "ours, s", "peer's, s", "speed ratio", box=SIMPLE)
    table.add_row(
        f"{args.batch_size}\n{peer}",
        middle_and_range(ours, 3),
        middle_and_range(theirs, 3),
        middle_and_range(ratios, 2),
    )
    console.print(table)
    console.print(f"median speed ratio: {statistics.median(ratios):.2f} (above 1: ours is faster)")


if __name__ == "__main__":
    main()
