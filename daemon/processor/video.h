/*
 * A video file in memory: its frame count, and chosen frames as RGB. FFmpeg does the work, fenced
 * in: only the demuxers and decoders named in video.c, no protocol, one thread, bounded pixels,
 * frames and processor time. Every failure is a struct error whose message is one clause.
 *
 * Equal to Transformers' read_video_pyav: the first video stream, its container's frame count,
 * decoded from the start in order, converted by swscale's bilinear RGB24. One owner; not
 * thread-safe.
 */
#ifndef INTERNVLD_PROCESSOR_VIDEO_H
#define INTERNVLD_PROCESSOR_VIDEO_H

#include <stddef.h>
#include <stdint.h>

#include "daemon/processor/resize.h"
#include "kernels/error.h"

struct video_limits {
    int64_t max_pixels; // of one frame
    int64_t max_frames; // of the file, before sampling
    int max_seconds;    // of processor time for this file
};
struct video_info {
    int width, height; // as the container says; a frame may differ
    int64_t n_frames;
    double fps; // average; 0 when the container does not say
};
enum video_mode {
    VIDEO_WHOLE,
    VIDEO_FIRST_FRAME_ONLY, // frames are not counted
};

struct video;
/* `bytes` must live as long as the video. `info` may be NULL. */
struct video *video_open(const uint8_t *bytes, size_t n_bytes, const struct video_limits *limits,
                         enum video_mode mode, struct video_info *info, struct error *err);
void video_close(struct video *v); // NULL allowed

/* Called for frame indices[k], k = 0 … n-1 in order; the view ends with the call. Non-zero (with
 * *err set) ends the reading. */
typedef int video_frame_fn(void *arg, int k, const struct rgb_view *frame, struct error *err);
/* Decodes once, from the start to the last index. `indices` [n] ascend. One call per video. */
int video_read(struct video *v, const int64_t *indices, int n, video_frame_fn *on_frame, void *arg,
               struct error *err);

/* InternVLVideoProcessor.sample_frames. num_frames > 0 wins; else fps > 0 gives the number; else
 * all frames. `initial_shift` in frames, NAN for half a step. */
struct video_sampling {
    int num_frames;
    double fps, initial_shift;
};
/* Indices into *indices [n], ascending, n <= max_frames (else an error); returns n or -1. By
 * rounding, the last one may be n_total: a frame that is never met, and so left out. */
int video_sample(const struct video_sampling *s, int64_t n_total, double video_fps, int max_frames,
                 int64_t *indices, struct error *err);

#endif
