/// Catch2, of version 2 or 3.
#pragma once

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif

#include <string>

#include "refusal.hpp"

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }
