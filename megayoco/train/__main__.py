"""Train a model: python -m megayoco.train --config run.yaml [section.key=value ...], alone or under any launcher."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from megayoco.errors import UserError


class CommandLineError(UserError):
    """A wrong argument, the same on every rank."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandLineError(f"{message}. See python -m megayoco.train --help.")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Launchers add --local_rank; --deepspeed is accepted out of habit."""
    parser = _Parser(
        prog="python -m megayoco.train", description="Train a model as a YAML file describes it.", allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run: model, data, phases, output_dir")
    parser.add_argument("--deepspeed_config", "--deepspeed-config", metavar="FILE", help="precision and ZeRO, HJSON")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="auto|TAG",
        help="go on after the latest checkpoint in output_dir, at this layout, whatever wrote it; auto: after the "
        "newest that is whole, or from the beginning; TAG: after that one, such as global_step40",
    )
    parser.add_argument("--overwrite", action="store_true", help="give up the run that output_dir holds")
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as parallel.tensor=2 phases.0.steps=20")
    options = parser.parse_intermixed_args(arguments)
    if options.resume and "=" in options.resume:  # an override that stood behind the bare flag
        options.overrides.insert(0, options.resume)
        options.resume = "latest"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if another rank ended, 2 for what the user has to change, 130 when interrupted.

    Other exceptions are bugs and are raised.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        parse(arguments)
    rank: int | None = None
    # late imports: the help text needs neither torch nor seconds
    from megayoco.parallel.agreement import AgreedError
    from megayoco.parallel.launch import read_launch, start_distributed

    try:
        rank = read_launch(os.environ).rank
        options = parse(arguments)
        # DeepSpeed calls collectives by names that torch is about to replace; a user can do nothing about it
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        launch, device = start_distributed()
        from megayoco.train.loop import Trainer
        from megayoco.train.session import Request, Session

        request = Request(
            options.config, options.deepspeed_config, tuple(options.overrides), options.resume, options.overwrite
        )
        Trainer(Session(request, launch, device)).train()
    except UserError as error:
        if rank in (None, 0):
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif not isinstance(error, (AgreedError, CommandLineError)):
            print(f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if rank in (None, 0):
            print("error: interrupted. Go on from the last checkpoint with --resume.", file=sys.stderr, flush=True)
        return 130
    except RuntimeError as error:
        # a traceback here would bury the one line of the rank that ended first
        if not re.search("Connection (closed|reset) by peer|remote process exited", str(error)):
            raise
        print(f"error (rank {rank}): another process has ended; its message says why.", file=sys.stderr, flush=True)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error (rank {rank}): {error}. Make room, then go on with --resume.", file=sys.stderr, flush=True)
        return 2
    return 0


def leave(code: int) -> None:
    """End this process now: a rank that waits for threads or peers would keep the launcher from ending the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:  # while torch was imported
        leave(130)
    except Exception:
        traceback.print_exc()
        leave(1)
    leave(code)
