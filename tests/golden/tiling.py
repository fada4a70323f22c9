"""Writes tiling.json, the golden vectors that the tests of both the Python and the C++ runtime read.

    python -m tests.golden.tiling

A second reading of how an image is padded, cut into tiles and put together again, in plain loops over scalars that
share nothing with `runtime`. Weights are float32 as C99 hex strings; an image of the file is `pixel`, run through
`network`, and what is kept of the answer is the SHA-256 of its bytes, (height, width, 3) uint8.
"""

import hashlib
import json
import math
from pathlib import Path

from numpy import float32

AXES = [  # length, tile, overlap
    (1, 8, 0), (1, 1, 0), (7, 8, 4), (8, 8, 4), (9, 8, 4), (9, 8, 0), (12, 8, 4), (13, 8, 4), (64, 16, 0),
    (100, 48, 24), (112, 64, 16), (113, 64, 16), (97, 31, 7), (127, 64, 13), (199, 128, 32),
    (200, 64, 32), (200, 56, 1), (131, 2, 1),
]  # fmt: skip

PADDING = [  # length, multiple
    (1, 1), (1, 8), (2, 8), (3, 8), (4, 8), (5, 8), (7, 8), (8, 8), (9, 8), (17, 8), (3, 4), (2, 4),
    (10, 16), (9, 16), (8, 16),
]  # fmt: skip

IMAGES = [  # height, width, multiple, (tile height, tile width) or None, overlap
    (1, 1, 8, None, 0), (7, 5, 8, None, 0), (7, 5, 8, (8, 8), 4), (1, 1, 1, (1, 1), 0), (33, 47, 4, None, 0),
    (16, 16, 8, (16, 16), 8), (17, 16, 8, (16, 16), 8), (24, 24, 8, (16, 16), 8), (48, 40, 8, (16, 24), 0),
    (97, 101, 8, (32, 40), 12), (64, 83, 8, (64, 32), 16), (131, 9, 8, (24, 24), 8), (200, 3, 4, (36, 36), 11),
    (5, 157, 8, (48, 48), 24), (61, 67, 1, (23, 29), 7),
]  # fmt: skip


def starts(length, tile, overlap):
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [min(i * (tile - overlap), length - tile) for i in range(count)]


def ramp(distance, overlap):
    t = min(1.0, (distance + 0.5) / overlap) if overlap else 1.0
    return t * t * (3 - 2 * t)


def raw(start, size, overlap, length):
    weights = []
    for k in range(size):
        low = 1.0 if start == 0 else ramp(k, overlap)
        high = 1.0 if start + size == length else ramp(size - 1 - k, overlap)
        weights.append(low * high)
    return weights


def axis(length, tile, overlap):
    """[(start, float32 weights)] of the tiles."""
    size = min(length, tile)
    tiles = [(start, raw(start, size, overlap, length)) for start in starts(length, tile, overlap)]
    total = [0.0] * length
    for start, weights in tiles:
        for k in range(size):
            total[start + k] += weights[k]
    return [(start, [float32(weights[k] / total[start + k]) for k in range(size)]) for start, weights in tiles]


def padded(length, multiple):
    """Which pixel stands at each place of a padded axis."""
    padding = -length % multiple
    mirrored = [2 * (length - 1) - (length + i) if length > padding else length - 1 for i in range(padding)]
    return [*range(length), *mirrored]


def pixel(y, x, c):
    return (31 * y + 17 * x + 101 * c + (y * x) % 251) % 256


def network(value, y, x):
    """At place (y, x) of a tile."""
    return float32(0.75) * value + float32(0.25) * (float32((7 * y + 13 * x) % 32) / float32(31))


def restore(height, width, multiple, tile, overlap):
    rows, columns = padded(height, multiple), padded(width, multiple)
    th, tw = tile or (len(rows), len(columns))
    out = [[[float32(0)] * 3 for _ in columns] for _ in rows]
    for top, wy in axis(len(rows), th, overlap):
        for left, wx in axis(len(columns), tw, overlap):
            for y in range(len(wy)):
                for x in range(len(wx)):
                    for c in range(3):
                        value = float32(pixel(rows[top + y], columns[left + x], c)) / float32(255)
                        weight = wy[y] * wx[x]
                        out[top + y][left + x][c] = out[top + y][left + x][c] + weight * network(value, y, x)
    return bytes(
        round(float(min(max(out[y][x][c], float32(0)), float32(1)) * float32(255)))
        for y in range(height)
        for x in range(width)
        for c in range(3)
    )


def golden():
    axes = []
    for length, tile, overlap in AXES:
        tiles = axis(length, tile, overlap)
        weights = [[float(weight).hex() for weight in weights] for _, weights in tiles]
        axes.append(dict(length=length, tile=tile, overlap=overlap, starts=[s for s, _ in tiles], weights=weights))
    padding = [dict(length=length, multiple=m, index=padded(length, m)) for length, m in PADDING]
    images = []
    for height, width, multiple, tile, overlap in IMAGES:
        digest = hashlib.sha256(restore(height, width, multiple, tile, overlap)).hexdigest()
        images.append(dict(height=height, width=width, multiple=multiple, tile=tile, overlap=overlap, sha256=digest))
    return {"axes": axes, "padding": padding, "images": images}


if __name__ == "__main__":
    lines = [
        f'"{name}": [\n' + ",\n".join(json.dumps(case) for case in cases) + "\n]" for name, cases in golden().items()
    ]
    Path(__file__).with_suffix(".json").write_text("{" + ",\n".join(lines) + "}\n")
