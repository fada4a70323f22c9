/// Takes the rain out of images: a bundle made by `export.tensorrt`, in C++, on an NVIDIA GPU or on the CPU. derainer.h
/// is the same for C and all that binds to it.
///
///     #include <derainer/derainer.hpp>
///
///     try {
///         derainer::Options options;
///         options.public_key = "public.pem";               // optional: refuse what its owner did not sign
///         derainer::Derainer derain("bundle", options);    // verifies every file, then loads what runs here
///         std::clog << derain.provider() << "\n";          // "tensorrt", or "cpu", and derain.fallback_reason()
///
///         // One image on the host: rows of `width` pixels of 3 bytes, red first, `stride` bytes apart; any size.
///         std::vector<std::uint8_t> clean(height * stride);
///         derain.run(rgb, height, width, stride, clean.data());
///
///         // Several of them, where the host prepares the next one while the GPU works.
///         derain.run({{frames[0], height, width, stride, out[0]}, {frames[1], height, width, stride, out[1]}});
///
///         // What is on the GPU already, in the network's own format (derain.graph_io()), without waiting.
///         derain.enqueue(device_input, device_output, 720, 1280, stream);
///     } catch (const derainer::DerainError& error) {       // of the types in errors.hpp
///         std::cerr << error.what() << "\n";               // one line: expected, found, how to mend, what failed
///     }
///
///     find_package(derainer REQUIRED)                      # CMake
///     target_link_libraries(app PRIVATE derainer::derainer)
///
/// Everything around the network is as `Derainer` of the Python package does it, to the byte: divide by 255, pad right
/// and bottom to the next multiple that the network takes, by reflection without repeating the border (an axis that is
/// not longer than its padding repeats its border), run, clamp to [0, 1], crop, multiply by 255, round half to even.
/// Images larger than the engine takes are cut into overlapping tiles, smaller ones are padded to the smallest size
/// that it takes. The network looks at the whole of what it is given, so that both change its answer. On the CPU the
/// bundle's ONNX model runs in OpenVINO, in float32, which takes images of any size; so large ones need memory, or
/// `Options::tile`.
///
/// Threads may share a Derainer: they take turns, in any order. Only moving and destroying it is not for while another
/// thread uses it. After an error it can be used again, unless CUDA itself failed for good.
///
/// What runs on a GPU is written against the vendor's API and tested against stand-ins; it has not run on one yet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "errors.hpp"
#include "export.h"
#include "pixels.hpp"

extern "C" {
typedef struct CUstream_st* cudaStream_t;  // as in CUDA's headers, which need not be installed
}

namespace derainer {

/// Where and how a bundle runs.
struct Options {
    /// Public key of the one who has to have signed the bundle, if anyone: Ed25519 in PEM.
    std::optional<std::filesystem::path> public_key;
    /// "tensorrt" is the bundle's engine; "cpu" its ONNX model; "auto" the engine where it runs, or else the CPU.
    std::string provider = "auto";
    /// When what runs has to answer the bundle's canaries as its model does: the "first" time that a machine opens it,
    /// "always", or "never".
    std::string canary = "first";
    /// Run only a file that was judged against the full model, as the manifest records.
    bool require_proof = false;
    /// CUDA's number of the GPU. With another than the first, "auto" does not go on to the CPU.
    int device = 0;
    /// Of the CPU; 0 for all cores.
    int threads = 0;
    /// Size of the tiles into which larger images are cut, in multiples of what the network takes; if not given, as
    /// large as the network takes, and none where it takes the whole image.
    std::optional<Size> tile;
    /// Pixels that tiles share, at most half a tile; 64, or a quarter of a small tile, if not given.
    std::optional<std::int64_t> overlap;
    /// Images of one size that `run` hands to the network at once, if it takes so many; if 0, as many as it takes, or
    /// one of a graph that takes any number, since nothing here tells how many the memory holds.
    std::int64_t batch = 0;
    /// On a GPU: for how many sizes of images or tiles the set-up is kept, at least 1; the longest unused goes first.
    std::size_t sizes = 8;
    /// On a GPU: replay the launches of a size from its second run on.
    bool cuda_graphs = true;
};

/// The network of a bundle, with all that stands between it and an image.
class DERAINER_API Derainer {
public:
    /// Memory on the GPU and pinned memory of the host are taken here, for the largest size that the engine takes and
    /// two tiles at a time; memory for what lies between the network's layers grows with the largest size so far.
    /// Throws InvalidModel for a bundle that cannot be used, MismatchError for one that is not what its manifest or
    /// signature says, UnprovenError where a proof is required, DeviceError where the provider does not run here
    /// ("auto": where none does), CanaryError where it answers with something else than the model, OutOfMemory, and
    /// InputError for other options than these.
    explicit Derainer(const std::filesystem::path& bundle, const Options& options = {});
    Derainer(Derainer&&) noexcept;
    Derainer& operator=(Derainer&&) noexcept;
    ~Derainer();

    /// Restore an image on the host into `out`, which has the same size and stride and may be `rgb`. Throws
    /// InvalidImage for one without pixels or with rows that overlap, InputError for `Options::tile` and `overlap` that
    /// the network does not take, InvalidModel where it answers with NaN or infinity, OutOfMemory, and DeviceError
    /// where it fails.
    void run(const std::uint8_t* rgb, std::int64_t height, std::int64_t width, std::size_t stride, std::uint8_t* out);

    /// Restore several images, of equal or different sizes, as `run` does each. Neighbours that are equally large once
    /// they are padded and need no tiles go through the network together, see `Options::batch`. None may be written
    /// where another is read. After an error some are not written.
    void run(const std::vector<Image>& images);

    /// Let `stream` restore what is on the GPU, and come back at once; `cudaStreamSynchronize(stream)` waits for it.
    /// In the network's own format, see `graph_io`: of a size that a profile takes, in multiples. The output is neither
    /// clamped nor rounded by a graph of tensors. A graph of images clamps, which hides NaN; `finite`, on the GPU too,
    /// becomes NaN or infinite where the answer was, a number for each of the `images` at once. The Derainer has to
    /// outlive the work. A size that is new waits for the GPU, so `stream` must not be in capture. Throws InputError
    /// for another size, on the CPU, and for `finite` of a graph that does not tell: one of tensors, or an older one.
    void enqueue(const void* input, void* output, std::int64_t height, std::int64_t width, cudaStream_t stream,
                 float* finite = nullptr, std::int64_t images = 1);

    /// What `enqueue` takes and gives: format, shape and bytes.
    GraphIo graph_io() const;

    /// What runs: "tensorrt" or "cpu".
    const std::string& provider() const;

    /// Why "auto" did not take the bundle's engine, in one line; empty where it did, and where another was asked for.
    const std::string& fallback_reason() const;

private:
    class Implementation;
    std::unique_ptr<Implementation> implementation_;
};

}  // namespace derainer
