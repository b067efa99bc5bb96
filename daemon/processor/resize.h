/*
 * The resize of the image processor: antialiased bicubic on bytes, bit for bit torchvision's
 * (interpolate of uint8, a = -0.5), and the cut into tiles. Pure; allocates scratch, owns nothing.
 *
 * Source: ATen/native/cpu/UpSampleKernel.cpp as restated in the reference's
 * gen/preprocess.py:resize_u8. Two passes, horizontal first, each with 16-bit fixed-point weights,
 * rounded and clamped to a byte; a pass whose size does not change is skipped.
 */
#ifndef INTERNVLD_PROCESSOR_RESIZE_H
#define INTERNVLD_PROCESSOR_RESIZE_H

#include <stddef.h>
#include <stdint.h>

#define RESIZE_MAX_SIDE 65535 // of a source; keeps scratch within some tens of MiB

struct rgb_view {
    const uint8_t *rgb; // [height] rows of [width, 3], row_bytes apart
    size_t row_bytes;
    int width, height; // 1 … RESIZE_MAX_SIDE
};

/* The whole source resized to n_columns * tile_width by n_rows * tile_height, written as
 * tiles [n_rows * n_columns, 3, tile_height, tile_width], row-major over the grid. */
void resize_to_tiles(const struct rgb_view *source, int n_columns, int n_rows, int tile_width,
                     int tile_height, uint8_t *tiles);

#endif
