/// Reading files whole.
#pragma once

#include <filesystem>
#include <string>

namespace derainer {

/// The content of a file. Throws InputError where it cannot be read.
std::string read_file(const std::filesystem::path& path);

}  // namespace derainer
