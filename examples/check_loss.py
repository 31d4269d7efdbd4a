"""Did a run learn? Compares the mean loss of its last ten steps with the loss of its first; exit code 0 or 1.

python examples/check_loss.py RUN_DIRECTORY [--fall NATS]
"""

import argparse
import json
import sys
from pathlib import Path

LAST = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of the run, with its metrics.jsonl")
    parser.add_argument("--fall", type=float, default=1.5, metavar="NATS", help="how far the loss must fall (1.5)")
    arguments = parser.parse_args()
    path = arguments.run / "metrics.jsonl"
    if not path.is_file():
        print(f"error: {path} does not exist: name the directory of a run.", file=sys.stderr)
        return 2
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    # By step: a step that was done again after a resume counts once, as last written.
    loss = {line["step"]: line["loss"] for line in lines if line.get("loss") is not None}
    steps = sorted(loss)
    if len(steps) <= LAST:
        print(f"error: {path} has {len(steps)} steps, more than {LAST} are needed.", file=sys.stderr)
        return 2
    last = sum(loss[step] for step in steps[-LAST:]) / LAST
    fall = loss[steps[0]] - last
    print(
        f"loss {loss[steps[0]]:.3f} at step {steps[0]}, {last:.3f} over the last {LAST} of {len(steps)} steps:"
        f" a fall of {fall:.3f} nats, {'at least' if fall >= arguments.fall else 'LESS THAN'} {arguments.fall:g}"
    )
    return 0 if fall >= arguments.fall else 1


if __name__ == "__main__":
    sys.exit(main())
