#include "backends.hpp"

namespace derainer {

std::unique_ptr<Session> open_tensorrt(const Bundle&, const Options&) {
    throw DeviceError("expected a build with TensorRT, found one without; build the library with its SDK",
                      "no_tensorrt");
}

}  // namespace derainer
