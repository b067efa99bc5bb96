/*
 * Prompts and sampling parameters from the wire. See convert.h; Forward's part is
 * convert_forward.c.
 */
#include "daemon/gateway/convert.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>

#include "daemon/model/vision.h"
#include "kernels/log.h"

#define TILE_SIDE_MAX 65535 // pixels; vision_check_size() has the real limit
#define CACHE_SALT_BYTES_MAX 256
#define TILING_MAX 4096 // of min_patches, max_patches: the processor has the real limit
#define ARENA_ROOM_BYTES ((size_t)16 << 20)

size_t convert_max_elements(const struct convert *c)
{
    return 65536 + 16 * (size_t)c->max_model_len;
}

size_t convert_request_budget(const struct convert *c)
{
    const struct vision_config *v = &c->model->vision;
    size_t tile_bytes = (size_t)v->n_channels * (size_t)v->image_height * (size_t)v->image_width;

    /* Tiles, pixels that came ready made, ids and what is made of each, texts. */
    return 2 * (size_t)c->limits.max_tiles * tile_bytes + (size_t)c->max_message_bytes +
           160 * (size_t)c->max_model_len + 4 * c->limits.max_text_bytes + ARENA_ROOM_BYTES;
}

static void draw_random(void *bytes, size_t n)
{
    if (getrandom(bytes, n, 0) != (ssize_t)n)
        die("getrandom: %s", strerror(errno));
}

int convert_request_id(const char *wire, char id[65], struct error *err)
{
    static const char allowed[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    size_t n = strlen(wire);

    if (n > 64)
        return error_set(err, ERROR_INVALID_ARGUMENT, "request_id has %zu bytes; the limit is 64",
                         n);
    if (strspn(wire, allowed) != n)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "request_id may only have the characters A-Z a-z 0-9 . _ -");
    if (n) {
        memcpy(id, wire, n + 1);
    } else {
        uint64_t number;

        draw_random(&number, sizeof(number));
        snprintf(id, 65, "%016llx", (unsigned long long)number);
    }
    return 0;
}

int convert_cache_salt(const char *wire, struct request *r, struct error *err)
{
    size_t n = strlen(wire);

    if (n > CACHE_SALT_BYTES_MAX)
        return error_set(err, ERROR_INVALID_ARGUMENT, "cache_salt has %zu bytes; the limit is %d",
                         n, CACHE_SALT_BYTES_MAX);
    r->cache_salt = arena_strndup(&r->arena, wire, n);
    return r->cache_salt ? 0 : request_out_of_memory(err);
}

/* ---- chat ---- */

static int convert_tiling(const Internvl__V1__TilingOptions *w, struct tiling_options *t,
                          struct error *err)
{
    *t = (struct tiling_options){-1, -1, -1, -1};
    if (!w)
        return 0;
    if (w->_crop_to_patches_case)
        t->crop_to_patches = w->crop_to_patches;
    if (w->_use_thumbnail_case)
        t->use_thumbnail = w->use_thumbnail;
    if (w->_min_patches_case) {
        if (w->min_patches < 1 || w->min_patches > TILING_MAX)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "tiling.min_patches is %u; it must be 1 to %d", w->min_patches,
                             TILING_MAX);
        t->min_patches = (int)w->min_patches;
    }
    if (w->_max_patches_case) {
        if (w->max_patches < 1 || w->max_patches > TILING_MAX)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "tiling.max_patches is %u; it must be 1 to %d", w->max_patches,
                             TILING_MAX);
        t->max_patches = (int)w->max_patches;
    }
    return 0;
}

static int convert_video(const Internvl__V1__VideoPart *w, struct video_options *v,
                         struct error *err)
{
    *v = (struct video_options){.sample = -1, .initial_shift = NAN};
    if (w->_num_frames_case) {
        if (w->num_frames < 1 || w->num_frames > TILING_MAX)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "video.num_frames is %u; it must be 1 to %d", w->num_frames,
                             TILING_MAX);
        v->num_frames = (int)w->num_frames;
    }
    if (w->_fps_case) {
        if (!(w->fps > 0 && w->fps <= 1000))
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "video.fps is %g; it must be above 0 and at most 1000", w->fps);
        v->fps = w->fps;
    }
    if (w->_initial_shift_case) {
        if (!(fabs(w->initial_shift) <= 1e6))
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "video.initial_shift is %g; it must be -1e6 to 1e6", w->initial_shift);
        v->initial_shift = w->initial_shift;
    }
    if (w->_sample_frames_case)
        v->sample = w->sample_frames;
    return 0;
}

/* A list of pictures in place of a video's bytes. */
static int convert_frames(const Internvl__V1__VideoPart *w, struct arena *a,
                          struct content_part *out, struct error *err)
{
    struct media_bytes *frames = arena_alloc(a, w->n_frames, sizeof(*frames));

    if (!frames)
        return request_out_of_memory(err);
    for (size_t i = 0; i < w->n_frames; i++) {
        if (w->frames[i].len == 0)
            return error_set(err, ERROR_INVALID_ARGUMENT, "frames[%zu] is empty", i);
        frames[i] = (struct media_bytes){w->frames[i].data, w->frames[i].len};
        out->n_bytes += w->frames[i].len;
    }
    out->frames = frames;
    out->n_frames = (int)w->n_frames; // bounded by the message's elements
    return 0;
}

/* The bytes of a picture or video, which come with the request or were uploaded before. media_id
 * NULL: not given. */
static int convert_bytes(const ProtobufCBinaryData *data, const char *media_id, size_t n_frames,
                         const struct media_source *media, struct content_part *out,
                         struct error *err)
{
    struct media_bytes bytes = {data->data, data->len};

    if ((data->len > 0) + (media_id != NULL) + (n_frames > 0) > 1)
        return error_set(err, ERROR_INVALID_ARGUMENT, "a %s; give one of them",
                         out->kind == PART_IMAGE ? "picture has both data and media_id"
                                                 : "video has two of data, frames and media_id");
    if (media_id && media->find(media->state, media_id, out->kind, &bytes, err))
        return -1;
    out->bytes = bytes.bytes;
    out->n_bytes = bytes.n_bytes;
    return 0;
}

static int convert_part(const Internvl__V1__ContentPart *w, const struct media_source *media,
                        size_t message, size_t part, struct arena *a, struct content_part *out,
                        struct error *err)
{
    out->tiling = (struct tiling_options){-1, -1, -1, -1};
    out->video = (struct video_options){.sample = -1, .initial_shift = NAN};
    switch (w->part_case) {
    case INTERNVL__V1__CONTENT_PART__PART_TEXT:
        out->kind = PART_TEXT;
        out->text = w->text;
        out->n_bytes = strlen(w->text);
        return 0;
    case INTERNVL__V1__CONTENT_PART__PART_IMAGE:
        out->kind = PART_IMAGE;
        if (convert_bytes(&w->image->data, w->image->_media_id_case ? w->image->media_id : NULL, 0,
                          media, out, err))
            return -1;
        break;
    case INTERNVL__V1__CONTENT_PART__PART_VIDEO:
        out->kind = PART_VIDEO;
        if (convert_bytes(&w->video->data, w->video->_media_id_case ? w->video->media_id : NULL,
                          w->video->n_frames, media, out, err) ||
            (w->video->n_frames && convert_frames(w->video, a, out, err)))
            return -1;
        break;
    default:
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "messages[%zu].parts[%zu] is neither text, image nor video", message,
                         part);
    }
    if (out->n_bytes == 0)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "messages[%zu].parts[%zu] is a picture or video without data", message,
                         part);
    return out->kind == PART_IMAGE ? convert_tiling(w->image->tiling, &out->tiling, err)
                                   : convert_video(w->video, &out->video, err);
}

int convert_conversation(const Internvl__V1__ChatPrompt *wire, const struct media_source *media,
                         struct arena *a, struct conversation *out, struct error *err)
{
    struct chat_message *messages = arena_alloc(a, wire->n_messages, sizeof(*messages));

    if (wire->n_messages == 0)
        return error_set(err, ERROR_INVALID_ARGUMENT, "chat.messages is empty");
    if (!messages)
        return request_out_of_memory(err);
    for (size_t i = 0; i < wire->n_messages; i++) {
        const Internvl__V1__Message *w = wire->messages[i];
        struct content_part *parts = arena_alloc(a, w->n_parts, sizeof(*parts));

        if (!parts)
            return request_out_of_memory(err);
        for (size_t k = 0; k < w->n_parts; k++)
            if (convert_part(w->parts[k], media, i, k, a, &parts[k], err))
                return -1;
        messages[i] = (struct chat_message){w->role, parts, (int)w->n_parts};
    }
    *out = (struct conversation){messages, (int)wire->n_messages, wire->continue_final_message};
    return 0;
}

/* ---- prompts ---- */

static int check_length(const struct convert *c, int64_t n_ids, struct error *err)
{
    if (n_ids < 1)
        return error_set(err, ERROR_INVALID_ARGUMENT, "the prompt is empty");
    if (n_ids >= c->max_model_len)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "the prompt has %lld tokens; prompt and answer together may have %d "
                         "(--max-model-len), and the answer needs one",
                         (long long)n_ids, c->max_model_len);
    return 0;
}

int convert_prepared_prompt(const struct convert *c, const struct prompt *p, struct request *r,
                            struct error *err)
{
    if (check_length(c, p->n_ids, err))
        return -1;
    r->ids = p->ids;
    r->n_ids = (int32_t)p->n_ids;
    r->image_token_id = p->n_tiles ? c->model->image_token_id : -1;
    r->n_image_tokens = (int32_t)p->n_image_tokens;
    r->pixel_dtype = DTYPE_U8;
    r->pixels = p->tiles;
    r->n_tiles = p->n_tiles;
    r->channels = p->channels;
    r->height = p->tile_height;
    r->width = p->tile_width;
    r->media_ns = p->decode_ns;
    return 0;
}

static int convert_pixels(const struct convert *c, const Internvl__V1__Tensor *w, struct request *r,
                          struct error *err)
{
    const struct vision_config *v = &c->model->vision;
    float *pixels;

    if (strcmp(w->dtype, "float32") != 0)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "pixel_values.dtype is \"%.32s\"; it must be \"float32\"", w->dtype);
    if (w->n_shape != 4)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "pixel_values has %zu dimensions; it must have 4: tiles, channels, "
                         "height, width",
                         w->n_shape);
    if (w->shape[0] < 1 || w->shape[0] > (uint64_t)c->limits.max_tiles)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "pixel_values has %llu tiles; it must be 1 to %d",
                         (unsigned long long)w->shape[0], c->limits.max_tiles);
    for (int i = 1; i < 4; i++)
        if (w->shape[i] < 1 || w->shape[i] > TILE_SIDE_MAX)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "pixel_values.shape[%d] is %llu; it must be 1 to %d", i,
                             (unsigned long long)w->shape[i], TILE_SIDE_MAX);
    if (vision_check_size(c->model, (int)w->shape[1], (int)w->shape[2], (int)w->shape[3], err))
        return -1;

    size_t n = (size_t)w->shape[0] * (size_t)w->shape[1] * (size_t)w->shape[2] *
               (size_t)w->shape[3]; // all bounded above
    if (w->data.len != n * sizeof(float))
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "pixel_values.data has %zu bytes; its shape needs %zu", w->data.len,
                         n * sizeof(float));
    pixels = arena_alloc(&r->arena, n, sizeof(*pixels));
    if (!pixels)
        return request_out_of_memory(err);
    memcpy(pixels, w->data.data, n * sizeof(float));
    r->pixel_dtype = DTYPE_F32;
    r->pixels = pixels;
    r->n_tiles = (int32_t)w->shape[0];
    r->channels = v->n_channels;
    r->height = (int32_t)w->shape[2];
    r->width = (int32_t)w->shape[3];
    if (r->height != v->image_height || r->width != v->image_width)
        r->n_features_per_tile = model_config_n_features(c->model, r->height, r->width);
    return 0;
}

/* Rows in place of ids; the ids are then zeros that nobody reads. */
static int convert_embeds(const struct convert *c, const Internvl__V1__TokenPrompt *wire,
                          struct request *r, struct error *err)
{
    const Internvl__V1__Tensor *w = wire->inputs_embeds;
    const int32_t dim = c->model->text.hidden_size;
    float *rows;

    if (wire->n_token_ids || wire->pixel_values)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "inputs_embeds stands in place of token_ids and pixel_values");
    if (strcmp(w->dtype, "float32") != 0)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "inputs_embeds.dtype is \"%.32s\"; it must be \"float32\"", w->dtype);
    if (w->n_shape != 2 || w->shape[1] != (uint64_t)dim)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "inputs_embeds must have 2 dimensions, tokens and the model's %d columns",
                         dim);
    if (w->shape[0] > (uint64_t)c->max_model_len)
        return check_length(c, c->max_model_len, err);
    if (check_length(c, (int64_t)w->shape[0], err))
        return -1;

    size_t n = (size_t)w->shape[0] * (size_t)dim; // both bounded above
    if (w->data.len != n * sizeof(float))
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "inputs_embeds.data has %zu bytes; its shape needs %zu", w->data.len,
                         n * sizeof(float));
    rows = arena_alloc(&r->arena, n, sizeof(*rows));
    r->ids = arena_alloc(&r->arena, (size_t)w->shape[0], sizeof(*r->ids));
    if (!rows || !r->ids)
        return request_out_of_memory(err);
    memcpy(rows, w->data.data, n * sizeof(float));
    for (size_t i = 0; i < n; i++)
        if (!isfinite(rows[i]))
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "inputs_embeds has a value that is not finite, in row %zu",
                             i / (size_t)dim);
    r->inputs_embeds = rows;
    r->n_ids = (int32_t)w->shape[0];
    memset(r->ids, 0, (size_t)r->n_ids * sizeof(*r->ids));
    r->image_token_id = -1;
    return 0;
}

int convert_token_prompt(const struct convert *c, const Internvl__V1__TokenPrompt *wire,
                         struct request *r, struct error *err)
{
    int32_t *ids;
    int64_t n_image_tokens = 0;

    if (wire->inputs_embeds)
        return convert_embeds(c, wire, r, err);
    if (check_length(c, (int64_t)wire->n_token_ids, err))
        return -1;
    ids = arena_alloc(&r->arena, wire->n_token_ids, sizeof(*ids));
    if (!ids)
        return request_out_of_memory(err);
    for (size_t i = 0; i < wire->n_token_ids; i++) {
        if (wire->token_ids[i] >= (uint32_t)c->model->text.vocab_size)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "token_ids[%zu] is %u; the vocabulary has %d ids", i,
                             wire->token_ids[i], c->model->text.vocab_size);
        ids[i] = (int32_t)wire->token_ids[i];
        n_image_tokens += ids[i] == c->model->image_token_id;
    }
    r->ids = ids;
    r->n_ids = (int32_t)wire->n_token_ids;
    r->image_token_id = -1; // without pixels an image token is an ordinary one, as in Transformers
    if (!wire->pixel_values)
        return 0;
    if (convert_pixels(c, wire->pixel_values, r, err))
        return -1;
    r->image_token_id = c->model->image_token_id;
    r->n_image_tokens = (int32_t)n_image_tokens;
    int64_t n_features =
        (int64_t)r->n_tiles * request_features_per_tile(r, c->model->n_features_per_tile);

    if (n_image_tokens != n_features)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "token_ids has %lld image tokens; %d tiles of %d x %d pixels need %lld",
                         (long long)n_image_tokens, r->n_tiles, r->height, r->width,
                         (long long)n_features);
    return 0;
}

/* ---- sampling ---- */

static int refuse(struct error *err, const char *field, double value, const char *limit)
{
    return error_set(err, ERROR_INVALID_ARGUMENT, "sampling.%s is %g; it must be %s", field, value,
                     limit);
}

static int convert_distribution(const struct convert *c, const Internvl__V1__SamplingParams *w,
                                struct sampling *s, struct error *err)
{
    const struct model_config *m = c->model;

    *s = (struct sampling){.temperature = m->do_sample ? m->temperature : 0,
                           .top_p = m->top_p,
                           .top_k = m->top_k,
                           .repetition_penalty = m->repetition_penalty,
                           .n_logprobs = -1};
    if (w->_temperature_case)
        s->temperature = w->temperature;
    if (w->_top_p_case)
        s->top_p = w->top_p;
    if (w->_top_k_case)
        s->top_k = (int32_t)(w->top_k < (uint32_t)m->text.vocab_size ? w->top_k : 0);
    if (w->_min_p_case)
        s->min_p = w->min_p;
    if (w->_repetition_penalty_case)
        s->repetition_penalty = w->repetition_penalty;
    if (w->_presence_penalty_case)
        s->presence_penalty = w->presence_penalty;
    if (w->_frequency_penalty_case)
        s->frequency_penalty = w->frequency_penalty;

    if (!(s->temperature >= 0 && s->temperature <= 100))
        return refuse(err, "temperature", s->temperature, "0 to 100");
    if (!(s->top_p > 0 && s->top_p <= 1))
        return refuse(err, "top_p", s->top_p, "above 0 and at most 1");
    if (!(s->min_p >= 0 && s->min_p <= 1))
        return refuse(err, "min_p", s->min_p, "0 to 1");
    if (!(s->repetition_penalty > 0 && s->repetition_penalty <= 100))
        return refuse(err, "repetition_penalty", s->repetition_penalty, "above 0 and at most 100");
    if (!(s->presence_penalty >= -2 && s->presence_penalty <= 2))
        return refuse(err, "presence_penalty", s->presence_penalty, "-2 to 2");
    if (!(s->frequency_penalty >= -2 && s->frequency_penalty <= 2))
        return refuse(err, "frequency_penalty", s->frequency_penalty, "-2 to 2");
    if (s->temperature < 1e-5f) { // vLLM: greedy, and the filters are then without effect
        s->temperature = 0;
        s->top_p = 1;
        s->top_k = 0;
        s->min_p = 0;
    }
    if (w->_logprobs_case) {
        if (w->logprobs > TOP_LOGPROBS_MAX)
            return refuse(err, "logprobs", w->logprobs, "at most 20");
        s->n_logprobs = (int32_t)w->logprobs;
    }
    if (w->_seed_case)
        s->seed = w->seed;
    else
        draw_random(&s->seed, sizeof(s->seed));
    return 0;
}

/* targets[i] = ids[i + 1]: what Forward with the prompt as labels would score. */
static int convert_prompt_logprobs(const struct convert *c, const Internvl__V1__SamplingParams *w,
                                   struct request *r, struct error *err)
{
    int32_t k = (int32_t)w->prompt_logprobs, vocab = c->model->text.vocab_size, *targets;

    if (!w->_prompt_logprobs_case)
        return 0;
    if (w->prompt_logprobs > TOP_LOGPROBS_MAX)
        return refuse(err, "prompt_logprobs", w->prompt_logprobs, "at most 20");
    if (r->inputs_embeds)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "sampling.prompt_logprobs cannot be used with inputs_embeds: there are no "
                         "tokens to score");
    targets = arena_alloc(&r->arena, (size_t)r->n_ids, sizeof(*targets));
    if (!targets)
        return request_out_of_memory(err);
    for (int32_t i = 0; i < r->n_ids; i++)
        targets[i] = i + 1 < r->n_ids ? r->ids[i + 1] : -1;
    r->targets = targets;
    r->n_target_top = k < vocab ? k : vocab;
    return 0;
}

/* What draws at random, and what is told token by token, has no meaning for beams. */
static int refuse_with_beams(const Internvl__V1__SamplingParams *w, const struct sampling *s,
                             struct error *err)
{
    const char *field = w->_temperature_case && s->temperature > 0 ? "temperature"
                        : w->_top_p_case && w->top_p < 1           ? "top_p"
                        : w->_top_k_case && w->top_k > 0           ? "top_k"
                        : w->_min_p_case && w->min_p > 0           ? "min_p"
                        : w->_logprobs_case                        ? "logprobs"
                        : w->n_stop > 0                            ? "stop"
                                                                   : NULL;

    return field ? error_set(err, ERROR_INVALID_ARGUMENT,
                             "sampling.%s cannot be used with num_beams: beam search does not "
                             "sample, and its sequences come whole at the end",
                             field)
                 : 0;
}

static int convert_beams(const Internvl__V1__SamplingParams *w, struct request *r,
                         struct error *err)
{
    r->n_beams = 1;
    if (w->_num_beams_case) {
        if (w->num_beams < 1 || w->num_beams > BEAMS_MAX)
            return refuse(err, "num_beams", w->num_beams, "1 to 10");
        r->n_beams = (int32_t)w->num_beams;
    }
    if (w->_length_penalty_case)
        r->length_penalty = w->length_penalty;
    if (!(r->length_penalty >= -100 && r->length_penalty <= 100))
        return refuse(err, "length_penalty", r->length_penalty, "-100 to 100");
    if (r->n_beams == 1 && (w->_length_penalty_case || w->early_stopping))
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "sampling.length_penalty and early_stopping need num_beams above 1");
    if ((unsigned)w->early_stopping > EARLY_STOPPING_NEVER)
        return refuse(err, "early_stopping", w->early_stopping, "0, 1 or 2");
    r->early_stopping = (enum early_stopping)w->early_stopping;
    if (r->n_beams == 1)
        return 0;
    r->sampling.temperature = w->_temperature_case ? r->sampling.temperature : 0;
    return refuse_with_beams(w, &r->sampling, err);
}

/* n, max_tokens, min_tokens: vLLM's rules. */
static int convert_counts(const struct convert *c, const Internvl__V1__SamplingParams *w,
                          struct request *r, struct error *err)
{
    int32_t left = c->max_model_len - r->n_ids;

    r->n = 1;
    if (w->_n_case) {
        if (w->n < 1 || w->n > LIMIT_N)
            return refuse(err, "n", w->n, "1 to 16");
        r->n = (int32_t)w->n;
    }
    if (r->n > 1 && r->sampling.temperature <= 0 && r->n_beams == 1)
        return refuse(err, "n", r->n, "1 with greedy sampling (temperature 0)");
    r->max_tokens = c->model->max_new_tokens > 0 && c->model->max_new_tokens < left
                        ? c->model->max_new_tokens
                        : left;
    if (w->_max_tokens_case) {
        if (w->max_tokens < 1)
            return refuse(err, "max_tokens", w->max_tokens, "at least 1");
        if (w->max_tokens > (uint32_t)left)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "sampling.max_tokens is %u and the prompt has %d tokens; together "
                             "they may be %d (--max-model-len)",
                             w->max_tokens, r->n_ids, c->max_model_len);
        r->max_tokens = (int32_t)w->max_tokens;
    }
    r->min_tokens = 0;
    if (w->_min_tokens_case) {
        if (w->min_tokens > (uint32_t)r->max_tokens)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "sampling.min_tokens is %u; it must be at most max_tokens, which is "
                             "%d",
                             w->min_tokens, r->max_tokens);
        r->min_tokens = (int32_t)w->min_tokens;
    }
    return 0;
}

static int convert_stops(const struct convert *c, const Internvl__V1__SamplingParams *w,
                         struct request *r, struct error *err)
{
    struct stop_string *strings;
    int32_t *ids;

    if (w->n_stop > LIMIT_STOP_STRINGS)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "sampling.stop has %zu strings; the limit is %d", w->n_stop,
                         LIMIT_STOP_STRINGS);
    if (w->n_stop_token_ids > LIMIT_STOP_TOKEN_IDS)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "sampling.stop_token_ids has %zu ids; the limit is %d",
                         w->n_stop_token_ids, LIMIT_STOP_TOKEN_IDS);
    strings = arena_alloc(&r->arena, w->n_stop, sizeof(*strings));
    ids = arena_alloc(&r->arena, w->n_stop_token_ids, sizeof(*ids));
    if (!strings || !ids)
        return request_out_of_memory(err);
    for (size_t i = 0; i < w->n_stop; i++) {
        size_t n = strlen(w->stop[i]);

        if (n < 1 || n > LIMIT_STOP_BYTES)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "sampling.stop[%zu] has %zu bytes; it must have 1 to %d", i, n,
                             LIMIT_STOP_BYTES);
        strings[i] = (struct stop_string){arena_strndup(&r->arena, w->stop[i], n), (int)n};
        if (!strings[i].bytes)
            return request_out_of_memory(err);
    }
    for (size_t i = 0; i < w->n_stop_token_ids; i++) {
        if (w->stop_token_ids[i] >= (uint32_t)c->model->text.vocab_size)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "sampling.stop_token_ids[%zu] is %u; the vocabulary has %d ids", i,
                             w->stop_token_ids[i], c->model->text.vocab_size);
        ids[i] = (int32_t)w->stop_token_ids[i];
    }
    r->stop_strings = strings;
    r->n_stop_strings = (int32_t)w->n_stop;
    r->stop_token_ids = ids;
    r->n_stop_token_ids = (int32_t)w->n_stop_token_ids;
    return 0;
}

static int convert_bias(const struct convert *c, const Internvl__V1__SamplingParams *w,
                        struct request *r, struct error *err)
{
    int32_t *ids;
    float *values;

    if (w->n_logit_bias > LIMIT_LOGIT_BIAS)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "sampling.logit_bias has %zu entries; the limit is %d", w->n_logit_bias,
                         LIMIT_LOGIT_BIAS);
    ids = arena_alloc(&r->arena, w->n_logit_bias, sizeof(*ids));
    values = arena_alloc(&r->arena, w->n_logit_bias, sizeof(*values));
    if (!ids || !values)
        return request_out_of_memory(err);
    for (size_t i = 0; i < w->n_logit_bias; i++) {
        const Internvl__V1__LogitBias *b = w->logit_bias[i];

        if (b->token_id >= (uint32_t)c->model->text.vocab_size)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "sampling.logit_bias[%zu].token_id is %u; the vocabulary has %d ids",
                             i, b->token_id, c->model->text.vocab_size);
        if (!(b->bias >= -100 && b->bias <= 100))
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "sampling.logit_bias[%zu].bias is %g; it must be -100 to 100", i,
                             (double)b->bias);
        ids[i] = (int32_t)b->token_id;
        values[i] = b->bias;
    }
    r->bias_ids = ids;
    r->bias_values = values;
    r->n_bias = (int32_t)w->n_logit_bias;
    return 0;
}

int convert_sampling(const struct convert *c, const Internvl__V1__SamplingParams *wire,
                     struct request *r, struct error *err)
{
    Internvl__V1__SamplingParams unset = INTERNVL__V1__SAMPLING_PARAMS__INIT;
    const Internvl__V1__SamplingParams *w = wire ? wire : &unset;

    if (convert_distribution(c, w, &r->sampling, err) || convert_beams(w, r, err) ||
        convert_counts(c, w, r, err) || convert_stops(c, w, r, err) || convert_bias(c, w, r, err) ||
        convert_prompt_logprobs(c, w, r, err))
        return -1;
    r->ignore_eos = w->ignore_eos;
    r->include_stop_str = w->include_stop_str_in_output;
    r->skip_special_tokens = w->_skip_special_tokens_case ? w->skip_special_tokens : 1;
    return 0;
}
