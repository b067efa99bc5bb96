/*
 * A safetensors file from foreign bytes: an error, or tensors that all lie inside the bytes.
 */
#include <stdint.h>
#include <stdlib.h>

#include "daemon/model/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct safetensors s;
    struct error err = {0};
    if (safetensors_parse(&s, data, size, "file", &err) != 0) {
        if (err.msg[0] == 0)
            abort();
        return 0;
    }
    for (int64_t i = 0; i < s.n_tensors; i++) {
        const struct safetensors_tensor *t = &s.tensors[i];
        if (t->data < data || t->n_bytes > size || t->data + t->n_bytes > data + size ||
            !safetensors_find(&s, t->name))
            abort();
    }
    safetensors_release(&s);
    return 0;
}
