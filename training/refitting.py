"""What an agent has fitted on the host while it trains: started, waited for and entered at agent steps known beforehand."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import numpy as np

from ..agents.learner import PyTree, Refit
from ..replay import Storage


@dataclass
class Refitting:
    """A `Refit` in a run, and the fit under way, if any."""

    refit: Refit
    due: int = 0  # agent step at which the result enters
    result: Future[Any] | None = field(default=None, repr=False)

    def step(
        self, state: PyTree, storage: Storage, agent_step: int, starts: bool
    ) -> tuple[PyTree, list[dict[str, float]]]:
        """The agent's state at `agent_step`, and the description of each result that entered with it.

        starts: whether a fit starts now. One still under way enters first.
        """
        described = []
        for starting in (starts, False):
            if self.result is not None and (starting or agent_step >= self.due):
                value = self.result.result()
                state, self.result = self.refit.enter(state, value), None
                described.append(self.refit.describe(value))
            if starting and len(storage) >= self.refit.rows:
                columns = storage.export(storage.written - self.refit.rows, storage.written)
                self.due, self.result = agent_step + self.refit.delay, in_thread(self.refit.fit, columns)
        return state, described

    def pending(self) -> dict[str, Any]:
        """The fit under way as plain arrays; waits for it. Empty if there is none."""
        return {} if self.result is None else {"due": np.array(self.due), "value": np.asarray(self.result.result())}

    def restore_pending(self, pending: dict[str, Any]) -> None:
        """Go on exactly where `pending` was taken."""
        if pending:
            self.due, self.result = int(pending["due"]), Future()
            self.result.set_result(pending["value"])


def in_thread(function: Any, *arguments: Any) -> Future[Any]:
    """What `function` will have returned; a process that ends does not wait for it."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # noqa: BLE001 - whoever waits for the result has it
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future
