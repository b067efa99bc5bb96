/* convert: vLLM's defaults and rules; each bound is tried on both sides. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "daemon/gateway/convert.h"

#define VOCAB 100
#define IMAGE_TOKEN 90
#define FEATURES 4
#define CONTEXT 64
#define PROMPT 10

typedef Internvl__V1__SamplingParams sampling_params;

static struct model_config model(void)
{
    struct model_config m = {
        .vision = {.hidden_size = 8,
                   .n_layers = 2,
                   .n_heads = 2,
                   .image_height = 4,
                   .image_width = 4,
                   .patch_height = 1,
                   .patch_width = 1,
                   .n_channels = 3,
                   .n_patches = 16},
        .text = {.hidden_size = 8,
                 .n_layers = 3,
                 .n_heads = 2,
                 .n_kv_heads = 1,
                 .head_dim = 4,
                 .vocab_size = VOCAB},
        .image_token_id = IMAGE_TOKEN,
        .downsample_k = 2,
        .n_features_per_tile = FEATURES,
        .temperature = 0.7f,
        .top_p = 0.9f,
        .top_k = 20,
        .repetition_penalty = 1.1f,
        .max_new_tokens = 32,
    };
    return m;
}

static struct convert context(const struct model_config *m)
{
    struct convert c = {.model = m, .max_model_len = CONTEXT, .max_message_bytes = 1 << 20};

    c.limits.max_tiles = 2;
    c.limits.max_image_pixels = 1000;
    return c;
}

static enum error_code sample(const sampling_params *w, int do_sample, struct request *out)
{
    struct model_config m = model();
    struct convert c = context(&m);
    struct request *r = request_new(1 << 20);
    struct error err = {0};

    m.do_sample = do_sample;
    r->n_ids = PROMPT;
    r->ids = arena_alloc(&r->arena, PROMPT, sizeof(*r->ids));
    memset(r->ids, 0, PROMPT * sizeof(*r->ids));
    int result = convert_sampling(&c, w, r, &err);
    assert_true(result == (err.code ? -1 : 0));
    if (out)
        *out = *r;
    request_free(r);
    return err.code;
}

static void test_defaults(void **state)
{
    (void)state;
    struct request r, other;

    assert_int_equal(sample(NULL, 0, &r), ERROR_OK);
    assert_true(r.sampling.temperature == 0 && r.sampling.top_p == 1 && r.sampling.top_k == 0);
    assert_float_equal(r.sampling.repetition_penalty, 1.1f, 0);
    assert_int_equal(r.sampling.n_logprobs, -1);
    assert_int_equal(r.n, 1);
    assert_int_equal(r.max_tokens, 32);
    assert_int_equal(r.skip_special_tokens, 1);
    assert_int_equal(sample(NULL, 1, &other), ERROR_OK);
    assert_float_equal(other.sampling.temperature, 0.7f, 0);
    assert_float_equal(other.sampling.top_p, 0.9f, 0);
    assert_int_equal(other.sampling.top_k, 20);
    assert_true(r.sampling.seed != other.sampling.seed); // drawn
}

/* One field set to a value, everything else unset. */
#define TRY(field, FIELD, value)                                                                   \
    try_params(                                                                                    \
        (sampling_params){.base = empty.base,                                                      \
                          ._##field##_case = INTERNVL__V1__SAMPLING_PARAMS___##FIELD##_##FIELD,    \
                          .field = value})

static const sampling_params empty = INTERNVL__V1__SAMPLING_PARAMS__INIT;

static enum error_code try_params(sampling_params w)
{
    return sample(&w, 1, NULL);
}

static void test_ranges(void **state)
{
    (void)state;
    assert_int_equal(TRY(temperature, TEMPERATURE, 0), ERROR_OK);
    assert_int_equal(TRY(temperature, TEMPERATURE, -0.1f), ERROR_INVALID_ARGUMENT);
    assert_int_equal(TRY(temperature, TEMPERATURE, NAN), ERROR_INVALID_ARGUMENT);
    assert_int_equal(TRY(temperature, TEMPERATURE, INFINITY), ERROR_INVALID_ARGUMENT);
    assert_int_equal(TRY(top_p, TOP_P, 1), ERROR_OK);
    assert_int_equal(TRY(top_p, TOP_P, 0), ERROR_INVALID_ARGUMENT);
    assert_int_equal(TRY(top_p, TOP_P, 1.01f), ERROR_INVALID_ARGUMENT);
    assert_int_equal(TRY(min_p, MIN_P, 1), ERROR_OK);
    assert_int_equal(TRY(min_p, MIN_P, 1.5f), ERROR_INVALID_ARGUMENT);
    assert_int_equal(TRY(top_k, TOP_K, UINT32_MAX), ERROR_OK); // more than there are: off
    assert_int_equal(TRY(repetition_penalty, REPETITION_PENALTY, 0), ERROR_INVALID_ARGUMENT);
    assert_int_equal(TRY(presence_penalty, PRESENCE_PENALTY, -2), ERROR_OK);
    assert_int_equal(TRY(presence_penalty, PRESENCE_PENALTY, -2.1f), ERROR_INVALID_ARGUMENT);
    assert_int_equal(TRY(frequency_penalty, FREQUENCY_PENALTY, 2.1f), ERROR_INVALID_ARGUMENT);
    assert_int_equal(TRY(n, N, LIMIT_N), ERROR_OK);
    assert_int_equal(TRY(n, N, LIMIT_N + 1), ERROR_INVALID_ARGUMENT);
    assert_int_equal(TRY(n, N, 0), ERROR_INVALID_ARGUMENT);
    assert_int_equal(TRY(n, N, UINT32_MAX), ERROR_INVALID_ARGUMENT);
    assert_int_equal(TRY(logprobs, LOGPROBS, 20), ERROR_OK);
    assert_int_equal(TRY(logprobs, LOGPROBS, 21), ERROR_INVALID_ARGUMENT);
    assert_int_equal(TRY(prompt_logprobs, PROMPT_LOGPROBS, 20), ERROR_OK);
    assert_int_equal(TRY(prompt_logprobs, PROMPT_LOGPROBS, 21), ERROR_INVALID_ARGUMENT);
    assert_int_equal(TRY(max_tokens, MAX_TOKENS, 0), ERROR_INVALID_ARGUMENT);
    assert_int_equal(TRY(max_tokens, MAX_TOKENS, CONTEXT - PROMPT), ERROR_OK);
    assert_int_equal(TRY(max_tokens, MAX_TOKENS, CONTEXT - PROMPT + 1), ERROR_INVALID_ARGUMENT);
    assert_int_equal(TRY(max_tokens, MAX_TOKENS, UINT32_MAX), ERROR_INVALID_ARGUMENT);
    assert_int_equal(TRY(min_tokens, MIN_TOKENS, 32), ERROR_OK);
    assert_int_equal(TRY(min_tokens, MIN_TOKENS, 33), ERROR_INVALID_ARGUMENT);
}

static void test_greedy_with_n(void **state)
{
    (void)state;
    sampling_params w = empty;

    w._n_case = INTERNVL__V1__SAMPLING_PARAMS___N_N;
    w.n = 2;
    assert_int_equal(sample(&w, 1, NULL), ERROR_OK);
    assert_int_equal(sample(&w, 0, NULL), ERROR_INVALID_ARGUMENT);
}

static void test_stops(void **state)
{
    (void)state;
    char text[LIMIT_STOP_BYTES + 2];
    char *strings[LIMIT_STOP_STRINGS + 1];
    uint32_t ids[LIMIT_STOP_TOKEN_IDS + 1] = {0};
    sampling_params w = empty;

    memset(text, 'x', sizeof(text) - 1);
    text[sizeof(text) - 1] = '\0';
    for (size_t i = 0; i <= LIMIT_STOP_STRINGS; i++)
        strings[i] = "stop";
    w.stop = strings;
    w.n_stop = LIMIT_STOP_STRINGS;
    assert_int_equal(try_params(w), ERROR_OK);
    w.n_stop++;
    assert_int_equal(try_params(w), ERROR_INVALID_ARGUMENT);
    w.n_stop = 1;
    strings[0] = text + 1;
    assert_int_equal(try_params(w), ERROR_OK);
    strings[0] = text;
    assert_int_equal(try_params(w), ERROR_INVALID_ARGUMENT);
    strings[0] = "";
    assert_int_equal(try_params(w), ERROR_INVALID_ARGUMENT);
    w.n_stop = 0;
    w.stop_token_ids = ids;
    w.n_stop_token_ids = LIMIT_STOP_TOKEN_IDS;
    assert_int_equal(try_params(w), ERROR_OK);
    w.n_stop_token_ids++;
    assert_int_equal(try_params(w), ERROR_INVALID_ARGUMENT);
    w.n_stop_token_ids = 1;
    ids[0] = VOCAB;
    assert_int_equal(try_params(w), ERROR_INVALID_ARGUMENT);
}

static void test_bias(void **state)
{
    (void)state;
    Internvl__V1__LogitBias b = INTERNVL__V1__LOGIT_BIAS__INIT;
    Internvl__V1__LogitBias *pointers[LIMIT_LOGIT_BIAS + 1];
    sampling_params w = empty;

    for (size_t i = 0; i <= LIMIT_LOGIT_BIAS; i++)
        pointers[i] = &b;
    b.token_id = VOCAB - 1;
    b.bias = -100;
    w.logit_bias = pointers;
    w.n_logit_bias = LIMIT_LOGIT_BIAS;
    assert_int_equal(try_params(w), ERROR_OK);
    w.n_logit_bias++;
    assert_int_equal(try_params(w), ERROR_INVALID_ARGUMENT);
    w.n_logit_bias = 1;
    b.bias = NAN;
    assert_int_equal(try_params(w), ERROR_INVALID_ARGUMENT);
    b.bias = 0;
    b.token_id = VOCAB;
    assert_int_equal(try_params(w), ERROR_INVALID_ARGUMENT);
}

static void test_request_id(void **state)
{
    (void)state;
    char id[65], other[65];
    char name[66];

    memset(name, 'a', 65);
    name[65] = '\0';
    assert_int_equal(convert_request_id("", id, NULL), 0);
    assert_int_equal(convert_request_id("", other, NULL), 0);
    assert_string_not_equal(id, other);
    assert_int_equal(convert_request_id("A-b_c.9", id, NULL), 0);
    assert_string_equal(id, "A-b_c.9");
    assert_int_equal(convert_request_id(name + 1, id, NULL), 0);
    assert_int_equal(convert_request_id(name, id, NULL), -1);
    assert_int_equal(convert_request_id("a b", id, NULL), -1);
    assert_int_equal(convert_request_id("\xc3\xa9", id, NULL), -1);
}

/* ---- token prompts ---- */

struct tokens {
    Internvl__V1__TokenPrompt prompt;
    Internvl__V1__Tensor pixels;
    uint32_t ids[CONTEXT];
    uint64_t shape[4];
    float data[2 * 3 * 4 * 4];
};

static void tokens_init(struct tokens *t)
{
    internvl__v1__token_prompt__init(&t->prompt);
    internvl__v1__tensor__init(&t->pixels);
    t->prompt.token_ids = t->ids;
    t->prompt.n_token_ids = PROMPT;
    memset(t->ids, 0, sizeof(t->ids));
    for (size_t i = 1; i <= FEATURES; i++)
        t->ids[i] = IMAGE_TOKEN;
    memcpy(t->shape, (uint64_t[]){1, 3, 4, 4}, sizeof(t->shape));
    t->pixels.shape = t->shape;
    t->pixels.n_shape = 4;
    t->pixels.dtype = "float32";
    t->pixels.data.data = (uint8_t *)t->data;
    t->pixels.data.len = 3 * 4 * 4 * sizeof(float);
    t->prompt.pixel_values = &t->pixels;
}

static enum error_code convert_tokens(const struct tokens *t, struct request *out)
{
    struct model_config m = model();
    struct convert c = context(&m);
    struct request *r = request_new(1 << 20);
    struct error err = {0};

    convert_token_prompt(&c, &t->prompt, r, &err);
    if (out)
        *out = *r;
    request_free(r);
    return err.code;
}

static void test_token_prompt(void **state)
{
    (void)state;
    struct tokens t;
    struct request r;

    tokens_init(&t);
    assert_int_equal(convert_tokens(&t, &r), ERROR_OK);
    assert_int_equal(r.n_tiles, 1);
    assert_int_equal(r.n_image_tokens, FEATURES);
    assert_int_equal(r.pixel_dtype, DTYPE_F32);
    t.prompt.pixel_values = NULL; // image tokens are then ordinary ones
    assert_int_equal(convert_tokens(&t, &r), ERROR_OK);
    assert_int_equal(r.image_token_id, -1);
    assert_int_equal(r.n_image_tokens, 0);
    t.prompt.n_token_ids = CONTEXT - 1;
    assert_int_equal(convert_tokens(&t, NULL), ERROR_OK);
    t.prompt.n_token_ids = CONTEXT;
    assert_int_equal(convert_tokens(&t, NULL), ERROR_INVALID_ARGUMENT);
    t.prompt.n_token_ids = 0;
    assert_int_equal(convert_tokens(&t, NULL), ERROR_INVALID_ARGUMENT);
    t.prompt.n_token_ids = 1;
    t.ids[0] = VOCAB;
    assert_int_equal(convert_tokens(&t, NULL), ERROR_INVALID_ARGUMENT);
}

static void test_pixels(void **state)
{
    (void)state;
    struct tokens t;

    tokens_init(&t);
    t.pixels.data.len -= 1;
    assert_int_equal(convert_tokens(&t, NULL), ERROR_INVALID_ARGUMENT);
    tokens_init(&t);
    t.pixels.dtype = "float16";
    assert_int_equal(convert_tokens(&t, NULL), ERROR_INVALID_ARGUMENT);
    tokens_init(&t);
    t.pixels.n_shape = 3;
    assert_int_equal(convert_tokens(&t, NULL), ERROR_INVALID_ARGUMENT);
    tokens_init(&t);
    t.shape[0] = 3; // past max_tiles
    assert_int_equal(convert_tokens(&t, NULL), ERROR_INVALID_ARGUMENT);
    tokens_init(&t);
    t.shape[0] = (uint64_t)1 << 62;
    assert_int_equal(convert_tokens(&t, NULL), ERROR_INVALID_ARGUMENT);
    tokens_init(&t);
    t.shape[1] = 1;
    assert_int_equal(convert_tokens(&t, NULL), ERROR_INVALID_ARGUMENT);
    for (int i = 1; i < 4; i++) {
        tokens_init(&t);
        t.shape[i] = (uint64_t)1 << 33;
        assert_int_equal(convert_tokens(&t, NULL), ERROR_INVALID_ARGUMENT);
        t.shape[i] = 0;
        assert_int_equal(convert_tokens(&t, NULL), ERROR_INVALID_ARGUMENT);
    }
    tokens_init(&t);
    t.ids[9] = IMAGE_TOKEN; // one more than the tile has features
    assert_int_equal(convert_tokens(&t, NULL), ERROR_INVALID_ARGUMENT);
}

static void test_pixels_of_another_size(void **state)
{
    (void)state;
    struct tokens t;
    struct request r;

    tokens_init(&t);
    assert_int_equal(convert_tokens(&t, &r), ERROR_OK);
    assert_int_equal(r.n_features_per_tile, -1); // the model's
    t.shape[2] = t.shape[3] = 2;
    t.pixels.data.len = 3 * 2 * 2 * sizeof(float);
    assert_int_equal(convert_tokens(&t, &r), ERROR_INVALID_ARGUMENT); // one token, not four
    memset(t.ids, 0, sizeof(t.ids));
    t.ids[3] = IMAGE_TOKEN;
    assert_int_equal(convert_tokens(&t, &r), ERROR_OK);
    assert_int_equal(r.n_features_per_tile, 1);
    assert_int_equal(r.height, 2);
    t.shape[3] = 1; // two patches are no square: no tokens
    t.pixels.data.len = 3 * 2 * sizeof(float);
    assert_int_equal(convert_tokens(&t, &r), ERROR_INVALID_ARGUMENT);
    t.ids[3] = 0;
    assert_int_equal(convert_tokens(&t, &r), ERROR_OK);
    assert_int_equal(r.n_features_per_tile, 0);
}

/* ---- Forward ---- */

static enum error_code forward(const Internvl__V1__ForwardRequest *w, int n_tiles, uint8_t *want,
                               int32_t *targets, uint32_t *captures)
{
    struct model_config m = model();
    struct convert c = context(&m);
    struct request *r = request_new(1 << 20);
    struct error err = {0};
    uint32_t outputs;

    r->n_ids = PROMPT;
    r->n_tiles = n_tiles;
    if (!convert_forward(&c, w, r, &outputs, &err)) {
        if (want)
            memcpy(want, r->want_logits, PROMPT);
        if (targets)
            memcpy(targets, r->targets, PROMPT * sizeof(*targets));
        if (captures)
            *captures = r->captures;
    }
    request_free(r);
    return err.code;
}

static void test_outputs(void **state)
{
    (void)state;
    Internvl__V1__ForwardRequest w = INTERNVL__V1__FORWARD_REQUEST__INIT;
    char *names[] = {"last_hidden_state", "past_key_values", "inputs_embeds", "attentions"};
    char *wrong[] = {"logit"};
    char *vision[] = {"vision.layer0"};
    uint32_t captures;

    w.outputs = names;
    w.n_outputs = 4;
    assert_int_equal(forward(&w, 0, NULL, NULL, &captures), ERROR_OK);
    assert_int_equal(captures, CAPTURE_LAST_HIDDEN_STATE | CAPTURE_CACHE | CAPTURE_EMBEDS |
                                   CAPTURE_ATTENTIONS);
    w.outputs = wrong;
    w.n_outputs = 1;
    assert_int_equal(forward(&w, 0, NULL, NULL, NULL), ERROR_INVALID_ARGUMENT);
    w.outputs = vision;
    assert_int_equal(forward(&w, 0, NULL, NULL, NULL), ERROR_INVALID_ARGUMENT);
    assert_int_equal(forward(&w, 1, NULL, NULL, NULL), ERROR_OK);
}

static void test_rows(void **state)
{
    (void)state;
    Internvl__V1__ForwardRequest w = INTERNVL__V1__FORWARD_REQUEST__INIT;
    char *names[] = {"logits"};
    uint32_t positions[] = {0, 5, 9};
    uint8_t want[PROMPT];

    w.outputs = names;
    w.n_outputs = 1;
    assert_int_equal(forward(&w, 0, want, NULL, NULL), ERROR_OK);
    assert_true(want[0] && want[9]);
    w._logits_to_keep_case = INTERNVL__V1__FORWARD_REQUEST___LOGITS_TO_KEEP_LOGITS_TO_KEEP;
    w.logits_to_keep = 3;
    assert_int_equal(forward(&w, 0, want, NULL, NULL), ERROR_OK);
    assert_true(!want[6] && want[7] && want[9]);
    w.logits_to_keep = UINT32_MAX;
    assert_int_equal(forward(&w, 0, want, NULL, NULL), ERROR_OK);
    assert_true(want[0]);
    w.logits_positions = positions;
    w.n_logits_positions = 3;
    assert_int_equal(forward(&w, 0, want, NULL, NULL), ERROR_INVALID_ARGUMENT); // both
    w._logits_to_keep_case = 0;
    assert_int_equal(forward(&w, 0, want, NULL, NULL), ERROR_OK);
    assert_true(want[0] && !want[1] && want[5] && want[9]);
    positions[2] = 5; // twice
    assert_int_equal(forward(&w, 0, want, NULL, NULL), ERROR_INVALID_ARGUMENT);
    positions[2] = PROMPT;
    assert_int_equal(forward(&w, 0, want, NULL, NULL), ERROR_INVALID_ARGUMENT);
}

static void test_labels(void **state)
{
    (void)state;
    Internvl__V1__ForwardRequest w = INTERNVL__V1__FORWARD_REQUEST__INIT;
    int32_t labels[PROMPT] = {7, -100, 3, 4, 5, 6, 7, 8, 9, 99};
    int32_t targets[PROMPT];

    w.labels = labels;
    w.n_labels = PROMPT;
    assert_int_equal(forward(&w, 0, NULL, targets, NULL), ERROR_OK);
    assert_int_equal(targets[0], -1);
    assert_int_equal(targets[1], 3);
    assert_int_equal(targets[8], 99);
    assert_int_equal(targets[9], -1);
    labels[4] = VOCAB;
    assert_int_equal(forward(&w, 0, NULL, NULL, NULL), ERROR_INVALID_ARGUMENT);
    labels[4] = -1;
    assert_int_equal(forward(&w, 0, NULL, NULL, NULL), ERROR_INVALID_ARGUMENT);
    labels[4] = 0;
    w.n_labels--;
    assert_int_equal(forward(&w, 0, NULL, NULL, NULL), ERROR_INVALID_ARGUMENT);
}

/* ---- bool_masked_pos ---- */

/* Two tiles of 16 patches each, `n` bytes of mask. The mask kept is checked byte by byte. */
static enum error_code mask(size_t n, int n_tiles, int use_mask_token)
{
    Internvl__V1__ForwardRequest w = INTERNVL__V1__FORWARD_REQUEST__INIT;
    uint8_t bytes[33] = {[0] = 1, [15] = 255, [31] = 2};
    struct model_config m = model();
    struct convert c = context(&m);
    struct request *r = request_new(1 << 20);
    struct error err = {0};
    uint32_t outputs;

    m.vision.use_mask_token = use_mask_token;
    r->n_ids = PROMPT;
    r->n_tiles = n_tiles;
    r->height = r->width = 4;
    w.bool_masked_pos.data = bytes;
    w.bool_masked_pos.len = n;
    int result = convert_forward(&c, &w, r, &outputs, &err);
    assert_int_equal(result, err.code ? -1 : 0);
    if (result == 0 && n > 0) {
        assert_int_equal(r->n_mask, 16);
        for (size_t i = 0; i < n; i++)
            assert_int_equal(r->mask[i], bytes[i] != 0);
    } else {
        assert_null(r->mask);
    }
    request_free(r);
    return err.code;
}

static void test_mask(void **state)
{
    (void)state;
    assert_int_equal(mask(32, 2, 1), ERROR_OK);
    assert_int_equal(mask(16, 1, 1), ERROR_OK);
    assert_int_equal(mask(31, 2, 1), ERROR_INVALID_ARGUMENT);
    assert_int_equal(mask(33, 2, 1), ERROR_INVALID_ARGUMENT);
    assert_int_equal(mask(16, 2, 1), ERROR_INVALID_ARGUMENT); // one tile's, for two
    assert_int_equal(mask(16, 0, 1), ERROR_INVALID_ARGUMENT); // no picture
    assert_int_equal(mask(32, 2, 0), ERROR_INVALID_ARGUMENT); // no mask token in the model
    assert_int_equal(mask(0, 2, 0), ERROR_OK);
}

/* ---- conversations ---- */

/* One picture is known. */
static int find_media(void *state, const char *id, enum part_kind kind, struct media_bytes *out,
                      struct error *err)
{
    (void)state;
    if (strcmp(id, "known") != 0 || kind != PART_IMAGE)
        return error_set(err, ERROR_NOT_FOUND, "%s", id);
    *out = (struct media_bytes){(const uint8_t *)"picture", 7};
    return 0;
}

static const struct media_source media = {find_media, NULL};

/* A chat of one part. */
static enum error_code read_part(Internvl__V1__ContentPart *part, struct content_part *out)
{
    Internvl__V1__ChatPrompt chat = INTERNVL__V1__CHAT_PROMPT__INIT;
    Internvl__V1__Message message = INTERNVL__V1__MESSAGE__INIT;
    Internvl__V1__Message *messages[] = {&message};
    struct conversation c;
    struct error err = {0};
    struct arena a;

    chat.messages = messages;
    chat.n_messages = 1;
    message.role = "user";
    message.parts = &part;
    message.n_parts = 1;
    arena_init(&a, 1 << 16);
    if (convert_conversation(&chat, &media, &a, &c, &err) == 0)
        *out = c.messages[0].parts[0];
    arena_release(&a);
    return err.code;
}

/* data, frames, media_id: exactly one of them. */
static void test_media_id(void **state)
{
    (void)state;
    Internvl__V1__ContentPart image_part = INTERNVL__V1__CONTENT_PART__INIT;
    Internvl__V1__ContentPart video_part = INTERNVL__V1__CONTENT_PART__INIT;
    Internvl__V1__ImagePart image = INTERNVL__V1__IMAGE_PART__INIT;
    Internvl__V1__VideoPart video = INTERNVL__V1__VIDEO_PART__INIT;
    ProtobufCBinaryData data = {1, (uint8_t *)"x"};
    struct content_part out;

    image_part.part_case = INTERNVL__V1__CONTENT_PART__PART_IMAGE;
    image_part.image = &image;
    video_part.part_case = INTERNVL__V1__CONTENT_PART__PART_VIDEO;
    video_part.video = &video;
    image._media_id_case = INTERNVL__V1__IMAGE_PART___MEDIA_ID_MEDIA_ID;
    image.media_id = "known";
    assert_int_equal(read_part(&image_part, &out), ERROR_OK);
    assert_int_equal(out.n_bytes, 7);
    assert_memory_equal(out.bytes, "picture", 7);
    image.data = data;
    assert_int_equal(read_part(&image_part, &out), ERROR_INVALID_ARGUMENT);
    image.data.len = 0;
    image.media_id = "";
    assert_int_equal(read_part(&image_part, &out), ERROR_NOT_FOUND);
    video._media_id_case = INTERNVL__V1__VIDEO_PART___MEDIA_ID_MEDIA_ID;
    video.media_id = "known";
    assert_int_equal(read_part(&video_part, &out), ERROR_NOT_FOUND); // not as a video
    video.frames = &data;
    video.n_frames = 1;
    assert_int_equal(read_part(&video_part, &out), ERROR_INVALID_ARGUMENT);
    video._media_id_case = 0;
    assert_int_equal(read_part(&video_part, &out), ERROR_OK);
    video.data = data;
    assert_int_equal(read_part(&video_part, &out), ERROR_INVALID_ARGUMENT);
}

static void test_conversation(void **state)
{
    (void)state;
    Internvl__V1__ChatPrompt chat = INTERNVL__V1__CHAT_PROMPT__INIT;
    Internvl__V1__Message message = INTERNVL__V1__MESSAGE__INIT;
    Internvl__V1__Message *messages[] = {&message};
    Internvl__V1__ContentPart part = INTERNVL__V1__CONTENT_PART__INIT;
    Internvl__V1__ContentPart *parts[] = {&part};
    Internvl__V1__ImagePart image = INTERNVL__V1__IMAGE_PART__INIT;
    struct conversation c;
    struct error err = {0};
    struct arena a;

    arena_init(&a, 1 << 16);
    assert_int_equal(convert_conversation(&chat, &media, &a, &c, &err), -1); // no messages
    chat.messages = messages;
    chat.n_messages = 1;
    message.role = "user";
    message.parts = parts;
    message.n_parts = 1;
    assert_int_equal(convert_conversation(&chat, &media, &a, &c, &err), -1); // a part of no kind
    part.part_case = INTERNVL__V1__CONTENT_PART__PART_IMAGE;
    part.image = &image;
    assert_int_equal(convert_conversation(&chat, &media, &a, &c, &err), -1); // no data
    image.data.data = (uint8_t *)"x";
    image.data.len = 1;
    assert_int_equal(convert_conversation(&chat, &media, &a, &c, &err), 0);
    assert_int_equal(c.messages[0].parts[0].kind, PART_IMAGE);
    assert_int_equal(c.messages[0].parts[0].tiling.max_patches, -1);
    arena_release(&a);
    arena_init(&a, 16); // no room
    assert_int_equal(convert_conversation(&chat, &media, &a, &c, &err), -1);
    assert_int_equal(err.code, ERROR_RESOURCE_EXHAUSTED);
    arena_release(&a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_ranges),
        cmocka_unit_test(test_greedy_with_n),
        cmocka_unit_test(test_stops),
        cmocka_unit_test(test_bias),
        cmocka_unit_test(test_request_id),
        cmocka_unit_test(test_token_prompt),
        cmocka_unit_test(test_pixels),
        cmocka_unit_test(test_pixels_of_another_size),
        cmocka_unit_test(test_outputs),
        cmocka_unit_test(test_rows),
        cmocka_unit_test(test_labels),
        cmocka_unit_test(test_mask),
        cmocka_unit_test(test_media_id),
        cmocka_unit_test(test_conversation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
