/*
 * Any bytes as a picture: probed, decoded, cut into tiles.
 */
#include <stdlib.h>

#include "daemon/processor/image.h"
#include "daemon/processor/resize.h"
#include "daemon/processor/tiling.h"

#define MAX_PIXELS ((int64_t)1 << 18)
#define TILE 28
#define MAX_TILES 4

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    static uint8_t tiles[MAX_TILES * 3 * TILE * TILE];
    struct image_info info;
    struct error err = {0};
    uint8_t *rgb;
    int n_columns, n_rows;

    if (image_probe(data, n_bytes, MAX_PIXELS, &info, &err) ||
        image_decode(data, n_bytes, &info, &rgb, &err)) {
        if (!err.code || !err.msg[0])
            abort();
        return 0;
    }
    tiling_choose(info.width, info.height, TILE, TILE, 1, MAX_TILES, &n_columns, &n_rows);
    const struct rgb_view view = {.rgb = rgb,
                                  .row_bytes = 3 * (size_t)info.width,
                                  .width = info.width,
                                  .height = info.height};

    resize_to_tiles(&view, n_columns, n_rows, TILE, TILE, tiles);
    free(rgb);
    return 0;
}
