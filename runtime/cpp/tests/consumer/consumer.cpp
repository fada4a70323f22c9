/// Restores a grey image by a bundle, or where there is no engine, only verifies the bundle.
#ifdef WITH_ENGINE
#include <derainer/derainer.hpp>
#else
#include <derainer/manifest.hpp>
#endif

#include <cstdint>
#include <iostream>
#include <vector>

int main(int, char** arguments) {
    try {
#ifdef WITH_ENGINE
        std::vector<std::uint8_t> image(30 * 40 * 3, 128);
        derainer::Derainer(arguments[1]).run(image.data(), 30, 40, 120, image.data());
#else
        derainer::load(arguments[1]).verify();
#endif
    } catch (const derainer::Error& error) {
        std::cerr << error.what() << "\n" << error.expression() << "\n";
        return 2;
    }
}
