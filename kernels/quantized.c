/*
 * Codes to values and back (quantized.h).
 */
#include "kernels/quantized.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "kernels/log.h"

#define E4M3_MAX 448.0f
#define E4M3_NAN 0x7f

static const float int4_table[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
static const float code_table[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static const float nf4_table[16] = {
    -1.0f,         -0.6961928f,   -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f,
    -0.091050036f, 0.0f,          0.0795803f,   0.1609302f,  0.2461123f,   0.33791524f,
    0.44070983f,   0.5626170039f, 0.72295684f,  1.0f,
};

/* Sign, two bits of exponent, one of mantissa; twelfths, so that the largest is 1. */
static const float fp4_table[16] = {
    0.0f,  0.0625f / 12,  8.0f / 12,  1.0f,  4.0f / 12,  0.5f,  2.0f / 12,  0.25f,
    -0.0f, -0.0625f / 12, -8.0f / 12, -1.0f, -4.0f / 12, -0.5f, -2.0f / 12, -0.25f,
};

/* Codes of FP4 in the order of their values; NF4's are in order. */
static const uint8_t fp4_order[16] = {11, 10, 13, 12, 15, 14, 9, 8, 0, 1, 6, 7, 4, 5, 2, 3};

const char *weight_format_name(enum weight_format f)
{
    static const char *const names[] = {"float", "int8", "int8", "fp8", "int4", "nf4", "fp4"};
    return names[f];
}

int weight_format_bits(enum weight_format f)
{
    switch (f) {
    case WEIGHT_INT8:
    case WEIGHT_INT8_127:
    case WEIGHT_FP8:
        return 8;
    case WEIGHT_INT4:
    case WEIGHT_NF4:
    case WEIGHT_FP4:
        return 4;
    default:
        BUG("weight format %d has no codes", (int)f);
    }
}

int weight_format_is_factored(enum weight_format f)
{
    return f != WEIGHT_FLOAT && f != WEIGHT_NF4 && f != WEIGHT_FP4;
}

int weight_format_is_integer(enum weight_format f)
{
    return f == WEIGHT_INT8 || f == WEIGHT_INT8_127 || f == WEIGHT_INT4;
}

const float *weight_format_table(enum weight_format f, int has_zeros)
{
    switch (f) {
    case WEIGHT_INT4:
        return has_zeros ? code_table : int4_table;
    case WEIGHT_NF4:
        return nf4_table;
    case WEIGHT_FP4:
        return fp4_table;
    default:
        return NULL;
    }
}

static float fp8_e4m3_to_f32(uint8_t code)
{
    int exponent = code >> 3 & 15, mantissa = code & 7;
    float sign = code & 0x80 ? -1.0f : 1.0f;
    if (exponent == 15 && mantissa == 7)
        return NAN;
    if (exponent == 0)
        return sign * ldexpf((float)mantissa, -9);
    return sign * ldexpf((float)(8 + mantissa), exponent - 10);
}

int64_t quantized_group(const struct quantized *q, int64_t k)
{
    return q->group_of ? q->group_of[k] : (k + q->group_phase) / q->group_size;
}

int quantized_is_regular(const struct quantized *q, int64_t first, int64_t end)
{
    const int unit = 32 / weight_format_bits(q->format);
    if (q->group_of)
        return 0;
    return end == first || quantized_group(q, first) == quantized_group(q, end - 1) ||
           (q->group_size % unit == 0 && (first + q->group_phase) % unit == 0);
}

float quantized_multiple(const struct quantized *q, int64_t n, int64_t k)
{
    uint8_t code = q->codes[n * q->in_dim + k];
    float zero = q->zeros ? (float)q->zeros[n * q->n_groups + quantized_group(q, k)] : 0.0f;
    switch (q->format) {
    case WEIGHT_INT8:
    case WEIGHT_INT8_127:
        return (float)(int8_t)code - zero;
    case WEIGHT_FP8:
        return fp8_e4m3_to_f32(code);
    default:
        return weight_format_table(q->format, q->zeros != NULL)[code] - zero;
    }
}

float quantized_value(const struct quantized *q, int64_t n, int64_t k)
{
    float scale = q->scales[n * q->n_groups + quantized_group(q, k)];
    float value = quantized_multiple(q, n, k) * scale;
    return q->format == WEIGHT_INT8_127 ? value * INT8_127_FACTOR : value;
}

/* ---- floats to codes ---- */

static float largest_magnitude(const float *w, int64_t n)
{
    float largest = 0;
    for (int64_t i = 0; i < n; i++)
        largest = fabsf(w[i]) > fabsf(largest) ? w[i] : largest;
    return largest;
}

static float quantize_int8(const float *w, int64_t n, uint8_t *codes)
{
    float scale = fabsf(largest_magnitude(w, n)) / 127;
    for (int64_t i = 0; i < n; i++)
        codes[i] = (uint8_t)(int8_t)(scale > 0 ? lrintf(w[i] / scale) : 0);
    return scale;
}

static float quantize_int4(const float *w, int64_t n, uint8_t *codes)
{
    float scale = largest_magnitude(w, n) / -8;
    for (int64_t i = 0; i < n; i++) {
        long code = scale != 0 ? lrintf(w[i] / scale) : 0;
        codes[i] = (uint8_t)((code > 7 ? 7 : code) + 8);
    }
    return scale;
}

/* The nearest, ties to even; of the largest where x is above it. */
static uint8_t f32_to_fp8_e4m3(float x)
{
    if (isnan(x))
        return E4M3_NAN;
    float magnitude = fminf(fabsf(x), E4M3_MAX);
    uint8_t sign = signbit(x) ? 0x80 : 0;
    uint32_t bits;
    memcpy(&bits, &magnitude, sizeof(bits));
    if (magnitude < 0x1p-6f) // without a leading 1: in steps of the smallest
        return sign | (uint8_t)lrintf(magnitude * 0x1p9f);
    bits += 0x7ffff + (bits >> 20 & 1); // three bits of the mantissa stay
    return sign | (uint8_t)((bits >> 20) - (127 - 7) * 8);
}

static float quantize_fp8(const float *w, int64_t n, uint8_t *codes)
{
    float scale = fabsf(largest_magnitude(w, n)) / E4M3_MAX;
    for (int64_t i = 0; i < n; i++)
        codes[i] = scale > 0 ? f32_to_fp8_e4m3(w[i] / scale) : 0;
    return scale;
}

/* Index of the nearest value of a sorted table, the lower of two as near. */
static int nearest(const float midpoints[15], float x)
{
    int i = 0;
    while (i < 15 && x > midpoints[i])
        i++;
    return i;
}

static float quantize_table(enum weight_format f, const float *w, int64_t n, int is_rest,
                            uint8_t *codes)
{
    const float *table = weight_format_table(f, 0);
    float midpoints[15];
    for (int i = 0; i < 15; i++) {
        float lower = table[f == WEIGHT_FP4 ? fp4_order[i] : i];
        float upper = table[f == WEIGHT_FP4 ? fp4_order[i + 1] : i + 1];
        midpoints[i] = (lower + upper) / 2;
    }
    const float tiny = 1e-38f; // bitsandbytes' guard against a group of zeros
    float scale = fabsf(largest_magnitude(w, n)), divisor = scale > tiny ? scale : tiny;
    float reciprocal = 1.0f / divisor;
    for (int64_t i = 0; i < n; i++) {
        float x = is_rest ? w[i] / divisor : w[i] * reciprocal;
        int at = nearest(midpoints, x);
        codes[i] = f == WEIGHT_FP4 ? fp4_order[at] : (uint8_t)at;
    }
    return is_rest ? divisor : scale;
}

float quantize_group(enum weight_format f, const float *w, int64_t n, int is_rest, uint8_t *codes)
{
    switch (f) {
    case WEIGHT_INT8:
        return quantize_int8(w, n, codes);
    case WEIGHT_FP8:
        return quantize_fp8(w, n, codes);
    case WEIGHT_INT4:
        return quantize_int4(w, n, codes);
    case WEIGHT_NF4:
    case WEIGHT_FP4:
        return quantize_table(f, w, n, is_rest, codes);
    default:
        BUG("floats are not quantised to %s here", weight_format_name(f));
    }
}
