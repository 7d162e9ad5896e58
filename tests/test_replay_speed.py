"""The timings of the replay: what is timed is right, and is summed up right. The peers themselves run in `make bench-replay`."""

import ast
import io
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from resprout.benchmarks import peer_replay, replay_speed
from resprout.benchmarks.replay_speed import Cost, Draws, Pair


def test_reshuffled_slots_are_drawn_once_an_epoch():
    draws = Draws("reshuffled", 1000, 250)
    assert sorted(np.concatenate([draws() for _ in range(4)])) == list(range(1000))


def test_prioritized_slots_are_drawn_by_priorities_that_differ():
    draws = Draws("prioritized", 1000, 250)
    counts = np.bincount(np.concatenate([draws() for _ in range(40)]), minlength=1000)
    assert len(counts) == 1000
    assert counts.var() > 1.3 * counts.mean()  # uniform draws have a variance no larger than their mean


@pytest.mark.parametrize("name", replay_speed.SAMPLERS)
def test_nothing_as_large_as_the_capacity_is_copied(name, monkeypatch):
    """But where all slots are looked at once in many batches, which is taken out here."""
    monkeypatch.setattr(sys.modules["resprout.replay.masked"], "_settle", settled)
    capacity, slots, priorities = 50_000, jax.ShapeDtypeStruct((64,), np.int32), jax.ShapeDtypeStruct((64,), np.float32)
    sampler = replay_speed.SAMPLERS[name](capacity)
    state = jax.eval_shape(sampler.init, jax.random.key(0))
    functions = [
        replay_speed.donating(sampler.sample, static_argnums=1).lower(state, 64),
        replay_speed.donating(sampler.add).lower(state, slots),
        replay_speed.donating(sampler.update).lower(state, slots, priorities),
    ]
    memory = [lowered.compile().memory_analysis() for lowered in functions]
    assert all(used.temp_size_in_bytes < 4 * capacity for used in memory)
    assert {used.alias_size_in_bytes for used in memory} == {memory[0].argument_size_in_bytes}  # all written in place


def settled(state):
    return state.replace(unsettled=0 * state.unsettled, tilt=0 * state.tilt)


def test_state_bytes_are_those_of_all_arrays():
    assert replay_speed.state_bytes({"order": np.zeros(10, np.int32), "key": jax.random.key(0)}) == 48


def test_our_batches_have_the_shapes_that_the_peers_have():
    ours = replay_speed.filled_vectors(2000).gather(np.arange(5))
    theirs = peer_replay.transitions(5)
    assert ours.keys() == theirs.keys()
    assert sum(column.nbytes for column in ours.values()) == sum(column.nbytes for column in theirs.values())
    frames = replay_speed.filled_frames(200).gather(np.arange(32))["frames"]
    assert frames.shape == (32, 5, 84, 84, 1)


def test_our_speed_is_a_time_for_every_stage():
    ours = replay_speed.our_speed("uniform", 1000, 8, calls=20)
    assert all(1 < spent < 1e6 for spent in ours)


def test_every_task_has_a_sampler_of_ours_and_peers_that_can_do_it():
    assert peer_replay.TASKS.keys() == replay_speed.OURS.keys()
    assert set(replay_speed.OURS.values()) <= replay_speed.SAMPLERS.keys()
    assert {peer for peers in peer_replay.TASKS.values() for peer in peers} == peer_replay.PEERS.keys()


def test_peers_script_needs_nothing_but_numpy_before_a_peer_is_chosen():
    tree = ast.parse(Path(peer_replay.__file__).read_text())
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in tree.body
        if "Import" in type(node).__name__
    }
    assert {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"numpy"}


def test_tables_are_medians_and_ranges_of_rounds_and_pairs():
    costs = [
        Cost(name, 100.0 * (1 + round_), 4_000_000, 5_000_000) for round_ in range(3) for name in replay_speed.SAMPLERS
    ]
    costs = [
        cost._replace(microseconds=cost.microseconds * 1.5) if cost.sampler == "masked" else cost for cost in costs
    ]
    pairs = [
        Pair("atari", 1000, 32, i, "cpprb 1", 10.0, 20.0, 40.0, peers) for i, peers in enumerate([80.0, 100.0, 20.0])
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(replay_speed.cost_table(costs, 1_000_000, 256))
    console.print(replay_speed.pair_table(pairs))
    said = console.file.getvalue()
    assert "300..." not in said and "150..450" in said and "1.50..1.50" in said
    assert "4.00" in said and "1.00..5.00" in said  # beside what is on the host
    assert "2.00" in said and "0.50..2.50" in said  # and on the device
    assert "…" not in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peers-python", "nowhere"], "make bench-replay"),
        (["--capacity", "1500"], "--capacity must be a multiple of 1000"),
        (["--batch-size", "2000", "--capacity", "1000"], "no less than --batch-size"),
        (["--repeats", "0"], "--repeats"),
        (["--atari-capacity", "31"], "--atari-capacity"),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["replay_speed", "--peers-python", sys.executable, *flags])
    with pytest.raises(SystemExit) as stop:
        replay_speed.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_peer_that_fails_says_why():
    # this Python has no cpprb
    with pytest.raises(RuntimeError, match="No module named 'cpprb'"):
        replay_speed.peer_speed(Path(sys.executable), "uniform", "cpprb", 1000, 8, 10)
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            peer_replay.__file__,
            "--task=atari",
            "--peer=cpprb",
            "--capacity=9",
            "--batch-size=1",
            "--calls=1",
            "--out=x",
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "cpprb is not compared on atari" in done.stderr
