#include "check.hpp"
#include "private_files.hpp"
#include "trt.hpp"

namespace derainer {

const char* const Library::flavor = "rtx";
const bool Library::jit = true;

class Library::State {
public:
    State(nvinfer1::ICudaEngine& engine, const std::filesystem::path& cache_path, bool cuda_graphs)
        : engine(engine), config(engine.createRuntimeConfig()), path(cache_path), known(read_own(cache_path)) {
        DERAINER_CHECK(DeviceError, config != nullptr, "TensorRT for RTX cannot be configured");
        config->setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
        DERAINER_CHECK(DeviceError,
                       config->setCudaGraphStrategy(cuda_graphs ? nvinfer1::CudaGraphStrategy::kWHOLE_GRAPH_CAPTURE
                                                                : nvinfer1::CudaGraphStrategy::kDISABLED),
                       "TensorRT for RTX cannot be configured");
        cache.reset(config->createRuntimeCache());
        DERAINER_CHECK(DeviceError, cache != nullptr, "TensorRT for RTX has no cache");
        if (!known.empty()) {
            static_cast<void>(cache->deserialize(known.data(), known.size()));  // false for one of another GPU: no harm
        }
        DERAINER_CHECK(DeviceError, config->setRuntimeCache(*cache), "TensorRT for RTX cannot be configured");
    }

    nvinfer1::ICudaEngine& engine;
    std::unique_ptr<nvinfer1::IRuntimeConfig> config;
    std::unique_ptr<nvinfer1::IRuntimeCache> cache;
    std::filesystem::path path;
    std::string known;
};

Library::Library(nvinfer1::ICudaEngine& engine, const std::filesystem::path& cache, bool cuda_graphs)
    : state_(new State(engine, cache, cuda_graphs)) {}

Library::~Library() {
    try {
        const std::unique_ptr<nvinfer1::IHostMemory> kernels(state_->cache->serialize());
        const std::string content =
            kernels ? std::string(static_cast<const char*>(kernels->data()), kernels->size()) : std::string();
        if (!content.empty() && content != state_->known) {
            write_own(state_->path, content);
        }
    } catch (const std::exception&) {  // the next start is slower
    }
}

std::unique_ptr<nvinfer1::IExecutionContext> Library::create_context() {
    return std::unique_ptr<nvinfer1::IExecutionContext>(state_->engine.createExecutionContext(state_->config.get()));
}

}  // namespace derainer
