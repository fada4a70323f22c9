#include "tiling.hpp"

#include <algorithm>
#include <utility>

#include "check.hpp"

namespace derainer {

namespace {

/// Whether the tiles of an axis may share so many pixels.
bool may_share(std::int64_t length, std::int64_t tile, std::int64_t overlap) {
    return overlap >= 0 && (length <= tile || overlap <= tile / 2);
}

std::int64_t count(std::int64_t length, std::int64_t tile, std::int64_t overlap) {
    return length <= tile ? 1 : (length - overlap + tile - overlap - 1) / (tile - overlap);
}

/// Exact for whatever memory holds, and beyond that no overflow.
double product(std::int64_t a, std::int64_t b) { return static_cast<double>(a) * static_cast<double>(b); }

std::string side(std::int64_t most) { return most == kUnlimited ? "any" : std::to_string(most); }

/// Weight at `distance` pixels, 0 or more, from a border of a tile that lies inside the image.
double ramp(std::int64_t distance, std::int64_t overlap) {
    if (overlap == 0) {
        return 1.0;
    }
    const double t = std::min(1.0, (static_cast<double>(distance) + 0.5) / static_cast<double>(overlap));
    return t * t * (3.0 - 2.0 * t);
}

}  // namespace

std::string to_string(const std::vector<Limits>& limits) {
    std::string text;
    for (const Limits& limit : limits) {
        text += (text.empty() ? "" : " or ") + to_string(limit.min) + " to " + side(limit.max.height) + "x" +
                side(limit.max.width);
    }
    return text;
}

Plan plan(Size size, std::int64_t multiple, const std::vector<Limits>& limits, std::optional<Size> tile,
          std::optional<std::int64_t> overlap) {
    DERAINER_CHECK(InputError, !tile || (tile->height > 0 && tile->width > 0 && is_multiple(*tile, multiple)),
                   "expected tiles in multiples of " + std::to_string(multiple) + " pixels, found " + to_string(*tile));
    std::optional<Plan> best;
    std::pair<double, double> least;
    for (const Limits& limit : limits) {
        const Size most = tile.value_or(limit.max);
        const Size grown{std::max(size.height, limit.min.height), std::max(size.width, limit.min.width)};
        const Plan plan{grown,
                        {std::min(grown.height, most.height), std::min(grown.width, most.width)},
                        overlap.value_or(std::min(kOverlap, std::min(most.height, most.width) / 4))};
        if (!is_between(plan.tile, limit.min, limit.max) || !may_share(grown.height, plan.tile.height, plan.overlap) ||
            !may_share(grown.width, plan.tile.width, plan.overlap)) {
            continue;
        }
        const std::pair<double, double> cost{product(grown.height, grown.width),
                                             product(count(grown.height, plan.tile.height, plan.overlap),
                                                     count(grown.width, plan.tile.width, plan.overlap))};
        if (!best || cost < least) {
            best = plan;
            least = cost;
        }
    }
    const std::string tiles = tile ? " in tiles of " + to_string(*tile) : "";
    const std::string shared = overlap ? " with an overlap of " + std::to_string(*overlap) : "";
    DERAINER_CHECK(InputError, best.has_value(),
                   "the network takes images of height x width " + to_string(limits) + ", found " + to_string(size) +
                       tiles + shared + "; give other tiles, or build it for other sizes");
    return *best;
}

std::vector<Tile> split(std::int64_t length, std::int64_t tile, std::int64_t overlap) {
    DERAINER_CHECK(InputError, length >= 1 && tile >= 1 && may_share(length, tile, overlap),
                   "expected tiles with an overlap of at most half of them, found tiles of " + std::to_string(tile) +
                       " pixels with an overlap of " + std::to_string(overlap));
    if (length <= tile) {
        return {{0, std::vector<float>(static_cast<std::size_t>(length), 1.0F)}};
    }
    const std::int64_t tiles = count(length, tile, overlap);
    const auto start = [&](std::int64_t i) { return std::min(i * (tile - overlap), length - tile); };
    const auto weight = [&](std::int64_t i, std::int64_t k) {
        const double before = start(i) == 0 ? 1.0 : ramp(k, overlap);
        const double after = start(i) == length - tile ? 1.0 : ramp(tile - 1 - k, overlap);
        return before * after;
    };
    std::vector<double> sums(static_cast<std::size_t>(length));
    for (std::int64_t i = 0; i < tiles; ++i) {
        for (std::int64_t k = 0; k < tile; ++k) {
            sums[static_cast<std::size_t>(start(i) + k)] += weight(i, k);
        }
    }
    std::vector<Tile> result;
    for (std::int64_t i = 0; i < tiles; ++i) {
        result.push_back({start(i), {}});
        for (std::int64_t k = 0; k < tile; ++k) {
            const double sum = sums[static_cast<std::size_t>(start(i) + k)];
            result.back().weights.push_back(static_cast<float>(weight(i, k) / sum));
        }
    }
    return result;
}

}  // namespace derainer
