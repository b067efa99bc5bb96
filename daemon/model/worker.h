/*
 * What a vision or language rank is told when it starts.
 *
 * main.c fills one struct from the command line and the checkpoint's files, the same on every rank;
 * vision_worker_run() and language_worker_run() borrow it for their life.
 */
#ifndef INTERNVLD_MODEL_WORKER_H
#define INTERNVLD_MODEL_WORKER_H

#include <stdint.h>

#include "daemon/model/config.h"
#include "daemon/model/device.h"
#include "kernels/tensor.h"

struct worker_options {
    const char *model_dir;
    const struct model_config *model;
    enum dtype dtype;               // F32 or BF16: what model_dtype_parse() made of --dtype
    enum dtype kv_dtype;            // the same, or I8: --kv-cache-dtype
    int dummy_weights;              // --load-format dummy: random weights of the real shapes
    int32_t page_size;              // tokens, a multiple of 16
    int32_t n_pages;                // KV pages of every language rank: plan.h
    int32_t max_model_len;          // tokens of one sequence
    int32_t max_num_seqs;           // sequences of one batch
    int32_t max_num_batched_tokens; // tokens of one batch
    int32_t max_vision_tiles;       // tiles of one message; larger ones are cut
    /* Of the preprocessor, for U8 tiles: x = (float(u8) - mean[c]) / std[c]. [n_channels] */
    const float *pixel_mean, *pixel_std;
    struct device *device; // of this rank, opened by device_open() on every rank
};

#endif
