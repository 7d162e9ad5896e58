"""The programs in the documents run as they stand."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("ace", "diagnostics", "interventions", "replay")
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]
PROGRAMS = [
    pytest.param(code, id=f"{path.name}-{index}")
    for path in DOCUMENTS
    for index, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE))
]


@pytest.mark.slow
@pytest.mark.parametrize("code", PROGRAMS)
def test_program(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "program.py"
    path.write_text(code)
    runpy.run_path(str(path), run_name="__main__")
