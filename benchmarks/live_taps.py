"""python -m benchmarks.live_taps: what leaving out padded taps saves, counted in matrix-product tiles.

For each dense case with dilation: the taps of 9 that are live, and the work of an implicit matrix product over the
rectangles of fastseg.ops.live_taps against one over all taps. Both count whole tiles, as a kernel computes them: a
rectangle's pixels, over all images, are rounded up to a multiple of the tile's rows.
"""

from __future__ import annotations

import argparse

from benchmarks.cases import ASPP, AsppCase
from fastseg.ops.live_taps import live_share, rectangles

TILE_ROWS = 128


def tiles(pixels: int, tile_rows: int) -> int:
    return -(-pixels // tile_rows)


def work(case: AsppCase, rate: int, tile_rows: int) -> tuple[int, int, float]:
    """Tile-taps with live taps only, with all nine, and the taps of nine that are live."""
    found = rectangles("outputs", (case.size, case.size), (3, 3), (1, 1), (rate,) * 4, (rate, rate))
    live = sum(tiles(case.batch * r.area, tile_rows) * r.taps for r in found)
    full = tiles(case.batch * case.size**2, tile_rows) * 9
    return live, full, 9 * live_share(found, (3, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tile-rows", type=int, default=TILE_ROWS, help="pixels in a tile (default %(default)s)")
    tile_rows = parser.parse_args().tile_rows
    print(f"{'case':18} {'rate':>5} {'live taps':>10} {'tiles x taps':>13} {'all nine':>10} {'gain':>6}")
    for case in ASPP:
        totals = [0, 0]
        for rate in case.rates:
            live, full, taps = work(case, rate, tile_rows)
            totals = [totals[0] + live, totals[1] + full]
            print(f"{case.id:18} {rate:5} {taps:10.2f} {live:13} {full:10} {full / live:5.2f}x")
        if len(case.rates) > 1:
            print(f"{case.id:18} {'all':>5} {'':10} {totals[0]:13} {totals[1]:10} {totals[1] / totals[0]:5.2f}x")


if __name__ == "__main__":
    main()
