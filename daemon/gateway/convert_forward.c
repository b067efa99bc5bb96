/*
 * ForwardRequest: which tensors are taken, of which rows, and which log-probabilities. See
 * convert.h.
 */
#include <string.h>

#include "daemon/gateway/convert.h"

#define LABEL_IGNORED (-100)

struct output_name {
    const char *name;
    enum output output;
    uint32_t captures, vision_captures;
};

static const struct output_name output_names[] = {
    {"logits", OUTPUT_LOGITS, CAPTURE_LOGITS, 0},
    {"hidden_states", OUTPUT_HIDDEN_STATES, CAPTURE_HIDDEN_STATES, 0},
    {"inputs_embeds", OUTPUT_INPUTS_EMBEDS, CAPTURE_EMBEDS, 0},
    {"image_features", OUTPUT_IMAGE_FEATURES, 0, 0},
    {"last_hidden_state", OUTPUT_LAST_HIDDEN_STATE, CAPTURE_LAST_HIDDEN_STATE, 0},
    {"past_key_values", OUTPUT_PAST_KEY_VALUES, CAPTURE_CACHE, 0},
    {"attentions", OUTPUT_ATTENTIONS, CAPTURE_ATTENTIONS, 0},
    {"vision.hidden_states", OUTPUT_VISION_HIDDEN_STATES, 0, VISION_CAPTURE_HIDDEN_STATES},
    {"vision.last_hidden_state", OUTPUT_VISION_LAST_HIDDEN_STATE, 0, VISION_CAPTURE_LAST},
    {"vision.pooler_output", OUTPUT_VISION_POOLER, 0, VISION_CAPTURE_LAST},
    {"vision.layer0", OUTPUT_VISION_LAYER0, 0, VISION_CAPTURE_LAYER0},
    {"vision.attentions", OUTPUT_VISION_ATTENTIONS, 0, VISION_CAPTURE_ATTENTIONS},
    {"projector", OUTPUT_PROJECTOR, 0, VISION_CAPTURE_PROJECTOR},
};

static const struct output_name embed_names[] = {
    {"last_hidden_state", OUTPUT_LAST_HIDDEN_STATE, CAPTURE_LAST_HIDDEN_STATE, 0},
    {"last_token", OUTPUT_LAST_TOKEN, CAPTURE_LAST_HIDDEN_STATE, 0},
    {"mean", OUTPUT_MEAN, CAPTURE_LAST_HIDDEN_STATE, 0},
    {"image_features", OUTPUT_IMAGE_FEATURES, 0, 0},
    {"tile_mean", OUTPUT_TILE_MEAN, 0, 0},
    {"image_mean", OUTPUT_IMAGE_MEAN, 0, 0},
};

#define OUTPUTS_OF_FEATURES (OUTPUT_IMAGE_FEATURES | OUTPUT_TILE_MEAN | OUTPUT_IMAGE_MEAN)
#define OUTPUTS_OF_LAST_HIDDEN (OUTPUT_LAST_HIDDEN_STATE | OUTPUT_LAST_TOKEN | OUTPUT_MEAN)

/* The names [n_wire] of a request, each one of table [n_table]. */
static int convert_outputs(char *const *wire, size_t n_wire, const struct output_name *table,
                           size_t n_table, struct request *r, uint32_t *outputs, struct error *err)
{
    if (n_wire > LIMIT_OUTPUTS)
        return error_set(err, ERROR_INVALID_ARGUMENT, "outputs has %zu names; the limit is %d",
                         n_wire, LIMIT_OUTPUTS);
    *outputs = 0;
    for (size_t i = 0; i < n_wire; i++) {
        const struct output_name *o = table;

        while (o < table + n_table && strcmp(o->name, wire[i]) != 0)
            o++;
        if (o == table + n_table)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "outputs[%zu] is \"%.48s\", which is not the name of an output", i,
                             wire[i]);
        if ((o->vision_captures || (o->output & OUTPUTS_OF_FEATURES)) && r->n_tiles == 0)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "outputs[%zu] is \"%s\", but the prompt has no picture", i, o->name);
        if ((o->output & (OUTPUTS_OF_FEATURES | OUTPUT_PROJECTOR)) && r->n_features_per_tile == 0)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "outputs[%zu] is \"%s\", but tiles of %d x %d pixels give the "
                             "projector no square of patches that it could merge",
                             i, o->name, r->height, r->width);
        *outputs |= o->output;
        r->captures |= o->captures;
        r->vision_captures |= o->vision_captures;
        r->want_image_features |= (o->output & OUTPUTS_OF_FEATURES) != 0;
    }
    return 0;
}

/* Which rows' logits are taken; *n_rows of them. */
static int convert_rows(const Internvl__V1__ForwardRequest *wire, struct request *r,
                        int64_t *n_rows, struct error *err)
{
    uint8_t *want = arena_alloc(&r->arena, (size_t)r->n_ids, 1);
    int64_t last = -1;

    if (!want)
        return request_out_of_memory(err);
    if (wire->_logits_to_keep_case && wire->n_logits_positions)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "logits_to_keep and logits_positions exclude each other");
    *n_rows = (int64_t)wire->n_logits_positions;
    for (size_t i = 0; i < wire->n_logits_positions; i++) {
        int64_t position = wire->logits_positions[i];

        if (position >= r->n_ids || position <= last)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "logits_positions[%zu] is %lld; positions must rise and be below %d, "
                             "the prompt's tokens",
                             i, (long long)position, r->n_ids);
        want[position] = 1;
        last = position;
    }
    if (!wire->n_logits_positions) {
        int64_t n = wire->_logits_to_keep_case ? wire->logits_to_keep : 0;

        *n_rows = n == 0 || n > r->n_ids ? r->n_ids : n;
        memset(want + (r->n_ids - *n_rows), 1, (size_t)*n_rows);
    }
    r->want_logits = want;
    return 0;
}

/* targets[i] = labels[i + 1], -1 where that is -100: the loss is shifted by one. */
int convert_labels(const struct convert *c, const int32_t *labels, size_t n_labels,
                   struct request *r, struct error *err)
{
    int32_t *targets;

    if (!n_labels)
        return 0;
    if (n_labels != (size_t)r->n_ids)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "labels has %zu entries; the prompt has %d tokens", n_labels, r->n_ids);
    targets = arena_alloc(&r->arena, (size_t)r->n_ids, sizeof(*targets));
    if (!targets)
        return request_out_of_memory(err);
    for (int32_t i = 0; i < r->n_ids; i++) {
        int32_t label = labels[i];

        if (label != LABEL_IGNORED && (label < 0 || label >= c->model->text.vocab_size))
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "labels[%d] is %d; it must be -100 or an id below %d", i, label,
                             c->model->text.vocab_size);
        if (i > 0)
            targets[i - 1] = label == LABEL_IGNORED ? -1 : label;
    }
    targets[r->n_ids - 1] = -1;
    r->targets = targets;
    return 0;
}

/* Bytes of all tensors asked for, rounded up; every factor is bounded by the model or the limits.
 */
static double forward_bytes(const struct convert *c, const struct request *r, uint32_t outputs,
                            int64_t n_logits)
{
    const struct text_config *t = &c->model->text;
    const struct vision_config *v = &c->model->vision;
    double n = r->n_ids;
    double tiles = r->n_tiles;
    double tile_tokens = r->n_tiles ? vision_config_n_patches(v, r->height, r->width) + 1 : 0;
    double features = request_features_per_tile(r, c->model->n_features_per_tile);
    double merged = (double)v->hidden_size * c->model->downsample_k * c->model->downsample_k;
    double elements = 0;

    if (outputs & OUTPUT_LOGITS)
        elements += (double)n_logits * t->vocab_size;
    if (outputs & OUTPUT_HIDDEN_STATES)
        elements += (t->n_layers + 1) * n * t->hidden_size;
    else if (outputs & OUTPUTS_OF_LAST_HIDDEN)
        elements += n * t->hidden_size;
    if (outputs & OUTPUT_INPUTS_EMBEDS)
        elements += n * t->hidden_size;
    if (outputs & OUTPUT_PAST_KEY_VALUES)
        elements += 2.0 * t->n_layers * n * t->n_kv_heads * t->head_dim;
    if (outputs & OUTPUT_ATTENTIONS)
        elements += (double)t->n_layers * t->n_heads * n * n;
    if (outputs & OUTPUTS_OF_FEATURES)
        elements += tiles * features * t->hidden_size;
    if (outputs & OUTPUT_VISION_HIDDEN_STATES)
        elements += (v->n_layers + 2) * tiles * tile_tokens * v->hidden_size;
    else if (outputs & (OUTPUT_VISION_LAST_HIDDEN_STATE | OUTPUT_VISION_POOLER))
        elements += tiles * tile_tokens * v->hidden_size;
    if (outputs & OUTPUT_VISION_LAYER0)
        elements += 8 * tiles * tile_tokens * v->hidden_size;
    if (outputs & OUTPUT_VISION_ATTENTIONS)
        elements += (double)v->n_layers * v->n_heads * tiles * tile_tokens * tile_tokens;
    if (outputs & OUTPUT_PROJECTOR)
        elements += tiles * features * (3 * merged + t->hidden_size);
    return elements * sizeof(float);
}

static int check_bytes(double n_bytes, struct error *err)
{
    if (n_bytes > (double)LIMIT_FORWARD_BYTES)
        return error_set(err, ERROR_RESOURCE_EXHAUSTED,
                         "the outputs asked for are %.0f MiB; the limit is %.0f MiB",
                         n_bytes / 1048576, (double)LIMIT_FORWARD_BYTES / 1048576);
    return 0;
}

/* bool_masked_pos: a byte a patch. */
static int convert_mask(const struct convert *c, const ProtobufCBinaryData *wire, struct request *r,
                        struct error *err)
{
    if (!wire->len)
        return 0;
    if (!c->model->vision.use_mask_token)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "bool_masked_pos needs a model with use_mask_token");
    if (r->n_tiles == 0)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "bool_masked_pos is set, but the prompt has no picture");
    int n_patches = vision_config_n_patches(&c->model->vision, r->height, r->width);

    if (wire->len != (size_t)r->n_tiles * (size_t)n_patches)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "bool_masked_pos has %zu bytes; %d tiles of %d patches need %zu",
                         wire->len, r->n_tiles, n_patches, (size_t)r->n_tiles * (size_t)n_patches);
    uint8_t *mask = arena_alloc(&r->arena, wire->len, 1);

    if (!mask)
        return request_out_of_memory(err);
    for (size_t i = 0; i < wire->len; i++)
        mask[i] = wire->data[i] != 0;
    r->mask = mask;
    r->n_mask = n_patches;
    return 0;
}

/* A pass that draws nothing. */
static void set_forward(struct request *r)
{
    r->n = 1;
    r->max_tokens = 0;
    r->sampling = (struct sampling){.top_p = 1, .repetition_penalty = 1, .n_logprobs = -1};
}

int convert_forward(const struct convert *c, const Internvl__V1__ForwardRequest *wire,
                    struct request *r, uint32_t *outputs, struct error *err)
{
    int64_t n_logits = 0;

    set_forward(r);
    if (convert_outputs(wire->outputs, wire->n_outputs, output_names,
                        sizeof(output_names) / sizeof(output_names[0]), r, outputs, err) ||
        convert_labels(c, wire->labels, wire->n_labels, r, err) ||
        convert_mask(c, &wire->bool_masked_pos, r, err))
        return -1;
    if ((*outputs & OUTPUT_LOGITS) && convert_rows(wire, r, &n_logits, err))
        return -1;
    return check_bytes(forward_bytes(c, r, *outputs, n_logits), err);
}

int convert_embed(const struct convert *c, const Internvl__V1__EmbedRequest *wire,
                  struct request *r, uint32_t *outputs, struct error *err)
{
    set_forward(r);
    if (convert_outputs(wire->outputs, wire->n_outputs, embed_names,
                        sizeof(embed_names) / sizeof(embed_names[0]), r, outputs, err))
        return -1;
    if (!*outputs)
        return error_set(err, ERROR_INVALID_ARGUMENT, "outputs is empty");
    return check_bytes(forward_bytes(c, r, *outputs, 0), err);
}
