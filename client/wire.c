/*
 * Plain structs to protobuf-c messages and back. A proto3 `optional` field is a one-field oneof in
 * the C code (see proto/CMakeLists.txt), hence the _case members.
 */
#include "client/wire.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/rpc.h"

#define CHUNK_BYTES ((size_t)256 << 10) // of an upload, in one message

struct wire_block {
    struct wire_block *next;
    _Alignas(16) unsigned char bytes[];
};

void *wire_alloc(struct wire_pool *p, size_t n, size_t size)
{
    size_t n_bytes;
    struct wire_block *b = NULL;
    if (!__builtin_mul_overflow(n, size, &n_bytes) &&
        !__builtin_add_overflow(n_bytes, sizeof(*b), &n_bytes))
        b = calloc(1, n_bytes);
    if (!b) {
        fprintf(stderr, "libinternvl: out of memory\n");
        abort();
    }
    b->next = p->blocks;
    p->blocks = b;
    return b->bytes;
}

void wire_pool_release(struct wire_pool *p)
{
    while (p->blocks) {
        struct wire_block *next = p->blocks->next;
        free(p->blocks);
        p->blocks = next;
    }
}

static void *own(size_t n, size_t size) // for results; never NULL, also for n = 0
{
    void *p = calloc(n ? n : 1, size);
    if (!p) {
        fprintf(stderr, "libinternvl: out of memory\n");
        abort();
    }
    return p;
}

static void *own_copy(const void *src, size_t n, size_t size)
{
    void *p = own(n, size);
    if (n)
        memcpy(p, src, n * size);
    return p;
}

static char *own_string(const char *s)
{
    return own_copy(s, strlen(s) + 1, 1);
}

/* ---- requests ---- */

static char *borrow_string(const char *s) // protobuf-c's fields are not const, its packer is
{
    return (char *)(s ? s : "");
}

static ProtobufCBinaryData borrow_bytes(const void *data, size_t n_bytes)
{
    ProtobufCBinaryData b = {.len = n_bytes, .data = (uint8_t *)data};
    return b;
}

static Internvl__V1__TilingOptions *wire_tiling(struct wire_pool *p,
                                                const struct internvl_tiling *t)
{
    if (!t->set)
        return NULL;
    Internvl__V1__TilingOptions *m = wire_alloc(p, 1, sizeof(*m));
    internvl__v1__tiling_options__init(m);
    if (t->set & INTERNVL_CROP_TO_PATCHES) {
        m->_crop_to_patches_case = INTERNVL__V1__TILING_OPTIONS___CROP_TO_PATCHES_CROP_TO_PATCHES;
        m->crop_to_patches = t->crop_to_patches;
    }
    if (t->set & INTERNVL_MIN_PATCHES) {
        m->_min_patches_case = INTERNVL__V1__TILING_OPTIONS___MIN_PATCHES_MIN_PATCHES;
        m->min_patches = t->min_patches;
    }
    if (t->set & INTERNVL_MAX_PATCHES) {
        m->_max_patches_case = INTERNVL__V1__TILING_OPTIONS___MAX_PATCHES_MAX_PATCHES;
        m->max_patches = t->max_patches;
    }
    if (t->set & INTERNVL_USE_THUMBNAIL) {
        m->_use_thumbnail_case = INTERNVL__V1__TILING_OPTIONS___USE_THUMBNAIL_USE_THUMBNAIL;
        m->use_thumbnail = t->use_thumbnail;
    }
    return m;
}

static Internvl__V1__VideoPart *wire_video(struct wire_pool *p, const struct internvl_part *part)
{
    const struct internvl_video *v = &part->video;
    Internvl__V1__VideoPart *m = wire_alloc(p, 1, sizeof(*m));
    internvl__v1__video_part__init(m);
    m->data = borrow_bytes(part->data, part->n_bytes);
    if (part->media_id) {
        m->_media_id_case = INTERNVL__V1__VIDEO_PART___MEDIA_ID_MEDIA_ID;
        m->media_id = borrow_string(part->media_id);
    }
    m->n_frames = part->n_frames;
    m->frames = wire_alloc(p, part->n_frames, sizeof(*m->frames));
    for (size_t i = 0; i < part->n_frames; i++)
        m->frames[i] = borrow_bytes(part->frames[i].data, part->frames[i].n_bytes);
    if (v->set & INTERNVL_NUM_FRAMES) {
        m->_num_frames_case = INTERNVL__V1__VIDEO_PART___NUM_FRAMES_NUM_FRAMES;
        m->num_frames = v->num_frames;
    }
    if (v->set & INTERNVL_FPS) {
        m->_fps_case = INTERNVL__V1__VIDEO_PART___FPS_FPS;
        m->fps = v->fps;
    }
    if (v->set & INTERNVL_INITIAL_SHIFT) {
        m->_initial_shift_case = INTERNVL__V1__VIDEO_PART___INITIAL_SHIFT_INITIAL_SHIFT;
        m->initial_shift = v->initial_shift;
    }
    if (v->set & INTERNVL_SAMPLE_FRAMES) {
        m->_sample_frames_case = INTERNVL__V1__VIDEO_PART___SAMPLE_FRAMES_SAMPLE_FRAMES;
        m->sample_frames = v->sample_frames;
    }
    return m;
}

static Internvl__V1__ContentPart *wire_part(struct wire_pool *p, const struct internvl_part *part)
{
    Internvl__V1__ContentPart *m = wire_alloc(p, 1, sizeof(*m));
    internvl__v1__content_part__init(m);
    switch (part->kind) {
    case INTERNVL_TEXT:
        m->part_case = INTERNVL__V1__CONTENT_PART__PART_TEXT;
        m->text = borrow_string(part->text);
        break;
    case INTERNVL_IMAGE:
        m->part_case = INTERNVL__V1__CONTENT_PART__PART_IMAGE;
        m->image = wire_alloc(p, 1, sizeof(*m->image));
        internvl__v1__image_part__init(m->image);
        m->image->data = borrow_bytes(part->data, part->n_bytes);
        m->image->tiling = wire_tiling(p, &part->tiling);
        if (part->media_id) {
            m->image->_media_id_case = INTERNVL__V1__IMAGE_PART___MEDIA_ID_MEDIA_ID;
            m->image->media_id = borrow_string(part->media_id);
        }
        break;
    case INTERNVL_VIDEO:
        m->part_case = INTERNVL__V1__CONTENT_PART__PART_VIDEO;
        m->video = wire_video(p, part);
        break;
    }
    return m;
}

static Internvl__V1__ChatPrompt *wire_chat(struct wire_pool *p, const struct internvl_prompt *r)
{
    Internvl__V1__ChatPrompt *m = wire_alloc(p, 1, sizeof(*m));
    internvl__v1__chat_prompt__init(m);
    m->continue_final_message = r->continue_final_message;
    m->n_messages = r->n_messages;
    m->messages = wire_alloc(p, r->n_messages, sizeof(*m->messages));
    for (size_t i = 0; i < r->n_messages; i++) {
        const struct internvl_message *src = &r->messages[i];
        Internvl__V1__Message *dst = wire_alloc(p, 1, sizeof(*dst));
        internvl__v1__message__init(dst);
        dst->role = borrow_string(src->role);
        dst->n_parts = src->n_parts;
        dst->parts = wire_alloc(p, src->n_parts, sizeof(*dst->parts));
        for (size_t k = 0; k < src->n_parts; k++)
            dst->parts[k] = wire_part(p, &src->parts[k]);
        m->messages[i] = dst;
    }
    return m;
}

static Internvl__V1__TokenPrompt *wire_tokens(struct wire_pool *p, const struct internvl_prompt *r)
{
    Internvl__V1__TokenPrompt *m = wire_alloc(p, 1, sizeof(*m));
    internvl__v1__token_prompt__init(m);
    m->n_token_ids = r->n_token_ids;
    m->token_ids = (uint32_t *)r->token_ids;
    if (r->pixel_values) {
        Internvl__V1__Tensor *t = wire_alloc(p, 1, sizeof(*t));
        internvl__v1__tensor__init(t);
        size_t n_elements = 1;
        for (int i = 0; i < 4; i++)
            n_elements *= r->pixel_shape[i];
        t->n_shape = 4;
        t->shape = (uint64_t *)r->pixel_shape;
        t->dtype = borrow_string("float32");
        t->data = borrow_bytes(r->pixel_values, n_elements * sizeof(float));
        m->pixel_values = t;
    }
    return m;
}

static Internvl__V1__Prompt *wire_prompt(struct wire_pool *p, const struct internvl_prompt *r)
{
    Internvl__V1__Prompt *m = wire_alloc(p, 1, sizeof(*m));
    internvl__v1__prompt__init(m);
    if (r->n_messages) {
        m->input_case = INTERNVL__V1__PROMPT__INPUT_CHAT;
        m->chat = wire_chat(p, r);
    } else {
        m->input_case = INTERNVL__V1__PROMPT__INPUT_TOKENS;
        m->tokens = wire_tokens(p, r);
    }
    return m;
}

static void wire_sampling_floats(Internvl__V1__SamplingParams *m, const struct internvl_sampling *s)
{
    if (s->set & INTERNVL_TEMPERATURE) {
        m->_temperature_case = INTERNVL__V1__SAMPLING_PARAMS___TEMPERATURE_TEMPERATURE;
        m->temperature = s->temperature;
    }
    if (s->set & INTERNVL_TOP_P) {
        m->_top_p_case = INTERNVL__V1__SAMPLING_PARAMS___TOP_P_TOP_P;
        m->top_p = s->top_p;
    }
    if (s->set & INTERNVL_MIN_P) {
        m->_min_p_case = INTERNVL__V1__SAMPLING_PARAMS___MIN_P_MIN_P;
        m->min_p = s->min_p;
    }
    if (s->set & INTERNVL_REPETITION_PENALTY) {
        m->_repetition_penalty_case =
            INTERNVL__V1__SAMPLING_PARAMS___REPETITION_PENALTY_REPETITION_PENALTY;
        m->repetition_penalty = s->repetition_penalty;
    }
    if (s->set & INTERNVL_PRESENCE_PENALTY) {
        m->_presence_penalty_case =
            INTERNVL__V1__SAMPLING_PARAMS___PRESENCE_PENALTY_PRESENCE_PENALTY;
        m->presence_penalty = s->presence_penalty;
    }
    if (s->set & INTERNVL_FREQUENCY_PENALTY) {
        m->_frequency_penalty_case =
            INTERNVL__V1__SAMPLING_PARAMS___FREQUENCY_PENALTY_FREQUENCY_PENALTY;
        m->frequency_penalty = s->frequency_penalty;
    }
}

static void wire_sampling_counts(Internvl__V1__SamplingParams *m, const struct internvl_sampling *s)
{
    if (s->set & INTERNVL_TOP_K) {
        m->_top_k_case = INTERNVL__V1__SAMPLING_PARAMS___TOP_K_TOP_K;
        m->top_k = s->top_k;
    }
    if (s->set & INTERNVL_SEED) {
        m->_seed_case = INTERNVL__V1__SAMPLING_PARAMS___SEED_SEED;
        m->seed = s->seed;
    }
    if (s->set & INTERNVL_N) {
        m->_n_case = INTERNVL__V1__SAMPLING_PARAMS___N_N;
        m->n = s->n;
    }
    if (s->set & INTERNVL_MAX_TOKENS) {
        m->_max_tokens_case = INTERNVL__V1__SAMPLING_PARAMS___MAX_TOKENS_MAX_TOKENS;
        m->max_tokens = s->max_tokens;
    }
    if (s->set & INTERNVL_MIN_TOKENS) {
        m->_min_tokens_case = INTERNVL__V1__SAMPLING_PARAMS___MIN_TOKENS_MIN_TOKENS;
        m->min_tokens = s->min_tokens;
    }
    if (s->set & INTERNVL_SKIP_SPECIAL_TOKENS) {
        m->_skip_special_tokens_case =
            INTERNVL__V1__SAMPLING_PARAMS___SKIP_SPECIAL_TOKENS_SKIP_SPECIAL_TOKENS;
        m->skip_special_tokens = s->skip_special_tokens;
    }
    if (s->set & INTERNVL_NUM_BEAMS) {
        m->_num_beams_case = INTERNVL__V1__SAMPLING_PARAMS___NUM_BEAMS_NUM_BEAMS;
        m->num_beams = s->num_beams;
    }
    if (s->set & INTERNVL_LENGTH_PENALTY) {
        m->_length_penalty_case = INTERNVL__V1__SAMPLING_PARAMS___LENGTH_PENALTY_LENGTH_PENALTY;
        m->length_penalty = s->length_penalty;
    }
    if (s->set & INTERNVL_LOGPROBS) {
        m->_logprobs_case = INTERNVL__V1__SAMPLING_PARAMS___LOGPROBS_LOGPROBS;
        m->logprobs = s->logprobs;
    }
    if (s->set & INTERNVL_PROMPT_LOGPROBS) {
        m->_prompt_logprobs_case = INTERNVL__V1__SAMPLING_PARAMS___PROMPT_LOGPROBS_PROMPT_LOGPROBS;
        m->prompt_logprobs = s->prompt_logprobs;
    }
}

static Internvl__V1__SamplingParams *wire_sampling(struct wire_pool *p,
                                                   const struct internvl_sampling *s)
{
    Internvl__V1__SamplingParams *m = wire_alloc(p, 1, sizeof(*m));
    internvl__v1__sampling_params__init(m);
    wire_sampling_floats(m, s);
    wire_sampling_counts(m, s);
    m->ignore_eos = s->ignore_eos;
    m->early_stopping = (Internvl__V1__EarlyStopping)s->early_stopping;
    m->include_stop_str_in_output = s->include_stop_str_in_output;
    m->n_stop = s->n_stop;
    m->stop = (char **)s->stop;
    m->n_stop_token_ids = s->n_stop_token_ids;
    m->stop_token_ids = (uint32_t *)s->stop_token_ids;
    m->n_logit_bias = s->n_logit_bias;
    m->logit_bias = wire_alloc(p, s->n_logit_bias, sizeof(*m->logit_bias));
    for (size_t i = 0; i < s->n_logit_bias; i++) {
        Internvl__V1__LogitBias *b = wire_alloc(p, 1, sizeof(*b));
        internvl__v1__logit_bias__init(b);
        b->token_id = s->logit_bias[i].token_id;
        b->bias = s->logit_bias[i].bias;
        m->logit_bias[i] = b;
    }
    return m;
}

Internvl__V1__GenerateRequest *wire_generate(struct wire_pool *p,
                                             const struct internvl_generate_request *r)
{
    Internvl__V1__GenerateRequest *m = wire_alloc(p, 1, sizeof(*m));
    internvl__v1__generate_request__init(m);
    m->request_id = borrow_string(r->request_id);
    m->prompt = wire_prompt(p, &r->prompt);
    m->sampling = wire_sampling(p, &r->sampling);
    m->priority = r->priority;
    m->cache_salt = borrow_string(r->cache_salt);
    return m;
}

Internvl__V1__ForwardRequest *wire_forward(struct wire_pool *p,
                                           const struct internvl_forward_request *r)
{
    Internvl__V1__ForwardRequest *m = wire_alloc(p, 1, sizeof(*m));
    internvl__v1__forward_request__init(m);
    m->request_id = borrow_string(r->request_id);
    m->prompt = wire_prompt(p, &r->prompt);
    m->n_outputs = r->n_outputs;
    m->outputs = (char **)r->outputs;
    if (r->logits_to_keep) {
        m->_logits_to_keep_case = INTERNVL__V1__FORWARD_REQUEST___LOGITS_TO_KEEP_LOGITS_TO_KEEP;
        m->logits_to_keep = r->logits_to_keep;
    }
    m->n_logits_positions = r->n_logits_positions;
    m->logits_positions = (uint32_t *)r->logits_positions;
    m->bool_masked_pos.data = (uint8_t *)r->bool_masked_pos;
    m->bool_masked_pos.len = r->n_bool_masked_pos;
    m->n_labels = r->n_labels;
    m->labels = (int32_t *)r->labels;
    return m;
}

static Internvl__V1__TokenIds *wire_token_ids(struct wire_pool *p, const uint32_t *ids, size_t n)
{
    Internvl__V1__TokenIds *m = wire_alloc(p, 1, sizeof(*m));
    internvl__v1__token_ids__init(m);
    m->n_ids = n;
    m->ids = (uint32_t *)ids;
    return m;
}

Internvl__V1__ScoreRequest *wire_score(struct wire_pool *p, const struct internvl_score_request *r)
{
    Internvl__V1__ScoreRequest *m = wire_alloc(p, 1, sizeof(*m));
    internvl__v1__score_request__init(m);
    m->request_id = borrow_string(r->request_id);
    m->prompt = wire_prompt(p, &r->prompt);
    m->n_labels = r->n_labels;
    m->labels = (int32_t *)r->labels;
    m->n_continuations = r->n_continuations;
    m->continuations = wire_alloc(p, r->n_continuations, sizeof(*m->continuations));
    for (size_t i = 0; i < r->n_continuations; i++) {
        const struct internvl_continuation *src = &r->continuations[i];
        Internvl__V1__Continuation *dst = wire_alloc(p, 1, sizeof(*dst));
        internvl__v1__continuation__init(dst);
        if (src->text) {
            dst->input_case = INTERNVL__V1__CONTINUATION__INPUT_TEXT;
            dst->text = borrow_string(src->text);
        } else {
            dst->input_case = INTERNVL__V1__CONTINUATION__INPUT_TOKEN_IDS;
            dst->token_ids = wire_token_ids(p, src->token_ids, src->n_token_ids);
        }
        m->continuations[i] = dst;
    }
    return m;
}

Internvl__V1__EmbedRequest *wire_embed(struct wire_pool *p, const struct internvl_embed_request *r)
{
    Internvl__V1__EmbedRequest *m = wire_alloc(p, 1, sizeof(*m));
    internvl__v1__embed_request__init(m);
    m->request_id = borrow_string(r->request_id);
    m->prompt = wire_prompt(p, &r->prompt);
    m->n_outputs = r->n_outputs;
    m->outputs = (char **)r->outputs;
    return m;
}

Internvl__V1__TokenizeRequest *wire_tokenize(struct wire_pool *p,
                                             const struct internvl_tokenize_request *r)
{
    Internvl__V1__TokenizeRequest *m = wire_alloc(p, 1, sizeof(*m));
    internvl__v1__tokenize_request__init(m);
    if (r->text) {
        m->input_case = INTERNVL__V1__TOKENIZE_REQUEST__INPUT_TEXT;
        m->text = borrow_string(r->text);
    } else if (r->prompt) {
        m->input_case = INTERNVL__V1__TOKENIZE_REQUEST__INPUT_CHAT;
        m->chat = wire_chat(p, r->prompt);
    } else {
        m->input_case = INTERNVL__V1__TOKENIZE_REQUEST__INPUT_TOKEN_IDS;
        m->token_ids = wire_token_ids(p, r->token_ids, r->n_token_ids);
    }
    if (r->skip_special_tokens) {
        m->_skip_special_tokens_case =
            INTERNVL__V1__TOKENIZE_REQUEST___SKIP_SPECIAL_TOKENS_SKIP_SPECIAL_TOKENS;
        m->skip_special_tokens = 1;
    }
    return m;
}

const ProtobufCMessage *wire_upload_first(struct wire_upload *u, const struct internvl_upload *r)
{
    memset(u, 0, sizeof(*u));
    u->request = r;
    internvl__v1__upload_media_start__init(&u->start);
    u->start.kind = r->kind == INTERNVL_VIDEO ? INTERNVL__V1__MEDIA_KIND__MEDIA_KIND_VIDEO
                                              : INTERNVL__V1__MEDIA_KIND__MEDIA_KIND_IMAGE;
    u->start._n_bytes_case = INTERNVL__V1__UPLOAD_MEDIA_START___N_BYTES_N_BYTES;
    u->start.n_bytes = r->n_bytes;
    if (r->sha256) {
        u->start._sha256_case = INTERNVL__V1__UPLOAD_MEDIA_START___SHA256_SHA256;
        u->start.sha256 = borrow_string(r->sha256);
    }
    internvl__v1__upload_media_request__init(&u->message);
    u->message.part_case = INTERNVL__V1__UPLOAD_MEDIA_REQUEST__PART_START;
    u->message.start = &u->start;
    return &u->message.base;
}

const ProtobufCMessage *wire_upload_next(void *upload)
{
    struct wire_upload *u = upload;
    size_t n = u->request->n_bytes - u->n_sent;
    if (n == 0)
        return NULL;
    n = n < CHUNK_BYTES ? n : CHUNK_BYTES;
    u->message.part_case = INTERNVL__V1__UPLOAD_MEDIA_REQUEST__PART_CHUNK;
    u->message.chunk = borrow_bytes((const uint8_t *)u->request->data + u->n_sent, n);
    u->n_sent += n;
    return &u->message.base;
}

/* ---- answers ---- */

int wire_read_upload(const Internvl__V1__UploadMediaResponse *m, struct internvl_upload_result *out,
                     struct internvl_error *err)
{
    size_t n = strlen(m->media_id);
    if (n == 0 || n >= sizeof(out->media_id))
        return rpc_error(err, INTERNVL_INTERNAL, "the server sent a media_id of %zu bytes", n);
    memcpy(out->media_id, m->media_id, n + 1);
    out->n_bytes = m->n_bytes;
    out->ttl_seconds = m->ttl_seconds;
    return 0;
}

static void read_usage(const Internvl__V1__Usage *m, struct internvl_usage *u)
{
    if (!m)
        return;
    u->prompt_tokens = m->prompt_tokens;
    u->image_tokens = m->image_tokens;
    u->completion_tokens = m->completion_tokens;
    u->cached_tokens = m->cached_tokens;
    u->tiles = m->tiles;
    u->cached_tiles = m->cached_tiles;
}

static void read_timing(const Internvl__V1__Timing *m, struct internvl_timing *t)
{
    if (!m)
        return;
    t->queue_us = m->queue_us;
    t->media_us = m->media_us;
    t->vision_us = m->vision_us;
    t->prefill_us = m->prefill_us;
    t->first_token_us = m->first_token_us;
    t->total_us = m->total_us;
    t->preemptions = m->preemptions;
}

static void read_media(Internvl__V1__MediaPlan *const *m, size_t n, struct internvl_media_plan *out)
{
    for (size_t i = 0; i < n; i++) {
        out[i].width = m[i]->width;
        out[i].height = m[i]->height;
        out[i].grid_columns = m[i]->grid_columns;
        out[i].grid_rows = m[i]->grid_rows;
        out[i].tiles = m[i]->tiles;
        out[i].tokens = m[i]->tokens;
    }
}

static void read_logprob(const Internvl__V1__TokenLogprob *m, struct internvl_token_logprob *l)
{
    if (!m)
        return;
    l->token_id = m->token_id;
    l->logprob = m->logprob;
    l->rank = m->rank;
    l->token = m->token.data;
    l->n_token_bytes = m->token.len;
}

static const struct internvl_position_logprobs *
read_positions(struct wire_pool *p, Internvl__V1__PositionLogprobs *const *m, size_t n)
{
    struct internvl_position_logprobs *positions = wire_alloc(p, n, sizeof(*positions));
    for (size_t i = 0; i < n; i++) {
        struct internvl_token_logprob *top = wire_alloc(p, m[i]->n_top, sizeof(*top));
        for (size_t k = 0; k < m[i]->n_top; k++)
            read_logprob(m[i]->top[k], &top[k]);
        read_logprob(m[i]->chosen, &positions[i].chosen);
        positions[i].top = top;
        positions[i].n_top = m[i]->n_top;
    }
    return positions;
}

static void read_started(struct wire_pool *p, const Internvl__V1__GenerateStarted *m,
                         struct internvl_started *s)
{
    s->request_id = m->request_id;
    s->prompt_tokens = m->prompt_tokens;
    s->image_tokens = m->image_tokens;
    s->seed = m->seed;
    struct internvl_media_plan *media = wire_alloc(p, m->n_media, sizeof(*media));
    read_media(m->media, m->n_media, media);
    s->media = media;
    s->n_media = m->n_media;
}

static void read_delta(struct wire_pool *p, const Internvl__V1__GenerateDelta *m,
                       struct internvl_delta *d)
{
    d->candidate = m->candidate;
    d->text = m->text;
    d->token_ids = m->token_ids;
    d->n_token_ids = m->n_token_ids;
    d->finish_reason = (enum internvl_finish_reason)m->finish_reason;
    d->stop_string = m->stop_string;
    d->stop_token_id =
        m->_stop_token_id_case == INTERNVL__V1__GENERATE_DELTA___STOP_TOKEN_ID_STOP_TOKEN_ID
            ? (int64_t)m->stop_token_id
            : -1;
    d->has_score = m->_score_case == INTERNVL__V1__GENERATE_DELTA___SCORE_SCORE;
    d->score = d->has_score ? m->score : 0;
    d->logprobs = read_positions(p, m->logprobs, m->n_logprobs);
    d->n_logprobs = m->n_logprobs;
}

int wire_read_event(struct wire_pool *p, const Internvl__V1__GenerateResponse *m,
                    struct internvl_event *e, struct internvl_error *err)
{
    memset(e, 0, sizeof(*e));
    switch (m->event_case) {
    case INTERNVL__V1__GENERATE_RESPONSE__EVENT_STARTED:
        e->kind = INTERNVL_STARTED;
        read_started(p, m->started, &e->started);
        return 0;
    case INTERNVL__V1__GENERATE_RESPONSE__EVENT_DELTA:
        e->kind = INTERNVL_DELTA;
        read_delta(p, m->delta, &e->delta);
        return 0;
    case INTERNVL__V1__GENERATE_RESPONSE__EVENT_DONE:
        e->kind = INTERNVL_DONE;
        read_usage(m->done->usage, &e->done.usage);
        read_timing(m->done->timing, &e->done.timing);
        return 0;
    case INTERNVL__V1__GENERATE_RESPONSE__EVENT_PROMPT_LOGPROBS:
        e->kind = INTERNVL_PROMPT;
        e->prompt.first_position = m->prompt_logprobs->first_position;
        e->prompt.n_positions = m->prompt_logprobs->n_positions;
        e->prompt.positions =
            read_positions(p, m->prompt_logprobs->positions, m->prompt_logprobs->n_positions);
        return 0;
    default:
        return rpc_error(err, INTERNVL_INTERNAL, "the server sent an event of an unknown kind");
    }
}

void wire_read_score(const Internvl__V1__ScoreResponse *m, struct internvl_score_result *out)
{
    out->n_scores = m->n_scores;
    out->scores = own(m->n_scores, sizeof(*out->scores));
    for (size_t i = 0; i < m->n_scores; i++) {
        const Internvl__V1__ContinuationScore *src = m->scores[i];
        struct internvl_score *s = &out->scores[i];
        s->n_tokens = src->n_token_ids;
        if (src->n_token_logprobs < s->n_tokens)
            s->n_tokens = src->n_token_logprobs;
        if (src->n_token_ranks < s->n_tokens)
            s->n_tokens = src->n_token_ranks;
        s->token_ranks = own_copy(src->token_ranks, s->n_tokens, sizeof(*s->token_ranks));
        s->is_greedy = src->is_greedy;
        s->token_ids = own_copy(src->token_ids, s->n_tokens, sizeof(*s->token_ids));
        s->token_logprobs = own_copy(src->token_logprobs, s->n_tokens, sizeof(float));
        s->sum_logprob = src->sum_logprob;
        s->mean_logprob = src->mean_logprob;
    }
    out->has_loss = m->_loss_case == INTERNVL__V1__SCORE_RESPONSE___LOSS_LOSS;
    out->loss = out->has_loss ? m->loss : 0;
    read_usage(m->usage, &out->usage);
    read_timing(m->timing, &out->timing);
}

void wire_read_tokenize(const Internvl__V1__TokenizeResponse *m,
                        struct internvl_tokenize_result *out)
{
    out->n_token_ids = m->n_token_ids;
    out->token_ids = own_copy(m->token_ids, m->n_token_ids, sizeof(*m->token_ids));
    out->text = own_string(m->text);
    out->n_tokens = m->n_tokens;
    out->tokens = own(m->n_tokens, sizeof(*out->tokens));
    for (size_t i = 0; i < m->n_tokens; i++) {
        out->tokens[i].n_bytes = m->tokens[i].len;
        out->tokens[i].data = own_copy(m->tokens[i].data, m->tokens[i].len, 1);
    }
    out->n_media = m->n_media;
    out->media = own(m->n_media, sizeof(*out->media));
    read_media(m->media, m->n_media, out->media);
}

static void read_limits(const Internvl__V1__Limits *m, struct internvl_limits *l)
{
    if (!m)
        return;
    l->max_message_bytes = m->max_message_bytes;
    l->max_image_pixels = m->max_image_pixels;
    l->max_media = m->max_media;
    l->max_tiles = m->max_tiles;
    l->max_frames = m->max_frames;
    l->max_model_len = m->max_model_len;
    l->max_num_seqs = m->max_num_seqs;
    l->max_num_batched_tokens = m->max_num_batched_tokens;
    l->max_queued_requests = m->max_queued_requests;
    l->max_n = m->max_n;
    l->max_logprobs = m->max_logprobs;
    l->max_stop_strings = m->max_stop_strings;
    l->max_stop_token_ids = m->max_stop_token_ids;
    l->max_logit_bias = m->max_logit_bias;
    l->max_stop_string_bytes = m->max_stop_string_bytes;
    l->max_forward_bytes = m->max_forward_bytes;
    l->max_text_bytes = m->max_text_bytes;
    l->max_continuations = m->max_continuations;
    l->max_num_beams = m->max_num_beams;
    l->max_media_bytes = m->max_media_bytes;
    l->max_uploads = m->max_uploads;
}

static void read_rank(const Internvl__V1__RankInfo *m, struct internvl_rank *r)
{
    r->rank = m->rank;
    r->role = own_string(m->role);
    r->host = own_string(m->host);
    r->device = own_string(m->device);
    r->weight_bytes = m->weight_bytes;
    r->kv_bytes = m->kv_bytes;
    r->scratch_bytes = m->scratch_bytes;
    r->rss_bytes = m->rss_bytes;
    r->load_ms = m->load_ms;
}

void wire_read_model(const Internvl__V1__GetModelResponse *m, struct internvl_model *out)
{
    out->name = own_string(m->name);
    out->version = own_string(m->version);
    out->architecture = own_string(m->architecture);
    out->dtype = own_string(m->dtype);
    out->quantization = own_string(m->quantization);
    out->kv_cache_dtype = own_string(m->kv_cache_dtype);
    out->vocab_size = m->vocab_size;
    out->text_layers = m->text_layers;
    out->vision_layers = m->vision_layers;
    out->tile_height = m->tile_height;
    out->tile_width = m->tile_width;
    out->tokens_per_tile = m->tokens_per_tile;
    out->tensor_parallel_size = m->tensor_parallel_size;
    out->pipeline_parallel_size = m->pipeline_parallel_size;
    out->vision_ranks = m->vision_ranks;
    out->page_size = m->page_size;
    out->n_ranks = m->n_ranks;
    out->ranks = own(m->n_ranks, sizeof(*out->ranks));
    for (size_t i = 0; i < m->n_ranks; i++)
        read_rank(m->ranks[i], &out->ranks[i]);
    read_limits(m->limits, &out->limits);
    if (m->load) {
        out->load.running = m->load->running;
        out->load.waiting = m->load->waiting;
        out->load.kv_pages_used = m->load->kv_pages_used;
        out->load.kv_pages = m->load->kv_pages;
        out->load.uptime_ms = m->load->uptime_ms;
    }
}

/* ---- forward ---- */

static int read_header(struct wire_forward_reader *r, const Internvl__V1__TensorHeader *m,
                       struct internvl_error *err)
{
    if (r->n_bytes_missing)
        return rpc_error(err, INTERNVL_INTERNAL, "a tensor ended %zu bytes short",
                         r->n_bytes_missing);
    if (m->n_shape > INTERNVL_MAX_DIMS || strcmp(m->dtype, "float32") != 0)
        return rpc_error(err, INTERNVL_INTERNAL, "tensor %.64s has %zu dimensions of type %.16s",
                         m->name, m->n_shape, m->dtype);
    uint64_t n_bytes = sizeof(float);
    for (size_t i = 0; i < m->n_shape; i++)
        if (__builtin_mul_overflow(n_bytes, m->shape[i], &n_bytes) || n_bytes > (1ull << 40))
            return rpc_error(err, INTERNVL_INTERNAL, "tensor %.64s is too large", m->name);
    struct internvl_forward_result *out = r->out;
    if (out->n_tensors == r->n_allocated) {
        r->n_allocated = r->n_allocated ? 2 * r->n_allocated : 16;
        struct internvl_tensor *more = own(r->n_allocated, sizeof(*more));
        if (out->n_tensors)
            memcpy(more, out->tensors, out->n_tensors * sizeof(*more));
        free(out->tensors);
        out->tensors = more;
    }
    float *data = calloc(n_bytes ? n_bytes : 1, 1);
    if (!data)
        return rpc_error(err, INTERNVL_RESOURCE_EXHAUSTED, "no memory for tensor %.64s", m->name);
    struct internvl_tensor *t = &out->tensors[out->n_tensors++];
    t->name = own_string(m->name);
    t->n_dims = (int)m->n_shape;
    for (size_t i = 0; i < m->n_shape; i++)
        t->shape[i] = m->shape[i];
    t->n_elements = n_bytes / sizeof(float);
    t->data = data;
    r->n_bytes_missing = n_bytes;
    return 0;
}

static int read_chunk(struct wire_forward_reader *r, const ProtobufCBinaryData *chunk,
                      struct internvl_error *err)
{
    if (chunk->len > r->n_bytes_missing)
        return rpc_error(err, INTERNVL_INTERNAL, "a tensor has %zu bytes too many",
                         chunk->len - r->n_bytes_missing);
    if (chunk->len == 0)
        return 0;
    struct internvl_tensor *t = &r->out->tensors[r->out->n_tensors - 1];
    uint8_t *end = (uint8_t *)(t->data + t->n_elements);
    memcpy(end - r->n_bytes_missing, chunk->data, chunk->len);
    r->n_bytes_missing -= chunk->len;
    return 0;
}

static void read_done(struct internvl_forward_result *out, const Internvl__V1__ForwardDone *m)
{
    out->has_loss = m->_loss_case == INTERNVL__V1__FORWARD_DONE___LOSS_LOSS;
    out->loss = out->has_loss ? m->loss : 0;
    out->n_token_logprobs = m->n_token_logprobs;
    out->token_logprobs = own_copy(m->token_logprobs, m->n_token_logprobs, sizeof(float));
    out->n_token_ids = m->n_token_ids;
    out->token_ids = own_copy(m->token_ids, m->n_token_ids, sizeof(uint32_t));
    read_usage(m->usage, &out->usage);
    read_timing(m->timing, &out->timing);
}

int wire_read_forward(struct wire_forward_reader *r, const Internvl__V1__ForwardResponse *m,
                      struct internvl_error *err)
{
    if (r->done)
        return rpc_error(err, INTERNVL_INTERNAL, "the server sent more after the end");
    switch (m->part_case) {
    case INTERNVL__V1__FORWARD_RESPONSE__PART_HEADER:
        return read_header(r, m->header, err);
    case INTERNVL__V1__FORWARD_RESPONSE__PART_DATA:
        return read_chunk(r, &m->data, err);
    case INTERNVL__V1__FORWARD_RESPONSE__PART_DONE:
        read_done(r->out, m->done);
        r->done = 1;
        return 0;
    default:
        return rpc_error(err, INTERNVL_INTERNAL, "the server sent a part of an unknown kind");
    }
}

int wire_forward_complete(const struct wire_forward_reader *r, struct internvl_error *err)
{
    if (r->n_bytes_missing)
        return rpc_error(err, INTERNVL_INTERNAL, "the last tensor ended %zu bytes short",
                         r->n_bytes_missing);
    if (!r->done)
        return rpc_error(err, INTERNVL_INTERNAL, "the answer ended without its last message");
    return 0;
}
