/// A network in TensorRT or TensorRT for RTX, from a bundle made by `export.tensorrt`, as in runtime/trt.py.
///
/// What differs between the two is in `Library`: CMake compiles trt_tensorrt.cpp or trt_rtx.cpp. A TrtSession belongs
/// to the GPU that is the current one of the calling thread (see `OnDevice`) when it is made, which has to be the
/// current one in all calls; these must not overlap.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include "bundle.hpp"
#include "session.hpp"
#include "tiling.hpp"

namespace derainer {

/// The library that runs engines.
class Library {
public:
    /// Its name in manifests.
    static const char* const flavor;
    /// Whether it compiles kernels at run time: it keeps them in a cache, and captures CUDA graphs by itself, since
    /// only it knows when a kernel is the final one.
    static const bool jit;

    /// `cache`: file for kernels that are compiled at run time; `cuda_graphs`: whether it captures them, if it does.
    Library(nvinfer1::ICudaEngine& engine, const std::filesystem::path& cache, bool cuda_graphs);
    ~Library();

    /// A context whose memory is ours to give; null where that failed.
    std::unique_ptr<nvinfer1::IExecutionContext> create_context();

private:
    class State;
    std::unique_ptr<State> state_;
};

/// Version of the library, in full.
std::string library_version();

/// Compute capability of a GPU, such as "8.9". Asks CUDA only, since TensorRT may crash where there is no driver.
/// Throws DeviceError where there is no such GPU.
std::string gpu(int device);

/// Makes a GPU the current one of the calling thread, and then the former again.
class OnDevice {
public:
    explicit OnDevice(int device) noexcept;
    ~OnDevice();
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int former_ = 0;
};

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
using GraphExec = std::unique_ptr<CUgraphExec_st, Free<cudaGraphExecDestroy>>;
using DeviceMemory = std::unique_ptr<void, Free<cudaFree>>;
using PinnedMemory = std::unique_ptr<void, Free<cudaFreeHost>>;

/// TensorRT's logger: silent, keeps the last error.
class Log final : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override;
    std::string reason();

private:
    std::mutex mutex_;
    std::string error_;
};

/// All contexts work in one block of memory, one at a time: each waits for the event that its predecessor leaves, so
/// that copies of one lane may go on beside the work of the other. A CUDA graph is spoilt when the context or the
/// addresses that it was captured with change, so every size and number of images has a context of its own in each
/// lane.
class TrtSession final : public Session {
public:
    /// `engine`: of the bundle, for this GPU and library; `sizes`: for how many image sizes the contexts, and with them
    /// the CUDA graphs, are kept; `cuda_graphs`: replay the launches of a size from its second run on. Throws
    /// MismatchError for a plan that is not what the manifest says, InvalidModel for one that the library refuses, and
    /// OutOfMemory.
    TrtSession(const Bundle& bundle, const Engine& engine, std::size_t sizes, bool cuda_graphs);
    /// Waits for the work under way.
    ~TrtSession() override;

    std::string file() const override { return engine_.file; }
    std::string identity() const override { return identity_; }
    GraphIo graph_io() const override { return graph_io_; }
    std::size_t lanes() const override { return lanes_.size(); }
    std::int64_t max_batch(Size size) const override { return engine_.max_batch(size); }
    void* input(std::size_t lane, Size size, std::int64_t images) override;
    void start(std::size_t lane, Size size, std::int64_t images) override;
    const void* finish(std::size_t lane) override;
    const float* finite(std::size_t lane) override;

    const std::vector<Limits>& limits() const override { return limits_; }
    void enqueue(const void* input, void* output, Size size, cudaStream_t stream, float* finite,
                 std::int64_t images) override;

private:
    /// What images need on their way through the GPU, for the most of the largest size.
    struct Lane {
        Stream stream;
        DeviceMemory input;
        DeviceMemory output;
        PinnedMemory host_input;
        PinnedMemory host_output;
        DeviceMemory finite;  // for a number of each image, where the engine tells it
        PinnedMemory host_finite;
    };

    /// What is set up for so many images of one size in one lane. `warm` once it has run.
    struct Context {
        Size size;
        std::int64_t images;
        std::size_t lane;
        std::unique_ptr<nvinfer1::IExecutionContext> execution;
        bool warm = false;
        GraphExec graph;
    };

    static constexpr std::size_t kLanes = 2;
    static constexpr std::size_t kCallers = kLanes;  // in place of a lane: memory and stream of who calls `enqueue`

    std::unique_ptr<nvinfer1::ICudaEngine> deserialize(const Bundle& bundle);
    const Profile& profile_for(Size size, std::int64_t images) const;
    Context& prepare(Size size, std::int64_t images, std::size_t lane);
    void set_addresses(Context& context, const void* input, void* output, void* finite);
    void launch(Context& context, cudaStream_t stream);
    GraphExec capture(Context& context, cudaStream_t stream);
    void wait() const;
    nvinfer1::Dims dims(Size size, std::int64_t images) const;

    // In the order of their making; each needs those above it.
    const Engine engine_;
    const std::string path_;
    const GraphIo graph_io_;
    const std::size_t sizes_;
    const bool cuda_graphs_;
    std::vector<Limits> limits_;
    Log log_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> cuda_engine_;
    const bool has_finite_;
    Library library_;
    const std::string identity_;
    std::array<Lane, kLanes> lanes_;
    Event done_;
    DeviceMemory unread_finite_;  // of callers who do not ask
    DeviceMemory memory_;
    std::size_t memory_bytes_ = 0;
    std::list<Context> contexts_;  // the last used first
};

}  // namespace derainer
