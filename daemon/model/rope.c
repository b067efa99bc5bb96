/*
 * Rotary position embeddings: the angles (rope.h).
 */
#include "daemon/model/rope.h"

#include <math.h>

static void plain_frequencies(float base, int head_dim, float *inv_freq)
{
    for (int i = 0; i < head_dim / 2; i++)
        inv_freq[i] = 1.0f / powf(base, (float)(2 * i) / (float)head_dim);
}

/* _compute_dynamic_ntk_parameters(): float32 throughout, since the length arrives as a tensor. */
static float dynamic_base(const struct rope_config *c, int head_dim, int32_t length)
{
    if (length <= c->original_max_positions)
        return c->theta;
    float ratio = c->factor * (float)length / (float)c->original_max_positions - (c->factor - 1);
    return c->theta * powf(ratio, (float)((double)head_dim / (head_dim - 2)));
}

static double yarn_mscale(double scale, double mscale)
{
    return scale <= 1 ? 1.0 : 0.1 * mscale * log(scale) + 1.0;
}

static float yarn_attention_factor(const struct rope_config *c)
{
    if (c->attention_factor > 0)
        return c->attention_factor;
    if (c->mscale > 0 && c->mscale_all_dim > 0)
        return (float)(yarn_mscale(c->factor, c->mscale) /
                       yarn_mscale(c->factor, c->mscale_all_dim));
    return (float)yarn_mscale(c->factor, 1);
}

/* The dimension that turns `rotations` times over the original context. */
static double yarn_dimension(const struct rope_config *c, int head_dim, double rotations)
{
    const double pi = 3.14159265358979323846;
    return head_dim * log(c->original_max_positions / (rotations * 2 * pi)) /
           (2 * log((double)c->theta));
}

/* _compute_yarn_parameters(): between `low` and `high` the frequencies go over from unchanged to
 * divided by the factor. */
static void yarn_frequencies(const struct rope_config *c, int head_dim, float *inv_freq)
{
    double low = yarn_dimension(c, head_dim, c->beta_fast);
    double high = yarn_dimension(c, head_dim, c->beta_slow);
    if (c->truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = fmax(low, 0);
    high = fmin(high, head_dim - 1);
    if (low == high)
        high += 0.001;
    for (int i = 0; i < head_dim / 2; i++) {
        float position = powf(c->theta, (float)(2 * i) / (float)head_dim);
        float ramp = ((float)i - (float)low) / (float)(high - low);
        ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
        float unchanged = 1 - ramp;
        inv_freq[i] = 1.0f / (c->factor * position) * (1 - unchanged) + 1.0f / position * unchanged;
    }
}

float rope_frequencies(const struct rope_config *c, int head_dim, int32_t length, float *inv_freq)
{
    switch (c->type) {
    case ROPE_DEFAULT:
        plain_frequencies(c->theta, head_dim, inv_freq);
        break;
    case ROPE_DYNAMIC:
        plain_frequencies(dynamic_base(c, head_dim, length), head_dim, inv_freq);
        break;
    case ROPE_LINEAR:
        plain_frequencies(c->theta, head_dim, inv_freq);
        for (int i = 0; i < head_dim / 2; i++)
            inv_freq[i] /= c->factor;
        break;
    case ROPE_YARN:
        yarn_frequencies(c, head_dim, inv_freq);
        return yarn_attention_factor(c);
    }
    return 1;
}

void rope_angles(const float *inv_freq, float scale, int head_dim, float position, float *cos,
                 float *sin)
{
    for (int i = 0; i < head_dim / 2; i++) {
        float angle = position * inv_freq[i];
        cos[i] = cosf(angle) * scale;
        sin[i] = sinf(angle) * scale;
    }
}
