"""Compare two results files ratio by ratio: what has become slower beyond the noise that both measured.

    python benchmarks/compare.py BASELINE.json NOW.json      # exit status 1 where something got slower

A ratio is how many times as fast as another provider ours is, in one run: between runs it moves less than times do.
"""

import argparse
from pathlib import Path

from harness import compare, results


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("baseline", type=Path)
    options.add_argument("now", type=Path)
    args = options.parse_args(argv)
    text, slower = compare.report(results.load(args.baseline), results.load(args.now))
    print(text)
    return int(slower)


if __name__ == "__main__":
    raise SystemExit(main())
