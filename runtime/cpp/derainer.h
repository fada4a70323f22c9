/* Takes the rain out of images, in C and for all that binds to it; derainer.hpp is the same in C++, and says how images
 * are padded, cut into tiles and rounded.
 *
 *     #include <derainer/derainer.h>
 *
 *     derainer_options options = {0};
 *     options.size = sizeof options;
 *     options.public_key = "public.pem";              // optional: refuse what its owner did not sign
 *     derainer_handle* derain = NULL;
 *     if (derainer_open("bundle", &options, &derain) != DERAINER_OK ||
 *         derainer_restore(derain, rgb, height, width, stride, out) != DERAINER_OK) {
 *         fprintf(stderr, "%s\n", derainer_error());  // one line: expected, found, how to mend
 *     }
 *     derainer_close(derain);
 *
 * Several images at once: derainer_restore_batch.
 *
 * Nothing here throws. Text is UTF-8 that ends with a zero. Threads may share a handle: they take turns; only closing
 * it is not for while another thread uses it. */
#ifndef DERAINER_H
#define DERAINER_H

#include <stddef.h>
#include <stdint.h>

#include "export.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a call came to. The numbers stay; later versions may add some. */
typedef enum derainer_status {
    DERAINER_OK = 0,
    DERAINER_INVALID_IMAGE = 1,  /* no pixels, rows that overlap, a null pointer, more than memory can hold */
    DERAINER_INVALID_BUNDLE = 2, /* no bundle, not what its manifest or signature says, not proven where that is
                                    required, or a network that answers with NaN */
    DERAINER_DEVICE = 3,         /* a GPU, a driver or a library that is missing, fails, has no engine here, or answers
                                    with something else than the model */
    DERAINER_MEMORY = 4,         /* too little, of the host or of the GPU */
    DERAINER_INVALID_ARGUMENT = 5, /* anything else that was given */
    DERAINER_INTERNAL = 6          /* a fault of this library */
} derainer_status;

/* Where and how a bundle runs. Zero is the default of everything but `size`. */
typedef struct derainer_options {
    size_t size;            /* sizeof(derainer_options), by which a later version knows what the caller knows */
    const char* provider;   /* "auto", "tensorrt" or "cpu"; NULL: "auto", the engine where it runs, or else the CPU */
    const char* public_key; /* path of the key of the one who has to have signed the bundle (PEM, Ed25519), or NULL */
    int32_t device;         /* CUDA's number of the GPU; with another than 0, "auto" does not go on to the CPU */
    int32_t threads;        /* of the CPU; 0: all cores */
    int64_t tile_height;    /* of the tiles into which larger images are cut; 0 with width 0: as large as it takes */
    int64_t tile_width;
    int64_t overlap;       /* pixels that tiles share; 0: 64, or a quarter of a small tile; -1: none */
    const char* canary;    /* when what runs has to answer the bundle's canaries: "first" (NULL), "always" or "never" */
    int32_t require_proof; /* not 0: run only a file that was judged against the full model */
    int64_t batch; /* images of one size that go through the network at once, if it takes so many; 0: as many as it
                      takes, or one of a graph that takes any number */
} derainer_options;

/* An image to restore: `height` rows of `width` pixels of 3 bytes, red first, rows `stride` bytes apart, and where the
 * restored one goes, which has the same size and stride and may be `rgb`. */
typedef struct derainer_image {
    const uint8_t* rgb;
    int64_t height;
    int64_t width;
    size_t stride;
    uint8_t* out;
} derainer_image;

/* A network that is open. */
typedef struct derainer_handle derainer_handle;

/* Opens a bundle, a folder whose every file is verified, and sets `*handle`; to NULL after a failure. `options` may be
 * NULL. */
DERAINER_API derainer_status derainer_open(const char* bundle, const derainer_options* options,
                                           derainer_handle** handle);

/* Restores an image: `height` rows of `width` pixels of 3 bytes, red first, rows `stride` bytes apart, into `out`,
 * which has the same size and stride and may be `rgb`. After a failure `out` may be written in part. */
DERAINER_API derainer_status derainer_restore(derainer_handle* handle, const uint8_t* rgb, int64_t height,
                                              int64_t width, size_t stride, uint8_t* out);

/* Restores `count` images, as derainer_restore does each. Neighbours that are equally large once they are padded and
 * need no tiles go through the network together, see derainer_options.batch. None may be written where another is read.
 * After a failure some are not written. */
DERAINER_API derainer_status derainer_restore_batch(derainer_handle* handle, const derainer_image* images,
                                                    size_t count);

/* What runs: "tensorrt" or "cpu". Valid until the handle is closed; "" for NULL. */
DERAINER_API const char* derainer_provider(const derainer_handle* handle);

/* Why "auto" did not take the bundle's engine, in one line; "" where it did, where another was asked for, and for NULL.
 * Valid until the handle is closed. */
DERAINER_API const char* derainer_fallback_reason(const derainer_handle* handle);

/* Frees everything. NULL is fine. */
DERAINER_API void derainer_close(derainer_handle* handle);

/* What went wrong in the calling thread's last call that failed, in one line; "" where none did. It belongs to the
 * thread, and stays until its next call that fails. */
DERAINER_API const char* derainer_error(void);

/* The library's version, such as "1.2.3". */
DERAINER_API const char* derainer_version(void);

#ifdef __cplusplus
}
#endif

#endif
