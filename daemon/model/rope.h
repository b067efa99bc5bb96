/*
 * Rotary position embeddings: the angles, as Transformers computes them.
 *
 * Pure. Float32 in the order of modeling_rope_utils.py and Qwen2RotaryEmbedding, since a difference
 * of one ulp in an inverse frequency grows with the position.
 */
#ifndef INTERNVLD_MODEL_ROPE_H
#define INTERNVLD_MODEL_ROPE_H

#include <stdint.h>

#include "daemon/model/config.h"

/* inv_freq [head_dim / 2] for a sequence of `length` tokens (only ROPE_DYNAMIC looks at it: above
 * original_max_positions the base grows with it). Returns the factor that cos and sin are
 * multiplied by (1 but for yarn). */
float rope_frequencies(const struct rope_config *c, int head_dim, int32_t length, float *inv_freq);

/* cos, sin [head_dim / 2] of one position. */
void rope_angles(const float *inv_freq, float scale, int head_dim, float position, float *cos,
                 float *sin);

#endif
