/// One contract for every engine, and the image contract on top of it, to the bit that of runtime/session.py: divide by
/// 255, pad right and bottom, run whole or in tiles, clamp to [0, 1], crop, multiply by 255, round half to even.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "pixels.hpp"
#include "tiling.hpp"

struct CUstream_st;

namespace derainer {

/// A network in one engine, ready to run. It can work on a tile in one lane while the host fills or empties another.
class Session {
public:
    Session() = default;
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    virtual ~Session() = default;

    /// Name of the file of the bundle that it runs.
    virtual std::string file() const { return {}; }
    /// The library, the device and its driver, in one line with their versions; empty where nothing tells.
    virtual std::string identity() const { return {}; }
    virtual GraphIo graph_io() const = 0;
    virtual std::size_t lanes() const = 0;
    /// The sizes that it takes, one pair of which is enough.
    virtual const std::vector<Limits>& limits() const = 0;

    /// How many images of a size it takes at once at most; `kUnlimited` where only memory bounds them.
    virtual std::int64_t max_batch(Size size) const = 0;

    /// Where the input of so many images of that size belongs, one behind the other.
    virtual void* input(std::size_t lane, Size size, std::int64_t images) = 0;
    /// Begin to work on that input. Where the network takes no fewer, the last image is repeated.
    virtual void start(std::size_t lane, Size size, std::int64_t images) = 0;
    /// Wait for the answer, which stays until the next `start`.
    virtual const void* finish(std::size_t lane) = 0;
    /// What the graph says of each image of that answer, see `kFinite`; null of a graph that does not tell.
    virtual const float* finite(std::size_t lane);

    /// Let the caller's CUDA stream work from the caller's input to the caller's output, both on the GPU, and come back
    /// at once. What the graph says of its answer goes to `finite`, also there, unless that is null. Throws InputError
    /// where the network does not run on a GPU, its graph does not tell, or it takes another number of images.
    virtual void enqueue(const void* input, void* output, Size size, CUstream_st* stream, float* finite,
                         std::int64_t images);
};

/// Repeat the last of so many images of `bytes` each until there are `least`.
void fill_up(void* input, std::size_t bytes, std::int64_t images, std::int64_t least);

/// An image, to which size it is padded, and the tiles in which it is run.
struct Task {
    Image image;
    Plan plan;
};

/// Throws InvalidImage for an image without pixels, with rows that overlap, or larger than any memory.
void check(const Image& image);

/// Restore images, one after another, tiles left to right and top to bottom. Neighbours of one padded size that need no
/// tiles go through the network together: `batch` at once, where it takes so many; for 0 as many as it takes, or one
/// where only memory bounds them. Throws InvalidImage as `check` does, and InvalidModel where the network answers with
/// NaN or infinity.
void restore(Session& session, const std::vector<Task>& tasks, std::int64_t batch = 0);

/// Which pixel stands at each place of an axis that is padded to `size`: a reflection without repeating the border, or
/// the border where the axis is not longer than its padding. Throws InputError where `size` is less than `length`.
std::vector<std::int64_t> padded_index(std::int64_t length, std::int64_t size);

}  // namespace derainer
