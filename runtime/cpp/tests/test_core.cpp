/// What needs no GPU, on the golden vectors that the Python tests read as well; tests/test_cpp.py compares the rest
/// with Python byte by byte.
#include <cmath>
#include <fstream>
#include <limits>

#include <nlohmann/json.hpp>

#include "catch.hpp"
#include "choice.hpp"
#include "crypto.hpp"
#include "host_session.hpp"
#include "manifest.hpp"
#include "network.hpp"
#include "onnx.hpp"
#include "onnx_network.hpp"
#include "session.hpp"
#include "tiling.hpp"

using namespace derainer;

namespace {

const nlohmann::json& golden() {
    static const nlohmann::json vectors = nlohmann::json::parse(std::ifstream(DERAINER_GOLDEN));
    return vectors;
}

Bundle bundle_of(const std::vector<Engine>& engines) {
    return {"bundle", {"", {"", {Io::tensor, 8}}, {}, engines, {}, {}}};
}

const std::vector<Profile> profiles = {{{64, 64}, {128, 128}, {256, 512}}, {{64, 64}, {512, 512}, {1088, 696}}};
const std::vector<Limits> limits = {{{64, 64}, {256, 512}}, {{64, 64}, {1088, 696}}};

}  // namespace

TEST_CASE("tiles and weights are the golden ones") {
    for (const auto& axis : golden()["axes"]) {
        const std::vector<Tile> tiles = split(axis["length"], axis["tile"], axis["overlap"]);
        REQUIRE(tiles.size() == axis["starts"].size());
        for (std::size_t i = 0; i < tiles.size(); ++i) {
            CHECK(tiles[i].start == axis["starts"][i].get<std::int64_t>());
            REQUIRE(tiles[i].weights.size() == axis["weights"][i].size());
            for (std::size_t k = 0; k < tiles[i].weights.size(); ++k) {
                REQUIRE(tiles[i].weights[k] == std::stof(axis["weights"][i][k].get<std::string>()));
            }
        }
    }
}

TEST_CASE("padding is the golden one") {
    for (const auto& axis : golden()["padding"]) {
        const Size size = GraphIo{Io::tensor, axis["multiple"]}.padded({axis["length"], 1});
        CHECK(padded_index(axis["length"], size.height) == axis["index"].get<std::vector<std::int64_t>>());
    }
    CHECK(padded_index(4, 7) == std::vector<std::int64_t>{0, 1, 2, 3, 2, 1, 0});
    CHECK(padded_index(4, 8) == std::vector<std::int64_t>{0, 1, 2, 3, 3, 3, 3, 3});
    CHECK(contains(refusal([] { padded_index(9, 8); }), "expected at least 9 pixels"));
}

TEST_CASE("restored images are the golden ones, in any number of lanes") {
    for (const auto& image : golden()["images"]) {
        const std::size_t height = image["height"];
        const std::size_t width = image["width"];
        for (const std::size_t lanes : {1, 2, 3}) {
            HostSession session(stand_in, lanes);
            const Size size = GraphIo{Io::tensor, image["multiple"]}.padded({image["height"], image["width"]});
            Size tile = size;
            if (!image["tile"].is_null()) {
                tile = {image["tile"][0], image["tile"][1]};
            }
            std::vector<std::uint8_t> pixels = golden_image(height, width, 3 * width);
            const Image task{pixels.data(), image["height"], image["width"], 3 * width, pixels.data()};
            restore(session, {{task, {size, tile, image["overlap"]}}});
            CHECK(sha256({pixels.begin(), pixels.end()}) == image["sha256"].get<std::string>());
        }
    }
}

TEST_CASE("several images come out as each of them, and nothing between rows is touched") {
    HostSession session(stand_in);
    const Plan plan{{40, 48}, {16, 24}, 4};
    const std::vector<std::uint8_t> original = golden_image(33, 47, 150);
    std::vector<std::uint8_t> single(original.size(), 7);
    restore(session, {{{original.data(), 33, 47, 150, single.data()}, plan}});
    std::vector<std::uint8_t> first(original.size(), 7);
    std::vector<std::uint8_t> second(original.size(), 7);
    std::vector<std::uint8_t> third = original;
    restore(session, {{{original.data(), 33, 47, 150, first.data()}, plan},
                      {{original.data(), 11, 5, 150, second.data()}, {{16, 8}, {16, 8}, 0}},
                      {{third.data(), 33, 47, 150, third.data()}, plan}});
    CHECK(first == single);
    for (std::size_t y = 0; y < 33; ++y) {
        for (std::size_t i = 0; i < 150; ++i) {
            CHECK(third[y * 150 + i] == (i < 141 ? single[y * 150 + i] : 0));
            CHECK(second[y * 150 + i] == (y < 11 && i < 15 ? second[y * 150 + i] : 7));
        }
    }
}

TEST_CASE("neighbours of one padded size go together, and come out as each of them") {
    const Plan whole{{16, 24}, {16, 24}, 0};
    const Plan wide{{16, 32}, {16, 32}, 0};
    const Plan tiled{{32, 24}, {16, 24}, 4};
    const std::vector<Plan> plans{whole, whole, whole, wide, tiled, whole, whole};
    const auto run = [&](HostSession& session, std::int64_t batch) {
        std::vector<std::vector<std::uint8_t>> images;
        std::vector<Task> tasks;
        for (std::size_t i = 0; i < plans.size(); ++i) {
            images.push_back(golden_image(13 + i, 24, 72));
            tasks.push_back({{images[i].data(), 13, 24, 72, images[i].data()}, plans[i]});
        }
        restore(session, tasks, batch);
        return images;
    };
    HostSession single(stand_in);
    const auto expected = run(single, 0);
    CHECK(single.started == std::vector<std::int64_t>(plans.size() + 2, 1));  // three tiles
    using Counts = std::vector<std::int64_t>;
    for (const auto& [most, batch, counts] : std::vector<std::tuple<std::int64_t, std::int64_t, Counts>>{
             {2, 0, {2, 1, 1, 1, 1, 1, 2}},
             {8, 0, {3, 1, 1, 1, 1, 2}},
             {8, 2, {2, 1, 1, 1, 1, 1, 2}},
             {kUnlimited, 0, Counts(9, 1)},
             {kUnlimited, 3, {3, 1, 1, 1, 1, 2}},
         }) {
        HostSession session(stand_in, 2, most);
        CHECK(run(session, batch) == expected);
        CHECK(session.started == counts);
    }
    std::uint8_t levels[] = {1, 2, 3, 4, 0, 0, 0, 0};
    fill_up(levels, 2, 2, 4);
    CHECK(std::vector<std::uint8_t>(levels, levels + 8) == std::vector<std::uint8_t>{1, 2, 3, 4, 3, 4, 3, 4});
}

TEST_CASE("what is no image is refused") {
    HostSession session(stand_in);
    std::uint8_t pixel[3] = {};
    const Plan whole{{8, 8}, {8, 8}, 0};
    const auto run = [&](Image image) { return refusal([&] { restore(session, {{image, whole}}); }); };
    CHECK(run({pixel, 1, 1, 3, pixel}).empty());
    CHECK(contains(run({pixel, 0, 5, 15, pixel}), "at least one pixel, found 0x5 [image.height >= 1"));
    CHECK(contains(run({pixel, 1, -1, 3, pixel}), "at least one pixel"));
    CHECK(contains(run({nullptr, 1, 1, 3, pixel}), "null pointer"));
    CHECK(contains(run({pixel, 1, 1, 3, nullptr}), "null pointer"));
    CHECK(contains(run({pixel, 1, 2, 5, pixel}), "found a stride of 5"));
    CHECK(contains(run({pixel, INT64_MAX, 1, 3, pixel}), "that memory can hold"));
}

TEST_CASE("NaN and infinity are an error, unless they are cropped") {
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity()}) {
        std::size_t place = 0;
        HostSession session([&](const float* input, float* output, std::size_t height, std::size_t width) {
            stand_in(input, output, height, width);
            output[place] = bad;
        });
        std::vector<std::uint8_t> image = golden_image(5, 12, 36);
        const Image task{image.data(), 5, 12, 36, image.data()};
        for (const Size tile : {Size{8, 16}, Size{8, 8}}) {
            place = 0;
            CHECK(contains(refusal([&] { restore(session, {{task, {{8, 16}, tile, 2}}}); }), "NaN or infinity"));
            place = static_cast<std::size_t>(tile.width) * 7;
            CHECK(refusal([&] { restore(session, {{task, {{8, 16}, tile, 2}}}); }).empty());
        }
    }
}

TEST_CASE("levels are clamped and rounded half to even") {
    const std::vector<std::pair<float, int>> answers = {{-0.5F, 0},      {-0.0F, 0},      {0.5F / 255, 0},
                                                        {1.5F / 255, 2}, {2.5F / 255, 2}, {0.999F, 255},
                                                        {1.0F, 255},     {7.0F, 255}};
    for (const auto& [answer, level] : answers) {
        HostSession session([&, answer = answer](const float*, float* output, std::size_t, std::size_t) {
            std::fill_n(output, 3, answer);
        });
        std::uint8_t pixel[3] = {9, 9, 9};
        restore(session, {{{pixel, 1, 1, 3, pixel}, {{1, 1}, {1, 1}, 0}}});
        CHECK(int{pixel[0]} == level);
    }
}

TEST_CASE("float16 as NumPy has it") {
    const std::vector<std::pair<int, Half>> levels{{0, 0},        {1, 0x1C04},   {2, 0x2004},  {100, 0x3646},
                                                   {128, 0x3804}, {254, 0x3BF8}, {255, 0x3C00}};
    for (const auto& [level, half] : levels) {
        const float value = static_cast<float>(level) / 255.0F;
        CHECK(to_half(value) == half);
        CHECK(std::abs(to_float(half) - value) < 0.1F / 255);
    }
    CHECK(to_float(Half{0x3555}) == 1365.0F / 4096);
    CHECK(to_float(Half{0xC000}) == -2.0F);
    CHECK(to_float(Half{0x0001}) == std::ldexp(1.0F, -24));  // the smallest
    CHECK(to_float(Half{0x7BFF}) == 65504.0F);               // the largest
    CHECK(to_float(Half{0xFC00}) == -std::numeric_limits<float>::infinity());
    CHECK(std::isnan(to_float(Half{0x7E00})));
}

TEST_CASE("tiles that are none") {
    CHECK(contains(refusal([] { split(100, 8, 5); }), "at most half of them"));
    CHECK(contains(refusal([] { split(100, 8, -1); }), "at most half of them"));
    CHECK(contains(refusal([] { split(0, 8, 0); }), "expected tiles"));
    CHECK(split(8, 8, 5).size() == 1);
}

TEST_CASE("the newest engine that fits is taken") {
    const Engine first{"first", "tensorrt", "11.4.0.106", {"8.6"}, profiles, {}};
    Engine second = first;
    second.file = "second";
    Bundle bundle = bundle_of({first, second, {"other", "rtx", "1.7.1.116", {"8.6", "8.9"}, profiles, {}}});
    const auto choose = [&](const char* version, const char* capability) {
        return choose_engine(bundle, capability, "tensorrt", version).file;
    };
    CHECK(choose("11.4.0.106", "8.6") == "second");
    CHECK(choose_engine(bundle, "8.9", "rtx", "1.7.1.116").file == "other");
    CHECK(contains(refusal([&] { choose("11.4.0.106", "8.9"); }),
                   "for this GPU of compute capability 8.9, found tensorrt"));
    CHECK(contains(refusal([&] { choose("11.5.0.1", "8.6"); }), "bundle/second: expected version 11.4.0.106"));

    bundle.manifest.engines[0].flags = {"version_compatible"};
    CHECK(choose("11.10.0.1", "8.6") == "first");
    CHECK(choose("11.4.0.106", "8.6") == "second");
    CHECK(contains(refusal([&] { choose("11.3.9.999", "8.6"); }), "expected version"));
    bundle.manifest.engines[1].flags = {"hardware_compatible"};
    CHECK(choose("11.4.0.106", "12.0") == "second");
    CHECK(contains(refusal([&] { choose("11.4.0.106", "7.5"); }), "for this GPU"));
    bundle.manifest.engines[1].flags = {"strip_weights"};
    CHECK(choose("11.4.0.106", "8.6") == "first");
    bundle.manifest.engines[0].flags = {"strip_weights"};
    CHECK(contains(refusal([&] { choose("11.4.0.106", "8.6"); }), "without --strip-weights"));
    CHECK(contains(refusal([&] { choose_engine(bundle_of({}), "8.6", "rtx", "1"); }), "found no engine"));
}

TEST_CASE("the first profile that takes a size") {
    const Engine engine{"plan", "rtx", "1", {"8.6"}, profiles, {}};
    CHECK(engine.profile_for({64, 512}) == 0);
    CHECK(engine.profile_for({257, 512}) == 1);
    CHECK(engine.profile_for({8, 64}) == std::nullopt);
}

TEST_CASE("an image is whole where the network takes it, else in the fewest tiles") {
    const auto tiles = [](Size size, std::optional<Size> tile = {}, std::optional<std::int64_t> overlap = {}) {
        return plan(size, 8, limits, tile, overlap);
    };
    CHECK(tiles({256, 512}).tile == Size{256, 512});
    CHECK(tiles({1088, 696}).tile == Size{1088, 696});
    CHECK(tiles({256, 2000}).tile == Size{256, 696});
    CHECK(tiles({2000, 3000}).tile == Size{1088, 696});
    CHECK(tiles({2000, 3000}).overlap == 64);
    CHECK(tiles({2000, 3000}, Size{128, 128}).tile == Size{128, 128});
    CHECK(tiles({2000, 3000}, Size{128, 128}).overlap == 32);
    CHECK(tiles({2000, 3000}, Size{128, 128}, 0).overlap == 0);
    CHECK(tiles({2000, 512}, {}, 200).tile == Size{1088, 512});  // too much for the first limits
    CHECK(contains(refusal([&] { tiles({2000, 3000}, {}, 400); }),
                   "height x width 64x64 to 256x512 or 64x64 to 1088x696, found 2000x3000 with an overlap of 400"));
    CHECK(contains(refusal([&] { tiles({2000, 3000}, {}, -1); }), "with an overlap of -1"));
    CHECK(contains(refusal([&] { tiles({2000, 3000}, {}, INT64_MAX); }), "with an overlap of"));
    CHECK(tiles({72, 72}, Size{128, 128}).tile == Size{72, 72});
    CHECK(contains(refusal([&] { tiles({512, 512}, Size{8, 8}); }), "in tiles of 8x8"));
    CHECK(contains(refusal([&] { tiles({2000, 3000}, Size{1096, 512}); }), "in tiles of 1096x512"));
    CHECK(contains(refusal([&] { tiles({512, 512}, Size{128, 0}); }), "found 128x0"));
    CHECK(contains(refusal([&] { tiles({512, 512}, Size{130, 128}); }), "multiples of 8 pixels, found 130x128"));
}

TEST_CASE("an image grows to the smallest size that the network takes, to that for which it has to grow least") {
    const auto cut = [](Size size, const std::vector<Limits>& limits, std::optional<Size> tile = {}) {
        const Plan found = plan(size, 8, limits, tile);
        return std::vector<Size>{found.size, found.tile};
    };
    const Limits large{{64, 64}, {256, 512}};
    const Limits wide{{32, 128}, {64, 1024}};
    CHECK(cut({8, 8}, {large}) == std::vector<Size>{{64, 64}, {64, 64}});
    CHECK(cut({48, 200}, {large}) == std::vector<Size>{{64, 200}, {64, 200}});
    CHECK(cut({8, 3000}, {large}) == std::vector<Size>{{64, 3000}, {64, 512}});
    CHECK(cut({3000, 8}, {large}) == std::vector<Size>{{3000, 64}, {256, 64}});
    CHECK(cut({80, 104}, {large, wide}) == std::vector<Size>{{80, 104}, {80, 104}});  // the second would grow it
    CHECK(cut({80, 104}, {wide, large}) == std::vector<Size>{{80, 104}, {80, 104}});
    CHECK(cut({16, 1000}, {large, wide}) == std::vector<Size>{{32, 1000}, {32, 1000}});
    CHECK(cut({64, 600}, {large, wide}) == std::vector<Size>{{64, 600}, {64, 600}});  // fewer tiles
    CHECK(cut({72, 600}, {large, wide}) == std::vector<Size>{{72, 600}, {72, 512}});
    CHECK(cut({24, 600}, {large, wide}) == std::vector<Size>{{32, 600}, {32, 600}});
    const Limits low{{8, 96}, {40, 256}};
    const Limits high{{24, 16}, {48, 64}};
    CHECK(cut({40, 72}, {low, high}) == std::vector<Size>{{40, 72}, {40, 64}});  // in tiles rather than grown
    const Limits larger{{64, 64}, {320, 512}};
    CHECK(cut({400, 64}, {large, larger}) == std::vector<Size>{{400, 64}, {256, 64}});  // the first of equal ones
    CHECK(cut({400, 64}, {larger, large}) == std::vector<Size>{{400, 64}, {320, 64}});
    CHECK(cut({128, 104}, {wide, large}, Size{64, 64}) == std::vector<Size>{{128, 104}, {64, 64}});
    CHECK(contains(refusal([&] { cut({8, 8}, {large}, Size{32, 64}); }), "found 8x8 in tiles of 32x64"));
    CHECK(cut({INT64_MAX / 16, 8}, {large, wide})[0] == Size{INT64_MAX / 16, 64});
}

TEST_CASE("what goes wrong has its type") {
    HostSession session([](const float*, float* output, std::size_t, std::size_t) { output[0] = HUGE_VALF; });
    std::uint8_t pixel[3] = {};
    const Plan whole{{1, 1}, {1, 1}, 0};
    CHECK_THROWS_AS(restore(session, {{{pixel, 0, 1, 3, pixel}, whole}}), InvalidImage);
    CHECK_THROWS_AS(restore(session, {{{pixel, 1, 1, 3, pixel}, whole}}), InvalidModel);
    CHECK_THROWS_AS(session.enqueue(pixel, pixel, {1, 1}, nullptr, nullptr, 1), InputError);
    CHECK_THROWS_AS(parse("{}"), InvalidModel);
    CHECK_THROWS_AS(choose_engine(bundle_of({}), "8.6", "rtx", "1"), DeviceError);
    CHECK_THROWS_AS(plan({8, 8}, 8, limits, Size{8, 8}), InputError);
}

TEST_CASE("a model with its weights, whole and damaged") {
    const std::string model = onnx_network::mean();
    check_weights_inside(model);
    std::size_t refused = 0;
    for (std::size_t size = 0; size < model.size(); ++size) {
        refused += refusal([&] { check_weights_inside(model.substr(0, size)); }).empty() ? 0 : 1;
        for (int bit = 0; bit < 8; ++bit) {
            std::string flipped = model;
            flipped[size] = static_cast<char>(flipped[size] ^ 1 << bit);
            refused += refusal([&] { check_weights_inside(flipped); }).empty() ? 0 : 1;
        }
    }
    CHECK(refused > model.size());
    CHECK(contains(refusal([] { check_weights_inside("weights"); }), "expected an ONNX model, found another file"));
    std::string graph;
    for (int i = 0; i < 40; ++i) {  // each in an attribute of a node of the next
        graph = onnx_network::field(1, onnx_network::field(5, onnx_network::field(6, graph)));
    }
    CHECK(contains(refusal([&] { check_weights_inside(onnx_network::field(7, graph)); }), "nested too deep"));
}

TEST_CASE("SHA-256 is that of the standard") {
    CHECK(sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    CHECK(sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
}
