/// The shared library, in C++ and C, on the CPU with a small network; tests/test_cpp.py compares what that which ships
/// makes of photographs with Python.
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "bundle_folder.hpp"
#include "catch.hpp"
#include "derainer.h"
#include "derainer.hpp"
#include "network.hpp"
#include "onnx_network.hpp"

using namespace derainer;

namespace {

using Pixels = std::vector<std::uint8_t>;

const std::string network = onnx_network::mean();

class CpuBundle : public BundleFolder {
public:
    explicit CpuBundle(const std::string& model = network, const std::string& io = "tensor") {
        write("model.onnx", model);
        write_manifest(io);
    }
};

Options on_cpu() {
    Options options;
    options.provider = "cpu";
    return options;
}

Pixels run(Derainer& derain, std::size_t height, std::size_t width, std::size_t stride) {
    Pixels image = golden_image(height, width, stride);
    derain.run(image.data(), static_cast<std::int64_t>(height), static_cast<std::int64_t>(width), stride, image.data());
    return image;
}

Pixels run(Derainer& derain, std::size_t height, std::size_t width) { return run(derain, height, width, 3 * width); }

/// Opens in C; the handle is closed at the end.
struct Handle {
    explicit Handle(const std::string& bundle, const derainer_options* options = nullptr)
        : status(derainer_open(bundle.c_str(), options, &handle)) {}
    ~Handle() { derainer_close(handle); }
    Handle(const Handle&) = delete;
    Handle& operator=(const Handle&) = delete;

    derainer_handle* handle = nullptr;
    derainer_status status;
};

derainer_options c_options(const char* provider) {
    derainer_options options = {};
    options.size = sizeof options;
    options.provider = provider;
    return options;
}

}  // namespace

TEST_CASE("images of any size, again and again, in place and with rows apart") {
    const CpuBundle bundle;
    Derainer derain(bundle.folder, on_cpu());
    CHECK(derain.provider() == "cpu");
    CHECK(derain.fallback_reason().empty());
    CHECK(derain.graph_io().multiple == 8);
    const Pixels first = run(derain, 33, 47);
    CHECK(first != golden_image(33, 47, 3 * 47));
    CHECK(run(derain, 1, 1).size() == 3);
    CHECK(run(derain, 33, 47) == first);
    const Pixels apart = run(derain, 33, 47, 150);
    for (std::size_t y = 0; y < 33; ++y) {
        for (std::size_t i = 0; i < 150; ++i) {
            REQUIRE(int{apart[y * 150 + i]} == (i < 141 ? first[y * 141 + i] : 0));
        }
    }
    std::vector<Pixels> images(2, golden_image(33, 47, 3 * 47));
    derain.run({{images[0].data(), 33, 47, 141, images[0].data()}, {images[1].data(), 33, 47, 141, images[1].data()}});
    CHECK(images[0] == first);
    CHECK(images[1] == first);
    CHECK_THROWS_AS(derain.enqueue(nullptr, nullptr, 8, 8, nullptr), InputError);
}

TEST_CASE("several images of a size at once, filled up where the graph takes no fewer") {
    const CpuBundle alone;
    Derainer one(alone.folder, on_cpu());
    for (const int batch : {-1, 4}) {
        CpuBundle bundle(onnx_network::mean(batch < 0 ? 0 : 4));
        bundle.batch = batch;
        bundle.write_manifest("tensor");
        for (const std::int64_t most : {0, 1, 3}) {
            Options options = on_cpu();
            options.batch = most;
            Derainer derain(bundle.folder, options);
            CHECK(derain.graph_io().batch == batch);
            std::vector<Pixels> images;
            std::vector<Image> all;
            for (std::size_t i = 0; i < 6; ++i) {  // the last of another size
                images.push_back(golden_image(33 + i, i == 5 ? 24 : 47, 141));
            }
            for (std::size_t i = 0; i < 6; ++i) {
                all.push_back({images[i].data(), 33, i == 5 ? 24 : 47, 141, images[i].data()});
            }
            derain.run(all);
            for (std::size_t i = 0; i < 6; ++i) {
                Pixels expected = golden_image(33 + i, i == 5 ? 24 : 47, 141);
                one.run(expected.data(), 33, i == 5 ? 24 : 47, 141, expected.data());
                CHECK(images[i] == expected);
            }
        }
        derainer_options options = c_options("cpu");
        options.batch = 2;
        const Handle handle(bundle.folder.string(), &options);
        REQUIRE(handle.status == DERAINER_OK);
        Pixels first = golden_image(16, 24, 72);
        Pixels second = first;
        const derainer_image images[] = {{first.data(), 16, 24, 72, first.data()},
                                         {second.data(), 16, 24, 72, second.data()}};
        CHECK(derainer_restore_batch(handle.handle, images, 2) == DERAINER_OK);
        CHECK(first == run(one, 16, 24));
        CHECK(second == first);
        CHECK(derainer_restore_batch(handle.handle, nullptr, 0) == DERAINER_OK);
        CHECK(derainer_restore_batch(handle.handle, nullptr, 1) == DERAINER_INVALID_ARGUMENT);
        CHECK(derainer_restore_batch(nullptr, images, 2) == DERAINER_INVALID_ARGUMENT);
    }
    Options options = on_cpu();
    options.batch = -1;
    CHECK_THROWS_AS(Derainer(alone.folder, options), InputError);
}

TEST_CASE("threads share one, and one that is moved goes on") {
    const CpuBundle bundle;
    Options options = on_cpu();
    options.threads = 1;
    Derainer opened(bundle.folder, options);
    Derainer derain(std::move(opened));
    const Pixels small = run(derain, 16, 24);
    std::vector<char> right(4);
    std::vector<std::thread> threads;
    for (char& equal : right) {
        threads.emplace_back([&] { equal = static_cast<char>(run(derain, 16, 24) == small); });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    CHECK(right == std::vector<char>(4, 1));
}

TEST_CASE("what cannot be used has its type, across the library's border") {
    const CpuBundle bundle;
    const auto open = [&](const Options& options) { Derainer derain(bundle.folder, options); };
    Options options = on_cpu();
    options.threads = -1;
    CHECK_THROWS_AS(open(options), InputError);
    options = on_cpu();
    options.provider = "gpu";
    CHECK_THROWS_AS(open(options), InputError);
    options = on_cpu();
    options.public_key = "none.pem";
    CHECK_THROWS_AS(open(options), MismatchError);  // there is no signature
    options.public_key.reset();
    options.tile = Size{12, 16};
    Derainer derain(bundle.folder, options);
    CHECK_THROWS_AS(run(derain, 16, 24), InputError);
    CHECK_THROWS_AS(run(derain, 0, 24), InvalidImage);
    CHECK_THROWS_AS(derain.run(nullptr, 8, 8, 24, nullptr), InvalidImage);
    bundle.write("model.onnx", network.substr(0, network.size() - 1));
    CHECK_THROWS_AS(open(on_cpu()), MismatchError);
    std::filesystem::remove(bundle.folder / "manifest.json");
    CHECK_THROWS_AS(open(on_cpu()), InvalidModel);
}

TEST_CASE("models that are none, or others than the manifest says") {
    for (const std::string& model : {std::string("weights"), std::string(), std::string("<net></net>"),
                                     network.substr(0, network.size() / 2), network + '\x0f'}) {
        const CpuBundle bundle(model);
        CHECK_THROWS_AS(Derainer(bundle.folder, on_cpu()), InvalidModel);
    }
    for (const char* io : {"image", "tensor16"}) {
        const CpuBundle bundle(network, io);
        CHECK(contains(refusal([&] { Derainer(bundle.folder, on_cpu()); }), "as the manifest says, found f32"));
    }
}

TEST_CASE("a model that answers wrongly restores nothing") {
    const CpuBundle bundle;
    Pixels image = golden_image(16, 24, 3 * 24);
    const std::string input(image.begin(), image.end());
    Derainer(bundle.folder, on_cpu()).run(image.data(), 16, 24, 3 * 24, image.data());
    const std::string canary = R"({"file": "canary.rgb", "height": 16, "width": 24, "floor_db": 50})";
    bundle.write("canary.rgb", input + std::string(image.begin(), image.end()));
    bundle.write_manifest("tensor", "", canary);
    CHECK(Derainer(bundle.folder, on_cpu()).provider() == "cpu");
    bundle.write("canary.rgb", input + input);
    bundle.write_manifest("tensor", "", canary);
    CHECK_THROWS_AS(Derainer(bundle.folder, on_cpu()), CanaryError);
    CHECK(Handle(bundle.folder.string()).status == DERAINER_DEVICE);
    derainer_options options = c_options("cpu");
    options.canary = "never";
    CHECK(Handle(bundle.folder.string(), &options).status == DERAINER_OK);
    options.require_proof = 1;
    CHECK(Handle(bundle.folder.string(), &options).status == DERAINER_INVALID_BUNDLE);
    options.canary = "often";
    options.require_proof = 0;
    CHECK(Handle(bundle.folder.string(), &options).status == DERAINER_INVALID_ARGUMENT);
}

TEST_CASE("the same in C") {
    const CpuBundle bundle;
    const std::string folder = bundle.folder.string();
    Derainer derain(bundle.folder, on_cpu());
    Pixels image = golden_image(33, 47, 3 * 47);
    const Handle opened(folder);
    REQUIRE(opened.status == DERAINER_OK);
    CHECK(std::string(derainer_provider(opened.handle)) == "cpu");
    CHECK(contains(derainer_fallback_reason(opened.handle), "expected a bundle with an engine"));
    CHECK(derainer_restore(opened.handle, image.data(), 33, 47, 3 * 47, image.data()) == DERAINER_OK);
    CHECK(image == run(derain, 33, 47));
    CHECK(std::string(derainer_version()) == DERAINER_VERSION);

    Options options = on_cpu();
    options.tile = Size{16, 24};
    options.overlap = 0;
    derainer_options same = c_options("cpu");
    same.tile_height = 16;
    same.tile_width = 24;
    same.overlap = -1;
    same.threads = 1;
    const Handle in_tiles(folder, &same);
    Pixels tiles = golden_image(33, 47, 3 * 47);
    CHECK(derainer_restore(in_tiles.handle, tiles.data(), 33, 47, 3 * 47, tiles.data()) == DERAINER_OK);
    Derainer cutting(bundle.folder, options);
    CHECK(tiles == run(cutting, 33, 47));
    CHECK(tiles != image);
}

TEST_CASE("what goes wrong in C has its number and its text, in its thread") {
    const CpuBundle bundle;
    const std::string folder = bundle.folder.string();
    Pixels image(3 * 8 * 8);
    std::uint8_t* rgb = image.data();
    const Handle opened(folder);
    derainer_handle* handle = opened.handle;
    const auto said = [](const char* part) { return contains(derainer_error(), part); };

    CHECK(derainer_open(folder.c_str(), nullptr, nullptr) == DERAINER_INVALID_ARGUMENT);
    CHECK(said("found a null pointer"));
    CHECK(derainer_restore(nullptr, rgb, 8, 8, 24, rgb) == DERAINER_INVALID_ARGUMENT);
    CHECK(derainer_restore(handle, nullptr, 8, 8, 24, rgb) == DERAINER_INVALID_IMAGE);
    CHECK(derainer_restore(handle, rgb, 8, 8, 24, nullptr) == DERAINER_INVALID_IMAGE);
    CHECK(derainer_restore(handle, rgb, -1, 8, 24, rgb) == DERAINER_INVALID_IMAGE);
    CHECK(derainer_restore(handle, rgb, 8, 8, 23, rgb) == DERAINER_INVALID_IMAGE);
    CHECK(said("found a stride of 23"));
    std::thread([] { CHECK(std::string(derainer_error()).empty()); }).join();
    CHECK(derainer_restore(handle, rgb, 8, 8, 24, rgb) == DERAINER_OK);
    CHECK(said("found a stride of 23"));  // until the next failure
    CHECK(std::string(derainer_provider(nullptr)).empty());
    CHECK(std::string(derainer_fallback_reason(nullptr)).empty());
    derainer_close(nullptr);

    derainer_handle* none = handle;
    CHECK(derainer_open(nullptr, nullptr, &none) == DERAINER_INVALID_ARGUMENT);
    CHECK(none == nullptr);
    CHECK(Handle(folder + "/none").status == DERAINER_INVALID_BUNDLE);
    const std::string longer(10000, 'a');  // than the text may be
    CHECK(Handle(longer).status == DERAINER_INVALID_BUNDLE);
    CHECK(std::string(derainer_error()).size() == 4095);
    derainer_options options = c_options("gpu");
    CHECK(Handle(folder, &options).status == DERAINER_INVALID_ARGUMENT);
    CHECK(said("expected the provider auto, tensorrt or cpu, found gpu"));
    options = c_options("cpu");
    options.size = 0;
    CHECK(Handle(folder, &options).status == DERAINER_INVALID_ARGUMENT);
    CHECK(said("set options.size"));
    options = c_options("cpu");
    options.public_key = "none.pem";
    CHECK(Handle(folder, &options).status == DERAINER_INVALID_BUNDLE);
    bundle.write("model.onnx", "");
    CHECK(Handle(folder).status == DERAINER_INVALID_BUNDLE);
    CHECK(said("model.onnx: expected"));
}
