/*
 * The choice between the CPU and CUDA, and between MPI and NCCL (device.h).
 */
#include "daemon/model/device.h"

#include "kernels/cuda_backend.h"
#include "kernels/log.h"
#include "parallel/comm_nccl.h"

int device_count(void)
{
    return backend_cuda_count();
}

void device_name(char *name, size_t n_bytes)
{
    backend_cuda_name(name, n_bytes);
}

void device_pci_address(int index, char *address, size_t n_bytes)
{
    backend_cuda_pci_address(index, address, n_bytes);
}

enum dtype device_activation_dtype(enum device_kind kind, enum dtype dtype)
{
    return kind == DEVICE_CUDA ? dtype : DTYPE_F32;
}

struct backend *device_open_backend(const struct device_options *o)
{
    struct cuda_options cuda = {.device = o->index,
                                .n_threads = o->n_threads,
                                .activation_dtype = device_activation_dtype(o->kind, o->dtype),
                                .deterministic = o->deterministic,
                                .enforce_eager = o->enforce_eager};

    struct backend *b =
        o->kind == DEVICE_CUDA ? backend_cuda_open(&cuda) : backend_cpu_open(o->n_threads, o->isa);
    if (o->kind == DEVICE_CPU && o->cores.claims)
        backend_cpu_share(b, &o->cores);
    return b;
}

/* A group of the language ranks that share `color`, ordered by `key`; others pass -1. */
static struct comm *open_group(const struct device *d, const struct device_options *o,
                               const struct topology *t, int color, int key, size_t max_bytes)
{
    struct comm_nccl_options nccl = {
        .max_bytes = max_bytes, .deterministic = o->deterministic, .one_shot = o->one_shot};

    if (o->kind == DEVICE_CUDA)
        return comm_nccl_open(color < 0 ? NULL : d->backend, t->rank, t->world, color, key, &nccl);
    return comm_mpi_open(color, key, max_bytes);
}

void device_open(struct device *d, const struct device_options *o, const struct topology *t,
                 size_t max_bytes)
{
    int language = t->role == ROLE_LANGUAGE;

    *d = (struct device){.backend = t->role == ROLE_GATEWAY ? NULL : device_open_backend(o)};
    if (d->backend && o->x_format == WEIGHT_FP8 && !d->backend->has_fp8)
        die("--activation-quantization fp8: %s has no products in FP8, sm_89 or newer is needed",
            d->backend->ops->describe(d->backend));
    if (d->backend && o->x_format == WEIGHT_INT8 && !d->backend->has_int8)
        die("--activation-quantization int8: %s has no products of integers",
            d->backend->ops->describe(d->backend));
    if (!layout_shares_tensors(&t->layout))
        return;
    d->comm.shards =
        open_group(d, o, t, language ? t->stage : -1, language ? t->shard : 0, max_bytes);
    d->comm.stages = open_group(d, o, t, language ? t->shard : -1, language ? t->stage : 0, 0);
}

void device_close(struct device *d)
{
    comm_close(d->comm.stages);
    comm_close(d->comm.shards);
    if (d->backend)
        backend_close(d->backend);
    *d = (struct device){0};
}
