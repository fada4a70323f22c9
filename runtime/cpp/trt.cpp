#include "trt.hpp"

#include <algorithm>
#include <iterator>
#include <optional>

#include "backends.hpp"
#include "check.hpp"
#include "choice.hpp"

/// Throws DeviceError, or OutOfMemory, with CUDA's reason for a call that fails.
#define CUDA_CHECK(call) check_cuda((call), #call)

/// Throws DeviceError with TensorRT's reason for a call that does not give what is true. Inside TrtSession.
#define TENSORRT_CHECK(call) DERAINER_CHECK(DeviceError, call, path_ + " failed: " + log_.reason())

namespace derainer {

namespace {

constexpr const char* kInput = "input";
constexpr const char* kOutput = "output";

using Graph = std::unique_ptr<CUgraph_st, Free<cudaGraphDestroy>>;

void check_cuda(cudaError_t code, const char* expression) {
    if (code != cudaSuccess) {
        static_cast<void>(cudaGetLastError());  // or TensorRT finds it there, and takes it for its own
        const std::string message = std::string("CUDA failed with ") + cudaGetErrorName(code);
        if (code == cudaErrorMemoryAllocation) {
            throw OutOfMemory(message + "; use smaller tiles or a network of fp16", expression);
        }
        throw DeviceError(message, expression);
    }
}

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

/// In one line: the kind of GPU and where it is, its driver and the library.
std::string identify() {
    int device = 0;
    int driver = 0;
    char place[32] = {};
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetPCIBusId(place, sizeof place, device));
    CUDA_CHECK(cudaDriverGetVersion(&driver));
    return "GPU " + std::string(place) + " of compute capability " + gpu(device) + ", driver " +
           std::to_string(driver) + ", " + Library::flavor + " " + library_version();
}

bool has_tensor(const nvinfer1::ICudaEngine& engine, const std::string& name) {
    for (int i = 0; i < engine.getNbIOTensors(); ++i) {
        if (engine.getIOTensorName(i) == name) {
            return true;
        }
    }
    return false;
}

bool same(const nvinfer1::Dims& a, const nvinfer1::Dims& b) {
    return a.nbDims == b.nbDims && std::equal(a.d, a.d + a.nbDims, b.d);
}

}  // namespace

std::string library_version() {
    return std::to_string(getInferLibMajorVersion()) + "." + std::to_string(getInferLibMinorVersion()) + "." +
           std::to_string(getInferLibPatchVersion()) + "." + std::to_string(getInferLibBuildVersion());
}

std::string gpu(int device) {
    int devices = 0;
    const cudaError_t code = cudaGetDeviceCount(&devices);
    DERAINER_CHECK(DeviceError, code == cudaSuccess && devices > 0,
                   std::string("CUDA finds no NVIDIA GPU with a driver (") + cudaGetErrorName(code) +
                       "); expected one: see that nvidia-smi shows it");
    DERAINER_CHECK(DeviceError, device >= 0 && device < devices,
                   "expected a GPU from 0 to " + std::to_string(devices - 1) + ", found " + std::to_string(device));
    int major = 0;
    int minor = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    return std::to_string(major) + "." + std::to_string(minor);
}

OnDevice::OnDevice(int device) noexcept {
    static_cast<void>(cudaGetDevice(&former_));
    static_cast<void>(cudaSetDevice(device));  // if that fails, so does what comes next
}

OnDevice::~OnDevice() { static_cast<void>(cudaSetDevice(former_)); }

void Log::log(Severity severity, const char* message) noexcept {
    if (severity <= Severity::kERROR) {
        const std::lock_guard<std::mutex> lock(mutex_);
        error_ = message;
        std::replace(error_.begin(), error_.end(), '\n', ' ');
    }
}

std::string Log::reason() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return error_.empty() ? "it gives no reason" : error_;
}

TrtSession::TrtSession(const Bundle& bundle, const Engine& engine, std::size_t sizes, bool cuda_graphs)
    : engine_(engine),
      path_((bundle.folder / engine.file).string()),
      graph_io_(bundle.manifest.model.graph_io),
      sizes_(sizes),
      cuda_graphs_(cuda_graphs),
      runtime_(nvinfer1::createInferRuntime(log_)),
      cuda_engine_(deserialize(bundle)),
      has_finite_(has_tensor(*cuda_engine_, kFinite)),
      library_(*cuda_engine_, bundle.beside(engine.file, "cache"), cuda_graphs),  // the same file as in Python
      identity_(identify()) {
    DERAINER_CHECK(InputError, sizes > 0, "expected to keep at least one size, found 0");
    const nvinfer1::DataType type = graph_io_.io == Io::image      ? nvinfer1::DataType::kUINT8
                                    : graph_io_.io == Io::tensor16 ? nvinfer1::DataType::kHALF
                                                                   : nvinfer1::DataType::kFLOAT;
    DERAINER_CHECK(MismatchError,
                   cuda_engine_->getTensorDataType(kInput) == type && cuda_engine_->getTensorDataType(kOutput) == type,
                   path_ + ": expected tensors of the type that the manifest says, found another");
    DERAINER_CHECK(MismatchError,
                   cuda_engine_->getNbOptimizationProfiles() == static_cast<int>(engine_.profiles.size()),
                   path_ + ": expected the profiles of the manifest, found another number of them");
    std::size_t largest = 0;
    std::size_t finite_bytes = 0;
    for (const Profile& profile : engine_.profiles) {
        DERAINER_CHECK(InvalidModel, profile.max.height <= PTRDIFF_MAX / 12 / kMaxBatch / profile.max.width,
                       path_ + ": expected sizes that memory can hold, found " + to_string(profile.max));
        const auto most = static_cast<std::size_t>(profile.batch[2]);
        largest = std::max(largest, most * graph_io_.bytes(profile.max));
        finite_bytes = std::max(finite_bytes, most * sizeof(float));
        limits_.push_back({profile.min, profile.max});
    }
    for (Lane& lane : lanes_) {
        cudaStream_t stream = nullptr;
        CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        lane.stream.reset(stream);
        lane.input = allocate(largest);
        lane.output = allocate(largest);
        lane.host_input = allocate_pinned(largest);
        lane.host_output = allocate_pinned(largest);
        if (has_finite_) {
            lane.finite = allocate(finite_bytes);
            lane.host_finite = allocate_pinned(finite_bytes);
        }
    }
    if (has_finite_) {
        unread_finite_ = allocate(finite_bytes);
    }
    cudaEvent_t event = nullptr;
    CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    done_.reset(event);
}

TrtSession::~TrtSession() {
    for (const Lane& lane : lanes_) {
        static_cast<void>(cudaStreamSynchronize(lane.stream.get()));
    }
    static_cast<void>(cudaEventSynchronize(done_.get()));
}

void* TrtSession::input(std::size_t lane, Size, std::int64_t) { return lanes_[lane].host_input.get(); }

void TrtSession::start(std::size_t i, Size size, std::int64_t images) {
    Lane& lane = lanes_[i];
    cudaStream_t stream = lane.stream.get();
    const std::int64_t count = std::max(images, profile_for(size, images).batch[0]);
    fill_up(lane.host_input.get(), graph_io_.bytes(size), images, count);
    const std::size_t bytes = static_cast<std::size_t>(count) * graph_io_.bytes(size);
    Context& context = prepare(size, count, i);
    CUDA_CHECK(cudaMemcpyAsync(lane.input.get(), lane.host_input.get(), bytes, cudaMemcpyHostToDevice, stream));
    launch(context, stream);
    CUDA_CHECK(cudaMemcpyAsync(lane.host_output.get(), lane.output.get(), bytes, cudaMemcpyDeviceToHost, stream));
    if (has_finite_) {
        const std::size_t numbers = static_cast<std::size_t>(count) * sizeof(float);
        CUDA_CHECK(cudaMemcpyAsync(lane.host_finite.get(), lane.finite.get(), numbers, cudaMemcpyDeviceToHost, stream));
    }
}

const void* TrtSession::finish(std::size_t lane) {
    CUDA_CHECK(cudaStreamSynchronize(lanes_[lane].stream.get()));
    return lanes_[lane].host_output.get();
}

const float* TrtSession::finite(std::size_t lane) {
    return has_finite_ ? static_cast<const float*>(lanes_[lane].host_finite.get()) : nullptr;
}

void TrtSession::enqueue(const void* input, void* output, Size size, cudaStream_t stream, float* finite,
                         std::int64_t images) {
    DERAINER_CHECK(InputError, finite == nullptr || has_finite_,
                   path_ +
                       ": expected a graph that says whether its answer is finite, found one without `finite`; "
                       "export it again with --io image, or look at the output");
    DERAINER_CHECK(InputError, is_multiple(size, graph_io_.multiple),
                   "expected height and width in multiples of " + std::to_string(graph_io_.multiple) + ", found " +
                       to_string(size));
    const std::int64_t least = profile_for(size, images).batch[0];
    DERAINER_CHECK(InputError, images >= least,
                   path_ + " takes at least " + std::to_string(least) + " images of " + to_string(size) +
                       " at once, found " + std::to_string(images));
    Context& context = prepare(size, images, kCallers);
    set_addresses(context, input, output, finite == nullptr ? unread_finite_.get() : finite);
    launch(context, stream);
}

std::unique_ptr<nvinfer1::ICudaEngine> TrtSession::deserialize(const Bundle& bundle) {
    TENSORRT_CHECK(runtime_ != nullptr);
    // An engine for later versions, too, brings the code that runs it.
    runtime_->setEngineHostCodeAllowed(engine_.flags.count("version_compatible") > 0);
    const std::string plan = bundle.read(engine_.file);
    std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    DERAINER_CHECK(InvalidModel, engine != nullptr,
                   path_ + " is refused: " + log_.reason() + "; build it again on or for this machine");
    return engine;
}

const Profile& TrtSession::profile_for(Size size, std::int64_t images) const {
    const std::optional<std::size_t> profile = engine_.profile_for(size, images);
    DERAINER_CHECK(InputError, profile.has_value(),
                   path_ + " takes images of height x width " + to_string(limits_) + ", found " +
                       (images == 1 ? "" : std::to_string(images) + " at once of ") + to_string(size) +
                       "; build it with another --min and --max, or --batch");
    return engine_.profiles[*profile];
}

/// The context for so many images of a size in a lane, ready to run.
TrtSession::Context& TrtSession::prepare(Size size, std::int64_t images, std::size_t lane) {
    const auto known = std::find_if(contexts_.begin(), contexts_.end(), [&](const Context& c) {
        return c.size == size && c.images == images && c.lane == lane;
    });
    if (known != contexts_.end()) {
        contexts_.splice(contexts_.begin(), contexts_, known);
        return contexts_.front();
    }
    const auto profile = static_cast<int>(&profile_for(size, images) - engine_.profiles.data());
    Context context{size, images, lane, library_.create_context(), false, nullptr};
    TENSORRT_CHECK(context.execution != nullptr);
    cudaStream_t stream = lanes_[0].stream.get();
    TENSORRT_CHECK(context.execution->setOptimizationProfileAsync(profile, stream));
    CUDA_CHECK(cudaStreamSynchronize(stream));
    TENSORRT_CHECK(context.execution->setInputShape(kInput, dims(size, images)));
    TENSORRT_CHECK(same(context.execution->getTensorShape(kOutput), dims(size, images)));
    if (lane != kCallers) {
        set_addresses(context, lanes_[lane].input.get(), lanes_[lane].output.get(), lanes_[lane].finite.get());
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
    if (std::count_if(contexts_.begin(), contexts_.end(), in_lane) >= static_cast<std::ptrdiff_t>(sizes_)) {
        wait();
        contexts_.erase(std::prev(std::find_if(contexts_.rbegin(), contexts_.rend(), in_lane).base()));
    }
    contexts_.push_front(std::move(context));
    return contexts_.front();
}

void TrtSession::set_addresses(Context& context, const void* input, void* output, void* finite) {
    TENSORRT_CHECK(context.execution->setInputTensorAddress(kInput, input));
    TENSORRT_CHECK(context.execution->setTensorAddress(kOutput, output));
    TENSORRT_CHECK(!has_finite_ || context.execution->setTensorAddress(kFinite, finite));
}

/// Let a stream run a context. Graphs are captured in the second run: the first one completes the set-up, which must
/// not be captured, and is the only one for many an image.
void TrtSession::launch(Context& context, cudaStream_t stream) {
    CUDA_CHECK(cudaStreamWaitEvent(stream, done_.get(), 0));
    const bool capturing = cuda_graphs_ && !Library::jit && context.lane != kCallers;
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

GraphExec TrtSession::capture(Context& context, cudaStream_t stream) {
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    const bool enqueued = context.execution->enqueueV3(stream);
    cudaGraph_t captured = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(stream, &captured);
    const Graph graph(captured);
    static_cast<void>(cudaGetLastError());
    DERAINER_CHECK(DeviceError, enqueued && ended == cudaSuccess,
                   path_ + " cannot be captured in a CUDA graph: " +
                       (enqueued ? cudaGetErrorName(ended) : log_.reason()) + "; set Options::cuda_graphs to false");
    cudaGraphExec_t instance = nullptr;
    CUDA_CHECK(cudaGraphInstantiateWithFlags(&instance, captured, 0));
    return GraphExec(instance);
}

/// Until no context is at work any more.
void TrtSession::wait() const { CUDA_CHECK(cudaEventSynchronize(done_.get())); }

nvinfer1::Dims TrtSession::dims(Size size, std::int64_t images) const {
    const auto [a, b, c, d] = graph_io_.shape(size, images);
    return nvinfer1::Dims4{a, b, c, d};
}

namespace {

/// A TrtSession whose GPU becomes, in every call, the current one of the calling thread.
class OnGpu final : public Session {
public:
    /// `capability`: of that GPU, known before TensorRT is touched.
    OnGpu(const Bundle& bundle, const Options& options, const std::string& capability) : device_(options.device) {
        const OnDevice on_device(device_);
        const Engine& engine = choose_engine(bundle, capability, Library::flavor, library_version());
        session_ = std::make_unique<TrtSession>(bundle, engine, options.sizes, options.cuda_graphs);
    }

    ~OnGpu() override {
        const OnDevice on_device(device_);
        session_.reset();
    }

    std::string file() const override { return session_->file(); }
    std::string identity() const override { return session_->identity(); }
    GraphIo graph_io() const override { return session_->graph_io(); }
    std::size_t lanes() const override { return session_->lanes(); }
    const std::vector<Limits>& limits() const override { return session_->limits(); }
    std::int64_t max_batch(Size size) const override { return session_->max_batch(size); }

    void* input(std::size_t lane, Size size, std::int64_t images) override {
        return session_->input(lane, size, images);
    }

    void start(std::size_t lane, Size size, std::int64_t images) override {
        const OnDevice on_device(device_);
        session_->start(lane, size, images);
    }

    const void* finish(std::size_t lane) override {
        const OnDevice on_device(device_);
        return session_->finish(lane);
    }

    const float* finite(std::size_t lane) override { return session_->finite(lane); }

    void enqueue(const void* input, void* output, Size size, cudaStream_t stream, float* finite,
                 std::int64_t images) override {
        const OnDevice on_device(device_);
        session_->enqueue(input, output, size, stream, finite, images);
    }

private:
    const int device_;
    std::unique_ptr<TrtSession> session_;
};

}  // namespace

std::unique_ptr<Session> open_tensorrt(const Bundle& bundle, const Options& options) {
    return std::make_unique<OnGpu>(bundle, options, gpu(options.device));
}

}  // namespace derainer
