/// A bundle: a folder with a network, engines compiled from it, and a manifest that says what they are.
///
///     const derainer::Bundle bundle = derainer::load("bundle", "public.pem");   // or load("bundle"), unsigned
///     const std::string plan = bundle.read(bundle.manifest.engines[0].file);    // verified bytes, or Error
///
/// The format is that of runtime/manifest.py, which says why. What that refuses, this does too; besides, it takes only
/// UTF-8, numbers of 64 bits and 64 levels of nesting. `manifest.json` names every file with its size and SHA-256; a
/// reader that meets another schema, or any field that it does not know, refuses the bundle rather than guess. The
/// signature is Ed25519 over the exact bytes of `manifest.json`, detached and raw in `manifest.json.sig`.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "common.hpp"

namespace derainer {

inline constexpr std::int64_t kSchema = 1;
inline constexpr std::int64_t kMaxMultiple = 1024;  // a larger one would have small images padded to huge ones
inline constexpr const char* kManifest = "manifest.json";
inline constexpr const char* kSignature = "manifest.json.sig";

/// A file of the bundle. `name` is a plain name, without folders; `size` is in bytes; `role` is "onnx", "engine" or
/// "report".
struct File {
    std::string name;
    std::string sha256;
    std::int64_t size;
    std::string role;
};

/// What a network takes and gives: float32 (1, 3, H, W) in [0, 1], or uint8 (1, H, W, 3).
enum class Io { tensor, image };

/// The network. Heights and widths have to be multiples of `size_multiple`.
struct Model {
    std::string file;
    Io io;
    std::int64_t size_multiple;
};

/// Sizes that an engine takes, from `min` to `max`, which are in multiples, and those it is fastest at.
struct Profile {
    Size min;
    Size opt;
    Size max;

    /// Whether an image of this size, already padded, fits.
    bool takes(Size size) const;
};

/// A plan: the network compiled by one version of a library for some GPUs. `flavor` is "rtx" or "tensorrt", `flags`
/// are the names of what is true of what the builder was told besides.
struct Engine {
    std::string file;
    std::string flavor;
    std::string version;
    std::vector<std::string> compute_capabilities;
    std::vector<Profile> profiles;
    std::set<std::string> flags;
};

/// What is in a bundle, as far as it takes to run it. Everything else is checked and left out.
struct Manifest {
    std::string created_by;
    Model model;
    std::vector<File> files;
    std::vector<Engine> engines;
};

/// A folder and its manifest. Files are named as in the manifest; both methods throw Error where one is missing or
/// another than it says.
struct Bundle {
    std::filesystem::path folder;
    Manifest manifest;

    /// The content of a file: the very bytes that were verified, whatever happens to the file meanwhile.
    std::string read(const std::string& name) const;
    /// Verify every file.
    void verify() const;
    /// Its entry in the manifest.
    const File& file(const std::string& name) const;
};

/// Open a bundle; its files are verified as they are read. `public_key`: of the one who has to have signed it (PEM,
/// Ed25519), if anyone. Throws Error for a folder that is no bundle, an unknown schema, a manifest with an unknown,
/// missing or wrong field, and with a public key, for a missing or wrong signature.
Bundle load(const std::filesystem::path& folder, const std::optional<std::filesystem::path>& public_key = std::nullopt);

/// A manifest from its JSON. Throws Error.
Manifest parse(const std::string& content);

}  // namespace derainer
