/*
 * Do the ranks of a job fit together? See hosts.h.
 *
 * Owns the sentences about hosts. Must not know what a setting means, nor MPI: launch carries.
 */
#include "parallel/hosts.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"
#include "parallel/launch.h"

/* ---- exchange ---- */

int hosts_exchange(struct rank_host *all, const struct rank_host *mine, const char *version,
                   int world, struct error *err)
{
    char own[HOSTS_VERSION_BYTES] = "";
    char *versions = xcalloc((size_t)world, HOSTS_VERSION_BYTES);
    int rc = 0;
    snprintf(own, sizeof(own), "%s", version);
    launch_all_gather(versions, own, sizeof(own));
    for (int r = 1; r < world && rc == 0; r++) {
        const char *other = versions + (size_t)r * HOSTS_VERSION_BYTES;
        if (strncmp(other, versions, HOSTS_VERSION_BYTES) != 0)
            rc = error_set(err, ERROR_FAILED_PRECONDITION,
                           "rank %d runs internvld %.*s, rank 0 runs %.*s", r, HOSTS_VERSION_BYTES,
                           other, HOSTS_VERSION_BYTES, versions);
    }
    free(versions);
    if (rc == 0)
        launch_all_gather(all, mine, sizeof(*mine));
    return rc;
}

/* ---- check ---- */

static int same_host(const struct rank_host *a, const struct rank_host *b)
{
    return strncmp(a->host, b->host, sizeof(a->host)) == 0;
}

/* A rank's own error; whose it is matters only when it is not everybody's. */
static int check_errors(const struct rank_host *all, int world, struct error *err)
{
    int first = 0;
    while (first < world && all[first].error.code == ERROR_OK)
        first++;
    if (first == world)
        return 0;
    const struct error *e = &all[first].error;
    for (int r = 0; r < world; r++)
        if (strcmp(all[r].error.msg, e->msg) != 0)
            return error_set(err, e->code, "rank %d on %s: %s", first, all[first].host, e->msg);
    *err = *e;
    return -1;
}

/* Length of the word at `text`. */
static int word_length(const char *text)
{
    return (int)strcspn(text, " ");
}

static int check_settings(const struct rank_host *all, int r, struct error *err)
{
    const char *a = all[0].settings, *b = all[r].settings;
    if (strcmp(a, b) == 0)
        return 0;
    for (;;) {
        int n = word_length(a), m = word_length(b);
        if (n != m || strncmp(a, b, (size_t)n) != 0)
            return error_set(err, ERROR_FAILED_PRECONDITION,
                             "rank %d on %s has %.*s, rank 0 on %s has %.*s", r, all[r].host, m, b,
                             all[0].host, n, a);
        a += n + (a[n] == ' ');
        b += m + (b[m] == ' ');
    }
}

/* Ranks before `end` on the host of rank `r` that use a GPU in that way. */
static int count_uses(const struct rank_host *all, int end, int r, enum device_use use)
{
    int n = 0;
    for (int i = 0; i < end; i++)
        n += same_host(&all[i], &all[r]) && all[i].device_use == (int32_t)use;
    return n;
}

static int check_devices(const struct rank_host *all, int world, int r, struct error *err)
{
    int n_own = count_uses(all, world, r, DEVICE_USE_OWN);
    if (n_own > all[r].n_devices)
        return error_set(err, ERROR_FAILED_PRECONDITION,
                         "%d ranks on %s need a GPU each and this build finds %d there%s", n_own,
                         all[r].host, all[r].n_devices,
                         all[r].n_devices > 0 ? " (--vision-share-gpu: vision ranks share)" : "");
    if (all[r].device_use == DEVICE_USE_SHARED && all[r].n_devices == 0)
        return error_set(err, ERROR_FAILED_PRECONDITION,
                         "rank %d shares a GPU of %s and this build finds none there", r,
                         all[r].host);
    return 0;
}

/* Ranks before `r` agree. */
static int check_kind(const struct rank_host *all, int r, struct error *err)
{
    int first = 0;
    while (all[first].device_use == DEVICE_USE_NONE && first < r)
        first++;
    if (all[r].device_use == DEVICE_USE_NONE ||
        strncmp(all[r].device_name, all[first].device_name, sizeof(all[r].device_name)) == 0)
        return 0;
    return error_set(err, ERROR_FAILED_PRECONDITION,
                     "rank %d on %s has a GPU of another kind (%.64s) than rank %d on %s (%.64s)",
                     r, all[r].host, all[r].device_name, first, all[first].host,
                     all[first].device_name);
}

int hosts_device(const struct rank_host *all, int world, int r)
{
    int n_own = count_uses(all, world, r, DEVICE_USE_OWN);
    if (all[r].device_use == DEVICE_USE_OWN)
        return count_uses(all, r, r, DEVICE_USE_OWN);
    if (all[r].device_use == DEVICE_USE_SHARED)
        return count_uses(all, r, r, DEVICE_USE_SHARED) % (n_own > 0 ? n_own : all[r].n_devices);
    return -1;
}

int hosts_check(const struct rank_host *all, int world, struct error *err)
{
    if (check_errors(all, world, err))
        return -1;
    for (int r = 1; r < world; r++) {
        if (check_settings(all, r, err))
            return -1;
        if (all[r].checkpoint_hash != all[0].checkpoint_hash)
            return error_set(err, ERROR_FAILED_PRECONDITION,
                             "rank %d on %s has another checkpoint than rank 0 on %s (config.json "
                             "or the sizes of its safetensors files differ)",
                             r, all[r].host, all[0].host);
    }
    for (int r = 0; r < world; r++)
        if (check_devices(all, world, r, err) || check_kind(all, r, err))
            return -1;
    return 0;
}

/* ---- advice ---- */

static void warn_stage(const struct rank_host *all, const struct topology *t, int stage)
{
    const struct rank_host *first = &all[topology_language_rank(t, stage, 0)];
    for (int shard = 1; shard < t->layout.tensor_parallel; shard++) {
        const struct rank_host *other = &all[topology_language_rank(t, stage, shard)];
        if (same_host(first, other))
            continue;
        log_warn("hosts",
                 "stage %d has shards on %s and %s: each layer waits for the network twice; place "
                 "the shards of a stage on one host",
                 stage, first->host, other->host);
        return;
    }
}

/* Index of rank r among its host's ranks, and how many those are. */
static int place_on_host(const struct rank_host *all, int world, int r, int *n_on_host)
{
    int index = 0;
    *n_on_host = 0;
    for (int i = 0; i < world; i++)
        if (same_host(&all[i], &all[r])) {
            index += i < r;
            *n_on_host += 1;
        }
    return index;
}

/* The gateway computes nothing. */
static int is_peer(const struct rank_host *all, int r, int other)
{
    return same_host(&all[r], &all[other]) && all[r].cores_hash == all[other].cores_hash &&
           (r == 0) == (other == 0);
}

int hosts_n_sharing_cores(const struct rank_host *all, int world, int r)
{
    int n = 0;
    for (int i = 0; i < world; i++)
        n += is_peer(all, r, i);
    return n;
}

int hosts_first_sharing_cores(const struct rank_host *all, int r, int *index)
{
    int first = r;
    *index = 0;
    for (int i = r - 1; i >= 0; i--)
        if (is_peer(all, r, i)) {
            first = i;
            *index += 1;
        }
    return first;
}

void hosts_warn(const struct rank_host *all, const struct topology *t)
{
    for (int stage = 0; stage < t->layout.pipeline_parallel; stage++)
        warn_stage(all, t, stage);
    for (int r = 1; r < t->world; r++) {
        int n_threads = 0, most = 0, first = r;
        for (int i = 1; i < t->world; i++) {
            if (!is_peer(all, r, i))
                continue;
            first = i < first ? i : first;
            n_threads += all[i].n_threads;
            most = all[i].n_threads > most ? all[i].n_threads : most;
        }
        /* Of one each there is no fewer, and who says when it is at work takes its share. */
        if (first == r && n_threads > all[r].n_cores && most > 1 && all[r].memory.n_bytes == 0)
            log_warn("hosts", "%s: rank %d and those on the same cores have %d threads on %d cores",
                     all[r].host, r, n_threads, all[r].n_cores);
    }
}

void hosts_print(FILE *f, const struct rank_host *all, const struct topology *t)
{
    int width = (int)strlen("host");
    for (int r = 0; r < t->world; r++)
        if ((int)strlen(all[r].host) > width)
            width = (int)strlen(all[r].host);
    fprintf(f, "%4s  %-26s  %-*s  %7s  %7s  %5s  %s\n", "rank", "role", width, "host", "on host",
            "threads", "cores", "device");
    for (int r = 0; r < t->world; r++) {
        char role[64], device[32] = "cpu";
        int n_on_host, index = place_on_host(all, t->world, r, &n_on_host);
        if (all[r].device_use != DEVICE_USE_NONE)
            snprintf(device, sizeof(device), "gpu %d of %d%s", hosts_device(all, t->world, r),
                     all[r].n_devices, all[r].device_use == DEVICE_USE_SHARED ? ", shared" : "");
        else if (all[r].n_threads == 0)
            snprintf(device, sizeof(device), "-");
        fprintf(f, "%4d  %-26s  %-*s  %2d of %-2d  %7d  %5d  %s\n", r,
                topology_describe(t, r, role, sizeof(role)), width, all[r].host, index + 1,
                n_on_host, all[r].n_threads, all[r].n_cores, device);
    }
}
