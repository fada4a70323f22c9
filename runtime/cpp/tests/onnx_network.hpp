/// A network as the bytes of an ONNX model, written without a library for it.
#pragma once

#include <string>

namespace onnx_network {

inline std::string number(std::size_t value) {
    std::string bytes;
    for (; value >= 128; value >>= 7) {
        bytes += static_cast<char>(value | 128U);
    }
    return bytes + static_cast<char>(value);
}

/// A field of protobuf.
inline std::string field(std::size_t name, std::size_t value) { return number(name << 3U) + number(value); }

inline std::string field(std::size_t name, const std::string& content) {
    return number(name << 3U | 2U) + number(content.size()) + content;
}

/// A float32, as its four bytes.
inline std::string scalar(const std::string& name, const std::string& bytes) {
    return field(5, field(2, 1) + field(8, name) + field(9, bytes));
}

inline std::string node(const std::string& kind, const std::string& a, const std::string& b,
                        const std::string& result) {
    return field(1, field(1, a) + (b.empty() ? "" : field(1, b)) + field(2, result) + field(4, kind));
}

/// So many float32 images, 0 for any number: input (field 11) or output (12) of a graph.
inline std::string images(std::size_t place, const std::string& name, std::size_t batch) {
    const std::string count = batch == 0 ? field(2, "B") : field(1, batch);
    const std::string shape =
        field(1, count) + field(1, field(1, 3)) + field(1, field(2, "H")) + field(1, field(2, "W"));
    return field(place, field(1, name) + field(2, field(1, field(1, 1) + field(2, shape))));
}

/// Half of the image and a quarter of each colour's mean, which is another in every tile.
inline std::string mean(std::size_t batch = 1) {
    using namespace std::string_literals;
    const std::string graph = node("GlobalAveragePool", "input", "", "mean") + node("Mul", "mean", "quarter", "a") +
                              node("Mul", "input", "half", "b") + node("Add", "a", "b", "output") + field(2, "mean"s) +
                              scalar("quarter", "\x00\x00\x80\x3E"s) + scalar("half", "\x00\x00\x00\x3F"s) +
                              images(11, "input", batch) + images(12, "output", batch);
    return field(1, 8) + field(7, graph) + field(8, field(1, ""s) + field(2, 17));
}

}  // namespace onnx_network
