/// In what TensorRT and TensorRT for RTX differ. CMake compiles one of tensorrt.cpp and tensorrt_rtx.cpp.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include <NvInfer.h>

namespace derainer {

class Library {
public:
    /// As the manifest names it.
    static const char* const flavor;
    /// Whether it captures CUDA graphs by itself.
    static const bool captures;

    /// `cache`: file for kernels that are compiled at run time; `cuda_graphs`: whether it captures them, if it does.
    Library(nvinfer1::ICudaEngine& engine, const std::filesystem::path& cache, bool cuda_graphs);
    ~Library();

    /// A context whose memory is ours to give; null where that failed.
    std::unique_ptr<nvinfer1::IExecutionContext> create_context();

private:
    class State;
    std::unique_ptr<State> state_;
};

}  // namespace derainer
