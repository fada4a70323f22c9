#include "backends.hpp"

namespace derainer {

std::unique_ptr<Session> open_cpu(const Bundle&, const Options&) {
    throw DeviceError("expected a build with OpenVINO, found one without; build the library with it", "no_openvino");
}

}  // namespace derainer
