/// Which engine of a bundle runs on a GPU, which of its profiles an image uses, and in which tiles.
#pragma once

#include <optional>
#include <string>

#include "manifest.hpp"
#include "tiling.hpp"

namespace derainer {

/// Pixels that neighbouring tiles share if nothing else is asked for, and no more than a quarter of the tile's shorter
/// side.
inline constexpr std::int64_t kOverlap = 64;

/// The newest engine of a bundle that fits and has its weights. `flavor`: "rtx" or "tensorrt", and `version` of that
/// library, in full; `capability`: of the GPU, such as "8.9". Throws Error where none fits.
const Engine& choose_engine(const Bundle& bundle, const std::string& flavor, const std::string& version,
                            const std::string& capability);

/// Index of the first profile that takes a size. Throws Error where none does.
std::size_t choose_profile(const Engine& engine, Size size);

/// The whole image where a profile takes it, else the fewest tiles. An image that is smaller than a profile's smallest
/// size is padded to that, and the profile is taken for which it grows least. `size`: of the image, already padded to
/// `multiple`; `tile`: its size, if it is asked for, 0x0 for none, where a side that is longer than the image is cut;
/// `overlap`: if it is asked for, at most half a tile. Throws Error for a tile that is not in multiples, and for a tile
/// or an overlap that suits no profile.
Cut choose_tiles(const Engine& engine, Size size, std::int64_t multiple, Size tile,
                 std::optional<std::int64_t> overlap);

}  // namespace derainer
