/// What a bundle can run in. Of each backend CMake compiles the file that has it, or the one that says that this build
/// has it not; nothing else knows of any library.
///
/// A further backend is a file with such a function, its provider's name in `open` of derainer.cpp, and the CMake
/// module that finds its library.
#pragma once

#include <memory>

#include "bundle.hpp"
#include "derainer.hpp"
#include "session.hpp"

namespace derainer {

/// The engine of a bundle in TensorRT or TensorRT for RTX: trt.cpp or no_tensorrt.cpp. Throws DeviceError where there
/// is no GPU, or no engine for it and this library.
std::unique_ptr<Session> open_tensorrt(const Bundle& bundle, const Options& options);

/// The ONNX model of a bundle in OpenVINO, on the CPU: openvino.cpp or no_openvino.cpp. Throws InvalidModel for a model
/// that it cannot load or that the manifest describes otherwise, DeviceError where OpenVINO fails.
std::unique_ptr<Session> open_cpu(const Bundle& bundle, const Options& options);

}  // namespace derainer
