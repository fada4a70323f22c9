/// Pixels as people store them and as networks take them: sizes, images, and what a graph eats.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>

namespace derainer {

/// In pixels.
struct Size {
    std::int64_t height = 0;
    std::int64_t width = 0;
};

inline bool operator==(Size a, Size b) { return a.height == b.height && a.width == b.width; }
inline bool operator!=(Size a, Size b) { return !(a == b); }

inline bool is_multiple(Size size, std::int64_t of) { return size.height % of == 0 && size.width % of == 0; }

/// Whether height and width both are from the smallest to the largest.
inline bool is_between(Size size, Size min, Size max) {
    return min.height <= size.height && size.height <= max.height && min.width <= size.width && size.width <= max.width;
}

inline std::string to_string(Size size) { return std::to_string(size.height) + "x" + std::to_string(size.width); }

/// An image to restore. `rgb`: `height` rows of `width` pixels of 3 bytes each, red first, rows `stride` bytes apart;
/// `out`: where the restored image goes, with the same stride. Both may be the same.
struct Image {
    const std::uint8_t* rgb;
    std::int64_t height;
    std::int64_t width;
    std::size_t stride;
    std::uint8_t* out;
};

/// What a graph takes and gives: float32 or float16 (B, 3, H, W) RGB in [0, 1], or uint8 (B, H, W, 3) RGB.
enum class Io { tensor, tensor16, image };

/// Name of the second output of a graph of images, whose clamp hides NaN: float32 (B), finite exactly where every
/// number of the answer to an image was before it was clamped. Graphs that were exported before there was such have
/// only `output`.
inline constexpr const char* kFinite = "finite";

/// The bits of a float16.
using Half = std::uint16_t;

/// The float16 nearest to a value that is 0 or from 2^-14 to 1, as all levels of 8 bits are.
inline Half to_half(float value) {
    if (value == 0.0F) {
        return 0;
    }
    int exponent = 0;
    const float mantissa = std::frexp(value, &exponent);  // in [0.5, 1), 11 bits of which stay
    return static_cast<Half>((exponent + 13) * 1024 + std::lrint(std::ldexp(mantissa, 11)));
}

inline float to_float(Half half) {
    const int exponent = half >> 10 & 31;
    const int fraction = half & 1023;
    const float sign = half >> 15 == 0 ? 1.0F : -1.0F;
    if (exponent == 31) {
        return fraction == 0 ? sign * HUGE_VALF : NAN;
    }
    const int mantissa = exponent == 0 ? fraction : fraction + 1024;
    return sign * std::ldexp(static_cast<float>(mantissa), std::max(exponent, 1) - 25);
}

/// In place of a number of images: any.
inline constexpr std::int64_t kAny = -1;

/// What a graph eats: tensors or images, whose height and width have to be multiples of `multiple`, which is 1 where
/// any size will do; `batch` of them at once, neither more nor less, or `kAny`.
struct GraphIo {
    Io io;
    std::int64_t multiple;
    std::int64_t batch = 1;

    /// The smallest size that the graph takes and that an image of this size fits into.
    Size padded(Size size) const {
        const auto rounded_up = [&](std::int64_t length) { return (length + multiple - 1) / multiple * multiple; };
        return {rounded_up(size.height), rounded_up(size.width)};
    }

    /// The shape of input and output for so many images of a height and width.
    std::array<std::int64_t, 4> shape(Size size, std::int64_t images = 1) const {
        return io == Io::image ? std::array<std::int64_t, 4>{images, size.height, size.width, 3}
                               : std::array<std::int64_t, 4>{images, 3, size.height, size.width};
    }

    /// How much memory the input takes for each image, and the output.
    std::size_t bytes(Size size) const {
        const std::size_t of_one = io == Io::image      ? sizeof(std::uint8_t)
                                   : io == Io::tensor16 ? sizeof(Half)
                                                        : sizeof(float);
        return 3 * static_cast<std::size_t>(size.height) * static_cast<std::size_t>(size.width) * of_one;
    }

    /// Which of the numbers of an image, in input and output, is that of a channel (0 to 2) of the pixel in row `y` and
    /// column `x`.
    std::size_t index(Size size, std::size_t channel, std::size_t y, std::size_t x) const {
        const auto height = static_cast<std::size_t>(size.height);
        const auto width = static_cast<std::size_t>(size.width);
        return io == Io::image ? (y * width + x) * 3 + channel : (channel * height + y) * width + x;
    }
};

}  // namespace derainer
