"""YocoTiktokenTokenizer: the id layout of the official YOCO models around a tiktoken vocabulary."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megayoco.data.tokenizer.base import Tokenizer
from megayoco.data.tokenizer.bpe import read_vocabulary
from megayoco.data.tokenizer.engine import TiktokenEngine
from megayoco.data.tokenizer.ranks import write_rank_file

SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
"""Ids 0 to 3; every id of tiktoken follows, 4 higher."""

CL100K_SPECIALS = {"<|endoftext|>": 1, "<|fim_prefix|>": 2, "<|fim_middle|>": 3, "<|fim_suffix|>": 4}
"""cl100k's own special tokens, counted from the end of its ranks, but <|endofprompt|>, whose id <jupyter_code> has."""

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
        specials = {name: first + place for name, place in CL100K_SPECIALS.items()}
        specials |= {name: first + 8 + place for place, name in enumerate(CODE_SPECIALS)}
        self.engine = TiktokenEngine(model, ranks, pattern, specials)
        self.vocab_size = -(-(self.engine.size + len(SYMBOLS)) // 8) * 8

    def _encode_batch(self, texts: Sequence[str], allow_special: bool) -> tuple[np.ndarray, np.ndarray]:
        tokens, lengths = self.engine.encode(texts, allow_special)
        return tokens + np.uint32(len(SYMBOLS)), lengths

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of these ids. The four symbols are nothing, as officially; ids without a token give U+FFFD."""
        return b"".join(self.engine.bytes_of(i - len(SYMBOLS)) for i in ids if i >= len(SYMBOLS))

    def vocabulary(self) -> dict[int, bytes]:
        return {number + len(SYMBOLS): token for token, number in self.engine.ranks.items()}

    def _fingerprint(self) -> Iterable[bytes]:
        yield b"YOCO's layout, version 1"
        yield from self.engine.fingerprint()

    def _save_model(self, folder: Path) -> tuple[str, dict[str, Any]]:
        name, engine = "ranks.tiktoken", self.engine
        write_rank_file(folder / name, engine.ranks, engine.pattern, engine.special_tokens)
        return name, {}
