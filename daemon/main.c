/*
 * From the command line to a role.
 *
 *   alone        check the command line and the checkpoint's config, become the ranks' parent, or
 *                mpirun's where they need MPI
 *   in a job     the same checks on every rank (rank 0 speaks), then gateway, vision or language
 *
 * The only place that fills the structs each role is told by; environment variables of behaviour
 * are read here.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/gateway/auth.h"
#include "daemon/gateway/gateway.h"
#include "daemon/gateway/listener.h"
#include "daemon/job.h"
#include "daemon/model/config.h"
#include "daemon/model/device.h"
#include "daemon/model/language_worker.h"
#include "daemon/model/plan.h"
#include "daemon/model/vision_worker.h"
#include "daemon/model/weights.h"
#include "daemon/options.h"
#include "daemon/processor/processor.h"
#include "kernels/log.h"
#include "kernels/trace.h"
#include "parallel/control.h"
#include "parallel/hosts.h"
#include "parallel/launch.h"
#include "parallel/launch_limit.h"
#include "parallel/placement.h"
#include "parallel/topology.h"

#define EXIT_USAGE 2
#define VISION_NICE 5
#define DEVICE_CLOSE_LIMIT_S 60 // ranks let go of each other's memory
#define TRACE_BYTES_MAX ((uint64_t)256 << 20)

/* What the command line and the checkpoint's config make together: the same on every rank. */
struct settings {
    struct options options;
    struct model_config model;
    struct layout layout;
    enum dtype dtype, kv_dtype;
    struct plan plan;
    int32_t max_model_len;
    struct auth auth;
    /* once the ranks have agreed */
    enum device_kind device_kind;
    int device_index;       // among this host's GPUs, -1: none
    int n_threads;          // of this rank, at most
    struct cpu_cores cores; // zeroed: its own
};

static int check_listen(const struct options *o, const char *name, const char *address,
                        struct error *err)
{
    struct error why = {0};
    int is_local = listener_is_local(address, &why);

    if (is_local < 0)
        return error_set(err, why.code, "%s: %s", name, why.msg);
    if (!is_local && !o->auth_token_file && !o->insecure_listen)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "%s %.64s can be reached from other machines: give "
                         "--auth-token-file, or --insecure-listen",
                         name, address);
    return 0;
}

/* The plan takes all the memory that KV pages may have; the most sequences may need less. */
static void limit_pages(struct settings *s)
{
    struct plan *p = &s->plan;
    int64_t page_size = s->options.block_size;
    int64_t of_one = (s->max_model_len + page_size - 1) / page_size;
    int64_t of_all = of_one * s->options.max_num_seqs;

    if (of_all >= p->n_pages)
        return;
    p->n_pages = (int32_t)of_all;
    for (int i = 0; i < p->n_ranks; i++)
        p->ranks[i].kv_bytes = p->ranks[i].page_bytes * (uint64_t)of_all;
}

/* Which weights a quantised checkpoint holds in fewer bits stands in its files, whose headers are
 * read here; where they are not (yet), the plan is made from the config alone. */
static int plan_weights(struct settings *s, struct plan_settings *p, struct error *err)
{
    struct weights files = {0};
    struct error missing = {0};
    int rc, is_dummy = strcmp(s->options.load_format, "dummy") == 0;

    if (quantization_is_stored(&s->model.quantization) &&
        weights_open(&files, s->options.model, &s->model, is_dummy, &missing) == 0)
        p->weights = &files.list;
    else if (missing.code != ERROR_OK && missing.code != ERROR_NOT_FOUND)
        return error_set(err, missing.code, "%s", missing.msg);
    rc = plan_make(&s->plan, &s->model, p, err);
    weights_release(&files);
    return rc;
}

/* Where ranks are planned to compute; auto is known when they meet, but to --plan, which starts
 * none: the driver may not be asked for GPUs by a process that will fork ranks. */
static enum device_kind planned_device(const struct options *o)
{
    int is_auto = strcmp(o->device, "auto") == 0;

    return strcmp(o->device, "cuda") == 0 || (is_auto && o->plan && device_count() > 0)
               ? DEVICE_CUDA
               : DEVICE_CPU;
}

/* What --activation-quantization needs beside weights that go with it. */
static int check_activations(const struct settings *s, enum device_kind device, struct error *err)
{
    const enum weight_format f = s->model.quantization.x_format;
    const enum device_kind needed = f == WEIGHT_FP8 ? DEVICE_CUDA : DEVICE_CPU;
    if (f == WEIGHT_FLOAT)
        return 0;
    if (device != needed)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "--activation-quantization %s: it needs --device %s, this is %s",
                         weight_format_name(f), needed == DEVICE_CUDA ? "cuda" : "cpu",
                         device == DEVICE_CUDA ? "CUDA" : "the CPU");
    if (s->dtype != DTYPE_BF16)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "--activation-quantization %s: it needs --dtype bfloat16, this is %s",
                         weight_format_name(f), dtype_name(s->dtype));
    return 0;
}

static int settings_make(struct settings *s, struct error *err)
{
    const struct options *o = &s->options;
    enum device_kind device = planned_device(o);
    struct plan_settings p;

    s->layout = (struct layout){.n_vision = (int)o->vision_ranks,
                                .tensor_parallel = (int)o->tensor_parallel_size,
                                .pipeline_parallel = (int)o->pipeline_parallel_size};
    if (check_listen(o, "--listen", o->listen, err) ||
        (o->metrics_listen && check_listen(o, "--metrics-listen", o->metrics_listen, err)))
        return -1;
    if (model_config_load(&s->model, o->model, err) ||
        model_dtype_parse(&s->model, o->dtype, &s->dtype, err) ||
        quantization_parse(&s->model.quantization, o->quantization, o->quantization_group_size,
                           err) ||
        quantization_parse_activations(&s->model.quantization, o->activation_quantization, err))
        return -1;
    if (strcmp(o->device, "auto") != 0 || o->plan) // else it is known when ranks meet
        if (check_activations(s, device, err))
            return -1;
    if (o->auth_token_file && auth_load(&s->auth, o->auth_token_file, err))
        return -1;
    s->kv_dtype = strcmp(o->kv_cache_dtype, "int8") == 0 ? DTYPE_I8 : s->dtype;
    s->max_model_len = (int32_t)(o->max_model_len ? o->max_model_len : s->model.text.max_positions);
    p = (struct plan_settings){
        .layout = s->layout,
        .dtype = s->dtype,
        .kv_dtype = s->kv_dtype,
        .activation_dtype = device_activation_dtype(device, s->dtype),
        .on_cuda = device == DEVICE_CUDA,
        .deterministic = (int)o->deterministic,
        .one_shot = !o->disable_custom_all_reduce,
        .vision_share_gpu = (int)o->vision_share_gpu,
        .n_threads = job_planned_threads(o, layout_world(&s->layout), device),
        .page_size = (int32_t)o->block_size,
        .kv_budget_bytes = (uint64_t)o->kv_cache_memory_bytes,
        .max_model_len = s->max_model_len,
        .max_num_seqs = (int32_t)o->max_num_seqs,
        .max_num_batched_tokens = (int32_t)o->max_num_batched_tokens,
        .max_vision_tiles = (int32_t)o->max_vision_tiles,
        .vision_cache_bytes = (uint64_t)o->vision_cache_bytes,
        .media_store_bytes = (uint64_t)o->media_store_bytes,
        .cpu_isa = getenv("INTERNVLD_ISA"),
    };
    if (plan_weights(s, &p, err))
        return -1;
    limit_pages(s);
    return 0;
}

/* ---- roles ---- */

static int run_gateway(const struct settings *s, const struct topology *t,
                       const struct processor *processor, const struct processor_limits *limits,
                       struct control *control)
{
    const struct options *o = &s->options;
    const struct text_config *text = &s->model.text;
    struct gateway_options g = {
        .listen = o->listen,
        .metrics_listen = o->metrics_listen,
        .port_file = o->port_file,
        .auth = o->auth_token_file ? &s->auth : NULL,
        .max_message_bytes = o->max_message_bytes,
        .media_ttl_s = o->media_ttl,
        .media_store_bytes = (uint64_t)o->media_store_bytes,
        .max_media_bytes =
            (uint64_t)(o->max_media_bytes < o->media_store_bytes ? o->max_media_bytes
                                                                 : o->media_store_bytes),
        .max_connections = (int)o->max_connections,
        .n_processor_threads = (int)o->processor_threads,
        .stream_interval = (int32_t)o->stream_interval,
        .drain_timeout_s = (int)o->drain_timeout,
        .dtype_name = dtype_name(s->dtype),
        .kv_dtype_name = dtype_name(s->kv_dtype),
        .limits = *limits,
        .engine =
            {
                .page_size = (int32_t)o->block_size,
                .n_pages = s->plan.n_pages,
                .max_model_len = s->max_model_len,
                .max_num_seqs = (int32_t)o->max_num_seqs,
                .max_num_batched_tokens = (int32_t)o->max_num_batched_tokens,
                .max_queued_requests = (int32_t)o->max_queued_requests,
                .n_batches_in_flight = s->layout.pipeline_parallel,
                .max_vision_tiles = (int32_t)o->max_vision_tiles,
                .vision_cache_bytes = (uint64_t)o->vision_cache_bytes,
                .feature_dim = text->hidden_size,
                .n_features_per_tile = s->model.n_features_per_tile,
                .rope_dynamic_from =
                    text->rope.type == ROPE_DYNAMIC ? text->rope.original_max_positions : 0,
                .eos_ids = s->model.eos_token_ids,
                .n_eos = s->model.n_eos,
                .enable_prefix_caching = !o->no_enable_prefix_caching,
            },
    };

    return gateway_run(&g, &s->model, t, processor, control);
}

/* Where vision and language ranks share cores, a picture waits for the steps of running answers,
 * and not they for it; a rank that has cores of its own loses nothing. Threads inherit it. */
static void give_way(const struct settings *s, const struct topology *t)
{
    if (t->role == ROLE_VISION && s->device_kind == DEVICE_CPU && nice(VISION_NICE) == -1)
        log_warn("main", "the vision rank cannot lower its priority");
}

/* Before anything is allocated, by the rank or by CUDA in its name: memory follows the threads. On
 * the CPU ranks stay where the launcher put them, their threads were counted by its cores. */
static void settle(const struct settings *s)
{
    char address[32];

    if (s->device_index < 0)
        return;
    device_pci_address(s->device_index, address, sizeof(address));
    placement_near(address);
}

static int run_worker(const struct settings *s, const struct topology *t, struct device *device,
                      const float *mean, const float *std, struct control *control)
{
    const struct options *o = &s->options;
    struct worker_options w = {
        .model_dir = o->model,
        .model = &s->model,
        .dtype = s->dtype,
        .kv_dtype = s->kv_dtype,
        .dummy_weights = strcmp(o->load_format, "dummy") == 0,
        .page_size = (int32_t)o->block_size,
        .n_pages = s->plan.n_pages,
        .max_model_len = s->max_model_len,
        .max_num_seqs = (int32_t)o->max_num_seqs,
        .max_num_batched_tokens = (int32_t)o->max_num_batched_tokens,
        .max_vision_tiles = (int32_t)o->max_vision_tiles,
        .pixel_mean = mean,
        .pixel_std = std,
        .device = device,
    };

    /* The gateway drains and then says CONTROL_STOP: a signal to all must not take us from it. */
    signal(SIGTERM, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    signal(SIGUSR1, SIG_IGN);
    return t->role == ROLE_VISION ? vision_worker_run(&w, t, control)
                                  : language_worker_run(&w, t, control);
}

/* ---- a rank of the job ---- */

static struct processor_limits make_limits(const struct settings *s)
{
    struct processor_limits l = processor_limits_default();

    l.max_image_pixels = s->options.max_image_pixels;
    l.max_media = (int)s->options.max_media;
    l.max_tiles = (int)s->options.max_tiles;
    l.max_frames = (int)s->options.max_frames;
    /* Past the context, so that a prompt which is too long can still be told its length. */
    l.max_prompt_tokens = 4 * (int64_t)s->max_model_len;
    return l;
}

/* Rank 0 reads the processor's files; the others hear how that went, and the normalisation. */
static struct processor *open_processor(const struct settings *s, const struct topology *t,
                                        const struct processor_limits *limits, float *mean,
                                        float *std, struct error *err)
{
    const struct vision_config *v = &s->model.vision;
    struct processor_model m = {s->model.image_token_id, s->model.image_seq_length, v->n_channels,
                                v->image_height, v->image_width};
    struct processor *p = NULL;
    size_t n_bytes = (size_t)v->n_channels * sizeof(float);

    if (t->role == ROLE_GATEWAY) {
        p = processor_open(s->options.model, &m, limits, err);
        if (p) {
            memcpy(mean, processor_mean(p), n_bytes);
            memcpy(std, processor_std(p), n_bytes);
        }
    }
    launch_broadcast(err, sizeof(*err));
    launch_broadcast(mean, n_bytes);
    launch_broadcast(std, n_bytes);
    return p;
}

/* Collective: with INTERNVLD_TRACE=FILE rank 0 writes a timeline, the others record theirs. */
static void open_trace(const struct topology *t, struct error *err)
{
    const char *path = t->rank == 0 ? getenv("INTERNVLD_TRACE") : NULL;
    int is_on = path && *path;
    char who[64];

    launch_broadcast(&is_on, sizeof(is_on));
    if (!is_on)
        return;
    int64_t error_ns, clock_offset_ns = launch_clock_offset(t->rank, t->world, &error_ns);
    if (launch_shares_clock())
        clock_offset_ns = error_ns = 0;
    log_debug("trace", "clock offset %lld ns, within %lld", (long long)clock_offset_ns,
              (long long)error_ns);
    if (t->rank > 0)
        trace_record(clock_offset_ns);
    else if (trace_open(path, TRACE_BYTES_MAX, err) == 0)
        for (int i = 0; i < t->world; i++)
            trace_name_rank(i, topology_describe(t, i, who, sizeof(who)));
    launch_broadcast(err, sizeof(*err));
}

static int run_role(const struct settings *s, const struct topology *t, struct error *err)
{
    struct processor_limits limits = make_limits(s);
    size_t n_channels = (size_t)s->model.vision.n_channels;
    float *mean = xcalloc(n_channels, sizeof(*mean));
    float *std = xcalloc(n_channels, sizeof(*std));
    struct processor *processor = open_processor(s, t, &limits, mean, std, err);
    struct device device = {0};
    struct device_options d = {.kind = s->device_kind,
                               .dtype = s->dtype,
                               .n_threads = s->n_threads,
                               .cores = s->cores,
                               .isa = getenv("INTERNVLD_ISA"),
                               .index = s->device_index,
                               .deterministic = (int)s->options.deterministic,
                               .enforce_eager = (int)s->options.enforce_eager,
                               .x_format = s->model.quantization.x_format,
                               .one_shot = !s->options.disable_custom_all_reduce};
    struct control *control;
    int status = 1;

    if (err->code == ERROR_OK)
        open_trace(t, err);
    if (err->code == ERROR_OK) {
        give_way(s, t);
        settle(s);
        device_open(&device, &d, t,
                    (size_t)s->options.max_num_batched_tokens * (size_t)s->model.text.hidden_size *
                        sizeof(float));
        control = control_open(t, NULL);
        launch_limit_off(); /* from here on heartbeats watch */
        status = t->role == ROLE_GATEWAY ? run_gateway(s, t, processor, &limits, control)
                                         : run_worker(s, t, &device, mean, std, control);
        control_close(control);
        launch_limit("the close of the devices", DEVICE_CLOSE_LIMIT_S);
        device_close(&device);
        launch_limit_off();
        trace_close();
    }
    if (processor)
        processor_close(processor);
    free(mean);
    free(std);
    return status;
}

static void say_error(int rank, const struct error *err, int is_usage)
{
    if (rank != 0)
        return;
    fprintf(stderr, "internvld: %s\n", err->msg);
    if (is_usage)
        options_usage(stderr);
}

/* Collective: a rank that cannot go on takes all with it, with one sentence. Returns 0 to go on. */
static int agree(struct settings *s, const struct topology *t, int rank, int world,
                 struct error *err)
{
    struct rank_host mine, *all = xcalloc((size_t)world, sizeof(*all));
    int rc;

    job_describe(&mine, &s->options, dtype_name(s->dtype), s->plan.n_pages, err);
    rc = hosts_exchange(all, &mine, INTERNVLD_VERSION, world, err);
    if (rc == 0) {
        s->device_kind = job_choose_device(all, &s->options, t);
        job_choose_threads(all, &s->options, t, s->device_kind);
        rc = hosts_check(all, world, err);
    }
    if (rc == 0)
        rc = check_activations(s, s->device_kind, err);
    if (rc == 0) {
        s->device_index = hosts_device(all, world, rank);
        s->n_threads = all[rank].n_threads;
        if (rank > 0 && s->device_kind == DEVICE_CPU && !s->options.threads)
            s->n_threads = job_share_cores(&s->cores, all, t);
    }
    if (rc == 0 && rank == 0 && s->options.map)
        hosts_print(stdout, all, t);
    if (rc == 0 && rank == 0)
        hosts_warn(all, t);
    free(all);
    return rc;
}

/* Every rank comes to the same errors of settings and layout; rank 0 speaks for all. `is_made`: the
 * settings are those of the parent. */
static int run_rank(struct settings *s, int is_made, int is_usage_error, struct error *err)
{
    struct topology t = {0};
    sigset_t stops;
    int rank, world;
    int status = 1;

    /* Before any thread exists, the MPI library's included: they all inherit it. */
    sigemptyset(&stops);
    sigaddset(&stops, SIGTERM);
    sigaddset(&stops, SIGINT);
    sigaddset(&stops, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &stops, NULL);
    signal(SIGPIPE, SIG_IGN);
    launch_limit("the start", (int)s->options.start_timeout);
    launch_init(&rank, &world);
    if (is_made || (!is_usage_error && !settings_make(s, err)))
        topology_init(&t, rank, world, &s->layout, err);
    if (agree(s, &t, rank, world, err))
        status = is_usage_error ? EXIT_USAGE : 1;
    else
        status = s->options.map ? 0 : run_role(s, &t, err);
    if (err->code != ERROR_OK)
        say_error(rank, err, is_usage_error);
    launch_finalize();
    return status;
}

/* ---- a lone process ---- */

static int run_alone(struct settings *s, char **argv, int is_usage_error, struct error *err)
{
    int status;

    if (is_usage_error || settings_make(s, err)) {
        say_error(0, err, is_usage_error);
        return is_usage_error ? EXIT_USAGE : 1;
    }
    if (s->options.plan) {
        plan_print(stdout, &s->plan, &s->model,
                   (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE));
        return 0;
    }
    if (layout_shares_tensors(&s->layout))
        return launch_mpirun(layout_world(&s->layout), argv);
    if (launch_local(layout_world(&s->layout), &status))
        return run_rank(s, 1, 0, err);
    return status;
}

int main(int argc, char **argv)
{
    static struct settings s;
    struct error err = {0};
    int status;
    int is_usage_error = options_parse(&s.options, argc, argv, &err) != 0;

    log_init();
    if (!is_usage_error && (s.options.help || s.options.version)) {
        if (s.options.help)
            options_help(stdout);
        else
            printf("internvld %s\n", INTERNVLD_VERSION);
        return 0;
    }
    if (launch_is_job() && !s.options.plan)
        status = run_rank(&s, 0, is_usage_error, &err);
    else
        status = run_alone(&s, argv, is_usage_error, &err);
    plan_release(&s.plan);
    return status;
}
