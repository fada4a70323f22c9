#include "tiling.hpp"

#include <algorithm>
#include <string>

namespace derainer {

namespace {

/// Weight at `distance` pixels, 0 or more, from a border of a tile that lies inside the image.
double rise(std::int64_t distance, std::int64_t overlap) {
    if (overlap == 0) {
        return 1.0;
    }
    const double t = std::min(1.0, (static_cast<double>(distance) + 0.5) / static_cast<double>(overlap));
    return t * t * (3.0 - 2.0 * t);
}

}  // namespace

std::vector<Tile> cut(std::int64_t length, std::int64_t tile, std::int64_t overlap) {
    DERAINER_CHECK(length >= 1 && tile >= 1 && overlap >= 0 && (length <= tile || overlap <= tile / 2),
                   "expected tiles with an overlap of at most half of them, found tiles of " + std::to_string(tile) +
                       " pixels with an overlap of " + std::to_string(overlap));
    if (length <= tile) {
        return {{0, std::vector<float>(static_cast<std::size_t>(length), 1.0F)}};
    }
    const std::int64_t step = tile - overlap;
    const std::int64_t count = (length - overlap + step - 1) / step;
    const auto start = [&](std::int64_t i) { return std::min(i * step, length - tile); };
    const auto weight = [&](std::int64_t i, std::int64_t k) {
        const double before = start(i) == 0 ? 1.0 : rise(k, overlap);
        const double after = start(i) == length - tile ? 1.0 : rise(tile - 1 - k, overlap);
        return before * after;
    };
    std::vector<double> sums(static_cast<std::size_t>(length));
    for (std::int64_t i = 0; i < count; ++i) {
        for (std::int64_t k = 0; k < tile; ++k) {
            sums[static_cast<std::size_t>(start(i) + k)] += weight(i, k);
        }
    }
    std::vector<Tile> tiles;
    for (std::int64_t i = 0; i < count; ++i) {
        tiles.push_back({start(i), {}});
        for (std::int64_t k = 0; k < tile; ++k) {
            const double sum = sums[static_cast<std::size_t>(start(i) + k)];
            tiles.back().weights.push_back(static_cast<float>(weight(i, k) / sum));
        }
    }
    return tiles;
}

}  // namespace derainer
