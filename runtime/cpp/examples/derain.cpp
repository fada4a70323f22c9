/// Takes the rain out of a PNG file.
///
///     derain rainy.png clean.png bundle/
///     derain rainy.png clean.png bundle/ public.pem
///
/// Exit status: 0, or 2 after one line that says what is wrong.
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include <png.h>
#include <sys/stat.h>
#include <unistd.h>

#include "derainer.hpp"

namespace {

/// An 8-bit PNG file without transparency, as RGB.
struct Png {
    std::int64_t height;
    std::int64_t width;
    std::vector<std::uint8_t> rgb;

    static Png read(const std::string& path) {
        png_image image = {};
        image.version = PNG_IMAGE_VERSION;
        check(png_image_begin_read_from_file(&image, path.c_str()), image, path);
        if ((image.format & (PNG_FORMAT_FLAG_ALPHA | PNG_FORMAT_FLAG_LINEAR)) != 0) {
            png_image_free(&image);
            throw std::runtime_error(path + ": expected 8 bits a channel and no transparency, found another image");
        }
        image.format = PNG_FORMAT_RGB;
        Png png{image.height, image.width, std::vector<std::uint8_t>(std::size_t{3} * image.width * image.height)};
        check(png_image_finish_read(&image, nullptr, png.rgb.data(), 0, nullptr), image, path);
        return png;
    }

    /// Whole or not at all: a new file beside `path` takes its place. What is no file there stays.
    void write(const std::string& path) const {
        const std::filesystem::file_status former = std::filesystem::status(path);
        if (exists(former) && !is_regular_file(former)) {
            throw std::runtime_error("expected a file to write, found a folder, a pipe or a device at " + path);
        }
        png_image image = {};
        image.version = PNG_IMAGE_VERSION;
        image.height = static_cast<png_uint_32>(height);
        image.width = static_cast<png_uint_32>(width);
        image.format = PNG_FORMAT_RGB;
        std::string temporary = std::filesystem::path(path).replace_filename(".derain-XXXXXX").string();
        const int file = ::mkstemp(temporary.data());
        check_written(file >= 0, std::strerror(errno), path);
        std::FILE* const stream = ::fdopen(file, "wb");
        const int written = png_image_write_to_stdio(&image, stream, 0, rgb.data(), 0, nullptr);
        const mode_t mask = ::umask(0);
        ::umask(mask);
        const bool in_place = written != 0 && ::fchmod(file, 0666 & ~mask) == 0 && std::fclose(stream) == 0 &&
                              std::rename(temporary.c_str(), path.c_str()) == 0;
        const std::string reason = written == 0 ? image.message : std::strerror(errno);
        if (!in_place) {
            std::remove(temporary.c_str());
        }
        check_written(in_place, reason, path);
    }

private:
    static void check_written(bool done, const std::string& reason, const std::string& path) {
        if (!done) {
            throw std::runtime_error(path + " cannot be written: " + reason);
        }
    }

    static void check(int done, const png_image& image, const std::string& path) {
        if (done == 0) {
            throw std::runtime_error(path + ": expected a PNG image, found none: " + image.message);
        }
    }
};

}  // namespace

int main(int count, char** arguments) {
    if (count != 4 && count != 5) {
        std::cerr << "usage: derain IN.png OUT.png BUNDLE [PUBLIC_KEY]\n";
        return 2;
    }
    try {
        Png png = Png::read(arguments[1]);
        derainer::Options options;
        if (count == 5) {
            options.public_key = arguments[4];
        }
        derainer::Derainer derain(arguments[3], options);
        derain.run(png.rgb.data(), png.height, png.width, static_cast<std::size_t>(3 * png.width), png.rgb.data());
        png.write(arguments[2]);
        if (!derain.fallback_reason().empty()) {
            std::cerr << "remark: it ran on the CPU: " << derain.fallback_reason() << "\n";
        }
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 2;
    }
}
