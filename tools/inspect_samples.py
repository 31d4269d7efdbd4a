#!/usr/bin/env python
"""Show what a run is trained on: samples of a phase as text, in the order in which training takes them.

    python tools/inspect_samples.py --config run.yaml
    python tools/inspect_samples.py --config run.yaml --phase 1 --first 640 --samples 2 phases.1.sequence_length=4096

Every stretch of a sample is given (no loss), learned, or filling (padding); a line says where a window of memory layers
begins, and `document` where a document does. Indices of the order are cached where the run has them.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from megayoco.data.command import dashed, positive_int, run_command
from megayoco.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="the run, as for python -m megayoco.train")
    add("--phase", type=int, default=0, metavar="N", help="number of the phase (0)")
    add("--first", type=int, default=0, metavar="N", help="number of the first sample shown (0)")
    add("--samples", type=positive_int, default=4, metavar="N", help="how many (4)")
    add("--sample-tokens", type=positive_int, default=32, metavar="N", help="tokens shown of a stretch (32)")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="of the run's config")
    return parser


def main(arguments: Sequence[str]) -> None:
    args = build_parser().parse_intermixed_args(dashed(arguments))
    # late: they take seconds, and the help text needs none of them
    from megayoco.data.datasets import build_datasets, resolve_tokenizer, with_blend_files
    from megayoco.data.inspect_samples import describe_sample
    from megayoco.train.starting import load_run

    run = with_blend_files(load_run(args.config, args.overrides))
    if not 0 <= args.phase < len(run.phases):
        raise UserError(f"--phase {args.phase}: the run has the phases 0 to {len(run.phases) - 1}.")
    if args.first < 0:
        raise UserError(f"--first {args.first}: samples are counted from 0.")
    phase, data = run.phases[args.phase], run.phase_data(args.phase)
    tokenizer = resolve_tokenizer(run.data, *map(run.phase_data, range(len(run.phases))))
    datasets = build_datasets(
        data,
        sequence_length=phase.sequence_length,
        seed=run.seed,
        vocab_size=run.model.vocab_size,
        batch_size=phase.batch_size,
        tokenizer=tokenizer,
        default_cache_dir=os.path.join(run.output_dir, "data_cache"),
    )
    for note in datasets.notes:
        print(f"note: {note}")
    for number in range(args.first, args.first + args.samples):
        step, row = divmod(number, phase.batch_size)
        first, *rest = describe_sample(
            datasets.train[number], tokenizer, window=run.model.memory_window, shown=args.sample_tokens
        )
        print(f"sample {number:,} (batch {step:,}, row {row:,}): {first}", *rest, sep="\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
