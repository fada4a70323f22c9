/// Verifies a bundle, as `python -m runtime.info` does.
///
///     derainer-info bundle/
///     derainer-info bundle/ public.pem
///
/// Exit status: 0 if the bundle is whole, else 2, after one line that says what is wrong.
#include <exception>
#include <filesystem>
#include <iostream>
#include <optional>

#include "bundle.hpp"

int main(int count, char** arguments) {
    if (count != 2 && count != 3) {
        std::cerr << "usage: derainer-info BUNDLE [PUBLIC_KEY]\n";
        return 2;
    }
    try {
        std::optional<std::filesystem::path> public_key;
        if (count == 3) {
            public_key = arguments[2];
        }
        const derainer::Bundle bundle = derainer::load(arguments[1], public_key);
        bundle.verify();
        for (const derainer::Engine& engine : bundle.manifest.engines) {
            std::cout << engine.file << ": " << engine.flavor << " " << engine.version << " for";
            for (const std::string& capability : engine.compute_capabilities) {
                std::cout << " " << capability;
            }
            for (const derainer::Profile& profile : engine.profiles) {
                std::cout << ", " << to_string(profile.min) << " to " << to_string(profile.max);
            }
            std::cout << "\n";
        }
        std::cout << "All " << bundle.manifest.files.size() << " files are as the manifest says. Signature: "
                  << (public_key ? "verified" : "not verified, as no public key was given") << ".\n";
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 2;
    }
}
