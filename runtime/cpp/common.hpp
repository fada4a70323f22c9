/// What every part of the library shares: the one exception, and sizes.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace derainer {

/// The only exception that this library throws by itself. `what` is one line: expected, found, how to mend, and in
/// brackets the expression that failed; `message` and `expression` are the two alone.
class Error : public std::runtime_error {
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

/// In pixels.
struct Size {
    std::int64_t height = 0;
    std::int64_t width = 0;
};

inline bool operator==(Size a, Size b) { return a.height == b.height && a.width == b.width; }
inline bool operator!=(Size a, Size b) { return !(a == b); }

inline bool is_multiple(Size size, std::int64_t of) { return size.height % of == 0 && size.width % of == 0; }

inline std::string to_string(Size size) { return std::to_string(size.height) + "x" + std::to_string(size.width); }

}  // namespace derainer

/// Throws Error with a message, which is only made if it is needed, unless a condition holds.
#define DERAINER_CHECK(condition, message)                  \
    do {                                                    \
        if (!(condition)) {                                 \
            throw ::derainer::Error((message), #condition); \
        }                                                   \
    } while (false)
