/*
 * From a conversation to ids and tiles. See processor.h.
 *
 * Order of work, cheapest refusal first: counts, then every file's header (which gives the number
 * of tiles and so of tokens), then the text, and only then the memory for tiles and the decoding.
 */
#include "daemon/processor/processor.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/processor/chat_template.h"
#include "daemon/processor/image.h"
#include "daemon/processor/resize.h"
#include "daemon/processor/settings.h"
#include "daemon/processor/tiling.h"
#include "daemon/processor/video.h"
#include "kernels/clock.h"
#include "kernels/log.h"
#include "kernels/trace.h"

#define N_CHANNELS 3 // of what the codecs give

struct processor {
    struct tokenizer *tokenizer;
    struct chat_template chat;
    struct settings settings;
    struct processor_limits limits;
    struct processor_model model;
};

/* One picture or video between planning and decoding. */
struct media_job {
    const struct content_part *part;
    struct image_info image;
    int use_thumbnail;
    struct video *video;
    int64_t *indices; // [plan->n_tiles] of a video
    struct media_plan *plan;
};

struct preparation { // one call of processor_prepare()
    const struct processor *p;
    struct media_job *jobs; // [n_jobs]
    int n_jobs, n_tiles;
    struct error *err;
};

struct processor_limits processor_limits_default(void)
{
    return (struct processor_limits){
        .max_image_pixels = (int64_t)64 << 20,
        .max_media = 64,
        .max_tiles = 128,
        .max_frames = 128,
        .max_video_pixels = (int64_t)16 << 20,
        .max_video_frames = 262144,
        .max_video_seconds = 20,
        .max_prompt_tokens = 32768,
        .max_messages = 1024,
        .max_parts = 4096,
        .max_text_bytes = (size_t)16 << 20,
    };
}

/* The text the processor itself writes must be single tokens. */
static int check_tokens(const struct processor *p, struct error *err)
{
    static const char *const needed[] = {"<img>", "</img>", CHAT_IMAGE_TOKEN};

    for (int i = 0; i < 3; i++)
        if (tokenizer_token_id(p->tokenizer, needed[i]) < 0)
            return error_set(err, ERROR_FAILED_PRECONDITION, "the tokenizer has no token \"%s\"",
                             needed[i]);
    int id = tokenizer_token_id(p->tokenizer, CHAT_IMAGE_TOKEN);

    if (id != p->model.image_token_id)
        return error_set(err, ERROR_FAILED_PRECONDITION,
                         "\"" CHAT_IMAGE_TOKEN "\" is %d in the tokenizer and %d in config.json",
                         id, p->model.image_token_id);
    return 0;
}

struct processor *processor_open(const char *dir, const struct processor_model *m,
                                 const struct processor_limits *l, struct error *err)
{
    struct processor *p = xcalloc(1, sizeof(*p));

    *err = (struct error){0};
    p->limits = *l;
    p->model = *m;
    p->tokenizer = tokenizer_open(dir, err);
    if (!p->tokenizer || chat_template_load(&p->chat, dir, err) ||
        settings_load(&p->settings, dir, m, err) || check_tokens(p, err)) {
        processor_close(p);
        return NULL;
    }
    return p;
}

void processor_close(struct processor *p)
{
    if (!p)
        return;
    tokenizer_close(p->tokenizer);
    free(p);
}

const struct tokenizer *processor_tokenizer(const struct processor *p)
{
    return p->tokenizer;
}

const float *processor_mean(const struct processor *p)
{
    return p->settings.image.mean;
}

const float *processor_std(const struct processor *p)
{
    return p->settings.image.std;
}

int processor_tile_size(const struct processor *p, int *height, int *width)
{
    *height = p->settings.image.tile_height;
    *width = p->settings.image.tile_width;
    return p->model.n_channels;
}

/* Counts and sizes of what the client sent; *n_media and *n_videos are what it holds. */
static int check_counts(const struct processor *p, const struct conversation *c, int *n_media,
                        int *n_videos, struct error *err)
{
    const struct processor_limits *l = &p->limits;
    int64_t n_parts = 0;
    size_t n_text = 0;

    *n_media = *n_videos = 0;
    if (c->n_messages > l->max_messages)
        return error_set(err, ERROR_INVALID_ARGUMENT, "%d messages; at most %d are accepted",
                         c->n_messages, l->max_messages);
    for (int m = 0; m < c->n_messages; m++) {
        n_parts += c->messages[m].n_parts;
        if (n_parts > l->max_parts)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "the messages have more than %d parts, which is the limit",
                             l->max_parts);
        for (int i = 0; i < c->messages[m].n_parts; i++) {
            const struct content_part *part = &c->messages[m].parts[i];

            if (part->kind == PART_TEXT) {
                if (part->n_bytes > l->max_text_bytes - n_text)
                    return error_set(err, ERROR_INVALID_ARGUMENT,
                                     "the messages have more than %zu bytes of text, which is the "
                                     "limit",
                                     l->max_text_bytes);
                n_text += part->n_bytes;
            } else {
                *n_videos += part->kind == PART_VIDEO;
                if (++*n_media > l->max_media)
                    return error_set(err, ERROR_INVALID_ARGUMENT,
                                     "more than %d pictures and videos, which is the limit",
                                     l->max_media);
            }
        }
    }
    if (*n_media && p->model.n_channels != N_CHANNELS)
        return error_set(err, ERROR_UNIMPLEMENTED,
                         "this model sees %d channels; pictures are decoded to 3",
                         p->model.n_channels);
    return 0;
}

/* The arena has no more room. */
static int over_budget(struct error *err)
{
    return error_set(err, ERROR_RESOURCE_EXHAUSTED,
                     "the request needs more memory than one request may take");
}

/* Puts the medium's number before the reason. */
static int media_error(const struct media_job *job, int index, struct error *err)
{
    struct error cause = *err;

    return error_set(err, cause.code, "media %d (%s): %s", index + 1,
                     job->part->kind == PART_IMAGE ? "picture" : "video", cause.msg);
}

static int resolve(int option, int fallback)
{
    return option < 0 ? fallback : option;
}

static int plan_image(struct preparation *r, struct media_job *job, struct error *err)
{
    const struct tiling_options *o = &job->part->tiling;
    const struct image_settings *s = &r->p->settings.image;
    int min_tiles = resolve(o->min_patches, s->min_patches);
    int max_tiles = resolve(o->max_patches, s->max_patches);

    if (min_tiles < 1 || max_tiles < min_tiles || o->max_patches > r->p->limits.max_tiles)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "min_patches %d and max_patches %d; 1 <= min <= max <= %d must hold",
                         min_tiles, max_tiles, r->p->limits.max_tiles);
    if (image_probe(job->part->bytes, job->part->n_bytes, r->p->limits.max_image_pixels,
                    &job->image, err))
        return -1;
    *job->plan = (struct media_plan){.kind = PART_IMAGE,
                                     .width = job->image.width,
                                     .height = job->image.height,
                                     .n_columns = 1,
                                     .n_rows = 1};
    job->use_thumbnail = resolve(o->use_thumbnail, 1) != 0;
    if (resolve(o->crop_to_patches, s->crop_to_patches))
        tiling_choose(job->image.width, job->image.height, s->tile_width, s->tile_height, min_tiles,
                      max_tiles, &job->plan->n_columns, &job->plan->n_rows);
    job->plan->n_tiles =
        tiling_n_tiles(job->plan->n_columns, job->plan->n_rows, job->use_thumbnail);
    return 0;
}

/* What to sample: the request's wishes, then the model's. Giving num_frames or fps turns sampling
 * on, as Transformers' chat template call does; a request's fps is not overruled by a num_frames of
 * the model's file. */
static int resolve_sampling(const struct video_settings *s, const struct video_options *o,
                            struct video_sampling *out, struct error *err)
{
    int sample = resolve(o->sample, o->num_frames > 0 || o->fps > 0 ? 1 : s->sample);

    if (o->num_frames < 0 || !(o->fps >= 0) || !isfinite(o->fps) || isinf(o->initial_shift))
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "num_frames, fps and initial_shift must be positive numbers");
    *out = (struct video_sampling){.initial_shift = isnan(o->initial_shift) ? s->initial_shift
                                                                            : o->initial_shift};
    if (!sample)
        return 0;
    out->num_frames = o->num_frames > 0 ? o->num_frames : o->fps > 0 ? 0 : s->num_frames;
    out->fps = o->fps > 0 ? o->fps : s->fps;
    if (out->num_frames <= 0 && out->fps <= 0)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "sampling is asked for without num_frames or fps");
    return 0;
}

/* A video as a list of pictures; as in Transformers it cannot be sampled. */
static int plan_frames(struct preparation *r, struct media_job *job, struct error *err)
{
    const struct content_part *part = job->part;
    const struct video_options *o = &part->video;

    if (o->num_frames || o->fps > 0 || o->sample > 0 || !isnan(o->initial_shift))
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "frames are given one by one: they cannot be sampled");
    if (part->n_frames > r->p->limits.max_frames)
        return error_set(err, ERROR_INVALID_ARGUMENT, "%d frames; at most %d are accepted",
                         part->n_frames, r->p->limits.max_frames);
    for (int i = 0; i < part->n_frames; i++)
        if (image_probe(part->frames[i].bytes, part->frames[i].n_bytes,
                        r->p->limits.max_image_pixels, &job->image, err)) {
            struct error cause = *err;

            return error_set(err, cause.code, "frame %d: %s", i + 1, cause.msg);
        }
    *job->plan = (struct media_plan){.kind = PART_VIDEO,
                                     .width = job->image.width,
                                     .height = job->image.height,
                                     .n_columns = 1,
                                     .n_rows = 1,
                                     .n_tiles = part->n_frames};
    return 0;
}

static int plan_video(struct preparation *r, struct media_job *job, struct error *err)
{
    const struct processor_limits *l = &r->p->limits;
    const struct video_limits limits = {.max_pixels = l->max_video_pixels,
                                        .max_frames = l->max_video_frames,
                                        .max_seconds = l->max_video_seconds};
    struct video_sampling sampling;
    struct video_info info;

    if (job->part->n_frames)
        return plan_frames(r, job, err);
    if (resolve_sampling(&r->p->settings.video, &job->part->video, &sampling, err))
        return -1;
    job->video = video_open(job->part->bytes, job->part->n_bytes, &limits, VIDEO_WHOLE, &info, err);
    if (!job->video)
        return -1;
    job->indices = xcalloc((size_t)l->max_frames, sizeof(*job->indices));
    int n = video_sample(&sampling, info.n_frames, info.fps, l->max_frames, job->indices, err);

    if (n < 0)
        return -1;
    while (n > 0 && job->indices[n - 1] >= info.n_frames)
        n--;
    if (n == 0)
        return error_set(err, ERROR_INVALID_ARGUMENT, "no frame is left to show");
    *job->plan = (struct media_plan){.kind = PART_VIDEO,
                                     .width = info.width,
                                     .height = info.height,
                                     .n_columns = 1,
                                     .n_rows = 1,
                                     .n_tiles = n};
    return 0;
}

/* Headers of all media: sizes, grids, frames, the first tile of each. */
static int plan_media(struct preparation *r, const struct conversation *c, struct media_plan *plans)
{
    for (int m = 0; m < c->n_messages; m++) {
        for (int i = 0; i < c->messages[m].n_parts; i++) {
            const struct content_part *part = &c->messages[m].parts[i];

            if (part->kind == PART_TEXT)
                continue;
            struct media_job *job = &r->jobs[r->n_jobs];

            job->part = part;
            job->plan = &plans[r->n_jobs];
            if (part->kind == PART_IMAGE ? plan_image(r, job, r->err) : plan_video(r, job, r->err))
                return media_error(job, r->n_jobs, r->err);
            job->plan->first_tile = r->n_tiles;
            r->n_jobs++;
            if (job->plan->n_tiles > r->p->limits.max_tiles - r->n_tiles)
                return error_set(r->err, ERROR_INVALID_ARGUMENT,
                                 "the pictures and videos make more than %d tiles, which is the "
                                 "limit",
                                 r->p->limits.max_tiles);
            r->n_tiles += job->plan->n_tiles;
        }
    }
    return 0;
}

/* Every <IMG_CONTEXT> of `text` repeated for its tiles: a picture's all at once, a video's frame by
 * frame. */
static void expand_ids(const struct preparation *r, const int32_t *text, int64_t n_text,
                       struct prompt *out)
{
    int32_t mark = r->p->model.image_token_id;
    int64_t n = 0;
    int job = 0, frame = 0;

    for (int64_t i = 0; i < n_text; i++) {
        int64_t n_copies = 1;

        if (text[i] == mark) {
            const struct media_plan *plan = r->jobs[job].plan;
            int one_frame = plan->kind == PART_VIDEO;

            n_copies = (int64_t)r->p->model.image_seq_length * (one_frame ? 1 : plan->n_tiles);
            if (!one_frame || ++frame == plan->n_tiles) {
                job++;
                frame = 0;
            }
        }
        for (int64_t k = 0; k < n_copies; k++)
            out->ids[n++] = text[i];
    }
    if (n != out->n_ids || job != r->n_jobs)
        BUG("%lld ids of %lld, %d media of %d", (long long)n, (long long)out->n_ids, job,
            r->n_jobs);
}

static int prepare_ids(struct preparation *r, const struct conversation *c, struct arena *a,
                       struct prompt *out)
{
    int64_t limit = r->p->limits.max_prompt_tokens, n_marks = 0, n_text;
    struct byte_buffer text = {0};
    int *frames = xcalloc((size_t)r->n_jobs + 1, sizeof(*frames)); // of each video
    int32_t *ids;
    int n_videos = 0, rc = -1;

    for (int i = 0; i < r->n_jobs; i++) {
        const struct media_plan *plan = r->jobs[i].plan;

        n_marks += plan->kind == PART_VIDEO ? plan->n_tiles : 1;
        if (plan->kind == PART_VIDEO)
            frames[n_videos++] = plan->n_tiles;
    }
    out->n_image_tokens = (int64_t)r->n_tiles * r->p->model.image_seq_length;
    if (out->n_image_tokens > limit) {
        error_set(r->err, ERROR_OUT_OF_RANGE, "the media make %lld tokens; a prompt may have %lld",
                  (long long)out->n_image_tokens, (long long)limit);
        goto out;
    }
    if (chat_template_render(&r->p->chat, c, frames, &text, r->err))
        goto out;
    if (tokenizer_encode(r->p->tokenizer, text.data, text.n, limit - out->n_image_tokens + n_marks,
                         a, &ids, &n_text, r->err)) {
        if (r->err->code == ERROR_OUT_OF_RANGE)
            error_set(r->err, ERROR_OUT_OF_RANGE,
                      "the prompt has more than %lld tokens (%lld of them from media)",
                      (long long)limit, (long long)out->n_image_tokens);
        goto out;
    }
    out->n_ids = n_text - n_marks + out->n_image_tokens;
    out->ids = arena_alloc(a, (size_t)out->n_ids, sizeof(*out->ids));
    if (!out->ids) {
        over_budget(r->err);
        goto out;
    }
    expand_ids(r, ids, n_text, out);
    rc = 0;
out:
    free(frames);
    byte_buffer_release(&text);
    return rc;
}

static size_t tile_bytes(const struct prompt *out)
{
    return (size_t)out->channels * (size_t)out->tile_height * (size_t)out->tile_width;
}

static int decode_image(const struct media_job *job, struct prompt *out, struct error *err)
{
    uint8_t *tiles = out->tiles + (size_t)job->plan->first_tile * tile_bytes(out), *rgb;
    int n_columns = job->plan->n_columns, n_rows = job->plan->n_rows;

    if (image_decode(job->part->bytes, job->part->n_bytes, &job->image, &rgb, err))
        return -1;
    const struct rgb_view view = {.rgb = rgb,
                                  .row_bytes = 3 * (size_t)job->image.width,
                                  .width = job->image.width,
                                  .height = job->image.height};

    resize_to_tiles(&view, n_columns, n_rows, out->tile_width, out->tile_height, tiles);
    if (job->plan->n_tiles > n_columns * n_rows) // the thumbnail
        resize_to_tiles(&view, 1, 1, out->tile_width, out->tile_height,
                        tiles + (size_t)(n_columns * n_rows) * tile_bytes(out));
    free(rgb);
    return 0;
}

struct frame_target {
    const struct media_job *job;
    struct prompt *out;
};

static int put_frame(void *arg, int k, const struct rgb_view *frame, struct error *err)
{
    const struct frame_target *t = arg;

    (void)err;
    t->job->plan->width = frame->width;
    t->job->plan->height = frame->height;
    resize_to_tiles(frame, 1, 1, t->out->tile_width, t->out->tile_height,
                    t->out->tiles + (size_t)(t->job->plan->first_tile + k) * tile_bytes(t->out));
    return 0;
}

static int decode_frames(const struct media_job *job, struct prompt *out, struct error *err)
{
    struct media_plan plan = *job->plan;
    struct content_part part = {.kind = PART_IMAGE};
    struct media_job one = {.part = &part, .plan = &plan};

    plan.n_tiles = 1;
    for (int i = 0; i < job->part->n_frames; i++) {
        part.bytes = job->part->frames[i].bytes;
        part.n_bytes = job->part->frames[i].n_bytes;
        plan.first_tile = job->plan->first_tile + i;
        if (image_probe(part.bytes, part.n_bytes, INT64_MAX, &one.image, err) || // checked before
            decode_image(&one, out, err))
            return -1;
    }
    return 0;
}

static int decode_media(struct preparation *r, struct prompt *out)
{
    for (int i = 0; i < r->n_jobs; i++) {
        const struct media_job *job = &r->jobs[i];
        struct frame_target target = {.job = job, .out = out};
        int rc = job->plan->kind == PART_IMAGE ? decode_image(job, out, r->err)
                 : job->part->n_frames         ? decode_frames(job, out, r->err)
                                       : video_read(job->video, job->indices, job->plan->n_tiles,
                                                    put_frame, &target, r->err);

        if (rc)
            return media_error(job, i, r->err);
    }
    return 0;
}

static int prepare(struct preparation *r, const struct conversation *c, struct arena *a,
                   struct prompt *out)
{
    uint64_t t0 = clock_now_ns();

    if (plan_media(r, c, out->media))
        return -1;
    uint64_t plan_ns = clock_now_ns() - t0;

    if (prepare_ids(r, c, a, out))
        return -1;
    out->channels = N_CHANNELS;
    out->tile_height = r->p->settings.image.tile_height;
    out->tile_width = r->p->settings.image.tile_width;
    out->n_tiles = r->n_tiles;
    if (out->n_tiles == 0)
        return 0;
    out->tiles = arena_alloc(a, (size_t)out->n_tiles, tile_bytes(out));
    if (!out->tiles)
        return over_budget(r->err);
    t0 = clock_now_ns();
    if (decode_media(r, out))
        return -1;
    trace_end("decode media", t0, "tiles", out->n_tiles);
    out->decode_ns = plan_ns + (clock_now_ns() - t0);
    return 0;
}

int processor_prepare(const struct processor *p, const struct conversation *c, struct arena *a,
                      struct prompt *out, struct error *err)
{
    struct preparation r = {.p = p, .err = err};
    int n_videos, rc = -1;

    *out = (struct prompt){0};
    if (check_counts(p, c, &out->n_media, &n_videos, err))
        return -1;
    out->media = arena_alloc(a, (size_t)out->n_media, sizeof(*out->media));
    if (!out->media)
        return over_budget(err);
    r.jobs = xcalloc((size_t)out->n_media + 1, sizeof(*r.jobs));
    rc = prepare(&r, c, a, out);
    for (int i = 0; i < out->n_media; i++) {
        video_close(r.jobs[i].video);
        free(r.jobs[i].indices);
    }
    free(r.jobs);
    return rc;
}

char *processor_render(const struct processor *p, const struct conversation *c, struct arena *a,
                       size_t *n_bytes, struct error *err)
{
    struct byte_buffer text = {0};
    int n_media, n_videos;
    char *out = NULL;

    if (check_counts(p, c, &n_media, &n_videos, err))
        return NULL;
    if (chat_template_render(&p->chat, c, NULL, &text, err) == 0) {
        out = arena_strndup(a, text.data, text.n);
        *n_bytes = text.n;
        if (!out)
            over_budget(err);
    }
    byte_buffer_release(&text);
    return out;
}
