/// Restores a grey image by a bundle.
#include <derainer/derainer.hpp>

#include <cstdint>
#include <iostream>
#include <vector>

int main(int, char** arguments) {
    try {
        std::vector<std::uint8_t> image(30 * 40 * 3, 128);
        derainer::Derainer derain(arguments[1]);
        derain.run(image.data(), 30, 40, 120, image.data());
        std::cout << derain.provider() << " " << derain.fallback_reason() << "\n";
    } catch (const derainer::DerainError& error) {
        std::cerr << error.what() << "\n" << error.expression() << "\n";
        return 2;
    }
}
