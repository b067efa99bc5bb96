/*
 * Every tensor a checkpoint must hold (weight_list.h).
 *
 * Sources: the state dict of Transformers' InternVLForConditionalGeneration; OpenGVLab's names as
 * in convert_internvl_weights_to_hf.py.
 */
#include "daemon/model/weight_list.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

/* What the next lines add to: a prefix of names, a home and a layer. */
struct section {
    struct weight_list *list;
    const char *prefix;
    enum weight_home home;
    int layer;
};

/* One weight. Unused trailing sizes are 0. */
static struct weight_spec *add(const struct section *s, enum weight_axis axis, const char *suffix,
                               int64_t d0, int64_t d1, int64_t d2, int64_t d3)
{
    struct weight_list *l = s->list;
    if (l->n == l->capacity) {
        l->capacity = l->capacity ? 2 * l->capacity : 256;
        l->specs = xrealloc(l->specs, (size_t)l->capacity, sizeof(*l->specs));
    }
    struct weight_spec *w = &l->specs[l->n++];
    *w = (struct weight_spec){
        .shape = {d0, d1, d2, d3}, .home = s->home, .axis = axis, .layer = s->layer};
    w->n_dims = d3 ? 4 : d2 ? 3 : d1 ? 2 : 1;
    if (snprintf(w->name, sizeof(w->name), "%s%s", s->prefix, suffix) >= (int)sizeof(w->name))
        BUG("weight name %s%s is too long", s->prefix, suffix);
    return w;
}

/* A norm's weight and, for a LayerNorm, bias. */
static void add_norm(const struct section *s, const char *name, int64_t dim, int has_bias)
{
    char suffix[64];
    snprintf(suffix, sizeof(suffix), "%s.weight", name);
    add(s, AXIS_WHOLE, suffix, dim, 0, 0, 0);
    snprintf(suffix, sizeof(suffix), "%s.bias", name);
    if (has_bias)
        add(s, AXIS_WHOLE, suffix, dim, 0, 0, 0);
}

/* A linear's weight [out, in] and bias [out]; the bias of a row-parallel one is whole. */
static void add_linear(const struct section *s, enum weight_axis axis, const char *name,
                       int64_t out, int64_t in, int has_bias)
{
    char suffix[64];
    int by_columns =
        axis == AXIS_HEAD_COLUMNS || axis == AXIS_MLP_COLUMNS || axis == AXIS_EXPERT_COLUMNS;
    snprintf(suffix, sizeof(suffix), "%s.weight", name);
    add(s, axis, suffix, out, in, 0, 0)->kind =
        s->home == HOME_VISION ? KIND_VISION_LINEAR : KIND_LANGUAGE_LINEAR;
    snprintf(suffix, sizeof(suffix), "%s.bias", name);
    if (has_bias)
        add(s, by_columns ? AXIS_WHOLE : axis, suffix, out, 0, 0, 0);
}

/* InternVLVisionModel and InternVLMultiModalProjector. */
static void add_vision(struct weight_list *l, const struct model_config *c)
{
    const struct vision_config *v = &c->vision;
    int64_t dim = v->hidden_size, mlp = v->intermediate_size;
    int64_t block = (int64_t)c->downsample_k * c->downsample_k * dim, text = c->text.hidden_size;
    int layer_norm = v->norm_type == NORM_LAYER_NORM;
    struct section e = {l, "vision_tower.embeddings.", HOME_VISION, -1};
    add(&e, AXIS_WHOLE, "cls_token", 1, 1, dim, 0);
    add(&e, AXIS_WHOLE, "patch_embeddings.projection.weight", dim, v->n_channels, v->patch_height,
        v->patch_width);
    add(&e, AXIS_WHOLE, "patch_embeddings.projection.bias", dim, 0, 0, 0);
    if (v->use_absolute_position_embeddings)
        add(&e, AXIS_WHOLE, "position_embeddings", 1, 1 + v->n_patches, dim, 0);
    if (v->use_mask_token)
        add(&e, AXIS_WHOLE, "mask_token", 1, 1, dim, 0);
    for (int i = 0; i < v->n_layers; i++) {
        char prefix[48];
        snprintf(prefix, sizeof(prefix), "vision_tower.encoder.layer.%d.", i);
        struct section s = {l, prefix, HOME_VISION, -1};
        add_norm(&s, "layernorm_before", dim, layer_norm);
        add_linear(&s, AXIS_WHOLE, "attention.q_proj", dim, dim, v->attention_bias);
        add_linear(&s, AXIS_WHOLE, "attention.k_proj", dim, dim, v->attention_bias);
        add_linear(&s, AXIS_WHOLE, "attention.v_proj", dim, dim, v->attention_bias);
        if (v->use_qk_norm)
            add_norm(&s, "attention.q_norm", dim, 0);
        if (v->use_qk_norm)
            add_norm(&s, "attention.k_norm", dim, 0);
        add_linear(&s, AXIS_WHOLE, "attention.projection_layer", dim, dim, 1);
        add(&s, AXIS_WHOLE, "lambda_1", dim, 0, 0, 0);
        add_norm(&s, "layernorm_after", dim, layer_norm);
        add_linear(&s, AXIS_WHOLE, "mlp.fc1", mlp, dim, 1);
        add_linear(&s, AXIS_WHOLE, "mlp.fc2", dim, mlp, 1);
        add(&s, AXIS_WHOLE, "lambda_2", dim, 0, 0, 0);
    }
    struct section tail = {l, "vision_tower.", HOME_VISION, -1};
    if (!v->use_mean_pooling)
        add_norm(&tail, "layernorm", dim, 1);
    struct section p = {l, "multi_modal_projector.", HOME_VISION, -1};
    add_norm(&p, "layer_norm", block, 1);
    add_linear(&p, AXIS_WHOLE, "linear_1", text, block, 1);
    add_linear(&p, AXIS_WHOLE, "linear_2", text, text, 1);
}

static void add_mlp(const struct section *s, const struct text_config *t)
{
    int64_t dim = t->hidden_size, mlp = t->intermediate_size, expert = t->moe_intermediate_size;
    char name[48];
    if (text_config_layer_kind(t, s->layer) == LAYER_DENSE) {
        add_linear(s, AXIS_MLP, "mlp.gate_proj", mlp, dim, t->mlp_bias);
        add_linear(s, AXIS_MLP, "mlp.up_proj", mlp, dim, t->mlp_bias);
        add_linear(s, AXIS_MLP_COLUMNS, "mlp.down_proj", dim, mlp, t->mlp_bias);
        return;
    }
    add(s, AXIS_WHOLE, "mlp.gate.weight", t->n_experts, dim, 0, 0);
    for (int e = 0; e < t->n_experts; e++) {
        snprintf(name, sizeof(name), "mlp.experts.%d.gate_proj", e);
        add_linear(s, AXIS_EXPERT, name, expert, dim, 0);
        snprintf(name, sizeof(name), "mlp.experts.%d.up_proj", e);
        add_linear(s, AXIS_EXPERT, name, expert, dim, 0);
        snprintf(name, sizeof(name), "mlp.experts.%d.down_proj", e);
        add_linear(s, AXIS_EXPERT_COLUMNS, name, dim, expert, 0);
    }
}

/* Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM, LlamaForCausalLM. */
static void add_language(struct weight_list *l, const struct text_config *t)
{
    int64_t dim = t->hidden_size, q = (int64_t)t->n_heads * t->head_dim,
            kv = (int64_t)t->n_kv_heads * t->head_dim;
    struct section first = {l, "language_model.model.", HOME_FIRST, -1};
    add(&first, AXIS_VOCAB, "embed_tokens.weight", t->vocab_size, dim, 0, 0)->kind = KIND_EMBEDDING;
    for (int i = 0; i < t->n_layers; i++) {
        char prefix[48];
        snprintf(prefix, sizeof(prefix), "language_model.model.layers.%d.", i);
        struct section s = {l, prefix, HOME_LAYER, i};
        add_norm(&s, "input_layernorm", dim, 0);
        add_linear(&s, AXIS_HEADS, "self_attn.q_proj", q, dim, t->attention_bias);
        add_linear(&s, AXIS_KV_HEADS, "self_attn.k_proj", kv, dim, t->attention_bias);
        add_linear(&s, AXIS_KV_HEADS, "self_attn.v_proj", kv, dim, t->attention_bias);
        if (t->use_qk_norm)
            add_norm(&s, "self_attn.q_norm", t->head_dim, 0);
        if (t->use_qk_norm)
            add_norm(&s, "self_attn.k_norm", t->head_dim, 0);
        add_linear(&s, AXIS_HEAD_COLUMNS, "self_attn.o_proj", dim, q, t->output_bias);
        add_norm(&s, "post_attention_layernorm", dim, 0);
        add_mlp(&s, t);
    }
    struct section last = {l, "language_model.", HOME_LAST, -1};
    add_norm(&last, "model.norm", dim, 0);
    struct weight_spec *head = add(&last, AXIS_VOCAB, "lm_head.weight", t->vocab_size, dim, 0, 0);
    head->optional = 1;
    head->kind = KIND_LM_HEAD;
}

static int by_name(const void *a, const void *b)
{
    const struct weight_spec *x = a, *y = b;
    return strcmp(x->name, y->name);
}

void weight_list_init(struct weight_list *l, const struct model_config *c)
{
    *l = (struct weight_list){0};
    add_vision(l, c);
    add_language(l, &c->text);
    for (struct weight_spec *s = l->specs; s < l->specs + l->n; s++) {
        const struct quantization *q = &c->quantization;
        s->format = quantization_format(q, s->kind, weight_spec_columns(s), &s->group_size);
        s->has_zeros = s->format != WEIGHT_FLOAT && q->has_zeros;
        s->has_order = s->format != WEIGHT_FLOAT && q->has_order;
    }
    qsort(l->specs, (size_t)l->n, sizeof(*l->specs), by_name);
}

const struct weight_spec *weight_list_find(const struct weight_list *l, const char *name)
{
    struct weight_spec key;
    snprintf(key.name, sizeof(key.name), "%s", name);
    return bsearch(&key, l->specs, (size_t)l->n, sizeof(key), by_name);
}

int weight_list_stack(const struct weight_list *l, const struct weight_spec *s,
                      const struct weight_spec *parts[3])
{
    static const char *const stacks[][3] = {{"q_proj", "k_proj", "v_proj"},
                                            {"gate_proj", "up_proj", NULL}};
    const char *at = NULL;
    char name[sizeof(s->name)];
    int n = 0;
    for (int i = 0; i < 2 && n == 0; i++) {
        for (int j = 0; j < 3 && stacks[i][j] && !at; j++)
            at = strstr(s->name, stacks[i][j]);
        for (int j = 0; j < 3 && stacks[i][j] && at; j++) {
            if (snprintf(name, sizeof(name), "%.*s%s%s", (int)(at - s->name), s->name, stacks[i][j],
                         strchr(at, '.')) >= (int)sizeof(name))
                BUG("weight name %s is too long", s->name);
            parts[n++] = weight_list_find(l, name);
        }
    }
    if (n == 0)
        parts[n++] = s;
    return n;
}

void weight_list_release(struct weight_list *l)
{
    free(l->specs);
    *l = (struct weight_list){0};
}

int weight_spec_is_matrix(const struct weight_spec *s)
{
    return s->n_dims == 2 || s->n_dims == 4;
}

int weight_spec_is_like(const struct weight_spec *a, const struct weight_spec *b)
{
    return a->format == b->format && a->group_size == b->group_size &&
           a->has_zeros == b->has_zeros && a->has_order == b->has_order;
}

int64_t weight_spec_rows(const struct weight_spec *s)
{
    return s->shape[0];
}

int64_t weight_spec_columns(const struct weight_spec *s)
{
    int64_t n = 1;
    for (int i = 1; i < s->n_dims; i++)
        n *= s->shape[i];
    return n;
}

int64_t weight_spec_groups(const struct weight_spec *s, struct range columns)
{
    if (s->has_order)
        return (weight_spec_columns(s) - 1) / s->group_size + 1;
    return (columns.start + columns.n - 1) / s->group_size + 1 - columns.start / s->group_size;
}

uint64_t weight_spec_quantized_bytes(const struct weight_spec *s, struct range rows,
                                     struct range columns)
{
    uint64_t bytes = (uint64_t)(rows.n * columns.n) * (uint64_t)weight_format_bits(s->format) / 8;
    bytes += (uint64_t)(rows.n * weight_spec_groups(s, columns)) *
             (sizeof(float) + (s->has_zeros ? 1 : 0));
    return bytes + (s->has_order ? (uint64_t)columns.n * sizeof(int32_t) : 0);
}

int weight_cut_init(struct weight_cut *cut, const struct text_config *t, int shard, int n_shards,
                    struct error *err)
{
    *cut = (struct weight_cut){0};
    cut->vocab = shard_vocab(t->vocab_size, shard, n_shards);
    if (layer_shard_init(&cut->dense, t->n_heads, t->n_kv_heads, t->head_dim, t->intermediate_size,
                         shard, n_shards, err) != 0)
        return -1;
    if (t->architecture != TEXT_QWEN3_MOE)
        return 0;
    return layer_shard_init(&cut->expert, t->n_heads, t->n_kv_heads, t->head_dim,
                            t->moe_intermediate_size, shard, n_shards, err);
}

void weight_cut_ranges(const struct weight_cut *cut, const struct text_config *t,
                       const struct weight_spec *s, struct range *rows, struct range *columns)
{
    int64_t d = t->head_dim;
    struct range heads = {cut->dense.heads.start * d, cut->dense.heads.n * d};
    struct range kv_heads = {cut->dense.kv_heads.start * d, cut->dense.kv_heads.n * d};
    *rows = (struct range){0, weight_spec_rows(s)};
    *columns = (struct range){0, weight_spec_columns(s)};
    switch (s->axis) {
    case AXIS_WHOLE:
        break;
    case AXIS_HEADS:
        *rows = heads;
        break;
    case AXIS_KV_HEADS:
        *rows = kv_heads;
        break;
    case AXIS_HEAD_COLUMNS:
        *columns = heads;
        break;
    case AXIS_MLP:
        *rows = cut->dense.columns;
        break;
    case AXIS_MLP_COLUMNS:
        *columns = cut->dense.columns;
        break;
    case AXIS_EXPERT:
        *rows = cut->expert.columns;
        break;
    case AXIS_EXPERT_COLUMNS:
        *columns = cut->expert.columns;
        break;
    case AXIS_VOCAB:
        *rows = cut->vocab;
        break;
    }
}

/* Replaces the first `from` in `buf` by `to`; returns 1 when it was there. */
static int replace(char *buf, size_t n_bytes, const char *from, const char *to)
{
    char *at = strstr(buf, from);
    if (!at)
        return 0;
    char tail[160];
    snprintf(tail, sizeof(tail), "%s", at + strlen(from));
    snprintf(at, n_bytes - (size_t)(at - buf), "%s%s", to, tail);
    return 1;
}

static int starts_with(const char *s, const char *prefix)
{
    return strncmp(s, prefix, strlen(prefix)) == 0;
}

static void opengvlab_name(char *buf, size_t n_bytes, int *part)
{
    static const char *const names[][2] = {
        {"vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"},
        {"vision_tower.embeddings.position_embeddings",
         "vision_model.embeddings.position_embedding"},
        {"vision_tower.embeddings.patch_embeddings.projection.",
         "vision_model.embeddings.patch_embedding."},
        {"vision_tower.encoder.layer.", "vision_model.encoder.layers."},
        {".attention.projection_layer.", ".attn.proj."},
        {".attention.q_norm.", ".attn.q_norm."},
        {".attention.k_norm.", ".attn.k_norm."},
        {".layernorm_before.", ".norm1."},
        {".layernorm_after.", ".norm2."},
        {".lambda_1", ".ls1"},
        {".lambda_2", ".ls2"},
        {"multi_modal_projector.layer_norm.", "mlp1.0."},
        {"multi_modal_projector.linear_1.", "mlp1.1."},
        {"multi_modal_projector.linear_2.", "mlp1.3."},
    };
    static const char *const thirds[] = {".attention.q_proj.", ".attention.k_proj.",
                                         ".attention.v_proj."};
    if (starts_with(buf, "language_model."))
        return;
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        replace(buf, n_bytes, names[i][0], names[i][1]);
    for (int i = 0; i < 3; i++)
        if (replace(buf, n_bytes, thirds[i], ".attn.qkv."))
            *part = i;
}

const char *weight_disk_name(const char *name, enum weight_naming naming, char *buf, size_t n_bytes,
                             int *part)
{
    *part = -1;
    snprintf(buf, n_bytes, "%s", name);
    if (naming == NAMING_OPENGVLAB)
        opengvlab_name(buf, n_bytes, part);
    else if (naming == NAMING_MEMORY && starts_with(name, "language_model.lm_head."))
        replace(buf, n_bytes, "language_model.lm_head.", "lm_head.");
    else if (naming == NAMING_MEMORY && starts_with(name, "language_model.model."))
        replace(buf, n_bytes, "language_model.model.", "model.language_model.");
    else if (naming == NAMING_MEMORY)
        snprintf(buf, n_bytes, "model.%s", name);
    return buf;
}
