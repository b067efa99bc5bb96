/*
 * Which weights of a model are held in fewer bits, and in which format.
 *
 * Asked for at load (--quantization), from a checkpoint of plain floats. Pure: a function of the
 * method and of a weight's kind; weight_list.c writes the answer beside each weight, where plan.c
 * and weights.c read it.
 *
 *     method              language linears   vision, projector   lm_head   embedding
 *     int8                int8 a row         int8 a row          int8      as --dtype
 *     int4                int4 a group       int8 a row          int8      as --dtype
 *     bitsandbytes-nf4    nf4                nf4                 as --dtype: not converted by
 *     bitsandbytes-fp4    fp4                fp4                 Transformers' default either
 *
 * Never quantised: the patch convolution, norms, biases, tables of positions, the router of
 * experts. Experts are, each as a matrix of its own.
 */
#ifndef INTERNVLD_MODEL_QUANTIZATION_H
#define INTERNVLD_MODEL_QUANTIZATION_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/error.h"
#include "kernels/quantized.h"

enum quantization_method {
    QUANTIZATION_NONE,
    QUANTIZATION_INT8,
    QUANTIZATION_INT4,
    QUANTIZATION_BITSANDBYTES_FP4,
    QUANTIZATION_BITSANDBYTES_NF4,
};

struct quantization {
    enum quantization_method method;
    int group_size; // columns, of INT4
};

enum weight_kind {
    KIND_OTHER,           // norms, biases, tables, the convolution, the router
    KIND_LANGUAGE_LINEAR, // experts too
    KIND_VISION_LINEAR,   // the projector too
    KIND_LM_HEAD,
};

/* --quantization and --quantization-group-size. Error: a name or size that there is not. */
int quantization_parse(struct quantization *q, const char *name, int64_t group_size,
                       struct error *err);
/* "none", "int8", "int4 (groups of 128)", …: for logs, the plan and GetModel. */
const char *quantization_describe(const struct quantization *q, char *buf, size_t n_bytes);
/* How a matrix of in_dim columns is held, WEIGHT_FLOAT for as it is, and columns a group. */
enum weight_format quantization_format(const struct quantization *q, enum weight_kind kind,
                                       int64_t in_dim, int64_t *group_size);

#endif
