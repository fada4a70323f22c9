/// What tests/test_cpp.py compares with Python byte by byte. Raw bytes come from stdin and go to stdout.
///
///     contract tensor H W PADDED_H PADDED_W        # uint8 (H, W, 3) -> padded float32 (3, PADDED_H, PADDED_W)
///     contract levels H W H W                      # float32 (3, H, W) -> uint8 (H, W, 3)
///     contract restore H W PADDED_H PADDED_W TILE_H TILE_W OVERLAP    # uint8 (H, W, 3) -> the same, by the stand-in
///     contract plan       # lines H W MULTIPLE TILE_H TILE_W OVERLAP, and pairs of the smallest and the largest height
///                         # and width; tile 0 0 and overlap -1 for none -> how that image is cut, if it can be
///     contract parse FOLDER    # for each manifest in it, by name, one line: nothing, or why it is refused
#include <algorithm>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <optional>
#include <sstream>
#include <string>

#include "files.hpp"
#include "host_session.hpp"
#include "manifest.hpp"
#include "network.hpp"
#include "refusal.hpp"
#include "session.hpp"
#include "tiling.hpp"

using namespace derainer;

namespace {

void parse_all(const std::filesystem::path& folder) {
    const std::filesystem::directory_iterator files(folder);
    std::vector<std::filesystem::path> paths(begin(files), end(files));
    std::sort(paths.begin(), paths.end());
    for (const std::filesystem::path& path : paths) {
        std::cout << refusal([&] { parse(read_file(path)); }) << "\n";
    }
}

std::string plan_text(const std::string& line) {
    std::istringstream numbers(line);
    Size image;
    Size tile;
    std::int64_t multiple = 0;
    std::int64_t overlap = 0;
    numbers >> image.height >> image.width >> multiple >> tile.height >> tile.width >> overlap;
    std::vector<Limits> limits;
    for (Limits l; numbers >> l.min.height >> l.min.width >> l.max.height >> l.max.width;) {
        limits.push_back(l);
    }
    Plan found{};
    const std::string refused = refusal([&] {
        found = plan(GraphIo{Io::tensor, multiple}.padded(image), multiple, limits,
                     tile == Size{} ? std::nullopt : std::make_optional(tile),
                     overlap < 0 ? std::nullopt : std::make_optional(overlap));
    });
    return refused.empty() ? to_string(found.size) + " " + to_string(found.tile) + " " + std::to_string(found.overlap)
                           : "refused";
}

}  // namespace

int main(int count, char** arguments) {
    try {
        const std::string verb = arguments[1];
        if (verb == "parse") {
            parse_all(arguments[2]);
            return 0;
        }
        if (verb == "plan") {
            for (std::string line; std::getline(std::cin, line);) {
                std::cout << plan_text(line) << "\n";
            }
            return 0;
        }
        const auto number = [&](int i) { return i < count ? std::stoll(arguments[i]) : 0; };
        const std::int64_t height = number(2);
        const std::int64_t width = number(3);
        const Size size{number(4), number(5)};
        const std::string given{std::istreambuf_iterator<char>(std::cin), {}};

        std::string tensor;
        const auto keep = [&](const float* input, float* output, std::size_t h, std::size_t w) {
            tensor.assign(reinterpret_cast<const char*>(input), 3 * h * w * sizeof(float));
            stand_in(input, output, h, w);
        };
        const auto answer = [&](const float*, float* output, std::size_t, std::size_t) {
            std::copy(given.begin(), given.end(), reinterpret_cast<char*>(output));
        };
        std::vector<std::uint8_t> image(static_cast<std::size_t>(3 * height * width));
        if (verb != "levels") {
            std::copy_n(given.begin(), image.size(), image.begin());
        }
        HostSession session(verb == "levels" ? HostSession::Function(answer) : HostSession::Function(keep));
        const Size tile = verb == "restore" ? Size{number(6), number(7)} : size;
        const Image whole{image.data(), height, width, static_cast<std::size_t>(3 * width), image.data()};
        restore(session, {{whole, {size, tile, number(8)}}});
        std::cout << (verb == "tensor" ? tensor : std::string(image.begin(), image.end()));
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 2;
    }
}
