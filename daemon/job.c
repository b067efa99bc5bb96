/*
 * A rank describes itself. See job.h.
 */
#include "daemon/job.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/log.h"

/* With a GPU they bring the weights, copy and draw tokens: a few reach what the bus takes. */
#define CUDA_THREADS_MAX 8

/* Of ranks with the same cores, 1024 at most. */
#define CLAIMS_BYTES ((size_t)64 << 10)

/* FNV-1a, 64 bits: tells files apart that differ by accident, not by design. */
#define HASH_BASIS 0xcbf29ce484222325u
#define HASH_PRIME 0x100000001b3u

static uint64_t hash_bytes(uint64_t hash, const void *bytes, size_t n)
{
    const uint8_t *b = bytes;

    for (size_t i = 0; i < n; i++)
        hash = (hash ^ b[i]) * HASH_PRIME;
    return hash;
}

static uint64_t hash_file(uint64_t hash, int dir_fd, const char *name)
{
    uint8_t bytes[4096];
    ssize_t n;
    int fd = openat(dir_fd, name, O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return hash;
    while ((n = read(fd, bytes, sizeof(bytes))) > 0)
        hash = hash_bytes(hash, bytes, (size_t)n);
    close(fd);
    return hash;
}

static int is_weights(const struct dirent *e)
{
    static const char end[] = ".safetensors";
    size_t n = strlen(e->d_name);

    return n >= sizeof(end) - 1 && strcmp(e->d_name + n - (sizeof(end) - 1), end) == 0;
}

/* config.json's bytes, and the name and size of each safetensors file: reading all weights would
 * take as long as loading them. */
static uint64_t hash_checkpoint(const char *dir)
{
    struct dirent **entries;
    uint64_t hash = HASH_BASIS;
    int dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int n = dir_fd < 0 ? -1 : scandirat(dir_fd, ".", &entries, is_weights, alphasort);

    if (dir_fd >= 0)
        hash = hash_file(hash, dir_fd, "config.json");
    for (int i = 0; i < n; i++) {
        struct stat st;

        if (fstatat(dir_fd, entries[i]->d_name, &st, 0) == 0) {
            int64_t n_bytes = st.st_size;
            hash = hash_bytes(hash, entries[i]->d_name, strlen(entries[i]->d_name));
            hash = hash_bytes(hash, &n_bytes, sizeof(n_bytes));
        }
        free(entries[i]);
    }
    if (n >= 0)
        free(entries);
    if (dir_fd >= 0)
        close(dir_fd);
    return hash;
}

static void look_at_cores(struct rank_host *mine)
{
    cpu_set_t cores;

    mine->n_cores = 1;
    if (sched_getaffinity(0, sizeof(cores), &cores) != 0)
        return;
    mine->n_cores = CPU_COUNT(&cores);
    mine->cores_hash = hash_bytes(HASH_BASIS, &cores, sizeof(cores));
}

static void write_settings(char *text, size_t n_bytes, const struct options *o, const char *dtype,
                           int32_t n_pages)
{
    int n = snprintf(text, n_bytes,
                     "--dtype=%s --device=%s --deterministic=%lld --enforce-eager=%lld "
                     "--disable-custom-all-reduce=%lld --vision-share-gpu=%lld --load-format=%s "
                     "--quantization=%s --quantization-group-size=%lld "
                     "--activation-quantization=%s "
                     "--tensor-parallel-size=%lld --pipeline-parallel-size=%lld "
                     "--vision-ranks=%lld --max-model-len=%lld --max-num-seqs=%lld "
                     "--max-num-batched-tokens=%lld "
                     "--block-size=%lld --kv-cache-dtype=%s --max-vision-tiles=%lld KV-pages=%d",
                     dtype, o->device, (long long)o->deterministic, (long long)o->enforce_eager,
                     (long long)o->disable_custom_all_reduce, (long long)o->vision_share_gpu,
                     o->load_format, o->quantization, (long long)o->quantization_group_size,
                     o->activation_quantization, (long long)o->tensor_parallel_size,
                     (long long)o->pipeline_parallel_size, (long long)o->vision_ranks,
                     (long long)o->max_model_len, (long long)o->max_num_seqs,
                     (long long)o->max_num_batched_tokens, (long long)o->block_size,
                     o->kv_cache_dtype, (long long)o->max_vision_tiles, n_pages);

    if (n >= (int)n_bytes)
        BUG("settings of %d bytes", n);
}

void job_describe(struct rank_host *mine, const struct options *o, const char *dtype,
                  int32_t n_pages, const struct error *error)
{
    memset(mine, 0, sizeof(*mine));
    gethostname(mine->host, sizeof(mine->host) - 1);
    mine->error = *error;
    look_at_cores(mine);
    if (!o->threads)
        host_memory_offer(&mine->memory, CLAIMS_BYTES);
    mine->n_devices = device_count();
    device_name(mine->device_name, sizeof(mine->device_name));
    if (error->code != ERROR_OK)
        return;
    mine->checkpoint_hash = hash_checkpoint(o->model);
    write_settings(mine->settings, sizeof(mine->settings), o, dtype, n_pages);
}

enum device_kind job_choose_device(struct rank_host *all, const struct options *o,
                                   const struct topology *t)
{
    enum device_kind kind = strcmp(o->device, "cpu") == 0 ? DEVICE_CPU : DEVICE_CUDA;

    if (strcmp(o->device, "auto") == 0)
        for (int r = 1; r < t->world; r++)
            if (all[r].n_devices == 0)
                kind = DEVICE_CPU;
    for (int r = 1; r < t->world; r++)
        all[r].device_use = kind == DEVICE_CPU                               ? DEVICE_USE_NONE
                            : o->vision_share_gpu && r <= t->layout.n_vision ? DEVICE_USE_SHARED
                                                                             : DEVICE_USE_OWN;
    return kind;
}

static int part_of_cores(int n_cores, int n_ranks)
{
    return n_cores > n_ranks ? n_cores / n_ranks : 1;
}

/* Of one of n_ranks ranks on these cores; who `shares` takes all while nobody else is at work. */
static int n_threads_of(const struct options *o, int n_cores, int n_ranks, enum device_kind kind,
                        int shares)
{
    int n = shares ? n_cores : part_of_cores(n_cores, n_ranks);

    if (kind == DEVICE_CUDA && n > CUDA_THREADS_MAX)
        n = CUDA_THREADS_MAX;
    return o->threads ? (int)o->threads : n;
}

int job_planned_threads(const struct options *o, int world, enum device_kind kind)
{
    struct rank_host here = {0};

    look_at_cores(&here);
    return n_threads_of(o, here.n_cores, world, kind, kind == DEVICE_CPU);
}

void job_choose_threads(struct rank_host *all, const struct options *o, const struct topology *t,
                        enum device_kind kind)
{
    for (int r = 1; r < t->world; r++) {
        int index, first = hosts_first_sharing_cores(all, r, &index);
        all[r].n_threads = n_threads_of(o, all[r].n_cores, hosts_n_sharing_cores(all, t->world, r),
                                        kind, kind == DEVICE_CPU && all[first].memory.n_bytes > 0);
    }
}

int job_share_cores(struct cpu_cores *cores, const struct rank_host *all, const struct topology *t)
{
    int first = hosts_first_sharing_cores(all, t->rank, &cores->mine);

    cores->n_ranks = hosts_n_sharing_cores(all, t->world, t->rank);
    cores->n_cores = all[t->rank].n_cores;
    if (cores->n_ranks == 1)
        return all[t->rank].n_threads;
    cores->claims = (size_t)cores->n_ranks * sizeof(*cores->claims) <= CLAIMS_BYTES
                        ? host_memory_map(&all[first].memory)
                        : NULL;
    if (cores->claims)
        return all[t->rank].n_threads;
    log_warn("job", "ranks on these %d cores cannot tell each other when they are at work",
             cores->n_cores);
    return part_of_cores(cores->n_cores, cores->n_ranks);
}
