#include <cstdio>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "errors.hpp"
#include "trt.hpp"

namespace derainer {

namespace {

using OpenFile = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

/// The content of a file that nobody but this user could write, since kernels are code; empty without such a file.
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

/// Whole or not at all. Where it cannot be written, the next start is slower.
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

}  // namespace

const char* const Library::flavor = "rtx";
const bool Library::jit = true;

class Library::State {
public:
    State(nvinfer1::ICudaEngine& engine, const std::filesystem::path& cache_path, bool cuda_graphs)
        : engine(engine), config(engine.createRuntimeConfig()), path(cache_path), known(read_own(cache_path)) {
        DERAINER_CHECK(config != nullptr, "TensorRT for RTX cannot be configured");
        config->setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
        DERAINER_CHECK(config->setCudaGraphStrategy(cuda_graphs ? nvinfer1::CudaGraphStrategy::kWHOLE_GRAPH_CAPTURE
                                                                : nvinfer1::CudaGraphStrategy::kDISABLED),
                       "TensorRT for RTX cannot be configured");
        cache.reset(config->createRuntimeCache());
        DERAINER_CHECK(cache != nullptr, "TensorRT for RTX has no cache");
        if (!known.empty()) {
            static_cast<void>(cache->deserialize(known.data(), known.size()));  // false for one of another GPU: no harm
        }
        DERAINER_CHECK(config->setRuntimeCache(*cache), "TensorRT for RTX cannot be configured");
    }

    nvinfer1::ICudaEngine& engine;
    std::unique_ptr<nvinfer1::IRuntimeConfig> config;
    std::unique_ptr<nvinfer1::IRuntimeCache> cache;
    std::filesystem::path path;
    std::string known;
};

Library::Library(nvinfer1::ICudaEngine& engine, const std::filesystem::path& cache, bool cuda_graphs)
    : state_(new State(engine, cache, cuda_graphs)) {}

Library::~Library() {
    try {
        const std::unique_ptr<nvinfer1::IHostMemory> kernels(state_->cache->serialize());
        const std::string content =
            kernels ? std::string(static_cast<const char*>(kernels->data()), kernels->size()) : std::string();
        if (!content.empty() && content != state_->known) {
            write_own(state_->path, content);
        }
    } catch (const std::exception&) {  // the next start is slower
    }
}

std::unique_ptr<nvinfer1::IExecutionContext> Library::create_context() {
    return std::unique_ptr<nvinfer1::IExecutionContext>(state_->engine.createExecutionContext(state_->config.get()));
}

}  // namespace derainer
