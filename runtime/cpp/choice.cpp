#include "choice.hpp"

#include <algorithm>
#include <sstream>
#include <utility>

namespace derainer {

namespace {

std::vector<int> numbers(const std::string& version) {
    std::vector<int> result;
    std::istringstream parts(version);
    for (std::string part; std::getline(parts, part, '.');) {
        if (!part.empty() && part.size() < 10 && part.find_first_not_of("0123456789") == std::string::npos) {
            result.push_back(std::stoi(part));
        }
    }
    return result;
}

bool has(const Engine& engine, const char* flag) { return engine.flags.count(flag) > 0; }

bool runs_on(const Engine& engine, const std::string& capability) {
    if (has(engine, "hardware_compatible")) {  // Ampere and later
        return numbers(capability) >= std::vector<int>{8, 0};
    }
    const auto& built_for = engine.compute_capabilities;
    return std::find(built_for.begin(), built_for.end(), capability) != built_for.end();
}

bool fits_version(const Engine& engine, const std::string& version) {
    return has(engine, "version_compatible") ? numbers(version) >= numbers(engine.version) : version == engine.version;
}

std::string describe(const std::vector<Engine>& engines) {
    std::string text;
    for (const Engine& engine : engines) {
        text += (text.empty() ? "" : "; ") + engine.flavor + " " + engine.version + " for";
        for (const std::string& capability : engine.compute_capabilities) {
            text += " " + capability;
        }
    }
    return text.empty() ? "no engine" : text;
}

std::string describe(const std::vector<Profile>& profiles) {
    std::string text;
    for (const Profile& profile : profiles) {
        text += (text.empty() ? "" : " or ") + to_string(profile.min) + " to " + to_string(profile.max);
    }
    return text.empty() ? "no size" : text;
}

/// Whether tiles of an axis may share so many pixels.
bool overlaps(std::int64_t length, std::int64_t tile, std::int64_t overlap) {
    return overlap >= 0 && (length <= tile || overlap <= tile / 2);
}

std::int64_t count(std::int64_t length, std::int64_t tile, std::int64_t overlap) {
    return length <= tile ? 1 : (length - overlap + tile - overlap - 1) / (tile - overlap);
}

/// Exact for whatever memory holds, and beyond that no overflow.
double area(Size size) { return static_cast<double>(size.height) * static_cast<double>(size.width); }

}  // namespace

const Engine& choose_engine(const Bundle& bundle, const std::string& flavor, const std::string& version,
                            const std::string& capability) {
    const std::vector<Engine>& engines = bundle.manifest.engines;
    const auto fits_gpu = [&](const Engine& e) { return e.flavor == flavor && runs_on(e, capability); };
    const auto newest = std::find_if(engines.rbegin(), engines.rend(), fits_gpu);
    DERAINER_CHECK(newest != engines.rend(), bundle.folder.string() + ": expected an engine of flavor " + flavor +
                                                 " for this GPU of compute capability " + capability + ", found " +
                                                 describe(engines) + "; add one with python -m export.tensorrt");
    const auto fits = [&](const Engine& e) { return fits_gpu(e) && fits_version(e, version); };
    DERAINER_CHECK(std::any_of(engines.begin(), engines.end(), fits),
                   (bundle.folder / newest->file).string() + ": expected version " + newest->version +
                       " of the library, which it was built with, found " + version +
                       "; install that one or build the engine again");
    const auto found = std::find_if(engines.rbegin(), engines.rend(),
                                    [&](const Engine& e) { return fits(e) && !has(e, "strip_weights"); });
    DERAINER_CHECK(found != engines.rend(), bundle.folder.string() +
                                                ": expected an engine with its weights for this GPU, found only "
                                                "stripped ones; build one without --strip-weights");
    return *found;
}

std::size_t choose_profile(const Engine& engine, Size size) {
    const auto found = std::find_if(engine.profiles.begin(), engine.profiles.end(),
                                    [&](const Profile& profile) { return profile.takes(size); });
    DERAINER_CHECK(found != engine.profiles.end(), engine.file + " takes images of height x width " +
                                                       describe(engine.profiles) + ", found " + to_string(size) +
                                                       "; build it with another --min and --max");
    return static_cast<std::size_t>(found - engine.profiles.begin());
}

Cut choose_tiles(const Engine& engine, Size size, std::int64_t multiple, Size tile,
                 std::optional<std::int64_t> overlap) {
    const bool asked = tile != Size{};
    DERAINER_CHECK(!asked || (tile.height > 0 && tile.width > 0 && is_multiple(tile, multiple)),
                   "expected tiles in multiples of " + std::to_string(multiple) + " pixels, found " + to_string(tile));
    std::optional<Cut> best;
    std::pair<double, double> least;
    for (const Profile& profile : engine.profiles) {
        const Size most = asked ? tile : profile.max;
        const Size grown{std::max(size.height, profile.min.height), std::max(size.width, profile.min.width)};
        const Cut cut{grown,
                      {std::min(grown.height, most.height), std::min(grown.width, most.width)},
                      overlap.value_or(std::min(kOverlap, std::min(most.height, most.width) / 4))};
        if (!profile.takes(cut.tile) || !overlaps(grown.height, cut.tile.height, cut.overlap) ||
            !overlaps(grown.width, cut.tile.width, cut.overlap)) {
            continue;
        }
        const Size tiles{count(grown.height, cut.tile.height, cut.overlap),
                         count(grown.width, cut.tile.width, cut.overlap)};
        const std::pair<double, double> cost{area(grown), area(tiles)};
        if (!best || cost < least) {
            best = cut;
            least = cost;
        }
    }
    const std::string tiles = asked ? " in tiles of " + to_string(tile) : "";
    const std::string shared = overlap ? " with an overlap of " + std::to_string(*overlap) : "";
    DERAINER_CHECK(best.has_value(), engine.file + " takes images of height x width " + describe(engine.profiles) +
                                         ", found " + to_string(size) + tiles + shared +
                                         "; build it with another --min and --max");
    return *best;
}

}  // namespace derainer
