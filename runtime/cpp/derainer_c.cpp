#include "derainer.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <exception>
#include <filesystem>
#include <new>
#include <string>
#include <vector>

#include "check.hpp"
#include "derainer.hpp"

struct derainer_handle {
    derainer::Derainer derain;
};

namespace {

/// Of the calling thread. Of a fixed size, since there may be no memory for more.
thread_local std::array<char, 4096> last_error{};

derainer_status failed(derainer_status status, const char* message) noexcept {
    const std::size_t length = std::min(std::strlen(message), last_error.size() - 1);
    std::copy_n(message, length, last_error.begin());
    last_error[length] = '\0';
    return status;
}

/// Does `action`, and tells what it throws as a status and a text.
template <class Action>
derainer_status guarded(Action action) noexcept {
    try {
        action();
        return DERAINER_OK;
    } catch (const derainer::OutOfMemory& error) {
        return failed(DERAINER_MEMORY, error.what());
    } catch (const derainer::DeviceError& error) {
        return failed(DERAINER_DEVICE, error.what());
    } catch (const derainer::InvalidImage& error) {
        return failed(DERAINER_INVALID_IMAGE, error.what());
    } catch (const derainer::InvalidModel& error) {
        return failed(DERAINER_INVALID_BUNDLE, error.what());
    } catch (const derainer::InputError& error) {
        return failed(DERAINER_INVALID_ARGUMENT, error.what());
    } catch (const std::bad_alloc&) {
        return failed(DERAINER_MEMORY, "expected enough memory, found too little");
    } catch (const std::exception& error) {
        return failed(DERAINER_INTERNAL, error.what());
    } catch (...) {
        return failed(DERAINER_INTERNAL, "something was thrown that is no exception");
    }
}

derainer::Options options_of(const derainer_options* given) {
    derainer::Options options;
    if (given == nullptr) {
        return options;
    }
    DERAINER_CHECK(InputError, given->size == sizeof(derainer_options),
                   "expected options of size " + std::to_string(sizeof(derainer_options)) + ", found " +
                       std::to_string(given->size) + "; set options.size = sizeof options");
    if (given->provider != nullptr) {
        options.provider = given->provider;
    }
    if (given->public_key != nullptr) {
        options.public_key = std::filesystem::u8path(given->public_key);
    }
    if (given->canary != nullptr) {
        options.canary = given->canary;
    }
    options.require_proof = given->require_proof != 0;
    options.batch = given->batch;
    options.device = given->device;
    options.threads = given->threads;
    if (given->tile_height != 0 || given->tile_width != 0) {
        options.tile = derainer::Size{given->tile_height, given->tile_width};
    }
    if (given->overlap != 0) {
        options.overlap = given->overlap == -1 ? 0 : given->overlap;
    }
    return options;
}

}  // namespace

derainer_status derainer_open(const char* bundle, const derainer_options* options, derainer_handle** handle) {
    return guarded([&] {
        DERAINER_CHECK(InputError, handle != nullptr, "expected where to put the handle, found a null pointer");
        *handle = nullptr;
        DERAINER_CHECK(InputError, bundle != nullptr, "expected the path of a bundle, found a null pointer");
        *handle = new derainer_handle{derainer::Derainer(std::filesystem::u8path(bundle), options_of(options))};
    });
}

derainer_status derainer_restore(derainer_handle* handle, const uint8_t* rgb, int64_t height, int64_t width,
                                 size_t stride, uint8_t* out) {
    return guarded([&] {
        DERAINER_CHECK(InputError, handle != nullptr, "expected a handle, found a null pointer");
        handle->derain.run(rgb, height, width, stride, out);
    });
}

derainer_status derainer_restore_batch(derainer_handle* handle, const derainer_image* images, size_t count) {
    return guarded([&] {
        DERAINER_CHECK(InputError, handle != nullptr, "expected a handle, found a null pointer");
        DERAINER_CHECK(InputError, images != nullptr || count == 0, "expected images, found a null pointer");
        std::vector<derainer::Image> all;
        for (size_t i = 0; i < count; ++i) {
            all.push_back({images[i].rgb, images[i].height, images[i].width, images[i].stride, images[i].out});
        }
        handle->derain.run(all);
    });
}

const char* derainer_provider(const derainer_handle* handle) {
    return handle == nullptr ? "" : handle->derain.provider().c_str();
}

const char* derainer_fallback_reason(const derainer_handle* handle) {
    return handle == nullptr ? "" : handle->derain.fallback_reason().c_str();
}

void derainer_close(derainer_handle* handle) { delete handle; }

const char* derainer_error(void) { return last_error.data(); }

const char* derainer_version(void) { return DERAINER_VERSION; }
