/// Derainer on stand-ins for CUDA and TensorRT that check what they are asked for; with TensorRT's and with RTX's
/// source.
#include <filesystem>
#include <iterator>
#include <limits>
#include <thread>

#include "bundle_folder.hpp"
#include "catch.hpp"
#include "crypto.hpp"
#include "derainer.hpp"
#include "fake.hpp"
#include "files.hpp"
#include "network.hpp"
#include "trt.hpp"

using namespace derainer;

namespace {

using Pixels = std::vector<std::uint8_t>;

/// A bundle with an engine of two profiles, 8x8 to 32x40 and 8x48 to 16x128, in a folder of its own.
class TestBundle : public BundleFolder {
public:
    explicit TestBundle(const std::string& plan = "tensor", const std::string& flags = "{}",
                        const std::string& more = "") {
        fake = Fake();
        write("model.onnx", "weights");
        write("plan.engine", plan);
        const std::string io = plan == "image" || plan == "tensor16" ? plan : "tensor";
        engine_ = R"({"file": "plan.engine", "flavor": ")" + std::string(Library::flavor) +
                  R"(", "version": "11.4.0.106",
            "compute_capabilities": ["8.6"], "flags": )" +
                  flags + R"(, "build_seconds": 1,
            "onnx_sha256": ")" +
                  sha256("weights") +
                  R"(", "profiles": [
            {"min": [8, 8], "opt": [32, 40], "max": [32, 40]}, {"min": [8, 48], "opt": [8, 48],
            "max": [16, 128])" +
                  more + "}]}";
        write_manifest(io, engine_);
    }

    /// A known answer of the network, of 16x24 pixels.
    void add_canary(const Pixels& answer, const std::string& drift = "") const {
        const Pixels image = golden_image(16, 24, 3 * 24);
        write("canary.rgb", std::string(image.begin(), image.end()) + std::string(answer.begin(), answer.end()));
        write_manifest("tensor", engine_, R"({"file": "canary.rgb", "height": 16, "width": 24, "floor_db": 50})",
                       drift);
    }

    std::filesystem::path canary_record() const {
        return folder.string() + "." + sha256(read_file(folder / "plan.engine")).substr(0, 12) + ".canary-cpp";
    }

    std::filesystem::path cache() const {
        return folder.string() + "." + sha256(read_file(folder / "plan.engine")).substr(0, 12) + ".cache";
    }

private:
    std::string engine_;
};

/// What the restored golden image has to be, if it fits whole; by plain loops.
Pixels expected(std::size_t height, std::size_t width) {
    std::vector<float> answer(3 * height * width);
    const Pixels image = golden_image(height, width, 3 * width);
    std::vector<float> input(answer.size());
    for (std::size_t i = 0; i < image.size(); ++i) {
        input[(i % 3) * height * width + i / 3] = static_cast<float>(image[i]) / 255.0F;
    }
    stand_in(input.data(), answer.data(), height, width);
    Pixels result;
    for (std::size_t i = 0; i < image.size(); ++i) {
        result.push_back(static_cast<std::uint8_t>(std::nearbyint(answer[(i % 3) * height * width + i / 3] * 255.0F)));
    }
    return result;
}

Pixels run(Derainer& derain, std::size_t height, std::size_t width) {
    Pixels image = golden_image(height, width, 3 * width);
    derain.run(image.data(), static_cast<std::int64_t>(height), static_cast<std::int64_t>(width), 3 * width,
               image.data());
    return image;
}

}  // namespace

TEST_CASE("images come out restored, again and again, at several sizes") {
    const TestBundle bundle;
    Derainer derain(bundle.folder);
    CHECK(derain.graph_io().io == Io::tensor);
    CHECK(derain.graph_io().multiple == 8);
    CHECK(derain.provider() == "tensorrt");
    CHECK(derain.fallback_reason().empty());
    for (int i = 0; i < 3; ++i) {
        CHECK(run(derain, 16, 128) == expected(16, 128));
        CHECK(run(derain, 16, 24) == expected(16, 24));
        CHECK(run(derain, 8, 8) == expected(8, 8));
    }
    CHECK(fake.count("malloc host") == 4);
    CHECK(fake.contexts == 3);
    CHECK(fake.count("capture") == (Library::jit ? 0 : 3));  // in the second run of each size
    CHECK(fake.count("launch") == (Library::jit ? 0 : 6));
    CHECK(fake.cuda_graphs == Library::jit);
}

TEST_CASE("images of one size go through the profile that takes so many") {
    for (const std::string plan : {"tensor", "image"}) {
        const TestBundle bundle(plan, "{}", R"(, "batch": [2, 4, 4])");
        fake.has_finite = plan == "image";
        Derainer derain(bundle.folder);
        std::vector<Pixels> images;
        std::vector<Image> all;
        for (std::size_t i = 0; i < 7; ++i) {
            images.push_back(golden_image(16, 48, 3 * 48));
        }
        for (Pixels& image : images) {
            all.push_back({image.data(), 16, 48, 3 * 48, image.data()});
        }
        derain.run(all);
        const Pixels alone = run(derain, 16, 48);  // filled up
        if (plan == "tensor") {
            CHECK(alone == expected(16, 48));
        }
        CHECK(images == std::vector<Pixels>(7, alone));
        CHECK(fake.count("enqueue") == 3);
        CHECK(fake.contexts == 3);  // four, three and two at once
        if (plan == "image") {
            fake.finite = NAN;
            CHECK_THROWS_AS(derain.run(all), InvalidModel);
        }
    }
}

TEST_CASE("as many images as the engine takes go on the caller's stream") {
    const TestBundle bundle("tensor", "{}", R"(, "batch": [2, 4, 4])");
    Derainer derain(bundle.folder);
    cudaStream_t stream = nullptr;
    cudaStreamCreateWithFlags(&stream, 0);
    std::vector<float> input(4 * 3 * 8 * 48, 0.5F);
    std::vector<float> output(input.size());
    std::vector<float> answer(input.size());
    for (std::size_t place = 0; place < input.size(); place += 3 * 8 * 48) {
        stand_in(input.data() + place, answer.data() + place, 8, 48);
    }
    derain.enqueue(input.data(), output.data(), 8, 48, stream, nullptr, 4);
    cudaStreamSynchronize(stream);
    CHECK(output == answer);
    CHECK(contains(refusal([&] { derain.enqueue(input.data(), output.data(), 8, 48, stream); }),
                   "takes at least 2 images of 8x48 at once, found 1"));
    CHECK(contains(refusal([&] { derain.enqueue(input.data(), output.data(), 8, 48, stream, nullptr, 5); }),
                   "found 5 at once of 8x48; build it with another --min and --max, or --batch"));
    cudaStreamDestroy(stream);
}

TEST_CASE("larger images are cut into the golden tiles") {
    const TestBundle bundle;
    Options options;
    options.overlap = 12;
    Derainer derain(bundle.folder, options);
    for (int i = 0; i < 3; ++i) {  // as in tests/golden/tiling.json
        const Pixels image = run(derain, 97, 101);
        CHECK(sha256({image.begin(), image.end()}) ==
              "11300dd21134a6810ce09d7ded8d1890a1b3b1bc2d3c4b9424885b7a91db35f3");
    }
}

TEST_CASE("several images at once, and in place of each other's memory") {
    const TestBundle bundle;
    Derainer derain(bundle.folder);
    const std::vector<std::pair<std::size_t, std::size_t>> sizes = {{16, 24}, {8, 8},   {32, 40},
                                                                    {16, 24}, {97, 30}, {8, 8}};
    std::vector<Pixels> images;
    std::vector<Image> tasks;
    for (const auto& [height, width] : sizes) {
        images.push_back(golden_image(height, width, 3 * width));
    }
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        const auto [height, width] = sizes[i];
        tasks.push_back({images[i].data(), static_cast<std::int64_t>(height), static_cast<std::int64_t>(width),
                         3 * width, images[i].data()});
    }
    derain.run(tasks);
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        const auto [height, width] = sizes[i];
        CHECK(images[i] == run(derain, height, width));
    }
    CHECK(fake.in_order);
    derain.run(std::vector<Image>{});
    CHECK(contains(refusal([&] { derain.run(images[0].data(), 0, 8, 24, images[0].data()); }), "at least one pixel"));
    CHECK(contains(refusal([&] { derain.run(images[0].data(), 8, 8, 23, images[0].data()); }), "a stride of 23"));
    CHECK(contains(refusal([&] { derain.run(images[0].data(), 8, 200, 600, nullptr); }), "null pointer"));
}

TEST_CASE("images of a graph that takes images") {
    const TestBundle bundle("image");
    Derainer derain(bundle.folder);
    for (const auto& [height, width] : std::vector<std::pair<std::size_t, std::size_t>>{{9, 11}, {70, 50}}) {
        const Pixels image = golden_image(height, width, 3 * width);
        const Pixels restored = run(derain, height, width);
        for (std::size_t i = 0; i < image.size(); ++i) {
            REQUIRE(int{restored[i]} == 255 - image[i]);
        }
    }
}

TEST_CASE("a graph of images says whether its answer was finite") {
    const TestBundle bundle("image");
    const std::size_t before = fake.memory;
    cudaStream_t stream = nullptr;
    cudaStreamCreateWithFlags(&stream, 0);
    Pixels image(3 * 9 * 11);
    float finite = 1;
    {
        Derainer silent(bundle.folder);
        CHECK(contains(refusal([&] { silent.enqueue(image.data(), image.data(), 9, 11, stream, &finite); }),
                       "without `finite`"));
    }
    fake.has_finite = true;
    {
        Derainer derain(bundle.folder);
        for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
            for (const auto& [height, width] : std::vector<std::pair<std::size_t, std::size_t>>{{9, 11}, {70, 50}}) {
                fake.finite = bad;
                const std::string said = refusal([&] { run(derain, height, width); });
                CHECK(contains(said, "the network answered with NaN or infinity"));
                CHECK_THROWS_AS(run(derain, height, width), InvalidModel);
                fake.finite = 0.5F;
                const Pixels restored = run(derain, height, width);
                CHECK(int{restored[0]} == 255 - golden_image(height, width, 3 * width)[0]);
            }
        }
        derain.enqueue(image.data(), image.data(), 9, 11, stream);
        derain.enqueue(image.data(), image.data(), 9, 11, stream, &finite);
        CHECK(finite == 1.0F);  // nobody has waited for it
        cudaStreamSynchronize(stream);
        CHECK(finite == 0.5F);
    }
    cudaStreamDestroy(stream);
    CHECK(fake.memory == before);
}

TEST_CASE("images of a graph that takes float16, whole and in tiles") {
    const TestBundle bundle("tensor16");  // whose stand-in answers with its input
    Derainer derain(bundle.folder);
    CHECK(derain.graph_io().io == Io::tensor16);
    for (const auto& [height, width] : std::vector<std::pair<std::size_t, std::size_t>>{{9, 11}, {70, 50}}) {
        CHECK(run(derain, height, width) == golden_image(height, width, 3 * width));
    }
}

TEST_CASE("work on the stream of the caller") {
    const TestBundle bundle;
    cudaStream_t stream = nullptr;
    cudaStreamCreateWithFlags(&stream, 0);
    std::vector<float> input(3 * 16 * 24, 0.5F);
    std::vector<float> output(input.size());
    std::vector<float> answer(input.size());
    {
        Derainer derain(bundle.folder);
        CHECK(run(derain, 16, 24) == expected(16, 24));
        derain.enqueue(input.data(), output.data(), 16, 24, stream);
        CHECK(output[0] == 0.0F);  // nobody has waited for it
        CHECK(run(derain, 16, 24) == expected(16, 24));
        cudaStreamSynchronize(stream);
        stand_in(input.data(), answer.data(), 16, 24);
        CHECK(output == answer);
        CHECK(
            contains(refusal([&] { derain.enqueue(input.data(), output.data(), 12, 24, stream); }), "multiples of 8"));
        CHECK(contains(refusal([&] { derain.enqueue(input.data(), output.data(), 64, 64, stream); }), "found 64x64"));
        std::fill(output.begin(), output.end(), 0.0F);
        derain.enqueue(input.data(), output.data(), 16, 24, stream);
        CHECK(run(derain, 32, 40) == expected(32, 40));  // with more memory, for which it waits
        CHECK(output == answer);
        std::fill(output.begin(), output.end(), 0.0F);
        derain.enqueue(input.data(), output.data(), 16, 24, stream);
    }
    CHECK(output == answer);  // it waits at the end of its life
    CHECK(fake.in_order);
    cudaStreamDestroy(stream);
}

TEST_CASE("memory grows with the largest size so far, and does not leak") {
    const TestBundle bundle;
    const std::size_t before = fake.memory;
    {
        Derainer derain(bundle.folder);
        const std::size_t lanes = 4 * 16 * 128 * 3 * sizeof(float);
        CHECK(before - fake.memory == lanes);
        run(derain, 8, 16);
        CHECK(before - fake.memory == lanes + 8 * 16 * 3 * 4);
        run(derain, 16, 16);
        run(derain, 8, 16);
        CHECK(before - fake.memory == lanes + 16 * 16 * 3 * 4);
        fake.memory = 8 * 16 * 3 * 4;
        const std::string error = refusal([&] { run(derain, 32, 40); });
        CHECK_THROWS_AS(run(derain, 32, 40), OutOfMemory);
        CHECK(contains(error, "CUDA failed with cudaErrorMemoryAllocation; use smaller tiles"));
        CHECK(contains(error, "[cudaMalloc(&pointer, bytes)]"));
        CHECK(run(derain, 8, 16) == expected(8, 16));
        fake.memory = before - lanes - 8 * 16 * 3 * 4;
    }
    CHECK(fake.memory == before);
    CHECK(fake.contexts == 0);
}

TEST_CASE("of many sizes the longest unused goes") {
    const TestBundle bundle;
    Options options;
    options.sizes = 1;
    options.cuda_graphs = false;
    Derainer derain(bundle.folder, options);
    for (const std::size_t height : {32, 24, 16, 8, 32}) {
        CHECK(run(derain, height, 40) == expected(height, 40));
        CHECK(run(derain, height, 40) == expected(height, 40));
    }
    CHECK(fake.contexts == 1);
    CHECK(fake.count("capture") == 0);
    CHECK(!fake.cuda_graphs);
    options.sizes = 0;
    CHECK(contains(refusal([&] { Derainer none(bundle.folder, options); }), "at least one size"));
}

TEST_CASE("threads take turns") {
    const TestBundle bundle;
    Derainer derain(bundle.folder);
    const Pixels small = expected(16, 24);
    const Pixels large = run(derain, 50, 60);
    std::vector<std::thread> threads;
    std::vector<char> right(8);
    for (std::size_t i = 0; i < right.size(); ++i) {
        threads.emplace_back([&, i] {
            right[i] = 1;
            for (int k = 0; k < 5; ++k) {
                right[i] &= static_cast<char>(i % 2 == 0 ? run(derain, 16, 24) == small : run(derain, 50, 60) == large);
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    CHECK(std::count(right.begin(), right.end(), 1) == 8);
}

TEST_CASE("the GPU that is asked for, and the current one afterwards") {
    const TestBundle bundle;
    Options options;
    options.device = 2;
    CHECK(contains(refusal([&] { Derainer(bundle.folder, options); }), "expected a GPU from 0 to 0, found 2"));
    options.provider = "cpu";
    CHECK(contains(refusal([&] { Derainer(bundle.folder, options); }), "expected no device with the provider cpu"));
    options.provider = "auto";
    fake.devices = 3;
    fake.device = 1;
    {
        Derainer derain(bundle.folder, options);
        CHECK(fake.device == 1);
        run(derain, 8, 8);
        CHECK(fake.device == 1);
        Derainer moved(std::move(derain));
        Derainer other(bundle.folder);
        moved = std::move(other);
        CHECK(run(moved, 8, 8) == expected(8, 8));
    }
    CHECK(fake.device == 1);
    CHECK(fake.contexts == 0);
}

TEST_CASE("without a GPU, nothing of TensorRT is touched") {
    const TestBundle bundle;
    for (const int devices : {0, -1}) {
        fake.devices = devices;
        const std::string said = refusal([&] { Derainer derain(bundle.folder); });
        CHECK(contains(said, "CUDA finds no NVIDIA GPU with a driver"));
        CHECK(contains(said, "and on the CPU: expected a build with OpenVINO, found one without"));
        CHECK_THROWS_AS(Derainer(bundle.folder), DeviceError);
    }
    CHECK(fake.calls.empty());
}

TEST_CASE("nothing that is not verified is deserialised") {
    const TestBundle bundle;
    bundle.write("plan.engine", "tenser");
    CHECK(contains(refusal([&] { Derainer derain(bundle.folder); }), "expected SHA-256"));
    bundle.write("plan.engine", "tensor");
    bundle.write("model.onnx", "Weights");
    CHECK(contains(refusal([&] { Derainer derain(bundle.folder); }), "model.onnx: expected SHA-256"));
    CHECK(fake.calls.empty());
}

TEST_CASE("what TensorRT says is passed on in one line") {
    const TestBundle bundle("other!");
    CHECK(contains(refusal([&] { Derainer derain(bundle.folder); }), "plan.engine is refused: a plan of another kind"));
    const TestBundle good;
    Derainer derain(good.folder);
    fake.failing = true;
    CHECK(contains(refusal([&] { run(derain, 8, 8); }), "failed: out of luck [enqueued]"));
    fake.failing = false;
    CHECK(run(derain, 8, 8) == expected(8, 8));
    fake.activations = 0;  // which TensorRT answers where it failed
    CHECK(contains(refusal([&] { run(derain, 16, 8); }), "failed: no memory plan [needed > 0]"));
    fake.activations = 4;
    fake.failing = true;
    refusal([&] { run(derain, 8, 8); });  // in the capture
    fake.failing = false;
    CHECK(run(derain, 8, 8) == expected(8, 8));
    CHECK(run(derain, 8, 8) == expected(8, 8));
}

TEST_CASE("what fails halfway keeps its memory until it is over") {
    const TestBundle bundle;
    cudaStream_t stream = nullptr;
    cudaStreamCreateWithFlags(&stream, 0);
    std::vector<float> numbers(3 * 8 * 8, 0.5F);
    {
        Derainer derain(bundle.folder);
        fake.failing = true;
        const auto enqueue = [&] { derain.enqueue(numbers.data(), numbers.data(), 8, 8, stream); };
        CHECK(contains(refusal(enqueue), "out of luck"));
        fake.failing = false;
        CHECK(run(derain, 32, 40) == expected(32, 40));  // with more memory
    }
    CHECK(fake.in_order);
    cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
}

TEST_CASE("only an engine that says so may bring code") {
    const TestBundle strict;
    { Derainer derain(strict.folder); }
    CHECK(!fake.host_code_allowed);
    const TestBundle denied("tensor", R"({"version_compatible": false, "strip_weights": false, "other": 1})");
    { Derainer derain(denied.folder); }
    CHECK(!fake.host_code_allowed);
    const TestBundle later("tensor", R"({"version_compatible": true})");
    { Derainer derain(later.folder); }
    CHECK(fake.host_code_allowed);
}

TEST_CASE("kernels are kept beside the bundle, in a file that is our own") {
    if (!Library::jit) {
        SUCCEED("TensorRT compiles no kernels at run time");
        return;
    }
    const TestBundle bundle;
    fake.kernels = "compiled";
    { Derainer derain(bundle.folder); }
    CHECK(read_file(bundle.cache()) == "compiled");
    fake.kernels = "";
    { Derainer derain(bundle.folder); }
    CHECK(fake.kernels == "compiled");
    fake.kernels = "";
    std::filesystem::permissions(bundle.cache(), std::filesystem::perms(0666));
    { Derainer derain(bundle.folder); }
    CHECK(fake.kernels.empty());
    CHECK(std::distance(std::filesystem::directory_iterator(bundle.folder.parent_path()), {}) == 2);
}

TEST_CASE("an engine answers the canaries the first time on a machine") {
    const TestBundle bundle;
    bundle.add_canary(expected(16, 24));
    Options options;
    options.provider = "tensorrt";
    const auto runs = [&] {
        const std::size_t before = fake.count("enqueue") + fake.count("launch");
        Derainer derain(bundle.folder, options);
        return fake.count("enqueue") + fake.count("launch") - before;
    };
    const std::size_t asked = runs();
    CHECK(asked >= 2);
    CHECK(std::filesystem::exists(bundle.canary_record()));
    CHECK(runs() == 0);
    fake.driver = 13010;
    CHECK(runs() == asked);
    CHECK(runs() == 0);
    fake.driver = 13000;
    CHECK(runs() == 0);  // both are remembered
    options.canary = "always";
    CHECK(runs() == asked);
    std::filesystem::permissions(bundle.canary_record(), std::filesystem::perms::others_write,
                                 std::filesystem::perm_options::add);
    options.canary = "first";
    CHECK(runs() == asked);
    options.canary = "never";
    CHECK(runs() == 0);
    options.canary = "often";
    CHECK_THROWS_AS(runs(), InputError);
}

TEST_CASE("an engine that answers wrongly restores nothing") {
    const TestBundle bundle;
    Options options;
    options.provider = "tensorrt";
    bundle.add_canary(expected(16, 24));
    fake.wrong_channel = true;
    CHECK_THROWS_AS(Derainer(bundle.folder, options), CanaryError);
    fake.wrong_channel = false;
    fake.wrong_replay = true;  // a CUDA graph, or the second run without one
    CHECK_THROWS_AS(Derainer(bundle.folder, options), CanaryError);
    CHECK(!std::filesystem::exists(bundle.canary_record()));
    fake.wrong_replay = false;
    bundle.add_canary(golden_image(16, 24, 3 * 24));  // the answer of another model
    const std::string said = refusal([&] { Derainer derain(bundle.folder, options); });
    CHECK(contains(said, "plan.engine is not used"));
    CHECK(contains(said, "expected at least 50.0 dB"));
    CHECK(contains(said, "GPU 0000:00:00.0 of compute capability 8.6, driver 13000"));
    options.provider = "auto";  // this build has nothing else
    CHECK(contains(refusal([&] { Derainer derain(bundle.folder, options); }), "answers wrongly here"));
    options.canary = "never";
    CHECK(Derainer(bundle.folder, options).provider() == "tensorrt");
}

TEST_CASE("only what was judged runs where a proof is required") {
    const TestBundle bundle;
    Options options;
    options.require_proof = true;
    CHECK_THROWS_AS(Derainer(bundle.folder, options), DerainError);
    const auto judged = [](const std::string& file) {
        return R"({"file": ")" + file + R"(", "provider": "any", "reference_sha256": ")" + std::string(64, 'a') +
               R"(", "data": "val", "protocol": null, "images": 12, "psnr_between": 80, "max_difference": 1,
               "reference_psnr": null, "candidate_psnr": null, "drop_db": null, "reference_ssim": null,
               "candidate_ssim": null})";
    };
    options.provider = "tensorrt";
    bundle.add_canary(expected(16, 24), judged("model.onnx"));
    CHECK_THROWS_AS(Derainer(bundle.folder, options), UnprovenError);
    bundle.add_canary(expected(16, 24), judged("plan.engine"));
    CHECK(Derainer(bundle.folder, options).provider() == "tensorrt");
}
