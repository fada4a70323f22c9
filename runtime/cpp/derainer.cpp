#include "derainer.hpp"

#include <algorithm>
#include <array>
#include <list>
#include <mutex>

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include "choice.hpp"
#include "library.hpp"
#include "manifest.hpp"

/// Throws Error with CUDA's reason for a call that fails.
#define CUDA_CHECK(call) check_cuda((call), #call)

/// Throws Error with TensorRT's reason for a call that does not give what is true. Inside Implementation.
#define TENSORRT_CHECK(call) DERAINER_CHECK(call, plan_path() + " failed: " + log_.reason())

namespace derainer {

namespace {

void check_cuda(cudaError_t code, const char* expression) {
    if (code != cudaSuccess) {
        static_cast<void>(cudaGetLastError());  // or TensorRT finds it there, and takes it for its own
        const char* mend = code == cudaErrorMemoryAllocation ? "; use smaller tiles or a network of fp16" : "";
        throw Error(std::string("CUDA failed with ") + cudaGetErrorName(code) + mend, expression);
    }
}

/// Frees what CUDA gave.
template <auto free>
struct Free {
    template <class T>
    void operator()(T* pointer) const noexcept {
        static_cast<void>(free(pointer));
    }
};

using Stream = std::unique_ptr<CUstream_st, Free<cudaStreamDestroy>>;
using Event = std::unique_ptr<CUevent_st, Free<cudaEventDestroy>>;
using Graph = std::unique_ptr<CUgraph_st, Free<cudaGraphDestroy>>;
using GraphExec = std::unique_ptr<CUgraphExec_st, Free<cudaGraphExecDestroy>>;
using DeviceMemory = std::unique_ptr<void, Free<cudaFree>>;
using PinnedMemory = std::unique_ptr<void, Free<cudaFreeHost>>;

DeviceMemory allocate(std::size_t bytes) {
    void* pointer = nullptr;
    CUDA_CHECK(cudaMalloc(&pointer, bytes));
    return DeviceMemory(pointer);
}

PinnedMemory allocate_pinned(std::size_t bytes) {
    void* pointer = nullptr;
    CUDA_CHECK(cudaMallocHost(&pointer, bytes));
    return PinnedMemory(pointer);
}

/// Silent; keeps the last error.
class Log final : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kERROR) {
            const std::lock_guard<std::mutex> lock(mutex_);
            error_ = message;
            std::replace(error_.begin(), error_.end(), '\n', ' ');
        }
    }

    std::string reason() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return error_.empty() ? "it gives no reason" : error_;
    }

private:
    std::mutex mutex_;
    std::string error_;
};

/// Makes a GPU the current one of the calling thread, and then the former again.
class OnDevice {
public:
    explicit OnDevice(int device) noexcept {
        static_cast<void>(cudaGetDevice(&former_));
        static_cast<void>(cudaSetDevice(device));  // if that fails, so does what comes next
    }
    ~OnDevice() { static_cast<void>(cudaSetDevice(former_)); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int former_ = 0;
};

/// Compute capability of a GPU, such as "8.9". Asks CUDA only, since TensorRT may crash where there is no driver.
std::string capability(int device) {
    int devices = 0;
    const cudaError_t code = cudaGetDeviceCount(&devices);
    DERAINER_CHECK(code == cudaSuccess && devices > 0, std::string("CUDA finds no NVIDIA GPU with a driver (") +
                                                           cudaGetErrorName(code) +
                                                           "); expected one: see that nvidia-smi shows it");
    DERAINER_CHECK(device >= 0 && device < devices,
                   "expected a GPU from 0 to " + std::to_string(devices - 1) + ", found " + std::to_string(device));
    int major = 0;
    int minor = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    return std::to_string(major) + "." + std::to_string(minor);
}

std::string library_version() {
    return std::to_string(getInferLibMajorVersion()) + "." + std::to_string(getInferLibMinorVersion()) + "." +
           std::to_string(getInferLibPatchVersion()) + "." + std::to_string(getInferLibBuildVersion());
}

/// Where kernels are kept: beside the bundle and not in it, as nothing verifies them. The same file as in Python.
std::filesystem::path cache_path(const Bundle& bundle, const Engine& engine) {
    const std::filesystem::path folder = std::filesystem::canonical(bundle.folder);
    return folder.string() + "." + bundle.file(engine.file).sha256.substr(0, 12) + ".cache";
}

/// What a tile needs on its way through the GPU, for the largest size.
struct Lane {
    Stream stream;
    DeviceMemory input;
    DeviceMemory output;
    PinnedMemory host_input;
    PinnedMemory host_output;
};

constexpr std::size_t kLanes = 2;
constexpr std::size_t kCallers = kLanes;  // in place of a lane: memory and stream of who calls `enqueue`

/// What is set up for one size in one lane. `warm` once it has run.
struct Context {
    Size size;
    std::size_t lane;
    std::unique_ptr<nvinfer1::IExecutionContext> execution;
    bool warm = false;
    GraphExec graph;
};

}  // namespace

/// All contexts work in one block of memory, one at a time: each waits for the event that its predecessor leaves, so
/// that copies of one lane may go on beside the work of the other. A CUDA graph is spoilt when the context or the
/// addresses that it was captured with change, so every size has a context of its own in each lane.
class Derainer::Implementation final : public Network {
public:
    /// The bundle is verified, and the device, of that compute capability, the current one.
    Implementation(Bundle bundle, const Options& options, const std::string& capability)
        : options_(options),
          bundle_(std::move(bundle)),
          entry_(choose_engine(bundle_, Library::flavor, library_version(), capability)),
          runtime_(nvinfer1::createInferRuntime(log_)),
          engine_(deserialize()),
          library_(*engine_, cache_path(bundle_, entry_), options_.cuda_graphs) {
        DERAINER_CHECK(options_.sizes > 0, "expected to keep at least one size, found 0");
        const nvinfer1::DataType type = io() == Io::image ? nvinfer1::DataType::kUINT8 : nvinfer1::DataType::kFLOAT;
        TENSORRT_CHECK(engine_->getTensorDataType(kInput) == type && engine_->getTensorDataType(kOutput) == type);
        TENSORRT_CHECK(engine_->getNbOptimizationProfiles() == static_cast<int>(entry_.profiles.size()));
        std::size_t largest = 0;
        for (const Profile& profile : entry_.profiles) {
            DERAINER_CHECK(profile.max.height <= PTRDIFF_MAX / 12 / profile.max.width,
                           plan_path() + ": expected sizes that memory can hold, found " + to_string(profile.max));
            largest = std::max(largest, bytes(profile.max));
        }
        for (Lane& lane : lanes_) {
            cudaStream_t stream = nullptr;
            CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
            lane.stream.reset(stream);
            lane.input = allocate(largest);
            lane.output = allocate(largest);
            lane.host_input = allocate_pinned(largest);
            lane.host_output = allocate_pinned(largest);
        }
        cudaEvent_t event = nullptr;
        CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        done_.reset(event);
    }

    ~Implementation() override {
        for (const Lane& lane : lanes_) {
            static_cast<void>(cudaStreamSynchronize(lane.stream.get()));
        }
        static_cast<void>(cudaEventSynchronize(done_.get()));
    }

    int device() const { return options_.device; }
    std::int64_t multiple() const { return bundle_.manifest.model.size_multiple; }

    void run(const std::vector<Image>& images) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const OnDevice on_device(options_.device);
        std::vector<Task> tasks;
        for (const Image& image : images) {
            check(image);
            const Size size{padded(image.height, multiple()), padded(image.width, multiple())};
            tasks.push_back({image, choose_tiles(entry_, size, multiple(), options_.tile, options_.overlap)});
        }
        restore(*this, tasks);
    }

    void enqueue(const void* input, void* output, Size size, cudaStream_t stream) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const OnDevice on_device(options_.device);
        DERAINER_CHECK(is_multiple(size, multiple()), "expected height and width in multiples of " +
                                                          std::to_string(multiple()) + ", found " + to_string(size));
        Context& context = prepare(size, kCallers);
        set_addresses(context, input, output);
        launch(context, stream);
    }

    // Network, for `restore`.

    Io io() const override { return bundle_.manifest.model.io; }
    std::size_t lanes() const override { return kLanes; }

    void* input(std::size_t lane, Size) override { return lanes_[lane].host_input.get(); }

    void start(std::size_t i, Size size) override {
        Lane& lane = lanes_[i];
        cudaStream_t stream = lane.stream.get();
        Context& context = prepare(size, i);
        CUDA_CHECK(
            cudaMemcpyAsync(lane.input.get(), lane.host_input.get(), bytes(size), cudaMemcpyHostToDevice, stream));
        launch(context, stream);
        CUDA_CHECK(
            cudaMemcpyAsync(lane.host_output.get(), lane.output.get(), bytes(size), cudaMemcpyDeviceToHost, stream));
    }

    const void* finish(std::size_t lane) override {
        CUDA_CHECK(cudaStreamSynchronize(lanes_[lane].stream.get()));
        return lanes_[lane].host_output.get();
    }

private:
    static constexpr const char* kInput = "input";
    static constexpr const char* kOutput = "output";

    std::string plan_path() const { return (bundle_.folder / entry_.file).string(); }

    std::unique_ptr<nvinfer1::ICudaEngine> deserialize() {
        TENSORRT_CHECK(runtime_ != nullptr);
        // An engine for later versions, too, brings the code that runs it.
        runtime_->setEngineHostCodeAllowed(entry_.flags.count("version_compatible") > 0);
        const std::string plan = bundle_.read(entry_.file);
        std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
        DERAINER_CHECK(engine != nullptr,
                       plan_path() + " is refused: " + log_.reason() + "; build it again on or for this machine");
        return engine;
    }

    nvinfer1::Dims dims(Size size) const {
        return io() == Io::image ? nvinfer1::Dims4{1, size.height, size.width, 3}
                                 : nvinfer1::Dims4{1, 3, size.height, size.width};
    }

    std::size_t bytes(Size size) const {
        return 3 * static_cast<std::size_t>(size.height) * static_cast<std::size_t>(size.width) *
               (io() == Io::image ? sizeof(std::uint8_t) : sizeof(float));
    }

    /// The context for a size in a lane, ready to run.
    Context& prepare(Size size, std::size_t lane) {
        const auto known = std::find_if(contexts_.begin(), contexts_.end(),
                                        [&](const Context& c) { return c.size == size && c.lane == lane; });
        if (known != contexts_.end()) {
            contexts_.splice(contexts_.begin(), contexts_, known);
            return contexts_.front();
        }
        const auto profile = static_cast<int>(choose_profile(entry_, size));
        Context context{size, lane, library_.create_context(), false, nullptr};
        TENSORRT_CHECK(context.execution != nullptr);
        cudaStream_t stream = lanes_[0].stream.get();
        TENSORRT_CHECK(context.execution->setOptimizationProfileAsync(profile, stream));
        CUDA_CHECK(cudaStreamSynchronize(stream));
        TENSORRT_CHECK(context.execution->setInputShape(kInput, dims(size)));
        TENSORRT_CHECK(same(context.execution->getTensorShape(kOutput), dims(size)));
        if (lane != kCallers) {
            set_addresses(context, lanes_[lane].input.get(), lanes_[lane].output.get());
        }
        const std::size_t needed = context.execution->updateDeviceMemorySizeForShapes();
        TENSORRT_CHECK(needed > 0);
        if (needed > memory_bytes_) {
            wait();
            contexts_.clear();  // as the address is in their graphs
            memory_.reset();
            memory_bytes_ = 0;
            memory_ = allocate(needed);
            memory_bytes_ = needed;
        }
        context.execution->setDeviceMemoryV2(memory_.get(), static_cast<std::int64_t>(memory_bytes_));
        const auto in_lane = [&](const Context& c) { return c.lane == lane; };
        if (std::count_if(contexts_.begin(), contexts_.end(), in_lane) >= static_cast<std::ptrdiff_t>(options_.sizes)) {
            wait();
            contexts_.erase(std::prev(std::find_if(contexts_.rbegin(), contexts_.rend(), in_lane).base()));
        }
        contexts_.push_front(std::move(context));
        return contexts_.front();
    }

    void set_addresses(Context& context, const void* input, void* output) {
        TENSORRT_CHECK(context.execution->setInputTensorAddress(kInput, input));
        TENSORRT_CHECK(context.execution->setTensorAddress(kOutput, output));
    }

    static bool same(const nvinfer1::Dims& a, const nvinfer1::Dims& b) {
        return a.nbDims == b.nbDims && std::equal(a.d, a.d + a.nbDims, b.d);
    }

    /// Until no context is at work any more.
    void wait() const { CUDA_CHECK(cudaEventSynchronize(done_.get())); }

    /// Let a stream run a context. Graphs are captured in the second run: the first one completes the set-up, which
    /// must not be captured, and is the only one for many an image.
    void launch(Context& context, cudaStream_t stream) {
        CUDA_CHECK(cudaStreamWaitEvent(stream, done_.get(), 0));
        const bool capturing = options_.cuda_graphs && !Library::captures && context.lane != kCallers;
        if (capturing && context.warm && context.graph == nullptr) {
            context.graph = capture(context, stream);
        }
        bool enqueued = true;
        if (context.graph != nullptr) {
            CUDA_CHECK(cudaGraphLaunch(context.graph.get(), stream));
        } else {
            enqueued = context.execution->enqueueV3(stream);
            context.warm = enqueued;
        }
        const cudaError_t recorded = cudaEventRecord(done_.get(), stream);  // behind what failed halfway, too
        TENSORRT_CHECK(enqueued);
        CUDA_CHECK(recorded);
    }

    GraphExec capture(Context& context, cudaStream_t stream) {
        CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        const bool enqueued = context.execution->enqueueV3(stream);
        cudaGraph_t captured = nullptr;
        const cudaError_t ended = cudaStreamEndCapture(stream, &captured);
        const Graph graph(captured);
        static_cast<void>(cudaGetLastError());
        DERAINER_CHECK(enqueued && ended == cudaSuccess,
                       plan_path() + " cannot be captured in a CUDA graph: " +
                           (enqueued ? cudaGetErrorName(ended) : log_.reason()) + "; set Options::cuda_graphs to false");
        cudaGraphExec_t instance = nullptr;
        CUDA_CHECK(cudaGraphInstantiateWithFlags(&instance, captured, 0));
        return GraphExec(instance);
    }

    // In the order of their making; each needs those above it.
    const Options options_;
    const Bundle bundle_;
    const Engine& entry_;
    Log log_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    Library library_;
    std::array<Lane, kLanes> lanes_;
    Event done_;
    DeviceMemory memory_;
    std::size_t memory_bytes_ = 0;
    std::list<Context> contexts_;  // the last used first
    std::mutex mutex_;
};

Derainer::Derainer(const std::filesystem::path& folder, const Options& options) {
    Bundle bundle = load(folder, options.public_key);
    bundle.verify();
    const std::string found = capability(options.device);  // before TensorRT is touched
    const OnDevice on_device(options.device);
    implementation_ = std::make_unique<Implementation>(std::move(bundle), options, found);
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

Io Derainer::io() const { return implementation_->io(); }

std::int64_t Derainer::multiple() const { return implementation_->multiple(); }

}  // namespace derainer
