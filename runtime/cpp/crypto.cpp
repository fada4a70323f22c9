#include "crypto.hpp"

#include <openssl/evp.h>
#include <openssl/pem.h>

#include "check.hpp"
#include "files.hpp"

namespace derainer {

namespace {

using Key = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;

/// Instead of asking for a password at the terminal.
int no_password(char*, int, int, void*) { return -1; }

Key load_key(const std::filesystem::path& path) {
    std::error_code failed;
    DERAINER_CHECK(InputError, std::filesystem::is_regular_file(path, failed),
                   "expected a public key, found no file at " + path.string());
    const std::string content = read_file(path);
    const std::unique_ptr<BIO, decltype(&BIO_free)> memory(
        BIO_new_mem_buf(content.data(), static_cast<int>(content.size())), BIO_free);
    const bool is_private = content.find("PRIVATE KEY") != std::string::npos;
    const auto read = is_private ? PEM_read_bio_PrivateKey : PEM_read_bio_PUBKEY;
    Key key(read(memory.get(), nullptr, no_password, nullptr), EVP_PKEY_free);
    DERAINER_CHECK(InputError, key != nullptr && EVP_PKEY_base_id(key.get()) == EVP_PKEY_ED25519,
                   path.string() + ": expected an Ed25519 public key in PEM without a password, found none");
    return key;
}

}  // namespace

Sha256::Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    DERAINER_CHECK(DeviceError, EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1,
                   "OpenSSL has no SHA-256");
}

Sha256::~Sha256() = default;

void Sha256::add(const void* data, std::size_t size) {
    DERAINER_CHECK(DeviceError, EVP_DigestUpdate(context_.get(), data, size) == 1, "OpenSSL failed");
}

std::string Sha256::hex() {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned int size = 0;
    DERAINER_CHECK(DeviceError, EVP_DigestFinal_ex(context_.get(), digest, &size) == 1, "OpenSSL failed");
    std::string text;
    for (unsigned int i = 0; i < size; ++i) {
        text += "0123456789abcdef"[digest[i] >> 4];
        text += "0123456789abcdef"[digest[i] & 15];
    }
    return text;
}

std::string sha256(const std::string& content) {
    Sha256 hash;
    hash.add(content.data(), content.size());
    return hash.hex();
}

bool verify_ed25519(const std::string& message, const std::string& signature, const std::filesystem::path& key) {
    const Key loaded = load_key(key);
    const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
    DERAINER_CHECK(DeviceError, EVP_DigestVerifyInit(context.get(), nullptr, nullptr, nullptr, loaded.get()) == 1,
                   "OpenSSL has no Ed25519");
    const auto bytes = [](const std::string& text) { return reinterpret_cast<const unsigned char*>(text.data()); };
    return EVP_DigestVerify(context.get(), bytes(signature), signature.size(), bytes(message), message.size()) == 1;
}

}  // namespace derainer
