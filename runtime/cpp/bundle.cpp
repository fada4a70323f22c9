#include "bundle.hpp"

#include <algorithm>
#include <fstream>
#include <vector>

#include "check.hpp"
#include "crypto.hpp"
#include "files.hpp"

namespace derainer {

namespace {

constexpr const char* kMend = "; fetch or build the bundle again";

/// The path of a file in a folder; none where there is none. Throws MismatchError for a link that leads out.
std::optional<std::filesystem::path> inside(const std::filesystem::path& folder, const std::string& name) {
    const std::filesystem::path path = folder / name;
    std::error_code failed;
    if (!std::filesystem::is_regular_file(path, failed)) {
        return std::nullopt;
    }
    const std::filesystem::path real = std::filesystem::canonical(path, failed);
    DERAINER_CHECK(MismatchError, !failed && real.parent_path() == std::filesystem::canonical(folder, failed),
                   path.string() + ": expected a file inside the bundle, found a link to " + real.string());
    return path;
}

/// Opens a file of the right size, at its start.
std::ifstream open(const std::filesystem::path& folder, const File& file) {
    const auto path = inside(folder, file.name);
    DERAINER_CHECK(MismatchError, path.has_value(),
                   folder.string() + ": expected " + file.name + " of " + std::to_string(file.size) +
                       " bytes, found no such file");
    std::ifstream stream(*path, std::ios::binary | std::ios::ate);
    DERAINER_CHECK(MismatchError, stream.good(), path->string() + " cannot be read");
    const std::int64_t size = stream.tellg();
    DERAINER_CHECK(
        MismatchError, size == file.size,
        path->string() + ": expected " + std::to_string(file.size) + " bytes, found " + std::to_string(size) + kMend);
    stream.seekg(0);
    return stream;
}

void compare(const std::filesystem::path& folder, const File& file, const std::string& sha256) {
    DERAINER_CHECK(MismatchError, sha256 == file.sha256,
                   (folder / file.name).string() + ": expected SHA-256 " + file.sha256 + ", found " + sha256 + kMend);
}

void check_signature(const std::filesystem::path& folder, const std::string& content,
                     const std::filesystem::path& public_key) {
    const auto signature = inside(folder, kSignature);
    DERAINER_CHECK(
        MismatchError, signature.has_value(),
        folder.string() + ": expected a bundle signed for " + public_key.string() + ", found no " + kSignature);
    DERAINER_CHECK(MismatchError, verify_ed25519(content, read_file(*signature), public_key),
                   signature->string() + ": expected a signature of " + kManifest + " for " + public_key.string() +
                       ", found another; the manifest was changed or signed by somebody else");
}

}  // namespace

std::filesystem::path Bundle::beside(const std::string& name, const std::string& kind) const {
    return std::filesystem::canonical(folder).string() + "." + file(name).sha256.substr(0, 12) + "." + kind;
}

const File& Bundle::file(const std::string& name) const {
    const auto found =
        std::find_if(manifest.files.begin(), manifest.files.end(), [&](const File& file) { return file.name == name; });
    DERAINER_CHECK(MismatchError, found != manifest.files.end(),
                   folder.string() + ": expected a file of the bundle, found " + name);
    return *found;
}

std::string Bundle::read(const std::string& name) const {
    const File& entry = file(name);
    std::ifstream stream = open(folder, entry);
    std::string content(static_cast<std::size_t>(entry.size), '\0');
    DERAINER_CHECK(MismatchError, stream.read(content.data(), entry.size),
                   (folder / name).string() + " cannot be read");
    compare(folder, entry, sha256(content));
    return content;
}

void Bundle::verify() const {
    std::vector<char> block(1 << 20);
    for (const File& entry : manifest.files) {
        std::ifstream stream = open(folder, entry);
        Sha256 hash;
        do {
            stream.read(block.data(), static_cast<std::streamsize>(block.size()));
            hash.add(block.data(), static_cast<std::size_t>(stream.gcount()));
        } while (stream);
        compare(folder, entry, hash.hex());
    }
}

Bundle load(const std::filesystem::path& folder, const std::optional<std::filesystem::path>& public_key) {
    const auto path = inside(folder, kManifest);
    DERAINER_CHECK(
        InvalidModel, path.has_value(),
        "expected a bundle, which is a folder with a " + std::string(kManifest) + ", found none at " + folder.string());
    const std::string content = read_file(*path);
    if (public_key) {
        check_signature(folder, content, *public_key);
    }
    try {
        return {folder, parse(content)};
    } catch (const InvalidModel& error) {
        throw InvalidModel(path->string() + ": " + error.message(), error.expression());
    }
}

}  // namespace derainer
