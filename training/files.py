"""Files of runs that may be damaged, and places that a user names."""

import json
import os
from pathlib import Path
from typing import Any


def read_record(path: Path, **keys: Any) -> dict[str, Any]:
    """The JSON object in a file. ValueError, in one line that names it, unless it is one with these keys, of these types.

    OSError if there is no such file.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path} is damaged ({error})") from None
    wrong = ["no object"]
    if isinstance(record, dict):
        wrong = [
            f"its {key} is {json.dumps(record.get(key))}"
            for key, kind in keys.items()
            if not isinstance(record.get(key), kind)
        ]
    if wrong:
        raise ValueError(f"{path} is damaged ({wrong[0]})")
    return record


def final_return(directory: Path) -> str:
    """What a finished run's last evaluation says: "return 12.3", or "not evaluated" if there was none."""
    value = read_record(directory / "summary.json").get("return")
    return "not evaluated" if value is None else f"return {value:.1f}"


def check_folder(what: str, folder: Path) -> None:
    """ValueError, in one line, unless it is a directory to write to or can become one."""
    try:
        nearest_there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    except OSError as error:  # a name too long
        raise ValueError(f"{what} {folder}: {error.strerror}") from None
    if not nearest_there.is_dir():
        raise ValueError(f"{what} {folder}: {nearest_there} is no directory")
    if not os.access(nearest_there, os.W_OK | os.X_OK):
        raise ValueError(f"{what} {folder}: {nearest_there} cannot be written to")


def check_file(what: str, path: Path) -> None:
    """ValueError, in one line, unless a file can be written there: one that exists, or in a folder that does."""
    if path.is_dir():
        raise ValueError(f"{what} {path} is a directory")
    if not path.parent.is_dir():
        raise ValueError(f"{what} {path}: there is no folder {path.parent}")
    if not path.exists():
        check_folder(what, path.parent)
    elif not os.access(path, os.W_OK):
        raise ValueError(f"{what} {path} cannot be written to")
