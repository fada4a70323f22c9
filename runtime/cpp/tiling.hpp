/// How an image is cut into overlapping tiles, and with which weights they are put together again.
///
/// To the bit what runtime/tiling.py does: tiles of one size at regular starts, the last one shifted inside; weights
/// rise smoothly over the overlap and sum to 1 at every pixel, so that nothing has to be divided afterwards.
#pragma once

#include <cstdint>
#include <vector>

#include "common.hpp"

namespace derainer {

/// How an image is cut. `size`: of the padded image; `tile`: of every tile, where a side that is not shorter than the
/// image's does not cut it; `overlap`: pixels that neighbours share, at most half of a side that does.
struct Cut {
    Size size;
    Size tile;
    std::int64_t overlap;
};

/// A tile of one axis: pixels `start` to `start + weights.size()`, and what each of them counts.
struct Tile {
    std::int64_t start;
    std::vector<float> weights;
};

/// The tiles of an axis of `length` pixels: one where `tile` covers it. `overlap`: pixels that neighbours share, at
/// most half a tile where there are several. Throws Error for other numbers.
std::vector<Tile> cut(std::int64_t length, std::int64_t tile, std::int64_t overlap);

}  // namespace derainer
