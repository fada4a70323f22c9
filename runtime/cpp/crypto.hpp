/// SHA-256 and Ed25519, by OpenSSL: what hashlib and cryptography are to runtime/bundle.py.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <string>

struct evp_md_ctx_st;

namespace derainer {

/// SHA-256 of what it is given piece by piece.
class Sha256 {
public:
    Sha256();
    ~Sha256();
    void add(const void* data, std::size_t size);
    /// 64 digits 0-9 and a-f. Comes last.
    std::string hex();

private:
    std::unique_ptr<evp_md_ctx_st, void (*)(evp_md_ctx_st*)> context_;
};

std::string sha256(const std::string& content);

/// Whether `signature` is the raw Ed25519 signature of `message` by the owner of `key`, a public or private key in PEM
/// without a password. Throws InputError where there is no such key in the file.
bool verify_ed25519(const std::string& message, const std::string& signature, const std::filesystem::path& key);

}  // namespace derainer
