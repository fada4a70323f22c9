#include "private_files.hpp"

#include <cstdio>
#include <memory>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace derainer {

namespace {

using OpenFile = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

}  // namespace

std::string read_own(const std::filesystem::path& path) {
    const OpenFile stream(std::fopen(path.c_str(), "rb"), std::fclose);
    struct stat status = {};
    if (!stream || ::fstat(::fileno(stream.get()), &status) != 0 || status.st_uid != ::getuid() ||
        (status.st_mode & 022) != 0) {
        return {};
    }
    std::string content(static_cast<std::size_t>(status.st_size), '\0');
    return std::fread(content.data(), 1, content.size(), stream.get()) == content.size() ? content : std::string();
}

std::string host_name() {
    char name[256] = {};
    return ::gethostname(name, sizeof name - 1) == 0 ? name : "";
}

void write_own(const std::filesystem::path& path, const std::string& content) {
    const std::string temporary = path.string() + "." + std::to_string(::getpid());
    const int file = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL, 0600);
    if (file < 0) {
        return;
    }
    OpenFile stream(::fdopen(file, "wb"), std::fclose);
    const bool written = std::fwrite(content.data(), 1, content.size(), stream.get()) == content.size();
    if (std::fclose(stream.release()) != 0 || !written || std::rename(temporary.c_str(), path.c_str()) != 0) {
        std::remove(temporary.c_str());
    }
}

}  // namespace derainer
