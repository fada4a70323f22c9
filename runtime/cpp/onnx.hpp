/// What has to be known of an ONNX model before a library is given its bytes.
#pragma once

#include <string>

namespace derainer {

/// Throws InvalidModel for bytes that are no ONNX model, and for one that keeps weights in other files: a library would
/// read them from the current directory, and nothing verifies them.
void check_weights_inside(const std::string& model);

}  // namespace derainer
