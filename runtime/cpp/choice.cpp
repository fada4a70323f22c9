#include "choice.hpp"

#include <algorithm>
#include <sstream>
#include <vector>

#include "check.hpp"

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

}  // namespace

const Engine& choose_engine(const Bundle& bundle, const std::string& capability, const std::string& flavor,
                            const std::string& version) {
    const std::vector<Engine>& engines = bundle.manifest.engines;
    const auto fits_gpu = [&](const Engine& e) { return e.flavor == flavor && runs_on(e, capability); };
    const auto newest = std::find_if(engines.rbegin(), engines.rend(), fits_gpu);
    DERAINER_CHECK(DeviceError, newest != engines.rend(),
                   bundle.folder.string() + ": expected an engine of flavor " + flavor +
                       " for this GPU of compute capability " + capability + ", found " + describe(engines) +
                       "; add one with python -m export.tensorrt");
    const auto fits = [&](const Engine& e) { return fits_gpu(e) && fits_version(e, version); };
    DERAINER_CHECK(DeviceError, std::any_of(engines.begin(), engines.end(), fits),
                   (bundle.folder / newest->file).string() + ": expected version " + newest->version +
                       " of the library, which it was built with, found " + version +
                       "; install that one or build the engine again");
    const auto found = std::find_if(engines.rbegin(), engines.rend(),
                                    [&](const Engine& e) { return fits(e) && !has(e, "strip_weights"); });
    DERAINER_CHECK(DeviceError, found != engines.rend(),
                   bundle.folder.string() +
                       ": expected an engine with its weights for this GPU, found only "
                       "stripped ones; build one without --strip-weights");
    return *found;
}

}  // namespace derainer
