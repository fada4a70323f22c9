/// What goes wrong, as one exception with one line for its reader: expected, found, how to mend it.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

/// Marks what the shared library shows to programs that link to it.
#define DERAINER_PUBLIC __attribute__((visibility("default")))

namespace derainer {

/// The only exception that this library throws by itself. `what` is one line: the message, and in brackets the
/// expression that failed; `message` and `expression` are the two alone.
class DERAINER_PUBLIC Error : public std::runtime_error {
public:
    Error(const std::string& message, std::string expression)
        : std::runtime_error(message + " [" + expression + "]"),
          message_(message),
          expression_(std::move(expression)) {}

    const std::string& message() const noexcept { return message_; }
    const std::string& expression() const noexcept { return expression_; }

private:
    std::string message_;
    std::string expression_;
};

}  // namespace derainer

/// Throws Error with a message, which is only made if it is needed, unless a condition holds.
#define DERAINER_CHECK(condition, message)                  \
    do {                                                    \
        if (!(condition)) {                                 \
            throw ::derainer::Error((message), #condition); \
        }                                                   \
    } while (false)
