#include "restore.hpp"

#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>

namespace derainer {

namespace {

std::size_t index(std::int64_t value) { return static_cast<std::size_t>(value); }

float to_float(std::uint8_t level) { return static_cast<float>(level) / 255.0F; }

std::uint8_t to_level(float value) {
    DERAINER_CHECK(std::isfinite(value),
                   "the network answered with NaN or infinity; if it runs in float16, export it in float32");
    return static_cast<std::uint8_t>(std::nearbyint(std::min(std::max(value, 0.0F), 1.0F) * 255.0F));
}

/// What is known of an image while its tiles are on their way.
class Restoration {
public:
    Restoration(const Task& task, const Network& network)
        : image_(task.image),
          io_(network.io()),
          rows_(padded_index(image_.height, task.cut.size.height)),
          columns_(padded_index(image_.width, task.cut.size.width)),
          down_(cut(task.cut.size.height, task.cut.tile.height, task.cut.overlap)),
          across_(cut(task.cut.size.width, task.cut.tile.width, task.cut.overlap)),
          missing_(tiles()) {
        if (tiles() > 1) {
            sum_.resize(3 * rows_.size() * columns_.size());
        }
    }

    std::size_t tiles() const { return down_.size() * across_.size(); }

    Size size(std::size_t i) const {
        return {static_cast<std::int64_t>(down(i).weights.size()), static_cast<std::int64_t>(across(i).weights.size())};
    }

    /// Tile i of the padded image, as the network takes it.
    void fill(std::size_t i, void* input) const {
        const std::size_t height = down(i).weights.size();
        const std::size_t width = across(i).weights.size();
        for (std::size_t y = 0; y < height; ++y) {
            const std::uint8_t* row = image_.rgb + index(rows_[index(down(i).start) + y]) * image_.stride;
            for (std::size_t x = 0; x < width; ++x) {
                const std::uint8_t* pixel = row + 3 * index(columns_[index(across(i).start) + x]);
                for (std::size_t c = 0; c < 3; ++c) {
                    if (io_ == Io::image) {
                        static_cast<std::uint8_t*>(input)[(y * width + x) * 3 + c] = pixel[c];
                    } else {
                        static_cast<float*>(input)[(c * height + y) * width + x] = to_float(pixel[c]);
                    }
                }
            }
        }
    }

    /// The network's answer to tile i. After that to the last one, the image is written.
    void take(std::size_t i, const void* output) {
        if (tiles() == 1) {
            write([&](std::size_t c, std::size_t y, std::size_t x) { return value(i, output, c, y, x); });
            return;
        }
        add(i, output);
        if (--missing_ == 0) {
            const std::size_t height = rows_.size();
            const std::size_t width = columns_.size();
            write([&](std::size_t c, std::size_t y, std::size_t x) { return sum_[(c * height + y) * width + x]; });
        }
    }

private:
    const Tile& down(std::size_t i) const { return down_[i / across_.size()]; }
    const Tile& across(std::size_t i) const { return across_[i % across_.size()]; }

    float value(std::size_t i, const void* output, std::size_t c, std::size_t y, std::size_t x) const {
        const std::size_t height = down(i).weights.size();
        const std::size_t width = across(i).weights.size();
        return io_ == Io::image ? to_float(static_cast<const std::uint8_t*>(output)[(y * width + x) * 3 + c])
                                : static_cast<const float*>(output)[(c * height + y) * width + x];
    }

    void add(std::size_t i, const void* output) {
        const Tile& down = this->down(i);
        const Tile& across = this->across(i);
        for (std::size_t c = 0; c < 3; ++c) {
            for (std::size_t y = 0; y < down.weights.size(); ++y) {
                float* row = &sum_[(c * rows_.size() + index(down.start) + y) * columns_.size() + index(across.start)];
                for (std::size_t x = 0; x < across.weights.size(); ++x) {
                    const float weight = down.weights[y] * across.weights[x];
                    row[x] += weight * value(i, output, c, y, x);
                }
            }
        }
    }

    template <class Value>
    void write(Value value) const {
        for (std::size_t y = 0; y < index(image_.height); ++y) {
            std::uint8_t* row = image_.out + y * image_.stride;
            for (std::size_t x = 0; x < index(image_.width); ++x) {
                for (std::size_t c = 0; c < 3; ++c) {
                    row[3 * x + c] = to_level(value(c, y, x));
                }
            }
        }
    }

    const Image image_;
    const Io io_;
    const std::vector<std::int64_t> rows_;
    const std::vector<std::int64_t> columns_;
    const std::vector<Tile> down_;
    const std::vector<Tile> across_;
    std::size_t missing_;
    std::vector<float> sum_;  // (3, H, W) of the padded image
};

/// Tile `tile` of an image, in a lane.
struct Job {
    std::shared_ptr<Restoration> restoration;
    std::size_t tile;
    std::size_t lane;
};

}  // namespace

void check(const Image& image) {
    DERAINER_CHECK(image.rgb != nullptr && image.out != nullptr, "expected an image, found a null pointer");
    DERAINER_CHECK(image.height >= 1 && image.width >= 1,
                   "expected an image of at least one pixel, found " + to_string(Size{image.height, image.width}));
    DERAINER_CHECK(image.stride / 3 >= index(image.width),
                   "expected rows of at least 3 x " + std::to_string(image.width) + " bytes, found a stride of " +
                       std::to_string(image.stride));
    DERAINER_CHECK(index(image.height) <= PTRDIFF_MAX / image.stride,
                   "expected an image that memory can hold, found " + to_string(Size{image.height, image.width}));
}

void restore(Network& network, const std::vector<Task>& tasks) {
    std::deque<Job> pending;
    const auto finish_first = [&] {
        const Job& job = pending.front();
        job.restoration->take(job.tile, network.finish(job.lane));
        pending.pop_front();
    };
    std::size_t lane = 0;
    for (const Task& task : tasks) {
        check(task.image);
        const auto restoration = std::make_shared<Restoration>(task, network);
        for (std::size_t i = 0; i < restoration->tiles(); ++i) {
            if (pending.size() == network.lanes()) {
                finish_first();
            }
            const Size size = restoration->size(i);
            restoration->fill(i, network.input(lane, size));
            network.start(lane, size);
            pending.push_back({restoration, i, lane});
            lane = (lane + 1) % network.lanes();
        }
    }
    while (!pending.empty()) {
        finish_first();
    }
}

std::int64_t padded(std::int64_t length, std::int64_t multiple) {
    return (length + multiple - 1) / multiple * multiple;
}

std::vector<std::int64_t> padded_index(std::int64_t length, std::int64_t size) {
    DERAINER_CHECK(length <= size, "expected at least " + std::to_string(length) + " pixels to pad an axis to, found " +
                                       std::to_string(size));
    const std::int64_t padding = size - length;
    std::vector<std::int64_t> indices;
    for (std::int64_t i = 0; i < size; ++i) {
        const std::int64_t beyond = length > padding ? 2 * (length - 1) - i : length - 1;
        indices.push_back(i < length ? i : beyond);
    }
    return indices;
}

}  // namespace derainer
