/*
 * Format by magic, size by header, decoding by codec, then orientation. See image.h.
 */
#include "daemon/processor/image.h"

#include <stdlib.h>
#include <string.h>
#include <webp/decode.h>

#include "daemon/processor/resize.h"
#include "daemon/processor/video.h"
#include "kernels/log.h"

enum image_format image_sniff(const uint8_t *bytes, size_t n_bytes)
{
    if (n_bytes >= 8 && memcmp(bytes, "\x89PNG\r\n\x1a\n", 8) == 0)
        return IMAGE_PNG;
    if (n_bytes >= 3 && memcmp(bytes, "\xff\xd8\xff", 3) == 0)
        return IMAGE_JPEG;
    if (n_bytes >= 12 && memcmp(bytes, "RIFF", 4) == 0 && memcmp(bytes + 8, "WEBP", 4) == 0)
        return IMAGE_WEBP;
    if (n_bytes >= 6 && (memcmp(bytes, "GIF87a", 6) == 0 || memcmp(bytes, "GIF89a", 6) == 0))
        return IMAGE_GIF;
    return IMAGE_UNKNOWN;
}

struct exif_reader {
    const uint8_t *data;
    size_t n_bytes;
    int big_endian;
};

/* Two bytes at `offset`; 0 past the end. */
static unsigned exif_u16(const struct exif_reader *r, size_t offset)
{
    if (offset > r->n_bytes || r->n_bytes - offset < 2)
        return 0;
    const uint8_t *p = r->data + offset;

    return r->big_endian ? (unsigned)p[0] << 8 | p[1] : (unsigned)p[1] << 8 | p[0];
}

int exif_orientation(const uint8_t *exif, size_t n_bytes)
{
    struct exif_reader r = {.data = exif, .n_bytes = n_bytes};

    if (n_bytes < 8)
        return 1;
    if (memcmp(exif, "MM", 2) == 0)
        r.big_endian = 1;
    else if (memcmp(exif, "II", 2) != 0)
        return 1;
    if (exif_u16(&r, 2) != 0x2a)
        return 1;
    size_t high = exif_u16(&r, r.big_endian ? 4 : 6), low = exif_u16(&r, r.big_endian ? 6 : 4);
    size_t at = high << 16 | low;
    unsigned n_entries = exif_u16(&r, at);

    at += 2;
    for (unsigned i = 0; i < n_entries && at < n_bytes; i++, at += 12) {
        if (exif_u16(&r, at) == 0x0112) {
            unsigned value = exif_u16(&r, at + 8);

            return value >= 1 && value <= 8 ? (int)value : 1;
        }
    }
    return 1;
}

static int webp_probe(const uint8_t *bytes, size_t n_bytes, struct image_info *stored,
                      struct error *err)
{
    WebPBitstreamFeatures f;

    if (WebPGetFeatures(bytes, n_bytes, &f) != VP8_STATUS_OK)
        return error_set(err, ERROR_INVALID_ARGUMENT, "the WebP file has no valid header");
    if (f.has_animation)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "the WebP file is an animation, which is not supported");
    stored->width = f.width;
    stored->height = f.height;
    stored->orientation = 1; // torchvision does not look at a WebP file's EXIF
    return 0;
}

static int webp_decode(const uint8_t *bytes, size_t n_bytes, const struct image_info *stored,
                       uint8_t *rgb, struct error *err)
{
    size_t row_bytes = 3 * (size_t)stored->width;

    if (!WebPDecodeRGBInto(bytes, n_bytes, rgb, row_bytes * (size_t)stored->height, (int)row_bytes))
        return error_set(err, ERROR_INVALID_ARGUMENT, "the WebP file is broken or cut off");
    return 0;
}

static int gif_probe(const uint8_t *bytes, size_t n_bytes, struct image_info *stored,
                     struct error *err)
{
    if (n_bytes < 13)
        return error_set(err, ERROR_INVALID_ARGUMENT, "the GIF file has no valid header");
    stored->width = bytes[6] | bytes[7] << 8;
    stored->height = bytes[8] | bytes[9] << 8;
    stored->orientation = 1;
    return 0;
}

struct gif_target {
    uint8_t *rgb; // [height, width, 3]
    int width, height;
};

static int gif_copy_frame(void *arg, int k, const struct rgb_view *frame, struct error *err)
{
    const struct gif_target *t = arg;
    size_t row_bytes = 3 * (size_t)t->width;

    (void)k;
    if (frame->width != t->width || frame->height != t->height)
        return error_set(err, ERROR_INVALID_ARGUMENT, "the GIF file's frame is not of its size");
    for (int y = 0; y < t->height; y++)
        memcpy(t->rgb + (size_t)y * row_bytes, frame->rgb + (size_t)y * frame->row_bytes,
               row_bytes);
    return 0;
}

static int gif_decode(const uint8_t *bytes, size_t n_bytes, const struct image_info *stored,
                      uint8_t *rgb, struct error *err)
{
    const struct video_limits limits = {
        .max_pixels = (int64_t)stored->width * stored->height,
        .max_frames = INT64_MAX,
        .max_seconds = 10,
    };
    struct gif_target target = {.rgb = rgb, .width = stored->width, .height = stored->height};
    int64_t first = 0;
    struct video *v = video_open(bytes, n_bytes, &limits, VIDEO_FIRST_FRAME_ONLY, NULL, err);
    int rc = v ? video_read(v, &first, 1, gif_copy_frame, &target, err) : -1;

    video_close(v);
    return rc;
}

int image_probe(const uint8_t *bytes, size_t n_bytes, int64_t max_pixels, struct image_info *info,
                struct error *err)
{
    int rc = -1;

    *info = (struct image_info){.format = image_sniff(bytes, n_bytes), .orientation = 1};
    switch (info->format) {
    case IMAGE_PNG:
        rc = png_probe(bytes, n_bytes, info, err);
        break;
    case IMAGE_JPEG:
        rc = jpeg_probe(bytes, n_bytes, info, err);
        break;
    case IMAGE_WEBP:
        rc = webp_probe(bytes, n_bytes, info, err);
        break;
    case IMAGE_GIF:
        rc = gif_probe(bytes, n_bytes, info, err);
        break;
    case IMAGE_UNKNOWN:
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         n_bytes == 0 ? "the file is empty"
                                      : "the file is not a PNG, JPEG, WebP or GIF");
    }
    if (rc)
        return -1;
    if (info->width < 1 || info->height < 1 || info->width > RESIZE_MAX_SIDE ||
        info->height > RESIZE_MAX_SIDE)
        return error_set(err, ERROR_INVALID_ARGUMENT, "%d x %d pixels; a side may have 1 to %d",
                         info->width, info->height, RESIZE_MAX_SIDE);
    if ((int64_t)info->width * info->height > max_pixels)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "%d x %d pixels; at most %lld pixels are accepted", info->width,
                         info->height, (long long)max_pixels);
    if (info->orientation >= 5) { // 5 … 8 stand on their side
        int width = info->width;

        info->width = info->height;
        info->height = width;
    }
    return 0;
}

/* rgb [h, w, 3] as stored, to the upright copy [height, width, 3] of info. */
static void orient(const uint8_t *stored, const struct image_info *info, uint8_t *upright)
{
    int o = info->orientation, turned = o >= 5;
    int w = turned ? info->height : info->width, h = turned ? info->width : info->height;
    int flip_x = o == 2 || o == 3 || o == 7 || o == 8; // of the stored column
    int flip_y = o == 3 || o == 4 || o == 6 || o == 7;

    for (int y = 0; y < info->height; y++) {
        for (int x = 0; x < info->width; x++) {
            int sx = turned ? y : x, sy = turned ? x : y;

            sx = flip_x ? w - 1 - sx : sx;
            sy = flip_y ? h - 1 - sy : sy;
            memcpy(upright + 3 * ((size_t)y * (size_t)info->width + (size_t)x),
                   stored + 3 * ((size_t)sy * (size_t)w + (size_t)sx), 3);
        }
    }
}

int image_decode(const uint8_t *bytes, size_t n_bytes, const struct image_info *info, uint8_t **rgb,
                 struct error *err)
{
    struct image_info stored = *info;
    size_t size_bytes = 3 * (size_t)info->width * (size_t)info->height;
    uint8_t *pixels = malloc(size_bytes), *upright = NULL;
    int rc = -1;

    if (info->orientation >= 5) {
        stored.width = info->height;
        stored.height = info->width;
    }
    if (info->orientation != 1)
        upright = malloc(size_bytes);
    if (!pixels || (info->orientation != 1 && !upright)) {
        error_set(err, ERROR_RESOURCE_EXHAUSTED, "no memory for %d x %d pixels", info->width,
                  info->height);
        goto out;
    }
    switch (info->format) {
    case IMAGE_PNG:
        rc = png_decode(bytes, n_bytes, &stored, pixels, err);
        break;
    case IMAGE_JPEG:
        rc = jpeg_decode(bytes, n_bytes, &stored, pixels, err);
        break;
    case IMAGE_WEBP:
        rc = webp_decode(bytes, n_bytes, &stored, pixels, err);
        break;
    case IMAGE_GIF:
        rc = gif_decode(bytes, n_bytes, &stored, pixels, err);
        break;
    case IMAGE_UNKNOWN:
        BUG("decoding a picture that was not probed");
    }
    if (rc == 0 && upright) {
        orient(pixels, info, upright);
        *rgb = upright;
        upright = NULL;
    } else if (rc == 0) {
        *rgb = pixels;
        pixels = NULL;
    }
out:
    free(upright);
    free(pixels);
    return rc;
}
