/*
 * InternViT, feature choice, pixel shuffle and projector: tiles become rows of the language model.
 *
 *     tiles -> patches -> patch embedding (+ class token, + positions)
 *     n_layers x { x += lambda_1 * attention(norm(x));  x += lambda_2 * mlp(norm(x)) }
 *     (final norm) -> drop the class token -> pixel shuffle -> LayerNorm, linear, act, linear
 *
 * Owns its weights and scratch. A tile's features are bitwise the same whatever else is in the
 * batch. Source: Transformers InternVLVisionModel, InternVLModel.get_image_features.
 */
#ifndef INTERNVLD_MODEL_VISION_H
#define INTERNVLD_MODEL_VISION_H

#include "daemon/model/capture.h"
#include "daemon/model/carve.h"
#include "daemon/model/config.h"
#include "daemon/model/weights.h"
#include "kernels/backend.h"
#include "parallel/batch.h"

struct vision_layer {
    float *norm_before, *norm_before_bias; // [dim]; biases NULL for RMSNorm
    float *norm_after, *norm_after_bias;   // [dim]
    float *q_norm, *k_norm;                // [dim] or NULL
    float *lambda_1, *lambda_2;            // [dim]
    struct linear qkv, projection, fc1, fc2;
};

/* Rows: n_tokens tokens of as many whole tiles as fit. void: of the back end's activation_dtype, or
 * (hidden; qkv but for models that norm q and k) of what products are computed from. */
struct vision_scratch {
    int64_t n_tokens;
    float *pixels;   // [tiles, channels, height, width]
    void *patches;   // [n_tokens, channels * patch_height * patch_width]
    float *x;        // [n_tokens, dim] the residual stream
    void *normed;    // [n_tokens, dim]
    void *qkv;       // [n_tokens, 3 * dim]; also, as float32, embedded patches, selected tokens
    void *attention; // [n_tokens, dim]; the projector's norm later
    void *hidden;    // [n_tokens, intermediate]
    float *selected; // [n_tokens, dim] hidden_states[feature_layer]
    float *block;    // [n_tokens, dim] seen as [n_features, k * k * dim]
    void *linear_1;  // [n_features, text dim]
    float *features; // [n_features, text dim]
    float *position; // [n_tokens, dim] position table of the current tile size
};

struct vision_model {
    const struct model_config *config;
    struct backend *backend;
    enum dtype dtype; // of its products
    struct linear patch;
    float *cls;                     // [dim]
    float *mask_token;              // [dim] or NULL (use_mask_token)
    float *host_position;           // [1 + n_patches, dim] on the host, or NULL
    struct vision_layer *layers;    // [n_layers]
    float *final_norm, *final_bias; // [dim] or NULL (use_mean_pooling)
    float *block_norm, *block_bias; // [k * k * dim]
    struct linear linear_1, linear_2;
    const float *pixel_mean, *pixel_std; // [n_channels] borrowed; for U8 tiles
    int position_height, position_width; // pixels that scratch.position is for; 0: none yet
    int max_tiles;                       // of one batch
    struct graph **graphs;               // [n_graphs]: the recorded run of i + 1 tiles
    int n_graphs;                        // 0: nothing is recorded
    void *scratch_base;
    struct vision_scratch scratch;
    size_t scratch_bytes, weight_bytes;
};

/* One tile may have up to this many times the native number of patches (other sizes come from
 * Forward alone). */
#define VISION_MAX_SCALE 4

/* Scratch for max_tiles native tiles at once, or as many as make 8192 tokens, and for one tile of
 * VISION_MAX_SCALE, on a back end with activations of `activation` and products of `dtype`. */
size_t vision_scratch_bytes(const struct model_config *c, int max_tiles, enum dtype activation,
                            enum dtype dtype);

/* Host memory: the table of positions, a batch of tiles, its features and their message. */
size_t vision_host_bytes(const struct model_config *c, int max_tiles);
/* The largest input of a product: rows, and columns. */
void vision_largest_input(const struct model_config *c, int max_tiles, int64_t *n_rows,
                          int64_t *n_columns);

/* Binds from `w`. pixel_mean and pixel_std are borrowed and may be NULL when no U8 tile will come.
 */
void vision_init(struct vision_model *m, const struct model_config *c, struct weights *w,
                 struct backend *b, enum dtype dtype, int max_tiles, const float *pixel_mean,
                 const float *pixel_std);
void vision_release(struct vision_model *m); // accepts a zeroed struct
/* On a back end that replays: records the run of each number of U8 tiles of the native size that
 * fits the scratch, which vision_forward() replays from then on, to the same bits. Once more when
 * the weights are others. */
void vision_record(struct vision_model *m);

/* Error (INVALID_ARGUMENT) when tiles of this size cannot be encoded at all: for the gateway. */
int vision_check_size(const struct model_config *c, int channels, int height, int width,
                      struct error *err);

/* features [n_tiles * model_config_n_features(), text dim] on the host. A size whose tokens the
 * projector cannot take (0 features) only gives captures. */
void vision_forward(struct vision_model *m, const struct tile_batch *t, float *features,
                    struct capture_list *captures);

#endif
