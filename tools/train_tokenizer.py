#!/usr/bin/env python
"""Train a byte-level BPE and write it as a tiktoken rank file.

    python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 4096 --output ranks.tiktoken

The 256 single bytes and the merges, in the order they were found, are the ranks: --vocab-size of them. The special
token <|endoftext|> takes the id after them, so a model needs vocab_size = ranks + 1 or more. OUTPUT.json beside the
rank file holds the pattern that cuts text into words (that of cl100k) and the special tokens. Input is what
tools/preprocess_data.py reads: JSON lines with the text under --json-keys, text files, Parquet, packed or not, folders.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from megayoco.data.command import dashed, positive_int, run_command
from megayoco.data.encode import read_documents
from megayoco.data.inputs import Inputs, find_inputs
from megayoco.data.tokenizer import CL100K_PATTERN, END_OF_DOCUMENT, TiktokenTokenizer, write_rank_file
from megayoco.data.tokenizer.byte_level import byte_of_character
from megayoco.data.tokenizer.patterns import for_oniguruma
from megayoco.errors import UserError

CHECKED_DOCUMENTS = 200


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="files, folders, patterns, or - for stdin")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys that hold text (text)")
    add("--vocab-size", type=positive_int, required=True, metavar="N", help="ranks: 256 bytes and N - 256 merges")
    add("--output", required=True, metavar="FILE", help="the rank file; FILE.json is written beside it")
    add("--overwrite", action="store_true", help="replace an existing rank file")
    args = parser.parse_args(dashed(arguments))
    if args.vocab_size < 256:
        raise UserError(f"--vocab-size {args.vocab_size} is below 256, the number of single bytes")
    if args.vocab_size >= 2**31:
        raise UserError(f"--vocab-size {args.vocab_size} is more than an id of 32 bits can count")
    for path in (args.output, f"{args.output}.json"):
        if os.path.exists(path) and not args.overwrite:
            raise UserError(f"{path} exists. Choose another --output, or give --overwrite to replace it.")
    try:
        os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {args.output}: {error.strerror}") from error

    inputs = find_inputs(args.input)
    for note in inputs.notes:
        print(f"note: {note}", file=sys.stderr)
    first: list[str] = []
    trained = train(keep_first(read_texts(inputs, args.json_keys), first), args.vocab_size)
    if not first:
        raise UserError(f"{', '.join(args.input)}: no text under {', '.join(args.json_keys)}; nothing was written.")
    ranks = tiktoken_ranks(trained)
    write_rank_file(args.output, ranks, CL100K_PATTERN, {END_OF_DOCUMENT: len(ranks)})
    if len(ranks) < args.vocab_size:
        print(
            f"warning: the text gave only {len(ranks)} ranks of the {args.vocab_size} asked for: it holds no more"
            " pairs that occur twice. Give more text, or expect the smaller vocabulary.",
            file=sys.stderr,
        )
    different = count_differences(trained, TiktokenTokenizer(args.output), first)
    if different:
        print(
            f"note: tiktoken encodes {different} of the first {len(first)} documents otherwise than the trained"
            " merges, which make one token in two ways. The rank file is what counts.",
            file=sys.stderr,
        )
    print(f"{args.output}: {len(ranks)} ranks; {END_OF_DOCUMENT} is {len(ranks)}; model.vocab_size >= {len(ranks) + 1}")


def read_texts(inputs: Inputs, keys: Sequence[str]) -> Iterator[str]:
    """The documents of the files that are not empty. Raises UserError with file and line."""
    for _, text in read_documents(inputs.sources, keys):
        if text:
            # a lone surrogate, which JSON can spell, is no text that the tokenizers library accepts
            yield text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def keep_first(texts: Iterator[str], first: list[str]) -> Iterator[str]:
    """The same texts; the first of them are put into `first`, for the input may be a pipe."""
    for text in texts:
        if len(first) < CHECKED_DOCUMENTS:
            first.append(text)
        yield text


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of vocab_size tokens, fewer if the texts give no more."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(for_oniguruma(CL100K_PATTERN)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tiktoken_ranks(trained: Tokenizer) -> dict[bytes, int]:
    """Bytes of each token -> its id, which is its rank: the trainer numbers the bytes first, then merges in order."""
    byte_of = byte_of_character()
    return {bytes(byte_of[c] for c in token): number for token, number in trained.get_vocab().items()}


def count_differences(trained: Tokenizer, tokenizer: TiktokenTokenizer, texts: Sequence[str]) -> int:
    """How many of the documents tiktoken encodes otherwise than the trained tokenizer."""
    encoded = trained.encode_batch(texts, add_special_tokens=False)
    return sum(tokenizer.encode(text) != one.ids for text, one in zip(texts, encoded, strict=True))


if __name__ == "__main__":
    sys.exit(run_command(main))
