/// A GPU that works as late as it may: what is enqueued on a stream happens when somebody waits for it, and nothing
/// else does. Memory is the host's, and that of the GPU begins as NaN.
#include "fake.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <utility>

#include <NvInfer.h>

#include "../network.hpp"

Fake fake;

std::size_t Fake::count(const std::string& call) const {
    return static_cast<std::size_t>(std::count(calls.begin(), calls.end(), call));
}

namespace {

using Work = std::function<void()>;

/// The work of a stream in order; the event that waits for it may live longer than the stream.
struct Queue {
    std::deque<Work> pending;
    std::size_t added = 0;
    std::size_t done = 0;

    void add(Work work) {
        pending.push_back(std::move(work));
        ++added;
    }

    void run_until(std::size_t position) {
        while (done < position) {
            const Work work = std::move(pending.front());
            pending.pop_front();
            ++done;
            work();
        }
    }
};

std::map<void*, std::size_t> blocks;
std::size_t enqueued = 0;
std::size_t run_so_far = 0;
nvinfer1::ILogger* logger = nullptr;
cudaError_t last_error = cudaSuccess;

cudaError_t call(const char* name) {
    fake.calls.emplace_back(name);
    return cudaSuccess;
}

}  // namespace

struct CUstream_st {
    std::shared_ptr<Queue> queue = std::make_shared<Queue>();
    bool capturing = false;
    std::vector<Work> captured;

    /// The work of a context.
    void run(Work work) {
        if (capturing) {
            captured.push_back(std::move(work));
        } else {
            queue->add([work = std::move(work), turn = ++enqueued] {
                fake.in_order = fake.in_order && turn == ++run_so_far;
                work();
            });
        }
    }
};

struct CUevent_st {
    std::shared_ptr<Queue> queue;
    std::size_t position = 0;

    void wait() const {
        if (queue) {
            queue->run_until(position);
        }
    }
};

struct CUgraph_st {
    std::vector<Work> work;
};

struct CUgraphExec_st {
    std::vector<Work> work;
};

const char* cudaGetErrorName(cudaError_t code) {
    switch (code) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
        default: return "cudaErrorUnknown";
    }
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDeviceCount(int* count) {
    *count = fake.devices;
    return fake.devices < 0 ? cudaErrorInsufficientDriver : cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = fake.device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    fake.device = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? 8 : 6;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* place, int length, int device) {
    std::snprintf(place, static_cast<std::size_t>(length), "0000:0%d:00.0", device);
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = fake.driver;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
    if (bytes > fake.memory) {
        return last_error = cudaErrorMemoryAllocation;
    }
    fake.memory -= bytes;
    *pointer = std::malloc(bytes);
    std::memset(*pointer, 255, bytes);  // as float32, NaN
    blocks[*pointer] = bytes;
    return call("malloc");
}

cudaError_t cudaMallocHost(void** pointer, std::size_t bytes) {
    *pointer = std::malloc(bytes);
    return call("malloc host");
}

cudaError_t cudaFree(void* pointer) {
    fake.memory += blocks.at(pointer);
    blocks.erase(pointer);
    std::free(pointer);
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void* pointer) {
    std::free(pointer);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    stream->queue->add([=] { std::memcpy(to, from, bytes); });
    return call(kind == cudaMemcpyHostToDevice ? "up" : "down");
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = new CUstream_st;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    stream->queue->run_until(stream->queue->added);
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    stream->queue->add([state = *event] { state.wait(); });
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    stream->capturing = true;
    return call("capture");
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    stream->capturing = false;
    *graph = new CUgraph_st{std::move(stream->captured)};
    stream->captured.clear();
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = new CUevent_st;
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    *event = {stream->queue, stream->queue->added};
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    event->wait();
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* instance, cudaGraph_t graph, unsigned long long) {
    *instance = new CUgraphExec_st{graph->work};
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t instance, cudaStream_t stream) {
    for (const Work& work : instance->work) {
        stream->run(work);
    }
    return call("launch");
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t instance) {
    delete instance;
    return cudaSuccess;
}

namespace nvinfer1 {

bool IRuntimeConfig::setCudaGraphStrategy(CudaGraphStrategy value) noexcept {
    fake.cuda_graphs = value == CudaGraphStrategy::kWHOLE_GRAPH_CAPTURE;
    return true;
}

bool IRuntimeCache::deserialize(const void* blob, std::size_t size) noexcept {
    fake.kernels.assign(static_cast<const char*>(blob), size);
    return true;
}

IHostMemory* IRuntimeCache::serialize() const noexcept { return new IHostMemory{fake.kernels}; }

IExecutionContext::IExecutionContext(DataType type) : type_(type) { ++fake.contexts; }

IExecutionContext::~IExecutionContext() { --fake.contexts; }

bool IExecutionContext::setOptimizationProfileAsync(std::int32_t profile, cudaStream_t) noexcept {
    profile_ = profile;
    return true;
}

bool IExecutionContext::setInputShape(const char* name, const Dims& dims) noexcept {
    dims_ = dims;
    return profile_ >= 0 && std::string(name) == "input";
}

Dims IExecutionContext::getTensorShape(const char*) const noexcept { return dims_; }

bool IExecutionContext::setInputTensorAddress(const char* name, const void* address) noexcept {
    input_ = address;
    return std::string(name) == "input";
}

bool IExecutionContext::setTensorAddress(const char* name, void* address) noexcept {
    (std::string(name) == "output" ? output_ : finite_) = address;
    return std::string(name) == "output" || (fake.has_finite && std::string(name) == "finite");
}

std::size_t IExecutionContext::updateDeviceMemorySizeForShapes() noexcept {
    if (fake.activations == 0) {
        logger->log(ILogger::Severity::kERROR, "no memory\nplan");
    }
    return fake.activations * static_cast<std::size_t>(dims_.d[0] * dims_.d[1] * dims_.d[2] * dims_.d[3]);
}

void IExecutionContext::setDeviceMemoryV2(void* memory, std::int64_t bytes) noexcept {
    memory_ = memory;
    memory_bytes_ = bytes;
}

bool IExecutionContext::enqueueV3(cudaStream_t stream) noexcept {
    const bool fails = fake.failing || last_error != cudaSuccess ||
                       memory_bytes_ < static_cast<std::int64_t>(updateDeviceMemorySizeForShapes());
    const auto work = [fails, type = type_, dims = dims_, input = input_, output = output_, memory = memory_,
                       bytes = memory_bytes_, wrong_channel = fake.wrong_channel, finite = finite_,
                       wrong_replay = fake.wrong_replay && runs_ > 0] {
        std::memset(memory, 0, static_cast<std::size_t>(bytes));
        if (fails) {
            return;
        }
        if (fake.has_finite) {
            std::fill_n(static_cast<float*>(finite), dims.d[0], 0.0F);
            static_cast<float*>(finite)[dims.d[0] - 1] = fake.finite;
        }
        const auto numbers = static_cast<std::size_t>(dims.d[0] * dims.d[1] * dims.d[2] * dims.d[3]);
        if (type == DataType::kFLOAT) {
            const auto height = static_cast<std::size_t>(dims.d[2]);
            const auto width = static_cast<std::size_t>(dims.d[3]);
            auto* answer = static_cast<float*>(output);
            for (std::size_t place = 0; place < numbers; place += 3 * height * width) {
                stand_in(static_cast<const float*>(input) + place, answer + place, height, width);
            }
            answer[height * width] += wrong_channel ? 0.3F : 0.0F;
            answer[0] += wrong_replay ? 0.3F : 0.0F;
        } else if (type == DataType::kHALF) {
            std::memcpy(output, input, sizeof(std::uint16_t) * numbers);
        } else {
            const auto* levels = static_cast<const std::uint8_t*>(input);
            std::transform(levels, levels + numbers, static_cast<std::uint8_t*>(output),
                           [](std::uint8_t level) { return static_cast<std::uint8_t>(255 - level); });
        }
    };
    stream->run(work);
    if (fails) {
        logger->log(ILogger::Severity::kERROR, "out of\nluck");
        return false;
    }
    call("enqueue");
    ++runs_;
    return true;
}

std::int32_t ICudaEngine::getNbIOTensors() const noexcept { return fake.has_finite ? 3 : 2; }

const char* ICudaEngine::getIOTensorName(std::int32_t index) const noexcept {
    constexpr const char* names[] = {"input", "output", "finite"};
    return names[index];
}

IExecutionContext* ICudaEngine::createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept {
    return strategy == ExecutionContextAllocationStrategy::kUSER_MANAGED ? new IExecutionContext(type) : nullptr;
}

IExecutionContext* ICudaEngine::createExecutionContext(IRuntimeConfig* config) noexcept {
    return createExecutionContext(config->strategy);
}

void IRuntime::setEngineHostCodeAllowed(bool allowed) noexcept { fake.host_code_allowed = allowed; }

ICudaEngine* IRuntime::deserializeCudaEngine(const void* plan, std::size_t size) noexcept {
    const std::string content(static_cast<const char*>(plan), size);
    call("deserialize");
    if (content != "tensor" && content != "tensor16" && content != "image") {
        logger->log(ILogger::Severity::kERROR, "a plan of\nanother kind");
        return nullptr;
    }
    return new ICudaEngine{content == "tensor"     ? DataType::kFLOAT
                           : content == "tensor16" ? DataType::kHALF
                                                   : DataType::kUINT8};
}

IRuntime* createInferRuntime(ILogger& log) noexcept {
    logger = &log;
    return new IRuntime;
}

}  // namespace nvinfer1

std::int32_t getInferLibMajorVersion() noexcept { return 11; }
std::int32_t getInferLibMinorVersion() noexcept { return 4; }
std::int32_t getInferLibPatchVersion() noexcept { return 0; }
std::int32_t getInferLibBuildVersion() noexcept { return 106; }
