#pragma once

#include <string>

#include "errors.hpp"

/// The message of the Error that an action throws; empty where it throws none.
template <class Action>
std::string refusal(Action action) {
    try {
        action();
    } catch (const derainer::Error& error) {
        return error.what();
    }
    return {};
}
