/*
 * A picture file in memory to RGB bytes: PNG, JPEG, WebP, and the first frame of a GIF.
 *
 * Every byte comes from a client: all failures are a struct error whose message is one clause ("the
 * JPEG file is broken: …"), for the caller to put the picture's number before it. What is decoded
 * is what torchvision's decode_image(mode=RGB, apply_exif_orientation=True) gives: EXIF orientation
 * applied (PNG and JPEG), alpha dropped, palettes expanded, grey repeated; a 16-bit PNG takes the
 * high byte (torchvision's own uint16 is a defect of the reference there).
 */
#ifndef INTERNVLD_PROCESSOR_IMAGE_H
#define INTERNVLD_PROCESSOR_IMAGE_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/error.h"

enum image_format { IMAGE_UNKNOWN, IMAGE_PNG, IMAGE_JPEG, IMAGE_WEBP, IMAGE_GIF };

struct image_info {
    enum image_format format;
    int width, height; // pixels, orientation applied
    int orientation;   // EXIF, 1 … 8; 1 is upright
};

/* By magic bytes alone. */
enum image_format image_sniff(const uint8_t *bytes, size_t n_bytes);
/* The header: no pixel is decoded and nothing of the picture's size is allocated. Refuses unknown
 * formats by name, sides above RESIZE_MAX_SIDE and more than max_pixels. */
int image_probe(const uint8_t *bytes, size_t n_bytes, int64_t max_pixels, struct image_info *info,
                struct error *err);
/* Pixels of a probed file: *rgb [height, width, 3], the caller frees. */
int image_decode(const uint8_t *bytes, size_t n_bytes, const struct image_info *info, uint8_t **rgb,
                 struct error *err);

/* EXIF data from its byte order mark on: the orientation, 1 when it has none that is valid. */
int exif_orientation(const uint8_t *exif, size_t n_bytes);

/* The codecs behind the two functions above (image_png.c, image_jpeg.c). Sizes as stored, before
 * orientation; `rgb` has room for them. */
int png_probe(const uint8_t *bytes, size_t n_bytes, struct image_info *stored, struct error *err);
int png_decode(const uint8_t *bytes, size_t n_bytes, const struct image_info *stored, uint8_t *rgb,
               struct error *err);
int jpeg_probe(const uint8_t *bytes, size_t n_bytes, struct image_info *stored, struct error *err);
int jpeg_decode(const uint8_t *bytes, size_t n_bytes, const struct image_info *stored, uint8_t *rgb,
                struct error *err);

#endif
