/*
 * How near every op comes to what this machine can do: op_bench [option...], which --help lists.
 *
 * Each round measures the machine's own limits (op_limits.h) and then the op; a line has the
 * medians and the op's share of its limit: of the time that its bytes take to be read, or its
 * operations to be done, whichever is longer. What stays in a cache can exceed the memory's limit.
 * Products of int8-int8 and int4-int8 round x to int8 too; their operations are whole numbers'.
 * Figures, no verdicts: these machines are shared.
 */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/clock.h"
#include "kernels/cpu_backend.h"
#include "kernels/log.h"
#include "tests/bench/bench_median.h"
#include "tests/bench/op_bench.h"

#define N_ROUNDS_MAX 99
/* Time of an op a round, at least; and of all rounds of one case, when there are three at least. */
#define WINDOW_NS 2000000
#define CASE_NS 3000000000

static const char usage[] =
    "usage: op_bench [--model NAME] [--op NAME] [--format NAME] [--rows N] [--isa NAME]\n"
    "                [--threads N] [--rounds N] [--layers N] [--csv FILE]\n\n"
    "Times the ops of a model's shapes beside the limits of this machine measured in the same\n"
    "rounds.\n\n"
    "    --model NAME    1b, 8b or 78b (one shard of eight and one vision rank) [all]\n"
    "    --op NAME       one op of kernels/backend.h; \"limits\": the machine's alone [all]\n"
    "    --format NAME   one format of weights or pages [all]\n"
    "    --rows N        products of so many rows [several]\n"
    "    --isa NAME      of the kernels and the limits [INTERNVLD_ISA, or the best]\n"
    "    --threads N     [the processors]\n"
    "    --rounds N      [7]\n"
    "    --layers N      paged_attention reads the pages of N layers in turn, as a model does:\n"
    "                    many are in no cache [1, again and again]\n"
    "    --csv FILE      a table with a line a case\n";

static const struct shapes models[] = {
    {"1b", 896, 14, 2, 64, 4864, 151674, 8, 1024, 16, 4096},
    {"8b", 3584, 28, 4, 128, 18944, 151674, 8, 1024, 16, 4096},
    {"78b", 8192, 8, 1, 128, 3696, 18960, 1, 3200, 25, 12800},
};

int bench_wants(const struct bench *bench, const char *op, const char *format)
{
    return (!bench->only_op || strcmp(bench->only_op, op) == 0) &&
           (!bench->only_format || strcmp(bench->only_format, format) == 0);
}

void *bench_values(const struct bench *bench, enum dtype dtype, int64_t n)
{
    static const uint32_t ones =
        0x3f803f80; // 1 in bfloat16, twice; a little more than 1 in float32
    const size_t n_bytes = (size_t)n * dtype_size(dtype);
    uint32_t *p = op_alloc(bench->b, (n_bytes + 3) / 4 * 4);
    for (size_t i = 0; i < (n_bytes + 3) / 4; i++)
        p[i] = (ones + (uint32_t)(i * 2654435761u % 64) * 0x10001u) | (uint32_t)(i & 1) << 31;
    return p;
}

struct tensor bench_matrix(const struct bench *bench, enum dtype dtype, int64_t m, int64_t n)
{
    return tensor_2d(bench_values(bench, dtype, m * n), dtype, m, n);
}

/* Seconds of one call. */
static double time_of(const struct op_case *c, int n_calls)
{
    uint64_t begun = clock_now_ns();
    for (int i = 0; i < n_calls; i++)
        c->run(c->arg);
    return (double)(clock_now_ns() - begun) * 1e-9 / n_calls;
}

void bench_measure(const struct bench *bench, const struct op_case *c)
{
    double times[N_ROUNDS_MAX], shares[N_ROUNDS_MAX], bytes[N_ROUNDS_MAX], flops[N_ROUNDS_MAX];
    double once = time_of(c, 1);
    const int n_calls = once < WINDOW_NS * 1e-9 ? (int)(WINDOW_NS * 1e-9 / (once + 1e-8)) + 1 : 1;
    uint64_t begun = clock_now_ns();
    struct limits limits = bench->limits;
    double memory_s = 0, arithmetic_s = 0;
    int n = 0;
    for (; n < bench->n_rounds && (n < 3 || clock_now_ns() - begun < CASE_NS); n++) {
        struct limits_rates r = limits_measure(&limits);
        times[n] = time_of(c, n_calls);
        bytes[n] = r.bytes_per_s;
        flops[n] = r.ops_per_s[c->arithmetic];
        memory_s = c->bytes / bytes[n];
        arithmetic_s = c->flops / flops[n];
        shares[n] = (memory_s > arithmetic_s ? memory_s : arithmetic_s) / times[n];
    }
    double t = bench_median(times, n), share = bench_median(shares, n);
    double read = bench_median(bytes, n) * 1e-9, peak = bench_median(flops, n) * 1e-9;
    const char *bound = memory_s > arithmetic_s ? "memory" : "arithmetic";
    double gb = c->bytes / t * 1e-9, gflop = c->flops / t * 1e-9;
    printf("%-4s %-16s %-16s %-9s %6lld rows %11.1f us %7.1f GB/s of %5.1f %7.1f %s of %6.1f "
           "%4.0f %% of %s\n",
           bench->shapes->model, c->op, c->what, c->format, (long long)c->rows, t * 1e6, gb, read,
           gflop, c->arithmetic == ARITHMETIC_INT8 ? "GOP/s" : "GFLOP/s", peak, share * 100, bound);
    fflush(stdout);
    if (bench->csv)
        fprintf(bench->csv, "%s,%s,%s,%s,%lld,%s,%d,%.2f,%.2f,%.2f,%.2f,%.2f,%s,%.3f\n",
                bench->shapes->model, c->op, c->what, c->format, (long long)c->rows,
                bench->limits.isa, bench->b->n_threads, t * 1e6, gb, read, gflop, peak, bound,
                share);
}

/* Each thread on a processor of its own, where there are enough: two on one would measure half. */
static void pin_work(void *arg, int thread, int n_threads)
{
    const cpu_set_t *allowed = arg;
    cpu_set_t one;
    int at = 0;
    if (n_threads > CPU_COUNT(allowed))
        return;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, allowed) || at++ != thread)
            continue;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        if (sched_setaffinity(0, sizeof(one), &one) != 0)
            die("a thread cannot be bound to processor %d", cpu);
    }
}

static void pin_threads(struct backend *b)
{
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0)
        cpu_parallel(b, INT64_MAX, pin_work, &allowed);
}

static long number(const char *text, long most)
{
    char *end;
    long n = strtol(text, &end, 10);
    if (*end || n < 1 || n > most)
        die("%s: not a number from 1 to %ld", text, most);
    return n;
}

int main(int argc, char **argv)
{
    log_init();
    const char *model = NULL, *isa = getenv("INTERNVLD_ISA");
    long n_threads = sysconf(_SC_NPROCESSORS_ONLN);
    struct bench bench = {.n_rounds = 7, .n_layers = 1};
    for (int i = 1; i < argc; i += 2) {
        const char *name = argv[i], *value = argv[i + 1];
        if (strcmp(name, "--help") == 0) {
            fputs(usage, stdout);
            return 0;
        }
        if (!value)
            die("%s is unknown or needs a value (--help)", name);
        if (strcmp(name, "--model") == 0)
            model = value;
        else if (strcmp(name, "--op") == 0)
            bench.only_op = value;
        else if (strcmp(name, "--format") == 0)
            bench.only_format = value;
        else if (strcmp(name, "--rows") == 0)
            bench.only_rows = number(value, 1 << 20);
        else if (strcmp(name, "--isa") == 0)
            isa = value;
        else if (strcmp(name, "--threads") == 0)
            n_threads = number(value, 1024);
        else if (strcmp(name, "--rounds") == 0)
            bench.n_rounds = (int)number(value, N_ROUNDS_MAX);
        else if (strcmp(name, "--layers") == 0)
            bench.n_layers = (int)number(value, BENCH_LAYERS_MAX);
        else if (strcmp(name, "--csv") == 0 && !(bench.csv = fopen(value, "w")))
            die("%s cannot be written", value);
        else if (strcmp(name, "--csv") != 0)
            die("unknown option %s (--help)", name);
    }
    if (!isa || strcmp(isa, "auto") == 0)
        isa = backend_cpu_best();
    bench.b = backend_cpu_open((int)n_threads, isa);
    pin_threads(bench.b);
    limits_open(&bench.limits, bench.b, isa);
    printf("%s\n", bench.b->ops->describe(bench.b));
    if (bench.csv)
        fprintf(bench.csv, "model,op,what,format,rows,isa,threads,us,gb_per_s,limit_gb_per_s,"
                           "gflop_per_s,limit_gflop_per_s,bound,share\n");
    for (size_t i = 0; i < sizeof(models) / sizeof(models[0]); i++) {
        if (model && strcmp(model, models[i].model) != 0)
            continue;
        bench.shapes = &models[i];
        bench_matmul(&bench);
        bench_others(&bench);
    }
    limits_close(&bench.limits);
    backend_close(bench.b);
    if (bench.csv && fclose(bench.csv) != 0)
        die("the CSV cannot be written");
    return 0;
}
