/*
 * What answers for the CUDA back end in a build without it: no device, and a sentence for those
 * who ask for one. Linked in place of internvld_cuda (cmake/cuda.cmake).
 */
#include "kernels/cuda_backend.h"

#include <string.h>

#include "kernels/log.h"

static const char *const reason = "this build has no CUDA back end (cmake -DINTERNVLD_CUDA=ON)";

int backend_cuda_count(void)
{
    return 0;
}

void backend_cuda_name(char *name, size_t n_bytes)
{
    memset(name, 0, n_bytes);
}

void backend_cuda_pci_address(int device, char *address, size_t n_bytes)
{
    memset(address, 0, n_bytes);
    die("device %d: %s", device, reason);
}

struct backend *backend_cuda_open(const struct cuda_options *o)
{
    die("device %d: %s", o->device, reason);
}

void *backend_cuda_stream(struct backend *b)
{
    BUG("%s has no stream: %s", b->ops->name, reason);
}

void backend_cuda_memory(struct backend *b, size_t *free_bytes, size_t *total_bytes)
{
    *free_bytes = *total_bytes = 0;
    BUG("%s has no device memory: %s", b->ops->name, reason);
}

void backend_cuda_tree_sum(struct backend *b, float *x, const float *parts, int n_parts, size_t n)
{
    BUG("%s: tree of %d x %zu, %p from %p: %s", b->ops->name, n_parts, n, (void *)x,
        (const void *)parts, reason);
}
