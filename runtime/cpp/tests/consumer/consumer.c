/* Restores a grey image by a bundle, in C. Exit status: the derainer_status. */
#include <derainer/derainer.h>

#include <stdio.h>
#include <string.h>

int main(int count, char** arguments) {
    static uint8_t image[30 * 40 * 3];
    memset(image, 128, sizeof image);
    derainer_handle* derain = NULL;
    derainer_status status = derainer_open(count > 1 ? arguments[1] : NULL, NULL, &derain);
    if (status == DERAINER_OK) {
        status = derainer_restore(derain, image, 30, 40, 120, image);
        printf("%s %s\n", derainer_version(), derainer_provider(derain));
    }
    if (status != DERAINER_OK) {
        fprintf(stderr, "%s\n", derainer_error());
    }
    derainer_close(derain);
    return (int)status;
}
