/* internvl info: model, limits, load, and the rank table with its memory. */
#include <stdio.h>
#include <string.h>

#include "client/command.h"
#include "client/interrupt.h"
#include "client/json_out.h"

static void format_bytes(char *out, size_t n, uint64_t bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double x = (double)bytes;
    int unit = 0;
    while (x >= 1024 && unit < 4) {
        x /= 1024;
        unit++;
    }
    snprintf(out, n, unit ? "%.1f %s" : "%.0f %s", x, units[unit]);
}

static void print_count(const char *name, uint64_t x)
{
    printf("  %-26s %llu\n", name, (unsigned long long)x);
}

static void print_bytes(const char *name, uint64_t x)
{
    char text[32];
    format_bytes(text, sizeof(text), x);
    printf("  %-26s %s\n", name, text);
}

static void print_model(const struct internvl_model *m, enum internvl_health health)
{
    printf("model\n");
    printf("  %-26s %s\n", "name", m->name);
    printf("  %-26s %s\n", "architecture", m->architecture);
    printf("  %-26s %s\n", "dtype", m->dtype);
    printf("  %-26s %s\n", "quantization", m->quantization);
    printf("  %-26s %u text, %u vision\n", "layers", m->text_layers, m->vision_layers);
    print_count("vocabulary", m->vocab_size);
    printf("  %-26s %u x %u pixels, %u tokens\n", "tile", m->tile_width, m->tile_height,
           m->tokens_per_tile);
    printf("\ndaemon\n");
    printf("  %-26s %s\n", "version", m->version);
    printf("  %-26s %s\n", "health",
           health == INTERNVL_HEALTH_SERVING       ? "serving"
           : health == INTERNVL_HEALTH_NOT_SERVING ? "not serving (draining)"
                                                   : "unknown");
    printf("  %-26s %u vision, %u stages x %u shards\n", "layout", m->vision_ranks,
           m->pipeline_parallel_size, m->tensor_parallel_size);
    printf("  %-26s %u running, %u waiting\n", "requests", m->load.running, m->load.waiting);
    printf("  %-26s %u of %u, %u tokens each, %s\n", "KV pages used", m->load.kv_pages_used,
           m->load.kv_pages, m->page_size, m->kv_cache_dtype);
    printf("  %-26s %.1f s\n", "uptime", (double)m->load.uptime_ms / 1000);
}

static void print_limits(const struct internvl_limits *l)
{
    printf("\nlimits\n");
    print_bytes("message", l->max_message_bytes);
    print_bytes("texts of a prompt", l->max_text_bytes);
    print_bytes("tensors of a Forward", l->max_forward_bytes);
    print_count("pixels of a picture", l->max_image_pixels);
    print_count("media of a prompt", l->max_media);
    print_count("tiles of a prompt", l->max_tiles);
    print_count("frames of a video", l->max_frames);
    print_count("context (tokens)", l->max_model_len);
    print_count("sequences at once", l->max_num_seqs);
    print_count("tokens of a batch", l->max_num_batched_tokens);
    print_count("queued requests", l->max_queued_requests);
    print_count("candidates (n)", l->max_n);
    print_count("logprobs", l->max_logprobs);
    print_count("stop strings", l->max_stop_strings);
    print_count("bytes of a stop string", l->max_stop_string_bytes);
    print_count("stop token ids", l->max_stop_token_ids);
    print_count("logit biases", l->max_logit_bias);
    print_count("continuations", l->max_continuations);
    print_count("beams", l->max_num_beams);
    print_bytes("upload", l->max_media_bytes);
    print_count("uploads at once", l->max_uploads);
}

enum { N_COLUMNS = 9 };

static void fill_row(char cells[N_COLUMNS][96], const struct internvl_rank *r)
{
    snprintf(cells[0], sizeof(cells[0]), "%u", r->rank);
    snprintf(cells[1], sizeof(cells[1]), "%s", r->role);
    snprintf(cells[2], sizeof(cells[2]), "%s", r->host);
    snprintf(cells[3], sizeof(cells[3]), "%s", r->device);
    format_bytes(cells[4], sizeof(cells[4]), r->weight_bytes);
    format_bytes(cells[5], sizeof(cells[5]), r->kv_bytes);
    format_bytes(cells[6], sizeof(cells[6]), r->scratch_bytes);
    format_bytes(cells[7], sizeof(cells[7]), r->rss_bytes);
    snprintf(cells[8], sizeof(cells[8]), "%.2f s", (double)r->load_ms / 1000);
}

static void print_row(char cells[N_COLUMNS][96], const int widths[N_COLUMNS])
{
    for (int i = 0; i < N_COLUMNS; i++) // words to the left, numbers to the right
        printf(i == 0 || i >= 4 ? "  %*s" : "  %-*s", widths[i], cells[i]);
    putchar('\n');
}

static void print_ranks(const struct internvl_model *m)
{
    char header[N_COLUMNS][96] = {"rank", "role", "host",     "device",   "weights",
                                  "KV",   "work", "resident", "loaded in"};
    char cells[N_COLUMNS][96];
    int widths[N_COLUMNS];
    for (int i = 0; i < N_COLUMNS; i++)
        widths[i] = (int)strlen(header[i]);
    for (size_t r = 0; r < m->n_ranks; r++) {
        fill_row(cells, &m->ranks[r]);
        for (int i = 0; i < N_COLUMNS; i++)
            if ((int)strlen(cells[i]) > widths[i])
                widths[i] = (int)strlen(cells[i]);
    }
    printf("\nranks\n");
    print_row(header, widths);
    for (size_t r = 0; r < m->n_ranks; r++) {
        fill_row(cells, &m->ranks[r]);
        print_row(cells, widths);
    }
}

static void write_limits(struct json_out *j, const struct internvl_limits *l)
{
    json_object_begin(j, "limits");
    json_uint(j, "max_message_bytes", l->max_message_bytes);
    json_uint(j, "max_image_pixels", l->max_image_pixels);
    json_uint(j, "max_media", l->max_media);
    json_uint(j, "max_media_bytes", l->max_media_bytes);
    json_uint(j, "max_uploads", l->max_uploads);
    json_uint(j, "max_tiles", l->max_tiles);
    json_uint(j, "max_frames", l->max_frames);
    json_uint(j, "max_model_len", l->max_model_len);
    json_uint(j, "max_num_seqs", l->max_num_seqs);
    json_uint(j, "max_num_batched_tokens", l->max_num_batched_tokens);
    json_uint(j, "max_queued_requests", l->max_queued_requests);
    json_uint(j, "max_n", l->max_n);
    json_uint(j, "max_logprobs", l->max_logprobs);
    json_uint(j, "max_stop_strings", l->max_stop_strings);
    json_uint(j, "max_stop_token_ids", l->max_stop_token_ids);
    json_uint(j, "max_logit_bias", l->max_logit_bias);
    json_uint(j, "max_stop_string_bytes", l->max_stop_string_bytes);
    json_uint(j, "max_forward_bytes", l->max_forward_bytes);
    json_uint(j, "max_text_bytes", l->max_text_bytes);
    json_uint(j, "max_continuations", l->max_continuations);
    json_uint(j, "max_num_beams", l->max_num_beams);
    json_object_end(j);
}

static void write_ranks(struct json_out *j, const struct internvl_model *m)
{
    json_array_begin(j, "ranks");
    for (size_t i = 0; i < m->n_ranks; i++) {
        const struct internvl_rank *r = &m->ranks[i];
        json_object_begin(j, NULL);
        json_uint(j, "rank", r->rank);
        json_string(j, "role", r->role);
        json_string(j, "host", r->host);
        json_string(j, "device", r->device);
        json_uint(j, "weight_bytes", r->weight_bytes);
        json_uint(j, "kv_bytes", r->kv_bytes);
        json_uint(j, "scratch_bytes", r->scratch_bytes);
        json_uint(j, "rss_bytes", r->rss_bytes);
        json_uint(j, "load_ms", r->load_ms);
        json_object_end(j);
    }
    json_array_end(j);
}

static void write_json(const struct internvl_model *m, enum internvl_health health)
{
    struct json_out json = {.file = stdout}, *j = &json;
    json_object_begin(j, NULL);
    json_string(j, "name", m->name);
    json_string(j, "version", m->version);
    json_bool(j, "serving", health == INTERNVL_HEALTH_SERVING);
    json_string(j, "architecture", m->architecture);
    json_string(j, "dtype", m->dtype);
    json_string(j, "quantization", m->quantization);
    json_string(j, "kv_cache_dtype", m->kv_cache_dtype);
    json_uint(j, "vocab_size", m->vocab_size);
    json_uint(j, "text_layers", m->text_layers);
    json_uint(j, "vision_layers", m->vision_layers);
    json_uint(j, "tile_height", m->tile_height);
    json_uint(j, "tile_width", m->tile_width);
    json_uint(j, "tokens_per_tile", m->tokens_per_tile);
    json_uint(j, "tensor_parallel_size", m->tensor_parallel_size);
    json_uint(j, "pipeline_parallel_size", m->pipeline_parallel_size);
    json_uint(j, "vision_ranks", m->vision_ranks);
    json_uint(j, "page_size", m->page_size);
    write_ranks(j, m);
    write_limits(j, &m->limits);
    json_object_begin(j, "load");
    json_uint(j, "running", m->load.running);
    json_uint(j, "waiting", m->load.waiting);
    json_uint(j, "kv_pages_used", m->load.kv_pages_used);
    json_uint(j, "kv_pages", m->load.kv_pages);
    json_uint(j, "uptime_ms", m->load.uptime_ms);
    json_object_end(j);
    json_object_end(j);
    json_end_line(j);
}

int command_info(struct internvl_client *c, const struct command_options *o)
{
    if (o->n_arguments)
        return command_usage(o, "info takes no argument");
    struct internvl_error err = {0};
    struct internvl_model model;
    struct internvl_call_options call = command_call_options(o);
    enum internvl_health health;
    interrupt_set_busy(1);
    if (internvl_get_model(c, &call, &model, &err))
        return command_fail(o, &err);
    if (internvl_check_health(c, "", &call, &health, NULL))
        health = INTERNVL_HEALTH_UNKNOWN; // it did answer, that is enough
    if (o->json) {
        write_json(&model, health);
    } else {
        print_model(&model, health);
        print_limits(&model.limits);
        print_ranks(&model);
    }
    internvl_model_release(&model);
    return EXIT_OK;
}
