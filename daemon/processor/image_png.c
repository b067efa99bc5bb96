/*
 * PNG through libpng. Its errors leave by longjmp into the one function that called setjmp; what
 * must survive the jump lives in struct png_job, in the caller's frame.
 */
#include <png.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/processor/image.h"
#include "daemon/processor/resize.h"

#define MAX_CHUNK_BYTES (8 << 20)
#define MAX_CACHED_CHUNKS 128

struct png_job {
    const uint8_t *bytes;
    size_t n_bytes, at;
    png_structp png;
    png_infop info;
    png_bytep *rows;
    char message[96];
};

static void on_read(png_structp png, png_bytep out, png_size_t n)
{
    struct png_job *job = png_get_io_ptr(png);

    if (n > job->n_bytes - job->at)
        png_error(png, "it is cut off");
    memcpy(out, job->bytes + job->at, n);
    job->at += n;
}

static void on_error(png_structp png, png_const_charp message)
{
    struct png_job *job = png_get_error_ptr(png);

    strncpy(job->message, message, sizeof(job->message) - 1);
    png_longjmp(png, 1);
}

static void on_warning(png_structp png, png_const_charp message)
{
    (void)png;
    (void)message;
}

static int job_init(struct png_job *job, const uint8_t *bytes, size_t n_bytes, struct error *err)
{
    *job = (struct png_job){.bytes = bytes, .n_bytes = n_bytes};
    job->png = png_create_read_struct(PNG_LIBPNG_VER_STRING, job, on_error, on_warning);
    job->info = job->png ? png_create_info_struct(job->png) : NULL;
    if (!job->info) {
        png_destroy_read_struct(&job->png, &job->info, NULL);
        return error_set(err, ERROR_RESOURCE_EXHAUSTED, "no memory for a PNG decoder");
    }
    return 0;
}

/* May not return: libpng's errors jump. */
static void read_header(struct png_job *job)
{
    png_set_read_fn(job->png, job, on_read);
    png_set_user_limits(job->png, RESIZE_MAX_SIDE, RESIZE_MAX_SIDE);
    png_set_chunk_malloc_max(job->png, MAX_CHUNK_BYTES);
    png_set_chunk_cache_max(job->png, MAX_CACHED_CHUNKS);
    png_read_info(job->png, job->info);
}

static void read_pixels(struct png_job *job, const struct image_info *stored, uint8_t *rgb)
{
    int color = png_get_color_type(job->png, job->info);
    int depth = png_get_bit_depth(job->png, job->info);
    size_t row_bytes = 3 * (size_t)stored->width;

    if (color == PNG_COLOR_TYPE_PALETTE)
        png_set_palette_to_rgb(job->png);
    if (color == PNG_COLOR_TYPE_GRAY && depth < 8)
        png_set_expand_gray_1_2_4_to_8(job->png);
    if (depth == 16)
        png_set_strip_16(job->png);
    if (color == PNG_COLOR_TYPE_GRAY || color == PNG_COLOR_TYPE_GRAY_ALPHA)
        png_set_gray_to_rgb(job->png);
    if (color & PNG_COLOR_MASK_ALPHA || color == PNG_COLOR_TYPE_PALETTE)
        png_set_strip_alpha(job->png); // a palette with tRNS has one by now
    png_set_interlace_handling(job->png);
    png_read_update_info(job->png, job->info);
    if (png_get_rowbytes(job->png, job->info) != row_bytes ||
        png_get_image_height(job->png, job->info) != (png_uint_32)stored->height)
        png_error(job->png, "its rows are not of the announced size");
    job->rows = malloc((size_t)stored->height * sizeof(*job->rows));
    if (!job->rows)
        png_error(job->png, "no memory for its rows");
    for (int y = 0; y < stored->height; y++)
        job->rows[y] = rgb + (size_t)y * row_bytes;
    png_read_image(job->png, job->rows);
}

/* With rgb NULL only the header. */
static int job_run(struct png_job *job, struct image_info *stored, uint8_t *rgb)
{
    if (setjmp(png_jmpbuf(job->png)))
        return -1;
    read_header(job);
    if (rgb) {
        read_pixels(job, stored, rgb);
        return 0;
    }
    png_bytep exif = NULL;
    png_uint_32 n_exif = 0;

    stored->width = (int)png_get_image_width(job->png, job->info);
    stored->height = (int)png_get_image_height(job->png, job->info);
    stored->orientation = 1;
    if (png_get_eXIf_1(job->png, job->info, &n_exif, &exif) & PNG_INFO_eXIf)
        stored->orientation = exif_orientation(exif, n_exif);
    return 0;
}

static int run(const uint8_t *bytes, size_t n_bytes, struct image_info *stored, uint8_t *rgb,
               struct error *err)
{
    struct png_job job;

    if (job_init(&job, bytes, n_bytes, err))
        return -1;
    int rc = job_run(&job, stored, rgb);

    if (rc)
        error_set(err, ERROR_INVALID_ARGUMENT, "the PNG file is broken: %s", job.message);
    free(job.rows);
    png_destroy_read_struct(&job.png, &job.info, NULL);
    return rc;
}

int png_probe(const uint8_t *bytes, size_t n_bytes, struct image_info *stored, struct error *err)
{
    return run(bytes, n_bytes, stored, NULL, err);
}

int png_decode(const uint8_t *bytes, size_t n_bytes, const struct image_info *stored, uint8_t *rgb,
               struct error *err)
{
    struct image_info copy = *stored;

    return run(bytes, n_bytes, &copy, rgb, err);
}
