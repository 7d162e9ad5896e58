"""A trace of some gradient steps of a run, for TensorBoard and Perfetto."""

import dataclasses
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import jax

from .compiled import Compiled
from .host_loop import Training

WARM_UPDATES = 20  # gradient steps before the speed is measured or a trace begins: by then everything is compiled


class Profile:
    """Traces about `steps` gradient steps into `directory`, once `WARM_UPDATES` are taken.

    directory/plugins/profile/TIME/ holds what TensorBoard's profile plugin reads, and perfetto_trace.json.gz for ui.perfetto.dev.
    A trace begins and ends between two agent steps (on the device: two chunks), so it may hold some steps more.
    """

    def __init__(self, directory: Path, steps: int, say: Callable[[str], None]) -> None:
        self.directory, self.steps, self.say = directory, steps, say
        self.stage: Literal["waiting", "running", "over"] = "waiting"
        self.since: int | None = None  # gradient step at which this stage began

    def observe(self, t: Training) -> None:
        """Between two agent steps: begin or end the trace where it is time to."""
        if self.since is None:
            self.since = t.gradient_step
        if self.stage == "waiting" and t.gradient_step >= self.since + WARM_UPDATES:
            jax.block_until_ready(t.agent)
            jax.profiler.start_trace(self.directory, create_perfetto_trace=True)
            self.stage, self.since = "running", t.gradient_step
        elif self.stage == "running" and t.gradient_step >= self.since + self.steps:
            self.end(t)

    def left(self, t: Training) -> int | None:
        """Gradient steps from here to where the trace begins or ends, at least 1; None if it is over."""
        length = {"waiting": WARM_UPDATES, "running": self.steps, "over": None}[self.stage]
        since = t.gradient_step if self.since is None else self.since
        return None if length is None else max(1, since + length - t.gradient_step)

    def end(self, t: Training) -> None:
        """End the trace, or the wait for it: the run stops here."""
        if self.stage == "running":
            jax.block_until_ready(t.agent)
            jax.profiler.stop_trace()
            folder = max(self.directory.glob("plugins/profile/*"))
            self.say(
                f"profile of {t.gradient_step - (self.since or 0)} gradient steps: tensorboard --logdir {self.directory}, or "
                f"{folder / 'perfetto_trace.json.gz'} in ui.perfetto.dev"
            )
        elif self.stage == "waiting":
            self.say(f"no profile: the run ended within its first {WARM_UPDATES} gradient steps")
        self.stage = "over"


def named(compiled: Compiled) -> Compiled:
    """With a name in the trace for each call, and a number for each gradient step."""

    def under(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any) -> Any:
            with jax.profiler.TraceAnnotation(name):
                return function(*arguments)

        return call

    def learn(*arguments: Any) -> Any:
        *_, gradient_step, _ = arguments
        with jax.profiler.StepTraceAnnotation("gradient_step", step_num=int(gradient_step)):
            return compiled.learn(*arguments)

    names = ("act", "explore", "remember", "sample")
    calls: dict[str, Any] = {name: under(name, getattr(compiled, name)) for name in names}
    acting = tuple(dataclasses.replace(act, run=under("intervene", act.run)) for act in compiled.interventions)
    return dataclasses.replace(compiled, learn=learn, interventions=acting, **calls)
