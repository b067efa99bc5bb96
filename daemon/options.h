/*
 * The command line: vLLM's names, one table that both parses and prints the help.
 *
 * Knows the names, types and ranges of options, and nothing of what they do. Environment variables
 * are not read here (main.c and log_init() read the two there are).
 */
#ifndef INTERNVLD_OPTIONS_H
#define INTERNVLD_OPTIONS_H

#include <stdint.h>
#include <stdio.h>

#include "kernels/error.h"

/* Texts are borrowed from argv. Numbers that were not given and have no fixed default are 0. */
struct options {
    const char *model;
    const char *dtype, *load_format, *device, *quantization, *activation_quantization;
    const char *kv_cache_dtype;
    int64_t quantization_group_size;
    int64_t tensor_parallel_size, pipeline_parallel_size, vision_ranks, threads;
    int64_t max_model_len, max_num_seqs, max_num_batched_tokens, block_size, kv_cache_memory_bytes;
    int64_t max_vision_tiles, vision_cache_bytes, max_queued_requests;
    int64_t no_enable_prefix_caching;
    const char *listen, *metrics_listen, *port_file, *auth_token_file;
    int64_t deterministic, enforce_eager, vision_share_gpu, insecure_listen; // flags are 0 or 1
    int64_t disable_custom_all_reduce;
    int64_t start_timeout, drain_timeout, processor_threads, max_connections, max_message_bytes;
    int64_t stream_interval;
    int64_t media_store_bytes, media_ttl, max_media_bytes;
    int64_t max_image_pixels, max_tiles, max_media, max_frames;
    int64_t plan, map, help, version;
};

/* Defaults, then argv. Numbers take K, M, G (powers of 1024). An unknown option, a missing or bad
 * value, a missing --model: INVALID_ARGUMENT with one sentence. */
int options_parse(struct options *o, int argc, char **argv, struct error *err);
void options_usage(FILE *f); // one line
void options_help(FILE *f);

#endif
