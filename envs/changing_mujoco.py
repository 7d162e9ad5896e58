"""A MuJoCo task of Gymnasium whose friction and gravity change."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backend import held
from .gymnasium_ import GymnasiumEnv, make_vector
from .interface import Step

# Of each task: what the sliding friction of every geometry is multiplied by, and gravity.
TASKS = ((1.0, 1.0), (0.3, 1.0), (1.0, 1.5), (2.0, 0.7))
NAMES = tuple(f"friction x {friction:g}, gravity x {gravity:g}" for friction, gravity in TASKS)


class ChangingMujoco(GymnasiumEnv):
    """Every `period` steps all episodes are cut and the next of `TASKS` begins, the first after the last.

    signalled: observations end in a number for each task, 1 for the present one.
    """

    def __init__(
        self, env_id: str, task: str, period: int, signalled: bool, num_envs: int, seed: int, render: bool
    ) -> None:
        self._period, self._count = period, 0
        self._shown = np.eye(len(TASKS), dtype=np.float32) if signalled else np.zeros((len(TASKS), 0), np.float32)
        super().__init__(env_id, make_vector(env_id, task, num_envs, render), seed, render)
        (size,), shown = self.spec.observation_shape, self._shown.shape[1]
        record = {"period": period, "tasks": list(NAMES), "signalled": signalled}
        self.spec = dataclasses.replace(
            self.spec, observation_shape=(size + shown,), protocol=self.spec.protocol | record
        )
        self._models: list[Any] = [env.unwrapped.model for env in self._vector.envs]
        self._original = [(model.geom_friction.copy(), model.opt.gravity.copy()) for model in self._models]

    @property
    def _task(self) -> int:
        return self._count // self._period % len(TASKS)

    def reset(self, seed: int | None = None) -> NDArray[Any]:
        self._count = 0
        self._change()
        return super().reset(seed)

    def step(self, actions: NDArray[Any]) -> Step:
        step = super().step(actions)
        self._count += 1
        if self._count % self._period:
            return step
        self._change()
        self._observation = held(self._converted(self._vector.reset()[0]))
        return step._replace(
            observation=self._observation, truncated=~step.terminated, episode_over=np.ones_like(step.terminated)
        )

    def snapshot(self) -> dict[str, NDArray[Any]] | None:
        inner = super().snapshot()
        return inner and inner | {"count": np.array(self._count)}

    def restore(self, snapshot: dict[str, NDArray[Any]]) -> NDArray[Any]:
        self._count = int(snapshot["count"])
        self._change()
        return super().restore({key: value for key, value in snapshot.items() if key != "count"})

    def _change(self) -> None:
        """Bring the physics to the present task's."""
        friction, gravity = TASKS[self._task]
        for model, (own_friction, own_gravity) in zip(self._models, self._original, strict=True):
            model.geom_friction[:] = own_friction
            model.geom_friction[:, 0] *= friction
            model.opt.gravity[:] = own_gravity * gravity

    def _converted(self, observation: Any) -> NDArray[Any]:
        plain = super()._converted(observation)
        return np.concatenate([plain, np.broadcast_to(self._shown[self._task], (len(plain), self._shown.shape[1]))], 1)
