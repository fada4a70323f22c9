/// The network that stands in for a real one in tests/golden/tiling.py, and the image that it is shown there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

/// float32 (3, height, width) to the same.
inline void stand_in(const float* input, float* output, std::size_t height, std::size_t width) {
    for (std::size_t c = 0; c < 3; ++c) {
        for (std::size_t y = 0; y < height; ++y) {
            for (std::size_t x = 0; x < width; ++x) {
                const std::size_t i = (c * height + y) * width + x;
                const float position = static_cast<float>((7 * y + 13 * x) % 32) / 31.0F;
                output[i] = 0.75F * input[i] + 0.25F * position;
            }
        }
    }
}

/// uint8 (height, width, 3), in rows `stride` bytes apart.
inline std::vector<std::uint8_t> golden_image(std::size_t height, std::size_t width, std::size_t stride) {
    std::vector<std::uint8_t> image(height * stride);
    for (std::size_t y = 0; y < height; ++y) {
        for (std::size_t x = 0; x < width; ++x) {
            for (std::size_t c = 0; c < 3; ++c) {
                image[y * stride + 3 * x + c] =
                    static_cast<std::uint8_t>((31 * y + 17 * x + 101 * c + (y * x) % 251) % 256);
            }
        }
    }
    return image;
}
