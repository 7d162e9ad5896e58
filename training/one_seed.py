"""The process of one seed among several: python -m resprout.training.one_seed TASK, a JSON object."""

import json
import os
import sys
from pathlib import Path


def main() -> int:
    """Train on the cores it is given, from the newest checkpoint if the run was begun before; the result is the exit code."""
    task = json.loads(sys.argv[1])
    if task["cores"]:
        os.sched_setaffinity(0, task["cores"])  # before JAX counts them
    from .experiment import Experiment
    from .process import end_with_parent
    from .run import Interrupted, TrainingStopped, train

    end_with_parent()
    experiment = Experiment.from_json(task["experiment"])
    begun = Path(str(experiment.out), "config.json").exists()
    try:
        train(experiment, resume=experiment.out if begun else None)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except (TrainingStopped, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
