"""Rank files: byte-level BPE vocabularies in tiktoken's format, one `BASE64 RANK` per line, without tiktoken.

FILE.json beside a rank file may give `pattern`, how text is cut into words, and `special_tokens`, name -> id.
"""

import base64
import json
import os
from pathlib import Path

from megayoco.data.files import read_json_object, write_text_atomically
from megayoco.errors import UserError

CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
"""How text is cut into words before merging, if the sidecar of a rank file does not say otherwise."""

END_OF_DOCUMENT = "<|endoftext|>"


def load_ranks(path: str | os.PathLike[str]) -> dict[bytes, int]:
    """Token bytes -> rank from a tiktoken rank file. tiktoken's own loader would cache a local file by its name.

    Raises:
        UserError: unreadable, a line that is not `BASE64 RANK`, a rank or token given twice, a single byte missing.
    """
    ranks: dict[bytes, int] = {}
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read the rank file {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            entry = base64.b64decode(token, validate=True), int(rank)
        except ValueError:
            raise UserError(
                f"{path}, line {number}: expected a token in base64 and its rank, got {line[:40]!r}. A rank file is"
                " written by tools/train_tokenizer.py or comes with a tiktoken encoding."
            ) from None
        if entry[0] in ranks or entry[1] < 0:
            raise UserError(f"{path}, line {number}: the token occurs twice, or its rank is negative.")
        ranks[entry[0]] = entry[1]
    if len(set(ranks.values())) != len(ranks):
        raise UserError(f"{path}: two tokens share one rank. Write the file again with tools/train_tokenizer.py.")
    missing = sum(bytes([i]) not in ranks for i in range(256))
    if missing:
        raise UserError(
            f"{path}: {missing} of the 256 single bytes have no rank, so some text could not be encoded. It is cut"
            " short or no byte-level vocabulary: write it again with tools/train_tokenizer.py."
        )
    return ranks


def format_ranks(ranks: dict[bytes, int]) -> bytes:
    """The content of a tiktoken rank file, in the order of the ranks."""
    items = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in items)


def write_rank_file(
    path: str | os.PathLike[str], ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]
) -> None:
    """Write a rank file and its sidecar PATH.json, the rank file last. Raises UserError if it cannot be written."""
    sidecar = {"pattern": pattern, "special_tokens": special_tokens}
    write_text_atomically(f"{path}.json", json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n")
    write_text_atomically(path, format_ranks(ranks).decode("ascii"))


def load_sidecar(model: str, ranks: dict[bytes, int]) -> tuple[str, dict[str, int]]:
    """Pattern and special tokens of a rank file: of MODEL.json, else CL100K_PATTERN and <|endoftext|> after the ranks.

    Raises:
        UserError: the file is broken, or a special token's id is taken.
    """
    path = f"{model}.json"
    first_free = max(ranks.values()) + 1
    if not os.path.exists(path):
        return CL100K_PATTERN, {END_OF_DOCUMENT: first_free}
    sidecar = read_json_object(path, remedy="Repair it, or remove it to use the defaults.")
    pattern, specials = sidecar.get("pattern", CL100K_PATTERN), sidecar.get("special_tokens")
    if specials is None:
        specials = {END_OF_DOCUMENT: first_free}
    if not isinstance(pattern, str) or not isinstance(specials, dict):
        raise UserError(f"{path}: pattern must be a string and special_tokens an object of name and id")
    used: set[int] = set(ranks.values())
    for name, number in specials.items():
        if not isinstance(number, int) or number < 0 or number in used:
            raise UserError(f"{path}: special token {name!r} has id {number!r}, which must be a free integer")
        used.add(number)
    return pattern, specials
