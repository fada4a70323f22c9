/// The manifest of a bundle: what every file in it is. Pure: nothing here touches a disk.
///
/// The format is that of runtime/manifest.py. What that refuses, this does too; besides, it takes only UTF-8, numbers
/// of 64 bits and 64 levels of nesting. A reader that meets another schema, or any field that it does not know, refuses
/// the bundle rather than guess.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "pixels.hpp"

namespace derainer {

inline constexpr std::int64_t kSchema = 1;
inline constexpr std::int64_t kMaxMultiple = 1024;  // a larger one would have small images padded to huge ones
inline constexpr std::int64_t kMaxCanary = 16384;   // pixels that a side of a canary may have
inline constexpr std::int64_t kMaxBatch = 1024;     // images that a graph or an engine may take at once
inline constexpr const char* kManifest = "manifest.json";
inline constexpr const char* kSignature = "manifest.json.sig";

/// A file of the bundle. `name` is a plain name, without folders; `size` is in bytes; `role` is "onnx", "engine",
/// "canary" or "report".
struct File {
    std::string name;
    std::string sha256;
    std::int64_t size;
    std::string role;
};

/// The network: the name of its ONNX file, and what its graph eats.
struct Model {
    std::string file;
    GraphIo graph_io;
};

/// Sizes that an engine takes, from `min` to `max`, which are in multiples, and those it is fastest at. `batch`: images
/// at once, the least, those it is fastest at and the most.
struct Profile {
    Size min;
    Size opt;
    Size max;
    std::array<std::int64_t, 3> batch{1, 1, 1};

    /// Whether so many images of this size, already padded, fit at once; fewer than the least can be filled up.
    bool takes(Size size, std::int64_t images = 1) const;
};

/// A plan: the network compiled by one version of a library for some GPUs. `flavor` is "rtx" or "tensorrt", `flags` are
/// the names of the builder's options that were on.
struct Engine {
    std::string file;
    std::string flavor;
    std::string version;
    std::vector<std::string> compute_capabilities;
    std::vector<Profile> profiles;
    std::set<std::string> flags;

    /// Index of the first profile that takes so many images of this size, already padded; none where none does.
    std::optional<std::size_t> profile_for(Size size, std::int64_t images = 1) const;

    /// How many images of this size, already padded, it takes at once at most; 0 where it takes none.
    std::int64_t max_batch(Size size) const;
};

/// A known answer: two images without a header, uint8 (2, height, width, 3) RGB, the input and what the model answers
/// in float32. `floor_db` is the least PSNR over RGB, in dB, between this answer and another that rounding can explain.
struct Canary {
    std::string file;
    Size size;
    double floor_db;
};

/// What is in a bundle, as far as it takes to run it. Everything else is checked and left out.
struct Manifest {
    std::string created_by;
    Model model;
    std::vector<File> files;
    std::vector<Engine> engines;
    std::vector<Canary> canaries;
    std::set<std::string> proven;  // names of the model and the engines that were judged against the full model
};

/// A manifest from its JSON. Throws InvalidModel.
Manifest parse(const std::string& content);

}  // namespace derainer
