"""YocoTiktokenTokenizer: the id layout of the official YOCO models around a tiktoken vocabulary."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from megayoco.data.tokenizer.base import REPLACEMENT, Tokenizer
from megayoco.data.tokenizer.bpe import encode_texts, read_vocabulary, tiktoken_encoding
from megayoco.data.tokenizer.ranks import format_ranks, write_rank_file

SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
"""Ids 0 to 3; every id of tiktoken follows, 4 higher."""

CL100K_SPECIALS = {"<|endoftext|>": 1, "<|fim_prefix|>": 2, "<|fim_middle|>": 3, "<|fim_suffix|>": 4}
"""cl100k's own special tokens, counted from the end of the ranks; <|endofprompt|> (20) lost its id to <jupyter_code>."""

CODE_SPECIALS = (
    "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<reponame>", "<filename>", "<gh_stars>",
    "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>",
    "<jupyter_output>", "<empty_output>", "<commit_before>", "<commit_msg>", "<commit_after>",
)  # fmt: skip
"""The official models' further special tokens, from 8 after the ranks on."""


class YocoTiktokenTokenizer(Tokenizer):
    """The official YOCO tokenizer: <s> 0, <pad> 1, </s> 2, <unk> 3, then tiktoken's ids shifted by 4.

    The model is cl100k_base, or a rank file whose special tokens take the same places after its ranks. Only the pattern
    of a rank file's sidecar counts. The vocabulary is padded to a multiple of 8: with cl100k it has 100,288 ids, of
    which some have no token and decode to U+FFFD. </s> ends documents.
    """

    type = "YocoTiktokenTokenizer"
    bos, eod = SYMBOLS.index("<s>"), SYMBOLS.index("</s>")

    def __init__(self, model: str):
        self.model = model
        ranks, pattern, _ = read_vocabulary(model)
        first = max(ranks.values()) + 1
        self.special_tokens = {name: first + place for name, place in CL100K_SPECIALS.items()}
        self.special_tokens |= {name: first + 8 + place for place, name in enumerate(CODE_SPECIALS)}
        self.vocab_size = -(-(max(self.special_tokens.values()) + 1 + len(SYMBOLS)) // 8) * 8
        self.encoding: tiktoken.Encoding = tiktoken_encoding(model, ranks, pattern, self.special_tokens)

    def _encode_batch(self, texts: Sequence[str], allow_special: bool) -> tuple[np.ndarray, np.ndarray]:
        tokens, lengths = encode_texts(self.encoding, texts, allow_special)
        return tokens + np.uint32(len(SYMBOLS)), lengths

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of these ids. The four symbols are nothing, as officially; ids without a token give U+FFFD."""
        parts = []
        for i in ids:
            if i >= len(SYMBOLS):
                try:
                    parts.append(self.encoding.decode_single_token_bytes(i - len(SYMBOLS)))
                except KeyError:
                    parts.append(REPLACEMENT)
        return b"".join(parts)

    def _fingerprint(self) -> Iterable[bytes]:
        yield b"YOCO's layout, version 1"
        yield self.encoding._pat_str.encode()
        yield format_ranks(self.encoding._mergeable_ranks)

    def _save_model(self, folder: Path) -> tuple[str, dict[str, Any]]:
        name = "ranks.tiktoken"
        write_rank_file(folder / name, self.encoding._mergeable_ranks, self.encoding._pat_str, self.special_tokens)
        return name, {}
