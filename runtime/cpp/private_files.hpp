/// Files that belong to this user alone, such as a cache of compiled kernels, which are code.
#pragma once

#include <filesystem>
#include <string>

namespace derainer {

/// The content of a file that nobody but this user could write; empty without such a file.
std::string read_own(const std::filesystem::path& path);

/// Whole or not at all, readable by this user alone. Where it cannot be written, nothing happens.
void write_own(const std::filesystem::path& path, const std::string& content);

/// The name of this machine.
std::string host_name();

}  // namespace derainer
