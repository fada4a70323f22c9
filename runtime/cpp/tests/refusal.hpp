#pragma once

#include <string>

#include "errors.hpp"

/// What a DerainError says that an action throws; empty where it throws none.
template <class Action>
std::string refusal(Action action) {
    try {
        action();
    } catch (const derainer::DerainError& error) {
        return error.what();
    }
    return {};
}
