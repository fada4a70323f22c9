/// Which engine of a bundle runs on a GPU, as runtime/choice.py chooses.
#pragma once

#include <string>

#include "bundle.hpp"

namespace derainer {

/// The newest engine of a bundle that fits and has its weights. `capability`: of the GPU, such as "8.9"; `flavor`:
/// "rtx" or "tensorrt", and `version` of that library, in full. Throws DeviceError where none fits.
const Engine& choose_engine(const Bundle& bundle, const std::string& capability, const std::string& flavor,
                            const std::string& version);

}  // namespace derainer
