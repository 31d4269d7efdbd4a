"""Vocabularies of Megatron's TikTokenizer: a JSON list of {"rank", "token_bytes", "token_str"}.

Special tokens take the ids from 0 on (there are 1000 of them unless told otherwise), the tokens follow. </s> ends
documents. Source: megatron-core, tokenizers/text/libraries/tiktoken_tokenizer.py.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megayoco.errors import UserError

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_LARGEST = 2**17
"""Ids at most, specials included, unless vocab_size says otherwise; Megatron's default."""


def read_megatron_vocabulary(model: str, options: Mapping[str, Any]) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """Token bytes -> id, pattern and special tokens of such a file.

    Args:
        options: pattern (v1, v2 or an expression), num_special_tokens, vocab_size, special_tokens (all that have a
            name, which must hold SPECIAL_TOKENS), each as Megatron's flag.

    Raises:
        UserError: the file or an option is not as Megatron has it.
    """
    try:
        entries = json.loads(Path(model).read_bytes())
        ranks = {base64.b64decode(entry["token_bytes"], validate=True): entry["rank"] for entry in entries}
        regular = list(ranks.values()) == list(range(len(entries))) and len(entries) >= 256
        regular = regular and all(ranks.get(bytes([i])) == i for i in range(256))
    except OSError as error:
        raise UserError(f"cannot read {model}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, RecursionError):
        regular = False
    if not regular:
        raise UserError(
            f"{model} is no vocabulary of Megatron's TikTokenizer (a list of rank, token_bytes and token_str, single"
            " bytes first). For a rank file of tiktoken, use another ending than .json; for a tokenizer.json, use"
            " --tokenizer-type HuggingFaceTokenizer."
        )
    count = int(options.get("num_special_tokens", 1000))
    names = list(options.get("special_tokens", SPECIAL_TOKENS))
    if len(set(names)) < len(names) or not set(names) >= set(SPECIAL_TOKENS) or len(names) > count:
        raise UserError(
            f"{model}: the special tokens must be at most {count} different ones and hold {', '.join(SPECIAL_TOKENS)}."
            " Change --tokenizer-special-tokens or --tiktoken-num-special-tokens."
        )
    names += [f"<SPECIAL_{number}>" for number in range(len(names), count)]
    kept = int(options.get("vocab_size", _LARGEST)) - count
    if kept < 256:
        raise UserError(f"{model}: vocab_size leaves no room for the 256 single bytes behind {count} special tokens.")
    pattern = str(options.get("pattern", "v2"))
    specials = {name: number for number, name in enumerate(names)}
    return {t: rank + count for t, rank in ranks.items() if rank < kept}, PATTERNS.get(pattern, pattern), specials
