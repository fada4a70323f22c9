/// The part of TensorRT and TensorRT for RTX that the library uses, by name and signature; fake.cpp says what it does.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include <cuda_runtime_api.h>

namespace nvinfer1 {

struct Dims {
    std::int32_t nbDims = 0;
    std::int64_t d[8] = {};
};

struct Dims4 : Dims {
    Dims4(std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t e) : Dims{4, {a, b, c, e}} {}
};

enum class DataType { kFLOAT = 0, kHALF = 1, kUINT8 = 5 };
enum class ExecutionContextAllocationStrategy { kSTATIC = 0, kUSER_MANAGED = 2 };
enum class CudaGraphStrategy { kDISABLED, kWHOLE_GRAPH_CAPTURE };

class ILogger {
public:
    enum class Severity { kINTERNAL_ERROR, kERROR, kWARNING, kINFO };
    virtual void log(Severity severity, const char* message) noexcept = 0;
    virtual ~ILogger() = default;
};

class IHostMemory {
public:
    void* data() const noexcept { return const_cast<char*>(content.data()); }
    std::size_t size() const noexcept { return content.size(); }
    std::string content;
};

class IRuntimeCache {
public:
    bool deserialize(const void* blob, std::size_t size) noexcept;
    IHostMemory* serialize() const noexcept;
};

class IRuntimeConfig {
public:
    void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy value) noexcept { strategy = value; }
    bool setCudaGraphStrategy(CudaGraphStrategy value) noexcept;
    IRuntimeCache* createRuntimeCache() const noexcept { return new IRuntimeCache; }
    bool setRuntimeCache(const IRuntimeCache&) noexcept { return true; }
    ExecutionContextAllocationStrategy strategy = ExecutionContextAllocationStrategy::kSTATIC;
};

/// Computes the stand-in network, or 255 - level of uint8 images.
class IExecutionContext {
public:
    explicit IExecutionContext(DataType type);
    ~IExecutionContext();
    bool setOptimizationProfileAsync(std::int32_t profile, cudaStream_t stream) noexcept;
    bool setInputShape(const char* name, const Dims& dims) noexcept;
    Dims getTensorShape(const char* name) const noexcept;
    bool setInputTensorAddress(const char* name, const void* address) noexcept;
    bool setTensorAddress(const char* name, void* address) noexcept;
    std::size_t updateDeviceMemorySizeForShapes() noexcept;
    void setDeviceMemoryV2(void* memory, std::int64_t bytes) noexcept;
    bool enqueueV3(cudaStream_t stream) noexcept;

private:
    DataType type_;
    Dims dims_;
    int profile_ = -1;
    const void* input_ = nullptr;
    void* output_ = nullptr;
    void* finite_ = nullptr;
    void* memory_ = nullptr;
    std::int64_t memory_bytes_ = 0;
    int runs_ = 0;
};

class ICudaEngine {
public:
    IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept;
    IExecutionContext* createExecutionContext(IRuntimeConfig* config) noexcept;
    IRuntimeConfig* createRuntimeConfig() noexcept { return new IRuntimeConfig; }
    std::int32_t getNbIOTensors() const noexcept;
    const char* getIOTensorName(std::int32_t index) const noexcept;
    DataType getTensorDataType(const char*) const noexcept { return type; }
    std::int32_t getNbOptimizationProfiles() const noexcept { return 2; }
    DataType type;
};

class IRuntime {
public:
    void setEngineHostCodeAllowed(bool allowed) noexcept;
    ICudaEngine* deserializeCudaEngine(const void* plan, std::size_t size) noexcept;
};

IRuntime* createInferRuntime(ILogger& log) noexcept;

}  // namespace nvinfer1

extern "C" {
std::int32_t getInferLibMajorVersion() noexcept;
std::int32_t getInferLibMinorVersion() noexcept;
std::int32_t getInferLibPatchVersion() noexcept;
std::int32_t getInferLibBuildVersion() noexcept;
}
