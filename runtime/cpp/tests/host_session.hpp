/// A session on the host for tests: answers `function` in any number of lanes, as late as it may.
#pragma once

#include <functional>
#include <vector>

#include "session.hpp"

class HostSession final : public derainer::Session {
public:
    using Function = std::function<void(const float*, float*, std::size_t height, std::size_t width)>;

    explicit HostSession(Function function, std::size_t lanes = 2) : function_(std::move(function)), lanes_(lanes) {}

    derainer::GraphIo graph_io() const override { return {derainer::Io::tensor, 1}; }
    std::size_t lanes() const override { return lanes_.size(); }
    const std::vector<derainer::Limits>& limits() const override { return limits_; }

    void* input(std::size_t lane, derainer::Size size) override {
        lanes_[lane].input.assign(static_cast<std::size_t>(3 * size.height * size.width), -1.0F);
        return lanes_[lane].input.data();
    }

    void start(std::size_t lane, derainer::Size size) override { lanes_[lane].size = size; }

    const void* finish(std::size_t i) override {
        Lane& lane = lanes_[i];
        lane.output.resize(lane.input.size());
        function_(lane.input.data(), lane.output.data(), static_cast<std::size_t>(lane.size.height),
                  static_cast<std::size_t>(lane.size.width));
        return lane.output.data();
    }

private:
    struct Lane {
        derainer::Size size;
        std::vector<float> input;
        std::vector<float> output;
    };

    const std::vector<derainer::Limits> limits_{{{1, 1}, {derainer::kUnlimited, derainer::kUnlimited}}};
    Function function_;
    std::vector<Lane> lanes_;
};
