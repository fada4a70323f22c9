/// A session on the host for tests: answers `function` in any number of lanes, as late as it may.
#pragma once

#include <functional>
#include <vector>

#include "session.hpp"

class HostSession final : public derainer::Session {
public:
    using Function = std::function<void(const float*, float*, std::size_t height, std::size_t width)>;

    explicit HostSession(Function function, std::size_t lanes = 2, std::int64_t most = 1)
        : function_(std::move(function)), most_(most), lanes_(lanes) {}

    derainer::GraphIo graph_io() const override { return {derainer::Io::tensor, 1}; }
    std::size_t lanes() const override { return lanes_.size(); }
    const std::vector<derainer::Limits>& limits() const override { return limits_; }

    std::int64_t max_batch(derainer::Size) const override { return most_; }

    void* input(std::size_t lane, derainer::Size size, std::int64_t images) override {
        lanes_[lane].input.assign(static_cast<std::size_t>(images * 3 * size.height * size.width), -1.0F);
        return lanes_[lane].input.data();
    }

    void start(std::size_t lane, derainer::Size size, std::int64_t images) override {
        lanes_[lane].size = size;
        started.push_back(images);
    }

    const void* finish(std::size_t i) override {
        Lane& lane = lanes_[i];
        lane.output.resize(lane.input.size());
        const auto height = static_cast<std::size_t>(lane.size.height);
        const auto width = static_cast<std::size_t>(lane.size.width);
        for (std::size_t place = 0; place < lane.input.size(); place += 3 * height * width) {
            function_(lane.input.data() + place, lane.output.data() + place, height, width);
        }
        return lane.output.data();
    }

    std::vector<std::int64_t> started;  // images at once

private:
    struct Lane {
        derainer::Size size;
        std::vector<float> input;
        std::vector<float> output;
    };

    const std::vector<derainer::Limits> limits_{{{1, 1}, {derainer::kUnlimited, derainer::kUnlimited}}};
    Function function_;
    std::int64_t most_;
    std::vector<Lane> lanes_;
};
