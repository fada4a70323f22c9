#include "trt.hpp"

namespace derainer {

const char* const Library::flavor = "tensorrt";
const bool Library::jit = false;

class Library::State {
public:
    nvinfer1::ICudaEngine& engine;
};

Library::Library(nvinfer1::ICudaEngine& engine, const std::filesystem::path&, bool) : state_(new State{engine}) {}

Library::~Library() = default;

std::unique_ptr<nvinfer1::IExecutionContext> Library::create_context() {
    return std::unique_ptr<nvinfer1::IExecutionContext>(
        state_->engine.createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
}

}  // namespace derainer
