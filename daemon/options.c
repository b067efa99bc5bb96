/*
 * One table of options. See options.h.
 */
#include "daemon/options.h"

#include <errno.h>
#include <limits.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define BATCHED_TOKENS 128 // of a batch, when nothing is said: a few milliseconds of a small model
#define HELP_COLUMN 4
#define HELP_WIDTH 92

enum option_kind { OPTION_TEXT, OPTION_CHOICE, OPTION_NUMBER, OPTION_FLAG };

struct option {
    const char *group; // begins a new one, or NULL
    const char *name, *alias;
    enum option_kind kind;
    size_t offset;        // of a const char *, or of an int64_t
    const char *argument; // shown in the help; of a choice: "a|b|c"
    int64_t min, max;     // of a number
    const char *help;
};

#define FIELD(name) offsetof(struct options, name)
#define GIB ((int64_t)1 << 30)
#define TIB ((int64_t)1 << 40)

static const struct options defaults = {
    .dtype = "auto",
    .load_format = "auto",
    .device = "auto",
    .quantization = "none",
    .quantization_group_size = 128,
    .activation_quantization = "none",
    .tensor_parallel_size = 1,
    .pipeline_parallel_size = 1,
    .vision_ranks = 1,
    .max_num_seqs = 64,
    .block_size = 16,
    .kv_cache_dtype = "auto",
    .kv_cache_memory_bytes = GIB,
    .max_vision_tiles = 4,
    .vision_cache_bytes = (int64_t)256 << 20,
    .max_queued_requests = 256,
    .listen = "127.0.0.1:50051",
    .start_timeout = 120,
    .drain_timeout = 30,
    .processor_threads = 2,
    .stream_interval = 1,
    .max_connections = 1024,
    .max_message_bytes = (int64_t)64 << 20,
    .media_store_bytes = GIB,
    .media_ttl = 3600,
    .max_media_bytes = (int64_t)512 << 20,
    .max_image_pixels = (int64_t)64 << 20,
    .max_tiles = 128,
    .max_media = 64,
    .max_frames = 128,
};

static const struct option table[] = {
    {"Model", "--model", NULL, OPTION_TEXT, FIELD(model), "DIR", 0, 0,
     "Directory of the checkpoint: config.json, safetensors, tokenizer and the processor's "
     "files. Required."},
    {NULL, "--dtype", NULL, OPTION_CHOICE, FIELD(dtype), "auto|float32|bfloat16|float16", 0, 0,
     "What the weights are held in and products are computed from; sums are float32. auto is what "
     "the checkpoint stores. float16 is refused: activations of this family overflow it."},
    {NULL, "--load-format", NULL, OPTION_CHOICE, FIELD(load_format), "auto|dummy", 0, 0,
     "dummy makes random weights of the real shapes instead of reading safetensors."},
    {NULL, "--quantization", "-q", OPTION_CHOICE, FIELD(quantization),
     "none|int8|int4|fp8|bitsandbytes-fp4|bitsandbytes-nf4", 0, 0,
     "Hold the matrices in fewer bits, made from the checkpoint's floats while loading. int8: a "
     "scale a row. int4: the language model's in groups of --quantization-group-size, the vision "
     "tower's, the projector's, lm_head and the embeddings as int8. fp8: E4M3 with a scale a row, "
     "lm_head and embeddings as they are. bitsandbytes: its 4-bit "
     "formats "
     "in groups of 64, lm_head and embeddings as they are; fp4 is what load_in_4bit=True means. "
     "Checkpoints that are quantised already (AWQ, GPTQ, bitsandbytes, compressed-tensors, FP8) "
     "are known by their quantization_config and take no other."},
    {NULL, "--quantization-group-size", NULL, OPTION_NUMBER, FIELD(quantization_group_size),
     "32|64|128", 32, 128, "Columns of a row that share a scale, with --quantization int4."},
    {NULL, "--activation-quantization", NULL, OPTION_CHOICE, FIELD(activation_quantization),
     "none|fp8|int8", 0, 0,
     "Round what is multiplied with weights in fewer bits too, with a scale for each token: less "
     "exact; --dtype must be bfloat16. int8: with cpu and int8 or int4 weights, products are in "
     "integers. fp8: with cuda and FP8 weights that have a scale a matrix or a row, products are "
     "in FP8 (E4M3) and need GPUs of compute capability 8.9 or newer; without --deterministic "
     "what is rounded depends on --tensor-parallel-size. none: what is multiplied with weights "
     "keeps --dtype's bits."},
    {NULL, "--max-model-len", NULL, OPTION_NUMBER, FIELD(max_model_len), "TOKENS", 2, INT32_MAX / 4,
     "Most tokens of one prompt and its answer together. Default: the checkpoint's "
     "max_position_embeddings."},

    {"Layout (ranks = 1 gateway + vision ranks + pipeline stages x tensor shards)",
     "--tensor-parallel-size", "-tp", OPTION_NUMBER, FIELD(tensor_parallel_size), "T", 1, 8,
     "Shards of each language layer: 1, 2, 4 or 8, as far as the model's heads allow."},
    {NULL, "--pipeline-parallel-size", "-pp", OPTION_NUMBER, FIELD(pipeline_parallel_size), "P", 1,
     1024, "Stages the language layers are divided into."},
    {NULL, "--vision-ranks", NULL, OPTION_NUMBER, FIELD(vision_ranks), "V", 1, 1024,
     "Ranks that turn pictures into features; tiles are spread over them."},
    {NULL, "--threads", NULL, OPTION_NUMBER, FIELD(threads), "N", 1, 1024,
     "Threads of each vision and language rank, always so many. Default: one a core while other "
     "ranks with the same cores have nothing to do, and their part of these while they have; with "
     "GPUs the part, at most 8, which read weights, copy and draw tokens."},
    {NULL, "--device", NULL, OPTION_CHOICE, FIELD(device), "auto|cpu|cuda", 0, 0,
     "What vision and language ranks compute on. auto is cuda where this build has it and every "
     "host of theirs has a GPU. Each of them takes a GPU of its own, in order of rank."},
    {NULL, "--vision-share-gpu", NULL, OPTION_FLAG, FIELD(vision_share_gpu), NULL, 0, 0,
     "With cuda: vision ranks take no GPU of their own but share those of the language ranks."},
    {NULL, "--deterministic", NULL, OPTION_FLAG, FIELD(deterministic), NULL, 0, 0,
     "With cuda: sum in an order that no layout changes, at some cost. On the CPU that is always "
     "so."},
    {NULL, "--enforce-eager", NULL, OPTION_FLAG, FIELD(enforce_eager), NULL, 0, 0,
     "With cuda: start every kernel of every step by itself. Default: decode steps of up to 256 "
     "sequences, of models without experts, and tiles of the native size are recorded as CUDA "
     "graphs at the start and replayed, to the same bits."},
    {NULL, "--disable-custom-all-reduce", NULL, OPTION_FLAG, FIELD(disable_custom_all_reduce), NULL,
     0, 0,
     "With cuda: every sum over shards by NCCL. Without it short ones (512 KiB, of 8 shards 256) "
     "are read from the other GPUs' memory in one kernel, where shards on one host reach each "
     "other's."},
    {NULL, "--plan", NULL, OPTION_FLAG, FIELD(plan), NULL, 0, 0,
     "Print each rank's memory for this model and layout, on CUDA its GPU's and its host's, and "
     "exit without starting anything. auto is what this host has."},
    {NULL, "--map", NULL, OPTION_FLAG, FIELD(map), NULL, 0, 0,
     "Start the job, check that its ranks fit together, print which rank is what and where, and "
     "exit before anything is loaded."},

    {"Scheduling and memory", "--max-num-seqs", NULL, OPTION_NUMBER, FIELD(max_num_seqs), "N", 1,
     4096, "Most sequences in one batch."},
    {NULL, "--max-num-batched-tokens", NULL, OPTION_NUMBER, FIELD(max_num_batched_tokens), "N", 1,
     1 << 20,
     "Token budget of one batch, at least --max-num-seqs; longer prompts are computed in chunks, "
     "beside which the tokens of running answers wait. Default: twice --max-num-seqs, at least "
     "128; "
     "a GPU wants some 1024."},
    {NULL, "--block-size", NULL, OPTION_NUMBER, FIELD(block_size), "TOKENS", 16, 1024,
     "Tokens of one page of the KV cache, a multiple of 16."},
    {NULL, "--kv-cache-dtype", NULL, OPTION_CHOICE, FIELD(kv_cache_dtype), "auto|int8", 0, 0,
     "What keys and values are held in. auto is what --dtype says. int8: 8 bits and a float32 "
     "scale "
     "for each token and kv head, made as they are written; about half the bytes of bfloat16, so "
     "nearly twice the tokens in the same memory. Heads must be a multiple of 16 wide."},
    {NULL, "--kv-cache-memory-bytes", NULL, OPTION_NUMBER, FIELD(kv_cache_memory_bytes), "BYTES", 1,
     64 * TIB,
     "Memory for KV pages of each language rank. Never more is taken than --max-num-seqs sequences "
     "of --max-model-len tokens need."},
    {NULL, "--max-vision-tiles", NULL, OPTION_NUMBER, FIELD(max_vision_tiles), "N", 1, 1024,
     "Most tiles that are sent to a vision rank at a time."},
    {NULL, "--vision-cache-bytes", NULL, OPTION_NUMBER, FIELD(vision_cache_bytes), "BYTES", 0,
     64 * TIB,
     "Memory of the gateway for features of tiles that were encoded before, used least recently "
     "first out. 0: every tile is encoded."},
    {NULL, "--no-enable-prefix-caching", NULL, OPTION_FLAG, FIELD(no_enable_prefix_caching), NULL,
     0, 0,
     "Compute every prompt anew instead of keeping pages of the KV cache for prompts that begin "
     "alike."},
    {NULL, "--max-queued-requests", NULL, OPTION_NUMBER, FIELD(max_queued_requests), "N", 1, 65536,
     "Requests that may wait; more are refused with RESOURCE_EXHAUSTED."},
    {NULL, "--stream-interval", NULL, OPTION_NUMBER, FIELD(stream_interval), "N", 1, 65536,
     "Tokens of a stream that are sent together; the first is sent at once. More than 1 leaves the "
     "processor to the model where messages cost as much as tokens."},

    {"Server", "--listen", NULL, OPTION_TEXT, FIELD(listen), "HOST:PORT", 0, 0,
     "Where to serve; also unix:PATH. Port 0 picks a free one and prints it. An address that other "
     "machines can reach needs --auth-token-file."},
    {NULL, "--metrics-listen", NULL, OPTION_TEXT, FIELD(metrics_listen), "HOST:PORT", 0, 0,
     "Where to answer GET /metrics in Prometheus' text format, under the same rules as --listen. "
     "Default: nowhere."},
    {NULL, "--port-file", NULL, OPTION_TEXT, FIELD(port_file), "FILE", 0, 0,
     "When ready, write the bound address into FILE (all at once); removed at the end."},
    {NULL, "--auth-token-file", NULL, OPTION_TEXT, FIELD(auth_token_file), "FILE", 0, 0,
     "Calls must carry \"authorization: Bearer TOKEN\", TOKEN being the first line of FILE. Health "
     "checks need none."},
    {NULL, "--insecure-listen", NULL, OPTION_FLAG, FIELD(insecure_listen), NULL, 0, 0,
     "Allow an address that other machines can reach without a token."},
    {NULL, "--start-timeout", NULL, OPTION_NUMBER, FIELD(start_timeout), "SECONDS", 1, 86400,
     "How long the ranks may take to find each other, before weights are loaded; then the job "
     "ends, and says which rank on this host is stopped."},
    {NULL, "--drain-timeout", NULL, OPTION_NUMBER, FIELD(drain_timeout), "SECONDS", 0, 86400,
     "How long running requests may finish after SIGTERM, SIGINT or SIGUSR1. A second signal ends "
     "the job at once."},
    {NULL, "--processor-threads", NULL, OPTION_NUMBER, FIELD(processor_threads), "N", 1, 256,
     "Threads of the gateway that decode pictures and tokenise."},
    {NULL, "--max-connections", NULL, OPTION_NUMBER, FIELD(max_connections), "N", 1, 1 << 20,
     "Open connections; more are closed at once."},
    {NULL, "--max-message-bytes", NULL, OPTION_NUMBER, FIELD(max_message_bytes), "BYTES", 1024,
     INT_MAX, "Largest request; a larger one is refused with RESOURCE_EXHAUSTED."},
    {NULL, "--media-store-bytes", NULL, OPTION_NUMBER, FIELD(media_store_bytes), "BYTES", 0,
     64 * TIB,
     "Memory of the gateway for media that clients upload (UploadMedia), used least recently first "
     "out. 0: uploads are refused."},
    {NULL, "--media-ttl", NULL, OPTION_NUMBER, FIELD(media_ttl), "SECONDS", 1, 366 * 86400,
     "How long uploaded media are kept after their last use."},
    {NULL, "--max-media-bytes", NULL, OPTION_NUMBER, FIELD(max_media_bytes), "BYTES", 1, INT_MAX,
     "Of one upload, which comes in many messages and may be larger than --max-message-bytes."},

    {"Limits of one request", "--max-image-pixels", NULL, OPTION_NUMBER, FIELD(max_image_pixels),
     "PIXELS", 1, GIB, "Of one picture, before it is cut into tiles."},
    {NULL, "--max-tiles", NULL, OPTION_NUMBER, FIELD(max_tiles), "N", 1, 65536,
     "Tiles of all pictures and frames together."},
    {NULL, "--max-media", NULL, OPTION_NUMBER, FIELD(max_media), "N", 1, 65536,
     "Pictures and videos."},
    {NULL, "--max-frames", NULL, OPTION_NUMBER, FIELD(max_frames), "N", 1, 65536,
     "Frames of one video after sampling."},

    {"Other", "--help", "-h", OPTION_FLAG, FIELD(help), NULL, 0, 0, "Print this and exit."},
    {NULL, "--version", NULL, OPTION_FLAG, FIELD(version), NULL, 0, 0,
     "Print the version and exit."},
};
#define N_OPTIONS (sizeof(table) / sizeof(table[0]))

/* ---- parsing ---- */

static int parse_number(const struct option *d, const char *text, int64_t *out, struct error *err)
{
    char *end;
    long long n;
    int shift = 0;

    errno = 0;
    n = strtoll(text, &end, 10);
    if (*end == 'K' || *end == 'k')
        shift = 10;
    else if (*end == 'M' || *end == 'm')
        shift = 20;
    else if (*end == 'G' || *end == 'g')
        shift = 30;
    if (end == text || errno || end[shift > 0])
        return error_set(err, ERROR_INVALID_ARGUMENT, "%s %.64s: not a whole number", d->name,
                         text);
    if (n < d->min >> shift || n > d->max >> shift || n << shift < d->min)
        return error_set(err, ERROR_INVALID_ARGUMENT, "%s %.64s: it must be %lld to %lld", d->name,
                         text, (long long)d->min, (long long)d->max);
    *out = (int64_t)n << shift;
    return 0;
}

/* 1 when `text` is one of "a|b|c". */
static int is_choice(const char *choices, const char *text)
{
    size_t n = strlen(text);

    for (const char *at = choices; at; at = strchr(at, '|') ? strchr(at, '|') + 1 : NULL)
        if (n > 0 && !strchr(text, '|') && strncmp(at, text, n) == 0 &&
            (at[n] == '|' || at[n] == '\0'))
            return 1;
    return 0;
}

static int set_option(struct options *o, const struct option *d, const char *value,
                      struct error *err)
{
    char *field = (char *)o + d->offset;

    switch (d->kind) {
    case OPTION_FLAG:
        *(int64_t *)(void *)field = 1;
        return 0;
    case OPTION_NUMBER:
        return parse_number(d, value, (int64_t *)(void *)field, err);
    case OPTION_CHOICE:
        if (!is_choice(d->argument, value))
            return error_set(err, ERROR_INVALID_ARGUMENT, "%s %.64s: it must be one of %s", d->name,
                             value, d->argument);
        break;
    case OPTION_TEXT:
        if (!*value)
            return error_set(err, ERROR_INVALID_ARGUMENT, "%s needs a value", d->name);
        break;
    }
    *(const char **)(void *)field = value;
    return 0;
}

/* The option that the first n bytes of `word` name. */
static const struct option *find_option(const char *word, size_t n)
{
    for (size_t i = 0; i < N_OPTIONS; i++) {
        const struct option *d = &table[i];

        if (strlen(d->name) == n && strncmp(d->name, word, n) == 0)
            return d;
        if (d->alias && strlen(d->alias) == n && strncmp(d->alias, word, n) == 0)
            return d;
    }
    return NULL;
}

int options_parse(struct options *o, int argc, char **argv, struct error *err)
{
    *o = defaults;
    for (int i = 1; i < argc; i++) {
        const char *equals = strchr(argv[i], '=');
        size_t n = equals ? (size_t)(equals - argv[i]) : strlen(argv[i]);
        const struct option *d = find_option(argv[i], n);
        const char *value = equals ? equals + 1 : NULL;

        if (!d)
            return error_set(err, ERROR_INVALID_ARGUMENT, "unknown option %.128s", argv[i]);
        if (d->kind == OPTION_FLAG && value)
            return error_set(err, ERROR_INVALID_ARGUMENT, "%s takes no value", d->name);
        if (d->kind != OPTION_FLAG && !value) {
            if (i + 1 == argc)
                return error_set(err, ERROR_INVALID_ARGUMENT, "%s needs a value", d->name);
            value = argv[++i];
        }
        if (set_option(o, d, value, err))
            return -1;
    }
    if (!o->model && !o->help && !o->version)
        return error_set(err, ERROR_INVALID_ARGUMENT, "--model is missing");
    if (o->max_num_batched_tokens == 0)
        o->max_num_batched_tokens =
            2 * o->max_num_seqs > BATCHED_TOKENS ? 2 * o->max_num_seqs : BATCHED_TOKENS;
    if (o->max_num_batched_tokens < o->max_num_seqs)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "--max-num-batched-tokens %lld is less than --max-num-seqs %lld: every "
                         "sequence of a batch needs a token",
                         (long long)o->max_num_batched_tokens, (long long)o->max_num_seqs);
    return 0;
}

/* ---- help ---- */

void options_usage(FILE *f)
{
    fputs("usage: internvld --model DIR [OPTION]...   (internvld --help lists the options)\n", f);
}

static void print_wrapped(FILE *f, const char *text)
{
    int column = 0;

    while (*text) {
        int n = (int)strcspn(text, " ");

        if (column && column + 1 + n > HELP_WIDTH - 2 * HELP_COLUMN) {
            fputc('\n', f);
            column = 0;
        }
        column += fprintf(f, "%*s%.*s", column ? 1 : 2 * HELP_COLUMN, "", n, text) -
                  (column ? 0 : 2 * HELP_COLUMN);
        text += n;
        text += strspn(text, " ");
    }
    fputc('\n', f);
}

static void print_number(FILE *f, int64_t n)
{
    if (n >= GIB && n % GIB == 0)
        fprintf(f, "%lldG", (long long)(n / GIB));
    else if (n >= 1 << 20 && n % (1 << 20) == 0)
        fprintf(f, "%lldM", (long long)(n >> 20));
    else
        fprintf(f, "%lld", (long long)n);
}

static void print_default(FILE *f, const struct option *d)
{
    const char *field = (const char *)&defaults + d->offset;

    if (d->kind == OPTION_NUMBER && *(const int64_t *)(const void *)field) {
        fputs("  [", f);
        print_number(f, *(const int64_t *)(const void *)field);
        fputc(']', f);
    } else if (d->kind != OPTION_FLAG && d->kind != OPTION_NUMBER &&
               *(const char *const *)(const void *)field) {
        fprintf(f, "  [%s]", *(const char *const *)(const void *)field);
    }
}

void options_help(FILE *f)
{
    options_usage(f);
    fputs(
        "\nServes a model of the InternVL3 family over gRPC (package internvl.v1, with health and\n"
        "reflection). Alone, it starts as many ranks as the layout needs, under mpirun where they\n"
        "share tensors (tensor or pipeline parallel); under mpirun or srun it is one rank of the\n"
        "job.\n",
        f);
    for (size_t i = 0; i < N_OPTIONS; i++) {
        const struct option *d = &table[i];

        if (d->group)
            fprintf(f, "\n%s:\n", d->group);
        fprintf(f, "%*s%s", HELP_COLUMN, "", d->name);
        if (d->alias)
            fprintf(f, ", %s", d->alias);
        if (d->argument)
            fprintf(f, " %s", d->argument);
        print_default(f, d);
        fputc('\n', f);
        print_wrapped(f, d->help);
    }
    fputs(
        "\nNumbers take K, M and G. Values in brackets are defaults.\n"
        "\nEnvironment:\n"
        "    INTERNVLD_LOG=debug|info|warn|error[,SUBSYSTEM...]   what is logged to standard "
        "error\n"
        "    INTERNVLD_ISA=NAME                                   instruction set of the kernels\n"
        "    INTERNVLD_TRACE=FILE                                 timeline of all ranks, for "
        "Perfetto or\n"
        "                                                         chrome://tracing; 256 MiB at "
        "most\n"
        "\nExit status: 0 after a drain, 1 when something failed or a rank was lost, 2 for a "
        "wrong\n"
        "command line.\n",
        f);
}
