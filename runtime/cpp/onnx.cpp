#include "onnx.hpp"

#include <cstdint>
#include <string_view>

#include "check.hpp"

namespace derainer {

namespace {

constexpr int kMaxDepth = 100;  // as in protobuf

/// The messages of onnx.proto that weights can be in.
enum class Message { model, training, graph, function, node, attribute, sparse_tensor, tensor };

struct Field {
    Message in;
    std::uint64_t number;
    Message holds;
};

constexpr Field kFields[] = {
    {Message::model, 7, Message::graph},
    {Message::model, 20, Message::training},
    {Message::model, 25, Message::function},
    {Message::training, 1, Message::graph},
    {Message::training, 2, Message::graph},
    {Message::graph, 1, Message::node},
    {Message::graph, 5, Message::tensor},
    {Message::graph, 15, Message::sparse_tensor},
    {Message::function, 7, Message::node},
    {Message::function, 11, Message::attribute},
    {Message::node, 5, Message::attribute},
    {Message::attribute, 5, Message::tensor},
    {Message::attribute, 6, Message::graph},
    {Message::attribute, 10, Message::tensor},
    {Message::attribute, 11, Message::graph},
    {Message::attribute, 22, Message::sparse_tensor},
    {Message::attribute, 23, Message::sparse_tensor},
    {Message::sparse_tensor, 1, Message::tensor},
    {Message::sparse_tensor, 2, Message::tensor},
};

constexpr std::uint64_t kExternalData = 13;  // of a tensor: in which file
constexpr std::uint64_t kDataLocation = 14;  // 0: in the tensor itself

/// Reads protobuf's encoding from the front of `rest`.
class Reader {
public:
    explicit Reader(std::string_view rest) : rest_(rest) {}

    bool done() const { return rest_.empty(); }

    std::string_view take(std::uint64_t size) {
        DERAINER_CHECK(InvalidModel, size <= rest_.size(), "expected an ONNX model, found what ends within a field");
        const std::string_view taken = rest_.substr(0, static_cast<std::size_t>(size));
        rest_.remove_prefix(taken.size());
        return taken;
    }

    std::uint64_t number() {
        std::uint64_t value = 0;
        for (int shift = 0; shift < 64; shift += 7) {
            const auto byte = static_cast<unsigned char>(take(1)[0]);
            value |= std::uint64_t{byte & 127U} << shift;
            if (byte < 128) {
                return value;
            }
        }
        throw InvalidModel("expected an ONNX model, found a number of more than 64 bits", "shift < 64");
    }

private:
    std::string_view rest_;
};

void check(std::string_view content, Message message, int depth) {
    DERAINER_CHECK(InvalidModel, depth <= kMaxDepth, "expected an ONNX model, found what is nested too deep");
    for (Reader reader(content); !reader.done();) {
        const std::uint64_t key = reader.number();
        const std::uint64_t field = key >> 3;
        std::uint64_t value = 0;
        std::string_view held;
        switch (key & 7) {
            case 0: value = reader.number(); break;
            case 1: reader.take(8); break;
            case 2: held = reader.take(reader.number()); break;
            case 5: reader.take(4); break;
            default: throw InvalidModel("expected an ONNX model, found another file", "key & 7");
        }
        const bool outside =
            message == Message::tensor && (field == kExternalData || (field == kDataLocation && value != 0));
        DERAINER_CHECK(InvalidModel, !outside,
                       "expected an ONNX model with its weights, found one that keeps them in other files, which "
                       "nothing verifies; save it as one file");
        for (const Field& known : kFields) {
            if (known.in == message && known.number == field) {
                check(held, known.holds, depth + 1);
            }
        }
    }
}

}  // namespace

void check_weights_inside(const std::string& model) { check(model, Message::model, 0); }

}  // namespace derainer
