/// The image contract, to the bit that of runtime/session.py, over any network: divide by 255, pad right and bottom,
/// run whole or in tiles, clamp to [0, 1], crop, multiply by 255, round half to even.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common.hpp"
#include "manifest.hpp"
#include "tiling.hpp"

namespace derainer {

/// An image to restore. `rgb`: `height` rows of `width` pixels of 3 bytes each, red first, rows `stride` bytes apart;
/// `out`: where the restored image goes, with the same stride. Both may be the same.
struct Image {
    const std::uint8_t* rgb;
    std::int64_t height;
    std::int64_t width;
    std::size_t stride;
    std::uint8_t* out;
};

/// Throws Error for an image without pixels, with rows that overlap, or larger than any memory.
void check(const Image& image);

/// An image, to which size it is padded, and the tiles in which it is run.
struct Task {
    Image image;
    Cut cut;
};

/// A network on some device that can work on a tile in one lane while the host fills or empties another.
class Network {
public:
    Network() = default;
    Network(const Network&) = delete;
    Network& operator=(const Network&) = delete;
    virtual ~Network() = default;

    /// What `input` and `finish` point to: float32 (3, H, W) or uint8 (H, W, 3).
    virtual Io io() const = 0;
    virtual std::size_t lanes() const = 0;

    /// Where the input of that size belongs.
    virtual void* input(std::size_t lane, Size size) = 0;
    /// Begin to work on what is there.
    virtual void start(std::size_t lane, Size size) = 0;
    /// Wait for the answer, which stays until the next `start`.
    virtual const void* finish(std::size_t lane) = 0;
};

/// Restore images, one after another, tiles left to right and top to bottom. Throws Error as `check`
/// does, and where the network answers with NaN or infinity.
void restore(Network& network, const std::vector<Task>& tasks);

/// A length rounded up to a multiple.
std::int64_t padded(std::int64_t length, std::int64_t multiple);

/// Which pixel stands at each place of an axis that is padded to `size`: a reflection without repeating the border, or
/// the border where the axis is not longer than its padding. Throws Error where `size` is less than `length`.
std::vector<std::int64_t> padded_index(std::int64_t length, std::int64_t size);

}  // namespace derainer
