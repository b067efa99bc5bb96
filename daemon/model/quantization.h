/*
 * Which weights of a model are held in fewer bits, and in which format.
 *
 * Asked for at load (--quantization), from a checkpoint of plain floats; or the checkpoint's own,
 * as its config.json says (quantization_config.h). Pure: a function of the method and of a weight's
 * kind; weight_list.c writes the answer beside each weight, where plan.c and weights.c read it. Of
 * a quantised checkpoint that answer is what such files usually hold; weights_open() corrects it by
 * what these files do hold, for single weights are left out by lists of names and patterns.
 *
 *     method              language linears   vision, projector   lm_head, embedding
 *     int8                int8 a row         int8 a row          int8 a row
 *     int4                int4 a group       int8 a row          int8 a row
 *     fp8                 fp8 a row          fp8 a row           as --dtype, as vLLM's fp8 has them
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
    QUANTIZATION_FP8,
    QUANTIZATION_BITSANDBYTES_FP4,
    QUANTIZATION_BITSANDBYTES_NF4,
    QUANTIZATION_AWQ, // this and those below: the checkpoint's own
    QUANTIZATION_GPTQ,
    QUANTIZATION_BITSANDBYTES_4BIT,
    QUANTIZATION_BITSANDBYTES_8BIT,
    QUANTIZATION_COMPRESSED_TENSORS,
    QUANTIZATION_STORED_FP8,
};

struct quantization {
    enum quantization_method method;
    int64_t group_size; // columns, of INT4; 0: a whole row
    /* Of a quantised checkpoint. */
    enum weight_format format; // of the language model's linears
    int bits;                  // of a code
    int64_t group_rows;        // rows that share scales, where FP8 is scaled in blocks; else 0
    int has_zeros;             // zero points
    int has_order;             // GPTQ's desc_act: columns of a group lie anywhere in the row
    int zeros_less_one;        // GPTQ's first format keeps zero points less one
    int with_vision;           // the vision tower and projector are quantised too
    /* --activation-quantization: what products with weights in codes round their input to (struct
     * linear's x_format): FP8 with FP8 weights of one scale a row, INT8 with integers whose groups
     * are in order, or WEIGHT_FLOAT, nothing. */
    enum weight_format x_format;
};

enum weight_kind {
    KIND_OTHER,           // norms, biases, positions, the convolution, the router
    KIND_LANGUAGE_LINEAR, // experts too
    KIND_VISION_LINEAR,   // the projector too
    KIND_LM_HEAD,
    KIND_EMBEDDING,
};

/* --quantization and --quantization-group-size, into what the checkpoint's config left there.
 * Error: a name or size that there is not; a name, where the checkpoint is quantised already. */
int quantization_parse(struct quantization *q, const char *name, int64_t group_size,
                       struct error *err);
/* --activation-quantization, none, fp8 or int8, into what quantization_parse() left there. Error:
 * fp8, where the weights are not FP8, or share scales in groups of columns; int8, where they are
 * not integers, or their groups are in no order. */
int quantization_parse_activations(struct quantization *q, const char *name, struct error *err);
/* 1 when the checkpoint's own files hold codes. */
int quantization_is_stored(const struct quantization *q);
/* "none", "int8", "int4 (groups of 128)", "gptq, int4 (groups of 128)", …: for logs, the plan and
 * GetModel. */
#define QUANTIZATION_BYTES 64 // holds the longest
const char *quantization_describe(const struct quantization *q, char *buf, size_t n_bytes);
/* How a matrix of in_dim columns is held, WEIGHT_FLOAT for as it is, and columns a group. */
enum weight_format quantization_format(const struct quantization *q, enum weight_kind kind,
                                       int64_t in_dim, int64_t *group_size);
/* bitsandbytes' groups run over the ends of rows that are no multiple of them; each row is then
 * held in smaller groups of so many columns, which lie in a single one of those. */
int64_t quantization_flat_group(int64_t in_dim, int64_t group_size);

#endif
