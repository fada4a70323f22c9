/// Checks for the library's own files.
#pragma once

#include "errors.hpp"

/// Throws an error of a type of errors.hpp with a message, which is only made if it is needed, unless a condition
/// holds.
#define DERAINER_CHECK(type, condition, message)           \
    do {                                                   \
        if (!(condition)) {                                \
            throw ::derainer::type((message), #condition); \
        }                                                  \
    } while (false)
