/* The client's structs to wire messages and back; answers that make no sense are INTERNAL. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "client/wire.h"

/* Packs and unpacks, so that what is checked is what a server would see. */
static void *over_the_wire(const ProtobufCMessage *m)
{
    size_t n = protobuf_c_message_get_packed_size(m);
    uint8_t *bytes = malloc(n + 1);
    assert_int_equal(protobuf_c_message_pack(m, bytes), n);
    void *copy = protobuf_c_message_unpack(m->descriptor, NULL, n, bytes);
    free(bytes);
    assert_non_null(copy);
    return copy;
}

static void test_unset_is_not_zero(void **state)
{
    (void)state;
    struct wire_pool pool = {0};
    struct internvl_generate_request r = {0};
    Internvl__V1__GenerateRequest *m = over_the_wire(&wire_generate(&pool, &r)->base);
    assert_string_equal(m->cache_salt, "");
    assert_int_equal(m->sampling->_temperature_case, 0);
    assert_int_equal(m->sampling->_seed_case, 0);
    assert_int_equal(m->sampling->_logprobs_case, 0);
    assert_int_equal(m->prompt->input_case, INTERNVL__V1__PROMPT__INPUT_TOKENS);
    internvl__v1__generate_request__free_unpacked(m, NULL);

    r.sampling.set = INTERNVL_TEMPERATURE | INTERNVL_SEED | INTERNVL_LOGPROBS;
    m = over_the_wire(&wire_generate(&pool, &r)->base);
    assert_int_equal(m->sampling->_temperature_case,
                     INTERNVL__V1__SAMPLING_PARAMS___TEMPERATURE_TEMPERATURE);
    assert_true(m->sampling->temperature == 0.0f);
    assert_int_equal(m->sampling->_seed_case, INTERNVL__V1__SAMPLING_PARAMS___SEED_SEED);
    assert_int_equal(m->sampling->_logprobs_case,
                     INTERNVL__V1__SAMPLING_PARAMS___LOGPROBS_LOGPROBS);
    assert_int_equal(m->sampling->_top_p_case, 0);
    internvl__v1__generate_request__free_unpacked(m, NULL);
    wire_pool_release(&pool);
}

static void test_sampling_fields(void **state)
{
    (void)state;
    struct wire_pool pool = {0};
    const char *stop[] = {"END", "\n"};
    const uint32_t stop_ids[] = {7, 8};
    const struct internvl_logit_bias bias[] = {{5, -1.5f}};
    struct internvl_generate_request r = {
        .request_id = "abc",
        .priority = -3,
        .cache_salt = "mine",
        .sampling = {.set = 0x1fff | INTERNVL_PROMPT_LOGPROBS,
                     .temperature = 0.5f,
                     .top_p = 0.25f,
                     .top_k = 40,
                     .min_p = 0.125f,
                     .repetition_penalty = 1.5f,
                     .presence_penalty = -1,
                     .frequency_penalty = 2,
                     .seed = UINT64_MAX,
                     .n = 4,
                     .max_tokens = 9,
                     .min_tokens = 2,
                     .skip_special_tokens = 0,
                     .logprobs = 3,
                     .prompt_logprobs = 4,
                     .ignore_eos = 1,
                     .include_stop_str_in_output = 1,
                     .stop = stop,
                     .n_stop = 2,
                     .stop_token_ids = stop_ids,
                     .n_stop_token_ids = 2,
                     .logit_bias = bias,
                     .n_logit_bias = 1},
    };
    Internvl__V1__GenerateRequest *m = over_the_wire(&wire_generate(&pool, &r)->base);
    Internvl__V1__SamplingParams *s = m->sampling;
    assert_string_equal(m->request_id, "abc");
    assert_int_equal(m->priority, -3);
    assert_string_equal(m->cache_salt, "mine");
    assert_true(s->temperature == 0.5f && s->top_p == 0.25f && s->min_p == 0.125f);
    assert_true(s->repetition_penalty == 1.5f && s->presence_penalty == -1);
    assert_true(s->frequency_penalty == 2 && s->seed == UINT64_MAX);
    assert_int_equal(s->top_k, 40);
    assert_int_equal(s->n, 4);
    assert_int_equal(s->max_tokens, 9);
    assert_int_equal(s->min_tokens, 2);
    assert_int_equal(s->logprobs, 3);
    assert_int_equal(s->prompt_logprobs, 4);
    assert_int_equal(s->_skip_special_tokens_case,
                     INTERNVL__V1__SAMPLING_PARAMS___SKIP_SPECIAL_TOKENS_SKIP_SPECIAL_TOKENS);
    assert_false(s->skip_special_tokens);
    assert_true(s->ignore_eos && s->include_stop_str_in_output);
    assert_int_equal(s->n_stop, 2);
    assert_string_equal(s->stop[1], "\n");
    assert_int_equal(s->stop_token_ids[1], 8);
    assert_int_equal(s->logit_bias[0]->token_id, 5);
    assert_true(s->logit_bias[0]->bias == -1.5f);
    internvl__v1__generate_request__free_unpacked(m, NULL);
    wire_pool_release(&pool);
}

static void test_prompt_parts(void **state)
{
    (void)state;
    struct wire_pool pool = {0};
    const uint8_t file[] = {0, 1, 0, 2};
    const struct internvl_part parts[] = {
        {.kind = INTERNVL_IMAGE,
         .data = file,
         .n_bytes = 4,
         .tiling = {.set = INTERNVL_CROP_TO_PATCHES | INTERNVL_MAX_PATCHES, .max_patches = 4}},
        {.kind = INTERNVL_VIDEO, .data = file, .n_bytes = 2, .video = {INTERNVL_FPS, 0, 2.5, 0, 0}},
        {.kind = INTERNVL_TEXT, .text = "hé"},
    };
    const struct internvl_message messages[] = {{"user", parts, 3}};
    struct internvl_generate_request r = {
        .prompt = {.messages = messages, .n_messages = 1, .continue_final_message = 1}};
    Internvl__V1__GenerateRequest *m = over_the_wire(&wire_generate(&pool, &r)->base);
    Internvl__V1__ChatPrompt *chat = m->prompt->chat;
    assert_true(chat->continue_final_message);
    assert_int_equal(chat->messages[0]->n_parts, 3);
    Internvl__V1__ImagePart *image = chat->messages[0]->parts[0]->image;
    assert_int_equal(image->data.len, 4);
    assert_memory_equal(image->data.data, file, 4);
    assert_int_equal(image->tiling->max_patches, 4);
    assert_int_equal(image->tiling->_min_patches_case, 0);
    assert_int_not_equal(image->tiling->_crop_to_patches_case, 0);
    assert_false(image->tiling->crop_to_patches);
    assert_true(chat->messages[0]->parts[1]->video->fps == 2.5);
    assert_string_equal(chat->messages[0]->parts[2]->text, "hé");
    internvl__v1__generate_request__free_unpacked(m, NULL);
    wire_pool_release(&pool);
}

static void test_token_prompt_with_pixels(void **state)
{
    (void)state;
    struct wire_pool pool = {0};
    const uint32_t ids[] = {1, 300000};
    const float pixels[12] = {[11] = 2.5f};
    struct internvl_forward_request r = {.prompt = {.token_ids = ids,
                                                    .n_token_ids = 2,
                                                    .pixel_values = pixels,
                                                    .pixel_shape = {1, 3, 2, 2}}};
    Internvl__V1__ForwardRequest *m = over_the_wire(&wire_forward(&pool, &r)->base);
    assert_int_equal(m->prompt->tokens->token_ids[1], 300000);
    assert_int_equal(m->prompt->tokens->pixel_values->n_shape, 4);
    assert_int_equal(m->prompt->tokens->pixel_values->data.len, sizeof(pixels));
    assert_memory_equal(m->prompt->tokens->pixel_values->data.data, pixels, sizeof(pixels));
    internvl__v1__forward_request__free_unpacked(m, NULL);
    wire_pool_release(&pool);
}

static void test_events(void **state)
{
    (void)state;
    struct wire_pool pool = {0};
    struct internvl_event e;
    struct internvl_error err = {0};
    Internvl__V1__GenerateResponse m = INTERNVL__V1__GENERATE_RESPONSE__INIT;
    assert_int_equal(wire_read_event(&pool, &m, &e, &err), -1);
    assert_int_equal(err.code, INTERNVL_INTERNAL);

    Internvl__V1__GenerateDelta delta = INTERNVL__V1__GENERATE_DELTA__INIT;
    m.event_case = INTERNVL__V1__GENERATE_RESPONSE__EVENT_DELTA;
    m.delta = &delta;
    assert_int_equal(wire_read_event(&pool, &m, &e, &err), 0);
    assert_int_equal(e.kind, INTERNVL_DELTA);
    assert_string_equal(e.delta.text, "");
    assert_true(e.delta.stop_token_id == -1);

    uint8_t half[] = {0xe4, 0xbd};
    Internvl__V1__TokenLogprob chosen = INTERNVL__V1__TOKEN_LOGPROB__INIT;
    chosen.token_id = 9;
    chosen.logprob = -0.75f;
    chosen.rank = 2;
    chosen.token.len = 2;
    chosen.token.data = half;
    Internvl__V1__TokenLogprob *top[] = {&chosen};
    Internvl__V1__PositionLogprobs position = INTERNVL__V1__POSITION_LOGPROBS__INIT;
    position.chosen = &chosen;
    position.top = top;
    position.n_top = 1;
    Internvl__V1__PositionLogprobs *positions[] = {&position};
    delta.logprobs = positions;
    delta.n_logprobs = 1;
    delta._stop_token_id_case = INTERNVL__V1__GENERATE_DELTA___STOP_TOKEN_ID_STOP_TOKEN_ID;
    delta.stop_token_id = 0;
    assert_int_equal(wire_read_event(&pool, &m, &e, &err), 0);
    assert_true(e.delta.stop_token_id == 0);
    assert_int_equal(e.delta.n_logprobs, 1);
    assert_true(e.delta.logprobs[0].top[0].logprob == -0.75f);
    assert_int_equal(e.delta.logprobs[0].chosen.n_token_bytes, 2);

    Internvl__V1__PromptLogprobs prompt = INTERNVL__V1__PROMPT_LOGPROBS__INIT;
    prompt.first_position = 7;
    prompt.positions = positions;
    prompt.n_positions = 1;
    m.event_case = INTERNVL__V1__GENERATE_RESPONSE__EVENT_PROMPT_LOGPROBS;
    m.prompt_logprobs = &prompt;
    assert_int_equal(wire_read_event(&pool, &m, &e, &err), 0);
    assert_int_equal(e.kind, INTERNVL_PROMPT);
    assert_int_equal(e.prompt.first_position, 7);
    assert_int_equal(e.prompt.positions[0].chosen.rank, 2);
    assert_int_equal(e.prompt.positions[0].n_top, 1);

    Internvl__V1__GenerateDone done = INTERNVL__V1__GENERATE_DONE__INIT; // no usage, no timing
    m.event_case = INTERNVL__V1__GENERATE_RESPONSE__EVENT_DONE;
    m.done = &done;
    assert_int_equal(wire_read_event(&pool, &m, &e, &err), 0);
    assert_int_equal(e.done.usage.prompt_tokens, 0);
    wire_pool_release(&pool);
}

/* ---- forward's stream ---- */

static int feed_header(struct wire_forward_reader *r, const uint64_t *shape, size_t n_shape,
                       const char *dtype, struct internvl_error *err)
{
    Internvl__V1__TensorHeader header = INTERNVL__V1__TENSOR_HEADER__INIT;
    header.name = (char *)"logits";
    header.dtype = (char *)dtype;
    header.shape = (uint64_t *)shape;
    header.n_shape = n_shape;
    Internvl__V1__ForwardResponse m = INTERNVL__V1__FORWARD_RESPONSE__INIT;
    m.part_case = INTERNVL__V1__FORWARD_RESPONSE__PART_HEADER;
    m.header = &header;
    return wire_read_forward(r, &m, err);
}

static int feed_data(struct wire_forward_reader *r, const void *bytes, size_t n,
                     struct internvl_error *err)
{
    Internvl__V1__ForwardResponse m = INTERNVL__V1__FORWARD_RESPONSE__INIT;
    m.part_case = INTERNVL__V1__FORWARD_RESPONSE__PART_DATA;
    m.data.data = (uint8_t *)bytes;
    m.data.len = n;
    return wire_read_forward(r, &m, err);
}

static int feed_done(struct wire_forward_reader *r, struct internvl_error *err)
{
    Internvl__V1__ForwardDone done = INTERNVL__V1__FORWARD_DONE__INIT;
    Internvl__V1__ForwardResponse m = INTERNVL__V1__FORWARD_RESPONSE__INIT;
    m.part_case = INTERNVL__V1__FORWARD_RESPONSE__PART_DONE;
    m.done = &done;
    done._loss_case = INTERNVL__V1__FORWARD_DONE___LOSS_LOSS;
    done.loss = 0.5;
    return wire_read_forward(r, &m, err);
}

static void test_forward_gathers(void **state)
{
    (void)state;
    struct internvl_forward_result out = {0};
    struct wire_forward_reader r = {.out = &out};
    struct internvl_error err = {0};
    const float x[6] = {0, 1, 2, 3, 4, 5};
    const uint64_t shape[] = {2, 3}, empty[] = {0, 3};
    for (int i = 0; i < 40; i++) { // more than the first allocation holds
        assert_int_equal(feed_header(&r, shape, 2, "float32", &err), 0);
        assert_int_equal(feed_data(&r, x, 5, &err), 0);
        assert_int_equal(feed_data(&r, (const char *)x + 5, sizeof(x) - 5, &err), 0);
    }
    assert_int_equal(feed_header(&r, empty, 2, "float32", &err), 0);
    assert_int_equal(wire_forward_complete(&r, &err), -1); // no done yet
    assert_int_equal(feed_done(&r, &err), 0);
    assert_int_equal(wire_forward_complete(&r, &err), 0);
    assert_int_equal(out.n_tensors, 41);
    assert_memory_equal(out.tensors[39].data, x, sizeof(x));
    assert_int_equal(out.tensors[40].n_elements, 0);
    assert_true(out.has_loss && out.loss == 0.5);
    assert_int_equal(feed_done(&r, &err), -1); // more after the end
    internvl_forward_result_release(&out);
}

static void test_forward_refuses(void **state)
{
    (void)state;
    struct internvl_forward_result out = {0};
    struct wire_forward_reader r = {.out = &out};
    struct internvl_error err = {0};
    const float x[8] = {0};
    const uint64_t shape[] = {2, 3}, huge[] = {1ull << 40, 1ull << 40};
    assert_int_equal(feed_data(&r, x, 4, &err), -1); // no tensor yet
    assert_int_equal(feed_header(&r, huge, 2, "float32", &err), -1);
    assert_int_equal(feed_header(&r, shape, 2, "float16", &err), -1);
    assert_int_equal(feed_header(&r, shape, 2, "float32", &err), 0);
    assert_int_equal(feed_data(&r, x, 28, &err), -1); // too long
    assert_int_equal(feed_data(&r, x, 20, &err), 0);
    assert_int_equal(feed_header(&r, shape, 2, "float32", &err), -1); // too short
    assert_int_equal(feed_done(&r, &err), 0);
    assert_int_equal(wire_forward_complete(&r, &err), -1);
    assert_int_equal(err.code, INTERNVL_INTERNAL);
    internvl_forward_result_release(&out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_unset_is_not_zero),
        cmocka_unit_test(test_sampling_fields),
        cmocka_unit_test(test_prompt_parts),
        cmocka_unit_test(test_token_prompt_with_pixels),
        cmocka_unit_test(test_events),
        cmocka_unit_test(test_forward_gathers),
        cmocka_unit_test(test_forward_refuses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
