#include "manifest.hpp"

#include <algorithm>
#include <map>
#include <utility>

#include <nlohmann/json.hpp>

#include "check.hpp"

namespace derainer {

namespace {

using nlohmann::json;

constexpr int kMaxDepth = 64;

/// As JSON, so that nothing in it can steer a terminal; cut where it is long.
std::string quote(const json& value) {
    const std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
    return text.size() <= 200 ? text : text.substr(0, 200) + "...";
}

[[noreturn]] void refuse(const std::string& where, const std::string& expected, const json& found) {
    throw InvalidModel(where + ": expected " + expected + ", found " + quote(found), where);
}

/// An object of the manifest: it has all of these fields and no others. The getters throw InvalidModel for another
/// type.
class Object {
public:
    /// `later` are fields that came later and that manifests may lack.
    Object(const json& value, std::string where, const std::vector<std::string>& names,
           const std::vector<std::string>& later = {})
        : value_(value), where_(std::move(where)) {
        const auto known = [&](const std::string& name) { return value.contains(name); };
        const auto found = static_cast<std::size_t>(std::count_if(later.begin(), later.end(), known));
        if (!value.is_object() || value.size() != names.size() + found ||
            !std::all_of(names.begin(), names.end(), known)) {
            refuse(where_, "an object with the fields " + quote(names), value);
        }
    }

    std::string text(const char* name) const {
        return get(name, "a string", [](const json& v) { return v.is_string(); }).get<std::string>();
    }

    std::string choice(const char* name, const std::vector<std::string>& choices) const {
        const auto known = [&](const json& v) {
            return v.is_string() && std::count(choices.begin(), choices.end(), v.get<std::string>()) > 0;
        };
        return get(name, "one of " + quote(choices), known).get<std::string>();
    }

    std::int64_t integer(const char* name) const { return get(name, "an integer", is_integer).get<std::int64_t>(); }

    const json& object(const char* name) const {
        return get(name, "an object", [](const json& v) { return v.is_object(); });
    }

    const json& list(const char* name) const {
        return get(name, "a list", [](const json& v) { return v.is_array(); });
    }

    std::vector<std::int64_t> integers(const char* name) const {
        const auto all = [](const json& v) { return v.is_array() && std::all_of(v.begin(), v.end(), is_integer); };
        return get(name, "a list of integers", all).get<std::vector<std::int64_t>>();
    }

    double number(const char* name) const {
        return get(name, "a number", [](const json& v) { return v.is_number(); }).get<double>();
    }

    Size size(const char* name) const {
        const std::vector<std::int64_t> numbers = integers(name);
        if (numbers.size() != 2) {
            refuse(where_ + "." + name, "a height and a width", value_.at(name));
        }
        return {numbers[0], numbers[1]};
    }

    /// Fields that may be null or, if they came later, absent. They are checked and not kept.
    void check_optional(const std::vector<const char*>& names, bool (json::*is)() const noexcept,
                        const std::string& expected) const {
        for (const char* name : names) {
            if (value_.contains(name)) {
                get(name, expected + " or null", [&](const json& v) { return v.is_null() || (v.*is)(); });
            }
        }
    }

    const std::string& where() const { return where_; }

private:
    /// Such as the readers in Python and C++ both can hold.
    static bool is_integer(const json& v) {
        return v.is_number_integer() && (!v.is_number_unsigned() || v.get<std::uint64_t>() <= INT64_MAX);
    }

    template <class Predicate>
    const json& get(const char* name, const std::string& expected, Predicate fits) const {
        const json& field = value_.at(name);
        if (!fits(field)) {
            refuse(where_ + "." + name, expected, field);
        }
        return field;
    }

    const json& value_;
    std::string where_;
};

template <class Parse>
auto parse_list(const json& list, const std::string& where, Parse parse_one) {
    std::vector<decltype(parse_one(list, where))> result;
    for (std::size_t i = 0; i < list.size(); ++i) {
        result.push_back(parse_one(list[i], where + "[" + std::to_string(i) + "]"));
    }
    return result;
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

bool is_word(char c) { return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }

std::string lower(std::string text) {
    std::transform(text.begin(), text.end(), text.begin(),
                   [](char c) { return 'A' <= c && c <= 'Z' ? c + ('a' - 'A') : c; });
    return text;
}

bool is_plain_name(const std::string& name) {
    const auto plain = [](char c) { return is_word(c) || c == '.' || c == '+' || c == '-'; };
    return !name.empty() && name.size() <= 255 && is_word(name[0]) && std::all_of(name.begin(), name.end(), plain) &&
           lower(name) != kManifest && lower(name) != kSignature;
}

bool is_sha256(const std::string& text) {
    const auto digit = [](char c) { return is_digit(c) || (c >= 'a' && c <= 'f'); };
    return text.size() == 64 && std::all_of(text.begin(), text.end(), digit);
}

/// Such as "8.6".
bool is_capability(const std::string& text) {
    const std::size_t point = text.find('.');
    const auto digits = [&](std::size_t from, std::size_t to) {
        return from < to && std::all_of(text.begin() + from, text.begin() + to, is_digit);
    };
    return point != std::string::npos && digits(0, point) && digits(point + 1, text.size());
}

/// Of a library; it is printed, so nothing in it may steer a terminal.
bool is_version(const std::string& text) {
    const auto allowed = [](char c) { return is_word(c) || c == '.' || c == '+' || c == '-'; };
    return !text.empty() && text.size() <= 100 && std::all_of(text.begin(), text.end(), allowed);
}

File parse_file(const json& value, const std::string& where) {
    const Object object(value, where, {"name", "sha256", "size", "role"});
    File file{object.text("name"), object.text("sha256"), object.integer("size"),
              object.choice("role", {"onnx", "engine", "canary", "report"})};
    DERAINER_CHECK(InvalidModel, is_plain_name(file.name),
                   "expected a plain file name of at most 255 letters, digits and _.+-, found " + quote(file.name));
    DERAINER_CHECK(InvalidModel, is_sha256(file.sha256),
                   file.name + ": expected a SHA-256 of 64 digits 0-9 and a-f, found " + quote(file.sha256));
    return file;
}

/// The shape of an input or an output.
std::vector<std::int64_t> parse_tensor(const json& value, const std::string& where) {
    const Object object(value, where, {"name", "dtype", "shape"});
    object.text("name");
    object.text("dtype");
    return object.integers("shape");
}

Model parse_model(const json& value, const std::string& where) {
    const Object object(value, where,
                        {"file", "io", "input", "output", "size_multiple", "precision", "topk", "config",
                         "weights_sha256", "provenance"});
    const std::vector<std::int64_t> shape = parse_tensor(object.object("input"), where + ".input");
    parse_tensor(object.object("output"), where + ".output");
    DERAINER_CHECK(InvalidModel, shape.size() == 4 && (shape[0] == kAny || (1 <= shape[0] && shape[0] <= kMaxBatch)),
                   where + ": expected an input of 1 to " + std::to_string(kMaxBatch) +
                       " images, or -1 for any number, and three more lengths, found the shape " + quote(shape));
    object.check_optional({"precision", "topk", "weights_sha256"}, &json::is_string, "a string");
    object.check_optional({"config", "provenance"}, &json::is_object, "an object");
    const std::string name = object.choice("io", {"tensor", "tensor16", "image"});
    const Io io = name == "image" ? Io::image : name == "tensor16" ? Io::tensor16 : Io::tensor;
    Model model{object.text("file"), {io, object.integer("size_multiple"), shape[0]}};
    DERAINER_CHECK(InvalidModel, 1 <= model.graph_io.multiple && model.graph_io.multiple <= kMaxMultiple,
                   where + ": expected a size multiple from 1 to " + std::to_string(kMaxMultiple) + ", found " +
                       std::to_string(model.graph_io.multiple));
    return model;
}

Profile parse_profile(const json& value, const std::string& where) {
    const Object object(value, where, {"min", "opt", "max"}, {"batch"});
    Profile profile{object.size("min"), object.size("opt"), object.size("max")};
    if (value.contains("batch")) {
        const std::vector<std::int64_t> batch = object.integers("batch");
        if (batch.size() != 3) {
            refuse(where + ".batch", "three integers", value.at("batch"));
        }
        std::copy(batch.begin(), batch.end(), profile.batch.begin());
    }
    const auto ordered = [](std::int64_t min, std::int64_t opt, std::int64_t max) {
        return 1 <= min && min <= opt && opt <= max;
    };
    DERAINER_CHECK(InvalidModel,
                   ordered(profile.min.height, profile.opt.height, profile.max.height) &&
                       ordered(profile.min.width, profile.opt.width, profile.max.width),
                   where + ": expected 1 <= min <= opt <= max, found " + quote(value));
    DERAINER_CHECK(InvalidModel,
                   ordered(profile.batch[0], profile.batch[1], profile.batch[2]) && profile.batch[2] <= kMaxBatch,
                   where + ": expected a profile of 1 to " + std::to_string(kMaxBatch) +
                       " images, in ascending order, found " + quote(value));
    return profile;
}

/// An engine, and the hash of the model that it was built from.
std::pair<Engine, std::string> parse_engine(const json& value, const std::string& where) {
    const Object object(
        value, where,
        {"file", "flavor", "version", "compute_capabilities", "profiles", "flags", "onnx_sha256", "build_seconds"});
    object.check_optional({"build_seconds"}, &json::is_number, "a number");
    Engine engine{
        object.text("file"), object.choice("flavor", {"rtx", "tensorrt"}), object.text("version"), {}, {}, {}};
    if (!is_version(engine.version)) {
        refuse(where, "a version such as 11.4.0.106", engine.version);
    }
    for (const json& capability : object.list("compute_capabilities")) {
        if (!capability.is_string() || !is_capability(capability.get<std::string>())) {
            refuse(where, "compute capabilities such as \"8.6\"", capability);
        }
        engine.compute_capabilities.push_back(capability.get<std::string>());
    }
    engine.profiles = parse_list(object.list("profiles"), where + ".profiles", parse_profile);
    DERAINER_CHECK(InvalidModel, !engine.profiles.empty(), where + ": expected at least one profile, found none");
    for (const auto& flag : object.object("flags").items()) {
        if (flag.value() == true) {
            engine.flags.insert(flag.key());
        }
    }
    return {engine, object.text("onnx_sha256")};
}

/// The name of the file that was measured.
std::string parse_drift(const json& value, const std::string& where) {
    const Object object(
        value, where,
        {"file", "provider", "reference_sha256", "data", "protocol", "images", "psnr_between", "max_difference",
         "reference_psnr", "candidate_psnr", "drop_db", "reference_ssim", "candidate_ssim"},
        {"input_psnr", "input_ssim"});
    object.text("provider");
    const std::string reference = object.text("reference_sha256");
    DERAINER_CHECK(InvalidModel, is_sha256(reference),
                   where + ": expected a SHA-256 of 64 digits 0-9 and a-f, found " + quote(reference));
    object.text("data");
    object.integer("images");
    object.integer("max_difference");
    object.check_optional({"protocol"}, &json::is_string, "a string");
    object.check_optional({"psnr_between", "reference_psnr", "candidate_psnr", "drop_db", "reference_ssim",
                           "candidate_ssim", "input_psnr", "input_ssim"},
                          &json::is_number, "a number");  // JSON has no infinite ones
    return object.text("file");
}

Canary parse_canary(const json& value, const std::string& where) {
    const Object object(value, where, {"file", "height", "width", "floor_db"});
    Canary canary{object.text("file"), {object.integer("height"), object.integer("width")}, object.number("floor_db")};
    const auto [height, width] = canary.size;
    DERAINER_CHECK(InvalidModel,
                   1 <= std::min(height, width) && std::max(height, width) <= kMaxCanary && 0 <= canary.floor_db &&
                       canary.floor_db <= 100,
                   canary.file + ": expected a canary of at most " + std::to_string(kMaxCanary) +
                       " pixels a side and a floor of 0 to 100 dB, found " + to_string(canary.size) + " and " +
                       std::to_string(canary.floor_db));
    return canary;
}

/// JSON in which no object has a field twice, since two readers may take different ones.
json parse_json(const std::string& content) {
    std::vector<std::set<std::string>> seen;
    const auto strict = [&](int depth, json::parse_event_t event, const json& parsed) {
        DERAINER_CHECK(InvalidModel, depth <= kMaxDepth, "expected JSON, found what is nested too deep");
        if (event == json::parse_event_t::object_start) {
            seen.emplace_back();
        } else if (event == json::parse_event_t::object_end) {
            seen.pop_back();
        } else if (event == json::parse_event_t::key && !seen.back().insert(parsed.get<std::string>()).second) {
            throw InvalidModel("expected JSON, found a field twice: " + quote(parsed), "one field of a name");
        }
        return true;
    };
    try {
        return json::parse(content, strict);
    } catch (const json::exception& error) {
        throw InvalidModel("expected JSON, found what is not: " + quote(error.what()), "json::parse(content)");
    }
}

}  // namespace

bool Profile::takes(Size size, std::int64_t images) const { return is_between(size, min, max) && images <= batch[2]; }

std::int64_t Engine::max_batch(Size size) const {
    std::int64_t most = 0;
    for (const Profile& profile : profiles) {
        most = profile.takes(size) ? std::max(most, profile.batch[2]) : most;
    }
    return most;
}

std::optional<std::size_t> Engine::profile_for(Size size, std::int64_t images) const {
    const auto found = std::find_if(profiles.begin(), profiles.end(),
                                    [&](const Profile& profile) { return profile.takes(size, images); });
    if (found == profiles.end()) {
        return std::nullopt;
    }
    return static_cast<std::size_t>(found - profiles.begin());
}

Manifest parse(const std::string& content) {
    const json found = parse_json(content);
    if (found.is_object()) {
        const json schema = found.value("schema", json());
        DERAINER_CHECK(InvalidModel, schema == kSchema,
                       "expected schema " + std::to_string(kSchema) + ", found " + quote(schema) +
                           "; use the version of drsformer-deploy that made the bundle, or make it "
                           "again");
    }
    const Object object(found, "manifest", {"schema", "created_by", "model", "files", "engines", "drift"},
                        {"canaries"});
    object.integer("schema");
    const auto engines = parse_list(object.list("engines"), "manifest.engines", parse_engine);
    Manifest manifest{object.text("created_by"),
                      parse_model(object.object("model"), "manifest.model"),
                      parse_list(object.list("files"), "manifest.files", parse_file),
                      {},
                      {},
                      {}};
    if (found.contains("canaries")) {
        manifest.canaries = parse_list(object.list("canaries"), "manifest.canaries", parse_canary);
    }

    std::map<std::string, std::string> listed;  // roles by name
    std::map<std::string, std::string> described{{manifest.model.file, "onnx"}};
    std::string onnx_sha256;
    std::set<std::string> names;
    for (const File& file : manifest.files) {
        DERAINER_CHECK(InvalidModel, names.insert(lower(file.name)).second,  // some file systems do not tell A from a
                       "expected every file once, found " + quote(file.name) + " twice");
        if (file.role != "report") {
            listed[file.name] = file.role;
        }
        if (file.name == manifest.model.file) {
            onnx_sha256 = file.sha256;
        }
    }
    for (const auto& [engine, built_from] : engines) {
        DERAINER_CHECK(InvalidModel, described.emplace(engine.file, "engine").second,
                       "expected every engine described once, found " + quote(engine.file) + " twice");
        manifest.engines.push_back(engine);
    }
    for (const Canary& canary : manifest.canaries) {
        DERAINER_CHECK(InvalidModel, described.emplace(canary.file, "canary").second,
                       "expected every canary described once, found " + quote(canary.file) + " twice");
    }
    DERAINER_CHECK(InvalidModel, described == listed,
                   "expected one model, the engines and the canaries under files, each described once, found " +
                       quote(listed) + " there and " + quote(described) + " described");
    for (const auto& [engine, built_from] : engines) {
        DERAINER_CHECK(InvalidModel, built_from == onnx_sha256,
                       engine.file + " was built from another model: expected SHA-256 " + onnx_sha256 + ", found " +
                           quote(built_from) + "; build it again");
        const std::int64_t multiple = manifest.model.graph_io.multiple;
        for (const Profile& profile : engine.profiles) {
            DERAINER_CHECK(InvalidModel, is_multiple(profile.min, multiple) && is_multiple(profile.max, multiple),
                           engine.file + ": expected profiles in multiples of " + std::to_string(multiple) +
                               ", found " + to_string(profile.min) + " to " + to_string(profile.max));
        }
    }
    for (const std::string& measured : parse_list(object.list("drift"), "manifest.drift", parse_drift)) {
        const auto role = described.find(measured);
        DERAINER_CHECK(
            InvalidModel, role != described.end() && role->second != "canary",
            "expected a drift of the model or an engine of " + quote(described) + ", found one of " + quote(measured));
        manifest.proven.insert(measured);
    }
    for (const Canary& canary : manifest.canaries) {
        const auto file = std::find_if(manifest.files.begin(), manifest.files.end(),
                                       [&](const File& each) { return each.name == canary.file; });
        const std::int64_t bytes = canary.size.height * canary.size.width * 6;
        DERAINER_CHECK(InvalidModel, file->size == bytes,
                       canary.file + ": expected " + std::to_string(bytes) + " bytes for two images of " +
                           to_string(canary.size) + ", found " + std::to_string(file->size));
        DERAINER_CHECK(InvalidModel, is_multiple(canary.size, manifest.model.graph_io.multiple),
                       canary.file + ": expected a canary in multiples of " +
                           std::to_string(manifest.model.graph_io.multiple) + ", found " + to_string(canary.size));
    }
    return manifest;
}

}  // namespace derainer
