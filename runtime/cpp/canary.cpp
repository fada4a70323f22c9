#include "canary.hpp"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <sstream>
#include <vector>

#include "check.hpp"
#include "crypto.hpp"
#include "private_files.hpp"
#include "tiling.hpp"

namespace derainer {

namespace {

constexpr int kRounds = 2;

/// A canary whose file was read.
struct Known {
    Canary canary;
    std::vector<std::uint8_t> input;
    std::vector<std::uint8_t> answer;
};

bool takes(const std::vector<Limits>& limits, Size size) {
    for (const Limits& each : limits) {
        if (is_between(size, each.min, each.max)) {
            return true;
        }
    }
    return false;
}

/// In dB, over RGB; infinite where they are equal.
double psnr(const std::vector<std::uint8_t>& a, const std::vector<std::uint8_t>& b) {
    double sum = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        const double difference = static_cast<double>(a[i]) - b[i];
        sum += difference * difference;
    }
    return sum == 0 ? std::numeric_limits<double>::infinity()
                    : 10 * std::log10(255.0 * 255.0 * static_cast<double>(a.size()) / sum);
}

std::string text(double db) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.1f dB", db);
    return digits;
}

/// Throws CanaryError for a wrong answer.
void ask(Session& session, const Bundle& bundle, const Known& known) {
    std::vector<std::uint8_t> out(known.answer.size());
    const Size size = known.canary.size;
    const Image image{known.input.data(), size.height, size.width, 3 * static_cast<std::size_t>(size.width),
                      out.data()};
    std::string found;
    try {
        restore(session, {{image, {size, size, 0}}});
        const double db = psnr(out, known.answer);
        if (db >= known.canary.floor_db) {
            return;
        }
        found = text(db);
    } catch (const MismatchError&) {
        throw;
    } catch (const InvalidModel& error) {
        found = error.message();
    }
    throw CanaryError(
        (bundle.folder / session.file()).string() + " is not used, since it answers wrongly here: expected at least " +
            text(known.canary.floor_db) + " between its answer to " + known.canary.file + " and the model's, found " +
            found + " (" + session.identity() + "); build it again, in another precision, or use the provider cpu",
        "psnr >= floor_db");
}

/// What has to be as it was for a file to answer as it did, as a line; empty where the session does not tell.
std::string key(const Session& session, const Bundle& bundle) {
    if (session.identity().empty()) {
        return {};
    }
    std::string facts = host_name() + "\n" + session.identity() + "\n" + bundle.file(session.file()).sha256;
    for (const Canary& canary : bundle.manifest.canaries) {
        facts += "\n" + bundle.file(canary.file).sha256 + " " + std::to_string(canary.floor_db);
    }
    return sha256(facts);
}

bool has_line(const std::string& content, const std::string& line) {
    std::istringstream lines(content);
    for (std::string each; std::getline(lines, each);) {
        if (each == line) {
            return true;
        }
    }
    return false;
}

}  // namespace

void check_canaries(Session& session, const Bundle& bundle, const std::string& when) {
    DERAINER_CHECK(InputError, when == "first" || when == "always" || when == "never",
                   "expected canary first, always or never, found " + when);
    if (when == "never" || bundle.manifest.canaries.empty()) {
        return;
    }
    const std::string line = key(session, bundle);
    const std::filesystem::path path = bundle.beside(session.file(), "canary-cpp");
    const std::string passed = read_own(path);
    const bool known_here = !line.empty() && has_line(passed, line);
    if (when == "first" && known_here) {
        return;
    }
    std::vector<Known> all;
    for (const Canary& canary : bundle.manifest.canaries) {
        if (takes(session.limits(), canary.size)) {
            const std::string content = bundle.read(canary.file);
            const auto half = content.begin() + static_cast<std::ptrdiff_t>(content.size() / 2);
            all.push_back({canary, {content.begin(), half}, {half, content.end()}});
        }
    }
    for (int round = 0; round < kRounds; ++round) {
        for (const Known& known : all) {
            ask(session, bundle, known);
        }
    }
    if (!line.empty() && !known_here) {
        write_own(path, passed + line + "\n");
    }
}

}  // namespace derainer
