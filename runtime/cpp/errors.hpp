/// What goes wrong, as exceptions with one line for their reader: expected, found, how to mend it. Their names are
/// those of the Python package:
///
///     DerainError
///       InputError              something that was given cannot be used
///         InvalidImage          what is no image, or more than memory can hold
///         InvalidModel          a bundle, or a file in it, that cannot be used, or a network that answers with NaN
///           MismatchError       a file is not what the manifest or the signature says
///           UnprovenError       it was not judged against the full model, and that was demanded
///       DeviceError             a GPU, a driver or a library that is missing, fails, or has no engine here
///         OutOfMemory
///         CanaryError           a file of the bundle answers here with something else than the model does
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "export.h"

namespace derainer {

/// The base of all that this library throws. `what` is one line: the message, and in brackets the expression that
/// failed; `message` and `expression` are the two alone.
class DERAINER_TYPE DerainError : public std::runtime_error {
public:
    DerainError(const std::string& message, std::string expression)
        : std::runtime_error(message + " [" + expression + "]"),
          message_(message),
          expression_(std::move(expression)) {}

    const std::string& message() const noexcept { return message_; }
    const std::string& expression() const noexcept { return expression_; }

private:
    std::string message_;
    std::string expression_;
};

class DERAINER_TYPE InputError : public DerainError {
    using DerainError::DerainError;
};

class DERAINER_TYPE InvalidImage : public InputError {
    using InputError::InputError;
};

class DERAINER_TYPE InvalidModel : public InputError {
    using InputError::InputError;
};

class DERAINER_TYPE MismatchError : public InvalidModel {
    using InvalidModel::InvalidModel;
};

class DERAINER_TYPE UnprovenError : public InvalidModel {
    using InvalidModel::InvalidModel;
};

class DERAINER_TYPE DeviceError : public DerainError {
    using DerainError::DerainError;
};

class DERAINER_TYPE OutOfMemory : public DeviceError {
    using DeviceError::DeviceError;
};

class DERAINER_TYPE CanaryError : public DeviceError {
    using DeviceError::DeviceError;
};

}  // namespace derainer
