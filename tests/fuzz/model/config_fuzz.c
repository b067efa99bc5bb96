/*
 * config.json and generation_config.json from foreign bytes: an error or a config whose sizes
 * agree. Up to the first NUL byte is config.json, the rest generation_config.json.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/model/config.h"
#include "daemon/model/weight_list.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct model_config c;
    struct error err = {0};
    const uint8_t *nul = memchr(data, 0, size);
    size_t n = nul ? (size_t)(nul - data) : size;
    const char *generation = nul ? (const char *)nul + 1 : NULL;
    if (model_config_parse(&c, (const char *)data, n, generation, nul ? size - n - 1 : 0, &err) !=
        0) {
        if (err.msg[0] == 0)
            abort();
        return 0;
    }
    if (c.vision.head_dim * c.vision.n_heads != c.vision.hidden_size || c.n_features_per_tile < 1 ||
        c.text.n_heads % c.text.n_kv_heads != 0 || c.n_eos > 8)
        abort();
    if ((int64_t)c.text.n_layers * (c.text.n_experts + 1) + c.vision.n_layers < 2000) {
        struct weight_list list;
        weight_list_init(&list, &c);
        weight_list_release(&list);
    }
    return 0;
}
