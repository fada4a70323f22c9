#include "derainer.hpp"

#include <mutex>
#include <utility>

#include "bundle.hpp"
#include "choice.hpp"
#include "session.hpp"
#include "tiling.hpp"
#include "trt.hpp"

namespace derainer {

class Derainer::Implementation {
public:
    /// The bundle is verified, and the GPU, of that compute capability, the current one.
    Implementation(const Bundle& bundle, const Options& options, const std::string& capability)
        : options_(options),
          session_(bundle, choose_engine(bundle, capability, Library::flavor, library_version()), options.sizes,
                   options.cuda_graphs) {}

    int device() const { return options_.device; }
    GraphIo graph_io() const { return session_.graph_io(); }

    void run(const std::vector<Image>& images) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const OnDevice on_device(options_.device);
        std::vector<Task> tasks;
        for (const Image& image : images) {
            check(image);
            const Size size = graph_io().padded({image.height, image.width});
            tasks.push_back(
                {image, plan(size, graph_io().multiple, session_.limits(), options_.tile, options_.overlap)});
        }
        restore(session_, tasks);
    }

    void enqueue(const void* input, void* output, Size size, cudaStream_t stream) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const OnDevice on_device(options_.device);
        session_.enqueue(input, output, size, stream);
    }

private:
    const Options options_;
    TrtSession session_;
    std::mutex mutex_;
};

Derainer::Derainer(const std::filesystem::path& folder, const Options& options) {
    const Bundle bundle = load(folder, options.public_key);
    bundle.verify();
    const std::string capability = gpu(options.device);  // before TensorRT is touched
    const OnDevice on_device(options.device);
    implementation_ = std::make_unique<Implementation>(bundle, options, capability);
}

Derainer::Derainer(Derainer&& other) noexcept : implementation_(std::move(other.implementation_)) {}

Derainer& Derainer::operator=(Derainer&& other) noexcept {
    std::swap(implementation_, other.implementation_);
    return *this;
}

Derainer::~Derainer() {
    if (implementation_ != nullptr) {
        const OnDevice on_device(implementation_->device());
        implementation_.reset();
    }
}

void Derainer::run(const std::uint8_t* rgb, std::int64_t height, std::int64_t width, std::size_t stride,
                   std::uint8_t* out) {
    implementation_->run({{rgb, height, width, stride, out}});
}

void Derainer::run(const std::vector<Image>& images) { implementation_->run(images); }

void Derainer::enqueue(const void* input, void* output, std::int64_t height, std::int64_t width, cudaStream_t stream) {
    implementation_->enqueue(input, output, {height, width}, stream);
}

GraphIo Derainer::graph_io() const { return implementation_->graph_io(); }

}  // namespace derainer
