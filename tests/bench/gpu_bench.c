/*
 * How near the models come to what a GPU can do: gpu_bench [option...], which --help lists.
 *
 * Weights are random. The language model decodes with 1, 8 and 64 sequences of 4096 tokens and
 * takes a prompt of 8192; the vision tower takes 1 and 13 tiles. int4 is --quantization int4: the
 * vision tower and lm_head are int8 then. fp8 has a scale a row and leaves lm_head as it is;
 * fp8-fp8 rounds activations too (--activation-quantization fp8), and its limit is of products in
 * FP8. Each round measures the device's own limits (gpu_limits.h) and then the model; a line has
 * the medians and the share of the limit: of the time that the weights and the cache take to be
 * read, or the float operations to be done, whichever is longer. Reading alone can pass a copy's
 * speed by a little. Figures, no verdicts. In an emulated build nothing is timed. Status 77: no
 * device.
 */
#include <stdlib.h>
#include <string.h>

#include "daemon/model/device.h"
#include "kernels/clock.h"
#include "kernels/log.h"
#include "tests/bench/bench_median.h"
#include "tests/bench/gpu_bench.h"

#define N_ROUNDS_MAX 99
#define N_WARM_UP 2

/* 1 where kernels/cuda_*.cu run on tests/cuda_emulation, whose times mean nothing. */
static const int is_emulated = GPU_BENCH_EMULATED;

static const char usage[] =
    "usage: gpu_bench [--model DIR] [--shards N] [--layers N] [--part language|vision]\n"
    "                 [--format bfloat16|fp8|fp8-fp8|int4] [--rounds N] [--device N] [--csv FILE]\n"
    "                 [--small]\n\n"
    "Times a shard of the language model (decode, prefill) and the vision tower with random\n"
    "weights on a GPU, beside the limits of that GPU measured in the same rounds.\n\n"
    "    --model DIR     its config.json gives the shapes [InternVL3-78B]\n"
    "    --shards N      tensor parallelism; shard 0 of so many is measured [8]\n"
    "    --layers N      of the language model, to save memory and time [all]\n"
    "    --part NAME     language or vision [both]\n"
    "    --format NAME   bfloat16, fp8, fp8-fp8 (activations too) or int4 [all, one after the "
    "other]\n"
    "    --rounds N      [7]\n"
    "    --device N      number of the GPU [0]\n"
    "    --csv FILE      a table with a line a case\n"
    "    --small         few tokens and small limits: for a tiny model, to test this program\n";

/* ---- one case ---- */

int gpu_bench_wants(const struct gpu_bench *bench, const struct gpu_format *f)
{
    if (bench->only_format && strcmp(bench->only_format, f->name) != 0)
        return 0;
    int in_fp8 = f->quantization.x_format == WEIGHT_FP8;
    if (in_fp8 && !bench->b->has_fp8)
        printf("skipped: %s: %s has no products in FP8\n", f->name, bench->device);
    return !in_fp8 || bench->b->has_fp8;
}

void gpu_case_add(struct gpu_case *c, const struct linear *l, int64_t rows)
{
    double flops = 2.0 * (double)rows * (double)l->out_dim * (double)l->in_dim;
    *(l->x_format == WEIGHT_FP8 ? &c->fp8_flops : &c->flops) += flops;
    c->bytes += (double)l->packed_bytes;
}

/* Medians over the rounds. */
struct figures {
    double time_s, bytes_per_s, flops_per_s; // of the case; the device's limits for it
    double share;
    const char *bound; // "memory" or "arithmetic"
};

static struct figures measure_rounds(struct gpu_bench *bench, const struct gpu_case *c)
{
    double times[N_ROUNDS_MAX], bytes[N_ROUNDS_MAX], flops[N_ROUNDS_MAX], shares[N_ROUNDS_MAX];
    struct figures f = {0};

    for (int i = 0; i < N_WARM_UP; i++)
        c->run(c->arg);
    for (int i = 0; i < bench->n_rounds; i++) {
        struct gpu_limits_rates r = gpu_limits_measure(&bench->limits);
        uint64_t begun = clock_now_ns();
        c->run(c->arg);
        times[i] = (double)(clock_now_ns() - begun) * 1e-9;
        bytes[i] = r.bytes_per_s;
        double memory_s = c->bytes / bytes[i], arithmetic_s = c->flops / r.flops_per_s;
        if (c->fp8_flops > 0)
            arithmetic_s += c->fp8_flops / r.fp8_flops_per_s;
        flops[i] = (c->flops + c->fp8_flops) / arithmetic_s;
        shares[i] = (memory_s > arithmetic_s ? memory_s : arithmetic_s) / times[i];
    }
    f.time_s = bench_median(times, bench->n_rounds);
    f.bytes_per_s = bench_median(bytes, bench->n_rounds);
    f.flops_per_s = bench_median(flops, bench->n_rounds);
    f.share = bench_median(shares, bench->n_rounds);
    double memory_s = c->bytes / f.bytes_per_s;
    f.bound = memory_s > (c->flops + c->fp8_flops) / f.flops_per_s ? "memory" : "arithmetic";
    return f;
}

void gpu_bench_measure(struct gpu_bench *bench, const struct gpu_case *c)
{
    struct figures f = measure_rounds(bench, c);
    double gb = c->bytes * 1e-9, tflop = (c->flops + c->fp8_flops) * 1e-12;

    printf("%-8s %-14s %-8s %5lld of %5lld %9.3f GB %9.4f TFLOP", c->part, c->what, c->format,
           (long long)c->n, (long long)c->context, gb, tflop);
    if (is_emulated)
        printf("  emulated: not timed\n");
    else
        printf(" %9.3f ms %7.0f GB/s of %5.0f %7.1f TFLOP/s of %6.1f %4.0f %% of %s\n",
               f.time_s * 1e3, gb / f.time_s, f.bytes_per_s * 1e-9, tflop / f.time_s,
               f.flops_per_s * 1e-12, f.share * 100, f.bound);
    fflush(stdout);
    if (!bench->csv)
        return;
    fprintf(bench->csv, "%s,%s,%d,%d,%s,%s,%s,%lld,%lld,%d,%.12g,%.12g,", bench->device,
            bench->config.name, bench->n_shards, c->n_layers, c->part, c->what, c->format,
            (long long)c->n, (long long)c->context, bench->n_rounds, gb, tflop);
    if (is_emulated)
        fprintf(bench->csv, ",,,,,,\n");
    else
        fprintf(bench->csv, "%.4f,%.1f,%.1f,%.2f,%.2f,%s,%.3f\n", f.time_s * 1e3, gb / f.time_s,
                f.bytes_per_s * 1e-9, tflop / f.time_s, f.flops_per_s * 1e-12, f.bound, f.share);
    fflush(bench->csv);
}

/* ---- options ---- */

static int number(const char *text, long least, long most)
{
    char *end;
    long n = strtol(text, &end, 10);
    if (*end || n < least || n > most)
        die("%s: not a number from %ld to %ld", text, least, most);
    return (int)n;
}

static const char *part(const char *text)
{
    if (strcmp(text, "language") != 0 && strcmp(text, "vision") != 0 && strcmp(text, "both") != 0)
        die("%s: it must be one of language, vision, both", text);
    return text;
}

static const char *format(const char *text)
{
    for (int i = 0; i < n_gpu_formats; i++)
        if (strcmp(text, gpu_formats[i].name) == 0)
            return text;
    die("%s: no such format (--help)", text);
}

static void parse(struct gpu_bench *bench, struct device_options *device, int *n_layers, int argc,
                  char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i];
        if (strcmp(name, "--help") == 0) {
            fputs(usage, stdout);
            exit(0);
        }
        if (strcmp(name, "--small") == 0) {
            bench->is_small = 1;
            continue;
        }
        const char *value = argv[++i];
        if (!value)
            die("%s is unknown or needs a value (--help)", name);
        if (strcmp(name, "--model") == 0)
            bench->dir = value;
        else if (strcmp(name, "--shards") == 0)
            bench->n_shards = number(value, 1, 8);
        else if (strcmp(name, "--layers") == 0)
            *n_layers = number(value, 1, 1024);
        else if (strcmp(name, "--part") == 0)
            bench->only_part = part(value);
        else if (strcmp(name, "--format") == 0)
            bench->only_format = format(value);
        else if (strcmp(name, "--rounds") == 0)
            bench->n_rounds = number(value, 1, N_ROUNDS_MAX);
        else if (strcmp(name, "--device") == 0)
            device->index = number(value, 0, 1024);
        else if (strcmp(name, "--csv") == 0 && !(bench->csv = fopen(value, "w")))
            die("%s cannot be written", value);
        else if (strcmp(name, "--csv") != 0)
            die("unknown option %s (--help)", name);
    }
}

static int wants_part(const struct gpu_bench *bench, const char *part)
{
    return !bench->only_part || strcmp(bench->only_part, "both") == 0 ||
           strcmp(bench->only_part, part) == 0;
}

int main(int argc, char **argv)
{
    struct gpu_bench bench = {.dir = INTERNVLD_SOURCE_DIR "/tests/data/configs/internvl3-78b",
                              .n_shards = 8,
                              .n_rounds = 7};
    struct device_options device = {.kind = DEVICE_CUDA, .dtype = DTYPE_BF16};
    int n_layers = 0;
    struct error err;
    char name[96];

    log_init();
    parse(&bench, &device, &n_layers, argc, argv);
    if (device_count() == 0) {
        printf("skipped: this machine has no CUDA device\n");
        return 77;
    }
    if (model_config_load(&bench.config, bench.dir, &err) != 0)
        die("%s", err.msg);
    if (n_layers && n_layers < bench.config.text.n_layers)
        bench.config.text.n_layers = n_layers;
    device_name(name, sizeof(name));
    bench.device = name;
    bench.b = device_open_backend(&device);
    printf("device: %s%s\n", bench.b->ops->describe(bench.b), is_emulated ? ", emulated" : "");
    gpu_limits_open(&bench.limits, bench.b, bench.is_small ? 1 << 20 : (size_t)512 << 20,
                    bench.is_small ? 256 : 8192);
    if (bench.csv)
        fprintf(bench.csv,
                "device,model,shards,layers,part,what,format,n,context,rounds,gb,tflop,ms,"
                "gb_per_s,limit_gb_per_s,tflop_per_s,limit_tflop_per_s,bound,share\n");
    if (wants_part(&bench, "language"))
        gpu_bench_language(&bench);
    if (wants_part(&bench, "vision"))
        gpu_bench_vision(&bench);
    gpu_limits_close(&bench.limits);
    backend_close(bench.b);
    if (bench.csv && fclose(bench.csv) != 0)
        die("the CSV cannot be written");
    return 0;
}
