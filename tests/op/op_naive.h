/*
 * The definition of each op: a plain loop in double precision, one screen each at most.
 *
 * op_test holds every back end to these. They share nothing with the back ends but the structs,
 * naive_draw() aside.
 */
#ifndef INTERNVLD_TESTS_OP_NAIVE_H
#define INTERNVLD_TESTS_OP_NAIVE_H

#include "kernels/backend.h"

double naive_activation(double x, enum activation act);
/* y [m, n] contiguous <- residual + scale * act(x w^T + bias); x and w as float32, rounded to
 * bfloat16 first when `bf16`. bias, scale, residual [m, n] may be NULL. */
void naive_matmul(float *y, const struct tensor *x, const struct tensor *w, int bf16,
                  const float *bias, enum activation act, const float *scale,
                  const struct tensor *residual);
void naive_rms_norm(float *y, const struct tensor *x, const float *weight, float eps);
void naive_layer_norm(float *y, const struct tensor *x, const float *weight, const float *bias,
                      float eps);
/* x [n_rows, n_heads * head_dim] rotated into y, contiguous. */
void naive_rope(float *y, const struct tensor *x, const float *cos, const float *sin, int head_dim);
/* One query [head_dim] against n keys and values [n, head_dim] that lie `stride` floats apart. */
void naive_attend(float *out, float *probs, const float *q, const float *k, const float *v,
                  int64_t n, int64_t stride, int head_dim, double scale);
/* What int8 pages hold of x [n] (struct kv_pages): the codes; returns the scale. */
float naive_codes(int8_t *codes, const float *x, int n);
/* Of logits [vocab], all finite. */
struct top_k naive_top_k(const float *logits, int vocab, float temperature);
/* What p draws from the best of its row: kernels/draw_best.h itself, which sampler_test holds to
 * the sampler. */
struct drawn naive_draw(const struct draw_params *p, const struct top_k *best, int vocab);

#endif
