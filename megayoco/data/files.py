"""Small files that are read whole and written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from megayoco.errors import UserError


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write to a temporary name in the same folder and rename, so that no half-written file is ever visible.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_json_object(path: str | os.PathLike[str], remedy: str) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError, ending with `remedy`, if there is none."""
    try:
        value = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}. {remedy}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply. {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(value).__name__}. {remedy}")
    return value
