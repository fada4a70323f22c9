#include "files.hpp"

#include <fstream>
#include <iterator>

#include "check.hpp"

namespace derainer {

std::string read_file(const std::filesystem::path& path) {
    std::ifstream stream(path, std::ios::binary);
    std::string content{std::istreambuf_iterator<char>(stream), {}};
    DERAINER_CHECK(InputError, stream.good() || stream.eof(), path.string() + " cannot be read");
    return content;
}

}  // namespace derainer
