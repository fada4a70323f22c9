/// Who may write a file stands in access control lists there, which nothing here reads: so none is trusted, and kernels
/// are compiled at every start.
#include "private_files.hpp"

namespace derainer {

std::string read_own(const std::filesystem::path&) { return {}; }

void write_own(const std::filesystem::path&, const std::string&) {}

std::string host_name() { return {}; }

}  // namespace derainer
