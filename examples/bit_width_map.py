"""Which layers are sensitive, and how far that depends on the images: plans over several calibration seeds.

python examples/bit_width_map.py [IMAGE_FOLDER] [--seeds 5]
"""

import argparse
from collections import Counter

from tabulate import tabulate

import fmpq_fx
from fmpq_fx.images import crops
from fmpq_fx.passes.plan.task import make_plan


def main() -> None:
    """Print each site's bits at 6 bits on average, a column per seed, and the range of its zeta at 6 bits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="?", help="image folder; default: scikit-image's photographs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--crops", type=int, default=4)
    args = parser.parse_args()
    model = fmpq_fx.samples.model()
    source = args.images or list(fmpq_fx.samples.photos().values())
    tables = []
    for seed in range(args.seeds):
        batches = crops.cut(source, count=args.crops, seed=seed)
        tables.append(fmpq_fx.analyze(model, calibration=batches, lmbda=0.013))
    plans = [make_plan(table, 6 / 32) for table in tables]
    rows = []
    for site in plans[0].sites:
        zeta = [100 * table.zeta[site.name][6] for table in tables]
        bits = [plan.bits[site.name] for plan in plans]
        agreed = Counter(bits).most_common(1)[0][1] / len(bits)
        rows.append([site.name, site.kind, *bits, f"{agreed:.0%}", f"{min(zeta):.3f} … {max(zeta):.3f}"])
    seeds = [f"seed {seed}" for seed in range(args.seeds)]
    print(tabulate(rows, ["site", "kind", *seeds, "agreed", "zeta at 6 bits (%)"]))


if __name__ == "__main__":
    main()
