#include "session.hpp"

#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>
#include <utility>

#include "check.hpp"

namespace derainer {

namespace {

std::size_t index(std::int64_t value) { return static_cast<std::size_t>(value); }

float level_to_float(std::uint8_t level) { return static_cast<float>(level) / 255.0F; }

void expect_finite(float value) {
    DERAINER_CHECK(InvalidModel, std::isfinite(value),
                   "the network answered with NaN or infinity; if it runs in float16, export it in float32");
}

std::uint8_t to_level(float value) {
    expect_finite(value);
    return static_cast<std::uint8_t>(std::nearbyint(std::min(std::max(value, 0.0F), 1.0F) * 255.0F));
}

/// What is known of an image while its tiles are on their way.
class Restoration {
public:
    Restoration(const Task& task, GraphIo graph_io)
        : image_(task.image),
          graph_io_(graph_io),
          rows_(padded_index(image_.height, task.plan.size.height)),
          columns_(padded_index(image_.width, task.plan.size.width)),
          down_(split(task.plan.size.height, task.plan.tile.height, task.plan.overlap)),
          across_(split(task.plan.size.width, task.plan.tile.width, task.plan.overlap)),
          missing_(tiles()) {
        if (tiles() > 1) {
            sum_.resize(3 * rows_.size() * columns_.size());
        }
    }

    std::size_t tiles() const { return down_.size() * across_.size(); }

    Size size(std::size_t i) const {
        return {static_cast<std::int64_t>(down(i).weights.size()), static_cast<std::int64_t>(across(i).weights.size())};
    }

    /// Tile i of the padded image, as the graph's input.
    void feed(std::size_t i, void* input) const {
        const Size size = this->size(i);
        for (std::size_t y = 0; y < index(size.height); ++y) {
            const std::uint8_t* row = image_.rgb + index(rows_[index(down(i).start) + y]) * image_.stride;
            for (std::size_t x = 0; x < index(size.width); ++x) {
                const std::uint8_t* pixel = row + 3 * index(columns_[index(across(i).start) + x]);
                for (std::size_t c = 0; c < 3; ++c) {
                    const std::size_t place = graph_io_.index(size, c, y, x);
                    if (graph_io_.io == Io::image) {
                        static_cast<std::uint8_t*>(input)[place] = pixel[c];
                    } else if (graph_io_.io == Io::tensor16) {
                        static_cast<Half*>(input)[place] = to_half(level_to_float(pixel[c]));
                    } else {
                        static_cast<float*>(input)[place] = level_to_float(pixel[c]);
                    }
                }
            }
        }
    }

    /// Take the graph's output for tile i. After that for the last one, the image is written.
    void take(std::size_t i, const void* output) {
        if (tiles() == 1) {
            const Size size = this->size(i);
            write([&](std::size_t c, std::size_t y, std::size_t x) { return answer(output, size, c, y, x); });
            return;
        }
        blend(i, output);
        if (--missing_ == 0) {
            write([&](std::size_t c, std::size_t y, std::size_t x) { return sum(c, y, x); });
        }
    }

private:
    const Tile& down(std::size_t i) const { return down_[i / across_.size()]; }
    const Tile& across(std::size_t i) const { return across_[i % across_.size()]; }

    /// A value of the graph's output; of an image in steps of 1/255.
    float answer(const void* output, Size size, std::size_t c, std::size_t y, std::size_t x) const {
        const std::size_t place = graph_io_.index(size, c, y, x);
        if (graph_io_.io == Io::image) {
            return level_to_float(static_cast<const std::uint8_t*>(output)[place]);
        }
        return graph_io_.io == Io::tensor16 ? to_float(static_cast<const Half*>(output)[place])
                                            : static_cast<const float*>(output)[place];
    }

    void blend(std::size_t i, const void* output) {
        const Tile& down = this->down(i);
        const Tile& across = this->across(i);
        const Size size = this->size(i);
        for (std::size_t c = 0; c < 3; ++c) {
            for (std::size_t y = 0; y < down.weights.size(); ++y) {
                float* row = &sum_[(c * rows_.size() + index(down.start) + y) * columns_.size() + index(across.start)];
                for (std::size_t x = 0; x < across.weights.size(); ++x) {
                    const float weight = down.weights[y] * across.weights[x];
                    row[x] += weight * answer(output, size, c, y, x);
                }
            }
        }
    }

    float sum(std::size_t c, std::size_t y, std::size_t x) const {
        return sum_[(c * rows_.size() + y) * columns_.size() + x];
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
    const GraphIo graph_io_;
    const std::vector<std::int64_t> rows_;
    const std::vector<std::int64_t> columns_;
    const std::vector<Tile> down_;
    const std::vector<Tile> across_;
    std::size_t missing_;
    std::vector<float> sum_;  // (3, H, W) of the padded image
};

/// A tile of an image.
struct Part {
    std::shared_ptr<Restoration> restoration;
    std::size_t tile;
};

/// Tiles of one size that go through the network together, in a lane.
struct Job {
    std::vector<Part> parts;
    Size size;
    std::size_t lane;
};

}  // namespace

const float* Session::finite(std::size_t) { return nullptr; }

void Session::enqueue(const void*, void*, Size, CUstream_st*, float*, std::int64_t) {
    throw InputError("expected a network on a GPU to work on a CUDA stream, found one on the CPU; use run", "enqueue");
}

void check(const Image& image) {
    DERAINER_CHECK(InvalidImage, image.rgb != nullptr && image.out != nullptr,
                   "expected an image, found a null pointer");
    DERAINER_CHECK(InvalidImage, image.height >= 1 && image.width >= 1,
                   "expected an image of at least one pixel, found " + to_string(Size{image.height, image.width}));
    DERAINER_CHECK(InvalidImage, image.stride / 3 >= index(image.width),
                   "expected rows of at least 3 x " + std::to_string(image.width) + " bytes, found a stride of " +
                       std::to_string(image.stride));
    DERAINER_CHECK(InvalidImage, index(image.height) <= PTRDIFF_MAX / image.stride,
                   "expected an image that memory can hold, found " + to_string(Size{image.height, image.width}));
}

void fill_up(void* input, std::size_t bytes, std::int64_t images, std::int64_t least) {
    auto* place = static_cast<std::uint8_t*>(input) + index(images) * bytes;
    for (; images < least; ++images) {
        std::copy_n(place - bytes, bytes, place);
        place += bytes;
    }
}

void restore(Session& session, const std::vector<Task>& tasks, std::int64_t batch) {
    const GraphIo graph_io = session.graph_io();
    std::deque<Job> pending;
    const auto finish_first = [&] {
        const Job& job = pending.front();
        const auto* output = static_cast<const std::uint8_t*>(session.finish(job.lane));
        const float* finite = session.finite(job.lane);
        for (std::size_t i = 0; i < job.parts.size(); ++i) {
            expect_finite(finite == nullptr ? 0 : finite[i]);
            job.parts[i].restoration->take(job.parts[i].tile, output + i * graph_io.bytes(job.size));
        }
        pending.pop_front();
    };
    Job next{{}, {}, 0};
    const auto start = [&] {
        if (next.parts.empty()) {
            return;
        }
        if (pending.size() == session.lanes()) {
            finish_first();
        }
        const auto images = static_cast<std::int64_t>(next.parts.size());
        auto* input = static_cast<std::uint8_t*>(session.input(next.lane, next.size, images));
        for (std::size_t i = 0; i < next.parts.size(); ++i) {
            next.parts[i].restoration->feed(next.parts[i].tile, input + i * graph_io.bytes(next.size));
        }
        session.start(next.lane, next.size, images);
        const std::size_t lane = (next.lane + 1) % session.lanes();
        pending.push_back(std::exchange(next, {{}, {}, lane}));
    };
    const auto most_at_once = [&](Size size) {
        const std::int64_t most = session.max_batch(size);
        if (batch > 0) {
            return std::min(batch, most);
        }
        return most == kUnlimited ? 1 : most;
    };
    for (const Task& task : tasks) {
        check(task.image);
        const auto restoration = std::make_shared<Restoration>(task, graph_io);
        for (std::size_t i = 0; i < restoration->tiles(); ++i) {
            const Size size = restoration->size(i);
            if (size != next.size) {
                start();
            }
            next.size = size;
            next.parts.push_back({restoration, i});
            const std::int64_t most = restoration->tiles() == 1 ? most_at_once(size) : 1;
            if (static_cast<std::int64_t>(next.parts.size()) >= most) {
                start();
            }
        }
    }
    start();
    while (!pending.empty()) {
        finish_first();
    }
}

std::vector<std::int64_t> padded_index(std::int64_t length, std::int64_t size) {
    DERAINER_CHECK(
        InputError, length <= size,
        "expected at least " + std::to_string(length) + " pixels to pad an axis to, found " + std::to_string(size));
    const std::int64_t padding = size - length;
    std::vector<std::int64_t> indices;
    for (std::int64_t i = 0; i < size; ++i) {
        const std::int64_t beyond = length > padding ? 2 * (length - 1) - i : length - 1;
        indices.push_back(i < length ? i : beyond);
    }
    return indices;
}

}  // namespace derainer
