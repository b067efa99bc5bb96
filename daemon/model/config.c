/*
 * config.json and generation_config.json, validated (config.h).
 *
 * Owns the reading of both config forms: InternVLForConditionalGeneration ("-hf": text_config,
 * vision_config) and OpenGVLab's InternVLChatModel (llm_config, vision_config with other names). A
 * field that changes the computation and that this daemon does not compute is refused by name;
 * training-only fields (dropouts, initialisers) are not looked at. Knows no weights.
 */
#include "daemon/model/config.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "daemon/model/config_reader.h"
#include "daemon/model/quantization_config.h"
#include "kernels/log.h"

#define CONFIG_MAX_BYTES ((size_t)1 << 20)
#define TOKENIZER_CONFIG_MAX_BYTES ((size_t)16 << 20)
#define CONFIG_MAX_DEPTH 16

/* An integer or a [height, width] pair. */
static void get_size(const struct reader *r, const char *key, int fallback, int *height, int *width)
{
    const cJSON *v = reader_get(r, key);
    char buf[48];
    *height = *width = fallback;
    if (!v)
        return;
    const cJSON *h = cJSON_IsArray(v) && cJSON_GetArraySize(v) == 2 ? cJSON_GetArrayItem(v, 0) : v;
    const cJSON *w = cJSON_IsArray(v) && cJSON_GetArraySize(v) == 2 ? cJSON_GetArrayItem(v, 1) : v;
    if (!json_is_integer(h, 1, 16384) || !json_is_integer(w, 1, 16384)) {
        reader_refuse(r,
                      "%s: found %s; pixels or a [height, width] pair of 1 to 16384 are expected",
                      key, json_shown(v, buf, sizeof(buf)));
        return;
    }
    *height = (int)h->valuedouble;
    *width = (int)w->valuedouble;
}

/* Transformers' ACT2FN names that this family uses. */
static enum activation get_activation(const struct reader *r, const char *key, const char *fallback)
{
    static const char *const names[] = {"gelu",      "gelu_new",   "gelu_pytorch_tanh",
                                        "gelu_fast", "quick_gelu", "relu",
                                        "silu",      "swish",      NULL};
    static const enum activation values[] = {
        ACTIVATION_GELU,       ACTIVATION_GELU_TANH, ACTIVATION_GELU_TANH, ACTIVATION_GELU_TANH,
        ACTIVATION_QUICK_GELU, ACTIVATION_RELU,      ACTIVATION_SILU,      ACTIVATION_SILU};
    return values[reader_word(r, key, names, fallback)];
}

/* InternVLVisionConfig; OpenGVLab's InternVisionConfig differs in three names and in having neither
 * mask token, final norm nor position switch. */
static void read_vision(struct vision_config *v, const struct reader *r, int is_opengvlab)
{
    static const char *const types[] = {"internvl_vision", NULL};
    static const char *const old_types[] = {"intern_vit_6b", NULL};
    static const char *const norms[] = {"layer_norm", "rms_norm", NULL};
    reader_word(r, "model_type", is_opengvlab ? old_types : types,
                is_opengvlab ? "intern_vit_6b" : "internvl_vision");
    v->hidden_size = reader_int(r, "hidden_size", 1024, 1, 65536);
    v->n_layers = reader_int(r, "num_hidden_layers", 24, 1, 1024);
    v->n_heads = reader_int(r, "num_attention_heads", 16, 1, 1024);
    v->intermediate_size = reader_int(r, "intermediate_size", 4096, 1, 1 << 20);
    v->n_channels = reader_int(r, "num_channels", 3, 1, 4);
    get_size(r, "image_size", 448, &v->image_height, &v->image_width);
    get_size(r, "patch_size", 14, &v->patch_height, &v->patch_width);
    v->norm_type =
        reader_word(r, "norm_type", norms, "layer_norm") == 1 ? NORM_RMS_NORM : NORM_LAYER_NORM;
    v->hidden_act = get_activation(r, "hidden_act", "gelu");
    v->layer_norm_eps = reader_float(r, "layer_norm_eps", 1e-6, 0, 1);
    reader_float(r, "layer_scale_init_value", 0.1, -1e6,
                 1e6); // training alone: only its kind matters
    v->attention_bias = reader_bool(r, is_opengvlab ? "qkv_bias" : "attention_bias", is_opengvlab);
    v->use_qk_norm =
        reader_bool(r, is_opengvlab ? "qk_normalization" : "use_qk_norm", is_opengvlab);
    v->use_mask_token = is_opengvlab ? 0 : reader_bool(r, "use_mask_token", 0);
    v->use_absolute_position_embeddings =
        is_opengvlab ? 1 : reader_bool(r, "use_absolute_position_embeddings", 1);
    v->use_mean_pooling = is_opengvlab ? 1 : reader_bool(r, "use_mean_pooling", 1);
    if (*r->failed)
        return;
    if (v->hidden_size % v->n_heads != 0)
        reader_refuse(r, "hidden_size: %d is not a multiple of num_attention_heads %d",
                      v->hidden_size, v->n_heads);
    if (v->image_height < v->patch_height || v->image_width < v->patch_width)
        reader_refuse(r, "image_size: %d x %d is smaller than one patch of %d x %d",
                      v->image_height, v->image_width, v->patch_height, v->patch_width);
    v->head_dim = v->hidden_size / v->n_heads;
    v->n_patches = vision_config_n_patches(v, v->image_height, v->image_width);
    if (v->n_patches > 1 << 20)
        reader_refuse(r, "image_size: %d patches a tile; at most %d are accepted", v->n_patches,
                      1 << 20);
}

/* rope_parameters (new files), or rope_theta and rope_scaling (old ones). Transformers:
 * modeling_rope_utils. */
static void read_rope(struct text_config *t, const struct reader *r)
{
    static const char *const types[] = {"default", "dynamic", "linear", "yarn", NULL};
    struct rope_config *rope = &t->rope;
    struct reader s = reader_sub(r, "rope_parameters", "config.json: text_config.rope_parameters.");
    if (!s.object)
        s = reader_sub(r, "rope_scaling", "config.json: text_config.rope_scaling.");
    rope->theta = reader_float(r, "rope_theta", 10000, 1, 1e12);
    rope->factor = 1;
    rope->original_max_positions = t->max_positions;
    if (*r->failed || !s.object)
        return;
    rope->theta = reader_float(&s, "rope_theta", rope->theta, 1, 1e12);
    const char *key = reader_get(&s, "rope_type") ? "rope_type" : "type";
    if (reader_get(&s, "full_attention"))
        reader_refuse(&s, "full_attention: rope parameters per layer type are not supported");
    rope->type = (enum rope_type)reader_word(&s, key, types, "default");
    if (reader_float(&s, "partial_rotary_factor", 1, 0, 1) < 1)
        reader_refuse(&s, "partial_rotary_factor: only 1 is supported");
    if (rope->type == ROPE_DEFAULT)
        return;
    if (rope->type == ROPE_YARN)
        rope->original_max_positions =
            reader_int(&s, "original_max_position_embeddings", t->max_positions, 1, 1 << 30);
    if (!reader_get(&s, "factor") && rope->type != ROPE_YARN)
        reader_refuse(&s, "factor: missing; rope type \"%s\" needs it", types[rope->type]);
    rope->factor =
        reader_float(&s, "factor", (double)t->max_positions / rope->original_max_positions, 1, 1e6);
    rope->beta_fast = reader_float(&s, "beta_fast", 32, 0, 1e6);
    rope->beta_slow = reader_float(&s, "beta_slow", 1, 0, 1e6);
    if (rope->beta_fast <= 0) // yarn: `reader_get("beta_fast") or 32`
        rope->beta_fast = 32;
    if (rope->beta_slow <= 0)
        rope->beta_slow = 1;
    rope->attention_factor = reader_float(&s, "attention_factor", 0, 0, 1e6);
    rope->mscale = reader_float(&s, "mscale", 0, 0, 1e6);
    rope->mscale_all_dim = reader_float(&s, "mscale_all_dim", 0, 0, 1e6);
    rope->truncate = reader_bool(&s, "truncate", 1);
}

/* Qwen2 and Qwen3: use_sliding_window, sliding_window, max_window_layers, or layer_types, which
 * must then be full attention first and sliding attention after. */
static void read_window(struct text_config *t, const struct reader *r)
{
    t->first_window_layer = t->n_layers;
    if (t->architecture != TEXT_LLAMA && reader_bool(r, "use_sliding_window", 0)) {
        t->sliding_window = reader_int(r, "sliding_window", 4096, 1, 1 << 30);
        t->first_window_layer = reader_int(r, "max_window_layers", 28, 0, 1 << 20);
    }
    const cJSON *types = reader_get(r, "layer_types");
    if (types && cJSON_GetArraySize(types) != t->n_layers)
        reader_refuse(r, "layer_types: %d entries for %d layers", cJSON_GetArraySize(types),
                      t->n_layers);
    if (!types || *r->failed)
        return;
    int i = 0, first_window = t->n_layers;
    const cJSON *v = NULL;
    cJSON_ArrayForEach(v, types)
    {
        const char *kind = cJSON_IsString(v) ? v->valuestring : "";
        int is_window = strcmp(kind, "sliding_attention") == 0;
        char buf[48];
        if (!is_window && strcmp(kind, "full_attention") != 0)
            reader_refuse(r,
                          "layer_types[%d]: found %s; supported: full_attention, "
                          "sliding_attention",
                          i, json_shown(v, buf, sizeof(buf)));
        else if (!is_window && first_window < i)
            reader_refuse(
                r, "layer_types[%d]: full attention after sliding attention is not supported", i);
        if (is_window && first_window == t->n_layers)
            first_window = i;
        i++;
    }
    if (first_window < t->n_layers && !t->sliding_window)
        reader_refuse(r, "layer_types: sliding_attention without use_sliding_window");
    t->first_window_layer = first_window;
}

static void read_experts(struct text_config *t, const struct reader *r)
{
    const char *key = reader_get(r, "num_experts") ? "num_experts" : "num_local_experts";
    t->n_experts = reader_int(r, key, 128, 1, 4096);
    t->n_experts_per_token = reader_int(r, "num_experts_per_tok", 8, 1, 64);
    t->moe_intermediate_size = reader_int(r, "moe_intermediate_size", 768, 1, 1 << 20);
    t->norm_topk_prob = reader_bool(r, "norm_topk_prob", 0);
    t->decoder_sparse_step = reader_int(r, "decoder_sparse_step", 1, 1, 1024);
    if (t->n_experts_per_token > t->n_experts)
        reader_refuse(r, "num_experts_per_tok: %d of only %d experts", t->n_experts_per_token,
                      t->n_experts);
    const cJSON *list = reader_get(r, "mlp_only_layers"), *v = NULL;
    cJSON_ArrayForEach(v, list)
    {
        if (!json_is_integer(v, 0, t->n_layers - 1) || t->n_dense_layers == 256) {
            reader_refuse(r, "mlp_only_layers: at most 256 layer numbers below %d are expected",
                          t->n_layers);
            return;
        }
        t->dense_layers[t->n_dense_layers++] = (int)v->valuedouble;
    }
}

static void read_text(struct text_config *t, const struct reader *r)
{
    static const char *const types[] = {"qwen2", "qwen3", "qwen3_moe", "llama", NULL};
    t->architecture = (enum text_architecture)reader_word(r, "model_type", types, "(none)");
    int is_llama = t->architecture == TEXT_LLAMA, is_qwen2 = t->architecture == TEXT_QWEN2;
    t->hidden_size = reader_int(r, "hidden_size", READER_REQUIRED, 1, 65536);
    t->n_layers = reader_int(r, "num_hidden_layers", READER_REQUIRED, 1, 1024);
    t->n_heads = reader_int(r, "num_attention_heads", READER_REQUIRED, 1, 1024);
    t->n_kv_heads = reader_int(r, "num_key_value_heads", t->n_heads, 1, 1024);
    t->intermediate_size = reader_int(r, "intermediate_size", READER_REQUIRED, 1, 1 << 20);
    t->vocab_size = reader_int(r, "vocab_size", READER_REQUIRED, 1, 1 << 22);
    t->max_positions =
        reader_int(r, "max_position_embeddings", is_llama ? 2048 : 32768, 1, 1 << 26);
    t->hidden_act = get_activation(r, "hidden_act", "silu");
    t->rms_norm_eps = reader_float(r, "rms_norm_eps", 1e-6, 0, 1);
    if (*r->failed)
        return;
    int default_head_dim = is_llama || is_qwen2 ? t->hidden_size / t->n_heads : 128;
    t->head_dim =
        is_qwen2 ? default_head_dim : reader_int(r, "head_dim", default_head_dim, 1, 4096);
    if (is_qwen2 && t->hidden_size % t->n_heads != 0)
        reader_refuse(r, "hidden_size: %d is not a multiple of num_attention_heads %d",
                      t->hidden_size, t->n_heads);
    if (t->n_heads % t->n_kv_heads != 0)
        reader_refuse(r, "num_attention_heads: %d is not a multiple of num_key_value_heads %d",
                      t->n_heads, t->n_kv_heads);
    if (t->head_dim % 2 != 0 || t->head_dim < 4)
        reader_refuse(r,
                      "head_dim: %d; an even number of at least 4 is expected (rotary embeddings)",
                      t->head_dim);
    /* Qwen2Attention: biases on q, k, v alone. Qwen3 and Llama: attention_bias means all four. */
    t->attention_bias = is_qwen2 ? 1 : reader_bool(r, "attention_bias", 0);
    t->output_bias = is_qwen2 ? 0 : t->attention_bias;
    t->mlp_bias = is_llama ? reader_bool(r, "mlp_bias", 0) : 0;
    t->use_qk_norm = t->architecture == TEXT_QWEN3 || t->architecture == TEXT_QWEN3_MOE;
    if (reader_float(r, "partial_rotary_factor", 1, 0, 1) < 1)
        reader_refuse(r, "partial_rotary_factor: only 1 is supported");
    if (reader_int(r, "pretraining_tp", 1, 1, INT_MAX) != 1)
        reader_refuse(r, "pretraining_tp: only 1 is supported");
    read_rope(t, r);
    read_window(t, r);
    if (t->architecture == TEXT_QWEN3_MOE)
        read_experts(t, r);
}

/* An id, or a list of up to 8 ids. */
static void read_eos(struct model_config *c, const struct reader *r)
{
    const cJSON *v = reader_get(r, "eos_token_id");
    if (!v)
        return;
    c->n_eos = 0;
    int n = cJSON_IsArray(v) ? cJSON_GetArraySize(v) : 1;
    for (int i = 0; i < n; i++) {
        const cJSON *id = cJSON_IsArray(v) ? cJSON_GetArrayItem(v, i) : v;
        if (n > 8 || !json_is_integer(id, 0, c->text.vocab_size - 1)) {
            reader_refuse(r, "eos_token_id: up to 8 ids below vocab_size %d are expected",
                          c->text.vocab_size);
            return;
        }
        c->eos_token_ids[c->n_eos++] = (int32_t)id->valuedouble;
    }
}

static void read_generation(struct model_config *c, const struct reader *r)
{
    read_eos(c, r);
    c->bos_token_id = reader_int(r, "bos_token_id", c->bos_token_id, 0, INT_MAX);
    c->pad_token_id = reader_int(r, "pad_token_id", c->pad_token_id, -1, INT_MAX);
    c->do_sample = reader_bool(r, "do_sample", 0);
    c->temperature = reader_float(r, "temperature", 1, 0, 1e3);
    c->top_p = reader_float(r, "top_p", 1, 0, 1);
    c->top_k = reader_int(r, "top_k", 0, 0, INT_MAX);
    c->repetition_penalty = reader_float(r, "repetition_penalty", 1, 1e-3, 1e3);
    c->max_new_tokens = reader_int(r, "max_new_tokens", 0, 0, INT_MAX);
}

/* InternVLConfig.vision_feature_layer: -1 is last_hidden_state (with the final norm, if any); any
 * other number indexes hidden_states. 0 and lists fail in the reference too. */
static void read_feature_layer(struct model_config *c, const struct reader *r, const char *key)
{
    const cJSON *v = reader_get(r, key);
    int n = c->vision.n_layers + 1;
    char buf[48];
    if (v && (!json_is_integer(v, -n, n - 1) || v->valuedouble == 0)) {
        reader_refuse(r, "%s: found %s; one number from %d to %d, not 0, is expected", key,
                      json_shown(v, buf, sizeof(buf)), -n, n - 1);
        return;
    }
    int layer = v ? (int)v->valuedouble : -1;
    c->feature_layer = layer == -1 ? VISION_FEATURE_LAST : layer < 0 ? layer + n : layer;
}

static void read_features(struct model_config *c, const struct reader *r)
{
    double ratio = reader_float(r, "downsample_ratio", 0.5, 1e-3, 1);
    c->downsample_k = (int)lround(1 / ratio);
    if (fabs(c->downsample_k * ratio - 1) > 1e-6)
        reader_refuse(r, "downsample_ratio: found %g; one over a whole number is expected", ratio);
    if (*r->failed)
        return;
    const struct vision_config *v = &c->vision;
    c->n_features_per_tile = model_config_n_features(c, v->image_height, v->image_width);
    if (!c->n_features_per_tile)
        reader_refuse(r,
                      "vision_config.image_size: %d patches a tile are not a square whose side "
                      "%d divides (downsample_ratio)",
                      v->n_patches, c->downsample_k);
    int side = (int)sqrt((double)v->n_patches);
    if (v->use_absolute_position_embeddings && v->image_height != v->image_width &&
        side * side != v->n_patches)
        reader_refuse(r,
                      "vision_config.image_size: %d patches are not a square count to interpolate",
                      v->n_patches);
}

/* InternVLForConditionalGeneration. */
static void read_hf(struct model_config *c, const struct reader *r)
{
    static const char *const strategies[] = {"default", "full", NULL};
    struct reader vision = reader_sub(r, "vision_config", "config.json: vision_config.");
    struct reader text = reader_sub(r, "text_config", "config.json: text_config.");
    if (!vision.object || !text.object) {
        reader_refuse(r, "%s: missing", vision.object ? "text_config" : "vision_config");
        return;
    }
    read_vision(&c->vision, &vision, 0);
    read_text(&c->text, &text);
    c->image_token_id = reader_int(r, "image_token_id", 151667, 0, INT_MAX);
    if (!*r->failed && c->image_token_id >= c->text.vocab_size)
        reader_refuse(r, "image_token_id: found %d; an id below vocab_size %d is expected",
                      c->image_token_id, c->text.vocab_size);
    c->projector_act = get_activation(r, "projector_hidden_act", "gelu");
    c->feature_keeps_cls =
        reader_word(r, "vision_feature_select_strategy", strategies, "default") == 1;
    c->tie_word_embeddings = reader_bool(r, "tie_word_embeddings", 1);
    read_feature_layer(c, r, "vision_feature_layer");
    read_features(c, r);
    c->image_seq_length = reader_int(r, "image_seq_length", 256, 1, 1 << 20);
    if (!*r->failed && c->image_seq_length != c->n_features_per_tile)
        reader_refuse(r,
                      "image_seq_length: found %d; a tile of this vision_config becomes %d tokens",
                      c->image_seq_length, c->n_features_per_tile);
    if (!*r->failed)
        read_eos(c, &text);
    c->bos_token_id = reader_int(&text, "bos_token_id", -1, 0, INT_MAX);
    c->pad_token_id = reader_int(&text, "pad_token_id", -1, -1, INT_MAX);
}

/* InternVLChatModel, the original form. Its projector, feature choice and pixel shuffle are fixed;
 * token ids live in the tokenizer. Source: OpenGVLab modeling_internvl_chat.py. */
static void read_opengvlab(struct model_config *c, const struct reader *r)
{
    static const char *const shuffles[] = {"v2", NULL};
    struct reader vision = reader_sub(r, "vision_config", "config.json: vision_config.");
    struct reader text = reader_sub(r, "llm_config", "config.json: llm_config.");
    if (!vision.object || !text.object) {
        reader_refuse(r, "%s: missing", vision.object ? "llm_config" : "vision_config");
        return;
    }
    read_vision(&c->vision, &vision, 1);
    read_text(&c->text, &text);
    reader_word(r, "ps_version", shuffles, "v1");
    int size = reader_int(r, "force_image_size", c->vision.image_height, 1, 16384);
    if (size != c->vision.image_height || size != c->vision.image_width)
        reader_refuse(
            r, "force_image_size: found %d, vision_config.image_size is %d x %d; they must agree",
            size, c->vision.image_height, c->vision.image_width);
    c->image_token_id = -1;
    c->projector_act = ACTIVATION_GELU;
    c->tie_word_embeddings = reader_bool(r, "tie_word_embeddings", 0);
    read_feature_layer(c, r, "select_layer");
    read_features(c, r);
    c->image_seq_length = c->n_features_per_tile;
    c->bos_token_id = reader_int(&text, "bos_token_id", -1, 0, INT_MAX);
    c->pad_token_id = reader_int(&text, "pad_token_id", -1, -1, INT_MAX);
}

static void read_config(struct model_config *c, const struct reader *r)
{
    static const char *const architectures[] = {"InternVLForConditionalGeneration",
                                                "InternVLChatModel", NULL};
    static const char *const types[] = {"internvl", "internvl_chat", NULL};
    static const char *const dtypes[] = {"float32", "bfloat16", "float16", NULL};
    int is_opengvlab = reader_word(r, "model_type", types, "(none)") == 1;
    const cJSON *list = reader_get(r, "architectures");
    const char *name = architectures[is_opengvlab];
    const cJSON *first = cJSON_IsArray(list) ? cJSON_GetArrayItem(list, 0) : NULL;
    char buf[64];
    if (list && (!cJSON_IsString(first) || strcmp(first->valuestring, name) != 0))
        reader_refuse(
            r, "architectures: found %s; supported: %s (model_type internvl), %s (internvl_chat)",
            json_shown(list, buf, sizeof(buf)), architectures[0], architectures[1]);
    quantization_config_read(&c->quantization, r);
    const char *key = reader_get(r, "dtype") ? "dtype" : "torch_dtype";
    c->stored_dtype = reader_word(r, key, dtypes, "float32") == 1 ? DTYPE_BF16 : DTYPE_F32;
    if (*r->failed)
        return;
    if (is_opengvlab)
        read_opengvlab(c, r);
    else
        read_hf(c, r);
}

int model_config_parse(struct model_config *c, const char *config, size_t config_bytes,
                       const char *generation, size_t generation_bytes, struct error *err)
{
    int failed = 0;
    *c = (struct model_config){.bos_token_id = -1, .pad_token_id = -1};
    cJSON *root = json_parse(config, config_bytes, CONFIG_MAX_DEPTH, "config.json", err),
          *gen = NULL;
    if (!root)
        return -1;
    if (generation) {
        gen = json_parse(generation, generation_bytes, CONFIG_MAX_DEPTH, "generation_config.json",
                         err);
        failed = !gen;
    }
    struct reader r = {root, "config.json: ", err, &failed};
    if (!failed && !cJSON_IsObject(root))
        reader_refuse(&r, "an object is expected");
    if (!failed)
        read_config(c, &r);
    r.object = gen; // NULL: every getter gives its fallback
    r.where = "generation_config.json: ";
    if (!failed)
        read_generation(c, &r);
    cJSON_Delete(gen);
    cJSON_Delete(root);
    return failed ? -1 : 0;
}

/* The id of an added token in DIR/tokenizer_config.json, or -1. */
static int find_added_token(const cJSON *tokenizer_config, const char *content)
{
    const cJSON *map = cJSON_GetObjectItemCaseSensitive(tokenizer_config, "added_tokens_decoder");
    const cJSON *v = NULL;
    cJSON_ArrayForEach(v, map)
    {
        const cJSON *text = cJSON_GetObjectItemCaseSensitive(v, "content");
        if (v->string && cJSON_IsString(text) && strcmp(text->valuestring, content) == 0) {
            char *end = NULL;
            long id = strtol(v->string, &end, 10);
            return *end == 0 && id >= 0 && id < INT_MAX ? (int)id : -1;
        }
    }
    return -1;
}

/* What an OpenGVLab checkpoint keeps in its tokenizer: the image token, and the end of a turn, at
 * which its chat() stops whatever llm_config.eos_token_id says. */
static int read_tokenizer_ids(struct model_config *c, const char *dir, struct error *err)
{
    char path[4096];
    size_t n = 0;
    snprintf(path, sizeof(path), "%s/tokenizer_config.json", dir);
    char *text = json_read_file(path, TOKENIZER_CONFIG_MAX_BYTES, &n, err);
    cJSON *root = text ? json_parse(text, n, CONFIG_MAX_DEPTH, "tokenizer_config.json", err) : NULL;
    free(text);
    if (!root)
        return -1;
    c->image_token_id = find_added_token(root, "<IMG_CONTEXT>");
    int end_of_turn = find_added_token(root, "<|im_end|>");
    cJSON_Delete(root);
    if (c->image_token_id < 0)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "tokenizer_config.json: added_tokens_decoder has no <IMG_CONTEXT>");
    for (int i = 0; i < c->n_eos; i++)
        if (c->eos_token_ids[i] == end_of_turn)
            return 0;
    if (end_of_turn >= 0 && c->n_eos < 8)
        c->eos_token_ids[c->n_eos++] = end_of_turn;
    return 0;
}

int model_config_load(struct model_config *c, const char *dir, struct error *err)
{
    char path[4096], *config = NULL, *generation = NULL;
    size_t config_bytes = 0, generation_bytes = 0;
    struct error missing = {0};
    int rc = -1;
    snprintf(path, sizeof(path), "%s/config.json", dir);
    config = json_read_file(path, CONFIG_MAX_BYTES, &config_bytes, err);
    if (!config)
        goto out;
    snprintf(path, sizeof(path), "%s/generation_config.json", dir);
    generation = json_read_file(path, CONFIG_MAX_BYTES, &generation_bytes, &missing);
    if (!generation && missing.code != ERROR_NOT_FOUND) {
        *err = missing;
        goto out;
    }
    rc = model_config_parse(c, config, config_bytes, generation, generation_bytes, err);
    if (rc == 0 && c->image_token_id < 0)
        rc = read_tokenizer_ids(c, dir, err);
    char resolved[PATH_MAX];
    const char *full = realpath(dir, resolved) ? resolved : dir;
    const char *base = strrchr(full, '/');
    json_printable(base ? base + 1 : full, c->name, sizeof(c->name));
out:
    free(generation);
    free(config);
    return rc;
}

int model_dtype_parse(const struct model_config *c, const char *name, enum dtype *out,
                      struct error *err)
{
    char buf[48];
    if (strcmp(name, "auto") == 0)
        *out = c->stored_dtype;
    else if (strcmp(name, "float32") == 0)
        *out = DTYPE_F32;
    else if (strcmp(name, "bfloat16") == 0)
        *out = DTYPE_BF16;
    else if (strcmp(name, "float16") == 0 || strcmp(name, "half") == 0)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "--dtype %s: activations of this family overflow float16; use bfloat16 or "
                         "float32 (float16 files load with either)",
                         name);
    else
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "--dtype %s: one of auto, float32, bfloat16 is expected",
                         json_printable(name, buf, sizeof(buf)));
    return 0;
}

int vision_config_n_patches(const struct vision_config *c, int height, int width)
{
    return (height / c->patch_height) * (width / c->patch_width);
}

int model_config_n_features(const struct model_config *c, int height, int width)
{
    int n = vision_config_n_patches(&c->vision, height, width) + c->feature_keeps_cls;
    int side = (int)sqrt((double)n);
    if (n < 1 || side * side != n || side % c->downsample_k != 0)
        return 0;
    return (side / c->downsample_k) * (side / c->downsample_k);
}

enum layer_kind text_config_layer_kind(const struct text_config *c, int layer)
{
    if (c->architecture != TEXT_QWEN3_MOE || (layer + 1) % c->decoder_sparse_step != 0)
        return LAYER_DENSE;
    for (int i = 0; i < c->n_dense_layers; i++)
        if (c->dense_layers[i] == layer)
            return LAYER_DENSE;
    return LAYER_MOE;
}
