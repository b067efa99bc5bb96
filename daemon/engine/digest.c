/* SHA-256 through libcrypto's EVP; see digest.h. */
#include "daemon/engine/digest.h"

#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

struct hasher {
    EVP_MD *algorithm;
    EVP_MD_CTX *context;
};

static void check(int status)
{
    if (status != 1)
        die("SHA-256: libcrypto failed");
}

struct hasher *hasher_new(void)
{
    struct hasher *h = xcalloc(1, sizeof(*h));
    h->algorithm = EVP_MD_fetch(NULL, "SHA256", NULL);
    h->context = EVP_MD_CTX_new();
    check(h->algorithm && h->context);
    return h;
}

void hasher_free(struct hasher *h)
{
    if (!h)
        return;
    EVP_MD_CTX_free(h->context);
    EVP_MD_free(h->algorithm);
    free(h);
}

void hasher_begin(struct hasher *h)
{
    check(EVP_DigestInit_ex(h->context, h->algorithm, NULL));
}

void hasher_add(struct hasher *h, const void *bytes, size_t n_bytes)
{
    check(EVP_DigestUpdate(h->context, bytes, n_bytes));
}

void hasher_end(struct hasher *h, struct digest *out)
{
    check(EVP_DigestFinal_ex(h->context, out->bytes, NULL));
}

int digest_equal(const struct digest *a, const struct digest *b)
{
    return memcmp(a->bytes, b->bytes, sizeof(a->bytes)) == 0;
}

uint64_t digest_prefix(const struct digest *d)
{
    uint64_t x;
    memcpy(&x, d->bytes, sizeof(x));
    return x;
}
