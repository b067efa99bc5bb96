/*
 * JPEG through libjpeg-turbo: integer "slow" DCT and fancy upsampling, its defaults and those of
 * torchvision and Pillow. Errors leave by longjmp into the one function that called setjmp; what
 * must survive the jump lives in struct jpeg_job, in the caller's frame.
 */
#include <stdio.h> // jpeglib.h needs FILE

#include <jerror.h>
#include <jpeglib.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/processor/image.h"

#define MAX_SCANS 200 // of a progressive file; each costs a pass over all coefficients

struct jpeg_job {
    struct jpeg_error_mgr errors; // first: libjpeg hands back a pointer to it
    struct jpeg_decompress_struct jpeg;
    struct jpeg_progress_mgr progress;
    jmp_buf out;
    JSAMPLE *row; // [width, 4] of a CMYK picture
    char message[JMSG_LENGTH_MAX];
};

static void on_error(j_common_ptr c)
{
    struct jpeg_job *job = (struct jpeg_job *)c->err;

    c->err->format_message(c, job->message);
    longjmp(job->out, 1);
}

/* libjpeg only warns about missing or senseless data and paints grey: here that is an error. */
static void on_message(j_common_ptr c, int level)
{
    if (level >= 0)
        return;
    switch (c->err->msg_code) {
    case JWRN_JPEG_EOF:
    case JWRN_HIT_MARKER:
    case JWRN_HUFF_BAD_CODE:
    case JWRN_MUST_RESYNC:
        on_error(c);
    }
}

static void on_progress(j_common_ptr c)
{
    struct jpeg_job *job = (struct jpeg_job *)c->err;

    if (job->jpeg.input_scan_number > MAX_SCANS) {
        strcpy(job->message, "it has too many scans");
        longjmp(job->out, 1);
    }
}

/* May not return: libjpeg's errors jump. */
static void read_header(struct jpeg_job *job, const uint8_t *bytes, size_t n_bytes)
{
    jpeg_create_decompress(&job->jpeg);
    job->jpeg.progress = &job->progress;
    job->progress.progress_monitor = on_progress;
    jpeg_mem_src(&job->jpeg, bytes, n_bytes);
    jpeg_save_markers(&job->jpeg, JPEG_APP0 + 1, 0xffff);
    jpeg_read_header(&job->jpeg, TRUE);
}

static int stored_orientation(const struct jpeg_decompress_struct *jpeg)
{
    for (jpeg_saved_marker_ptr m = jpeg->marker_list; m; m = m->next)
        if (m->marker == JPEG_APP0 + 1 && m->data_length > 6 && memcmp(m->data, "Exif\0\0", 6) == 0)
            return exif_orientation(m->data + 6, m->data_length - 6);
    return 1;
}

/* k * c / 255, rounded, in Pillow's way (which torchvision copies); both as stored by Adobe:
 * inverted. */
static uint8_t multiply(int k, int c)
{
    int v = k * (255 - c) + 128;

    v = k - (((v >> 8) + v) >> 8);
    return (uint8_t)(v < 0 ? 0 : v);
}

static void read_pixels(struct jpeg_job *job, const struct image_info *stored, uint8_t *rgb)
{
    struct jpeg_decompress_struct *jpeg = &job->jpeg;
    int is_cmyk = jpeg->jpeg_color_space == JCS_CMYK || jpeg->jpeg_color_space == JCS_YCCK;
    size_t row_bytes = 3 * (size_t)stored->width;

    jpeg->out_color_space = is_cmyk ? JCS_CMYK : JCS_RGB;
    jpeg_start_decompress(jpeg);
    if (jpeg->output_width != (JDIMENSION)stored->width ||
        jpeg->output_height != (JDIMENSION)stored->height ||
        jpeg->output_components != (is_cmyk ? 4 : 3)) {
        strcpy(job->message, "its size changed");
        longjmp(job->out, 1);
    }
    if (is_cmyk) {
        job->row = malloc(4 * (size_t)stored->width);
        if (!job->row) {
            strcpy(job->message, "no memory for a row");
            longjmp(job->out, 1);
        }
    }
    while (jpeg->output_scanline < jpeg->output_height) {
        uint8_t *out = rgb + (size_t)jpeg->output_scanline * row_bytes;
        JSAMPROW row = is_cmyk ? job->row : out;

        jpeg_read_scanlines(jpeg, &row, 1);
        for (int x = 0; is_cmyk && x < stored->width; x++)
            for (int c = 0; c < 3; c++)
                out[3 * x + c] = multiply(row[4 * x + 3], row[4 * x + c]);
    }
    jpeg_finish_decompress(jpeg);
}

/* With rgb NULL only the header. */
static int job_run(struct jpeg_job *job, const uint8_t *bytes, size_t n_bytes,
                   struct image_info *stored, uint8_t *rgb)
{
    if (setjmp(job->out))
        return -1;
    read_header(job, bytes, n_bytes);
    if (rgb) {
        read_pixels(job, stored, rgb);
        return 0;
    }
    stored->width = (int)job->jpeg.image_width;
    stored->height = (int)job->jpeg.image_height;
    stored->orientation = stored_orientation(&job->jpeg);
    return 0;
}

static int run(const uint8_t *bytes, size_t n_bytes, struct image_info *stored, uint8_t *rgb,
               struct error *err)
{
    struct jpeg_job job = {0};

    job.jpeg.err = jpeg_std_error(&job.errors);
    job.errors.error_exit = on_error;
    job.errors.emit_message = on_message;
    int rc = job_run(&job, bytes, n_bytes, stored, rgb);

    if (rc)
        error_set(err, ERROR_INVALID_ARGUMENT, "the JPEG file is broken: %.160s", job.message);
    jpeg_destroy_decompress(&job.jpeg);
    free(job.row);
    return rc;
}

int jpeg_probe(const uint8_t *bytes, size_t n_bytes, struct image_info *stored, struct error *err)
{
    return run(bytes, n_bytes, stored, NULL, err);
}

int jpeg_decode(const uint8_t *bytes, size_t n_bytes, const struct image_info *stored, uint8_t *rgb,
                struct error *err)
{
    struct image_info copy = *stored;

    return run(bytes, n_bytes, &copy, rgb, err);
}
