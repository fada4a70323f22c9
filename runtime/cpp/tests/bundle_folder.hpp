/// A folder of its own that becomes a bundle.
#pragma once

#include <filesystem>
#include <fstream>
#include <string>

#include <stdlib.h>

#include "crypto.hpp"
#include "files.hpp"

class BundleFolder {
public:
    BundleFolder() {
        char pattern[] = "/tmp/derainer-XXXXXX";
        parent_ = ::mkdtemp(pattern);
        folder = parent_ / "bundle";
        std::filesystem::create_directory(folder);
    }
    ~BundleFolder() { std::filesystem::remove_all(parent_); }
    BundleFolder(const BundleFolder&) = delete;
    BundleFolder& operator=(const BundleFolder&) = delete;

    void write(const std::string& name, const std::string& content) const {
        std::ofstream(folder / name, std::ios::binary) << content;
    }

    /// Of model.onnx, whose graph takes `io`, of plan.engine where `engine` describes it, and of canary.rgb where
    /// `canary` does; `drift` may describe what was judged.
    void write_manifest(const std::string& io, const std::string& engine = "", const std::string& canary = "",
                        const std::string& drift = "") const {
        const std::string tensor = R"("dtype": "any", "shape": [)" + std::to_string(batch) + ", 3, -1, -1]}";
        write("manifest.json", R"({"schema": 1, "created_by": "test", "drift": [)" + drift +
                                   R"(], "model": {"file": "model.onnx",
            "input": {"name": "input", )" +
                                   tensor + R"(, "output": {"name": "output", )" + tensor + R"(,
            "precision": null, "topk": null, "config": null, "weights_sha256": null, "provenance": null, "io": ")" +
                                   io + R"(", "size_multiple": )" + (io == "image" ? "1" : "8") + R"(},
            "files": [)" + entry("model.onnx", "onnx") +
                                   (engine.empty() ? "" : ", " + entry("plan.engine", "engine")) +
                                   (canary.empty() ? "" : ", " + entry("canary.rgb", "canary")) + R"(],
            "canaries": [)" + canary +
                                   R"(],
            "engines": [)" + engine +
                                   "]}");
    }

    std::filesystem::path folder;
    int batch = 1;  // images that the model takes at once

private:
    std::string entry(const std::string& name, const std::string& role) const {
        const std::string content = derainer::read_file(folder / name);
        return R"({"name": ")" + name + R"(", "sha256": ")" + derainer::sha256(content) + R"(", "size": )" +
               std::to_string(content.size()) + R"(, "role": ")" + role + R"("})";
    }

    std::filesystem::path parent_;
};
