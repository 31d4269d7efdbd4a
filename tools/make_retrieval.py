#!/usr/bin/env python
"""Write documents that teach a model to look things up: facts in a text, and questions about them further on.

    python tools/make_retrieval.py --input corpus.jsonl --output retrieval.jsonl --documents 1000 --tokens 512 \\
        --tokenizer-type TiktokenTokenizer --tokenizer-model ranks.tiktoken --needles 2 8 --filler 0.3 0.9

A fact says what the special magic number of a city is. A question, in the words of YOCO's needle test, is followed by
its answer; or the fact is simply stated again. They stand between pieces of the input text, at least one question at
the end. Many questions per document make many tokens that only looking up can predict. With little text between them
(--filler 0 0.3) short documents teach it within minutes; longer ones then stretch it.

Every document has exactly --tokens tokens, the end-of-document token that tools/preprocess_data.py --append-eod adds
included: documents of the training length fill one sample each, and no question is cut from its fact. One JSON object
per line, with a text. The same arguments and input always give the same file. The input is what
tools/preprocess_data.py reads.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megayoco.data.command import ProgressReport, dashed, positive_int, run_command
from megayoco.data.encode import read_documents
from megayoco.data.inputs import find_inputs
from megayoco.data.tokenizer import Tokenizer, add_tokenizer_arguments, build_tokenizer, tokenizer_from_arguments
from megayoco.errors import UserError
from megayoco.evaluate.needle import CITIES, INSTRUCTION, LARGEST_NUMBER, needle, question

AT_END = 0.3
"""Share of the questions that stand together at the end, as in the test; the others are anywhere behind their fact."""
WITH_INSTRUCTION = 0.5
"""Share of the documents that begin with the instruction of the test."""
ATTEMPTS = 200
"""Documents drawn in a row that turn out too long for --tokens before that is an error."""


@dataclass(frozen=True)
class Mixture:
    """How documents are drawn, each within these bounds.

    Attributes:
        needles: fewest and most facts.
        filler: smallest and largest share of the tokens that is text of the input.
        restated: share of the questions that are the fact stated again.
    """

    needles: tuple[int, int]
    filler: tuple[float, float]
    restated: float


@dataclass(frozen=True)
class Plan:
    """A document without its filler: what stands before it, in it (with places in 0..1, ascending) and behind it."""

    head: str
    inside: list[tuple[float, str]]
    last: list[str]

    def with_filler(self, filler: str, cuts: Sequence[int], end: int) -> str:
        """The text with filler[:end] in it, cut at `cuts`, one for each piece inside."""
        parts, begin = [], 0
        for cut, (_, piece) in zip(cuts, self.inside, strict=True):
            parts += [filler[begin:cut], piece]
            begin = cut
        parts += [filler[begin:end], *self.last]
        return self.head + "\n".join(part for part in parts if part)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="text between the facts: files, folders, patterns")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys that hold text (text)")
    add("--output", required=True, metavar="FILE", help="the JSONL file to write")
    add("--documents", type=positive_int, required=True, metavar="N", help="how many documents")
    add("--tokens", type=positive_int, required=True, metavar="N", help="tokens of each, its end included")
    add(
        "--needles",
        type=positive_int,
        nargs=2,
        default=(1, 4),
        metavar=("LOW", "HIGH"),
        help="facts (1 4)",
    )
    add(
        "--filler",
        type=float,
        nargs=2,
        default=(0.5, 0.9),
        metavar=("LOW", "HIGH"),
        help="share of text (0.5 0.9)",
    )
    add("--restated", type=float, default=0.3, metavar="P", help="share of questions that restate the fact (0.3)")
    add("--seed", type=int, default=1234, metavar="N", help="number that all choices follow from (1234)")
    add("--overwrite", action="store_true", help="replace an existing file")
    add_tokenizer_arguments(parser)
    args = parser.parse_args(dashed(arguments))
    mixture = checked_mixture(args)
    output = Path(args.output)
    if output.is_dir():
        raise UserError(f"{output} is a folder. Name a file for --output.")
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} exists. Choose another --output, or give --overwrite to replace it.")
    tokenizer = build_tokenizer(*tokenizer_from_arguments(args))
    write_documents(output, args.documents, args.tokens, mixture, read_filler(args), tokenizer, args.seed)


def checked_mixture(args: argparse.Namespace) -> Mixture:
    """The mixture that the arguments describe. Raises UserError for bounds that no document can keep."""
    (fewest, most), (least, largest) = args.needles, args.filler
    if not fewest <= most <= len(CITIES):
        raise UserError(f"--needles {fewest} {most} must ascend and not exceed {len(CITIES)}, the number of cities")
    if not 0 <= least <= largest <= 1:
        raise UserError(f"--filler {least} {largest} must be two shares between 0 and 1, ascending")
    if not 0 <= args.restated <= 1:
        raise UserError(f"--restated {args.restated} must be a share between 0 and 1")
    return Mixture((fewest, most), (least, largest), args.restated)


def read_filler(args: argparse.Namespace) -> str:
    """The lines of the input that hold text, joined by spaces as the needle test joins its haystack."""
    documents = read_documents(find_inputs(args.input).sources, args.json_keys)
    filler = " ".join(line.strip() for _, text in documents for line in text.splitlines() if line.strip())
    if not filler:
        raise UserError(f"{', '.join(args.input)}: no text under {', '.join(args.json_keys)}; nothing was written.")
    return filler


def write_documents(
    output: Path, documents: int, tokens: int, mixture: Mixture, filler: str, tokenizer: Tokenizer, seed: int
) -> None:
    """Write the file, which appears whole or not at all."""
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    generator, written = random.Random(seed), 0
    progress = ProgressReport("documents", documents, lambda s: f"{written:,} of {documents:,} documents", 5000)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for written in range(1, documents + 1):
                text = make_document(generator, mixture, tokens, filler, tokenizer)
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                progress.update(written, written)
        os.replace(temporary, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    finally:
        progress.close()
        temporary.unlink(missing_ok=True)
    print(f"{output}: {documents:,} documents of {tokens:,} tokens")


def make_document(generator: random.Random, mixture: Mixture, tokens: int, filler: str, tokenizer: Tokenizer) -> str:
    """A text of tokens - 1 tokens. Raises UserError where the facts of the mixture find no room in them."""
    for _ in range(ATTEMPTS):
        plan = draw_plan(generator, mixture, tokens - 1, tokenizer)
        begin = generator.randrange(len(filler))
        text = fit(plan, tokens - 1, filler, begin, tokenizer)
        if text is not None:
            return text
    low, high = mixture.needles
    raise UserError(
        f"--tokens {tokens} is too short for documents with --needles {low} {high} and a question"
        f" ({ATTEMPTS} of them in a row did not fit). Give more tokens, or fewer needles."
    )


def draw_plan(generator: random.Random, mixture: Mixture, tokens: int, tokenizer: Tokenizer) -> Plan:
    """Facts, and as many questions about them as leave the share of the filler that was drawn."""

    def length(text: str) -> int:
        return len(tokenizer.encode(text))

    head = INSTRUCTION if generator.random() < WITH_INSTRUCTION else ""
    room = (1 - generator.uniform(*mixture.filler)) * tokens - length(head)
    cities = generator.sample(CITIES, generator.randint(*mixture.needles))
    facts = [(generator.random(), city, _number(generator)) for city in cities]
    inside = [(place, needle(city, number)) for place, city, number in facts]
    last: list[str] = []
    room -= sum(length("\n" + piece) for _, piece in inside)
    while True:
        place, city, number = generator.choice(facts)
        # the words of a question end with those of the fact: the number follows both
        asked = not last or generator.random() >= mixture.restated
        piece = f"{question(city)}{number} . " if asked else needle(city, number)
        room -= length("\n" + piece)
        if last and room < 0:
            return Plan(head, sorted(inside), last[::-1])  # the one that is always asked comes last
        if not last or generator.random() < AT_END:
            last.append(piece)
        else:
            inside.append((generator.uniform(place, 1), piece))


def _number(generator: random.Random) -> int:
    """Half of them as the test draws them, half with every count of digits alike: short numbers are rare there, and a
    model that has seen few copies digits on past their end."""
    largest = LARGEST_NUMBER if generator.random() < 0.5 else 10 ** generator.randint(1, 5)
    return generator.randint(1, min(largest, LARGEST_NUMBER))


def fit(plan: Plan, tokens: int, filler: str, begin: int, tokenizer: Tokenizer) -> str | None:
    """The plan with so much filler, from character `begin` on, that it has `tokens` tokens; None if it cannot be.

    How many tokens a text has is known only when it is encoded, so the length is found by trying: twice for the whole,
    after which the cuts stay, and then by the end of the last piece of filler, which may be within a word.
    """

    def count() -> int:
        return len(tokenizer.encode(plan.with_filler(text, cuts, end)))

    text, cuts, end = "", [0] * len(plan.inside), 0
    bare = count()
    if bare > tokens:
        return None
    text = filler[begin : begin + 16 * tokens]  # more than one token ever spans
    if len(text) < 16 * tokens:  # the input is a ring
        text += filler * (16 * tokens // len(filler) + 1)
    end = 2 * (tokens - bare)
    for _ in range(3):
        end = min(end, len(text))
        cuts = [text.rfind(" ", 0, int(place * end) + 1) + 1 for place, _ in plan.inside]
        found = count()
        if found == tokens:
            break
        end = int(end * (tokens - bare) / max(found - bare, 1))
    for _ in range(64):
        found = count()
        if found == tokens:
            return plan.with_filler(text, cuts, end)
        end += tokens - found
        if not max(cuts, default=0) <= end <= len(text):
            return None
    return None


if __name__ == "__main__":
    sys.exit(run_command(main))
