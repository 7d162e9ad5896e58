"""The examples in docstrings run. (`--doctest-modules` would import each module under a second name.)"""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    f"resprout.{path.parent.name}.{path.stem}"
    for path in ROOT.glob("*/[!_]*.py")
    if (path.parent / "py.typed").exists() and ">>> " in path.read_text()
)


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted
    assert not result.failed
