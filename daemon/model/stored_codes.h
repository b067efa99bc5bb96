/*
 * One weight as a quantised checkpoint keeps it: which tensors, how codes are packed in them, and
 * rows of it as codes and scales of the kernels' one form (struct quantized).
 *
 *     layout        codes                                 scales              zero points
 *     AWQ           X.qweight int32 [in, out / 8]         [groups, out]       [groups, out / 8]
 *     GPTQ          X.qweight int32 [in / n, out]         [groups, out]       [groups, out / n]
 *     PACKED        X.weight_packed int32 [out, in / n]   [out, groups]       [out / n, groups]
 *     BYTES         X.weight int8 or E4M3 [out, in]       [1], [out] or [out, groups], as scales
 *     BITSANDBYTES  X.weight uint8 [out * in / 2, 1]      of the flattened weight; none
 *
 * with n = 32 / bits codes in an int32, the lowest bits first; AWQ's order of outputs in one is its
 * own. Everything is read from the mapped file in place. Knows the checkpoint's tensors, not the
 * model's. Sources: AutoAWQ (pack order of WQLinear_GEMM), AutoGPTQ and GPTQModel (QuantLinear),
 * compressed-tensors (pack_to_int32), bitsandbytes (QuantState.as_dict, Linear8bitLt),
 * Transformers' FineGrainedFP8.
 */
#ifndef INTERNVLD_MODEL_STORED_CODES_H
#define INTERNVLD_MODEL_STORED_CODES_H

#include "daemon/model/quantization.h"
#include "daemon/model/safetensors.h"
#include "parallel/shard.h"

enum stored_layout {
    STORED_AWQ,
    STORED_GPTQ,
    STORED_PACKED,
    STORED_BYTES,
    STORED_BITSANDBYTES,
};

enum stored_part {
    STORED_CODES,
    STORED_SCALES,
    STORED_ZEROS,
    STORED_ORDER,         // int32 [in]: the group of each column
    STORED_NESTED_SCALES, // bitsandbytes: SCALES are codes of their own
    STORED_NESTED_MAP,
    STORED_MAP,
    STORED_STATE,
    STORED_SHAPE,
    STORED_PART_COUNT,
};

struct stored_codes {
    const struct safetensors_tensor *parts[STORED_PART_COUNT]; // CODES NULL: there are no codes
    enum stored_layout layout;
    enum weight_format format;
    int bits;                // of a code
    int64_t out_dim, in_dim; // of the whole tensor
    int64_t group_size;      // columns; BITSANDBYTES: elements of the flattened weight
    int64_t n_groups;        // of one row
    int64_t rows_per_scale;  // BYTES: 1, or a block's, or all
    int has_order;           // STORED_ORDER is not the regular one
    int zeros_less_one;      // GPTQ's first format
    float nested_offset;
    int64_t nested_group; // scales that share a nested one
};

/* The codes of the weight [out_dim, in_dim] whose float tensor would be `name` ("….weight").
 * Returns 1; 0 when the files have none under this name; -1 and an error that names the tensor for
 * a missing companion, a type, a shape, or a group that there is not. */
int stored_codes_find(struct stored_codes *c, const struct safetensors *files, const char *name,
                      int64_t out_dim, int64_t in_dim, const struct quantization *q,
                      struct error *err);
/* Rows `rows` of it, columns `columns`, into rows `to` … of q, which has those columns and groups
 * and, where stored_codes_has_zeros(), zeros. Dies, naming the tensor, of scales that are not
 * finite and of codes that are no numbers. Several threads may read at once. */
void stored_codes_rows(const struct stored_codes *c, struct range rows, struct range columns,
                       struct quantized *q, int64_t to);
int stored_codes_has_zeros(const struct stored_codes *c);
/* Columns that share a scale in memory (quantization_flat_group() of bitsandbytes' groups). */
int64_t stored_codes_group_size(const struct stored_codes *c);
/* The group of column k, where has_order. */
int32_t stored_codes_group(const struct stored_codes *c, int64_t k);

#endif
