/*
 * config.json and generation_config.json of a checkpoint, validated.
 *
 * Every field of InternVLConfig, InternVLVisionConfig and the text configs is either represented
 * here, known to be inert at inference, or refused with a sentence. Read by every rank at start;
 * immutable afterwards. Sources: Transformers InternVLConfig, InternVLVisionConfig, Qwen2Config,
 * Qwen3Config, LlamaConfig.
 */
#ifndef INTERNVLD_MODEL_CONFIG_H
#define INTERNVLD_MODEL_CONFIG_H

#include <stddef.h>
#include <stdint.h>

#include "daemon/model/quantization.h"
#include "kernels/backend.h" // enum activation
#include "kernels/error.h"

enum norm_type { NORM_LAYER_NORM, NORM_RMS_NORM };

struct vision_config {
    int hidden_size, n_layers, n_heads, head_dim, intermediate_size;
    int image_height, image_width, patch_height, patch_width, n_channels;
    int attention_bias, use_qk_norm, use_mask_token, use_absolute_position_embeddings,
        use_mean_pooling;
    enum norm_type norm_type;
    enum activation hidden_act;
    float layer_norm_eps;
    int n_patches; // of one tile at the native size
};

enum text_architecture { TEXT_QWEN2, TEXT_QWEN3, TEXT_QWEN3_MOE, TEXT_LLAMA };
enum rope_type { ROPE_DEFAULT, ROPE_DYNAMIC, ROPE_LINEAR, ROPE_YARN };
enum layer_kind { LAYER_DENSE, LAYER_MOE };

struct rope_config {
    enum rope_type type;
    float theta, factor;
    int original_max_positions; // max_position_embeddings where the file has no other
    float beta_fast, beta_slow, attention_factor; // yarn; attention_factor 0: computed
    float mscale, mscale_all_dim;
    int truncate;
};

struct text_config {
    enum text_architecture architecture;
    int hidden_size, n_layers, n_heads, n_kv_heads, head_dim, intermediate_size;
    int vocab_size, max_positions;
    int attention_bias; // q, k, v (Qwen2: always 1)
    int output_bias;    // o_proj (Llama with attention_bias)
    int mlp_bias;       // Llama
    int use_qk_norm;    // Qwen3: RMSNorm per head, before rope
    enum activation hidden_act;
    float rms_norm_eps;
    struct rope_config rope;
    int sliding_window;     // 0: none
    int first_window_layer; // layers >= this one use the window
    /* Qwen3-MoE */
    int n_experts, n_experts_per_token, moe_intermediate_size, norm_topk_prob, decoder_sparse_step;
    int n_dense_layers;
    int dense_layers[256]; // mlp_only_layers
};

#define VISION_FEATURE_LAST INT32_MIN // vision_feature_layer -1: last_hidden_state

struct model_config {
    char name[128]; // base name of the directory
    struct vision_config vision;
    struct text_config text;
    enum dtype stored_dtype; // "dtype" / "torch_dtype": what --dtype auto means (F32 or BF16)
    struct quantization quantization; // the checkpoint's own; quantization_parse() sets another
    int image_token_id, image_seq_length;
    int downsample_k; // 1 / downsample_ratio
    enum activation projector_act;
    int feature_layer;     // index into hidden_states (0 … n_layers), or VISION_FEATURE_LAST
    int feature_keeps_cls; // vision_feature_select_strategy "full"
    int tie_word_embeddings;
    int n_features_per_tile; // derived: tokens of the language model a tile becomes
    /* generation_config.json, where it has them; the defaults below otherwise */
    int32_t eos_token_ids[8];
    int n_eos;
    int32_t bos_token_id, pad_token_id; // -1: none
    float temperature, top_p,
        repetition_penalty; // 1, 1, 1; do_sample false -> temperature 0 is the default
    int top_k;              // 0: off
    int do_sample;          // false where the file is silent: Transformers' greedy default
    int max_new_tokens;     // 0: none given
};

/* Reads DIR/config.json and DIR/generation_config.json (the latter may be missing). Error: one
 * sentence with the file, the field, the value found and what is accepted. */
int model_config_load(struct model_config *c, const char *dir, struct error *err);
/* The same from bytes: `generation` may be NULL. `c->name` is left empty. The token ids that an
 * OpenGVLab config.json leaves to its tokenizer stay -1 (model_config_load() reads them there). */
int model_config_parse(struct model_config *c, const char *config, size_t config_bytes,
                       const char *generation, size_t generation_bytes, struct error *err);
/* --dtype: "auto" (the checkpoint's own), "float32", "bfloat16". Others, float16 among them, are an
 * error: this family's activations overflow float16. */
int model_dtype_parse(const struct model_config *c, const char *name, enum dtype *out,
                      struct error *err);
/* Patches of a tile of height x width pixels (ragged remainders are dropped). */
int vision_config_n_patches(const struct vision_config *c, int height, int width);
/* Tokens of the language model such a tile becomes, or 0 when the feature path cannot take it: the
 * selected tokens must be a square count whose side downsample_k divides. */
int model_config_n_features(const struct model_config *c, int height, int width);
/* "mixture" test for Qwen3-MoE layers. */
enum layer_kind text_config_layer_kind(const struct text_config *c, int layer);

#endif
