/*
 * GetModel: what is served, by which ranks, within which limits, how busy.
 */
#include <stdlib.h>

#include "daemon/gateway/gateway_state.h"
#include "kernels/clock.h"
#include "kernels/log.h"

#define ROLE_BYTES 64

static const char *architecture_name(enum text_architecture a)
{
    static const char *const names[] = {[TEXT_QWEN2] = "qwen2",
                                        [TEXT_QWEN3] = "qwen3",
                                        [TEXT_QWEN3_MOE] = "qwen3_moe",
                                        [TEXT_LLAMA] = "llama"};
    return names[a];
}

static void fill_rank(const struct gateway *g, int rank, Internvl__V1__RankInfo *out,
                      char role[ROLE_BYTES])
{
    const struct rank_info *info = &g->ranks[rank];

    internvl__v1__rank_info__init(out);
    out->rank = (uint32_t)rank;
    out->role = (char *)(uintptr_t)topology_describe(g->topology, rank, role, ROLE_BYTES);
    out->host = (char *)(uintptr_t)info->host;
    out->device = (char *)(uintptr_t)info->device;
    out->weight_bytes = info->weight_bytes;
    out->kv_bytes = info->kv_bytes;
    out->scratch_bytes = info->scratch_bytes;
    out->rss_bytes = info->rss_bytes;
    out->load_ms = info->load_ms;
}

static void fill_limits(const struct gateway *g, Internvl__V1__Limits *out)
{
    const struct gateway_options *o = g->options;

    internvl__v1__limits__init(out);
    out->max_message_bytes = (uint64_t)o->max_message_bytes;
    out->max_image_pixels = (uint64_t)o->limits.max_image_pixels;
    out->max_media = (uint32_t)o->limits.max_media;
    out->max_tiles = (uint32_t)o->limits.max_tiles;
    out->max_frames = (uint32_t)o->limits.max_frames;
    out->max_model_len = (uint32_t)o->engine.max_model_len;
    out->max_num_seqs = (uint32_t)o->engine.max_num_seqs;
    out->max_num_batched_tokens = (uint32_t)o->engine.max_num_batched_tokens;
    out->max_queued_requests = (uint32_t)o->engine.max_queued_requests;
    out->max_n = LIMIT_N;
    out->max_logprobs = TOP_LOGPROBS_MAX;
    out->max_stop_strings = LIMIT_STOP_STRINGS;
    out->max_stop_token_ids = LIMIT_STOP_TOKEN_IDS;
    out->max_logit_bias = LIMIT_LOGIT_BIAS;
    out->max_num_beams = BEAMS_MAX;
    out->max_continuations = LIMIT_CONTINUATIONS;
    out->max_stop_string_bytes = LIMIT_STOP_BYTES;
    out->max_forward_bytes = (uint64_t)LIMIT_FORWARD_BYTES;
    out->max_text_bytes = o->limits.max_text_bytes;
    out->max_media_bytes = o->max_media_bytes;
    out->max_uploads = o->media_store_bytes ? MAX_UPLOADS : 0;
}

static void fill_load(const struct gateway *g, Internvl__V1__Load *out)
{
    struct engine_stats stats;

    engine_stats(g->engine, &stats);
    internvl__v1__load__init(out);
    out->running = (uint32_t)stats.n_running;
    out->waiting = (uint32_t)(stats.n_waiting + work_queue_length(g->work));
    out->kv_pages_used = (uint32_t)stats.n_pages_used;
    out->kv_pages = (uint32_t)stats.n_pages;
    out->uptime_ms = (clock_now_ns() - g->start_ns) / 1000000u;
}

static void fill_model(const struct gateway *g, Internvl__V1__GetModelResponse *out,
                       char quantization[QUANTIZATION_BYTES])
{
    const struct model_config *m = g->model;
    const struct layout *l = &g->topology->layout;

    out->name = (char *)(uintptr_t)m->name;
    out->version = INTERNVLD_VERSION;
    out->architecture = (char *)(uintptr_t)architecture_name(m->text.architecture);
    out->dtype = (char *)(uintptr_t)g->options->dtype_name;
    out->kv_cache_dtype = (char *)(uintptr_t)g->options->kv_dtype_name;
    quantization_describe(&m->quantization, quantization, QUANTIZATION_BYTES);
    out->quantization = quantization;
    out->vocab_size = (uint32_t)m->text.vocab_size;
    out->text_layers = (uint32_t)m->text.n_layers;
    out->vision_layers = (uint32_t)m->vision.n_layers;
    out->tile_height = (uint32_t)m->vision.image_height;
    out->tile_width = (uint32_t)m->vision.image_width;
    out->tokens_per_tile = (uint32_t)m->n_features_per_tile;
    out->tensor_parallel_size = (uint32_t)l->tensor_parallel;
    out->pipeline_parallel_size = (uint32_t)l->pipeline_parallel;
    out->vision_ranks = (uint32_t)l->n_vision;
    out->page_size = (uint32_t)g->options->engine.page_size;
}

void model_info_message(void *arg, struct rpc_call *c)
{
    struct gateway *g = arg;
    size_t world = (size_t)g->topology->world;
    struct arena scratch;
    struct error err = {0};
    Internvl__V1__GetModelResponse response = INTERNVL__V1__GET_MODEL_RESPONSE__INIT;
    Internvl__V1__Limits limits;
    Internvl__V1__Load load;
    char quantization[QUANTIZATION_BYTES];

    if (rpc_take_message(c, &internvl__v1__get_model_request__descriptor, 16, &scratch, &err)) {
        Internvl__V1__RankInfo *ranks = xcalloc(world, sizeof(*ranks));
        Internvl__V1__RankInfo **pointers = xcalloc(world, sizeof(*pointers));
        char(*roles)[ROLE_BYTES] = xcalloc(world, sizeof(*roles));

        for (size_t i = 0; i < world; i++) {
            fill_rank(g, (int)i, &ranks[i], roles[i]);
            pointers[i] = &ranks[i];
        }
        fill_model(g, &response, quantization);
        fill_limits(g, &limits);
        fill_load(g, &load);
        response.n_ranks = world;
        response.ranks = pointers;
        response.limits = &limits;
        response.load = &load;
        rpc_finish(c, NULL, &response.base);
        free(roles);
        free(pointers);
        free(ranks);
    } else {
        rpc_finish(c, &err, NULL);
    }
    arena_release(&scratch);
}
