/// A bundle on disk: a folder whose `manifest.json` says what every file in it is.
///
///     const derainer::Bundle bundle = derainer::load("bundle", "public.pem");   // or load("bundle"), unsigned
///     const std::string plan = bundle.read(bundle.manifest.engines[0].file);    // verified bytes, or MismatchError
///
/// What runtime/bundle.py refuses, this does too; that says why. The signature is Ed25519 over the exact bytes of
/// `manifest.json`, detached and raw in `manifest.json.sig`.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "manifest.hpp"

namespace derainer {

/// A folder and its manifest. Files are named as in the manifest; every method throws MismatchError where one
/// is missing or another than it says.
struct Bundle {
    std::filesystem::path folder;
    Manifest manifest;

    /// The content of a file: the very bytes that were verified, whatever happens to the file meanwhile.
    std::string read(const std::string& name) const;
    /// Verify every file.
    void verify() const;
    /// Where a machine keeps what it has found out about a file: beside the folder and not in it, since whoever
    /// delivers a bundle should not deliver that too.
    std::filesystem::path beside(const std::string& name, const std::string& kind) const;
    /// The manifest's entry for a file.
    const File& file(const std::string& name) const;
};

/// Open a bundle; its files are verified as they are read. `public_key`: of the one who has to have signed it (PEM,
/// Ed25519), if anyone. Throws InvalidModel for a folder that is no bundle, an unknown schema, and a manifest with an
/// unknown, missing or wrong field; with a public key, MismatchError for a missing or wrong signature, and InputError
/// for a file that holds no such key.
Bundle load(const std::filesystem::path& folder, const std::optional<std::filesystem::path>& public_key = std::nullopt);

}  // namespace derainer
