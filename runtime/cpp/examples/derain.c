/* Takes the rain out of a PPM file (P6, 8 bits), in C11.
 *
 *     derain-c rainy.ppm clean.ppm bundle/
 *     derain-c rainy.ppm clean.ppm bundle/ cpu            # or tensorrt; auto if not given
 *
 * Exit status: 0, or the derainer_status after one line that says what is wrong; 64 for what is wrong with the files.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "derainer.h"

enum { FILES = 64 };

typedef struct Image {
    int64_t height;
    int64_t width;
    uint8_t* rgb;
} Image;

static int complain(const char* path, const char* what) {
    fprintf(stderr, "%s: %s\n", path, what);
    return FILES;
}

static int read_ppm(const char* path, Image* image) {
    FILE* const file = fopen(path, "rb");
    if (file == NULL) {
        return complain(path, "cannot be read");
    }
    size_t bytes = 0;
    if (fscanf(file, "P6 %5" SCNd64 " %5" SCNd64 " 255", &image->width, &image->height) == 2 && fgetc(file) != EOF &&
        image->width > 0 && image->height > 0) {
        bytes = 3 * (size_t)image->height * (size_t)image->width;
        image->rgb = malloc(bytes);
    }
    const int whole = image->rgb != NULL && fread(image->rgb, 1, bytes, file) == bytes;
    fclose(file);
    return whole ? 0 : complain(path, "expected a whole PPM image of 8 bits, found none");
}

static int write_ppm(const char* path, const Image* image) {
    FILE* const file = fopen(path, "wb");
    if (file == NULL) {
        return complain(path, "cannot be written");
    }
    const size_t bytes = 3 * (size_t)image->height * (size_t)image->width;
    fprintf(file, "P6\n%" PRId64 " %" PRId64 "\n255\n", image->width, image->height);
    const int written = fwrite(image->rgb, 1, bytes, file) == bytes;
    return fclose(file) == 0 && written ? 0 : complain(path, "cannot be written");
}

/* Restores an image in its place. */
static derainer_status restore(const char* bundle, const char* provider, Image* image) {
    derainer_options options = {0};
    options.size = sizeof options;
    options.provider = provider;
    derainer_handle* derain = NULL;
    derainer_status status = derainer_open(bundle, &options, &derain);
    if (status == DERAINER_OK) {
        status =
            derainer_restore(derain, image->rgb, image->height, image->width, 3 * (size_t)image->width, image->rgb);
    }
    if (status != DERAINER_OK) {
        fprintf(stderr, "%s\n", derainer_error());
    } else if (derainer_fallback_reason(derain)[0] != '\0') {
        fprintf(stderr, "remark: it ran on the CPU: %s\n", derainer_fallback_reason(derain));
    }
    derainer_close(derain);
    return status;
}

int main(int count, char** arguments) {
    if (count != 4 && count != 5) {
        fprintf(stderr, "usage: derain-c IN.ppm OUT.ppm BUNDLE [PROVIDER]\n");
        return FILES;
    }
    Image image = {0};
    int status = read_ppm(arguments[1], &image);
    if (status == 0) {
        status = (int)restore(arguments[3], count == 5 ? arguments[4] : NULL, &image);
    }
    if (status == 0) {
        status = write_ppm(arguments[2], &image);
    }
    free(image.rgb);
    return status;
}
