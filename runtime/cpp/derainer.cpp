#include "derainer.hpp"

#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>

#include "backends.hpp"
#include "bundle.hpp"
#include "canary.hpp"
#include "check.hpp"
#include "session.hpp"
#include "tiling.hpp"

namespace derainer {

namespace {

/// A network that is open, the provider in which it runs, and why "auto" did not take the engine.
struct Opened {
    std::unique_ptr<Session> session;
    std::string provider;
    std::string fallback_reason;
};

/// A session that may be used. Throws UnprovenError and CanaryError.
std::unique_ptr<Session> accepted(std::unique_ptr<Session> session, const Bundle& bundle, const Options& options) {
    DERAINER_CHECK(UnprovenError, !options.require_proof || bundle.manifest.proven.count(session->file()) == 1,
                   (bundle.folder / session->file()).string() +
                       ": expected a proof against the full model in the manifest, found none; judge it: "
                       "python -m export.validate --record, or do not require one");
    check_canaries(*session, bundle, options.canary);
    return session;
}

Opened open_engine(const Bundle& bundle, const Options& options) {
    DERAINER_CHECK(InvalidModel, !bundle.manifest.engines.empty(),
                   bundle.folder.string() +
                       ": expected a bundle with an engine, found none in it; build one with "
                       "python -m export.tensorrt, or use the provider cpu");
    return {accepted(open_tensorrt(bundle, options), bundle, options), "tensorrt", {}};
}

/// On the CPU, for this reason, which is under way.
Opened fall_back(const Bundle& bundle, const Options& options, const DerainError& reason) {
    if (options.device != 0) {
        throw;  // a GPU was asked for
    }
    try {
        return {accepted(open_cpu(bundle, options), bundle, options), "cpu", reason.message()};
    } catch (const OutOfMemory&) {
        throw;
    } catch (const CanaryError& error) {
        throw CanaryError(reason.message() + "; and on the CPU: " + error.message(),
                          reason.expression() + ", " + error.expression());
    } catch (const DeviceError& error) {
        throw DeviceError(reason.message() + "; and on the CPU: " + error.message(),
                          reason.expression() + ", " + error.expression());
    }
}

Opened open(const Bundle& bundle, const Options& options) {
    if (options.provider == "tensorrt") {
        return open_engine(bundle, options);
    }
    if (options.provider == "cpu") {
        DERAINER_CHECK(InputError, options.device == 0,
                       "expected no device with the provider cpu, found " + std::to_string(options.device));
        return {accepted(open_cpu(bundle, options), bundle, options), "cpu", {}};
    }
    DERAINER_CHECK(InputError, options.provider == "auto",
                   "expected the provider auto, tensorrt or cpu, found " + options.provider);
    try {
        return open_engine(bundle, options);
    } catch (const MismatchError&) {
        throw;
    } catch (const InvalidModel& error) {
        return fall_back(bundle, options, error);
    } catch (const DeviceError& error) {
        return fall_back(bundle, options, error);
    }
}

/// What `action` gives. Throws OutOfMemory where the host has too little.
template <class Action>
auto within_memory(Action action) {
    try {
        return action();
    } catch (const std::bad_alloc&) {
        throw OutOfMemory("expected enough memory, found too little; use smaller tiles", "std::bad_alloc");
    }
}

}  // namespace

class Derainer::Implementation {
public:
    /// The bundle is verified.
    Implementation(const Bundle& bundle, const Options& options) : options_(options), opened_(open(bundle, options)) {
        DERAINER_CHECK(InputError, options.batch >= 0,
                       "expected a batch of at least 1, or 0, found " + std::to_string(options.batch));
    }

    GraphIo graph_io() const { return opened_.session->graph_io(); }
    const std::string& provider() const { return opened_.provider; }
    const std::string& fallback_reason() const { return opened_.fallback_reason; }

    void run(const std::vector<Image>& images) {
        const std::lock_guard<std::mutex> lock(mutex_);
        std::vector<Task> tasks;
        for (const Image& image : images) {
            check(image);
            const Size size = graph_io().padded({image.height, image.width});
            tasks.push_back(
                {image, plan(size, graph_io().multiple, opened_.session->limits(), options_.tile, options_.overlap)});
        }
        restore(*opened_.session, tasks, options_.batch);
    }

    void enqueue(const void* input, void* output, Size size, cudaStream_t stream, float* finite, std::int64_t images) {
        const std::lock_guard<std::mutex> lock(mutex_);
        opened_.session->enqueue(input, output, size, stream, finite, images);
    }

private:
    const Options options_;
    const Opened opened_;
    std::mutex mutex_;
};

Derainer::Derainer(const std::filesystem::path& folder, const Options& options) {
    implementation_ = within_memory([&] {
        const Bundle bundle = load(folder, options.public_key);
        bundle.verify();
        return std::make_unique<Implementation>(bundle, options);
    });
}

Derainer::Derainer(Derainer&& other) noexcept : implementation_(std::move(other.implementation_)) {}

Derainer& Derainer::operator=(Derainer&& other) noexcept {
    std::swap(implementation_, other.implementation_);
    return *this;
}

Derainer::~Derainer() = default;

void Derainer::run(const std::uint8_t* rgb, std::int64_t height, std::int64_t width, std::size_t stride,
                   std::uint8_t* out) {
    run({{rgb, height, width, stride, out}});
}

void Derainer::run(const std::vector<Image>& images) {
    within_memory([&] { implementation_->run(images); });
}

void Derainer::enqueue(const void* input, void* output, std::int64_t height, std::int64_t width, cudaStream_t stream,
                       float* finite, std::int64_t images) {
    implementation_->enqueue(input, output, {height, width}, stream, finite, images);
}

GraphIo Derainer::graph_io() const { return implementation_->graph_io(); }

const std::string& Derainer::provider() const { return implementation_->provider(); }

const std::string& Derainer::fallback_reason() const { return implementation_->fallback_reason(); }

}  // namespace derainer
