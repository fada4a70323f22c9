/// Which tiles an image is cut into, and with which weights they are put together again.
///
/// To the bit what runtime/tiling.py does, which says why: tiles of one size at regular starts, the last one shifted
/// inside; weights rise smoothly over the overlap and sum to 1 at every pixel, so that nothing has to be divided
/// afterwards.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pixels.hpp"

namespace derainer {

/// Pixels that neighbouring tiles share if nothing else is asked for, or a quarter of the largest tile's shorter side
/// if that is less.
inline constexpr std::int64_t kOverlap = 64;

/// A side of which a network takes any length.
inline constexpr std::int64_t kUnlimited = INT64_MAX;

/// The smallest and the largest size that a network takes.
struct Limits {
    Size min;
    Size max;
};

/// As in "64x64 to 256x512 or 8x8 to 32xany".
std::string to_string(const std::vector<Limits>& limits);

/// How an image is cut. The image as a whole is one tile of its own size. `size`: of the padded image; `tile`: of every
/// tile, where a side that is not shorter than the image's does not cut it; `overlap`: pixels that neighbours share, at
/// most half of a side that does.
struct Plan {
    Size size;
    Size tile;
    std::int64_t overlap;
};

/// The whole image where a network takes it, else the fewest tiles. An image that is smaller than the network takes is
/// padded further, within those limits for which it grows least. `size`: of the image, already padded to `multiple`;
/// `limits`: of the network, one pair of which is enough; `tile`: the size of tiles where it is asked for, of which a
/// side that is longer than the image is cut; `overlap`: where it is asked for, at most half a tile. Throws InputError
/// for a tile that is not in multiples, and where no tiles are within the limits.
Plan plan(Size size, std::int64_t multiple, const std::vector<Limits>& limits, std::optional<Size> tile = std::nullopt,
          std::optional<std::int64_t> overlap = std::nullopt);

/// A tile of one axis: pixels `start` to `start + weights.size()`, and what each of them counts.
struct Tile {
    std::int64_t start;
    std::vector<float> weights;
};

/// The tiles of an axis of `length` pixels: one where `tile` covers it. `overlap`: pixels that neighbours share, at
/// most half a tile where there are several. Throws InputError for other numbers.
std::vector<Tile> split(std::int64_t length, std::int64_t tile, std::int64_t overlap);

}  // namespace derainer
