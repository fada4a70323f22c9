/// OpenVINO, since its wheel and its packages have headers, libraries and a CMake package, so that whoever has a CPU
/// can build and test an integration. It computes in float32 whatever the processor has, so that machines with bfloat16
/// do not answer otherwise; a float16 graph too, which it takes and gives as float16.
#include <algorithm>
#include <cctype>
#include <exception>
#include <new>
#include <string>

#include <openvino/openvino.hpp>

#include "backends.hpp"
#include "check.hpp"
#include "onnx.hpp"

namespace derainer {

namespace {

constexpr int kMaxThreads = 256;

std::string one_line(std::string text) {
    std::replace_if(text.begin(), text.end(), [](unsigned char c) { return std::iscntrl(c) != 0; }, ' ');
    return text;
}

/// What `action` gives. What OpenVINO throws becomes an error of `Type` that opens with `what`, or OutOfMemory, which
/// it tells by its text alone.
template <class Type, class Action>
auto in_openvino(const std::string& what, Action action) {
    try {
        return action();
    } catch (const std::bad_alloc&) {
        throw;
    } catch (const std::exception& error) {
        const std::string message = what + ": " + one_line(error.what());
        if (message.find("Failed to allocate") != std::string::npos) {
            throw OutOfMemory(message + "; use smaller tiles", "OpenVINO");
        }
        throw Type(message, "OpenVINO");
    }
}

ov::element::Type type_of(Io io) {
    return io == Io::image ? ov::element::u8 : io == Io::tensor16 ? ov::element::f16 : ov::element::f32;
}

/// One lane, since the network keeps all cores busy. It keeps the memory of the largest image so far.
class OpenVinoSession final : public Session {
public:
    OpenVinoSession(const Bundle& bundle, int threads)
        : file_(bundle.manifest.model.file),
          path_((bundle.folder / file_).string()),
          graph_io_(bundle.manifest.model.graph_io) {
        DERAINER_CHECK(
            InputError, 0 <= threads && threads <= kMaxThreads,
            "expected 0 (all cores) to " + std::to_string(kMaxThreads) + " threads, found " + std::to_string(threads));
        const std::string content = bundle.read(bundle.manifest.model.file);
        try {
            check_weights_inside(content);
        } catch (const InvalidModel& error) {
            throw InvalidModel(path_ + ": " + error.message(), error.expression());
        }
        const auto model = in_openvino<InvalidModel>(path_ + " is not an ONNX model that OpenVINO can load",
                                                     [&] { return core_.read_model(content, ov::Tensor()); });
        has_finite_ = graph_io_.io == Io::image && model->outputs().size() == 2 && is_finite(model->output(1));
        DERAINER_CHECK(MismatchError, model->inputs().size() == 1 && model->outputs().size() == (has_finite_ ? 2 : 1),
                       path_ + ": expected one input and one output, and of images besides at most finite, found " +
                           std::to_string(model->inputs().size()) + " and " + std::to_string(model->outputs().size()));
        limits_ = {limits(model->input())};
        limits(model->output(0));  // checked alike
        identity_ = one_line(core_.get_property("CPU", ov::device::full_name) + ", OpenVINO " +
                             ov::get_openvino_version().buildNumber);
        const ov::AnyMap properties{ov::hint::inference_precision(ov::element::f32),
                                    ov::inference_num_threads(threads)};
        request_ = in_openvino<DeviceError>(path_ + ": OpenVINO failed", [&] {
            return core_.compile_model(model, "CPU", properties).create_infer_request();
        });
    }

    std::string file() const override { return file_; }
    std::string identity() const override { return identity_; }
    GraphIo graph_io() const override { return graph_io_; }
    std::size_t lanes() const override { return 1; }
    const std::vector<Limits>& limits() const override { return limits_; }

    std::int64_t max_batch(Size) const override { return graph_io_.batch == kAny ? kUnlimited : graph_io_.batch; }

    void* input(std::size_t, Size size, std::int64_t images) override {
        return in_openvino<DeviceError>(failed_on(size), [&] {
            ov::Tensor input = request_.get_input_tensor();
            input.set_shape(shape(size, images));
            return input.data();
        });
    }

    void start(std::size_t, Size size, std::int64_t images) override {
        fill_up(request_.get_input_tensor().data(), graph_io_.bytes(size), images, graph_io_.batch);
        in_openvino<DeviceError>(failed_on(size), [&] { request_.infer(); });
        const ov::Shape found = request_.get_output_tensor(0).get_shape();
        DERAINER_CHECK(
            InvalidModel, found == shape(size, images),
            path_ + ": expected an output of the input's size, found " + ov::PartialShape(found).to_string());
    }

    const void* finish(std::size_t) override { return request_.get_output_tensor(0).data(); }
    const float* finite(std::size_t) override {
        return has_finite_ ? request_.get_output_tensor(1).data<float>() : nullptr;
    }

private:
    static bool is_finite(const ov::Output<ov::Node>& port) {
        return port.get_names().count(kFinite) == 1 && port.get_element_type() == ov::element::f32 &&
               port.get_partial_shape().compatible({-1});
    }

    std::string failed_on(Size size) const { return path_ + " failed on " + to_string(size) + " pixels"; }

    /// Of so many images, or of as many as the graph takes.
    ov::Shape shape(Size size, std::int64_t images) const {
        const auto lengths = graph_io_.shape(size, std::max(images, graph_io_.batch));
        return {lengths.begin(), lengths.end()};
    }

    /// The sizes that a port takes. Throws MismatchError where it is not what the manifest says.
    Limits limits(const ov::Output<ov::Node>& port) const {
        const ov::PartialShape found = port.get_partial_shape();
        const ov::element::Type type = type_of(graph_io_.io);
        const std::size_t vertical = graph_io_.io == Io::image ? 1 : 2;
        const bool image = port.get_element_type() == type && found.rank().compatible(4) &&
                           found.compatible(graph_io_.io == Io::image ? ov::PartialShape{graph_io_.batch, -1, -1, 3}
                                                                      : ov::PartialShape{graph_io_.batch, 3, -1, -1});
        DERAINER_CHECK(MismatchError, image,
                       path_ + ": expected tensors of " + type.get_type_name() + " as the manifest says, found " +
                           port.get_element_type().get_type_name() + " " + found.to_string());
        const auto range = [&](std::size_t axis) {
            const ov::Dimension side = found.rank().is_dynamic() ? ov::Dimension() : found[axis];
            return std::pair<std::int64_t, std::int64_t>{
                std::max<std::int64_t>(side.get_min_length(), 1),
                side.get_interval().has_upper_bound() ? side.get_max_length() : kUnlimited};
        };
        const auto [least_height, most_height] = range(vertical);
        const auto [least_width, most_width] = range(vertical + 1);
        return {{least_height, least_width}, {most_height, most_width}};
    }

    const std::string file_;
    const std::string path_;
    const GraphIo graph_io_;
    bool has_finite_ = false;
    std::vector<Limits> limits_;
    ov::Core core_;
    std::string identity_;
    ov::InferRequest request_;
};

}  // namespace

std::unique_ptr<Session> open_cpu(const Bundle& bundle, const Options& options) {
    return std::make_unique<OpenVinoSession>(bundle, options.threads);
}

}  // namespace derainer
