/*
 * Which frames of a video are shown to the model. See video.h; pure arithmetic.
 */
#include <math.h>

#include "daemon/processor/video.h"

#define VECTOR 8 // float32 lanes of the torch build that the reference was recorded with (AVX2)

/* Value i of n of torch.arange(start, …, step) in float32, as its CPU loop makes it: two vectors at
 * a time from a rounded base, the rest one by one. The two round differently now and then. */
static float arange_value(double start, double step, int64_t i, int64_t n)
{
    if (i >= n - n % (2 * VECTOR))
        return (float)(start + step * (double)i);
    float base = (float)(start + step * (double)(i - i % VECTOR));

    return (float)(base + (double)(i % VECTOR) * step);
}

/* torch.arange(shift, total, step).int() */
static int arange(double shift, int64_t n_total, double step, int max_frames, int64_t *indices,
                  struct error *err)
{
    double count = ceil(((double)n_total - shift) / step);

    if (!(count >= 1) || !(shift >= 0))
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "an initial_shift of %g leaves no frame of %lld", shift,
                         (long long)n_total);
    if (count > max_frames)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "%.0f frames are asked for; at most %d are accepted", count, max_frames);
    for (int i = 0; i < (int)count; i++)
        indices[i] = (int64_t)arange_value(shift, step, i, (int64_t)count);
    return (int)count;
}

int video_sample(const struct video_sampling *s, int64_t n_total, double video_fps, int max_frames,
                 int64_t *indices, struct error *err)
{
    double n = s->num_frames;

    if (n_total < 1)
        return error_set(err, ERROR_INVALID_ARGUMENT, "the video has no frames");
    if (s->num_frames <= 0 && s->fps <= 0)
        return arange(0, n_total, 1, max_frames, indices, err);
    if (s->num_frames <= 0) {
        if (video_fps <= 0)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "the file does not say its frame rate: give num_frames, not fps");
        n = trunc((double)n_total / video_fps * s->fps);
        if (!(n >= 1))
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "%g frames a second of a video of %lld frames are none", s->fps,
                             (long long)n_total);
    }
    if (n > (double)n_total)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "num_frames is %.0f and the video has %lld frames", n, (long long)n_total);
    double step = (double)n_total / n;

    return arange(isnan(s->initial_shift) ? step / 2 : s->initial_shift, n_total, step, max_frames,
                  indices, err);
}
