"""Atari protocols: every number that decides what a published Atari return means."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AtariProtocol:
    """Settings of one evaluation protocol; a frame is one emulator frame, an agent step is `frame_skip` of them.

    All protocols share: the game's minimal action set, grey frames of 84x84 (area interpolation), the maximum of the
    last two skipped frames, and a stack of `frame_stack` frames that holds the first frame `frame_stack` times when an
    episode starts (Dopamine pads with zeros there; CleanRL repeats the frame as we do).
    """

    sticky: float  # probability, per frame, that the last action is repeated (Machado et al., 2018, section 5)
    life_loss_ends_episode: bool  # in training only; an evaluation always plays whole games
    noop_max: int  # frames of no-op at the start: uniform in [1, noop_max], or [0, noop_max - 1] where FIRE follows
    fire_on_start: bool  # press FIRE when a game starts and after a lost life, in games that have the action
    frame_skip: int = 4
    frame_stack: int = 4
    max_episode_steps: int = 27_000  # agent steps, 108k frames, 30 minutes of play
    reward_clip: float = 1.0  # what learners clip to; returns are never clipped


ATARI_PROTOCOLS = {
    # Castro et al. (2018), section 3; dopamine/discrete_domains/atari_lib.py and Runner.max_steps_per_episode in the gin
    # files. Dopamine has no no-ops; one frame of it is the fewest that EnvPool can do.
    "dopamine": AtariProtocol(sticky=0.25, life_loss_ends_episode=False, noop_max=1, fire_on_start=False),
    # CleanRL's make_env in dqn_atari_jax.py: NoFrameskip-v4 under the Stable-Baselines wrappers. As in its EnvPool
    # scripts, what follows a lost life is up to 29 no-op frames and one of FIRE, not one no-op step and two of FIRE.
    "cleanrl": AtariProtocol(sticky=0.0, life_loss_ends_episode=True, noop_max=30, fire_on_start=True),
    # Kaiser et al. (2020) as fixed by DER (van Hasselt et al., 2019) and DrQ(eps), SPR, BBF; Dopamine's labs/atari_100k
    # gin files. After a lost life the game just goes on, as under Dopamine's terminal_on_life_loss.
    "atari100k": AtariProtocol(sticky=0.0, life_loss_ends_episode=True, noop_max=30, fire_on_start=False),
}
