/*
 * Any bytes as a video: opened, counted, sampled, a few frames decoded.
 */
#include <math.h>
#include <stdlib.h>

#include "daemon/processor/video.h"

#define MAX_FRAMES 4

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static int look(void *arg, int k, const struct rgb_view *frame, struct error *err)
{
    unsigned *sum = arg;

    (void)k;
    (void)err;
    for (int y = 0; y < frame->height; y++)
        for (int i = 0; i < 3 * frame->width; i++)
            *sum += frame->rgb[(size_t)y * frame->row_bytes + (size_t)i];
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    static const struct video_limits limits = {
        .max_pixels = 1 << 16, .max_frames = 1000, .max_seconds = 2};
    const struct video_sampling sampling = {.num_frames = 2, .initial_shift = NAN};
    struct video_info info;
    struct error err = {0};
    int64_t indices[MAX_FRAMES];
    unsigned sum = 0;
    struct video *v = video_open(data, n_bytes, &limits, VIDEO_WHOLE, &info, &err);

    if (!v) {
        if (!err.code || !err.msg[0])
            abort();
        return 0;
    }
    int n = video_sample(&sampling, info.n_frames, info.fps, MAX_FRAMES, indices, &err);

    if (n > 0)
        video_read(v, indices, n, look, &sum, &err);
    video_close(v);
    return 0;
}
